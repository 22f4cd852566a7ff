import math

import pytest
from evals.scored import example, tokens
from evals.shared_tofu import reference_log

from hf_transfer_ext.evals.metrics import answer_probability


def test_it_is_the_geometric_mean_of_the_tokens_probabilities():
    assert answer_probability(example(tokens([math.log(0.9), math.log(0.4)]))) == pytest.approx(math.sqrt(0.36))


def test_the_published_log_gives_the_published_number():
    losses = reference_log("full")["eval_log.json"]["avg_gt_loss"].values()
    values = [answer_probability(example(tokens([-loss]))) for loss in losses]
    assert sum(values) / len(values) == pytest.approx(0.926088, abs=1e-6)
