"""What holds for every merge method in the registry; a new one joins by itself (and adds a line to `OPTIONS`)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from merging.method_cases import OPTIONS, config_of, extra_of, tensors
from merging.tiny_models import load, write_model

import hf_transfer_ext.merging.methods as methods
from hf_transfer_ext.merging import MERGE_METHODS, merge
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.streaming import stream
from hf_transfer_ext.testing import check_merge_method

FILES = [path for path in Path(methods.__file__).parent.glob("*.py") if path.stem != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_method_one_file(path):
    method = getattr(import_module(f"hf_transfer_ext.merging.methods.{path.stem}"), path.stem)
    assert MERGE_METHODS[path.stem] is method
    assert "Source: " in method.__doc__
    assert Path(__file__).with_name(f"test_{path.stem}.py").exists()


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_the_contract(name):
    check_merge_method(MERGE_METHODS[name], options=OPTIONS[name])


@pytest.mark.parametrize("name", MERGE_METHODS)
@pytest.mark.parametrize("piece", [7, 64])
def test_the_stream_gives_what_the_method_gives_for_whole_tensors(tmp_path, name, piece, monkeypatch):
    """Pieces, samples that miss, segments and threads make no difference beyond rounding of the statistics."""
    monkeypatch.setattr(stream, "PIECE", piece)
    monkeypatch.setattr(stream, "STORED_PIECE", piece)
    monkeypatch.setattr(stream, "SEGMENT", 2 * piece)
    monkeypatch.setattr(stream, "SAMPLE", 16)
    monkeypatch.setattr(stream, "SAMPLE_RUN", 4)
    method = MERGE_METHODS[name]
    shapes = {
        "model.a.weight": (24, 10),
        "model.b.weight": (33,),
        "model.c.weight": (1, 5),
        "model.d.weight": (40, 12),
    }
    count = min(3, method.count[1] or 3)
    named = {tensor: tensors(3, shape) for tensor, shape in shapes.items()}
    base = write_model(tmp_path / "base", {key: base for key, (base, _) in named.items()})
    tuned = [
        write_model(tmp_path / f"m{i}", {key: models[i] for key, (_, models) in named.items()}) for i in range(count)
    ]
    config = config_of(name, base, tuned) | {"seed": 0}
    merge(config, tmp_path / "one", threads=1)
    merge(config, tmp_path / "three", threads=3)
    results = load(tmp_path / "one")
    for tensor, (base, models) in named.items():
        models = models[:count]
        options = OPTIONS[name] | extra_of(method, models)
        if method.takes_noise:
            options["noise"] = Noise(0, tensor)
        whole = method(base if method.base == "required" else None, models, **options)
        assert torch.allclose(results[tensor], whole, atol=2e-6), tensor
        assert torch.equal(results[tensor], load(tmp_path / "three")[tensor])
