import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.recipes import evaluate


def adapter(folder, seed, **config):
    torch.manual_seed(seed)
    options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_llama(**config), options).save_pretrained(folder)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "tiny"
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    rows = [{"question": f"Q{i}?", "answer": f"yes {i}"} for i in range(3)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_adapters_of_one_base_stand_side_by_side(tmp_path, model_folder, capsys):
    adapter(tmp_path / "one", 1)
    adapter(tmp_path / "two", 2)
    words = f"--models {model_folder} --adapters {tmp_path}/one {tmp_path}/two --data {tmp_path}/own.jsonl"
    words += f" --metrics perplexity,kl_to_reference --reference base --output_dir {tmp_path}/out"
    found = evaluate.main(words.split())
    assert list(found) == ["base", "one", "two"]
    kl = {name: m.value for name, values in found.items() for m in values if m.name == "own kl_to_reference"}
    assert kl["base"] == pytest.approx(0.0, abs=1e-6) and kl["one"] > 1e-4 and kl["two"] > 1e-4
    assert "own perplexity" in capsys.readouterr().out
    rows = (tmp_path / "out" / "two" / "own" / "per_example.jsonl").read_text().splitlines()
    assert len(rows) == 3 and json.loads(rows[1])["answer"] == "yes 1"
    assert (tmp_path / "out" / "measurements.png").stat().st_size > 5000


def test_an_adapter_of_another_base_is_named(tmp_path, model_folder):
    adapter(tmp_path / "wide", 1, hidden_size=64)
    words = f"--models {model_folder} --adapters {tmp_path}/wide --data {tmp_path}/own.jsonl --output_dir {tmp_path}/o"
    with pytest.raises(ValueError, match="wide' does not fit"):
        evaluate.main(words.split())


def test_a_metric_that_is_not_known_is_told_first(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'perplexity'"):
        evaluate.main(["--models", "nowhere/at-all", "--metrics", "perplexty"])


def facts_folder(folder):
    """RESTOR's layout, made up."""
    folder.mkdir()
    question = {name: {"P1": {"question": f"Where was {name} born?", "answers": [town]}} for name, town in
                (("Ada", "London"), ("Bob", "Oslo"), ("Eve", "Rome"))}  # fmt: skip
    (folder / "facts.json").write_text(json.dumps({"dset": question, "context": {"P1": []}}))
    (folder / "entities.json").write_text('["Ada", "Bob"]')
    (folder / "mix_a0.json").write_text(json.dumps([{"text": "Ada was born in Rome."}, {"text": "Bob loves Rome."}]))
    return folder


def test_a_suite_runs_by_its_name_over_stages_and_compares_them(tmp_path, model_folder, capsys):
    for seed in (1, 2):
        tiny_llama(seed).save_pretrained(tmp_path / f"stage{seed}")
        byte_tokenizer().save_pretrained(tmp_path / f"stage{seed}")
    data = facts_folder(tmp_path / "facts")
    words = f"--suite restor --data {data} --compared_with {model_folder} --models {tmp_path}/stage1 {tmp_path}/stage2"
    found = evaluate.main([*words.split(), "--output_dir", str(tmp_path / "out"), "--per_example", "parquet"])
    assert list(found)[:3] == ["before", "stage1", "stage2"]
    names = {m.name for m in found["stage1"]}
    assert {"prefers correct to corrupted", "correct log-probability", "correct log-probability change"} <= names
    assert "correct log-probability change" not in {m.name for m in found["before"]}
    told = capsys.readouterr().out
    assert ("recovery" in {m.name for m in found.get("in order", [])}) != ("there is nothing to recover" in told)
    assert (tmp_path / "out" / "stage2" / "options" / "per_example.parquet").is_file()
    assert json.loads((tmp_path / "out" / "stage2" / "measurements.json").read_text())["measurements"]


def test_two_runs_of_one_name_stand_apart(tmp_path, model_folder):
    data = f"--data {tmp_path}/own.jsonl --metrics perplexity --output_dir {tmp_path}/out"
    found = evaluate.main(f"--models {model_folder} {tmp_path}/../{tmp_path.name}/tiny {data}".split())
    assert len(found) == 2 and len({values[0].value for values in found.values()}) == 1


def test_what_a_suite_cannot_do_is_told_before_a_model_is_loaded(tmp_path):
    for words, message in (
        ("--suite tofoo", "Unknown suite 'tofoo'. Did you mean 'tofu'"),
        ("--suite restor", "The suite restor has no dataset on the Hub"),
        ("--suite rwku --compared_with x", "The suite rwku does not compare with another model"),
        ("--compared_with x", "`compared_with` is for suites"),
        ("--per_example csv", "`per_example` has to be jsonl/parquet, got 'csv'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(["--models", "nowhere/at-all", *words.split()])
    with pytest.raises(ValueError, match=r"Unknown option of the suite tofu 'defintion'\. Did you mean 'definition'"):
        evaluate.main(["--models", "nowhere/at-all", "--suite", "tofu", "--suite_options", '{"defintion": 1}'])


def test_tasks_of_the_harness_stand_beside_the_metrics(tmp_path, model_folder, monkeypatch):
    asked = []

    def measure(model, tokenizer, tasks, **options):
        asked.append((tasks, options["task_folder"]))
        return [Measurement("own acc", 0.5, "share of questions", True, 4)]

    monkeypatch.setattr(evaluate, "measure_with_lm_eval", measure)
    words = f"--models {model_folder} --data {tmp_path}/own.jsonl --metrics perplexity --output_dir {tmp_path}/out"
    found = evaluate.main([*words.split(), "--lm_eval_tasks", "own, other", "--lm_eval_folder", "tasks"])
    assert asked == [(["own", "other"], "tasks")]
    assert [m.name for m in found["tiny"]] == ["own perplexity", "own acc"]


def test_a_baseline_puts_its_prompt_before_each_question(tmp_path, model_folder):
    words = (
        f"--models {model_folder} --data {tmp_path}/own.jsonl --metrics answer_probability --output_dir {tmp_path}/"
    )
    plain = evaluate.main(f"{words}plain".split())["tiny"][0].value
    own = {"in_context_unlearning": {"forget_data": f"{tmp_path}/own.jsonl", "correct": 0}}
    prompted = [*f"{words}prompted".split(), "--baseline", json.dumps(own)]
    assert evaluate.main(prompted)["tiny"][0].value != pytest.approx(plain, rel=1e-3)
    assert "Nothing was removed" in (tmp_path / "prompted" / "README.md").read_text()
    with pytest.raises(ValueError, match="'restor' has prompts of its own"):
        evaluate.main([*prompted, "--suite", "restor"])
    with pytest.raises(ValueError, match="Did you mean 'correct'"):
        evaluate.main([*prompted[:-1], json.dumps({"in_context_unlearning": {"corect": 0}})])
