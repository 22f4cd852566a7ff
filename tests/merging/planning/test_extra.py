"""Extra tensors are read beside the weights from the files that the configuration names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merging.method_cases import config_of, extra_of
from merging.tiny_models import family, load, names
from safetensors.torch import load_file, save_file

from hf_transfer_ext.merging import MERGE_METHODS, merge
from hf_transfer_ext.merging.streaming import stream


@pytest.fixture
def config(tmp_path):
    return config_of("fisher", *family(tmp_path))


def rewrite(config, number, change):
    """Change the extra tensors of a model."""
    file = config["models"][number]["tensors"]["fisher"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("piece", [64, 1 << 18])
def test_pieces_of_extra_tensors_belong_to_those_of_the_weights(tmp_path, config, piece, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", piece)
    report = merge(config, tmp_path / "out", threads=2)
    models = [load(one["model"]) for one in config["models"]]
    extra = [load_file(one["tensors"]["fisher"]) for one in config["models"]]
    for name, merged in load(tmp_path / "out").items():
        precisions = [w * one[name].double() for w, one in zip((0.5, 0.3, 0.7), extra, strict=True)]
        oracle = sum(p * one[name].double() for p, one in zip(precisions, models, strict=True)) / sum(precisions)
        assert torch.allclose(merged.double(), oracle, atol=1e-6), name
    assert report.read_bytes == 2 * 3 * report.written_bytes


def test_a_folder_with_an_index_and_other_layers(tmp_path, config):
    """Slices read the extra tensors of the layers that they take."""
    folder = tmp_path / "diagonals"
    folder.mkdir()
    tensors = load_file(config["models"][0]["tensors"]["fisher"])
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    for i, half in enumerate(halves):
        save_file(half, folder / f"part{i}.safetensors")
    weight_map = {name: f"part{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = {"model": config["models"][0]["model"], "tensors": {"fisher": str(folder)}, "layer_range": [0, 2]}
    other = {**config["models"][1], "layer_range": [1, 3], "parameters": {}}
    merge(
        {"merge_method": "fisher", "slices": [{"sources": [source, other]}]} | {"parameters": {"weight": 1}},
        tmp_path / "out",
    )
    one, two = load(source["model"]), load(other["model"])
    fisher_of_two = load_file(other["tensors"]["fisher"])
    for rest in ("mlp.up_proj.weight", "self_attn.q_proj.bias"):
        first, second = f"model.layers.1.{rest}", f"model.layers.2.{rest}"
        expected = MERGE_METHODS["fisher"](
            None, [one[first], two[second]], weight=1, fisher=[tensors[first], fisher_of_two[second]]
        )
        assert torch.equal(load(tmp_path / "out")[first], expected)


def test_optional_ones_may_be_missing_for_all_models(tmp_path):
    config = config_of("regmean", *family(tmp_path))
    merge(config, tmp_path / "out")
    models = [load(one["model"]) for one in config["models"]]
    gram = [load_file(one["tensors"]["gram"]) for one in config["models"]]
    assert "model.norm.weight" not in gram[0]
    for name, merged in load(tmp_path / "out").items():
        extra = {"gram": [one[name] for one in gram]} if name in gram[0] else {}
        whole = MERGE_METHODS["regmean"](None, [one[name] for one in models], weight=[0.5, 0.3, 0.7], **extra)
        assert torch.allclose(merged, whole, atol=1e-6), name


def test_a_changed_file_starts_the_merge_anew(tmp_path, config):
    merge(config, tmp_path / "out")
    rewrite(config, 0, lambda tensors: tensors.update({"model.norm.weight": torch.full((16,), 50.0)}))
    merge(config, tmp_path / "again")
    assert not torch.equal(load(tmp_path / "out")["model.norm.weight"], load(tmp_path / "again")["model.norm.weight"])


def test_local_paths_stay_out_of_the_result(tmp_path, config):
    merge(config, tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out" / "mergekit_config.yml").read_text()


class TestRefused:
    def refused(self, tmp_path, config, message, error=ValueError):
        with pytest.raises(error, match=message):
            merge(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_missing_tensor(self, tmp_path, config):
        rewrite(config, 1, lambda tensors: tensors.pop("model.norm.weight"))
        self.refused(
            tmp_path, config, r"tuned1' has no 'fisher' tensor for 'model.norm.weight' in .*fisher.safetensors"
        )

    def test_optional_ones_of_some_models_only(self, tmp_path):
        config = config_of("regmean", *family(tmp_path))
        file = Path(config["models"][2]["tensors"]["gram"])
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file)
        self.refused(tmp_path, config, r"tuned2' has no 'gram' tensor for 'model.layers.1.mlp.up_proj.weight'")

    def test_shape(self, tmp_path, config):
        rewrite(config, 1, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
        self.refused(tmp_path, config, r"'fisher' tensor of model .*tuned1' .*needs shape \[16\].* got \[3\]")

    def test_nan(self, tmp_path, config):
        rewrite(config, 1, lambda tensors: tensors.update({"model.norm.weight": torch.full((16,), float("nan"))}))
        self.refused(tmp_path, config, r"'model.norm.weight' \(fisher\) of model 2 .*NaN or infinity")

    def test_no_file(self, tmp_path, config):
        config["models"][0]["tensors"]["fisher"] = str(tmp_path / "nowhere")
        self.refused(tmp_path, config, "folder or a .safetensors file; there is none at", FileNotFoundError)

    def test_not_named(self, tmp_path, config):
        del config["models"][1]["tensors"]
        self.refused(
            tmp_path, config, r"`models\[1\]\.tensors\.fisher` has to be the path .*got None.*'fisher' tensor"
        )

    def test_key(self, tmp_path, config):
        config["models"][1]["tensors"] = {"fishr": "x"}
        self.refused(tmp_path, config, "Did you mean 'fisher'")

    def test_methods_that_read_none(self, tmp_path, config):
        config["merge_method"] = "linear"
        self.refused(tmp_path, config, r"`models\[0\]\.tensors` has no effect: merge method 'linear' reads no extra")

    def test_rearranged_vocabulary(self, tmp_path, config):
        self.refused(tmp_path, config | {"tokenizer_source": "union"}, "`tokenizer` rearranges these")


def test_the_cases_cover_all_tensors(config):
    assert set(load_file(config["models"][0]["tensors"]["fisher"])) == set(names())
    assert extra_of(MERGE_METHODS["linear"], []) == {}
