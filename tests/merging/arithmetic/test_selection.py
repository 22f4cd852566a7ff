"""Order statistics are exact: by the sample's bracket, by the histograms, with ties, and at the ends."""

from __future__ import annotations

import pytest
import torch

from hf_transfer_ext.merging.arithmetic import selection
from hf_transfer_ext.merging.arithmetic.selection import keep_magnitudes, order_statistics


class Pieces:
    """A tensor in pieces of 64, with a sample of chosen places."""

    count = 1

    def __init__(self, values, sample):
        self.values, self.places = values, sample

    @property
    def numel(self):
        return self.values.numel()

    def __iter__(self):
        for piece in self.values.split(64):
            yield None, [piece]

    def sample(self):
        yield None, [self.values[self.places]]


def scores(base, models):
    return [models[0].clone(), -models[0]]


VALUES = {
    "normal": lambda: torch.randn(5000),
    "tied": lambda: torch.randint(-3, 4, (5000,)).float(),
    "zeros": lambda: torch.randn(5000) * (torch.rand(5000) > 0.7),
    "sorted": lambda: torch.randn(5000).sort().values,
    "constant": lambda: torch.full((5000,), 2.5),
    "tiny": lambda: torch.randn(5000) * 1e-41,
    "huge": lambda: torch.randn(5000) * 1e38,
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("sample", ["spread", "misleading", "all"])
def test_equal_to_sorting(kind, sample, monkeypatch):
    torch.manual_seed(0)
    values = VALUES[kind]()
    places = {"spread": torch.arange(0, 5000, 7), "misleading": torch.arange(600), "all": torch.arange(5000)}[sample]
    ranks = [0, 1, 17, 1250, 2500, 4000, 4998, 4999]
    expected = values.sort().values[ranks].tolist()
    negative = (-values).sort().values[ranks].tolist()
    assert order_statistics(Pieces(values, places), scores, ranks) == [expected, negative]


def test_the_histograms_are_used_where_a_sample_misleads(monkeypatch):
    called = []
    original = selection._by_histograms

    def spy(*arguments):
        called.append(1)
        return original(*arguments)

    monkeypatch.setattr(selection, "_by_histograms", spy)
    values = torch.arange(5000.0)
    order_statistics(Pieces(values, torch.arange(0, 5000, 7)), scores, [2500])
    assert not called
    assert order_statistics(Pieces(values, torch.arange(600)), scores, [2500])[0] == [2500.0]
    assert called


def test_ranks_outside_are_refused():
    with pytest.raises(ValueError, match="from 0 to 9"):
        order_statistics(Pieces(torch.arange(10.0), torch.arange(10)), scores, [10])


def test_keep_magnitudes_by_hand():
    change = torch.tensor([0.5, -1.0, 2.0, -3.0, 0.0])
    assert keep_magnitudes(change.clone(), 1.0).tolist() == [0.0, -1.0, 2.0, -3.0, 0.0]
    assert keep_magnitudes(change.clone(), 1.0, 2.0).tolist() == [0.0, -1.0, 2.0, 0.0, 0.0]
    assert keep_magnitudes(change.clone(), float("inf"), float("inf")).tolist() == [0.0] * 5
    assert keep_magnitudes(change.clone(), 0.0).tolist() == change.tolist()
