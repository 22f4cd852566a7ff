"""passthrough against its definition; stacks of layers are tested in `test_run.py`."""

from __future__ import annotations

import torch
from merging.method_cases import tensors

from hf_transfer_ext.merging import MERGE_METHODS

passthrough = MERGE_METHODS["passthrough"]


def test_as_it_is_and_scaled():
    _, models = tensors(1)
    assert torch.equal(passthrough(None, models), models[0])
    assert torch.equal(passthrough(None, models, scale=0.25), models[0] * 0.25)


def test_by_hand():
    assert passthrough(None, [torch.tensor([2.0, -3.0])], scale=[0.5]).tolist() == [1.0, -1.5]
