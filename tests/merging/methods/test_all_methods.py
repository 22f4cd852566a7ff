"""What holds for every merge method in the registry; a new one joins by itself (and adds a line to `OPTIONS`)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from merging.method_cases import OPTIONS, inputs_of, tensors
from merging.tiny_models import load, write_model

import hf_transfer_ext.merging.methods as methods
from hf_transfer_ext.merging import MERGE_METHODS, merge
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.streaming import stream

FILES = [path for path in Path(methods.__file__).parent.glob("*.py") if path.stem != "__init__"]

#: Methods whose result with one model is that model, with the option that says "in full".
ALONE = {
    "linear": {"weight": 0.7},
    "passthrough": {},
    "multislerp": {"weight": 0.7},
    "karcher": {},
    "task_arithmetic": {"weight": 1},
    "ties": {"weight": 1},
    "dare_linear": {"weight": 1},
    "dare_ties": {"weight": 1},
    "breadcrumbs": {"weight": 1},
    "breadcrumbs_ties": {"weight": 1},
    "della": {"weight": 1},
    "della_linear": {"weight": 1},
    "sce": {},
    "slerp": {"t": 1.0},
    "nearswap": {"t": 1e9},
    "ram": {"epsilon": 0.0},
    "tsv": {},
    "knots": {"weight": 1},
    "wudi": {},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_method_one_file(path):
    method = getattr(import_module(f"hf_transfer_ext.merging.methods.{path.stem}"), path.stem)
    assert MERGE_METHODS[path.stem] is method
    assert "Source: " in method.__doc__
    assert Path(__file__).with_name(f"test_{path.stem}.py").exists()


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_inputs_are_not_changed_and_the_result_is_finite(name):
    method = MERGE_METHODS[name]
    base, models = inputs_of(method)
    copies = [one.clone() for one in (*models, *([base] if base is not None else []))]
    merged = method(base, models, **OPTIONS[name])
    assert merged.dtype == torch.float32 and torch.isfinite(merged).all()
    assert all(
        torch.equal(a, b) for a, b in zip(copies, (*models, *([base] if base is not None else [])), strict=True)
    )
    assert torch.equal(merged, method(base, models, **OPTIONS[name]))


@pytest.mark.parametrize("name", [name for name in MERGE_METHODS if ALONE.get(name) is not None])
def test_a_model_alone_comes_back(name):
    method = MERGE_METHODS[name]
    base, models = tensors(1)
    merged = method(base if method.base == "required" else None, models, **ALONE[name])
    assert torch.allclose(merged, models[0], atol=2e-5)


@pytest.mark.parametrize("name", [name for name in MERGE_METHODS if MERGE_METHODS[name].base == "required"])
def test_models_that_did_not_change_give_the_base(name):
    method = MERGE_METHODS[name]
    base, models = inputs_of(method)
    merged = method(base, [base.clone() for _ in models], **OPTIONS[name])
    assert torch.allclose(merged, base, atol=1e-6)


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
    count, named = len(inputs_of(method)[1]), {}
    for tensor, shape in shapes.items():
        base, models = tensors(3, shape)
        named[tensor] = (base, models[:count])
    config = {"merge_method": name, "models": [], "seed": 0}
    if method.base == "required":
        config["base_model"] = write_model(tmp_path / "base", {key: base for key, (base, _) in named.items()})
    per_model = {key: option for key, option in method.options.items() if option.per_model}
    for i in range(count):
        folder = write_model(tmp_path / f"m{i}", {key: models[i] for key, (_, models) in named.items()})
        own = {}
        for key, option in per_model.items():
            value = OPTIONS[name].get(option.name)
            if value is not None:
                own[key] = value[i] if isinstance(value, list) else value
        config["models"].append({"model": folder, "parameters": own})
    config["parameters"] = {
        key: OPTIONS[name][option.name]
        for key, option in method.options.items()
        if not option.per_model and option.name in OPTIONS[name]
    }
    merge(config, tmp_path / "one", threads=1)
    merge(config, tmp_path / "three", threads=3)
    results = load(tmp_path / "one")
    for tensor, (base, models) in named.items():
        options = dict(OPTIONS[name])
        if method.takes_noise:
            options["noise"] = Noise(0, tensor)
        whole = method(base if method.base == "required" else None, models, **options)
        assert torch.allclose(results[tensor], whole, atol=2e-6), tensor
        assert torch.equal(results[tensor], load(tmp_path / "three")[tensor])
