"""What was measured: parts, kept in one file whenever each was run; medians, ratios and the goals."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypedDict

Rounds = list[float] | list[list[float]]
"""A value a round, or, for what is in SAMPLED, all samples of each round."""
Figures = dict[str, dict[str, Rounds]]
"""By figure, by contestant."""


class Part(TypedDict):
    """One part of the benchmark, as `--only` names it, with what is needed to run it again."""

    at: str
    commit: str
    arguments: dict[str, Any]
    machine: dict[str, Any]
    server: dict[str, Any]
    figures: Figures
    once: dict[str, dict[str, float]]
    """What is measured once, under its own name."""
    failed: list[str]


Parts = dict[str, Part]


class Seen(NamedTuple):
    """Of a figure: the median, the least and the greatest of the rounds."""

    value: float
    least: float
    greatest: float


Table = dict[str, Seen]
Tables = dict[str, Table]

SAMPLED = {
    "start_ms": {"start_p50_ms": 0.5, "start_p99_ms": 0.99},
    "claim_ms": {"claim_ms": 0.5},
}
"""Their samples are pooled over the rounds: the p99 of a round of 100 would be its second worst."""

PEERS = ("procrastinate", "pgqueuer", "oban", "dbos", "graphile", "pgboss")
FASTEST = ("outwake c1000", "floor b100", "graphile best")
"""Each side's best setting. Graphile-worker has been the best peer in every run of all."""


def load(path: Path) -> Parts:
    """The parts that were measured so far."""
    if not path.exists():
        return {}
    found: Parts = json.loads(path.read_text()).get("parts", {})
    return found


def save(path: Path, new: Parts) -> Parts:
    """Put these parts in the place of the earlier ones of the same name; all that are there now."""
    parts = {**load(path), **new}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")  # a run that is ended now leaves the old result whole
    beside.write_text(json.dumps({"ratios": ratios(parts), "parts": parts}, indent=1))
    beside.rename(path)
    return parts


def tables(parts: Parts) -> Tables:
    """Every figure's table, contestants in the order in which they came."""
    found: Tables = {}
    for part in parts.values():
        for figure, by_name in part["figures"].items():
            for name, share in SAMPLED.get(figure, {figure: None}).items():
                table = {who: _seen(rounds, share) for who, rounds in by_name.items() if rounds}
                found.setdefault(name, {}).update(table)
    return found


def _seen(rounds: Rounds, share: float | None) -> Seen:
    if share is None:
        values = [value for value in rounds if isinstance(value, (int, float))]
        return Seen(median(values), min(values), max(values))
    samples = [samples for samples in rounds if isinstance(samples, list)]
    each = [percentile(one, share) for one in samples]
    return Seen(percentile([value for one in samples for value in one], share), min(each), max(each))


def percentile(samples: Iterable[float], share: float) -> float:
    """By nearest rank: no sample that was not taken."""
    ordered = sorted(samples)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def once(parts: Parts) -> dict[str, dict[str, float]]:
    """What was measured once, by its name."""
    return {name: values for part in parts.values() for name, values in part["once"].items()}


# Ratios


class _Ratios(dict[str, float]):
    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def of(self, figure: str, who: str) -> float | None:
        seen = self.tables.get(figure, {}).get(who)
        return seen.value if seen else None

    def best(self, figure: str, who: tuple[str, ...], *, least: bool = False) -> float | None:
        values = [s.value for name, s in self.tables.get(figure, {}).items() if name.startswith(who)]
        return (min if least else max)(values) if values else None

    def add(self, name: str, one: float | None, other: float | None) -> None:
        if one is not None and other:
            self[name] = one / other


def ratios(parts: Parts) -> dict[str, float]:
    """Of medians over the rounds. Outwake at its best setting, as the peers; latency at its default."""
    found = _Ratios(tables(parts))
    _starts(found)
    _drains(found)
    _inserts(found)
    _sessions(found)
    _claims(found)
    at_10, at_50 = (found.of(f"workers{n}_per_s", "outwake c10") for n in (10, 50))
    found.add("workers50_vs_10", at_50, at_10)
    return dict(found)


def _starts(found: _Ratios) -> None:
    for p in ("p50", "p99"):
        mine = found.of(f"start_{p}_ms", "outwake c10")
        found.add(f"start_{p}_vs_floor", mine, found.of(f"start_{p}_ms", "floor b10"))
        found.add(f"start_{p}_vs_best_peer", mine, found.best(f"start_{p}_ms", PEERS, least=True))


