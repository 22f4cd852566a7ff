from itertools import product

import pytest

from hf_transfer_ext.evals.metrics.extraction_strength import strength


@pytest.mark.parametrize("hits, value", [("1111", 1.0), ("0111", 0.75), ("1101", 0.25), ("1110", 0.0), ("0000", 0.0)])
def test_by_hand(hits, value):
    assert strength([h == "1" for h in hits]) == value


def test_it_equals_the_definition_on_every_pattern_of_six():
    for hits in product([False, True], repeat=6):
        matching = [k for k in range(6) if all(hits[k:])]
        assert strength(hits) == pytest.approx(1 - min(matching) / 6 if matching else 0.0)
