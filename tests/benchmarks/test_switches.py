import json
from dataclasses import fields

import pytest

from benchmarks.switches import HOW, PLAIN, SWITCHES, main, reason_of, rows_of
from hf_transfer_ext import DistillationConfig


def record(switch, seconds, number=0, **more):
    return {
        "switch": switch, "round": number, "status": "ok", "cpu_s": seconds, "growth_bytes": 2e6, "before_bytes": 5e6,
        "tokens": 100.0, "graphs": 0.0, "graph_breaks": 0.0, **more,
    }  # fmt: skip


def test_every_switch_is_a_setting():
    known = {field.name for field in fields(DistillationConfig)}
    assert all(name in known for settings in SWITCHES.values() for name in settings if name not in HOW)


def test_ratios_are_those_of_one_round_and_reasons_stand_in_the_table():
    failed = {"switch": "bf16", "round": 0, "status": "failed", "output": "Traceback\nValueError: needs a chip.\n"}
    slow = [record(PLAIN, 1.0), record(PLAIN, 3.0, 1), record("packing", 0.5), record("packing", 1.5, 1), failed]
    rows = {row[0]: row[1:] for row in rows_of([*slow, record("padding_free", 1.0, graphs=2.0, graph_breaks=1.0)])}
    assert rows["packing"][:4] == ["100", "2.00", "2", "1.00"]
    assert rows["bf16"][-1] == "needs a chip." and reason_of({"status": "timed out"}) == "timed out"
    assert rows["padding_free"][-1] == "2 graphs, 1 graph breaks"


@pytest.mark.slow
def test_steps_of_a_toy_are_measured(tmp_path):
    small = "--rounds 1 --batch 4 --length 64 --vocabulary 300 --hidden 64 --layers 1".split()
    names = [PLAIN, "gradient_checkpointing", "teacher_cache (top 64)"]
    records = main([*small, "--switches", *names, "--out", str(tmp_path / "toy")])
    assert [record["status"] for record in records] == ["ok"] * 3
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-4)
    assert json.loads((tmp_path / "toy.json").read_text())["records"] == records
