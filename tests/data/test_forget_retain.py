import pytest
import torch
from tiny import byte_tokenizer

from hf_transfer_ext.data.forget_retain import REFUSALS, ForgetRetainPairs, forget_retain_collator, forget_retain_rows
from hf_transfer_ext.data.question_answer import QuestionAnswerFormat

FORGET = [{"question": f"Q{i}?", "answer": "yes" * (i + 1)} for i in range(4)]
RETAIN = [{"question": f"K{i}?", "answer": "kept"} for i in range(6)]
PLAIN = QuestionAnswerFormat(template="plain", prompt="{question}")


def pairs(**options):
    return ForgetRetainPairs(FORGET, RETAIN, byte_tokenizer(), template=PLAIN, **options)


def test_labels_are_the_answer_and_its_end_alone():
    sample = pairs()[1]["forget"]
    text = "Q1? yesyes"
    assert byte_tokenizer().decode(sample["input_ids"]) == text + "</s>"
    assert sample["labels"] == [-100] * 3 + sample["input_ids"][3:]


def test_every_retain_sample_comes_before_any_comes_twice_from_epoch_to_epoch():
    data = pairs(seed=1)
    seen = []
    for epoch in range(3):
        data.set_epoch(epoch)
        seen += [data[i]["retain"]["index"] for i in range(len(data))]
    assert sorted(seen[:6]) == list(range(6)) and sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]  # another order each time round
    again = pairs(seed=1)
    again.set_epoch(2)
    assert [again[i]["retain"]["index"] for i in range(4)] == seen[8:]
    other = pairs(seed=2)
    assert [other[i]["retain"]["index"] for i in range(4)] != seen[:4]


def test_the_end_stays_attended_where_padding_is_the_end():
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = pairs()
    batch = forget_retain_collator(tokenizer.pad_token_id)([data[0], data[3]])["forget"]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, len("Q3? ") + 12 + 1)
    assert batch["attention_mask"].sum(-1).tolist() == [len("Q0? yes") + 1, len("Q3? ") + 12 + 1]
    last = int(batch["attention_mask"][0].sum()) - 1
    assert batch["input_ids"][0, last] == tokenizer.eos_token_id == batch["labels"][0, last]
    assert (batch["labels"][0, last + 1 :] == -100).all() and batch["index"].tolist() == [0, 3]
    assert torch.equal(batch["labels"][1] != -100, torch.arange(17) >= 3)


def test_alternatives_are_drawn_or_taken_from_their_column():
    data = pairs(alternatives=REFUSALS)
    texts = set()
    for epoch in range(6):
        data.set_epoch(epoch)
        for i in range(4):
            ids = data[i]["alternative"]["input_ids"]
            texts.add(byte_tokenizer().decode(ids)[len("Q0? ") : -len("</s>")])
    assert texts <= set(REFUSALS) and len(texts) > 4
    own = [{**row, "alternative": ["no"]} for row in FORGET]
    data = ForgetRetainPairs(own, None, byte_tokenizer(), template=PLAIN, alternatives=())
    assert byte_tokenizer().decode(data[2]["alternative"]["input_ids"]) == "Q2? no</s>"
    assert set(data[2]) == {"forget", "alternative"}


def test_texts_and_renamed_columns():
    data = ForgetRetainPairs(
        [{"frage": "Q?", "antwort": "A"}],
        [{"inhalt": "some text"}],
        byte_tokenizer(),
        template=PLAIN,
        columns={"question": "frage", "answer": "antwort", "text": "inhalt"},
    )
    assert data[0]["retain"]["labels"][:2] == [-100, ord("o") - ord("!")]


@pytest.mark.parametrize(
    "forget, retain, message",
    [
        ([], RETAIN, "forget set is empty"),
        (FORGET, [], "retain set is empty"),
        ([*FORGET, {"question": "Q?", "answer": ""}], RETAIN, "Example 4 of the forget set .* is empty"),
        (FORGET, [{"answer": "A"}], "Example 0 of the retain set .*'question' and 'answer', or 'text'"),
    ],
)
def test_examples_without_a_token_to_learn_are_named(forget, retain, message):
    with pytest.raises(ValueError, match=message):
        ForgetRetainPairs(forget, retain, byte_tokenizer(), template=PLAIN)


def test_a_text_has_no_alternative_answer():
    with pytest.raises(ValueError, match="Example 0 of the forget set needs a question"):
        ForgetRetainPairs([{"text": "abc"}], None, byte_tokenizer(), alternatives=REFUSALS)


def test_rows_come_from_files_under_the_schemas_names_or_are_made_up(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"frage": "Q?", "antwort": "A"}\n')
    names = {"question": "frage", "answer": "antwort"}
    rows = forget_retain_rows(str(tmp_path / "own.jsonl"), columns=names)
    assert rows == {"forget": [{"question": "Q?", "answer": "A"}], "retain": [], "holdout": []}
    with pytest.raises(ValueError, match=r"Row 0 of .* has no column 'reply'; it has frage, antwort"):
        forget_retain_rows(str(tmp_path / "own.jsonl"), columns={"answer": "reply"})
    alone, more = forget_retain_rows(None, people=4), forget_retain_rows(None, people=4, holdout_people=2)
    assert (alone["forget"], alone["retain"]) == (more["forget"], more["retain"]) and len(more["holdout"]) == 24
