"""A killed merge leaves no output folder; started again, it ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from merging.tiny_models import result_bytes, write_model

from hf_transfer_ext.merging import merge

#: Runs the merge slowly enough for a signal to hit it, and says when it begins.
RUN = """
import sys, time
from hf_transfer_ext.merging import merge
from hf_transfer_ext.merging.streaming import stream
work = stream.Stream._work
def slow(self, task):
    time.sleep(0.004)
    work(self, task)
stream.Stream._work = slow
print("ready", flush=True)
merge(sys.argv[1], sys.argv[2], threads=2)
"""


def config_of(folder: Path):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(3):
        tensors = {f"model.x{j}.weight": torch.randn(64, 50, generator=generator) for j in range(60)}
        paths.append(write_model(folder / f"m{i}", tensors, num_hidden_layers=0, layer_types=[]))
    models = [{"model": path, "parameters": {"weight": 0.5, "density": 0.4}} for path in paths[1:]]
    return {"merge_method": "dare_ties", "base_model": paths[0], "models": models}


def killed_merges(tmp_path, kills, seed):
    config = config_of(tmp_path)
    (tmp_path / "config.yml").write_text(json.dumps(config))
    merge(config, tmp_path / "whole")
    expected = result_bytes(tmp_path / "whole")
    moments = random.Random(seed)
    interrupted = 0
    for number in range(kills):
        out = tmp_path / f"out{number}"
        command = [sys.executable, "-c", RUN, str(tmp_path / "config.yml"), str(out)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0.0, 0.16))
        child.send_signal(signal.SIGKILL)
        if child.wait() != 0 and not out.exists():
            interrupted += 1
        report = merge(str(tmp_path / "config.yml"), out, overwrite=True)
        assert report.resumed_tensors <= 60
        assert result_bytes(out) == expected
        assert not list(tmp_path.glob(f".out{number}*"))
    return interrupted


def test_killed_twice(tmp_path):
    killed_merges(tmp_path, 2, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    assert killed_merges(tmp_path, 20, seed=2) >= 15


def test_two_merges_into_one_folder(tmp_path):
    config = config_of(tmp_path)
    (tmp_path / "config.yml").write_text(json.dumps(config))
    command = [sys.executable, "-c", RUN, str(tmp_path / "config.yml"), str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    while child.poll() is None and not list(tmp_path.glob(".out.partial-merge-*")):
        time.sleep(0.001)
    with pytest.raises(FileExistsError, match="Another run"):
        merge(config, tmp_path / "out")
    assert child.wait() == 0 and (tmp_path / "out" / "model.safetensors").exists()
