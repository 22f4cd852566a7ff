import pytest
import torch
from adapters.transfer.pairs import dense, twin, with_target

from hf_transfer_ext.adapters.transfer.methods.copy import copy


def test_the_change_is_the_same_whatever_the_target():
    pair, _ = twin("up_proj", rotated=True)
    assert torch.equal(dense(copy(pair)), dense(pair.change))


def test_other_shapes_are_refused_by_name():
    pair, _ = twin("up_proj")
    wider = with_target(pair, torch.zeros(24, 12))
    with pytest.raises(ValueError, match=r"`copy` needs equal shapes, .*\[20, 12\].*\[24, 12\]"):
        copy(wider)
