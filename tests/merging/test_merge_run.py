"""A merge ends with the tensors of its definition, whatever the threads; bad input leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from merging.tiny_models import family, interrupted_at_read, load, names, random_tensors, result_bytes, write_model

from hf_transfer_ext.cli import main
from hf_transfer_ext.files import sha256_of
from hf_transfer_ext.hub import publish
from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.merging import merge, run
from hf_transfer_ext.merging.streaming import stream
from hf_transfer_ext.merging.streaming.stream import FAILURE, JOURNAL


def linear_config(models, **more):
    return {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": i + 1.0}} for i, model in enumerate(models)],
        **more,
    }


@pytest.fixture
def models(tmp_path):
    return family(tmp_path)


def test_linear_is_the_weighted_mean(tmp_path, models):
    _, tuned = models
    report = merge(linear_config(tuned), tmp_path / "out")
    expected = [load(folder) for folder in tuned]
    merged = load(tmp_path / "out")
    assert set(merged) == set(names())
    for name, tensor in merged.items():
        oracle = sum((i + 1) * one[name].double() for i, one in enumerate(expected)) / 6
        assert torch.allclose(tensor.double(), oracle, atol=1e-6)
    assert report.tensors == len(merged)
    assert report.parameters == sum(tensor.numel() for tensor in merged.values())
    assert report.read_bytes == 3 * report.written_bytes == 12 * report.parameters


def test_task_arithmetic_is_the_sum_of_changes(tmp_path, models):
    base, tuned = models
    config = linear_config(tuned, merge_method="task_arithmetic", base_model=base, parameters={"lambda": 0.5})
    merge(config, tmp_path / "out")
    start, others = load(base), [load(folder) for folder in tuned]
    for name, tensor in load(tmp_path / "out").items():
        change = sum((i + 1) * (one[name].double() - start[name].double()) for i, one in enumerate(others))
        assert torch.allclose(tensor.double(), start[name].double() + 0.5 * change, atol=1e-6)


def test_a_model_alone_comes_back(tmp_path, models):
    _, tuned = models
    merge(linear_config(tuned[:1]), tmp_path / "out")
    assert all(torch.equal(tensor, load(tuned[0])[name]) for name, tensor in load(tmp_path / "out").items())


def test_gradients_filters_and_precedence(tmp_path, models):
    base, tuned = models
    config = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [
            {"model": tuned[0], "parameters": {"weight": [0.0, 1.0]}},
            {"model": tuned[1], "parameters": {"weight": [{"filter": "mlp", "value": 2.0}]}},
        ],
        "parameters": {"weight": 0.25},
    }
    merge(config, tmp_path / "out")
    start, one, two = load(base), load(tuned[0]), load(tuned[1])
    for name, tensor in load(tmp_path / "out").items():
        depth = int(name.split(".")[2]) / 2 if name.startswith("model.layers") else 0.0
        second = 2.0 if "mlp" in name else 0.25
        oracle = start[name] + depth * (one[name] - start[name]) + second * (two[name] - start[name])
        assert torch.allclose(tensor, oracle, atol=1e-5), name


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_byte(tmp_path, models, threads, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 64)
    monkeypatch.setattr(stream, "STORED_PIECE", 64)
    monkeypatch.setattr(stream, "SEGMENT", 128)
    base, tuned = models
    config = linear_config(tuned, merge_method="task_arithmetic", base_model=base, out_dtype="bfloat16")
    merge(config, tmp_path / "one", threads=1, max_shard_bytes=4000)
    merge(config, tmp_path / "more", threads=threads, max_shard_bytes=4000)
    one = result_bytes(tmp_path / "one")
    assert one == result_bytes(tmp_path / "more") and len(one) > 5


def test_dtypes(tmp_path):
    _, tuned = family(tmp_path, dtype=torch.bfloat16)
    merge(linear_config(tuned), tmp_path / "same")
    merge(linear_config(tuned, dtype="float16"), tmp_path / "half")
    merge(linear_config(tuned, dtype="float16", out_dtype="float32"), tmp_path / "full")
    assert {tensor.dtype for tensor in load(tmp_path / "same").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load(tmp_path / "half").values()} == {torch.float16}
    assert {tensor.dtype for tensor in load(tmp_path / "full").values()} == {torch.float32}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    full = load(tmp_path / "full")  # the mean was calculated in float32, and is only rounded at the end
    for name, tensor in load(tmp_path / "same").items():
        assert torch.equal(tensor, full[name].bfloat16())


def test_companions_come_from_the_base(tmp_path, models):
    base, tuned = models
    Path(base, "tokenizer.json").write_text("{}")
    Path(tuned[0], "tokenizer.json").write_text("[]")
    merge(linear_config(tuned, base_model=base), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert "merge_method: linear" in (tmp_path / "out" / "mergekit_config.yml").read_text()


def test_layers_are_stacked_with_their_lists(tmp_path):
    one = write_model(tmp_path / "one", random_tensors(1), layer_types=["a0", "a1", "a2"])
    two = write_model(tmp_path / "two", random_tensors(2), layer_types=["b0", "b1", "b2"])
    config = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": one, "layer_range": [0, 2]}]},
            {"sources": [{"model": two, "layer_range": [1, 3]}]},
        ],
    }
    merge(config, tmp_path / "out")
    merged, first, second = load(tmp_path / "out"), load(one), load(two)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["num_hidden_layers"] == 4 and content["layer_types"] == ["a0", "a1", "b1", "b2"]
    assert set(merged) == set(names(4))
    for layer, (source, old) in enumerate([(first, 0), (first, 1), (second, 1), (second, 2)]):
        for name in ("mlp.up_proj.weight", "self_attn.q_proj.bias"):
            assert torch.equal(merged[f"model.layers.{layer}.{name}"], source[f"model.layers.{old}.{name}"])
    assert torch.equal(merged["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], second["lm_head.weight"])


def test_a_tied_head_stays_tied(tmp_path):
    tensors = random_tensors(0)
    head = tensors.pop("lm_head.weight")
    tied = write_model(tmp_path / "tied", tensors, tie_word_embeddings=True)
    copy = tensors["model.embed_tokens.weight"].clone()
    stored = write_model(tmp_path / "stored", {**tensors, "lm_head.weight": copy}, tie_word_embeddings=True)
    merge(linear_config([tied, stored]), tmp_path / "out")
    assert "lm_head.weight" not in load(tmp_path / "out")
    untied = write_model(tmp_path / "untied", {**tensors, "lm_head.weight": head})
    merge(linear_config([untied, tied]), tmp_path / "both")
    oracle = (head + 2 * tensors["model.embed_tokens.weight"]) / 3
    assert torch.allclose(load(tmp_path / "both")["lm_head.weight"], oracle, atol=1e-6)


class TestRefused:
    def refused(self, tmp_path, config, message, error=ValueError, **options):
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(error, match=message):
            merge(config, tmp_path / "out", **options)
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_shape(self, tmp_path, models):
        tensors = load(models[1][0])
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(16, 16)
        other = write_model(tmp_path / "other", tensors)
        message = r"'model.layers.1.mlp.up_proj.weight' has different shapes: .*tuned0 \[24, 16\].*other \[16, 16\]"
        self.refused(tmp_path, linear_config([models[1][0], other]), message)

    def test_vocabulary(self, tmp_path, models):
        tensors = load(models[1][0])
        tensors["model.embed_tokens.weight"] = torch.zeros(41, 16)
        other = write_model(tmp_path / "other", tensors)
        self.refused(tmp_path, linear_config([models[1][0], other]), "tokenizer: {source: union}")

    def test_missing_tensor(self, tmp_path, models):
        tensors = load(models[1][0])
        del tensors["model.layers.1.mlp.up_proj.weight"]
        other = write_model(tmp_path / "other", tensors)
        self.refused(tmp_path, linear_config([models[1][0], other]), "other'.*'model.layers.1.mlp.up_proj.weight'")
        self.refused(tmp_path, linear_config([other, models[1][0]]), "has tensor 'model.layers.1.mlp.up_proj.weight'")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nonfinite(self, tmp_path, models, bad):
        tensors = load(models[1][1])
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
        other = write_model(tmp_path / "other", tensors)
        config = linear_config([models[1][0], other])
        self.refused(tmp_path, config, r"up_proj.weight' of model 2 .*NaN or infinity, first at element 52")
        merge(config, tmp_path / "out", allow_nonfinite=True)
        assert not torch.isfinite(load(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"][3, 4])

    def test_number_of_layers(self, tmp_path, models):
        other = write_model(tmp_path / "other", random_tensors(5, layers=2), num_hidden_layers=2)
        self.refused(tmp_path, linear_config([models[1][0], other]), "different numbers of layers")

    def test_layer_range(self, tmp_path, models):
        sources = [{"model": models[1][0], "layer_range": [2, 4]}]
        config = {"merge_method": "passthrough", "slices": [{"sources": sources}]}
        self.refused(tmp_path, config, "only 3 layers")

    def test_weights_without_a_sum(self, tmp_path, models):
        config = {
            "merge_method": "linear",
            "models": [{"model": m, "parameters": {"weight": w}} for m, w in zip(models[1], (1, -1), strict=False)],
        }
        self.refused(tmp_path, config, "sum to 0")

    def test_missing_weight(self, tmp_path, models):
        config = {"merge_method": "linear", "models": [{"model": models[1][0]}]}
        self.refused(tmp_path, config, "'weight' of model .*tuned0' has no value")

    def test_base_alone_as_model(self, tmp_path, models):
        config = {"merge_method": "task_arithmetic", "base_model": models[0], "models": [{"model": models[0]}]}
        self.refused(tmp_path, config, "base model is listed as a model")
        config["models"] = [{"model": models[0], "parameters": {"weight": 1}}]
        self.refused(tmp_path, config, r"own options \(weight\) have no effect")

    def test_missing_model(self, tmp_path):
        self.refused(tmp_path, linear_config([str(tmp_path / "nowhere")]), "no model folder", FileNotFoundError)

    def test_result_in_place(self, tmp_path, models):
        merge(linear_config(models[1]), tmp_path / "out")
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match="--overwrite"):
            merge(linear_config(models[1][:1]), tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        merge(linear_config(models[1][:1]), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "model.safetensors").read_bytes() != before

    def test_threads(self, tmp_path, models):
        self.refused(tmp_path, linear_config(models[1]), "at least 1", threads=0)

    def test_overflow_of_float16(self, tmp_path, models):
        tensors = {name: tensor * 1e6 for name, tensor in load(models[1][0]).items()}
        other = write_model(tmp_path / "other", tensors)
        self.refused(tmp_path, linear_config([other], dtype="float16"), "does not fit into float16")

    def test_truncated_shard(self, tmp_path, models):
        file = Path(models[1][1], "model.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        self.refused(tmp_path, linear_config(models[1]), "truncated")


def test_an_interrupted_merge_goes_on(tmp_path, models):
    _, tuned = models
    config = linear_config(tuned)
    merge(config, tmp_path / "whole")
    with interrupted_at_read(60), pytest.raises(KeyboardInterrupt):
        merge(config, tmp_path / "out", threads=1)
    partial = list(tmp_path.glob(".out.partial-merge-*"))
    assert len(partial) == 1 and not (tmp_path / "out").exists()
    finished = (partial[0] / f"{JOURNAL}-0").read_text().count("\n")
    assert finished > 5
    (partial[0] / FAILURE).touch()  # as after a kill between a failure and the removal of the folder
    report = merge(config, tmp_path / "out")
    assert report.resumed_tensors == finished
    assert load(tmp_path / "out").keys() == load(tmp_path / "whole").keys()
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert result_bytes(tmp_path / "out").keys() == {"config.json", "mergekit_config.yml", "model.safetensors"}
    assert not list(tmp_path.glob(".out*"))


def test_a_merge_that_was_interrupted_after_its_last_tensor_calculates_nothing_again(tmp_path, models, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_companions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(linear_config(models[1]), tmp_path / "out")
    monkeypatch.undo()
    report = merge(linear_config(models[1]), tmp_path / "out")
    assert report.resumed_tensors == report.tensors
    assert not list((tmp_path / "out").glob(".*")) and not list(tmp_path.glob(".out*"))


def test_what_another_merge_left_is_not_taken_over(tmp_path, models):
    stale = tmp_path / ".out.partial-merge-0123"
    stale.mkdir()
    (stale / f"{JOURNAL}-0").write_text('"lm_head.weight"\n')
    report = merge(linear_config(models[1]), tmp_path / "out")
    assert report.resumed_tensors == 0 and not stale.exists()


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 1000])
def test_the_recorded_digests_are_those_of_the_files(tmp_path, models, monkeypatch, max_shard_bytes):
    """Also of a merge that was interrupted and goes on; the weights are hashed as they are written, and only then."""
    _, tuned = models
    again = []
    monkeypatch.setattr(publish, "sha256_of", lambda path: again.append(path.name) or sha256_of(path))
    config = linear_config(tuned)
    with interrupted_at_read(40), pytest.raises(KeyboardInterrupt):
        merge(config, tmp_path / "out", threads=1, max_shard_bytes=max_shard_bytes)
    assert merge(config, tmp_path / "out", max_shard_bytes=max_shard_bytes).resumed_tensors > 0
    digests = read_record(tmp_path / "out").result
    weights = [path.name for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(weights) > 1 or max_shard_bytes > 1000
    assert digests == {name: sha256_of(tmp_path / "out" / name) for name in digests}
    assert set(weights) <= set(digests) and "config.json" in again and not set(weights) & set(again)


def test_dry_run_writes_nothing(tmp_path, models, capsys):
    (tmp_path / "c.yml").write_text(json.dumps(linear_config(models[1])))
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["merge", str(tmp_path / "c.yml"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == before
    printed = capsys.readouterr().out
    assert "39 tensors" in printed and "a merge takes at least" in printed


def test_the_command_merges_and_tells_bad_input_in_one_line(tmp_path, models, capsys):
    (tmp_path / "c.yml").write_text(json.dumps(linear_config(models[1])))
    assert main(["merge", str(tmp_path / "c.yml"), str(tmp_path / "out"), "--quiet"]) == 0
    assert set(load(tmp_path / "out")) == set(names())
    (tmp_path / "bad.yml").write_text(json.dumps({**linear_config(models[1]), "merge_metod": "ties"}))
    assert main(["merge", str(tmp_path / "bad.yml"), str(tmp_path / "other"), "--quiet"]) == 2
    assert "Did you mean 'merge_method'" in capsys.readouterr().err


def test_a_filter_that_matches_nothing_is_reported(tmp_path, caplog):
    models = [
        {"model": write_model(tmp_path / str(seed), random_tensors(seed)), "parameters": {"weight": weight}}
        for seed, weight in ((1, [{"filter": "mlpp", "value": 0}, {"value": 1}]), (2, 1))
    ]
    report = merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert any("mlpp" in note for note in report.notes) and "mlpp" in caplog.text
