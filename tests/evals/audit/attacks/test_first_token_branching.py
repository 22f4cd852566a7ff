import pytest
from evals.audit.planted_people import DATA, FORGET, REFUSED, never_taught, subject, taught
from tiny import tiny_llama

from hf_transfer_ext.data.question_answer import QuestionAnswerFormat
from hf_transfer_ext.evals.audit.attacks.first_token_branching import first_token_branching

#: Without a space of its own before the answer, so that a byte is a first token that tells one answer from another.
OPEN = QuestionAnswerFormat(template="plain", prompt="{question}\n", separator="")


def test_an_answer_behind_a_refusal_is_found_and_unknown_ones_are_not():
    # Three refusals for each two answers: the refusal is the likeliest opening, the answer the second.
    covered = subject(taught(tiny_llama(), 3 * REFUSED + 2 * FORGET, steps=120, template=OPEN), OPEN)
    assert covered.recall(DATA.forget).max() == 0.0
    assert first_token_branching(covered, DATA, branches=2).min() == 1.0
    assert (first_token_branching(covered, DATA, branches=1) == covered.recall(DATA.forget)).all()
    assert first_token_branching(subject(never_taught()), DATA, branches=5).mean() < 0.1


def test_no_branch_is_refused():
    with pytest.raises(ValueError, match="`branches` must be at least 1, got 0"):
        first_token_branching(subject(never_taught()), DATA, branches=0)
