import math

import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.engine.evaluate import compute_metrics


def test_it_is_the_exponential_of_the_mean_over_all_tokens():
    scored = [example(tokens([math.log(0.5)] * 3)), example(tokens([math.log(0.25)]), index=1)]
    # Four tokens, 3 ln 2 + 2 ln 2 = 5 ln 2 nats: 2 ** (5 / 4).
    found = compute_metrics(scored, ["perplexity"])["perplexity"]
    assert found.value == pytest.approx(2**1.25)
    assert found.interval[0] == pytest.approx(2.0) and found.interval[1] == pytest.approx(4.0)
    assert not found.higher_is_better
