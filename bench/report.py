"""From the result: `ratio NAME VALUE` lines, and docs/benchmarks.md with its plots."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.contestant import ROOT
from bench.plots import plot
from bench.result import GOALS, Part, Parts, Seen, Table, measured, once, ratios, tables

DOCS = ROOT / "docs"


class Figure(NamedTuple):
    """How a figure is shown. Best first; ratios are to the row `beside`, or the first that starts so."""

    title: str
    beside: str = "outwake"
    less_is_better: bool = False


FIGURES = {
    "start_p50_ms": Figure("Commit to handler start, p50, ms", "outwake c10", True),
    "start_p99_ms": Figure("Commit to handler start, p99, ms", "outwake c10", True),
    "drain1_per_s": Figure("Jobs a second, one worker process, started beside a full queue"),
    "drain1_warm_per_s": Figure("Jobs a second, one worker process, warm"),
    "drain2_per_s": Figure("Jobs a second, two worker processes, started beside a full queue"),
    "drain2_warm_per_s": Figure("Jobs a second, two worker processes, warm"),
    "enqueue8_per_s": Figure("Inserts a second by pgbench, 8 connections", "no trigger"),
    "enqueue32_per_s": Figure("Inserts a second by pgbench, 32 connections", "no trigger"),
    "library8_per_s": Figure("Inserts a second by the library, 8 connections", "no trigger"),
    "library32_per_s": Figure("Inserts a second by the library, 32 connections", "no trigger"),
    "post_sessions_per_s": Figure("POST /sessions a second, one API process", "bare"),
    "post_sessions_cpu_us": Figure("CPU time of the API for a POST /sessions, us", "bare", True),
    "claim_ms": Figure("One claim of 10 rows, ms", "10 finished", True),
    "workers10_per_s": Figure("Jobs a second, 10 worker processes of 10 slots"),
    "workers50_per_s": Figure("Jobs a second, 50 worker processes of 10 slots"),
    "workers10_in_vain_per_row": Figure(
        "Wake-ups in vain for a row, 10 processes asleep", less_is_better=True
    ),
    "workers50_in_vain_per_row": Figure(
        "Wake-ups in vain for a row, 50 processes asleep", less_is_better=True
    ),
}


def lines(parts: Parts) -> Iterator[str]:
    """For whoever, or whatever, reads the terminal."""
    for name, value in ratios(parts).items():
        yield f"ratio {name} {value:.2f}"
    if idle := once(parts).get("idle"):
        yield f"idle queries {idle['queries']} cpu_s {idle['cpu_s']} rss_mb {idle['rss_mb']}"
    if found := once(parts).get("streams"):
        yield " ".join(["streams", *(f"{name} {value}" for name, value in found.items())])


def write(parts: Parts, docs: Path) -> None:
    """The page and its plots, below this directory."""
    all_tables = tables(parts)
    shown = {name: _sorted(all_tables[name], f) for name, f in FIGURES.items() if name in all_tables}
    plots = {}
    for name, table in shown.items():
        target = docs / "benchmarks" / f"{name}.svg"
        if len(table) > 1 and plot(target, FIGURES[name].title, table):
            plots[name] = f"benchmarks/{target.name}"
    (docs / "benchmarks.md").write_text("\n".join(_page(parts, shown, plots)) + "\n")


def _sorted(table: Table, figure: Figure) -> Table:
    best_first = sorted(table.items(), key=lambda item: item[1].value, reverse=not figure.less_is_better)
    return dict(best_first)


def _page(parts: Parts, shown: dict[str, Table], plots: dict[str, str]) -> Iterator[str]:
    yield from (
        "# Benchmarks",
        "",
        "Written by `make bench` (`python -m bench report` writes it again from the result); do not edit. "
        "What is measured, how, and what differs between the systems: [bench/README.md](../bench/README.md). "
        "Where the time goes: [profile.md](profile.md). A load for an hour: [soak.md](soak.md). A foreign "
        "snapshot held for half an hour: [held.md](held.md).",
    )
    yield from _goals(parts)
    yield from _once(parts)
    for name, table in shown.items():
        yield from _section(FIGURES[name], table, plots.get(name))
    yield from _provenance(parts)


def _goals(parts: Parts) -> Iterator[str]:
    found = measured(parts)
    yield from ("", "## Goals", "", "| figure | measured | goal | reached |", "|---|---|---|---|")
    for name, goal in GOALS.items():
        if name in found:
            reached = "yes" if goal.reached(found[name]) else "**no**"
            yield f"| {name} | {_number(found[name])} | {goal} | {reached} |"
    others = [f"{name} {_number(value)}" for name, value in ratios(parts).items() if name not in GOALS]
    if others:
        yield from ("", f"Without a goal: {', '.join(others)}.")


def _once(parts: Parts) -> Iterator[str]:
    values = once(parts)
    if idle := values.get("idle"):
        yield from (
            "",
            f"An idle worker sent {idle['queries']} queries in {idle['seconds']:.0f} s, "
            f"used {idle['cpu_s']} s of CPU time, and held {idle['rss_mb']} MB.",
        )
    if found := values.get("streams"):
        yield from (
            "",
            f"{found['count']} event streams of one API process, {found['messages_per_s']} messages a second "
            f"in all: {found['lost']} lost, {found['twice']} delivered twice, from commit to arrival "
            f"{found['p50_ms']} ms (p50) and {found['p99_ms']} ms (p99); {found['cpu_us_per_message']} us of "
            f"the API's CPU time a message, {found['kb_per_stream']} kB a stream, "
            f"{found['listen_connections']} LISTEN connection.",
        )
    for name, phases in values.items():
        if name.startswith("held "):
            yield from (
                "",
                f"Jobs a second around a held snapshot, {name[5:]}: before {phases['before_per_s']:.0f}, "
                f"while held {phases['held_first_per_s']:.0f} falling to {phases['held_last_per_s']:.0f}, "
                f"after it {phases['after_per_s']:.0f}.",
            )


def _section(figure: Figure, table: Table, plot: str | None) -> Iterator[str]:
    yield from ("", f"## {figure.title}", "")
    reference = table.get(figure.beside) or next(
        (seen for name, seen in table.items() if name.startswith(figure.beside)), None
    )
    yield f"| | median | least to greatest | ÷ {figure.beside} |"
    yield "|---|---|---|---|"
    for name, seen in table.items():
        ratio = f"{seen.value / reference.value:.2f}" if reference and reference.value else ""
        yield f"| {name} | {_number(seen.value)} | {_span(seen)} | {ratio} |"
    if plot:
        yield from ("", f"![{figure.title}]({plot})")


def _span(seen: Seen) -> str:
    if seen.least == seen.greatest:
        return _number(seen.least)
    return f"{_number(seen.least)} to {_number(seen.greatest)}"


def _provenance(parts: Parts) -> Iterator[str]:
    """Which part was measured when, where and by what."""
    yield from ("", "## When, where and how", "", "| part | UTC | commit | command |", "|---|---|---|---|")
    for name, part in ((name, parts[name]) for name in _MATTERS if name in parts):
        yield f"| {name} | {part['at']} | {part['commit']} | `{_command(name, part['arguments'])}` |"
    yield ""
    yield from _unique(parts, _where)
    failed = [
        f"- {name}: {text}".replace("\n", " ") for name, part in parts.items() for text in part["failed"]
    ]
    if failed:
        yield from ("", "Failed, and so missing above or with fewer rounds:", "", *failed)


def _command(part: str, arguments: dict[str, Any]) -> str:
    options = [("only", part), *((option, arguments[option]) for option in _MATTERS[part])]
    if some := arguments.get("contestants"):
        options.append(("contestants", f'"{",".join(some)}"'))
    return f"python -m bench {arguments['extent']}" + "".join(
        f" --{name.replace('_', '-')} {value}" for name, value in options
    )


_INSERTS = ("rounds", "seconds")
_DRAIN = ("rounds", "rows", "again")
_MATTERS = {
    "latency": ("rounds", "samples"),
    "drain1": _DRAIN,
    "drain2": _DRAIN,
    "enqueue": _INSERTS,
    "library": _INSERTS,
    "http": _INSERTS,
    "workers": ("rounds", "rows"),
    "claim": ("finished",),
    "idle": ("idle",),
    "streams": ("streams", "stream_seconds"),
    "held": ("held",),
}
"""The options that a part heeds."""


def _unique(parts: Parts, say: Callable[[Part], str]) -> list[str]:
    return list(dict.fromkeys(say(part) for part in parts.values()))


def _where(part: Part) -> str:
    machine, server = part["machine"], part["server"]
    return (
        f"{machine['cores']} cores for server, workers and load, {machine['system']}, "
        f"Python {machine['python']}; PostgreSQL {server['version']} with shared_buffers = "
        f"{server['shared_buffers']}, max_wal_size = {server['max_wal_size']}, all else default."
    )


def _number(value: float) -> str:
    if float(value).is_integer() or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}"
