import pytest
from tiny_families import tiny_model

from hf_transfer_ext.students.shape import StudentShape, require_only


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_not_said_is_the_teachers(family):
    teacher = tiny_model(family, depth=3)
    own = StudentShape.of(teacher)
    assert own.depth == 3 and StudentShape().like(teacher) == own
    assert StudentShape(width=7).like(teacher) == StudentShape(3, 7, own.heads, own.vocabulary)


@pytest.mark.parametrize("field", ["depth", "width", "heads", "vocabulary"])
def test_numbers_below_one_are_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` of a student must be at least 1, got 0"):
        StudentShape(**{field: 0})


def test_only_the_field_that_may_change_changes():
    teacher = tiny_model("llama", depth=3)
    assert require_only(StudentShape(width=8), teacher, "width", "narrow", "").width == 8
    with pytest.raises(ValueError, match=r"narrow can only change the hidden size, but `depth` is 2.*Cut it"):
        require_only(StudentShape(depth=2), teacher, "width", "narrow", "Cut it.")
