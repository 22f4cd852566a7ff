"""Digests of files that others are still writing."""

from __future__ import annotations

import pytest
import torch

from hf_transfer_ext.files import sha256_of
from hf_transfer_ext.merging.streaming import digests
from hf_transfer_ext.merging.streaming.digests import DigestsInBackground
from hf_transfer_ext.weights.checkpoints import CheckpointWriter, TensorSpec, plan_files
from hf_transfer_ext.weights.dtypes import BF16, F32

SPECS = [
    TensorSpec("a", BF16, (7, 3)),
    TensorSpec("b", F32, (50,)),
    TensorSpec("c", F32, (0,)),
    TensorSpec("d", F32, ()),
]


@pytest.mark.parametrize("order", ["abcd", "dcba", "bdac"])
@pytest.mark.parametrize("max_shard_bytes", [1, 1 << 20])
@pytest.mark.parametrize("earlier", ["", "ad"])
def test_digests_are_those_of_the_finished_files(tmp_path, monkeypatch, order, max_shard_bytes, earlier):
    monkeypatch.setattr(digests, "STEP", 16)
    files = plan_files(SPECS, max_shard_bytes=max_shard_bytes)
    named = {spec.name: torch.randn(spec.shape, dtype=spec.dtype.torch) for spec in SPECS}
    with CheckpointWriter(tmp_path, SPECS, max_shard_bytes=max_shard_bytes) as writer:
        for name in earlier:
            writer.write(name, 0, named[name].reshape(-1))
        with DigestsInBackground(tmp_path, files, earlier) as hashed:
            for name in order:
                if name not in earlier:
                    writer.write(name, 0, named[name].reshape(-1))
                    hashed.finish(name)
            found = hashed.result()
    assert found == {file.name: sha256_of(tmp_path / file.name) for file in files}


def test_an_error_ends_the_thread(tmp_path):
    with CheckpointWriter(tmp_path, SPECS), pytest.raises(ValueError, match="a tensor failed"):
        with DigestsInBackground(tmp_path, plan_files(SPECS)) as hashed:
            raise ValueError("a tensor failed")
    with pytest.raises(InterruptedError):
        hashed.result()


def test_a_truncated_file_is_an_error(tmp_path):
    files = plan_files(SPECS)
    CheckpointWriter(tmp_path, SPECS).close()
    with open(tmp_path / files[0].name, "r+b") as file:
        file.truncate(files[0].size - 1)
    with DigestsInBackground(tmp_path, files, "abcd") as hashed, pytest.raises(OSError, match="ended in the middle"):
        hashed.result()
