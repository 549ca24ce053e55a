"""What a worker counts, and how Prometheus sees it.

Counting happens for every row, so it is only a few additions on plain lists. Prometheus' own objects are made
at a scrape only.

With `--processes N`, the parent asks its children for their snapshots and shows the sum. The last snapshot of
a child that died stays in the sum, because Prometheus would take a falling counter for a restart.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
          300.0, 1800.0, 3600.0)  # fmt: skip
"""Upper bounds of the buckets, in seconds: from a wake-up to an agent's turn."""

COUNTERS: dict[str, tuple[str, list[str]]] = {
    "outwake_worker_attempts": ("Attempts ended, by how.", ["topic", "outcome"]),
    "outwake_worker_rescued": ("Workers whose rows this one rescued.", []),
    "outwake_worker_wakeups": ("Scans for rows, by what caused them.", ["cause"]),
    "outwake_worker_wakeups_in_vain": ("Those that found no row.", ["cause"]),
    "outwake_worker_repeated_scans": (
        "Scans repeated while another transaction's row or writes could not be seen.",
        [],
    ),
    "outwake_worker_connects": ("Times the LISTEN connection was made.", []),
    "outwake_worker_leases_lost": ("Times the lease ended while rows ran.", []),
}
GAUGES = {
    "outwake_worker_listen_connected": "Worker processes whose LISTEN connection is open.",
    "outwake_worker_processes": "Worker processes behind this port.",
    "outwake_worker_parked": "Worker processes that sleep until they are notified.",
    "outwake_worker_running": "Rows that run now.",
    "outwake_worker_slots": "Rows that may run at once.",
}
HISTOGRAMS = {
    "outwake_worker_wait_seconds": "From when a row fell due to its claim.",
    "outwake_worker_run_seconds": "From a row's claim to the end of its handler.",
}

OUTCOMES = ("done", "retry", "dead", "cancelled", "handed_back", "fenced")
CAUSES = ("notify", "deadline", "backup", "reconnect")

_ATTEMPTS = "outwake_worker_attempts"
_WAKEUPS = ("outwake_worker_wakeups", "outwake_worker_wakeups_in_vain")
_ZEROS: dict[tuple[str, ...], float] = {}  # samples of declared counters
Snapshot = dict[str, list[Any]]
"""For each metric's name, a list of [labels, value]. A histogram's value is [counts, sum]. It is JSON."""


class _Times:
    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


class Stats:
    """The counts of this process."""

    def __init__(self) -> None:
        self.topics: list[str] = []
        """The topics served. Their counters begin at 0, so that Prometheus sees the first event as a rise."""
        self._counters: Counter[tuple[str, ...]] = Counter()
        self._waits: dict[str, _Times] = {}
        self._runs: dict[str, _Times] = {}
        self._cause: str | None = None

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to one of COUNTERS, or to a declared one."""
        self._counters[(name, *labels)] += by  # type: ignore[assignment]  # may count fractions

    def claimed(self, rows: Iterable[tuple[str, float]]) -> None:
        """A claim brought these rows, each as (topic, seconds since it fell due)."""
        for topic, seconds in rows:
            if (times := self._waits.get(topic)) is None:
                times = self._waits[topic] = _Times()
            times.add(seconds if seconds > 0 else 0.0)

    def ran(self, topic: str, seconds: float) -> None:
        """A handler ended."""
        if (times := self._runs.get(topic)) is None:
            times = self._runs[topic] = _Times()
        times.add(seconds)

    def woken(self, cause: str) -> None:
        """A scan was caused by one of CAUSES. Until the scan is over, only the first cause counts."""
        if self._cause is None:
            self._cause = cause
            self.count("outwake_worker_wakeups", cause)

    def scanned(self, found: int) -> None:
        """That scan is over."""
        if self._cause is not None:
            if found == 0:
                self.count("outwake_worker_wakeups_in_vain", self._cause)
            self._cause = None

    def snapshot(self, gauges: Mapping[str, float]) -> Snapshot:
        """All counters, with the current values of GAUGES."""
        result: Snapshot = {name: [[[], value]] for name, value in gauges.items()}
        for (name, *labels), value in {**self._zeros(), **self._counters}.items():
            result.setdefault(name, []).append([labels, value])
        for name, by_topic in zip(HISTOGRAMS, (self._waits, self._runs), strict=True):
            result[name] = [[[topic], [list(times.counts), times.total]] for topic, times in by_topic.items()]
        return result

    def _zeros(self) -> dict[tuple[str, ...], float]:
        attempts = ((_ATTEMPTS, topic, outcome) for topic in self.topics for outcome in OUTCOMES)
        wakeups = ((name, cause) for name in _WAKEUPS for cause in CAUSES)
        return dict.fromkeys((*attempts, *wakeups, *_ZEROS), 0.0)


STATS = Stats()
"""The counters of this process; a process has one worker."""


def declare(name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> None:
    """Add a counter that handlers count. It is shown at zero for each of the values of its label."""
    COUNTERS[name] = (text, [label] if label else [])
    _ZEROS.update(((name, value), 0.0) for value in values)


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of several processes' snapshots."""
    sums: dict[str, dict[tuple[str, ...], Any]] = {}
    for snapshot in snapshots:
        for name, samples in snapshot.items():
            into = sums.setdefault(name, {})
            for labels, value in samples:
                key = tuple(labels)
                if name not in HISTOGRAMS:
                    into[key] = into.get(key, 0) + value
                elif key in into:
                    counts, total = into[key]
                    into[key] = [[a + b for a, b in zip(counts, value[0], strict=True)], total + value[1]]
                else:
                    into[key] = value
    return {name: [[list(key), value] for key, value in by.items()] for name, by in sums.items()}


def without_gauges(snapshot: Snapshot) -> Snapshot:
    """The part of a dead process's snapshot that still counts."""
    return {name: samples for name, samples in snapshot.items() if name not in GAUGES}


def families(snapshot: Snapshot) -> list[Metric]:
    """A snapshot as Prometheus' metrics. A counter without labels exists from the start."""
    result: list[Metric] = []
    for name, (text, labels) in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=labels)
        for values, value in snapshot.get(name, [] if labels else [[[], 0]]):
            counter.add_metric(values, value)
        result.append(counter)
    for name, text in GAUGES.items():
        gauge = GaugeMetricFamily(name, text)
        for values, value in snapshot.get(name, []):
            gauge.add_metric(values, value)
        result.append(gauge)
    for name, text in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(name, text, labels=["topic"])
        for values, (counts, total) in snapshot.get(name, []):
            histogram.add_metric(values, _buckets(counts), total)
        result.append(histogram)
    return result


def _buckets(counts: list[int]) -> list[tuple[str, float]]:
    """Cumulative counts, as Prometheus expects them."""
    bounds = [*(str(bound) for bound in BOUNDS), "+Inf"]
    total, buckets = 0, []
    for bound, count in zip(bounds, counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
