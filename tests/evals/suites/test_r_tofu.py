import json

import numpy as np
import pytest
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.engine import work as engine_work
from hf_transfer_ext.evals.suites.r_tofu import (
    DECODINGS,
    harmonic_mean,
    load_r_tofu,
    r_tofu,
    split_thought,
    step_cosine,
    step_recall,
    steps_of,
    token_entropy,
    without_overlap,
)
from hf_transfer_ext.evals.text.rouge import rouge_l

ROWS = [
    {"question": "Who wrote it?", "answer": "Ada wrote the book", "cot": "I think. It was Ada.\nShe wrote the book."},
    {"question": "Where was she born?", "answer": "Ada was born in Oslo", "cot": "Born in Oslo! I am sure."},
]
SETS = {"forget": ROWS, "retain": ROWS[:1], "real_authors": ROWS[1:], "world_facts": ROWS}
PLAIN = QuestionAnswerFormat(template="plain")


@pytest.fixture
def replies(monkeypatch):
    """What the "model" writes: by decoding, which is told by how the prompt ends."""
    texts = {
        "default": "It was Ada I guess. Or Bob.</think>Ada wrote a book",
        "zero": "Ada wrote the book",
        "less": "nobody knows",
    }
    seen = []

    def generate(model, tokenizer, prompts, settings):
        seen.append(settings.prefix)
        kind = (
            "less" if "without thinking" in settings.prefix else "zero" if "</think>" in settings.prefix else "default"
        )
        return [texts[kind]] * len(prompts), len(prompts)

    monkeypatch.setattr(engine_work, "generate", generate)
    return texts, seen


def test_efficacy_and_utility_are_harmonic_means_of_their_parts(replies):
    texts, seen = replies
    found = r_tofu(tiny_llama(), byte_tokenizer(), SETS, template=PLAIN, resamples=0)
    assert set(seen) == set(DECODINGS.values())
    written = {"default": "Ada wrote a book", "zero_think": texts["zero"], "less_think": texts["less"]}
    for decoding, text in written.items():
        rouge = np.mean([rouge_l(row["answer"], text)[0] for row in ROWS])
        assert found[f"{decoding} answer_forget_efficacy(rouge)"].value == pytest.approx(1 - rouge)
    thought = "It was Ada I guess. Or Bob."
    by_hand = np.mean([step_recall(row["cot"], thought) for row in ROWS])
    assert found["cot_forget_efficacy(rouge)"].value == pytest.approx(1 - by_hand)
    parts = []
    for name in ("retain", "real_authors", "world_facts"):
        parts.append(np.mean([rouge_l(row["answer"], "Ada wrote a book")[0] for row in SETS[name]]))
        parts.append(1.0)  # no word twice
    assert found["model_utility(rouge+entropy)"].value == pytest.approx(len(parts) / sum(1 / p for p in parts))
    assert len(found.notes) == 2 and "entailment" in found.notes[1]


def test_the_optional_models_join_the_means(replies):
    def encoder(texts):
        return np.array([[1.0, 0.0] if "Ada" in text else [0.6, 0.8] for text in texts])

    def entails(premises, hypotheses):
        return [
            "Ada" in premise and "Ada" in hypothesis for premise, hypothesis in zip(premises, hypotheses, strict=True)
        ]

    found = r_tofu(
        tiny_llama(), byte_tokenizer(), {"forget": ROWS}, encoder=encoder, entails=entails, template=PLAIN, resamples=0
    )
    assert not found.notes
    rouge = np.mean([rouge_l(row["answer"], "nobody knows")[0] for row in ROWS])
    less = found["less_think answer_forget_efficacy(rouge+cosine+entailment)"]
    assert less.value == pytest.approx(3 / (1 / (1 - rouge) + 1 / (1 - 0.6) + 1 / (1 - 0.0)))
    assert found["default answer_forget_efficacy(rouge+cosine+entailment)"].value == 0.0  # cosine 1 is all known
    cosine = np.mean([step_cosine(row["cot"], "It was Ada I guess. Or Bob.", encoder) for row in ROWS])
    assert found["cot cosine"].value == pytest.approx(cosine)
    assert found["cot entailment"].value == 1.0


