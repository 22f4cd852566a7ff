import copy
import dataclasses
import json

import pytest
import torch
from tiny import CHAT_TEMPLATE, byte_tokenizer

from hf_transfer_ext.data.forget_retain import (
    REFUSALS,
    ForgetRetainPairs,
    forget_retain_collator,
    forget_retain_rows,
    row_form,
)
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
        (FORGET, [{"answer": "A"}], "Example 0 of the retain set .*'question' and 'answer'; or 'text'; it has answer"),
    ],
)
def test_examples_without_a_token_to_learn_are_named(forget, retain, message):
    with pytest.raises(ValueError, match=message):
        ForgetRetainPairs(forget, retain, byte_tokenizer(), template=PLAIN)


def test_answers_that_max_length_cuts_are_counted_and_refused_where_nothing_is_left(caplog):
    short = dataclasses.replace(PLAIN, max_length=8)
    rows = [{"question": "Q?", "answer": "a"}, {"question": "Q?", "answer": "a" * 9}]
    data = ForgetRetainPairs(rows, None, byte_tokenizer(), template=short)
    assert [len(answer.input_ids) for answer in data.forget] == [5, 8]
    assert "1 of 2 samples of the forget set reach `max_length=8`" in caplog.text
    rows.append({"question": "Question?", "answer": "a"})
    with pytest.raises(ValueError, match=r"Example 2 of the forget set .* No token of the answer 'a' is left"):
        ForgetRetainPairs(rows, None, byte_tokenizer(), template=short)


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
    with pytest.raises(ValueError, match=r"`retain_data` is 'own.jsonl', but `forget_data` is not set"):
        forget_retain_rows(None, "own.jsonl")
    alone, more = forget_retain_rows(None, people=4), forget_retain_rows(None, people=4, holdout_people=2)
    assert (alone["forget"], alone["retain"]) == (more["forget"], more["retain"]) and len(more["holdout"]) == 24


def texts_of(answers, tokenizer):
    """(prompt, answer) of each sample, decoded."""
    return [
        (tokenizer.decode(a.input_ids[: a.answer_start]), tokenizer.decode(a.input_ids[a.answer_start :]))
        for a in answers
    ]


def message(role, content):
    return {"role": role, "content": content}


def test_each_answer_of_a_conversation_is_a_sample_with_all_before_it_as_its_prompt():
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    talk = [
        message("system", "S"), message("user", "A?"), message("assistant", "a."),
        message("user", "B?"), message("assistant", "b."),
    ]  # fmt: skip
    data = ForgetRetainPairs([{"messages": talk}, {"messages": talk[1:3]}], None, tokenizer)
    before = "<|system|>S</s><|user|>A?</s><|assistant|>"
    assert texts_of(data.forget, tokenizer) == [
        (before, "a.</s>"),
        (before + "a.</s><|user|>B?</s><|assistant|>", "b.</s>"),
        ("<|user|>A?</s><|assistant|>", "a.</s>"),
    ]
    assert len(data) == 3 and data[2]["forget"]["index"] == 2
    own = QuestionAnswerFormat(system="Mine.")  # only where the conversation brings none
    data = ForgetRetainPairs([{"messages": talk}, {"messages": talk[1:3]}], None, tokenizer, template=own)
    assert [prompt[:15] for prompt, _ in texts_of(data.forget, tokenizer)] == ["<|system|>S</s>"] * 2 + [
        "<|system|>Mine."
    ]


def test_prompts_and_completions_are_taken_as_they_are_or_as_messages():
    plain, chat = byte_tokenizer(), byte_tokenizer(CHAT_TEMPLATE)
    rows = [{"prompt": "Q:", "completion": " A"}]
    assert texts_of(ForgetRetainPairs(rows, None, plain).forget, plain) == [("Q:", " A</s>")]
    assert texts_of(ForgetRetainPairs(rows, None, chat).forget, chat) == [("Q:", " A</s>")]
    rows = [{"prompt": [message("user", "Q")], "completion": [message("assistant", "A")]}]
    assert texts_of(ForgetRetainPairs(rows, None, chat).forget, chat) == [("<|user|>Q</s><|assistant|>", "A</s>")]


def test_a_conversation_gives_what_its_question_and_answer_give():
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    talk = {"messages": [message("user", "Q?"), message("assistant", "A.")], "alternative": "B."}
    pair = {"question": "Q?", "answer": "A.", "alternative": "B."}
    first, second = (ForgetRetainPairs([row], None, tokenizer, alternatives=()) for row in (talk, pair))
    assert first.forget == second.forget and first.alternatives == second.alternatives


