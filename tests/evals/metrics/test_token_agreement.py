import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.engine.evaluate import compute_metrics


def test_the_mean_is_over_tokens():
    scored = [
        example(tokens([-1.0] * 3, reference_agrees=[True, True, False])),
        example(tokens([-1.0], reference_agrees=[False]), index=1),
    ]
    assert compute_metrics(scored, ["token_agreement"])["token_agreement"].value == pytest.approx(0.5)
