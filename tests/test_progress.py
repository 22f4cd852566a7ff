import sys

import datasets
import huggingface_hub.utils as hub_utils
import pytest
from transformers.utils import logging as transformers_logging

from hf_transfer_ext.progress import stage, steps

SWITCHES = {
    "datasets": (datasets.disable_progress_bars, datasets.enable_progress_bars),
    "transformers": (transformers_logging.disable_progress_bar, transformers_logging.enable_progress_bar),
    "huggingface_hub": (hub_utils.disable_progress_bars, hub_utils.enable_progress_bars),
}


@pytest.fixture(autouse=True)
def _shown(monkeypatch):
    """Bars are on, whatever the environment of the tests says."""
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    for _, enable in SWITCHES.values():
        enable()


@pytest.mark.parametrize(
    "total, unit, options, line",
    [
        (1200, "row", {}, "reading: 1,200 rows"),
        (1, "row", {}, "reading: 1 row"),
        (5, "text", {"done": 2}, "reading: 5 texts, 2 of them done"),
        (2_500_000, "B", {}, "reading: 2.5 MB"),
        (None, "row", {}, "reading: rows as they come"),
    ],
)
def test_a_stage_begins_with_one_line(capfd, total, unit, options, line):
    with stage("reading", total, unit, **options) as advance:
        advance(1)
    assert capfd.readouterr().err.splitlines() == [line]


def test_steps_gives_every_item_and_counts_them(capfd):
    assert list(steps(["a", "b"], "reading", "file")) == ["a", "b"]
    assert list(steps(iter("abc"), "more")) == ["a", "b", "c"]
    assert capfd.readouterr().err.splitlines() == ["reading: 2 files", "more: rows as they come"]


def test_a_stage_that_is_finished_says_nothing(capfd):
    with stage("reading", 3, done=3):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("library", SWITCHES)
def test_the_switch_of_each_library_silences_it(capfd, library):
    disable, enable = SWITCHES[library]
    disable()
    try:
        assert list(steps("ab", "reading")) == ["a", "b"]
        assert capfd.readouterr().err == ""
    finally:
        enable()
    list(steps("ab", "reading"))
    assert capfd.readouterr().err.startswith("reading: 2 rows")


def test_other_processes_and_quiet_callers_say_nothing(capfd, monkeypatch):
    assert list(steps("ab", "reading", show=False)) == ["a", "b"]
    monkeypatch.setenv("RANK", "1")
    assert list(steps("ab", "reading")) == ["a", "b"]
    assert capfd.readouterr().err == ""
