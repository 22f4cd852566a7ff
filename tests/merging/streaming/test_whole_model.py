"""Trimming over the whole model: the thresholds of all changes laid end to end, by any sample and threads."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import elected
from merging.tiny_models import family, load, random_tensors, write_model
from processes import on_two_ranks

from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.streaming import stream, whole_model

WEIGHTS, DENSITIES = [0.5, 0.3, 0.7], [0.2, 0.5, 0.05]


def config_of(base, tuned, densities=DENSITIES, **options):
    models = [
        {"model": path, "parameters": {"weight": weight, "density": density}}
        for path, weight, density in zip(tuned, WEIGHTS, densities, strict=True)
    ]
    parameters = {"trim_over_model": True, **options}
    return {"merge_method": "ties", "base_model": base, "models": models, "parameters": parameters}


def oracle(base, tuned, densities):
    """The definition in float64: sort all changes of a model at once, keep the largest, elect."""
    start, others = load(base), [load(path) for path in tuned]
    kept = []
    for tensors, density in zip(others, densities, strict=True):
        changes = {name: tensors[name].double() - start[name].double() for name in start}
        flat = torch.cat([change.reshape(-1) for change in changes.values()]).abs().sort().values
        count = int(density * len(flat))
        limit = float(flat[len(flat) - count]) if count else float("inf")
        kept.append({name: change * (change.abs() >= limit) for name, change in changes.items()})
    return {name: elected(start[name], [one[name] for one in kept], WEIGHTS, True) for name in start}


def uneven(folder):
    """Fine-tunes whose changes are of other sizes in every tensor, so that trimming by tensor keeps other elements."""
    base = random_tensors(0)
    tuned = []
    for i in range(3):
        change = random_tensors(i + 1)
        tensors = {name: base[name] + 0.1 * change[name] / (j + 1) for j, name in enumerate(base)}
        tuned.append(write_model(folder / f"tuned{i}", tensors))
    return write_model(folder / "base", base), tuned


@pytest.mark.parametrize("densities", [DENSITIES, [1.0, 0.0, 0.001]])
@pytest.mark.parametrize("sampled", [1 << 20, 300])
@pytest.mark.parametrize("bins", [1 << 20, 1 << 4])
def test_definition(tmp_path, densities, sampled, bins, monkeypatch):
    monkeypatch.setattr(whole_model, "SAMPLED", sampled)
    monkeypatch.setattr(whole_model, "BINS", bins)
    monkeypatch.setattr(whole_model, "SEGMENT", 128)
    monkeypatch.setattr(stream, "PIECE", 64)
    monkeypatch.setattr(stream, "STORED_PIECE", 64)
    monkeypatch.setattr(stream, "SAMPLE_RUN", 4)
    base, tuned = uneven(tmp_path)
    merge(config_of(base, tuned, densities), tmp_path / "out")
    expected = oracle(base, tuned, densities)
    for name, tensor in load(tmp_path / "out").items():
        assert (tensor.double() - expected[name]).abs().max() < 2e-6, name


def test_it_is_another_merge_than_by_tensor(tmp_path):
    base, tuned = uneven(tmp_path)
    merge(config_of(base, tuned), tmp_path / "model")
    merge(config_of(base, tuned, trim_over_model=False), tmp_path / "tensor")
    one, other = load(tmp_path / "model"), load(tmp_path / "tensor")
    last = list(random_tensors(0))[-1]  # its changes are the smallest
    start = load(base)[last]
    assert 2 * int((one[last] != start).sum()) < int((other[last] != start).sum())


def test_many_elements_tie(tmp_path):
    base, tuned = family(tmp_path, dtype=torch.bfloat16)
    config = config_of(base, tuned) | {"out_dtype": "float32"}
    merge(config, tmp_path / "out")
    expected = oracle(base, tuned, DENSITIES)
    for name, tensor in load(tmp_path / "out").items():
        assert (tensor.double() - expected[name]).abs().max() < 2e-6, name


def test_a_sample_that_misleads(tmp_path, monkeypatch):
    base, tuned = uneven(tmp_path)
    merge(config_of(base, tuned), tmp_path / "one")

    def misled(self, sample, rank):
        return whole_model._Window(rank, 5, 9)

    monkeypatch.setattr(whole_model._Search, "_first_window", misled)
    merge(config_of(base, tuned), tmp_path / "two")
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_two_processes_and_any_number_of_threads(tmp_path):
    base, tuned = uneven(tmp_path)
    merge(config_of(base, tuned), tmp_path / "one", threads=1)
    merge(config_of(base, tuned), tmp_path / "three", threads=3)
    on_two_ranks(lambda rank: merge(config_of(base, tuned), tmp_path / "two").tensors, tmp_path)
    expected = (tmp_path / "one/model.safetensors").read_bytes()
    assert (tmp_path / "three/model.safetensors").read_bytes() == expected
    assert (tmp_path / "two/model.safetensors").read_bytes() == expected


def test_a_lora_of_the_merge_has_the_same_thresholds(tmp_path):
    base, tuned = uneven(tmp_path)
    merge(config_of(base, tuned), tmp_path / "whole")
    merge(config_of(base, tuned), tmp_path / "adapter", lora_rank=16)
    adapted = {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'adapter'}"}]}
    merge(adapted, tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(load(tmp_path / "out")[name], load(tmp_path / "whole")[name], atol=1e-5)


def test_densities_that_differ_between_tensors_are_refused(tmp_path):
    base, tuned = family(tmp_path)
    config = config_of(base, tuned, [0.2, 0.5, [0.1, 0.9]])
    with pytest.raises(ValueError, match="one number per model"):
        merge(config, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
