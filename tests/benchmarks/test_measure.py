"""The measurements that all benchmarks share: do they see what a step really takes?"""

import pytest

from benchmarks import measure

STEPS = "tests.benchmarks.measured_steps:"


def child(name, limit=2e9, **arguments):
    return measure.measure_in_child(STEPS + name, arguments, limit_bytes=limit, timeout_s=60)


@pytest.mark.parametrize("before", [0, 400])
def test_growth_is_the_peak_of_the_step_also_after_a_higher_peak_of_its_inputs(before):
    record = child("grows", before=before, during=150)
    assert record["status"] == measure.OK
    assert record["filled"] == 150_000_000
    assert 145e6 < record["growth_bytes"] < 165e6


def test_wall_time_is_that_of_the_step_and_sleeping_takes_no_processor():
    record = child("sleeps", seconds=0.3)
    assert 0.3 <= record["wall_s"] < 1.0
    assert record["cpu_s"] < 0.1


def test_a_child_beyond_the_limit_is_stopped_and_recorded():
    record = child("grows", limit=0.3e9, before=0, during=3000)
    assert record["status"] == measure.OUT_OF_MEMORY
    assert 0.3e9 < record["seen_bytes"] < 2.5e9


def test_a_child_beyond_its_time_is_stopped_and_recorded():
    record = measure.measure_in_child(STEPS + "sleeps", {"seconds": 30}, limit_bytes=2e9, timeout_s=0.5)
    assert record["status"] == measure.TIMED_OUT


def test_a_failure_keeps_what_the_child_said():
    record = child("raises")
    assert record["status"] == measure.FAILED
    assert "ValueError: no such input" in record["output"]


def test_rounds_turn_the_order_and_leave_nothing_out():
    assert list(measure.rounds_of("abc", 2)) == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]
    assert list(measure.rounds_of("abc", 1, first=2)) == [(2, "c"), (2, "a"), (2, "b")]


def test_ratios_are_taken_within_a_round():
    def records(*walls):
        return [{"status": measure.OK, "round": n, "wall_s": wall} for n, wall in enumerate(walls)]

    # The machine was ten times slower in the second round: medians would say 20 / 10.
    assert measure.paired_ratio(records(3.0, 30.0, 2.0), records(1.0, 10.0, 1.0), "wall_s") == 3.0
    lost = [{"status": measure.OUT_OF_MEMORY, "round": 0}, *records(3.0, 30.0, 2.0)[1:]]
    assert measure.paired_ratio(lost, records(1.0, 10.0, 1.0), "wall_s") == 2.5
    assert measure.paired_ratio(lost[:1], records(1.0), "wall_s") is None
    assert measure.median(lost, "wall_s") == 16.0 and measure.median(lost[:1], "wall_s") is None


def test_the_table_shows_a_dash_where_there_is_no_figure():
    text = measure.markdown_table(["method", "s"], [["ours", 1], ["peer", None]])
    assert text.splitlines() == ["| method | s |", "| --- | ---: |", "| ours | 1 |", "| peer | – |"]
