import pytest
from evals.audit.planted_people import DATA, FORGET, planted, subject

from hf_transfer_ext.evals.audit.attacks.in_context import in_context, use_of_context
from hf_transfer_ext.evals.audit.subject import AuditData


def test_the_fact_stands_before_the_question():
    original = subject(planted()[0])
    stated = [{**row, "question": f"{row['answer']} {row['question']}"} for row in FORGET]
    assert in_context(original, DATA) == pytest.approx(original.probability(stated))


def test_the_words_of_the_paraphrased_answer_go_first():
    original = subject(planted()[0])
    rows = [{**row, "paraphrased_answer": "by trade a " + row["answer"]} for row in FORGET]
    stated = [{**row, "question": f"{row['paraphrased_answer']} {row['question']}"} for row in rows]
    assert in_context(original, AuditData(rows)) == pytest.approx(original.probability(stated))


def test_it_proves_nothing_without_a_model_that_never_knew():
    assert in_context.needs_floor
    scores = in_context(subject(planted()[0]), DATA)
    assert f"{scores.mean():.2f}" in use_of_context(scores, scores)
