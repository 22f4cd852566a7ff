"""Checkpoints are read in pieces and written in place, agree with the safetensors library, and refuse broken files."""

from __future__ import annotations

import json
import os
import random
import signal
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hf_transfer_ext.weights.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    TensorSpec,
    plan_files,
    plan_shards,
    write_checkpoint,
)
from hf_transfer_ext.weights.dtypes import F32, stored_dtype


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "odd": torch.randn(3).bfloat16(),
        "matrix": torch.randn(5, 7),
        "half": torch.randn(2, 3, 4).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "steps": torch.arange(6),
        "mask": torch.tensor([True, False]),
    }


def broken(folder, header, data=b""):
    folder.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


@pytest.mark.parametrize("limit", [40, 100, 10**9])
def test_what_is_written_is_what_the_library_reads(tmp_path, tensors, limit):
    write_checkpoint(tmp_path, tensors, max_shard_bytes=limit)
    loaded = {}
    for file in tmp_path.glob("*.safetensors"):
        loaded |= load_file(file)
    assert set(loaded) == set(tensors)
    with Checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
            assert torch.equal(checkpoint.read(name), tensor)
    if limit == 10**9:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(tensors)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())


def test_files_of_the_library_are_read(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)


def test_pieces_may_be_written_in_any_order(tmp_path):
    values = torch.arange(10.0)
    with CheckpointWriter(tmp_path, [TensorSpec("x", F32, (10,))]) as writer:
        writer.write("x", 6, values[6:])
        writer.write("x", 0, values[:6])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], values)


def test_tensors_lie_at_multiples_of_their_dtype(tmp_path, tensors):
    write_checkpoint(tmp_path, tensors)
    with Checkpoint(tmp_path) as checkpoint:
        assert all(entry.offset % entry.dtype.itemsize == 0 for entry in checkpoint.entries.values())


def test_a_shard_is_closed_before_it_grows_over_the_limit():
    specs = [TensorSpec(name, F32, (size,)) for name, size in (("a", 2), ("b", 2), ("c", 9), ("d", 1))]
    shards = plan_shards(specs, 16)
    assert [[spec.name for spec in shard] for shard in shards] == [["a", "b"], ["c"], ["d"]]


def test_a_wrong_dtype_or_place_is_refused(tmp_path):
    with CheckpointWriter(tmp_path, [TensorSpec("x", F32, (4,))]) as writer:
        with pytest.raises(ValueError, match="announced as"):
            writer.write("x", 0, torch.zeros(4).half())
        with pytest.raises(ValueError, match="announced as"):
            writer.write("x", 2, torch.zeros(3))


def test_a_full_disk_is_found_first(tmp_path):
    with pytest.raises(OSError, match="free"):
        CheckpointWriter(tmp_path, [TensorSpec("x", F32, (10**15,))])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [40, 10**9])
