import numpy as np
import pytest

from hf_transfer_ext.measurement.bootstrap import interval_of, mean_interval, percentile_interval, resampled


def test_arrays_of_one_group_are_drawn_together_and_groups_apart():
    first = np.arange(50.0)
    together = resampled(lambda a, b: float(np.abs(a - b).max()), [[first, first]], resamples=20)
    apart = resampled(lambda a, b: float(np.abs(a - b).max()), [[first], [first]], resamples=20)
    assert (together == 0).all() and (apart > 0).all()
    assert (resampled(lambda a: a.mean(), [[first]], resamples=5, seed=3) ==
            resampled(lambda a: a.mean(), [[first]], resamples=5, seed=3)).all()  # fmt: skip


def test_the_interval_of_a_mean_is_near_that_of_theory():
    values = np.random.default_rng(1).normal(size=400)
    low, high = mean_interval(values, resamples=2000)
    spread = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.02)


def test_there_is_no_interval_of_one_example_or_of_no_resample():
    assert mean_interval(np.ones(1)) is None and mean_interval(np.ones(5), resamples=0) is None
    assert interval_of(lambda a, b: 0.0, [[np.ones(5)], [np.ones(1)]]) is None
    assert percentile_interval(np.array([])) is None
    assert percentile_interval(np.zeros(3), np.ones(3)) == (0.0, 1.0)
