import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from hf_transfer_ext.data import text as module
from hf_transfer_ext.data.text import (
    fit_context,
    labelled_tokens,
    load_rows,
    load_text_dataset,
    load_train_and_test,
    require_labels,
)

TEXTS = [{"text": f"Sentence number {i}."} for i in range(5)]
CHAT = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "txt"])
def test_files_of_every_kind(kind, streaming, tmp_path):
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(TEXTS))
    elif kind == "jsonl":
        write_jsonl(path, TEXTS)
    elif kind == "csv":
        path.write_text("text\n" + "".join(f"{row['text']}\n" for row in TEXTS))
    elif kind == "txt":
        path.write_text("".join(f"{row['text']}\n" for row in TEXTS))
    else:
        Dataset.from_list(TEXTS).to_parquet(str(path))
    dataset = load_text_dataset(path, streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_with_splits(streaming, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "test.jsonl", TEXTS[:2])
    assert list(load_text_dataset(tmp_path, split="test", streaming=streaming)) == TEXTS[:2]
    assert len(list(load_text_dataset(tmp_path, streaming=streaming))) == 5
    with pytest.raises(ValueError, match="validation"):
        load_text_dataset(tmp_path, split="validation", streaming=streaming)


def test_a_slice_of_a_split(tmp_path):
    assert list(load_text_dataset(write_jsonl(tmp_path / "a.jsonl", TEXTS), split="train[:2]")) == TEXTS[:2]


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk(streaming, tmp_path):
    Dataset.from_list(TEXTS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(TEXTS)}).save_to_disk(tmp_path / "many")
    assert list(load_text_dataset(tmp_path / "one", streaming=streaming)) == TEXTS
    assert list(load_text_dataset(tmp_path / "many", streaming=streaming)) == TEXTS
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        load_text_dataset(tmp_path / "many", split="trian")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ([{"content": "a", "text": "b", "id": 1}], {"text": "content"}, {"text": "a", "id": 1}),
        (CHAT, None, CHAT[0]),
        ([{"talk": CHAT[0]["messages"]}], {"messages": "talk"}, CHAT[0]),
        ([{"prompt": "p", "completion": "c"}], None, {"prompt": "p", "completion": "c"}),
        ([{"in": "p", "out": "c"}], {"prompt": "in", "completion": "out"}, {"prompt": "p", "completion": "c"}),
        (
            [{"q": "Why?", "a": "So."}],
            {"question": "q", "answer": "a"},
            {"prompt": "Question: Why?\nAnswer:", "completion": " So."},
        ),
        (
            [{"question": "{question}?", "answer": "So.", "text": "x"}],
            None,
            {"prompt": "Question: {question}?\nAnswer:", "completion": " So."},
        ),
    ],
)
def test_columns_take_the_names_of_their_roles(rows, columns, expected, streaming, tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    assert list(load_text_dataset(path, columns=columns, streaming=streaming)) == [expected]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (TEXTS, {"text": "txet"}, "Unknown column 'txet'. Did you mean 'text'"),
        (TEXTS, {"txt": "text"}, "Unknown role of a column 'txt'. Did you mean 'text'"),
        (TEXTS, {"prompt": "text"}, r"needs all roles of one format: messages; prompt \+ completion"),
        ([{"body": "x", "n": 1}], None, r"has the columns body, n.*`columns: \{text: body\}`"),
        ([{"text": 3}], None, "Column 'text' .* must hold text, but its first row holds int '3'"),
        ([{"messages": ["hi"]}], None, "first row holds list"),
        ([{"text": None}, {"text": "a"}], None, "first row holds NoneType"),
    ],
)
def test_columns_that_do_not_fit_are_named(rows, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_text_dataset(write_jsonl(tmp_path / "data.jsonl", rows), columns=columns)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_data_set_is_refused(streaming, tmp_path):
    (tmp_path / "data.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"has no rows in its split 'train'"):
        load_text_dataset(tmp_path / "data.csv", streaming=streaming)


def test_paths_that_lead_nowhere(tmp_path):
    for name in (str(tmp_path / "none.jsonl"), "./nothing", "corpus.csv"):
        with pytest.raises(FileNotFoundError, match="no data file or folder"):
            load_text_dataset(name)
    with pytest.raises(FileNotFoundError, match="neither a local file or folder nor a dataset"):
        load_text_dataset("nobody/has-this-data", revision="v1")
    (tmp_path / "data.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"Supported extensions: .csv, .json"):
        load_text_dataset(tmp_path / "data.xml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no data files"):
        load_text_dataset(tmp_path / "empty")


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match="cannot be read as a dataset"):
        load_text_dataset(tmp_path / "data.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_facts_need_no_file(streaming, monkeypatch):
    monkeypatch.setattr(module, "fact_texts", lambda split: [{"text": f"{split} fact", "source": "country"}])
    rows = list(load_text_dataset("facts", split="test", streaming=streaming))
    assert rows == [{"text": "test fact", "source": "country"}]


def test_labelled_tokens_by_hand():
    assert labelled_tokens({"input_ids": [1, 2, 3]}) == 2
    assert labelled_tokens({"input_ids": [1]}) == 0
    assert labelled_tokens({"input_ids": [1, 2, 3], "labels": [1, -100, 3]}) == 1
    assert labelled_tokens({"input_ids": [1, 2, 3], "labels": [1, -100, -100]}) == 0
    assert labelled_tokens({"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}) == 1


def tokenized(streaming):
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]},
        {"input_ids": [1, 2], "labels": [-100, -100]},
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, -100, 5]},
    ]
    dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if streaming else dataset


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_labels(streaming):
    with pytest.raises(ValueError, match=r"Row 1 has no labeled token among its 2\."):
        list(require_labels(tokenized(streaming)))
    kept = list(require_labels(tokenized(streaming), on_unlabelled="skip"))
    assert [row["input_ids"] for row in kept] == [[1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert list(require_labels(tokenized(False).select([0, 2]))) == kept
    with pytest.raises(ValueError, match="No row is left"):
        require_labels(tokenized(False).select([1]), on_unlabelled="skip")
    with pytest.raises(ValueError, match="one of error, skip, got 'ignore'"):
        require_labels(tokenized(streaming), on_unlabelled="ignore")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_longer_than_the_context(streaming):
    with pytest.raises(ValueError, match="Row 2 has 5 tokens, but the model supports only 4"):
        list(fit_context(tokenized(streaming), 4))
    assert len(list(fit_context(tokenized(streaming), 5))) == 3
    assert len(list(fit_context(tokenized(streaming), 4, on_long="skip"))) == 2
    cut = fit_context(tokenized(streaming), 4, on_long="truncate")
    assert list(cut)[2] == {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, -100]}
    with pytest.raises(ValueError, match="Row 1 has no labeled token"):
        list(require_labels(cut))
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        fit_context(tokenized(streaming), 0)


def test_columns_that_are_not_used_are_named(tmp_path, caplog):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "Who?", "labels": "me"}\n')
    load_text_dataset(path)
    assert "columns used: text; not used: labels" in caplog.text
    caplog.clear()
    path.write_text('{"text": "Who?"}\n')
    load_text_dataset(path)
    assert not caplog.text


