"""vLLM in an environment of its own: its interpreter, and its server with a model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

#: The interpreter of an environment that has vLLM; CONTRIBUTING.md says how to create one for CPUs.
VARIABLE = "HF_TRANSFER_EXT_VLLM_PYTHON"
#: Seconds until a server answers; on two busy cores it takes five minutes.
LONGEST_START = 1200


class Served(NamedTuple):
    """A running server and what started it."""

    url: str
    process: subprocess.Popen

    def kill(self) -> None:
        """End the server and its engine at once, as a crash of the machine would."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def vllm_python() -> str:
    """The interpreter that the variable names; the test is skipped without one."""
    if VARIABLE not in os.environ:
        pytest.skip(f"{VARIABLE} does not name the interpreter of an environment with vLLM (CONTRIBUTING.md)")
    return os.environ[VARIABLE]


def for_vllm(**more: str) -> dict[str, str]:
    """The environment variables of a process with vLLM in it, on few cores and without a network."""
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **small, **more}


@contextmanager
def served(model: Path, log: Path, *options: str, name: str = "big") -> Iterator[Served]:
    """Serve a model in float32 until the block ends.

    Args:
        model: Folder with a model and its tokenizer.
        log: Where the server's output goes.
        options: Further ones of vLLM's server.
        name: The model's name on the server.
    """
    python = vllm_python()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        "nice", "-n", "5", python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype",
        "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", port, "--served-model-name", name, *options,
    ]  # fmt: skip
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=for_vllm(), start_new_session=True)
    running = Served(f"http://127.0.0.1:{port}", process)
    try:
        _wait_for(running, log)
        yield running
    finally:
        if process.poll() is None:
            running.kill()


def _wait_for(server: Served, log: Path) -> None:
    end = time.monotonic() + LONGEST_START
    while time.monotonic() < end and server.process.poll() is None:
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    state = "stopped" if server.process.poll() is not None else f"did not answer within {LONGEST_START} s"
    raise OSError(f"vLLM's server {state}. The end of its output:\n{log.read_text(errors='replace')[-3000:]}")
