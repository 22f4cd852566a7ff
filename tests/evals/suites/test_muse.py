import json

import pytest
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.evals.suites.muse import SETS, few_shot, first_tokens, load_muse, muse, muse_sequence
from hf_transfer_ext.evals.text.rouge import rouge_l
from hf_transfer_ext.models.generation import GenerationSettings, generate


@pytest.fixture(scope="module")
def sets():
    qa = [{"question": f"What is {i}?", "answer": f"number {i}"} for i in range(3)]
    texts = [{"text": f"forgotten text {i} " * 3} for i in range(3)]
    return {
        "verbmem": [{"prompt": f"Once upon {i}", "gt": " a time there was a very " + "long " * 40} for i in range(3)],
        "knowmem_forget": qa, "knowmem_forget_icl": qa[:2], "knowmem_retain": qa[::-1], "knowmem_retain_icl": qa[1:],
        "privleak_forget": texts, "privleak_holdout": [{"text": f"something else {i}, unseen"} for i in range(4)],
    }  # fmt: skip


def write(folder, sets, retain="retain"):
    for name, (config, split, _) in SETS.items():
        path = folder / config / f"{split.replace('retain', retain)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sets[name]))


def test_every_part_is_what_its_definition_says(sets):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    found = muse(model, tokenizer, sets, resamples=10)
    by_hand = []
    for row in sets["verbmem"]:
        ids = tokenizer(row["prompt"])["input_ids"]
        text = generate(model, tokenizer, [ids], GenerationSettings(128))[0][0]
        by_hand.append(rouge_l(tokenizer.decode(tokenizer(row["gt"])["input_ids"][:128]), text, stemmed=False)[2])
    assert found["verbmem"].value == pytest.approx(sum(by_hand) / 3)
    by_hand = []
    shots = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in sets["knowmem_retain_icl"])
    for row in sets["knowmem_retain"]:
        ids = tokenizer(f"{shots}Question: {row['question']}\nAnswer:")["input_ids"]
        text = generate(model, tokenizer, [ids], GenerationSettings(32))[0][0]
        text = text.split("\n\n")[0].split("Question:")[0].split("\nQuestion")[0]
        by_hand.append(rouge_l(row["answer"], text, stemmed=False)[2])
    assert found["knowmem_retain"].value == pytest.approx(sum(by_hand) / 3)
    directions = {m.name: m.higher_is_better for m in found.measurements}
    assert directions == {"verbmem": False, "knowmem_forget": False, "knowmem_retain": True, "membership_auc": False}
    assert found["membership_auc"].examples == 7


def test_a_model_beside_itself_as_retrained_leaks_nothing(sets):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    first = muse(model, tokenizer, sets, resamples=0)
    again = muse(model, tokenizer, sets, retrained=first, resamples=0)
    if first.membership.value < 1.0:
        assert again["privleak"].value == pytest.approx(0.0)
    a, b = first.membership.value, 0.25
    other = muse(model, tokenizer, sets, resamples=0)
    place = other.measurements.index(other.membership)
    other.measurements[place] = type(first.membership)("membership_auc", b, "area", False, 7)
    expected = 100 * ((1 - a) - (1 - b)) / (1 - b)
    assert muse(model, tokenizer, sets, retrained=other, resamples=0)["privleak"].value == pytest.approx(expected)


@pytest.mark.parametrize("retain", ["retain", "retain2"])
def test_a_local_folder_is_read(sets, tmp_path, retain):
    write(tmp_path, sets, retain)
    assert load_muse(tmp_path) == sets
    (tmp_path / "knowmem" / "forget_qa_icl.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"'knowmem_forget_icl' is missing: no knowmem/forget_qa_icl\.json"):
        load_muse(tmp_path)


def test_the_hub_form_of_the_data_is_read(hub, sets):
    configs, files = {}, {}
    for name, (config, split, _) in SETS.items():
        files[f"{config}/{split}.jsonl"] = "\n".join(json.dumps(row) for row in sets[name])
        configs.setdefault(config, []).append(f"  - split: {split}\n    path: {config}/{split}.jsonl\n")
    card = "".join(f"- config_name: {c}\n  data_files:\n{''.join(lines)}" for c, lines in configs.items())
    hub.seed("tester/muse", {**files, "README.md": f"---\nconfigs:\n{card}---\n"}, repo_type="dataset")
    assert load_muse("tester/muse") == sets


def test_what_is_missing_or_empty_is_named(sets):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    with pytest.raises(ValueError, match="missing or empty: verbmem"):
        muse(model, tokenizer, {**sets, "verbmem": []})
    bad = [sets["verbmem"][0], {"prompt": "x", "gt": " "}]
    with pytest.raises(ValueError, match="MUSE verbmem: example 1 has an empty 'gt'"):
        muse(model, tokenizer, {**sets, "verbmem": bad})
    with pytest.raises(ValueError, match="MUSE privleak_forget: example 0 lacks the column 'text'"):
        muse(model, tokenizer, {**sets, "privleak_forget": [{"txt": "x"}]})


def test_a_sequence_tells_how_it_ends(sets):
    runs = {str(seed): muse(tiny_llama(seed), byte_tokenizer(), sets, resamples=0, limit=2) for seed in range(3)}
    changes = {m.name: m for m in muse_sequence(runs)}
    for name in ("verbmem", "knowmem_forget", "membership_auc"):
        assert changes[f"{name} change"].value == pytest.approx(runs["2"][name].value - runs["0"][name].value)
    low, high = changes["verbmem change"].interval
    assert low <= changes["verbmem change"].value <= high
    assert changes["membership_auc change"].interval is None
    worst = min(run["knowmem_retain"].value for run in runs.values())
    assert changes["knowmem_retain worst"].value == worst
    with pytest.raises(ValueError, match="at least two checkpoints, got 1"):
        muse_sequence({"only": runs["0"]})


def test_the_shots_stand_before_the_question_and_texts_are_cut_by_tokens():
    template = few_shot([{"question": "a {question}", "answer": "b"}])
    assert template.prompt_text(byte_tokenizer(), "c?") == "Question: a \nAnswer: b\n\nQuestion: c?\nAnswer:"
    assert first_tokens(byte_tokenizer(), "abcdef", 4) == "abcd" and first_tokens(byte_tokenizer(), "abc", 4) == "abc"
