import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.engine.evaluate import compute_metrics


def test_the_mean_is_over_tokens_not_over_examples():
    scored = [example(tokens([-1.0, -2.0, -3.0])), example(tokens([-10.0]), index=1)]
    result = compute_metrics(scored, ["nats_per_token"])
    assert result.values["nats_per_token"].tolist() == [2.0, 10.0]
    assert result["nats_per_token"].value == pytest.approx(16.0 / 4)
