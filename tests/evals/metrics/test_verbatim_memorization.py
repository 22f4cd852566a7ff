import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import verbatim_memorization


def test_by_hand_without_stems():
    scored = example(tokens([-1.0]), answer="the running horses", generation="The horses run there")
    # "the" and "horses" in order: recall 2 / 3, precision 2 / 4.
    assert verbatim_memorization(scored) == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_an_exact_copy_is_one_and_silence_nothing():
    assert verbatim_memorization(example(tokens([-1.0]), answer="a b c", generation="a b c")) == 1.0
    assert verbatim_memorization(example(tokens([-1.0]), answer="a b c", generation="")) == 0.0
