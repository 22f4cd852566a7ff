import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import loss_attack, min_k


def test_by_hand():
    scored = example(tokens([-1.0, -5.0, -2.0, -4.0, -3.0]))
    assert min_k(scored) == pytest.approx(4.5)  # 40 % of five tokens: the two least likely
    assert min_k(scored, share=0.1) == pytest.approx(5.0)  # at least one token
    assert min_k(scored, share=1.0) == pytest.approx(loss_attack(scored))


def test_a_share_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="in \\(0, 1\\], got 0"):
        min_k(example(tokens([-1.0])), share=0.0)
