"""What a killed run left is used by the same work only; inputs that change and files that are broken are noticed."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from merging.tiny_models import family, interrupted_at_read, load, write_model
from safetensors.torch import save_file

from hf_transfer_ext import files
from hf_transfer_ext.adapters.extract import extract_lora
from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.streaming import stream
from hf_transfer_ext.weights import resume
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.resume import resumable_folder, work_of


def content_of(folder):
    """Name -> content, without the card and the record, which hold times."""
    names = ("README.md", "hf_transfer_ext.json")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in names}


def beside(folder):
    return sorted(path.name for path in folder.parent.iterdir() if folder.name in path.name and path != folder)


@pytest.fixture
def models(tmp_path):
    base, tuned = family(tmp_path, 2)
    return base, tuned


@pytest.fixture
def config(models):
    base, tuned = models
    entries = [{"model": path, "parameters": {"weight": 0.5}} for path in tuned]
    return {"merge_method": "task_arithmetic", "base_model": base, "models": entries}


@pytest.fixture
def adapter(tmp_path, models):
    folder = tmp_path / "adapter"
    folder.mkdir()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, 16), f"{prefix}.lora_B.weight": torch.ones(16, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    set_alpha(folder, 1)
    return folder


def set_alpha(folder, alpha):
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def interrupted(config, out, **options):
    with interrupted_at_read(60), pytest.raises(KeyboardInterrupt):
        merge(config, out, threads=1, **options)
    assert stream.finished_tensors(next(out.parent.glob(f".{out.name}.partial-merge-*")))


class TestOtherWork:
    def test_the_same_work_goes_on(self, tmp_path, config):
        interrupted(config, tmp_path / "out")
        assert merge(config, tmp_path / "out").resumed_tensors > 0
        merge(config, tmp_path / "undisturbed")
        assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")
        assert beside(tmp_path / "out") == []

    def starts_anew(self, tmp_path, config, **options):
        report = merge(config, tmp_path / "out", **options)
        merge(config, tmp_path / "undisturbed", **options)
        assert report.resumed_tensors == 0
        assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")
        assert beside(tmp_path / "out") == []

    def test_after_an_edit_of_an_adapters_config(self, tmp_path, config, models, adapter):
        config["models"][0]["model"] = f"{models[0]}+{adapter}"
        interrupted(config, tmp_path / "out")
        set_alpha(adapter, 800)
        self.starts_anew(tmp_path, config)

    @pytest.mark.parametrize("which", ["base", "tuned1"])
    def test_after_an_edit_of_a_models_config(self, tmp_path, config, which):
        interrupted(config, tmp_path / "out")
        path = tmp_path / which / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))
        self.starts_anew(tmp_path, config)

    def test_with_another_flag(self, tmp_path, config):
        interrupted(config, tmp_path / "out")
        self.starts_anew(tmp_path, config, allow_nonfinite=True)

    def test_by_other_code(self, tmp_path, config, monkeypatch):
        interrupted(config, tmp_path / "out")
        monkeypatch.setattr(resume, "_code_version", lambda: "next")
        self.starts_anew(tmp_path, config)

    def test_the_code_is_that_of_the_arithmetic(self, tmp_path, monkeypatch):
        package = Path(resume.hf_transfer_ext.__file__).parent
        copy = tmp_path / "hf_transfer_ext"
        shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "evals", "losses", "trainers"))
        versions = set()
        edited = ("merging/methods/linear.py", "merging/arithmetic/kernels.c", "weights/lora.py",
                  "edits/methods/wanda.py", "__init__.py")  # fmt: skip
        for name in (None, *edited):
            if name is not None:
                with open(copy / name, "a") as file:
                    file.write("\n")
            monkeypatch.setattr(resume.hf_transfer_ext, "__file__", str(copy / "__init__.py"))
            versions.add(resume._code_version.__wrapped__())
        assert len(versions) == len(edited)  # __init__.py calculates nothing

    def test_touching_a_small_file_changes_nothing(self, tmp_path, config, models):
        interrupted(config, tmp_path / "out")
        os.utime(Path(models[0]) / "config.json")
        assert merge(config, tmp_path / "out").resumed_tensors > 0

    @pytest.mark.parametrize("damage", ["no header", "shorter", "missing"])
    def test_after_damage_to_a_file_its_journal_does_not_count(self, tmp_path, config, damage):
        interrupted(config, tmp_path / "out", max_shard_bytes=4000)
        partial = next(tmp_path.glob(".out.partial-merge-*"))
        file = min(partial.glob("*.safetensors"))
        if damage == "missing":
            file.unlink()
        else:
            size = file.stat().st_size - (damage == "shorter")
            file.write_bytes(b"\0" * size)
        self.starts_anew(tmp_path, config, max_shard_bytes=4000)

    def test_an_old_result_in_the_place_of_the_partial_one_is_not_resumed(self, tmp_path, config, monkeypatch):
        """A kill after the exchange and before the old result is removed."""
        merge({**config, "models": config["models"][:1]}, tmp_path / "out")
        (tmp_path / "out" / "vocab.txt").write_text("of the old result")
        with monkeypatch.context() as patch:
            patch.setattr(files.shutil, "rmtree", lambda *arguments, **options: None)
            merge(config, tmp_path / "out", overwrite=True)
        partial = next(tmp_path.glob(".out.partial-merge-*"))
        assert (partial / "vocab.txt").exists()
        shutil.rmtree(tmp_path / "out")
        assert merge(config, tmp_path / "out").resumed_tensors == 0
        assert not (tmp_path / "out" / "vocab.txt").exists() and beside(tmp_path / "out") == []


def change_at(monkeypatch, number, change):
    """Call `change` when the `number`th piece of work begins."""
    work, count = stream.Stream._work, 0

    def working(self, task):
        nonlocal count
        count += 1
        if count == number:
            change()
        work(self, task)

    monkeypatch.setattr(stream.Stream, "_work", working)


class TestChangedInputs:
    @pytest.mark.parametrize("how", ["rewritten", "replaced", "deleted", "config", "adapter config"])
    def test_nothing_is_published(self, tmp_path, config, models, adapter, monkeypatch, how):
        config["models"][0]["model"] = f"{models[0]}+{adapter}"
        file = Path(models[1][1]) / "model.safetensors"

        def change():
            if how == "deleted":
                file.unlink()
            elif how == "rewritten":
                file.write_bytes(file.read_bytes()[:-4] + b"abcd")
            elif how == "replaced":
                write_model(tmp_path / "other", {"x": torch.ones(3)})
                os.replace(tmp_path / "other" / "model.safetensors", file)
            elif how == "config":
                (file.parent / "config.json").write_text("{}")
            else:
                set_alpha(adapter, 3)

        change_at(monkeypatch, 10, change)
        with pytest.raises((OSError, ValueError), match="was deleted" if how == "deleted" else "changed|ended"):
            merge(config, tmp_path / "out", threads=1)
        assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []

    def test_a_large_file_is_known_by_its_time(self, tmp_path, config, models, monkeypatch):
        monkeypatch.setattr(files, "SMALL_FILE", 100)
        change_at(monkeypatch, 10, lambda: os.utime(Path(models[0]) / "model.safetensors"))
        with pytest.raises(OSError, match="was changed while it was read"):
            merge(config, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_extraction_notices_too(self, tmp_path, models, monkeypatch):
        read, count = Checkpoint.read_bytes, 0

        def reading(self, entry, start, view):
            nonlocal count
            count += 1
            if count == 20:
                (Path(models[0]) / "config.json").write_text("{}")
            read(self, entry, start, view)

        monkeypatch.setattr(Checkpoint, "read_bytes", reading)
        with pytest.raises(OSError, match="was changed"):
            extract_lora(models[0], models[1][0], tmp_path / "out", rank=2)
        assert not (tmp_path / "out").exists() and beside(tmp_path / "out") == []


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\x02" + b"\0" * 7 + b"{}abc"])
def test_a_broken_file_is_not_published(tmp_path, content):
    with (
        pytest.raises(OSError, match="not written correctly"),
        resumable_folder(tmp_path / "out", work_of({}, []), overwrite=False) as folder,
    ):
        (folder / "model.safetensors").write_bytes(content)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_checked_before_and_after_the_work(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(FileExistsError, match=r"notes\.txt.*The finished result is in"),
        resumable_folder(out, work_of({}, []), overwrite=True) as folder,
    ):
        (folder / "config.json").write_text("{}")
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    (rescued,) = tmp_path.glob("out.unpublished-*")
    assert content_of(rescued) == {"config.json": b"{}"} and content_of(out) == {"notes.txt": b"mine"}
    with pytest.raises(FileExistsError, match=r"notes\.txt"), resumable_folder(out, work_of({}, []), overwrite=True):
        pytest.fail("no work")


@pytest.mark.parametrize("into", ["base", ".", "tuned0"])
def test_a_merge_into_its_inputs_is_refused_before_work(tmp_path, config, into, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(stream.Stream, "run", lambda self, jobs: pytest.fail("worked"))
    for overwrite in (False, True):
        with pytest.raises((ValueError, FileExistsError), match=r"holds the input|a result"):
            merge(config, tmp_path / into, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_the_calls_that_only_some_systems_have(tmp_path, config, monkeypatch):
    merge(config, tmp_path / "undisturbed")
    for name in ("preadv", "pread", "pwrite", "posix_fallocate", "sched_getaffinity"):
        monkeypatch.delattr(os, name)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    interrupted(config, tmp_path / "out")
    assert merge(config, tmp_path / "out").resumed_tensors > 0
    merge(config, tmp_path / "out", overwrite=True, threads=3)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")
    assert set(load(tmp_path / "out"))
