import json

import pytest
from datasets import Dataset
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.suite import (
    BARE,
    Part,
    SuiteResult,
    evaluate_parts,
    load_json,
    load_optional_set,
    load_set,
    read_rows,
    require_columns,
)
from hf_transfer_ext.evals.suites import SUITES
from hf_transfer_ext.models.generation import GenerationSettings

ROWS = [{"question": "a?", "answer": "b"}, {"question": "c?", "answer": "d"}]


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "hub"])
def test_a_set_is_read_from_any_kind_of_file(tmp_path, ending):
    if ending == "json":
        (tmp_path / "one.json").write_text(json.dumps(ROWS))
    elif ending == "jsonl":
        (tmp_path / "one.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    else:
        name = "one.parquet" if ending == "parquet" else "one-00000-of-00001.parquet"
        Dataset.from_list(ROWS).to_parquet(str(tmp_path / name))
    assert load_set(tmp_path, "set", files=["other", "one"]) == ROWS


def test_a_list_of_texts_is_rows_of_text(tmp_path):
    (tmp_path / "one.json").write_text('["a", "b"]')
    assert load_set(tmp_path, "set", files=["one"]) == [{"text": "a"}, {"text": "b"}]


def test_a_hub_data_set_is_read_by_configuration_and_split(hub):
    card = "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: test\n    path: one.json\n---\n"
    hub.seed("tester/suite", {"README.md": card, "one.json": json.dumps(ROWS)}, repo_type="dataset")
    assert load_set("tester/suite", "set", files=["x"], config="first", split="test") == ROWS
    assert load_json("tester/suite", "the rows", files=["none", "one"]) == ROWS
    with pytest.raises(ValueError, match=r"The set 'mine' is missing from 'tester/suite': .*second"):
        load_set("tester/suite", "mine", files=["x"], config="second", split="test")
    with pytest.raises(ValueError, match=r"The set 'mine' is missing from 'tester/suite': .*train"):
        load_set("tester/suite", "mine", files=["x"], config="first", split="train")
    with pytest.raises(FileNotFoundError, match=r"file with the rows is missing: no none\.json in 'tester/suite'"):
        load_json("tester/suite", "the rows", files=["none"])
    for load in (load_set, load_json):
        with pytest.raises(FileNotFoundError, match="can be reached on the Hub"):
            load("tester/nothing", "set", files=["x"])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"The set 'mine' is missing: no a\.json, b\.json in"):
        load_set(tmp_path, "mine", files=["a", "b"])
    for text, message in (("{", "Line 1 of .* is not valid JSON"), ("[1]", "needs rows"), ("[]", "has 0 rows")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json.* is not valid JSON"):
        load_json(tmp_path, "the facts", files=["bad"])


def test_a_row_without_its_column_is_named_by_its_index():
    with pytest.raises(ValueError, match="mine: example 1 lacks the column 'answer'; it has question"):
        require_columns("mine", [ROWS[0], {"question": "c?"}], ["question", "answer"])
    for empty in (" ", []):
        with pytest.raises(ValueError, match="mine: example 1 has an empty 'answer'"):
            require_columns("mine", [ROWS[0], {"question": "c?", "answer": empty}], ["answer"])


def test_no_part_is_measured_where_one_has_an_example_that_cannot_be():
    model, calls = tiny_llama(), []
    forward = model.forward
    model.forward = lambda *args, **inputs: calls.append(1) or forward(*args, **inputs)
    parts = {"good": Part(ROWS, ["perplexity"]), "bad": Part([ROWS[0], {"question": "c?"}], ["perplexity"])}
    with pytest.raises(ValueError, match="Mine, set 'bad': Example 1 cannot be measured: column 'answer' is missing"):
        evaluate_parts("Mine", model, byte_tokenizer(), parts)
    assert not calls


def test_each_part_has_its_own_prompt_and_length_and_the_result_is_saved(tmp_path):
    plain = QuestionAnswerFormat(template="plain")
    parts = {
        "long": Part(ROWS, ["fluency_entropy"], BARE, GenerationSettings(20)),
        "short": Part([{"question": "a?"}], ["fluency_entropy"], plain, GenerationSettings(2)),
    }
    results = evaluate_parts("Mine", tiny_llama(), byte_tokenizer(), parts, resamples=5)
    assert results["long"].cost["generated_tokens"] > 2 >= results["short"].cost["generated_tokens"]
    found = SuiteResult(results["long"].measurements, results, ["a note"])
    folder = found.save(tmp_path / "out", per_example="parquet")
    saved = json.loads((folder / "measurements.json").read_text())
    assert saved["problems"][0] == "a note" and (folder / "short" / "per_example.parquet").is_file()
    with pytest.raises(KeyError, match="'nothing' is not one measurement"):
        found["nothing"]


def test_every_suite_says_what_it_loads():
    assert list(SUITES) == ["tofu", "muse", "rwku", "r_tofu", "restor", "conceptvectors"]
    for name, suite in SUITES.items():
        assert suite.__name__ == name and suite.load.__name__ == f"load_{name}"
        assert suite.compares_with in (None, "retrained", "before")


def test_texts_are_tokenized_once(monkeypatch):
    counted = []
    encode = QuestionAnswerFormat.encode
    monkeypatch.setattr(QuestionAnswerFormat, "encode", lambda *args: counted.append(args[-1]) or encode(*args))
    parts = {"one": Part(ROWS, ["perplexity"]), "two": Part(ROWS[:1], ["choice_probability"])}
    parts["two"] = Part([{**ROWS[0], "perturbed_answer": ["x"]}], ["choice_probability"])
    evaluate_parts("Mine", tiny_llama(), byte_tokenizer(), parts, resamples=0)
    assert counted == ["b", "d", "b", "x"]


def test_an_optional_set_is_left_out_where_it_is_missing_and_an_error_where_it_cannot_be_read(tmp_path, hub):
    assert load_optional_set(tmp_path, "mine", files=["one"]) is None
    (tmp_path / "one.json").write_text('[{"question": "q", "answer"')
    with pytest.raises(ValueError, match=r"one\.json, which starts as a JSON list, is not valid JSON"):
        load_optional_set(tmp_path, "mine", files=["one"])
    card = "---\nconfigs:\n- config_name: first\n  data_files:\n  - split: test\n    path: one.json\n---\n"
    hub.seed("tester/optional", {"README.md": card, "one.json": json.dumps(ROWS)}, repo_type="dataset")
    for where in ({"config": "second", "split": "test"}, {"config": "first", "split": "train"}):
        assert load_optional_set("tester/optional", "mine", files=["x"], **where) is None
    with pytest.raises(FileNotFoundError, match="can be reached on the Hub"):
        load_optional_set("tester/no-such-data", "mine", files=["x"])
