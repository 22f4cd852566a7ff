import numpy as np
import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.engine.evaluate import compute_metrics
from hf_transfer_ext.evals.metrics import nats_gained


def test_the_difference_of_the_losses_over_tokens():
    scored = [
        example(tokens([-1.0, -2.0], reference_log_probs=[-1.5, -2.5])),
        example(tokens([-1.0], reference_log_probs=[-3.0]), index=1),
    ]
    assert nats_gained(scored[0]) == (pytest.approx(0.5), 2.0)
    assert compute_metrics(scored, ["nats_gained"])["nats_gained"].value == pytest.approx((0.5 + 0.5 + 2.0) / 3)


def test_the_interval_is_that_of_pairs():
    hard = np.linspace(-9.0, -1.0, 40)
    scored = [
        example(tokens([one], reference_log_probs=[one - 0.1 - 0.01 * (place % 2)]), index=place)
        for place, one in enumerate(hard)
    ]
    found = compute_metrics(scored, ["nats_gained", "nats_per_token"])
    low, high = found["nats_gained"].interval
    assert 0.1 <= low < found["nats_gained"].value < high <= 0.11
    assert np.ptp(found["nats_per_token"].interval) > 100 * (high - low)


def test_a_score_that_was_not_made_is_named():
    with pytest.raises(ValueError, match="`reference_log_probs` was not scored"):
        nats_gained(example(tokens([-1.0])))
