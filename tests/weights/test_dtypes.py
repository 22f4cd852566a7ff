"""dtypes by their names say of themselves what torch and numpy say of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_transfer_ext.weights.dtypes import BF16, DTYPES, F16, F32, F64, FLOAT_DTYPES, dtype_named, stored_dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_sizes_kinds_and_bits_are_those_of_torch(dtype):
    assert dtype.itemsize == dtype.torch.itemsize == dtype.numpy.itemsize
    assert dtype.is_floating_point == dtype.torch.is_floating_point
    assert stored_dtype(dtype.torch) is dtype and DTYPES[dtype.code] is dtype
    if dtype.is_floating_point:
        bits = torch.arange(256, dtype=torch.uint8)
        if dtype.itemsize > 1:  # all values of the upper byte, with the lower ones 0 or all 1
            rest = torch.tensor([[0] * (dtype.itemsize - 1), [255] * (dtype.itemsize - 1)], dtype=torch.uint8)
            bits = torch.cat([rest.repeat(256, 1), bits.repeat_interleave(2)[:, None]], dim=1).reshape(-1)
        values = bits.view(dtype.torch).double()
        words = bits.numpy().view(f"u{dtype.itemsize}")
        magnitudes = words & np.array((1 << (8 * dtype.itemsize - 1)) - 1, words.dtype)
        assert ((magnitudes < dtype.infinity) == values.isfinite().numpy()).all()


def test_names():
    assert dtype_named("bfloat16") is dtype_named("torch.bfloat16") is dtype_named(torch.bfloat16) is BF16
    assert [dtype_named(name) for name in ("half", "float", "double")] == [F16, F32, F64]
    assert dtype_named("int4") is dtype_named(None) is dtype_named("complex64") is None
    assert [str(one) for one in FLOAT_DTYPES] == ["float64", "float32", "float16", "bfloat16"]


def test_a_dtype_that_files_do_not_have():
    with pytest.raises(ValueError, match=r"dtype torch\.complex64 cannot be stored.*float32"):
        stored_dtype(torch.complex64)


def test_they_are_known_without_torch():
    code = (
        "import sys, hf_transfer_ext.weights.dtypes as d; d.dtype_named('bfloat16'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