@pytest.mark.parametrize(
    "row, message_",
    [
        ({"messages": [message("user", "A?")]}, "no assistant message that answers another one; its roles are user"),
        ({"messages": []}, "'messages' has to be a list"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages' has to be a list"),
        ({"prompt": "Q", "completion": [message("assistant", "A")]}, "'prompt' has to be a list"),
        ({"text": "T", "question": "Q?"}, "is 'text' the whole text to learn"),
        (
            {"text": "T", "labels": "L"},
            "beside 'text' it has the column 'labels'.*'question': 'text', 'answer': 'labels'",
        ),
        ({"text": "T", "question": "Q?", "answer": "A"}, r"like question \+ answer and like text"),
        ({"prompt": "Q", "completion": "A", "text": "T"}, r"like prompt \+ completion and like text"),
    ],
)
def test_rows_that_cannot_be_understood_are_refused_with_the_way_out(row, message_):
    with pytest.raises(ValueError, match=f"Example 0 of the forget set cannot be used: .*{message_}"):
        ForgetRetainPairs([row], None, byte_tokenizer(CHAT_TEMPLATE))


def test_columns_say_which_of_two_forms_is_meant():
    row = {"text": "T", "labels": "L", "question": "Q?", "answer": None}
    assert row_form(row, {"text": "text"}) == {"text": "text"}
    assert row_form(row, {"question": "text", "answer": "labels"}) == {"question": "text", "answer": "labels"}
    assert row_form({"text": "T", "label": 1}, {}) == {"text": "text"}  # a class, not an answer


def test_a_typo_in_columns_is_named():
    with pytest.raises(ValueError, match=r"In `columns`: Unknown name 'qestion'\. Did you mean 'question'"):
        ForgetRetainPairs(FORGET, None, byte_tokenizer(), template=PLAIN, columns={"qestion": "frage"})


def test_messages_need_a_chat_template():
    talk = {"messages": [message("user", "A?"), message("assistant", "a.")]}
    for tokenizer, template in ((byte_tokenizer(), "auto"), (byte_tokenizer(CHAT_TEMPLATE), "plain")):
        with pytest.raises(ValueError, match="Chat messages need a chat template"):
            ForgetRetainPairs([talk], None, tokenizer, template=QuestionAnswerFormat(template=template))


def test_an_alternative_belongs_to_one_answer():
    talk = [message("user", "A?"), message("assistant", "a."), message("user", "B?"), message("assistant", "b.")]
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="conversation with 2 answers"):
        ForgetRetainPairs([{"messages": talk, "alternative": "c."}], None, tokenizer, alternatives=())
    data = ForgetRetainPairs([{"messages": talk}], None, tokenizer, alternatives=["no"])
    assert [text for texts in data.alternatives for _, text in texts_of(texts, tokenizer)] == ["no</s>"] * 2
    with pytest.raises(ValueError, match="a column 'alternative' with a text, or with a list"):
        ForgetRetainPairs(FORGET, None, byte_tokenizer(), template=PLAIN, alternatives=())


def test_samples_in_both_sets_are_counted_and_refused_unless_allowed(caplog):
    retain = [*RETAIN, FORGET[2], FORGET[0]]
    with pytest.raises(ValueError, match=r"2 of the 4 samples to forget are also in the retain set \(.* sample 0\)"):
        ForgetRetainPairs(FORGET, retain, byte_tokenizer(), template=PLAIN)
    ForgetRetainPairs(FORGET, retain, byte_tokenizer(), template=PLAIN, allow_overlap=True)
    assert "2 of the 4 samples" in caplog.text
    other = [{**FORGET[0], "answer": "another answer"}]  # the same question is no overlap
    ForgetRetainPairs(FORGET, other, byte_tokenizer(), template=PLAIN)


def test_columns_that_are_not_used_are_told(caplog):
    rows = [{**row, "source": "a book", "perturbed_answer": ["no"]} for row in FORGET]
    ForgetRetainPairs(rows, RETAIN, byte_tokenizer(), template=PLAIN)
    assert caplog.messages == ["Columns of the forget set that are not used: source."]


def test_rows_of_files_keep_what_was_chosen_and_nothing_that_looks_like_it(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "reply": "chosen", "answer": "not chosen", "perturbed_answer": "p"}))
    rows = forget_retain_rows(str(path), columns={"answer": "reply"})["forget"]
    assert rows == [{"question": "q", "answer": "chosen", "perturbed_answer": "p"}]
    assert "not used: answer" in caplog.text
    path.write_text(json.dumps({"text": "t", "labels": "l"}))
    with pytest.raises(ValueError, match=r"Row 0 of .* beside 'text' it has the column 'labels'"):
        forget_retain_rows(str(path))
    assert forget_retain_rows(str(path), columns={"text": "text"})["forget"] == [{"text": "t"}]
    both = forget_retain_rows(str(path), columns={"question": "text", "answer": "labels"})["forget"]
    assert both == [{"question": "t", "answer": "l"}]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_that_outlive_an_epoch_see_the_next_one(context):
    data = pairs()
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, collate_fn=_retain_indices, num_workers=1, persistent_workers=True,
        multiprocessing_context=context,
    )  # fmt: skip
    expected, seen = [], []
    for epoch in range(3):
        data.set_epoch(epoch)
        expected.append([data.retain_index(i) for i in range(4)])
        seen += list(loader)
    assert seen == expected and len({index for epoch in seen for index in epoch}) == 6
    assert copy.deepcopy(data).epoch == 2


def _retain_indices(samples):
    return [sample["retain"]["index"] for sample in samples]
