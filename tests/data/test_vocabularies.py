import pytest
from tiny import byte_tokenizer
from tiny_tokenizers import byte_level, wordpiece

from hf_transfer_ext.data.vocabularies import compare_vocabularies


def test_one_tokenizer_with_heads_of_different_sizes_matches():
    size = len(byte_tokenizer())
    match = compare_vocabularies(byte_tokenizer(), byte_tokenizer(), size + 6, size + 70)
    assert match.identical
    assert match.require_identical() == match.shared_size == size + 6


def test_an_added_token_is_named():
    student, teacher = byte_tokenizer(), byte_tokenizer()
    student.add_tokens(["<tool>", "<end of tool>"])
    size = len(student)
    match = compare_vocabularies(student, teacher, size, size)
    assert match.only_student == ("<tool>", "<end of tool>") and not match.only_teacher and not match.moved
    with pytest.raises(ValueError, match=r"2 tokens exist only in the student \('<tool>', '<end of tool>'\)"):
        match.require_identical()
    with pytest.raises(ValueError, match=r"2 tokens exist only in the teacher.*cross-tokenizer loss"):
        compare_vocabularies(teacher, student, size, size).require_identical()


def test_the_same_tokens_in_another_order_are_named():
    student, teacher = byte_tokenizer(), byte_tokenizer()
    student.add_tokens(["<a>", "<b>"])
    teacher.add_tokens(["<b>", "<a>"])
    size = len(student)
    match = compare_vocabularies(student, teacher, size, size)
    assert match.moved == (("<a>", size - 2, size - 1), ("<b>", size - 1, size - 2))
    with pytest.raises(ValueError, match=f"'<a>' is {size - 2} and {size - 1}"):
        match.require_identical()


def test_two_families_differ_in_every_way():
    student, teacher = byte_level(), wordpiece()
    match = compare_vocabularies(student, teacher, 600, 600)
    assert match.moved and match.only_student and match.only_teacher
    known = (
        len(match.moved)
        + len(match.only_student)
        + sum(
            student.get_vocab()[token] == i for token, i in teacher.get_vocab().items() if token in student.get_vocab()
        )
    )
    assert known == len(student)


def test_a_head_that_is_too_small_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=f"tokenizer of the teacher has ids up to {len(tokenizer) - 1}"):
        compare_vocabularies(tokenizer, tokenizer, 300, len(tokenizer) - 1)
