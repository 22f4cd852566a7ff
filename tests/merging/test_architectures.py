"""Each parameter of the inputs is in the result, or is reported as left out, or is an error."""

from __future__ import annotations

import pytest
import torch
from merging.tiny_models import load
from tiny_architectures import ARCHITECTURES, tiny

from hf_transfer_ext.merging import merge
from hf_transfer_ext.weights.architecture import Architecture


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_mean_of_two_models_is_the_mean_of_their_parameters(tmp_path, name):
    one, two = tiny(name, 1), tiny(name, 2)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    models = [{"model": str(tmp_path / folder), "parameters": {"weight": 0.5}} for folder in ("one", "two")]
    report = merge({"merge_method": "linear", "models": models}, tmp_path / "out", threads=1)
    stored = load(tmp_path / "one")
    merged = load(tmp_path / "out")
    unreported = [key for key in stored if key not in merged and not any(key in note for note in report.notes)]
    assert not unreported
    expected = {key: value for key, value in one.state_dict().items()}
    other = two.state_dict()
    architecture = Architecture(tmp_path / "out")
    found = {}
    for loading in architecture.loadings({key: tuple(value.shape) for key, value in merged.items()}):
        found |= architecture.convert(loading, [merged[source] for source in loading.sources])
    shapes = {key: tuple(value.shape) for key, value in stored.items()}
    assert set(found) == {key for loading in architecture.loadings(shapes) for key in loading.parameters}
    for key, value in found.items():
        mean = (expected[key] + other[key]) / 2 if value.dtype.is_floating_point else expected[key]
        assert torch.allclose(value, mean.to(value.dtype), atol=1e-5), key


@pytest.mark.parametrize("lost", ["first", "second"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM"])
def test_a_tensor_that_one_model_lacks_is_an_error(tmp_path, name, lost):
    for folder, seed in (("first", 1), ("second", 2)):
        model = tiny(name, seed)
        state = model.state_dict()
        if folder == lost:
            key = next(key for key in state if ".1." in key and key.endswith("weight"))
            del state[key]
        model.save_pretrained(tmp_path / folder, state_dict=state)
    models = [{"model": str(tmp_path / folder), "parameters": {"weight": 0.5}} for folder in ("first", "second")]
    with pytest.raises(ValueError, match="lacks a tensor"):
        merge({"merge_method": "linear", "models": models}, tmp_path / "out")
