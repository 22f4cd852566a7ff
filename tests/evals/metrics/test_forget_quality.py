from itertools import combinations

import numpy as np
import pytest
from evals.metrics.test_truth_ratio import from_log
from evals.shared_tofu import reference_log
from scipy.stats import ks_2samp

from hf_transfer_ext.evals.metrics import forget_quality, truth_ratio
from hf_transfer_ext.evals.metrics.forget_quality import kolmogorov_smirnov


def distance(first, second):
    return max(abs(np.mean(first <= x) - np.mean(second <= x)) for x in [*first, *second])


def test_the_p_value_counts_all_interleavings():
    first, second = np.array([1.0, 2.0, 5.0]), np.array([3.0, 4.0, 6.0, 7.0])
    pooled = np.arange(7.0)
    as_large = [
        distance(pooled[list(chosen)], np.delete(pooled, chosen)) >= distance(first, second) - 1e-12
        for chosen in combinations(range(7), 3)
    ]
    statistic, p_value = kolmogorov_smirnov(first, second)
    assert statistic == pytest.approx(distance(first, second))
    assert p_value == pytest.approx(np.mean(as_large), rel=1e-12)


@pytest.mark.parametrize("sizes", [(5, 5), (40, 40), (60, 35), (200, 1)])
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_it_equals_scipy(sizes, shift):
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=sizes[0]), rng.normal(size=sizes[1]) + shift
    theirs = ks_2samp(first, second, method="exact")
    assert kolmogorov_smirnov(first, second) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-8)


def test_a_tiny_p_value_keeps_its_digits():
    # Two samples of 300 that do not overlap: 2 of C(600, 300) interleavings.
    _, p_value = kolmogorov_smirnov(np.arange(300.0), np.arange(300.0) + 300)
    from math import comb

    assert p_value == pytest.approx(2 / comb(600, 300), rel=1e-9)


def test_equal_samples_cannot_be_told_apart():
    quality, log10 = forget_quality(np.arange(20.0), np.arange(20.0))
    assert quality.value == 1.0 and log10.value == 0.0


@pytest.mark.parametrize("definition, p_value", [("arithmetic", 2.431e-17), ("geometric", 2.194e-16)])
def test_the_published_logs_give_the_published_p_value(definition, p_value):
    ratios = [
        np.array([truth_ratio(e, definition=definition) for e in from_log(reference_log(m)["eval_log_forget.json"])])
        for m in ("full", "retain90")
    ]
    quality, log10 = forget_quality(*ratios)
    assert quality.value == pytest.approx(p_value, rel=5e-4)
    assert log10.value == pytest.approx(np.log10(p_value), abs=1e-3)
    assert quality.examples == 300


def test_values_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match=r"`retrained` .* index \[1\]"):
        forget_quality(np.array([1.0]), np.array([1.0, np.nan]))


def test_the_interval_contains_the_p_value_and_speaks_of_the_examples():
    rng = np.random.default_rng(0)
    first = rng.normal(size=60)
    for shift in (0.0, 0.3, 2.0):
        quality, log10 = forget_quality(first, rng.normal(size=60) + shift, resamples=200)
        low, high = quality.interval
        assert 0 <= low <= quality.value <= high <= 1 and low < high
        assert log10.interval == pytest.approx(tuple(np.log10(quality.interval)))
    drawn = np.random.default_rng(0).integers(0, 60, size=(200, 60))
    values = [kolmogorov_smirnov(first[d], (first + 0.5)[d])[1] for d in drawn]
    quality, _ = forget_quality(first, first + 0.5, resamples=200)
    expected = np.quantile(values, [0.025, 0.975], method="nearest")
    assert quality.interval == pytest.approx((min(expected[0], quality.value), max(expected[1], quality.value)))
    assert forget_quality(first, first, resamples=0)[0].interval is None
    assert forget_quality(first[:1], first[:1])[0].interval is None
