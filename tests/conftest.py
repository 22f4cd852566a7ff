"""Environment of all tests: a Hub on loopback instead of the network, one thread, a fresh cache.

`huggingface_hub` reads its endpoint when it is imported, so the server starts here, before any test module is.
Bare Hub ids in tests (`"tester/tiny"`, and by mistake `"gpt2"`) go to this server and never to the network.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator

import pytest
from hub_server import HubServer

if "huggingface_hub" in sys.modules:
    raise RuntimeError(
        "huggingface_hub was imported before tests/conftest.py could point it to the test server, so tests might "
        "reach the network. Disable the pytest plugin that imports it (-p no:NAME)."
    )

_CACHE = tempfile.mkdtemp(prefix="hub-cache-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
_SERVER = HubServer()
os.environ.update(
    HF_ENDPOINT=_SERVER.endpoint,
    HF_HOME=_CACHE,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    NO_PROXY="127.0.0.1,localhost",
    WANDB_MODE="disabled",
)
# An outer setting wins for the number of threads; torch takes it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE",
             "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN_PATH", "HUGGINGFACE_HUB_CACHE"):  # fmt: skip
    os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported and collected out of garbage collections: it lives until the end.

    Each `Trainer.train` ends with a full collection, which takes half a second over the objects of all tests.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The Hub on loopback, without repositories at the start of each test."""
    _SERVER.clear()
    yield _SERVER
    _SERVER.clear()
