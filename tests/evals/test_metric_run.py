import json

import pytest
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.evals.audit.side_by_side import side_by_side
from hf_transfer_ext.evals.audit.subject import AuditData, Subject
from hf_transfer_ext.evals.metric_run import PEOPLE, MetricRun, load_sets

ROWS = [{"question": f"Q{i}?", "answer": f"yes {i}"} for i in range(3)]


def test_sets_are_loaded_by_name_and_cut(tmp_path):
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sets = load_sets([str(tmp_path / "own.jsonl"), PEOPLE], limit=2, split="train")
    assert {"own", "forget", "retain"} <= set(sets) and all(len(rows) <= 2 for rows in sets.values())


def test_each_set_gives_a_result_whose_measurements_bear_its_name():
    run = MetricRun(["perplexity"], {"one": ROWS, "two": ROWS[:1]})
    found = dict(run.measured(tiny_llama(), byte_tokenizer(), "model"))
    assert list(found) == ["model/one", "model/two"]
    assert [m.name for m in found["model/two"].measurements] == ["two perplexity"]
    assert found["model/one"].measurements[0].examples == 3


def test_a_typo_is_answered_at_once():
    with pytest.raises(ValueError, match="Did you mean 'perplexity'"):
        MetricRun(["perplexty"], {})


def test_audited_models_stand_side_by_side():
    subjects = {"a": Subject(tiny_llama(0), byte_tokenizer(), max_new_tokens=2)}
    plain = side_by_side(subjects, AuditData(ROWS, ROWS))
    assert plain.truth_ratios == {} and len(plain.generations["a"]) == 3
    wrong = [{**row, "perturbed_answer": ["no", "never"]} for row in ROWS]
    assert len(side_by_side(subjects, AuditData(wrong, ROWS)).truth_ratios["a"]) == 3
    assert {m.name.split()[0] for m in plain.measured["a"]} == {"forget", "retain"}
