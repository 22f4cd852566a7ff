"""The number of processes that a launcher was asked for is compared with the number that came."""

import os

import pytest
import torch

from hf_transfer_ext import launch
from hf_transfer_ext.settings import run_program


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*launch._SIZES, "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever a test makes of it
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("words, asked", [
    (["accelerate", "launch", "--cpu", "--num_processes", "2", "x.py"], 2),
    (["accelerate", "launch", "--cpu", "--num-processes=3", "x.py"], 3),
    (["accelerate", "launch", "--config_file", "two.yaml", "x.py"], 2),
])  # fmt: skip
def test_one_process_in_place_of_several_is_refused(environment, monkeypatch, capsys, words, asked):
    # What `accelerate launch --cpu --num_processes 2` leaves in the environment of the one process that it starts.
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
    environment.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("psutil.Process.cmdline", lambda self: words)
    assert launch.asked_processes() == asked
    with pytest.raises(ValueError, match=f"asked for {asked} processes, but 1 came.*--num_processes {asked} "):
        launch.require_processes(1)
    launch.require_processes(asked)
    ran = []
    assert run_program("distill", ran.append, []) == 2 and not ran
    assert "asked for" in capsys.readouterr().err


def test_one_process_that_was_asked_for_is_none_too_few(environment, monkeypatch):
    launch.require_processes(1)  # no launcher
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launch.require_processes(1)  # accelerate launch --num_processes 1
    environment.setenv("MASTER_ADDR", "127.0.0.1")  # a cluster sets it for every job
    monkeypatch.setattr(
        "psutil.Process.cmdline", lambda self: ["accelerate", "launch", "--num_processes", "1", "x.py"]
    )
    launch.require_processes(1)


def test_processes_without_a_gpu_are_made_to_find_each_other(environment, monkeypatch):
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="asked for 2 processes, but 1 came"):
        launch.require_processes(1)  # what a trainer sees where they did not
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    launch.prepare_processes()
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    launch.prepare_processes()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
