import sys

import pytest
import torch
from evals.audit.planted_people import DATA, planted, subject

from hf_transfer_ext.evals.audit.attacks.bitsandbytes_quantization import (
    bitsandbytes_quantization,
    bitsandbytes_rounded,
)


def test_an_int8_row_has_even_levels_of_its_own():
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    rounded = bitsandbytes_rounded(weight, "int8")
    step = weight.half().abs().amax(1, keepdim=True) / 127
    assert (rounded - (weight / step).round() * step).abs().max() < 1.01 * step.max()
    assert ((rounded / step) - (rounded / step).round()).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_block_of_four_bits_has_sixteen_levels_and_keeps_its_largest_weight(kind):
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(4, 64)
    rounded = bitsandbytes_rounded(weight, kind)
    assert rounded.shape == weight.shape and rounded.dtype == weight.dtype
    assert all(len(row.unique()) <= 16 for row in rounded)
    assert rounded.abs().amax(1) == pytest.approx(weight.abs().amax(1), rel=1e-3)
    assert (rounded - weight).norm() / weight.norm() < 0.2


def test_the_rounded_original_still_knows_and_the_retrained_does_not():
    pytest.importorskip("bitsandbytes")
    original, _, retrained = map(subject, planted())
    assert bitsandbytes_quantization(original, DATA, kind="int8").mean() > 0.8
    assert bitsandbytes_quantization(retrained, DATA).mean() < 0.2


def test_what_is_missing_is_told(monkeypatch):
    with pytest.raises(ValueError, match="one of nf4, fp4, int8, got 'int3'"):
        bitsandbytes_quantization(subject(planted()[0]), DATA, kind="int3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        bitsandbytes_quantization(subject(planted()[0]), DATA)
