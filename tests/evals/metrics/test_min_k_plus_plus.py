import numpy as np
import pytest
from evals.scored import example, tokens

from hf_transfer_ext.evals.metrics import min_k_plus_plus


def test_by_hand():
    scored = example(tokens([-1.0, -5.0, -2.0], vocabulary_mean=[-2.0, -3.0, -2.0], vocabulary_std=[2.0, 1.0, 0.0]))
    # Standardised: .5, -2 and 0 for the position that has no spread. The lowest of three at 40 %: one.
    assert min_k_plus_plus(scored) == pytest.approx(2.0)
    assert min_k_plus_plus(scored, share=1.0) == pytest.approx(0.5)


def test_it_equals_the_definition_on_a_whole_distribution():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(20))
    mean = sum(x * np.log(x) for x in p)
    deviation = np.sqrt(sum(x * (np.log(x) - mean) ** 2 for x in p))
    scored = example(tokens([np.log(p[3])], vocabulary_mean=[mean], vocabulary_std=[deviation]))
    assert min_k_plus_plus(scored) == pytest.approx(-(np.log(p[3]) - mean) / deviation)
