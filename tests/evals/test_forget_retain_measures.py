import pytest
from evals.audit.planted_people import FORGET, PLAIN, RETAIN, planted
from tiny import byte_tokenizer

from hf_transfer_ext.evals.engine.evaluate import evaluate
from hf_transfer_ext.evals.forget_retain import forget_retain


def test_each_split_is_measured_and_knowing_the_forget_set_counts_against_the_model():
    model = planted()[0]
    splits = {"forget": FORGET, "retain": RETAIN, "holdout": []}
    found = {m.name: m for m in forget_retain(model, byte_tokenizer(), splits, template=PLAIN)}
    assert {name.split()[0] for name in found} == {"forget", "retain"}  # an empty split is passed over
    direct = evaluate(model, byte_tokenizer(), FORGET, ["answer_probability"], template=PLAIN).measurements[0]
    assert found["forget answer_probability"].value == pytest.approx(direct.value)
    assert not found["forget answer_probability"].higher_is_better
    assert found["retain answer_probability"].higher_is_better
    assert found["forget perplexity"].higher_is_better and not found["retain perplexity"].higher_is_better
    assert "forget extraction_strength" in found and "retain extraction_strength" not in found


def test_truth_ratios_need_wrong_answers_in_every_row():
    named = {m.name for m in forget_retain(planted()[0], byte_tokenizer(), {"forget": FORGET}, template=PLAIN)}
    assert any(name.startswith("forget truth_ratio") for name in named)
    mixed = [FORGET[0], {**FORGET[1], "perturbed_answer": None}]
    named = {m.name for m in forget_retain(planted()[0], byte_tokenizer(), {"forget": mixed}, template=PLAIN)}
    assert not any("truth_ratio" in name for name in named)