def test_a_file_is_begun_by_its_header_and_not_by_its_length(tmp_path, tensors, limit):
    specs = [TensorSpec(name, stored_dtype(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    planned = plan_files(specs, max_shard_bytes=limit)
    CheckpointWriter(tmp_path, specs, max_shard_bytes=limit).close()
    assert all(file.is_begun(tmp_path) for file in planned)
    last = tmp_path / planned[-1].name
    for content in (b"\0" * planned[-1].size, last.read_bytes()[:-1], b""):
        last.write_bytes(content)
        assert not planned[-1].is_begun(tmp_path)
        CheckpointWriter(tmp_path, specs, max_shard_bytes=limit, resume=True).close()
        assert planned[-1].is_begun(tmp_path)
    last.unlink()
    assert not planned[-1].is_begun(tmp_path)


def test_what_is_begun_is_kept(tmp_path):
    specs = [TensorSpec("x", F32, (4,))]
    for resume, expected in ((True, 1.0), (False, 0.0)):
        with CheckpointWriter(tmp_path, specs) as writer:
            writer.write("x", 0, torch.ones(4))
        CheckpointWriter(tmp_path, specs, resume=resume).close()
        assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [expected] * 4


@pytest.mark.parametrize("call", ["posix_fallocate", "ftruncate", "pwrite"])
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_leaves_no_file_of_full_length_without_its_header(tmp_path, monkeypatch, call, before):
    specs = [TensorSpec("x", F32, (1000,))]
    planned = plan_files(specs)[0]
    child = os.fork()
    if child == 0:
        real = getattr(os, call)

        def killing(*arguments):
            if not before:
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, call, killing)
        if call == "ftruncate":
            del os.posix_fallocate
        CheckpointWriter(tmp_path, specs)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size < planned.size or planned.is_begun(tmp_path)


@pytest.mark.parametrize(
    "missing",
    ["", "preadv", "preadv pread", "pwrite", "posix_fallocate", "preadv pread pwrite posix_fallocate"],
)
def test_systems_without_some_calls(tmp_path, tensors, monkeypatch, missing):
    for name in missing.split():
        monkeypatch.delattr(os, name)
    write_checkpoint(tmp_path, tensors, max_shard_bytes=100)
    with Checkpoint(tmp_path) as checkpoint:
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor)


class TestBrokenFiles:
    def test_truncated(self, tmp_path, tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(ValueError, match=r"truncated.*ends at byte"):
            Checkpoint(tmp_path)

    def test_pointer_of_git_lfs(self, tmp_path):
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ValueError, match="Git LFS"):
            Checkpoint(tmp_path)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b"not json", "cannot be read"),
            (["a"], "cannot be read"),
            ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "contradicts itself"),
            ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, "contradicts itself"),
            ({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, "Unknown dtype 'F31'"),
            ({"x": {"dtype": "F32", "shape": [1]}}, "cannot be read"),
            ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, "two offsets"),
            ({"x": {"dtype": "F32", "shape": [2], "data_offsets": "08"}}, "lists of integers"),
            ({"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "lists of integers"),
            ({"x": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, "lists of integers"),
            ({"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "cannot be read"),
            ({"__metadata__": {"a": 1}, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "texts"),
            ({"__metadata__": ["a"], "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "texts"),
            ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "leaves a gap after the header"),
            ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes after its last tensor"),
            ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}, "is truncated"),
            ({}, "8 bytes after its last tensor"),
            (b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{}}', "duplicate name 'x'"),
            (b" {}", "does not begin"),
            ('{"x":1}'.encode("utf-16"), "does not begin"),
            (b"{" * 20000, "cannot be read"),
            (b'{"x":' + b"[" * 100000, "cannot be read"),
            (b'{"x":{"shape":[' + b"9" * 5000 + b"]}}", "cannot be read"),
        ],
    )
    def test_header(self, tmp_path, header, message):
        with pytest.raises(ValueError, match=message):
            Checkpoint(broken(tmp_path / "m", header, b"\0" * 8))

    def test_unknown_tensor_gets_a_suggestion(self, tmp_path, tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        with Checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match="Did you mean 'matrix'"):
            checkpoint.read("matrx")


def entry(begin, end, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize("seed", range(60))
def test_headers_are_judged_as_the_library_judges_them(tmp_path, seed):
    """Tensors side by side, with gaps, overlaps and empty ones, in any order, with too many or too few bytes."""
    draw = random.Random(seed)
    header, end = {}, 0
    for i in range(draw.randint(0, 5)):
        begin = max(0, end + draw.choice([0, 0, 0, 0, 0, 1, -1]))
        end = begin + draw.choice([0, 1, 3])
        header[f"x{i}"] = entry(begin, end)
    header = dict(draw.sample(list(header.items()), len(header)))
    if draw.random() < 0.3:
        header["__metadata__"] = draw.choice([{}, None, {"format": "pt"}, {"n": 1}, {"n": None}])
    size = max(0, end + draw.choice([0, 0, 0, 1, -1]))
    folder = broken(tmp_path / "m", header, b"\0" * size)
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as library:
            expected = sorted(library.keys())
    except SafetensorError:
        expected = None
    try:
        with Checkpoint(folder) as checkpoint:
            found = sorted(checkpoint)
    except ValueError:
        found = None
    assert found == expected


class TestIndex:
    def write(self, folder, weight_map):
        save_file({"x": torch.ones(2)}, folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    @pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "sub/../../a.safetensors"])
    def test_out_of_the_folder(self, tmp_path, shard):
        self.write(tmp_path, {"x": shard})
        with pytest.raises(ValueError, match="points outside its folder"):
            Checkpoint(tmp_path)

    def test_missing_shard(self, tmp_path):
        self.write(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
        with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
            Checkpoint(tmp_path)

    def test_missing_tensor(self, tmp_path):
        self.write(tmp_path, {"x": "a.safetensors", "y": "a.safetensors"})
        with pytest.raises(ValueError, match="'y' is not in shard"):
            Checkpoint(tmp_path)

    def test_shards_without_index(self, tmp_path):
        for name in ("a", "b"):
            save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"no model\.safetensors\.index\.json"):
            Checkpoint(tmp_path)

    def test_a_link_of_the_hub_cache_is_followed(self, tmp_path):
        (tmp_path / "blobs").mkdir()
        (tmp_path / "snapshot").mkdir()
        save_file({"x": torch.ones(2)}, tmp_path / "blobs" / "abc")
        (tmp_path / "snapshot" / "a.safetensors").symlink_to("../blobs/abc")
        (tmp_path / "snapshot" / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "a.safetensors"}})
        )
        with Checkpoint(tmp_path / "snapshot") as checkpoint:
            assert torch.equal(checkpoint.read("x"), torch.ones(2))


def test_pickled_weights_need_a_flag(tmp_path):
    torch.save({"x": torch.arange(4.0).reshape(2, 2).T}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--allow-pickle"):
        Checkpoint(tmp_path)
    with Checkpoint(tmp_path, allow_pickle=True) as checkpoint:
        assert torch.equal(checkpoint.read("x"), torch.arange(4.0).reshape(2, 2).T)


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        Checkpoint(tmp_path)


class Runs:
    def __reduce__(self):
        return (print, ("code of the pickle ran",))


@pytest.mark.parametrize(
    "content",
    [{"a": Runs()}, [1], {"a": "b"}, {1: torch.ones(2)}, b"junk"],
    ids=["object", "list", "text", "number", "junk"],
)
def test_a_pickle_with_more_than_tensors_is_refused_in_one_sentence(tmp_path, capsys, content):
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*(weights_only|must hold)") as error:
        Checkpoint(tmp_path, allow_pickle=True)
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)
    assert "code of the pickle ran" not in capsys.readouterr().out


def test_a_pickle_of_the_old_form_is_read(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with Checkpoint(tmp_path, allow_pickle=True) as checkpoint:
        assert torch.equal(checkpoint.read("w"), torch.arange(4.0))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\ufeff"]
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.*cannot be read"):
        Checkpoint(tmp_path)
