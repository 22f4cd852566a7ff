"""Disturbed jobs leave the output folder absent, old or new, and end with the bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import pytest

from benchmarks import faults
from hf_transfer_ext import files


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return faults.Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, fault", [(job, fault) for job in faults.JOBS for fault in faults.faults_of(faults.JOBS[job])]
)
def test_nothing_is_lost(bench, job, fault):
    bench.prepare(faults.JOBS[job])
    tally = faults.FAULTS[fault](bench, faults.JOBS[job], 40 if fault == "kill at a call" else 20)
    assert tally.losses == []
    if tally.count == 0:
        pytest.skip("needs the right to mount")
    assert tally.hit >= 1


@pytest.mark.slow
def test_a_job_that_does_not_go_on_where_it_was_is_found(bench):
    """Every run of it trains with another seed, as one would that forgets its random state."""

    def run(models, out, overwrite):
        words = [*faults.long_jobs.TRAINING, "--seed", str(os.getpid())]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(faults.long_jobs, "TRAINING", words)
            return faults.long_jobs.run_unlearn(models, out, overwrite)

    bench.prepare(faults.JOBS["unlearn"])
    assert faults.kill(bench, dataclasses.replace(faults.JOBS["unlearn"], run=run), 1).losses


@pytest.mark.parametrize("job", ["merge", "extract"])
def test_some_kills_at_calls(bench, job):
    bench.prepare(faults.JOBS[job])
    tally = faults.kill_at_call(bench, faults.JOBS[job], 4)
    assert tally.count >= 4 and tally.hit == tally.count and tally.losses == []


@pytest.mark.slow
def test_losses_are_found(bench, monkeypatch):
    """A result that is copied file by file, and not renamed, is seen half there after some kills."""

    def copied(new, target):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(new, target)

    bench.prepare(faults.JOBS["merge"])
    monkeypatch.setattr(files, "replace_folder", copied)
    assert faults.kill_at_call(bench, faults.JOBS["merge"], 1000).losses


def test_the_command_writes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "JOBS", {"extract": faults.JOBS["extract"]})
    monkeypatch.setattr(faults, "FAULTS", {"full disk": faults.full_disk})
    assert faults.main(["--out", str(tmp_path / "faults"), "--count", "2"]) == 0
    assert "| extract | full disk | 2 |" in (tmp_path / "faults.md").read_text()
    assert json.loads((tmp_path / "faults.json").read_text())[0]["losses"] == []
    monkeypatch.setattr(faults, "FAULTS", {"kill": faults.kill})
    assert faults.main(["--out", str(tmp_path / "faults"), "--count", "1", "--keep"]) == 0
    rows = json.loads((tmp_path / "faults.json").read_text())
    assert [(row["fault"], row["count"]) for row in rows] == [("full disk", 2), ("kill", 1)]
