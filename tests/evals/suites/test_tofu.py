import json

import numpy as np
import pytest
from evals.shared_tofu import tofu_folder
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.suites.tofu import SETS, load_tofu, tofu
from hf_transfer_ext.models.generation import GenerationSettings

PLAIN = QuestionAnswerFormat(template="plain")
SHORT = {"generation": GenerationSettings(3), "template": PLAIN, "resamples": 10}


@pytest.fixture(scope="module")
def sets():
    row = {"question": "Q?", "answer": "yes sir", "perturbed_answer": ["no", "never"]}
    with_paraphrase = [{**row, "question": f"{i}?", "paraphrased_answer": f"aye {i}"} for i in range(3)]
    return {"forget": with_paraphrase, "retain": with_paraphrase, "real_authors": [row], "world_facts": [row, row]}


def test_a_retrained_twin_has_forget_quality_one_and_utility_has_nine_parts(sets):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    first = tofu(model, tokenizer, sets, **SHORT)
    again = tofu(model, tokenizer, sets, retrained=first.truth_ratios(), extra_metrics=["min_k"], **SHORT)
    named = {m.name: m for m in again.measurements}
    assert named["forget_quality"].value == 1.0 and named["forget_quality_log10"].value == 0.0
    assert named["model_utility"].examples == 3 * (3 + 1 + 2)
    assert first.measurements[0].name == "model_utility" and "forget min_k" in named
    assert not named["forget answer_probability"].higher_is_better
    assert named["retain answer_probability"].higher_is_better
    assert tofu(model, tokenizer, sets, retrained=first, **SHORT)["forget_quality"].value == 1.0
    assert again.sets["forget"].cost["forwards"] == first.sets["forget"].cost["forwards"]


def test_what_is_missing_or_misaligned_is_named(sets):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with pytest.raises(ValueError, match="missing or empty: world_facts"):
        tofu(model, tokenizer, {**sets, "world_facts": []}, **SHORT)
    with pytest.raises(ValueError, match="of 5 examples, but the forget set has 3"):
        tofu(model, tokenizer, sets, retrained=np.ones(5), **SHORT)
    for bad, message in (
        ({"perturbed_answer": ["no"]}, "TOFU retain: example 1 has 1 wrong answers but example 0 has 2"),
        ({"perturbed_answer": "no"}, "TOFU retain: example 1 needs a list of wrong answers"),
        ({"perturbed_answer": ["yes sir", "no"]}, "TOFU retain: example 1 has its answer 'yes sir'"),
        (
            {"perturbed_answer": ["no", " "]},
            r"TOFU, set 'retain': Example 1 cannot be measured: The answer to .*1\?.* is empty",
        ),
        ({"answer": None}, "TOFU, set 'retain': Example 1 cannot be measured: column 'answer' is missing"),
    ):
        rows = [dict(row) for row in sets["retain"]]
        rows[1] |= bad
        with pytest.raises(ValueError, match=message):
            tofu(model, tokenizer, {**sets, "retain": rows}, **SHORT)
    with pytest.raises(ValueError, match="forget01, forget05 or forget10"):
        load_tofu(split="forget20")


def test_a_local_folder_is_read_and_a_missing_file_named(sets, tmp_path):
    for name, rows in sets.items():
        file = SETS[name].format(split="forget05")
        (tmp_path / f"{file}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {name: len(rows) for name, rows in load_tofu(tmp_path, "forget05").items()} == {
        name: len(rows) for name, rows in sets.items()
    }
    with pytest.raises(FileNotFoundError, match=r"'TOFU forget' is missing: no forget01_perturbed\.json"):
        load_tofu(tmp_path, "forget01")


def test_the_public_sets_are_read_as_published():
    sizes = {name: len(rows) for name, rows in load_tofu(tofu_folder(), "forget10").items()}
    assert sizes == {"forget": 400, "retain": 400, "real_authors": 100, "world_facts": 117}
