"""Run a function on two gloo ranks, forked after the imports: a second instead of the half minute of a launcher."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_two_ranks(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """Fork two ranks that each run `function(rank)` under a two-process Accelerate state; their results, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            _child(rank, port, function, folder)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    errors = [(folder / f"rank{rank}.error").read_text() for rank in range(2) if codes[rank]]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def _child(rank: int, port: int, function: Callable[[int], Any], folder: Path) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(
            ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.save(function(rank), folder / f"rank{rank}.pt")
        torch.distributed.barrier()
        code = 0
    except BaseException:
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)
