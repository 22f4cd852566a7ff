"""The steps that a GPU does in its own way, run on the CPU: they give what numpy gives."""

from __future__ import annotations

import pytest
import torch
from merging.method_cases import config_of
from merging.tiny_models import family, load

from hf_transfer_ext.merging import MERGE_METHODS, merge
from hf_transfer_ext.merging.arithmetic import kernels, noise, selection, trimming
from hf_transfer_ext.merging.arithmetic.noise import Noise
from hf_transfer_ext.merging.streaming import stream
from hf_transfer_ext.weights import opened as inputs
from hf_transfer_ext.weights.devices import resolve_device


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (inputs, noise, selection, trimming):
        monkeypatch.setattr(module, "on_host", lambda tensor: False)
    monkeypatch.setattr(kernels, "LIBRARY", None)


@pytest.mark.parametrize("name", MERGE_METHODS)
def test_every_method(tmp_path, name, monkeypatch, request):
    monkeypatch.setattr(kernels, "LIBRARY", None)
    monkeypatch.setattr(stream, "PIECE", 96)
    monkeypatch.setattr(stream, "STORED_PIECE", 96)
    monkeypatch.setattr(stream, "SAMPLE", 64)
    monkeypatch.setattr(stream, "SAMPLE_RUN", 4)
    config = config_of(name, *family(tmp_path))
    merge(config, tmp_path / "numpy")
    request.getfixturevalue("as_on_a_gpu")
    merge(config, tmp_path / "torch")
    expected = load(tmp_path / "numpy")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load(tmp_path / "torch").items())


@pytest.mark.parametrize("start", [0, 12345, (1 << 32) - 7])
def test_random_words(start):
    words = Noise(4, "x", start).words(2, 1000)
    assert Noise(4, "x", start).words_on(torch.device("cpu"), 2, 1000).tolist() == words.tolist()


@pytest.mark.parametrize("columns", [1, 2, 1000, 9000])
def test_order_of_magnitudes(columns):
    change = torch.randn(3, columns)
    change[0, : columns // 2] = change[0, 0]
    expected = trimming._order_of_magnitudes(change)
    assert trimming._order_on_device(change).tolist() == expected.tolist()


def test_devices_by_name():
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == "cpu"
    assert resolve_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cpu:x"])
def test_devices_that_merging_does_not_know(name):
    with pytest.raises(ValueError, match="must be cpu, cuda, cuda:N or auto"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda:99"] if torch.cuda.is_available() else ["cuda", "cuda:99"])
def test_a_gpu_that_is_not_there_leaves_nothing_behind(tmp_path, name):
    base, tuned = family(tmp_path)
    with pytest.raises(ValueError, match="Choose cpu or auto"):
        merge(config_of("ties", base, tuned), tmp_path / "out", device=name)
    assert not list(tmp_path.glob("*out*"))
