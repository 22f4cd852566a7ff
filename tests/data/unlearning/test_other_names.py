import pytest

from hf_transfer_ext.data.unlearning.other_names import with_other_names

ANN = {"question": "Who is Ann?", "answer": "Ann cooks.", "name": "Ann", "age": 3}


def test_each_row_gets_the_next_names_of_both_sets_in_every_text():
    rows = [ANN, {"question": "And Bob?", "name": "Bob"}]
    first, second = with_other_names(rows, [*rows, {"name": "Cid"}, {"name": "Ann"}, {}], {}, count=9, method="m")
    assert [copy["question"] for copy in first] == ["Who is Bob?", "Who is Cid?"]
    assert first[1] == {"question": "Who is Cid?", "answer": "Cid cooks.", "name": "Cid", "age": 3}
    assert [copy["question"] for copy in second] == ["And Cid?", "And Ann?"]  # begins one later
    (only,) = with_other_names(rows[:1], rows, {}, count=1, method="m")
    assert only == [{**ANN, "question": "Who is Bob?", "answer": "Bob cooks.", "name": "Bob"}]


def test_what_cannot_be_replaced_is_refused():
    with pytest.raises(ValueError, match="There is no other name in the column 'wer'"):
        with_other_names([{"q": "Who is Ann?", "wer": "Ann"}], [], {"name": "wer"}, count=1, method="m")
    with pytest.raises(ValueError, match="'m' replaces the name of a row's person, and row 1 of the forget set"):
        with_other_names([ANN, {**ANN, "name": "Zoe"}], [{"name": "Bob"}], {}, count=1, method="m")