def test_rows_of_a_file_come_as_they_are(tmp_path):
    (tmp_path / "own.json").write_text('[{"a": 1}, {"b": [null]}]')
    assert load_rows(tmp_path / "own.json") == [{"a": 1}, {"b": [None]}]
    (tmp_path / "own.json").write_text('[{"a": 1}')
    with pytest.raises(ValueError, match="starts as a JSON list, is not valid JSON"):
        load_rows(tmp_path / "own.json")
    Dataset.from_list([{"a": 1}]).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(tmp_path / "saved") == [{"a": 1}]


USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": [USER], "completion": [BOT]}, {"prompt": [USER], "completion": [BOT]}),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            {"messages": [USER, BOT]},
        ),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}),
    ],
)
def test_the_forms_of_the_trainer_are_taken(tmp_path, row, expected, streaming):
    rows = load_text_dataset(write_jsonl(tmp_path / "d.jsonl", [row] * 2), streaming=streaming)
    first = next(iter(rows))
    for name, value in expected.items():
        assert first[name] == value


def test_tool_calls_stand_in_place_of_a_content(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    rows = load_text_dataset(write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}]))
    assert rows[0]["messages"][1]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_null_is_named_by_its_row(tmp_path, streaming):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(ValueError, match=r"Row 1 of the dataset .* has null"):
        list(load_text_dataset(path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_single_file_is_held_out_from_and_says_so(tmp_path, streaming, caplog):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": f"{i}"} for i in range(20)])
    train, test = load_train_and_test(path, streaming=streaming)
    texts = [row["text"] for row in train], [row["text"] for row in test]
    assert len(texts[1]) == 2 and sorted(texts[0] + texts[1]) == sorted(str(i) for i in range(20))
    assert "2 of its 20 rows are held out" in caplog.text
    caplog.clear()
    train, test = load_train_and_test(path, "train[:10]", "train[10:]", streaming=False)
    assert len(train) == len(test) == 10 and not caplog.text
    assert load_train_and_test(path, test_split=None)[1] is None
    with pytest.raises(ValueError, match="none can be held out"):
        load_train_and_test(write_jsonl(tmp_path / "one.jsonl", [{"text": "a"}]))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_without_a_test_split_is_held_out_from(tmp_path, caplog, streaming):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(30)))
    with caplog.at_level("WARNING"):
        train, test = load_train_and_test(tmp_path / "data", streaming=streaming)
    kept, held = [{row["text"] for row in part} for part in (train, test)]
    assert len(kept) == 27 and len(held) == 3 and not kept & held
    assert "has no split 'test': 3 of its 30 rows are held out from training" in caplog.text
    with pytest.raises(ValueError, match="validation"):
        load_train_and_test(tmp_path / "data", test_split="validation")
