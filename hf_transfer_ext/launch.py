"""How many processes a launcher was asked for, and how many came: a run never goes on with fewer in silence.

`accelerate launch --cpu --num_processes 2` starts one process, and `--multi_gpu --num_processes 2` (or torchrun) on a
machine without a GPU starts two that do not know of each other. The first is refused, the second is set right.
"""

from __future__ import annotations

import os

#: Where launchers state the number of processes, as accelerate reads them.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
#: The same for the number of this process among them.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def started_processes() -> int:
    """The processes that the launcher started, by the environment; 1 without a launcher."""
    return _stated(_SIZES, 1)


def started_rank() -> int:
    """The number of this process among those that the launcher started, from 0; 0 without a launcher."""
    return _stated(_RANKS, 0)


def _stated(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def asked_processes() -> int:
    """The processes that the launcher was asked for.

    The launcher of accelerate for a single process sets MASTER_ADDR where it was asked for several, and starts one.
    How many they were is in its command line; 2 is returned where that does not say.
    """
    started = started_processes()
    is_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if started > 1 or not is_accelerate or "MASTER_ADDR" not in os.environ:
        return started
    stated = _stated_by_the_launcher()
    return 2 if stated is None else stated


def _stated_by_the_launcher() -> int | None:
    """`--num_processes` in the command line of the parent process; None where it is not there."""
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes" and (value or following).isdigit():
            return int(value or following)
    return None


def require_processes(came: int) -> None:
    """Refuse to go on with fewer processes than the launcher was asked for.

    Args:
        came: The processes that work together.

    Raises:
        ValueError: They are fewer.
    """
    asked = asked_processes()
    if came < asked:
        raise ValueError(
            f"The launcher was asked for {asked} processes, but {came} came: without a GPU, `accelerate launch` with "
            "--cpu starts one, and without it the processes do not find each other. On CPUs, run "
            f"`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} ...`, or torchrun with "
            "the same variable; or ask for one process."
        )


def prepare_processes() -> None:
    """Make the processes of a launcher find each other on a machine without a GPU; one program calls it at its start.

    Raises:
        ValueError: Fewer processes came than the launcher was asked for.
    """
    require_processes(started_processes())
    if started_processes() > 1 and "ACCELERATE_USE_CPU" not in os.environ:
        import torch

        if not torch.accelerator.is_available():
            os.environ["ACCELERATE_USE_CPU"] = "true"