def _drains(found: _Ratios) -> None:
    for drain in ("drain1", "drain2", "drain1_warm", "drain2_warm"):
        figure = f"{drain}_per_s"
        mine = found.best(figure, ("outwake",))
        found.add(f"{drain}_vs_best_peer", mine, found.best(figure, PEERS))
        found.add(f"{drain}_vs_floor", mine, found.of(figure, "floor b100"))


def _inserts(found: _Ratios) -> None:
    for clients in (8, 32):
        for kind, plain in (("enqueue", "vs_plain_insert"), ("library", "vs_plain")):
            figure = f"{kind}{clients}_per_s"
            busy, working = (found.of(figure, f"outwake, {mode}") for mode in ("busy", "working"))
            without = found.of(figure, "no trigger")
            found.add(f"{kind}{clients}_{plain}", busy, without)
            found.add(f"{kind}{clients}_vs_by_hand", busy, found.of(figure, "by hand, no trigger"))
            found.add(f"{kind}{clients}_working_{plain}", working, without)
            found.add(
                f"{kind}{clients}_always_notifying_{plain}", found.of(figure, "always notifying"), without
            )
            best = "working_vs_best_peer" if kind == "enqueue" else "vs_best_peer"
            found.add(f"{kind}{clients}_{best}", working, found.best(figure, PEERS))


def _sessions(found: _Ratios) -> None:
    bare = found.of("post_sessions_per_s", "bare")
    found.add("post_sessions_vs_bare_route", found.of("post_sessions_per_s", "bearer"), bare)
    for name in ("development", "api token"):
        found.add(
            f"post_sessions_{name.replace(' ', '_')}_vs_bare_route",
            found.of("post_sessions_per_s", name),
            bare,
        )
    cpu = "post_sessions_cpu_us"
    found.add("post_sessions_by_cpu_vs_bare_route", found.of(cpu, "bare"), found.of(cpu, "bearer"))


def _claims(found: _Ratios) -> None:
    sizes = list(found.tables.get("claim_ms", {}))
    finished = [name for name in sizes if name.endswith("finished")]
    ready = [name for name in sizes if name.endswith("ready")]
    if finished:
        fewest = found.of("claim_ms", finished[0])
        found.add("claim_10m_done_vs_empty", found.of("claim_ms", finished[-1]), fewest)
        if ready:
            found.add("claim_1m_ready_vs_empty", found.of("claim_ms", ready[-1]), fewest)


# Goals


class Goal(NamedTuple):
    """At most or at least so much, or below it."""

    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"

    def reached(self, value: float) -> bool:
        return {"≤": value <= self.bound, "≥": value >= self.bound, "<": value < self.bound}[self.sign]


GOALS = {
    "start_p50_vs_floor": Goal("≤", 1.15),
    "start_p99_vs_floor": Goal("≤", 1.15),
    "start_p50_vs_best_peer": Goal("<", 1),
    "start_p99_vs_best_peer": Goal("<", 1),
    "drain1_vs_best_peer": Goal("≥", 1.2),
    "drain1_vs_floor": Goal("≥", 1),
    "drain2_vs_best_peer": Goal("≥", 1.2),
    "drain2_vs_floor": Goal("≥", 1),
    "enqueue8_vs_plain_insert": Goal("≥", 0.9),
    "enqueue32_vs_plain_insert": Goal("≥", 0.9),
    "enqueue8_working_vs_best_peer": Goal("≥", 2),
    "enqueue32_working_vs_best_peer": Goal("≥", 2),
    "library8_vs_plain": Goal("≥", 0.9),
    "library32_vs_plain": Goal("≥", 0.9),
    "library8_vs_best_peer": Goal("≥", 2),
    "library32_vs_best_peer": Goal("≥", 2),
    "post_sessions_vs_bare_route": Goal("≥", 0.8),
    "claim_10m_done_vs_empty": Goal("≤", 1.3),
    "claim_1m_ready_vs_empty": Goal("≤", 1.3),
    "workers50_vs_10": Goal("≥", 1),
    "streams_count": Goal("≥", 2000),
    "streams_lost": Goal("≤", 0),
    "streams_twice": Goal("≤", 0),
    "streams_listen_connections": Goal("≤", 1),
    "idle_seconds": Goal("≥", 600),
    "idle_queries": Goal("≤", 0),
    "idle_cpu_s": Goal("≤", 0.05),
    "idle_rss_mb": Goal("≤", 60),
}


def measured(parts: Parts) -> dict[str, float]:
    """All that a goal may be set for."""
    found = ratios(parts)
    for name in ("streams", "idle"):
        found |= {f"{name}_{key}": value for key, value in once(parts).get(name, {}).items()}
    return found


def collected() -> Figures:
    """Empty figures, to be filled round by round."""
    return defaultdict(lambda: defaultdict(list))
