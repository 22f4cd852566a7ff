import pytest

from benchmarks.hub_faults import measured, report


@pytest.mark.slow
def test_no_fault_of_the_hub_leaves_a_repository_half_published(hub):
    rows = measured(hub)
    assert sum(row["half"] for row in rows) == 0 and sum(row["raw"] for row in rows) == 0
    assert all(row["runs"] == row["old"] + row["new"] for row in rows) and all(row["struck"] for row in rows)
    assert "16 at once" in report(rows)
