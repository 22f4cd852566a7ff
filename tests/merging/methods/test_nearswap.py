"""nearswap against its definition."""

from __future__ import annotations

import torch
from merging.method_cases import close, per_element, tensors

from hf_transfer_ext.merging import MERGE_METHODS

nearswap = MERGE_METHODS["nearswap"]


def test_definition():
    base, models = tensors(1)

    def oracle(start, other):
        share = min(1.0, 0.2 / abs(other - start))
        return share * other + (1 - share) * start

    close(nearswap(base, models, t=0.2), per_element(oracle, base, models[0]))


def test_by_hand():
    merged = nearswap(torch.tensor([0.0, 0.0, 1.0]), [torch.tensor([0.25, -4.0, 1.0])], t=0.5)
    assert merged.tolist() == [0.25, -0.5, 1.0]
