import dataclasses

import pytest
import torch
from adapters.transfer.pairs import HEADS, HIDDEN, SIZES, dense, layer, rotation, twin

from hf_transfer_ext.adapters.transfer.method import Heads
from hf_transfer_ext.adapters.transfer.methods.lorasuite import lorasuite, match_heads


@pytest.mark.parametrize("kind", SIZES)
def test_a_base_in_other_coordinates_gets_the_change_in_those_coordinates(kind):
    pair, expected = twin(kind, rotated=True)
    torch.testing.assert_close(dense(lorasuite(pair)), expected, rtol=1e-3, atol=1e-3)


def attention(seed=0):
    return {kind: layer(kind, seed)[0] for kind in ("q_proj", "k_proj", "v_proj", "o_proj")}


def test_heads_in_another_order_are_found():
    source, size = attention(), HIDDEN // HEADS.queries
    # Swap the two groups of heads: queries (0, 1) with (2, 3), and their keys and values 0 with 1.
    order = torch.cat([torch.arange(2 * size, 4 * size), torch.arange(2 * size)])
    groups = torch.cat([torch.arange(size, 2 * size), torch.arange(size)])
    target = {
        "q_proj": source["q_proj"][order],
        "k_proj": source["k_proj"][groups],
        "v_proj": source["v_proj"][groups],
        "o_proj": source["o_proj"][:, order],
    }
    assert match_heads(source, target, torch.eye(HIDDEN), (HEADS, HEADS)) == (2, 3, 0, 1)


def test_more_heads_than_the_source_has_stay_without_a_partner():
    target = {kind: torch.cat([weight, weight], 1 if kind == "o_proj" else 0) for kind, weight in attention().items()}
    matched = match_heads(attention(), target, torch.eye(HIDDEN), (HEADS, Heads(8, 4)))
    assert sorted(head for head in matched if head is not None) == [0, 1, 2, 3] and matched.count(None) == 4


def test_a_layer_without_a_matched_head_is_left_out_and_unknown_ones_are_refused():
    pair, _ = twin("q_proj")
    assert lorasuite(dataclasses.replace(pair, matched_heads=(None,) * 4)) is None
    with pytest.raises(ValueError, match=r"not 'model\.layers\.0\.mixer\.in_proj'"):
        lorasuite(dataclasses.replace(pair, module="model.layers.0.mixer.in_proj"))


def test_a_rotation_inside_a_head_is_followed():
    """Queries and keys of a head may be rotated together without changing the model: the change follows."""
    pair, expected = twin("v_proj")
    turn = torch.block_diag(rotation(3, 1), rotation(3, 2))
    turned = dataclasses.replace(pair, target=turn @ pair.target)
    torch.testing.assert_close(dense(lorasuite(turned)), turn @ expected, rtol=1e-3, atol=1e-3)
