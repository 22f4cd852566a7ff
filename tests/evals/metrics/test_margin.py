import math

import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import margin


def test_it_is_the_logit_over_the_log_sum_of_the_others():
    logits = [2.0, 0.5, -1.0]
    log_p = logits[0] - math.log(sum(map(math.exp, logits)))
    others = math.log(math.exp(0.5) + math.exp(-1.0))
    assert margin(example(tokens([log_p]))) == pytest.approx(2.0 - others)


def test_the_mean_over_tokens_and_certain_tokens_are_clipped():
    assert margin(example(tokens([math.log(0.5), math.log(0.75)]))) == pytest.approx(math.log(3) / 2)
    assert margin(example(tokens([0.0]))) == 100.0
    assert margin(example(tokens([-500.0]))) == -100.0
