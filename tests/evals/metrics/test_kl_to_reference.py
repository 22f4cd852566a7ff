import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.engine.evaluate import compute_metrics
from hf_transfer_ext.evals.metrics import kl_to_reference


def test_the_mean_is_over_tokens():
    scored = [
        example(tokens([-1.0, -1.0], reference_kl=[0.1, 0.3])),
        example(tokens([-1.0], reference_kl=[1.1]), index=1),
    ]
    assert compute_metrics(scored, ["kl_to_reference"])["kl_to_reference"].value == pytest.approx(0.5)


def test_a_score_that_was_not_made_is_named():
    with pytest.raises(ValueError, match="`reference_kl` was not scored"):
        kl_to_reference(example(tokens([-1.0])))
