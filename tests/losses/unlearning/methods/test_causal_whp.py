import pytest
import torch
from losses.unlearning.methods.answers import Answers

from hf_transfer_ext.data.question_answer import EncodedAnswer
from hf_transfer_ext.losses.unlearning.methods import METHODS
from hf_transfer_ext.losses.unlearning.methods.causal_whp import mean_teacher

#: Tokens: 1 and 2 are names, 3 to 6 other words. Question "3 NAME", answer "NAME 4 5 6".
OWN, OTHER, LONGER = [3, 1, 1, 4, 5, 6], [3, 2, 2, 4, 5, 6], [3, 2, 7, 2, 7, 4, 5, 6]


def test_the_teacher_is_the_mean_over_aligned_tokens_with_the_name_put_back():
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(4, 8, generator=draw), torch.randn(5, 8, generator=draw)
    found = mean_teacher(OWN, 2, [(OTHER, 2, first), (LONGER, 3, second)]).double()
    assert not found[0].any()  # the name itself has no teacher
    for place, (a, b) in ((1, (1, 2)), (2, (2, 3)), (3, (3, 4))):
        expected = torch.zeros(8, dtype=torch.float64)
        for row in (first[a], second[b]):
            own = row.double().softmax(-1)
            own[1], own[2] = own[1] + own[2], 0.0
            expected += own / 2
        torch.testing.assert_close(found[place], expected, atol=1e-6, rtol=1e-5)


def test_a_single_token_in_common_is_no_alignment():
    found = mean_teacher([3, 1, 4, 1, 5], 2, [([3, 2, 4, 2, 5], 2, torch.randn(3, 8))])
    assert not found.any()


def test_teachers_are_kept_one_row_after_the_other():
    logits = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    row = (EncodedAnswer(OWN, 2), [(OTHER, 2, logits)])
    found = METHODS["causal_whp"](shortlist=20).prepare(Answers({}, copied=[row, row]))
    assert found["teacher_starts"].tolist() == [0, 4] and found["teacher_probs"].shape == (8, 7)
    whole = mean_teacher(OWN, 2, [(OTHER, 2, logits)])
    torch.testing.assert_close(whole.gather(-1, found["teacher_ids"][4:]), found["teacher_probs"][4:])


def test_copies_have_another_name_in_every_text():
    rows = [{"question": "Who is Ann?", "answer": "Ann cooks.", "name": "Ann", "age": 3}, {"name": "Bob"}]
    (copies,) = METHODS["causal_whp"](names=3).copies(rows[:1], [*rows, {"name": "Cid"}], {})
    assert [copy["question"] for copy in copies] == ["Who is Bob?", "Who is Cid?"]
    assert copies[0] == {"question": "Who is Bob?", "answer": "Bob cooks.", "name": "Bob", "age": 3}


def test_what_cannot_be_replaced_is_refused():
    method = METHODS["causal_whp"]()
    row = {"question": "Who is Ann?", "answer": "A cook.", "name": "Ann"}
    with pytest.raises(ValueError, match="There is no other name in the column 'name'"):
        method.copies([row], [row], {})
    for other in ({**row, "name": "Bob"}, {"question": "Who?", "answer": "Me."}):
        with pytest.raises(ValueError, match="row 0 of the forget set has no column 'name' whose text"):
            method.copies([other], [row], {})
    with pytest.raises(ValueError, match="`names` must be >= 1"):
        METHODS["causal_whp"](names=0)
