"""What a worker counts: buckets, sums over processes, and an agent's own account."""

from typing import Any

import pytest

from outwake.telemetry.metrics import render
from outwake.worker.engine.metrics import (
    BOUNDS,
    OUTCOMES,
    Snapshot,
    Stats,
    agent_used,
    families,
    merge,
    without_gauges,
)
from tests.support.scraped import Samples, samples

GAUGES = {"outwake_worker_parked": 1, "outwake_worker_running": 2}


def read(*snapshots: Snapshot) -> Samples:
    return samples(render(families(merge(snapshots))).decode())


def test_buckets_are_cumulative_and_take_their_bound() -> None:
    stats = Stats()
    stats.claimed([("t", 0.0), ("t", 0.001), ("t", 0.0011), ("t", 1e9), ("t", -3.0)])
    found = read(stats.snapshot({}))
    name = "outwake_worker_wait_seconds"
    assert found[(f"{name}_bucket", "t", "0.001")] == 3  # a clock that went back counts as no wait
    assert found[(f"{name}_bucket", "t", "0.0025")] == 4
    assert found[(f"{name}_bucket", "t", str(BOUNDS[-1]))] == 4
    assert found[(f"{name}_bucket", "t", "+Inf")] == found[(f"{name}_count", "t")] == 5
    assert found[(f"{name}_sum", "t")] == pytest.approx(1e9 + 0.0021)


def test_processes_are_summed_and_dead_ones_count_on() -> None:
    first, second = Stats(), Stats()
    for stats, times in [(first, 2), (second, 3)]:
        stats.count("outwake_worker_attempts", "t", "done", by=times)
        stats.ran("t", 0.5)
    second.ran("u", 0.5)
    dead = without_gauges(first.snapshot(GAUGES))
    found = read(dead, second.snapshot(GAUGES))
    assert found[("outwake_worker_attempts_total", "t", "done")] == 5
    assert found[("outwake_worker_run_seconds_count", "t")] == 2
    assert found[("outwake_worker_run_seconds_count", "u")] == 1
    assert found[("outwake_worker_parked",)] == 1
    assert found[("outwake_worker_running",)] == 2


def test_merging_changes_no_snapshot() -> None:
    stats = Stats()
    stats.ran("t", 0.5)
    one = stats.snapshot(GAUGES)
    before = repr(one)
    merge([merge([one, one]), one])
    assert repr(one) == before


def test_a_wake_up_counts_once_and_in_vain_only_if_nothing_came() -> None:
    stats = Stats()
    for causes, rows in [(["notify", "deadline"], 1), (["deadline"], 0), ([], 0)]:
        for cause in causes:
            stats.woken(cause)
        stats.looked(rows)
    found = read(stats.snapshot({}))
    assert found[("outwake_worker_wakeups_total", "notify")] == 1
    assert found[("outwake_worker_wakeups_total", "deadline")] == 1
    assert found[("outwake_worker_wakeups_in_vain_total", "deadline")] == 1
    assert found[("outwake_worker_wakeups_in_vain_total", "notify")] == 0


def test_what_an_agent_used() -> None:
    stats = Stats()
    usage = {
        "input_tokens": 12,
        "cache_creation_input_tokens": 300,
        "cache_read_input_tokens": 4000,
        "output_tokens": 50,
        "service_tier": "standard",
    }
    for error in (False, True):
        result = {"type": "result", "is_error": error, "total_cost_usd": 0.25, "usage": usage}
        agent_used(result, stats)
    found = read(stats.snapshot({}))
    assert found[("outwake_agent_cost_usd_total",)] == 0.5
    tokens = {kind: found[("outwake_agent_tokens_total", kind)] for kind in ("input", "output")}
    assert tokens == {"input": 24, "output": 100}
    assert found[("outwake_agent_tokens_total", "cache_read")] == 8000
    assert found[("outwake_agent_tokens_total", "cache_write")] == 600
    assert found[("outwake_agent_turns_total", "failed")] == 1


@pytest.mark.parametrize("nonsense", [None, "3", True, -1, float("nan"), float("inf"), [1], 10**400])
def test_nonsense_from_an_agent_counts_nothing(nonsense: Any) -> None:
    stats = Stats()
    agent_used({"total_cost_usd": nonsense, "usage": {"input_tokens": nonsense}}, stats)
    agent_used({"usage": nonsense}, stats)
    found = read(stats.snapshot({}))
    assert found[("outwake_agent_cost_usd_total",)] == 0
    assert found[("outwake_agent_tokens_total", "input")] == 0


def test_what_is_served_begins_at_zero() -> None:
    """Else Prometheus would not see the first fence as a rise."""
    stats = Stats()
    stats.topics = ["t"]
    found = read(stats.snapshot({}))
    assert {found[("outwake_worker_attempts_total", "t", outcome)] for outcome in OUTCOMES} == {0}
