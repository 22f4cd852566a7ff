import pytest

from benchmarks.hub_faults import measured, pulled, report, report_of_pulls
from hf_transfer_ext.hub import access


@pytest.mark.slow
def test_no_fault_of_the_hub_leaves_a_repository_half_published(hub):
    rows = measured(hub)
    assert sum(row["half"] for row in rows) == 0 and sum(row["raw"] for row in rows) == 0
    assert all(row["runs"] == row["old"] + row["new"] for row in rows) and all(row["struck"] for row in rows)
    assert "16 at once" in report(rows)


@pytest.mark.slow
def test_a_pull_gives_the_stated_files_or_an_error(hub, monkeypatch):
    monkeypatch.setattr(access, "WAITS", (0.05, 0.1, 0.4, 0.4))
    rows = {row["fault"]: row for row in pulled(hub)}
    assert sum(row["wrong"] + row["raw"] for row in rows.values()) == 0 and all(row["struck"] for row in rows.values())
    assert all(row["right"] >= row["runs"] / 2 for fault, row in rows.items() if fault != "401")
    assert "stale etag" in report_of_pulls(list(rows.values()))
