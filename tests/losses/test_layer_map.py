"""Layer maps by hand."""

import pytest

from hf_transfer_ext.losses.layer_map import layer_pairs


@pytest.mark.parametrize(
    "mapping, pairs",
    [
        ("uniform", [(0, 3), (1, 7), (2, 11)]),
        ("last", [(0, 9), (1, 10), (2, 11)]),
        ("skip", [(0, 0), (1, 4), (2, 8)]),
        ([(0, 5), (-1, -1)], [(0, 5), (2, 11)]),
    ],
)
def test_layer_maps_by_hand(mapping, pairs):
    assert layer_pairs(mapping, 3, 12) == pairs


def test_uneven_depths_still_end_at_the_last_layer():
    assert layer_pairs("uniform", 3, 7) == [(0, 1), (1, 3), (2, 6)] and layer_pairs("uniform", 4, 4)[-1] == (3, 3)


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"The pair \(0, 12\) names layer 12 of the teacher, which has 12 layers"):
        layer_pairs([(0, 12)], 3, 12)
    with pytest.raises(ValueError, match="names layer 3 of the student, which has 3 layers"):
        layer_pairs([(3, 1)], 3, 12)
    with pytest.raises(ValueError, match="different layers of the student"):
        layer_pairs([(0, 1), (-3, 2)], 3, 12)
    with pytest.raises(ValueError, match=r"Unknown layer map 'unifrom'. Did you mean 'uniform'"):
        layer_pairs("unifrom", 3, 12)
    with pytest.raises(ValueError, match="at least as deep as the student, got 3 and 12 layers"):
        layer_pairs("last", 12, 3)
