"""From the result: JSON, `ratio NAME VALUE` lines, docs/benchmarks.md, and plots if there is matplotlib."""

import json
from pathlib import Path
from statistics import median
from typing import Any

DOCS = Path("docs")
Table = dict[str, list[float]]

GOALS = {
    "start_p50_vs_floor": "≤ 1.15",
    "start_p99_vs_floor": "≤ 1.15",
    "drain1_vs_best_peer": "≥ 1.2",
    "drain1_vs_floor": "≥ 1.0",
    "drain2_vs_best_peer": "≥ 1.2",
    "enqueue8_vs_plain_insert": "≥ 0.9",
    "enqueue32_vs_plain_insert": "≥ 0.9",
    "post_sessions_vs_bare_route": "≥ 0.8",
    "claim_10m_done_vs_empty": "≤ 1.3",
    "claim_1m_ready_vs_empty": "≤ 1.3",
    "workers50_vs_10": "≥ 1.0",
}


def write(result: dict[str, Any], path: Path) -> None:
    ratios = result["ratios"] = _ratios(result["figures"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    for name, value in ratios.items():
        print(f"ratio {name} {value:.2f}")
    if idle := result["once"].get("idle"):
        print(f"idle queries {idle['queries']} cpu_s {idle['cpu_s']} rss_mb {idle['rss_mb']}")
    if found := result["once"].get("streams"):
        print("streams", *(f"{name} {value}" for name, value in found.items()))
    if result["arguments"]["extent"] == "all":
        (DOCS / "benchmarks.md").write_text(_page(result, _plots(result["figures"])))


def _of(table: Table, name: str) -> float | None:
    return median(table[name]) if table.get(name) else None


def _best(table: Table, prefix: tuple[str, ...], *, least: bool = False) -> float | None:
    values = [median(v) for name, v in table.items() if v and name.startswith(prefix)]
    return (min if least else max)(values) if values else None


PEERS = ("procrastinate", "pgqueuer", "oban", "dbos", "graphile", "pgboss")


def _ratios(figures: dict[str, Table]) -> dict[str, float]:
    """Of medians over the rounds. Sendoff at its best setting, as the peers; latency at its default."""

    def of(figure: str) -> Table:
        return figures.get(figure, {})

    found = {}

    def add(name: str, one: float | None, other: float | None) -> None:
        if one is not None and other:
            found[name] = one / other

    for p in ("p50", "p99"):
        table = of(f"start_{p}_ms")
        add(f"start_{p}_vs_floor", _of(table, "sendoff c10"), _of(table, "floor b10"))
        add(f"start_{p}_vs_best_peer", _of(table, "sendoff c10"), _best(table, PEERS, least=True))
    for n in (1, 2):
        table = of(f"drain{n}_per_s")
        mine = _best(table, ("sendoff",))
        add(f"drain{n}_vs_best_peer", mine, _best(table, PEERS))
        add(f"drain{n}_vs_floor", mine, _of(table, "floor b100"))
    for clients in (8, 32):
        table = of(f"enqueue{clients}_per_s")
        plain = _of(table, "sendoff, plain")
        add(f"enqueue{clients}_vs_plain_insert", _of(table, "sendoff, busy"), plain)
        add(f"enqueue{clients}_working_vs_plain_insert", _of(table, "sendoff, working"), plain)
        add(f"enqueue{clients}_always_notifying_vs_plain_insert", _of(table, "sendoff, always"), plain)
        add(f"enqueue{clients}_working_vs_best_peer", _of(table, "sendoff, working"), _best(table, PEERS))
        table = of(f"library{clients}_per_s")
        plain = _of(table, "sendoff, plain")
        add(f"library{clients}_vs_plain_insert", _of(table, "sendoff, busy"), plain)
        add(f"library{clients}_working_vs_plain_insert", _of(table, "sendoff, working"), plain)
        add(f"library{clients}_vs_best_peer", _of(table, "sendoff, working"), _best(table, PEERS))
    table = of("post_sessions_per_s")
    add("post_sessions_vs_bare_route", _of(table, "bearer"), _of(table, "bare"))
    for name in ("development", "api token"):
        add(f"post_sessions_{name.replace(' ', '_')}_vs_bare_route", _of(table, name), _of(table, "bare"))
    table = of("claim_ms")
    finished = [name for name in table if name.endswith("finished")]
    ready = [name for name in table if name.endswith("ready")]
    if finished:
        add("claim_10m_done_vs_empty", _of(table, finished[-1]), _of(table, finished[0]))
    if ready:
        add("claim_1m_ready_vs_empty", _of(table, ready[-1]), _of(table, finished[0]))
    add(
        "workers50_vs_10",
        _of(of("workers50_per_s"), "sendoff c10"),
        _of(of("workers10_per_s"), "sendoff c10"),
    )
    return found


TITLES = {
    "start_p50_ms": "Commit to handler start, p50, ms (one idle worker)",
    "start_p99_ms": "Commit to handler start, p99, ms (one idle worker)",
    "drain1_per_s": "Jobs drained a second, one worker process",
    "drain2_per_s": "Jobs drained a second, two worker processes",
    "enqueue8_per_s": "Inserts a second, 8 connections",
    "enqueue32_per_s": "Inserts a second, 32 connections",
    "library8_per_s": "Inserts a second by the system's own library, 8 connections",
    "library32_per_s": "Inserts a second by the system's own library, 32 connections",
    "post_sessions_per_s": "POST /sessions a second, one API process",
    "post_sessions_cpu_us": "CPU time of the API for a POST /sessions, us",
    "claim_ms": "One claim of 10 rows, ms",
    "workers10_per_s": "Jobs drained a second, 10 worker processes of 10 slots",
    "workers50_per_s": "Jobs drained a second, 50 worker processes of 10 slots",
    "workers10_in_vain_per_row": "Wake-ups in vain for a row, 10 processes asleep",
    "workers50_in_vain_per_row": "Wake-ups in vain for a row, 50 processes asleep",
}


def _page(result: dict[str, Any], plots: dict[str, str]) -> str:
    machine, server, arguments = result["machine"], result["server"], result["arguments"]
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; do not edit. How: [bench/README.md](../bench/README.md).",
        "",
        f"{result['at']} UTC, {machine['cores']} cores, {machine['system']}, Python {machine['python']}, "
        f"PostgreSQL {server['version']} with shared_buffers = {server['shared_buffers']}, all else default; "
        f"{arguments['rounds']} rounds, interleaved. Medians, and in brackets the least and the greatest.",
        "",
        "## Ratios",
        "",
        "| ratio | measured | goal |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {v:.2f} | {GOALS.get(n, '')} |" for n, v in result["ratios"].items()]
    if idle := result["once"].get("idle"):
        lines += [
            "",
            f"An idle worker sent {idle['queries']} queries in {idle['seconds']:.0f} s, "
            f"used {idle['cpu_s']} s of CPU time, and held {idle['rss_mb']} MB.",
        ]
    if found := result["once"].get("streams"):
        lines += [
            "",
            f"{found['count']} event streams, {found['messages_per_s']} messages a second in all: "
            f"{found['lost']} lost, {found['twice']} delivered twice, from commit to arrival "
            f"{found['p50_ms']} ms (p50) and {found['p99_ms']} ms (p99); {found['cpu_us_per_message']} us of "
            f"the API's CPU time a message, {found['kb_per_stream']} kB a stream, "
            f"{found['listen_connections']} LISTEN connection.",
        ]
    for name, phases in result["once"].items():
        if name.startswith("held "):
            lines += [
                "",
                f"Jobs a second around a held snapshot, {name[5:]}: before {phases['before_per_s']:.0f}, "
                f"while held {phases['held_first_per_s']:.0f} falling to {phases['held_last_per_s']:.0f}, "
                f"after it {phases['after_per_s']:.0f}.",
            ]
    for figure, table in result["figures"].items():
        if not table:
            continue
        lines += ["", f"## {TITLES.get(figure, figure)}", "", "| | median | range |", "|---|---|---|"]
        ascending = figure.endswith(("_ms", "_us"))
        for name, values in sorted(table.items(), key=lambda item: median(item[1]), reverse=not ascending):
            lines.append(
                f"| {name} | {_number(median(values))} | {_number(min(values))} to {_number(max(values))} |"
            )
        if figure in plots:
            lines += ["", f"![{TITLES.get(figure, figure)}]({plots[figure]})"]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _plots(figures: dict[str, Table]) -> dict[str, str]:
    try:
        import matplotlib
    except ImportError:
        return {}
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sendoff"
    from matplotlib import pyplot

    made = {}
    directory = DOCS / "benchmarks"
    directory.mkdir(exist_ok=True)
    for figure, table in figures.items():
        if figure not in TITLES or not table:
            continue
        rows = sorted(table.items(), key=lambda item: median(item[1]))
        middles = [median(values) for _, values in rows]
        error = [
            [m - min(values) for m, (_, values) in zip(middles, rows, strict=True)],
            [max(values) - m for m, (_, values) in zip(middles, rows, strict=True)],
        ]
        colours = ["#2a6f97" if n.startswith("sendoff") else "#999999" for n, _ in rows]
        fig, axes = pyplot.subplots(figsize=(7, 0.6 + 0.32 * len(rows)), layout="constrained")
        axes.barh([name for name, _ in rows], middles, xerr=error, color=colours)
        axes.set_title(TITLES[figure], fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        target = directory / f"{figure}.svg"
        fig.savefig(target, metadata={"Date": None})
        pyplot.close(fig)
        made[figure] = f"benchmarks/{target.name}"
    return made
