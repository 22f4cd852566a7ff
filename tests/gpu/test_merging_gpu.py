"""Merges on a GPU: the numbers of the CPU to the rounding of float32, the same bytes every time."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import config_of
from merging.tiny_models import load, write_model

from hf_transfer_ext.merging import MERGE_METHODS, merge
from hf_transfer_ext.merging.streaming import stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = {"model.a.weight": (120, 64), "model.b.weight": (333,), "model.c.weight": (4, 9000)}


def models_of(folder, dtype):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    tuned = []
    for i in range(3):
        tensors = {name: one + 0.1 * torch.randn(one.shape, generator=generator) for name, one in base.items()}
        tuned.append(write_model(folder / f"m{i}", {name: one.to(dtype) for name, one in tensors.items()}))
    return write_model(folder / "base", {name: one.to(dtype) for name, one in base.items()}), tuned


@pytest.mark.parametrize("name", MERGE_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method(tmp_path, name, dtype, monkeypatch):
    monkeypatch.setattr(stream, "DEVICE_PIECE", 1 << 13)
    monkeypatch.setattr(stream, "SAMPLE_RUN", 16)
    config = config_of(name, *models_of(tmp_path, dtype))
    config["out_dtype"] = "float32"
    merge(config, tmp_path / "cpu")
    merge(config, tmp_path / "gpu", device="cuda", threads=1)
    merge(config, tmp_path / "again", device="cuda", threads=4)
    expected, again = load(tmp_path / "cpu"), load(tmp_path / "again")
    for key, tensor in load(tmp_path / "gpu").items():
        torch.testing.assert_close(tensor, expected[key], rtol=2e-5, atol=2e-5)
        assert torch.equal(tensor, again[key]), key


def test_memory_does_not_grow_with_the_model(tmp_path):
    peaks = []
    for rows in (4_000, 64_000):
        folder = tmp_path / str(rows)
        paths = [
            write_model(folder / str(i), {"model.w.weight": torch.randn(rows, 1024).bfloat16()}) for i in range(3)
        ]
        torch.cuda.reset_peak_memory_stats()
        merge(config_of("ties", paths[0], paths[1:]) | {"parameters": {"weight": 0.5}}, folder / "out", device="cuda")
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 3e9, peaks
