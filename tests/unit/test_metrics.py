"""What a worker counts: buckets, sums over processes, and an agent's own account."""

import pytest

from outwake.session.events import Result, Tokens
from outwake.telemetry.metrics import render
from outwake.worker.agents.usage import count_usage, declare_usage
from outwake.worker.engine.metrics import (
    BOUNDS,
    OUTCOMES,
    Snapshot,
    Stats,
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
        stats.scanned(rows)
    found = read(stats.snapshot({}))
    assert found[("outwake_worker_wakeups_total", "notify")] == 1
    assert found[("outwake_worker_wakeups_total", "deadline")] == 1
    assert found[("outwake_worker_wakeups_in_vain_total", "deadline")] == 1
    assert found[("outwake_worker_wakeups_in_vain_total", "notify")] == 0


def test_what_an_agent_used() -> None:
    declare_usage()
    stats = Stats()
    tokens = Tokens(input=12, output=50, cache_read=4000, cache_write=300)
    for error in (None, "no such model"):
        count_usage(Result(error=error, cost=0.25, tokens=tokens), stats)
    count_usage(Result(), stats)  # a result that says nothing
    found = read(stats.snapshot({}))
    assert found[("outwake_agent_cost_usd_total",)] == 0.5
    counts = {
        kind: found[("outwake_agent_tokens_total", kind)]
        for kind in ("input", "output", "cache_read", "cache_write")
    }
    assert counts == {"input": 24, "output": 100, "cache_read": 8000, "cache_write": 600}
    assert found[("outwake_agent_turns_total", "failed")] == 1
    assert found[("outwake_agent_turns_total", "succeeded")] == 2


def test_what_is_served_begins_at_zero() -> None:
    """Else Prometheus would not see the first fence as a rise."""
    stats = Stats()
    stats.topics = ["t"]
    found = read(stats.snapshot({}))
    assert {found[("outwake_worker_attempts_total", "t", outcome)] for outcome in OUTCOMES} == {0}