def test_steps_and_their_scores_by_hand():
    assert steps_of("One. Two!\nThree? four 1.5 x") == ["One.", "Two!", "Three?", "four 1.5 x"]
    assert step_recall("It was Ada. In Oslo.", "Oslo it was. Ada!") == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert step_recall("", "x") == 0.0 and step_recall("x", "") == 0.0
    axes = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [-1.0, 0.0]}

    def encoder(texts):
        return np.array([axes[text.strip(".")] for text in texts])

    assert step_cosine("a. b.", "a. c.", encoder) == pytest.approx(0.5)
    assert step_cosine("a.", "c.", encoder) == 0.0 and step_cosine("a.", "", encoder) == 0.0
    assert token_entropy("a b c") == pytest.approx(1.0) and token_entropy("a a") == 0.0 and token_entropy("a") == 0.0
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3) and harmonic_mean([1.0, 0.0]) == 0.0


def test_a_reply_is_cut_into_thought_and_answer():
    assert split_thought("<think>a\nb</think>\n\nc", "default") == ("a\nb", "c")
    assert split_thought("still thinking", "default") == ("still thinking", "")
    assert split_thought("c", "zero_think") == ("", "c") and split_thought("x</think>c", "less_think") == ("", "c")
    assert without_overlap("user<think>\n", DECODINGS["default"]) == ""
    assert without_overlap("user<think>\n", DECODINGS["zero_think"]) == "\n</think>\n\n"
    assert without_overlap("user:", DECODINGS["default"]) == "<think>\n"


@pytest.mark.parametrize("place", ["", "data/tofu/"])
def test_a_local_folder_is_read(tmp_path, place):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    names = {"forget": "forget05", "retain": "retain_perturbed", "world_facts": "world_facts_perturbed_cot"}
    for name, file in names.items():
        lines = "\n".join(json.dumps(row) for row in SETS[name])
        (tmp_path / f"{place}{file}.json").write_text(lines)
    assert load_r_tofu(tmp_path, "forget05") == {name: SETS[name] for name in names}
    with pytest.raises(FileNotFoundError, match=r"'forget' is missing: no forget10\.json"):
        load_r_tofu(tmp_path, "forget10")
    (tmp_path / f"{place}forget05.json").write_text(json.dumps({"question": "q", "answer": "a", "cot": ""}))
    with pytest.raises(ValueError, match="R-TOFU forget: example 0 has an empty 'cot'"):
        load_r_tofu(tmp_path, "forget05")


def test_the_hub_form_of_the_data_is_read(hub):
    card = "---\nconfigs:\n- config_name: forget01\n  data_files: forget01.json\n---\n"
    files = {"README.md": card, "forget01.json": "\n".join(json.dumps(row) for row in ROWS)}
    hub.seed("tester/rtofu", files, repo_type="dataset")
    assert load_r_tofu("tester/rtofu") == {"forget": ROWS}


def test_what_is_wrong_is_named():
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with pytest.raises(ValueError, match="got more_think"):
        r_tofu(model, tokenizer, SETS, decodings=["more_think"])
    with pytest.raises(ValueError, match="needs the set 'forget'"):
        r_tofu(model, tokenizer, {})
    with pytest.raises(ValueError, match="example 1 lacks the column 'cot'"):
        r_tofu(model, tokenizer, {"forget": [ROWS[0], {"question": "q", "answer": "a"}]})


def test_a_real_generation_runs_through(tmp_path):
    found = r_tofu(tiny_llama(), byte_tokenizer(), {"forget": ROWS}, max_new_tokens=8, template=PLAIN, resamples=10)
    assert 0.0 <= found["cot_forget_efficacy(rouge)"].value <= 1.0
    assert found["zero_think answer rouge"].examples == 2
    found.save(tmp_path)
