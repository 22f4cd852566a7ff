"""Every configuration of accelerate through accelerate's own parser, and those for a CPU through its launcher."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
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


def program(setup, job, *options, sharding=False):
    """The command of a job under a configuration; with `sharding`, of FSDP2 without an accelerator."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate" / f"{setup}.yaml")]
    script = [str(ROOT / "tests" / "sharding.py")] if sharding else ["-m"]
    return [sys.executable, *launch, *options, *script, f"hf_transfer_ext.recipes.{job}"]


def run_together(commands, folder):
    """Run commands at the same time; all of them have to succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("ACCELERATE_USE_CPU", None)
    logs = [folder / f"machine{number}.log" for number in range(len(commands))]
    running = []
    for command, log in zip(commands, logs, strict=True):
        with open(log, "w") as file:
            running.append(subprocess.Popen(command, env=environment, cwd=folder, stdout=file, stderr=file))
    try:
        codes = [one.wait(timeout=300) for one in running]
    finally:
        for one in running:
            one.kill()
    assert codes == [0] * len(commands), "\n".join(log.read_text()[-3000:] for log in logs)


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("setup, processes", [("cpu", 1), ("cpu_2", 2)])
def test_a_job_is_launched_on_the_cpu(models, job, setup, processes):
    if processes > 1 and torch.accelerator.is_available():
        pytest.skip("a GPU is there, and takes the processes")
    words = [word.replace("{}", str(models)) for word in JOBS[job]]
    run_together([[*program(setup, job), *words, "--output_dir", str(models / "out")]], models)
    assert read_record(models / "out").device["processes"] == processes


# ---- Two machines, each with a launcher of its own, which find each other by an address and a port ----


def on_two_machines(setup, job, words, folder, *, per_machine=1, sharding=False):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "num_machines": 2, "num_processes": 2 * per_machine, "mixed_precision": "no", "main_process_ip": "127.0.0.1",
        "main_process_port": port,
    }  # fmt: skip
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    commands = [program(setup, job, *given, "--machine_rank", str(rank), sharding=sharding) for rank in range(2)]
    run_together([[*command, *words] for command in commands], folder)


SAME_STEPS = ["--optim", "sgd", "--learning_rate", "0.1", "--max_steps", "2", "--report_to", "none", "--save_strategy",
              "no", "--disable_tqdm", "true", "--bf16", "false"]  # fmt: skip
#: Job -> (its words, its total batch, the processes on each of two machines).
TRAINED = {
    "distill": (
        ["--teacher", "{}/teacher", "--student", "{}/model", "--dataset", "{}/data.jsonl", "--test_split", "null",
         "--max_length", "64", *SAME_STEPS], 4, 2,
    ),
    "unlearn": (
        ["--model_name_or_path", "{}/model", "--forget_data", "{}/forget.jsonl", "--retain_data", "{}/retain.jsonl",
         "--method", "grad_diff", "--lora_rank", "4", *SAME_STEPS], 2, 1,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("job", TRAINED)
def test_two_machines_with_shards_train_what_one_process_trains(models, job):
    if torch.accelerator.is_available():
        pytest.skip("a GPU is there, and takes the processes")
    tiny_llama(2, num_hidden_layers=3).save_pretrained(models / "teacher")
    byte_tokenizer().save_pretrained(models / "teacher")
    words, batch, per_machine = TRAINED[job]
    words = [word.replace("{}", str(models)) for word in words]
    size = "--per_device_train_batch_size"
    alone = [*words, size, str(batch), "--output_dir", str(models / "one"), "--use_cpu", "true"]
    run_together([[sys.executable, "-m", f"hf_transfer_ext.recipes.{job}", *alone]], models)
    share = [*words, size, str(batch // (2 * per_machine)), "--output_dir", str(models / "two")]
    on_two_machines("multi_node", job, share, models, per_machine=per_machine, sharding=True)
    file = "adapter_model.safetensors" if job == "unlearn" else "model.safetensors"
    one, two = load_file(models / "one" / file), load_file(models / "two" / file)
    assert one.keys() == two.keys()
    start = load_file(models / "model/model.safetensors") if job == "distill" else {}
    moved = [name for name in one if name in start or "lora_B" in name]
    assert min(float((one[name] - start.get(name, 0)).abs().max()) for name in moved) > 1e-5
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    records = [read_record(models / name) for name in ("one", "two")]
    assert [record.device["processes"] for record in records] == [1, 2 * per_machine]
    assert_same_measurements(*records)


def assert_same_measurements(one, two):
    """Of the result and of everything that it was compared with: the same measures, values and counts."""
    found = [{"result": record.metrics, **record.compared} for record in (one, two)]
    assert any(found[0].values()) or one.job == "distillation"  # of which nothing was measured here
    assert found[0].keys() == found[1].keys()
    for name, measurements in found[0].items():
        assert [(m.name, m.examples) for m in measurements] == [(m.name, m.examples) for m in found[1][name]]
        values = [[m.value for m in each] for each in (measurements, found[1][name])]
        assert values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-6, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["evaluate", "audit"])
def test_two_machines_measure_what_one_process_measures(models, job):
    if torch.accelerator.is_available():
        pytest.skip("a GPU is there, and takes the processes")
    words = [word.replace("{}", str(models)) for word in JOBS[job]]
    run_together([[sys.executable, "-m", f"hf_transfer_ext.recipes.{job}", *words, "--output_dir", "one"]], models)
    on_two_machines("cpu_2", job, [*words, "--output_dir", "two"], models)
    one, two = (read_record(models / name) for name in ("one", "two"))
    assert [one.device["processes"], two.device["processes"]] == [1, 2]
    assert_same_measurements(one, two)


@pytest.mark.slow
def test_two_machines_merge_to_the_bytes_of_one_process(models):
    tiny_llama(2).save_pretrained(models / "tuned")
    recipe = {"merge_method": "ties", "base_model": str(models / "model"), "dtype": "float32",
              "models": [{"model": str(models / "tuned"), "parameters": {"weight": 0.7, "density": 0.5}}]}  # fmt: skip
    (models / "merge.yml").write_text(json.dumps(recipe))
    words = ["--merge_config", str(models / "merge.yml"), "--output_dir"]
    run_together([[sys.executable, "-m", "hf_transfer_ext.recipes.merge", *words, "one"]], models)
    on_two_machines("cpu_2", "merge", [*words, "two"], models)
    one, two = ((models / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two != (models / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_machines_fill_one_cache(models):
    words = [str(models / "model"), str(models / "data.jsonl")]
    run_together([[sys.executable, "-m", "hf_transfer_ext.recipes.cache_teacher", *words, "one"]], models)
    on_two_machines("cpu_2", "cache_teacher", [*words, "two", "--batch_size", "4"], models)
    files = {name: sorted((models / name).glob("rows-*.safetensors")) for name in ("one", "two")}
    assert len(files["two"]) == 2 > len(files["one"])  # one from each machine
    one, two = (
        {part: torch.cat([load_file(path)[part] for path in paths]) for part in ("keys", "ids", "log_probs")}
        for paths in files.values()
    )
    assert sorted(map(bytes, one["keys"].numpy())) == sorted(map(bytes, two["keys"].numpy()))
    assert len(one["keys"]) == 16
    for part in ("ids", "log_probs"):
        found = [cache[part].float().sort().values for cache in (one, two)]
        torch.testing.assert_close(*found, atol=2e-3, rtol=1e-3)
