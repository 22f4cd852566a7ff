"""Plans, and merges that the compiled kernels do alone, never import torch: it takes longer than a small merge."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from merging.method_cases import config_of, tensors
from merging.tiny_models import family, load, write_model

from hf_transfer_ext.merging import MERGE_METHODS
from hf_transfer_ext.merging.arithmetic import kernels

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "jaxtyping", "safetensors.torch")

#: Runs command lines of `merge`, given as JSON, and prints the heavy modules that are imported after each of them.
PROGRAM = f"""
import json, sys
from hf_transfer_ext.cli import main
for words in json.loads(sys.stdin.read()):
    try:
        status = main(["merge", *words])
    except SystemExit as end:  # of --help
        status = end.code or 0
    print("after", json.dumps([status, words, [name for name in {HEAVY} if name in sys.modules]]))
"""

WITH_FAST_FORM = [name for name, method in MERGE_METHODS.items() if method.fast is not None]

needs_kernels = pytest.mark.skipif(kernels.LIBRARY is None, reason="the kernels are not built")


def heavy_modules_after(*command_lines):
    program = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(program, input=json.dumps(command_lines), capture_output=True, text=True, check=True)
    found = [json.loads(line.removeprefix("after ")) for line in done.stdout.splitlines() if line.startswith("after ")]
    assert [words for _, words, _ in found] == list(map(list, command_lines))
    assert all(status == 0 for status, _, _ in found), done.stderr
    return [modules for _, _, modules in found]


def config_file(folder, name, content):
    path = folder / f"{name}.yml"
    path.write_text(json.dumps(content))
    return str(path)


def test_help_and_plans(tmp_path):
    base, tuned = family(tmp_path)
    names = [*WITH_FAST_FORM, "passthrough"]
    plans = [(config_file(tmp_path, name, config_of(name, base, tuned)), str(tmp_path / name)) for name in names]
    command_lines = [[*plan, "--dry-run"] for plan in plans]
    assert heavy_modules_after(["--help"], *command_lines) == [[]] * (1 + len(plans))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merges_by_the_kernels(tmp_path, dtype):
    base, tuned = family(tmp_path, dtype=dtype)
    merges = []
    for name in WITH_FAST_FORM:
        config = config_file(tmp_path, name, config_of(name, base, tuned))
        merges.append([config, str(tmp_path / name), "--quiet"])
    copied = config_file(tmp_path, "copied", {"merge_method": "passthrough", "models": [{"model": base}]})
    merges.append([copied, str(tmp_path / "copied"), "--quiet"])
    assert heavy_modules_after(*merges) == [[]] * len(merges)
    record = json.loads((tmp_path / "copied" / "hf_transfer_ext.json").read_text())
    assert record["device"]["device"] == "cpu" and record["device"]["threads"] >= 1
    assert record["versions"]["torch"] == torch.__version__
    assert load(tmp_path / "copied").keys() == load(base).keys()


@needs_kernels
def test_samples_of_tensors_that_are_read_once(tmp_path):
    """A tensor of several pieces that is kept in memory is sampled with steps."""
    base, models = tensors(3, (800, 1000))
    paths = [
        write_model(tmp_path / name, {"model.embed_tokens.weight": tensor.bfloat16()})
        for name, tensor in zip(("base", "one", "two", "three"), [base, *models], strict=True)
    ]
    merges = []
    for name in ("sce", "ties", "breadcrumbs"):
        config = config_file(tmp_path, name, config_of(name, paths[0], paths[1:]))
        merges.append([config, str(tmp_path / name), "--quiet"])
    assert heavy_modules_after(*merges) == [[]] * len(merges)


@needs_kernels
def test_thresholds_over_the_model_and_another_dtype(tmp_path):
    base, tuned = family(tmp_path)
    content = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": one, "parameters": {"weight": 0.5, "density": 0.3}} for one in tuned],
        "parameters": {"trim_over_model": True},
    }
    for dtype in ("float16", "bfloat16", "float64"):
        path = config_file(tmp_path, dtype, {**content, "out_dtype": dtype})
        assert heavy_modules_after([path, str(tmp_path / dtype), "--quiet"]) == [[]]


def test_other_methods_import_torch_when_they_are_looked_up(tmp_path):
    base, tuned = family(tmp_path)
    plan = config_file(tmp_path, "tsv", config_of("tsv", base, tuned)), str(tmp_path / "out"), "--dry-run"
    (modules,) = heavy_modules_after(list(plan))
    assert "torch" in modules
