import json

import pytest

from benchmarks.distillation_step import METHODS, main, rows_of


@pytest.mark.slow
def test_it_measures_whole_steps_beside_trl(tmp_path):
    small = "--rounds 1 --batch 2 --prompt 8 --completion 6 --hidden 64 --layers 1 --vocabulary 300".split()
    methods = [
        "sft", "ours, on-policy reverse KL", "trl distillation, on-policy reverse KL", "ours, cached teacher",
        "ours, across tokenizers", "trl gold, across tokenizers",
    ]  # fmt: skip
    records = main([*small, "--methods", *methods, "--out", str(tmp_path / "steps")])
    assert [record["method"] for record in records] == methods
    assert all(record["status"] == "ok" and record["cpu_s"] > 0 for record in records)
    # whole texts are seen, prompt and completion; the student may end its own early
    assert all(record["tokens"] == 2 * 14 for record in records if "on-policy" not in record["method"])
    assert all(16 < record["tokens"] <= 2 * 14 for record in records)
    page = (tmp_path / "steps.md").read_text()
    assert all(f"| {method} |" in page for method in methods)
    assert json.loads((tmp_path / "steps.json").read_text())["records"] == records


def test_ratios_are_trls_over_ours_within_a_round():
    def record(method, seconds, growth, number):
        return {"method": method, "round": number, "status": "ok", "cpu_s": seconds, "growth_bytes": growth,
                "tokens": 100.0}  # fmt: skip

    records = [
        *(record("ours, JSD", 1.0 * slow, 1e9, n) for n, slow in enumerate((1, 2, 3))),
        *(record("trl gkd, JSD", 4.0 * slow, 5e9, n) for n, slow in enumerate((1, 2, 3))),
    ]
    assert rows_of(records)[0] == ["ours, JSD", "50", "1.00", "4.00x", "5.00x"]
    assert "ours, JSD" in METHODS
