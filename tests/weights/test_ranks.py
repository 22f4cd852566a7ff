"""Two processes on one merge: the bytes of one process, one published folder, errors that all of them raise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import PartialState
from merging.method_cases import config_of
from merging.tiny_models import family, load, random_tensors, result_bytes, write_model
from processes import on_two_ranks

from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.planning.layout import TensorJob
from hf_transfer_ext.merging.streaming import stream
from hf_transfer_ext.merging.streaming.stream import JOURNAL
from hf_transfer_ext.weights.checkpoints import Checkpoint
from hf_transfer_ext.weights.ranks import Ranks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties"])
def test_the_bytes_of_one_process(tmp_path, name):
    config = config_of(name, *family(tmp_path))
    merge(config, tmp_path / "one", max_shard_bytes=4000)

    def shared(rank):
        report = merge(config, tmp_path / "two", max_shard_bytes=4000)
        return report.tensors, (tmp_path / "two/config.json").exists()

    assert on_two_ranks(shared, tmp_path) == [(39, True)] * 2
    assert result_bytes(tmp_path / "two") == result_bytes(tmp_path / "one")
    assert not list(tmp_path.glob(".two*"))


def test_both_work_and_an_interrupted_merge_goes_on_in_one_process(tmp_path, monkeypatch):
    config = config_of("dare_ties", *family(tmp_path))
    merge(config, tmp_path / "one")

    def interrupted(rank):
        finish, count = stream.Journal.finish, 0

        def stop_later(self, name):
            nonlocal count
            finish(self, name)
            count += 1
            if count >= 5:
                raise KeyboardInterrupt

        monkeypatch.setattr(stream.Journal, "finish", stop_later)
        with pytest.raises(KeyboardInterrupt):
            merge(config, tmp_path / "two", threads=1)

    on_two_ranks(interrupted, tmp_path)
    (partial,) = tmp_path.glob(".two.partial-merge-*")
    names = [(partial / f"{JOURNAL}-{rank}").read_text().split("\n")[:-1] for rank in range(2)]
    assert min(map(len, names)) >= 5 and not set(names[0]) & set(names[1])
    with open(partial / f"{JOURNAL}-1", "a") as journal:
        journal.write('"model.no')  # as a kill leaves it
    assert merge(config, tmp_path / "two").resumed_tensors == len(names[0]) + len(names[1])
    assert result_bytes(tmp_path / "two") == result_bytes(tmp_path / "one")


def test_bad_input_is_told_by_both(tmp_path):
    base, tuned = family(tmp_path)
    tensors = random_tensors(7)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("nan")
    config = config_of("linear", base, [*tuned[:2], write_model(tmp_path / "bad", tensors)])

    def refused(rank):
        with pytest.raises(ValueError, match=r"up_proj.*contains NaN or infinity, first at element 35"):
            merge(config, tmp_path / "out")
        with pytest.raises(ValueError, match="Did you mean 'merge_method'"):
            merge({**config, "merge_metod": "linear"}, tmp_path / "out")

    on_two_ranks(refused, tmp_path)
    assert not list(tmp_path.glob("*out*"))


def test_a_file_that_only_one_cannot_read(tmp_path, monkeypatch):
    config = config_of("linear", *family(tmp_path))

    def refused(rank):
        if rank == 1:

            def broken(self, entry, start, view):
                raise OSError("the disk is broken")

            monkeypatch.setattr(Checkpoint, "read_bytes", broken)
        with pytest.raises(OSError, match="the disk is broken"):
            merge(config, tmp_path / "out")

    on_two_ranks(refused, tmp_path)
    assert not list(tmp_path.glob("*out*"))


def test_one_of_two_alone(tmp_path):
    config = config_of("linear", *family(tmp_path))
    merge(config, tmp_path / "one")

    def first_only(rank):
        PartialState()
        if rank == 0:
            merge(config, tmp_path / "two", alone=True)

    on_two_ranks(first_only, tmp_path)
    assert result_bytes(tmp_path / "two") == result_bytes(tmp_path / "one")


def test_shares_are_even_and_whole():
    jobs = [Mock(spec=TensorJob, input_bytes=size) for size in (9, 1, 5, 5, 3, 3, 2)]
    shares = [Ranks(rank, 3).share_of(jobs) for rank in range(3)]
    assert sorted(id(job) for share in shares for job in share) == sorted(map(id, jobs))
    assert [sum(job.input_bytes for job in share) for share in shares] == [9, 10, 9]


@pytest.mark.slow
def test_accelerate_launch(tmp_path):
    config = config_of("ties", *family(tmp_path))
    merge(config, tmp_path / "one")
    (tmp_path / "merge.yml").write_text(json.dumps(config))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    recipe = [str(ROOT / "recipes/merge.py"), "--merge_config", str(tmp_path / "merge.yml")]
    command = [*launch, "--main_process_port", "0", *recipe, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("39 tensors") == 1
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
