"""Every configuration of accelerate through accelerate's own parser, and those for a CPU through its launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_llama

from hf_transfer_ext.hub.record import read_record
from hf_transfer_ext.recipe import CONFIGS

ROOT = Path(__file__).parents[2]
FILES = sorted((CONFIGS / "accelerate").glob("*.yaml"))
NAMES = {"cpu", "cpu_2", "single_gpu", "ddp", "fsdp2", "fsdp2_offload", "zero2", "zero3", "multi_node"}


def launched(path, monkeypatch):
    """(arguments, launcher) of `accelerate launch --config_file path script.py`, which starts nothing."""
    from accelerate.commands import launch

    calls = []
    for launcher in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, launcher, lambda args, name=launcher: calls.append((args, name)))
    parser = launch.launch_command_parser()
    launch.launch_command(parser.parse_args(["--config_file", str(path), "script.py"]))
    (call,) = calls
    return call


def test_each_setup_has_its_configuration():
    assert {path.stem for path in FILES} == NAMES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it_and_launches_what_its_comment_says(path, monkeypatch):
    from accelerate.utils import launch as environments

    monkeypatch.setattr(environments, "is_port_in_use", lambda port: False)
    args, launcher = launched(path, monkeypatch)
    text = path.read_text()
    assert f"configs/accelerate/{path.stem}.yaml" in text and text.startswith("# ")
    expected = {
        "cpu": ("simple_launcher", 1, 1), "single_gpu": ("simple_launcher", 1, 1),
        "cpu_2": ("multi_gpu_launcher", 1, 2), "ddp": ("multi_gpu_launcher", 1, 8),
        "fsdp2": ("multi_gpu_launcher", 1, 8), "fsdp2_offload": ("multi_gpu_launcher", 1, 8),
        "zero2": ("deepspeed_launcher", 1, 8), "zero3": ("deepspeed_launcher", 1, 8),
        "multi_node": ("multi_gpu_launcher", 2, 16),
    }  # fmt: skip
    assert (launcher, args.num_machines, args.num_processes) == expected[path.stem]
    assert args.use_cpu == (path.stem in ("cpu", "cpu_2"))
    assert args.mixed_precision == ("no" if args.use_cpu else "bf16")
    assert args.use_fsdp == (path.stem in ("fsdp2", "fsdp2_offload", "multi_node"))
    if args.use_fsdp:
        variables = environments.prepare_multi_gpu_env(args)
        assert variables["FSDP_VERSION"] == "2" and variables["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
        assert variables["FSDP_OFFLOAD_PARAMS"] == str(path.stem == "fsdp2_offload").lower()
        assert variables["FSDP_RESHARD_AFTER_FORWARD"] == "true"
        assert variables["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
        assert args.nproc_per_node == "8"
    if args.use_deepspeed:
        _, variables = environments.prepare_deepspeed_cmd_env(args)
        assert variables["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == path.stem[-1]
        assert variables["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(path.stem == "zero3").lower()


def test_an_unknown_key_would_be_refused(tmp_path, monkeypatch):
    (tmp_path / "typo.yaml").write_text((CONFIGS / "accelerate" / "cpu.yaml").read_text() + "num_procesess: 2\n")
    with pytest.raises(ValueError, match="num_procesess"):
        launched(tmp_path / "typo.yaml", monkeypatch)


@pytest.fixture
def models(tmp_path):
    """A teacher and an unlearning model on disk, with data for both."""
    tiny_llama(1).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    texts = [{"text": f"number {i} is followed by {i + 1}"} for i in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    for name, words in (("forget", "abcd"), ("retain", "efgh")):
        rows = [{"question": f"What is {word}?", "answer": f"{word} is {name}"} for word in words]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


TRAINING = [
    "--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--save_strategy", "no",
    "--disable_tqdm", "true", "--use_cpu", "true",
]  # fmt: skip
JOBS = {
    "distill": [
        "--teacher", "{}/model", "--dataset", "{}/data.jsonl", "--test_split", "train[:2]", "--student_layers", "1",
        "--max_length", "64", "--bf16", "false", *TRAINING,
    ],
    "unlearn": [
        "--model_name_or_path", "{}/model", "--forget_data", "{}/forget.jsonl", "--retain_data", "{}/retain.jsonl",
        *TRAINING,
    ],
    "evaluate": ["--models", "{}/model", "--data", "{}/retain.jsonl", "--metrics", "[perplexity]"],
    "audit": [
        "--unlearned", "{}/model", "--original", "{}/model", "--forget_data", "{}/forget.jsonl", "--retain_data",
        "{}/retain.jsonl", "--attacks", "[plain_question]", "--membership", "[]", "--max_new_tokens", "2",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("setup, processes", [("cpu", 1), ("cpu_2", 2)])
def test_a_job_is_launched_on_the_cpu(models, job, setup, processes):
    if processes > 1 and torch.accelerator.is_available():
        pytest.skip("a GPU is there, and takes the processes")
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate" / f"{setup}.yaml")]
    words = [word.replace("{}", str(models)) for word in JOBS[job]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("ACCELERATE_USE_CPU", None)
    run = subprocess.run(
        [sys.executable, *launch, "-m", f"hf_transfer_ext.recipes.{job}", *words, "--output_dir", str(models / "out")],
        env=environment, cwd=models, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert read_record(models / "out").device["processes"] == processes
