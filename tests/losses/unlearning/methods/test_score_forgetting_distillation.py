import pytest
import torch
from losses.unlearning.methods.answers import Answers

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.losses.unlearning.causal_whp import causal_whp
from hf_transfer_ext.losses.unlearning.methods import METHODS

score_forgetting_distillation = METHODS["score_forgetting_distillation"]
ROWS = [{"question": "Who is Ann?", "name": "Ann"}, {"question": "Why?", "safe_question": ["How?", "When?"]}]


NAMED = [{"question": "Who is Bob?", "answer": "B", "name": "Bob"}]


def written(questions, temperature, seed):
    return [f"{question[:-1]} at {temperature:g}, {seed}" for question in questions]


def test_the_original_writes_about_the_safe_questions_and_keeps_them():
    method = score_forgetting_distillation(names=2, samples=2, temperature=0.5)
    retain = [*NAMED, {"question": "And Ann?", "answer": "A", "name": "Ann"}]  # her name is not safe
    forget, kept = method.rows(ROWS, retain, {}, written)
    assert forget == [
        {"question": own, "answer": f"{other[:-1]} at 0.5, {turn}", "safe_question": other}
        for turn in range(2)
        for own, other in (("Who is Ann?", "Who is Bob?"), ("Why?", "How?"), ("Why?", "When?"))
    ]
    assert kept == [*({"question": row["safe_question"], "answer": row["answer"]} for row in forget), *retain]
    assert method.copies(forget[:1], [], {}) == [[{**forget[0], "question": "Who is Bob?"}]]


def test_a_text_that_was_written_twice_counts_once_and_an_empty_one_not():
    method = score_forgetting_distillation(samples=3)
    forget, _ = method.rows(ROWS[1:], [], {}, lambda questions, *_: ["same", " "])
    assert [row["answer"] for row in forget] == ["same"]
    with pytest.raises(ValueError, match="The model wrote nothing to any safe question for 'Why\\?'"):
        method.rows(ROWS[1:], [], {}, lambda questions, *_: ["", " "])


def test_columns_may_be_renamed():
    rows = [{"frage": "Warum?", "andere": "Wie?"}]
    columns = {"question": "frage", "answer": "antwort", "safe_question": "andere"}
    forget, kept = score_forgetting_distillation(samples=1).rows(rows, [], columns, written)
    assert forget == [{"frage": "Warum?", "antwort": "Wie at 1, 0", "andere": "Wie?"}]
    assert kept == [{"frage": "Wie?", "antwort": "Wie at 1, 0"}]


def test_the_teacher_is_the_original_after_the_safe_question_and_the_loss_its_divergence():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    row = EncodedAnswer([1, 2, 3, 4, 5], 2)
    copied = [(row, [([6, 6, 6, 3, 4, 5], 3, logits)])]
    found = score_forgetting_distillation(shortlist=20).prepare(Answers({}, copied=copied))
    own = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    loss = causal_whp(own, found["teacher_probs"].double(), found["teacher_ids"])
    for place in range(3):
        p, q = logits[place].softmax(-1), own[place].softmax(-1)
        expected = sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True))
        assert float(loss[place]) == pytest.approx(expected, abs=1e-6)


def test_a_token_that_the_tokenizer_joins_with_the_prompt_has_no_teacher():
    logits = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    copied = [(EncodedAnswer([1, 2, 3, 4, 5], 2), [([6, 7, 4, 5], 2, logits)])]
    found = score_forgetting_distillation().prepare(Answers({}, copied=copied))
    assert not found["teacher_probs"][0].any()
    torch.testing.assert_close(found["teacher_probs"][1:].max(-1).values, logits.softmax(-1).max(-1).values)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "x"}], "Row 0 of the forget set has no column 'question'"),
        ([{"question": "Who is he?", "name": "Ann"}], "row 0 of the forget set has no column 'name' whose text"),
        ([{"question": "Who is Ann?", "name": "Ann"}], "needs a safe question for each row .* 'safe_question'"),
    ],
)
def test_rows_without_a_safe_question_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        score_forgetting_distillation().rows(rows, rows if "Ann?" in str(rows) else NAMED, {}, written)


@pytest.mark.parametrize("name", ["names", "samples", "shortlist", "temperature"])
def test_options_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` must be >"):
        score_forgetting_distillation(**{name: 0})
