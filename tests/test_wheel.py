"""The wheel, installed in an environment of its own, does every job from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tiny import byte_tokenizer, tiny_llama

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TRAINING = [
    "--max_steps", "2", "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--save_strategy", "no",
    "--disable_tqdm", "true", "--per_device_train_batch_size", "2",
]  # fmt: skip


def without_repository():
    """The environment without the repository on Python's path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`hf-transfer-ext` of the installed wheel; its dependencies are those of the environment that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves its folders beside the sources.
    unused = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "benchmarks", "*.so")
    shutil.copytree(ROOT, folder / "source", ignore=unused)
    quiet = {"check": True, "capture_output": True, "timeout": 500, "env": without_repository()}
    pip = [sys.executable, "-m", "pip"]
    wheel_of = [*pip, "wheel", str(folder / "source"), "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run(wheel_of, **quiet)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=False)
    scripts = folder / "venv" / "bin"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    subprocess.run([*pip, "--python", str(scripts / "python"), "install", "--no-deps", str(wheel)], **quiet)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return scripts / "hf-transfer-ext"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and data in a folder that is not the repository."""
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("base", "one", "two", "teacher")):
        tiny_llama(seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    for name, words in (("forget", ("gold", "iron", "tin")), ("retain", ("paris", "rome", "oslo"))):
        rows = [{"question": f"What is {word}?", "answer": f"{word} is {name}"} for word in words]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"row {i} of it"}) + "\n" for i in range(20)))
    (folder / "merge.yml").write_text(
        "merge_method: linear\nmodels:\n- model: one\n- model: two\nparameters: {weight: 1.0}\ndtype: float32\n"
    )
    return folder


JOBS = {
    "merge": ["merge", "merge.yml", "merged"],
    "distill": [
        "distill", "--teacher", "teacher", "--dataset", "texts.jsonl", "--student_layers", "1", "--max_length", "64",
        "--output_dir", "distilled", *TRAINING,
    ],
    "unlearn": [
        "unlearn", "--model_name_or_path", "base", "--forget_data", "forget.jsonl", "--retain_data", "retain.jsonl",
        "--output_dir", "unlearned", "--lora_rank", "2", *TRAINING,
    ],
    "evaluate": [
        "evaluate", "--models", "base", "--data", "retain.jsonl", "--metrics", "perplexity", "--output_dir",
        "evaluated",
    ],
    "audit": [
        "audit", "--unlearned", "one", "--original", "base", "--forget_data", "forget.jsonl", "--retain_data",
        "retain.jsonl", "--attacks", "plain_question", "--membership", "[]", "--max_new_tokens", "4", "--output_dir",
        "audited",
    ],
}  # fmt: skip
FOLDERS = {
    "merge": "merged",
    "distill": "distilled",
    "unlearn": "unlearned",
    "evaluate": "evaluated",
    "audit": "audited",
}


def run(command, place, words, **environment):
    settings = {**without_repository(), **environment}
    return subprocess.run([command, *words], cwd=place, env=settings, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("job", JOBS)
def test_a_job_leaves_card_and_record(command, place, job):
    done = run(command, place, JOBS[job])
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("README.md", "hf_transfer_ext.json"):
        assert (place / FOLDERS[job] / name).is_file()
    record = json.loads((place / FOLDERS[job] / "hf_transfer_ext.json").read_text())
    assert record["command"] and record["versions"]["hf_transfer_ext"]


def test_a_result_is_pushed_and_pulled(command, place, hub):
    assert run(command, place, [*JOBS["merge"][:2], "to_push"]).returncode == 0
    where = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "home")}
    pushed = run(command, place, ["push", "to_push", "tester/wheel"], **where)
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert "hf_transfer_ext.json" in hub.files("tester/wheel")
    pulled = run(command, place, ["pull", "tester/wheel", "pulled"], **where)
    assert pulled.returncode == 0, pulled.stderr[-3000:]
    assert (place / "pulled" / "model.safetensors").read_bytes() == (
        place / "to_push" / "model.safetensors"
    ).read_bytes()


def test_the_package_brings_its_configurations(command, place):
    done = run(command, place, ["doctor"])
    assert "distill/demo.yaml" in done.stdout and str(ROOT) not in done.stdout
    assert run(command, place, ["distill", "--config", "distill/demo.yaml", "--help"]).returncode == 0
