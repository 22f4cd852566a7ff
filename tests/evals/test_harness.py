import json
import sys

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.evals import harness
from hf_transfer_ext.evals.harness import as_measurements, measure_with_lm_eval

QUESTIONS = [
    {"question": f"What is {i}?", "choices": [f"word {i}", "x", "something else"], "answer": i % 3} for i in range(6)
]
TASK = """task: own_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
RESULT = {
    "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "word_perplexity,none": 9.0,
                      "word_perplexity_stderr,none": "N/A", "exact_match,strict": 0.25}},
    "higher_is_better": {"t": {"acc": True, "word_perplexity": False, "exact_match": True}},
    "n-samples": {"t": {"original": 10, "effective": 4}},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "own.yaml").write_text(TASK.format(path=tmp_path / "rows.jsonl"))
    return tmp_path


def test_results_become_measurements_with_unit_direction_count_and_interval():
    accuracy, perplexity, exact = as_measurements(RESULT)
    assert (accuracy.name, accuracy.value, accuracy.unit, accuracy.examples) == ("t acc", 0.5, "share of questions", 4)
    assert accuracy.higher_is_better and accuracy.interval == pytest.approx((0.304, 0.696)) and accuracy.dataset == "t"
    assert perplexity.unit == "perplexity per word" and not perplexity.higher_is_better and perplexity.interval is None
    assert exact.name == "t exact_match(strict)" and exact.value == 0.25
    assert as_measurements({}) == []


def test_without_the_harness_the_way_to_install_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_transfer_ext\[lm_eval\]'"):
        measure_with_lm_eval(tiny_llama(), byte_tokenizer(), ["own_choices"])
    assert harness.UNITS["acc"] == "share of questions"


def test_an_own_task_of_a_local_folder_runs_offline(folder):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'hf_transfer_ext[lm_eval]'")
    model, tokenizer = tiny_llama().train(), byte_tokenizer()
    (found,) = measure_with_lm_eval(model, tokenizer, ["own_choices"], task_folder=folder)
    assert found.name == "own_choices acc" and found.examples == 6 and found.higher_is_better and model.training
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]
            ids = prompt + tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                log_p = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == row["answer"]
    assert found.value == pytest.approx(right / 6)
    with pytest.raises(ValueError, match=r"Unknown task .* 'own_choice'\. Did you mean 'own_choices'"):
        measure_with_lm_eval(model, tokenizer, ["own_choice"], task_folder=folder)


def test_what_is_missing_is_named(tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'hf_transfer_ext[lm_eval]'")
    with pytest.raises(ValueError, match="`tasks` is empty"):
        measure_with_lm_eval(tiny_llama(), byte_tokenizer(), [])
    with pytest.raises(ValueError, match="`task_folder` must be a folder"):
        measure_with_lm_eval(tiny_llama(), byte_tokenizer(), ["x"], task_folder=tmp_path / "none")
