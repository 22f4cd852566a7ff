"""Measurements of task models: F1 and rank correlation on examples worked by hand, and intervals over rows."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from hf_transfer_ext.measurement.bootstrap import interval_of, mean_interval
from hf_transfer_ext.trainers import task_metrics
from hf_transfer_ext.trainers.task_metrics import (
    entities,
    entity_counts,
    entity_f1,
    label_counts,
    macro_f1,
    pair_spearman,
    places_of,
    ratio,
    row_spearman,
    spearman,
    sums_by_row,
)


def test_f1_of_labels_and_its_mean():
    predicted, labels, row = (torch.tensor(one) for one in ([0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 2]))
    hits, totals = label_counts(predicted, labels, row, 3, 3)
    assert hits.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    assert totals.tolist() == [[3, 1, 0], [0, 2, 0], [0, 2, 0]]
    assert macro_f1(hits, totals) == pytest.approx((2 / 3 + 0.8) / 2)
    chosen, wanted = np.array([[1, 0], [1, 1]]), np.array([[1, 1], [0, 1]])
    assert macro_f1(chosen * wanted, chosen + wanted) == pytest.approx(2 / 3)
    assert math.isnan(macro_f1(hits[:, 2:], totals[:, 2:]))


def test_entities_are_whole_spans_of_one_type():
    assert entities(["B-A", "I-A", "O", "I-B", "B-B"]) == {(0, 2, "A"), (3, 4, "B"), (4, 5, "B")}
    assert entities(["B-A", "I-B"]) == {(0, 1, "A"), (1, 2, "B")}
    counts = entity_counts([["B-A", "O", "B-B"], ["O"]], [["B-A", "I-A", "B-B"], ["O"]])
    assert [one.tolist() for one in counts] == [[1, 0], [4, 0]]
    assert entity_f1(*counts) == pytest.approx(0.5)
    assert entity_f1(*(one[1:] for one in counts)) == 0.0


def test_rank_correlation_shares_the_ranks_of_equal_values():
    x, y = np.array([1.0, 2.0, 2.0, 5.0, 3.0]), np.array([2.0, 1.0, 4.0, 4.0, 3.0])
    assert spearman(places_of(x), places_of(y)) == pytest.approx(spearmanr(x, y).statistic)
    times = np.array([2, 0, 1, 3, 1])
    repeated = spearmanr(x.repeat(times), y.repeat(times)).statistic
    assert spearman(places_of(x), places_of(y), times) == pytest.approx(repeated)
    assert math.isnan(spearman(places_of(x), np.zeros(5, int)))
    assert math.isnan(spearman(places_of(x), places_of(y), np.zeros(5)))


def test_intervals_are_those_of_the_bootstrap_over_rows():
    rng = np.random.default_rng(0)
    sums, counts = rng.random(20), rng.integers(0, 5, 20)
    found = ratio("nats_per_token", sums, counts, "data", unit="nats", higher_is_better=False)[0]
    kept = counts > 0
    assert found.value == pytest.approx(sums[kept].sum() / counts.sum()) and found.examples == counts.sum()
    by_hand = interval_of(lambda one, two: one.sum() / two.sum(), [[sums[kept], counts[kept]]])
    assert found.interval == pytest.approx(by_hand) and found.interval[0] < found.value < found.interval[1]
    assert (found.unit, found.higher_is_better, found.dataset) == ("nats", False, "data")
    plain = ratio("accuracy", sums > 0.5, np.ones(20))[0]
    assert plain.interval == pytest.approx(mean_interval((sums > 0.5).astype(float)))
    assert ratio("accuracy", sums, np.zeros(20)) == [] and ratio("a", sums[:1], np.ones(1))[0].interval is None


def test_rows_and_not_their_items_are_resampled():
    """The words of a text stand and fall together: the interval is that of the few texts."""
    right = np.repeat([1.0, 0.0, 1.0, 0.0], 100)
    row = torch.arange(4).repeat_interleave(100)
    sums, counts = (sums_by_row(torch.tensor(one), row, 4) for one in (right, np.ones(400)))
    of_rows, of_words = ratio("accuracy", sums, counts)[0].interval, mean_interval(right)
    assert of_rows[1] - of_rows[0] > 5 * (of_words[1] - of_words[0])


def test_rank_correlations_of_rows_and_of_pairs_have_intervals(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    one, noise = torch.randn(2, 12, generator=generator)
    two = one + noise
    found = row_spearman("spearman", one, two)[0]
    by_hand = interval_of(lambda a, b: spearmanr(a, b).statistic, [[one.double().numpy(), two.double().numpy()]])
    assert found.interval == pytest.approx(by_hand) and found.value == pytest.approx(spearmanr(one, two).statistic)

    sides = [torch.outer(side, side) for side in (one, two)]

    def of_pairs(drawn):
        pairs = [(i, j) for place, i in enumerate(drawn) for j in drawn[:place] if i != j]
        return spearmanr(*([float(side[i, j]) for i, j in pairs] for side in sides)).statistic

    found = pair_spearman("similarity_to_teacher", *sides)[0]
    assert found.value == pytest.approx(of_pairs(np.arange(12))) and found.examples == 12
    monkeypatch.setattr(task_metrics, "PAIRS_TO_RANK", 0)  # the fewest resamples: 100
    by_hand = interval_of(of_pairs, [[np.arange(12)]], resamples=100)
    assert pair_spearman("similarity_to_teacher", *sides)[0].interval == pytest.approx(by_hand)


def test_an_undefined_resample_leaves_no_interval():
    assert row_spearman("spearman", torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 2.0]))[0].interval is None
