"""The recipes through the real launcher: two processes, and Ctrl-C in the middle of training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.models.loading import load_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "distill.py")


def arguments(folder, **more):
    tiny_llama(1).save_pretrained(folder / "teacher")
    byte_tokenizer().save_pretrained(folder / "teacher")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"number {i} is followed by {i + 1}"}) + "\n" for i in range(64)))
    options = {
        "output_dir": folder / "out", "teacher": folder / "teacher", "dataset": data, "test_split": "train[:4]",
        "student_layers": 1, "max_length": 64, "per_device_train_batch_size": 2, "bf16": "false", "use_cpu": "true",
        "gradient_checkpointing": "false", "report_to": "none", "learning_rate": 1e-3, "student_init": "uniform_depth",
    }  # fmt: skip
    return [str(word) for name, value in {**options, **more}.items() for word in (f"--{name}", value)]


def environment(on_cpu=True):
    return {**os.environ, "OMP_NUM_THREADS": "1", **({"ACCELERATE_USE_CPU": "true"} if on_cpu else {})}


def test_a_launcher_that_starts_fewer_processes_is_refused(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", RECIPE]
    run = subprocess.run(
        [*command, *arguments(tmp_path)], env=environment(False), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode != 0 and "distill: The launcher was asked for 2 processes, but 1 came" in run.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
        ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"],
    ],
    ids=["accelerate", "torchrun"],
)
@pytest.mark.parametrize("stated", [True, False], ids=["ACCELERATE_USE_CPU", "plain"])
def test_two_processes_share_one_run(tmp_path, launcher, stated):
    if not stated and torch.accelerator.is_available():
        pytest.skip("a GPU is there, and takes the processes")
    run = subprocess.run(
        [sys.executable, "-m", *launcher, RECIPE, *arguments(tmp_path, max_steps=3, save_strategy="no")],
        env=environment(stated), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Saved to") == 1
    assert read_record(tmp_path / "out").device["processes"] == 2
    assert load_model(tmp_path / "out").config.num_hidden_layers == 1


def test_after_ctrl_c_the_run_goes_on(tmp_path):
    options = arguments(tmp_path, max_steps=400, save_steps=10)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", RECIPE, *options]
    started = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    checkpoints = tmp_path / "out.training" / "checkpoints"
    deadline = time.time() + 200
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert time.time() < deadline and started.poll() is None, "no checkpoint came"
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)
    started.communicate(timeout=60)
    assert started.returncode != 0 and not (tmp_path / "out").exists()

    resumed = subprocess.run(
        [*command, "--resume_from_checkpoint", "true"], env=environment(), cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert read_record(tmp_path / "out").metrics
    state = json.loads((checkpoints / "checkpoint-400" / "trainer_state.json").read_text())
    assert state["global_step"] == 400
