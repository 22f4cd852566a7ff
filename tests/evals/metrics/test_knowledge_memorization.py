import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import knowledge_memorization


@pytest.mark.parametrize("rest", ["", "\n\nMore text", "\nQuestion: And who?", " Question: And who?"])
def test_questions_of_its_own_are_cut_off(rest):
    scored = example(tokens([-1.0]), answer="In Rome", generation="In Rome." + rest)
    assert knowledge_memorization(scored) == 1.0


def test_by_hand():
    scored = example(tokens([-1.0]), answer="In Rome", generation="He lives in Rome")
    assert knowledge_memorization(scored) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
