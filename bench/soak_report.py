"""From the soak's result: summary lines, a plot over time, docs/soak.md."""

from pathlib import Path
from statistics import linear_regression, median
from typing import Any

DOCS = Path("docs")
PLOT = DOCS / "benchmarks/soak.svg"


def report(result: dict[str, Any]) -> None:
    found = {"soak": _soak(result)}
    if held := _held(result):
        found["held"] = held
    for name, figures in found.items():
        print(name, " ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
    if _plot(result):
        (DOCS / "soak.md").write_text(_page(result, found))


def _soak(result: dict[str, Any]) -> dict[str, Any]:
    """The first and the last ten minutes in which no snapshot is held, the first five left out: until then
    nothing is pruned."""
    calm = [m for m in result["minutes_seen"] if not m["held"]][5:] or result["minutes_seen"]
    first, last = calm[:10], calm[-10:]

    def ends(key: str) -> dict[str, float]:
        return {
            f"{key[:-3]}_{name}{key[-3:]}": round(median(m[key] or 0 for m in part), 1)
            for name, part in (("first", first), ("last", last))
        }

    found: dict[str, Any] = {
        "minutes": len(result["minutes_seen"]),
        "rate": result["rate_per_s"],
        "peak": result["peak_per_s"],
        "sustained": result["sustained_per_s"],
    }
    for key in ("p50_ms", "p99_ms", "table_mb", "index_mb", "worker_mb"):
        found |= ends(key)
    if "done" in result:
        made = result["produced"]
        found |= {"rows": made, "lost": made - result["done"], "left": result["left"], "odd": result["odd"]}
        found["unaccounted"] = result["last_id"] - result["pruned"] - result["kept"]
    return found


def _held(result: dict[str, Any]) -> dict[str, Any]:
    """Bursts before, while and after; the slope is of a line through those while, in percent of before."""
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for burst in result["bursts"]:
        by_phase.setdefault(burst["phase"], []).append(burst)
    held = by_phase.get("held", [])
    if len(held) < 2:
        return {}
    before = median(b["per_s"] for b in by_phase["before"])
    slope = linear_regression(
        [b["at_s"] / 600 for b in held], [b["per_s"] / before * 100 for b in held]
    ).slope
    found = {
        "before_per_s": round(before),
        "held_first_per_s": round(held[0]["per_s"]),
        "held_last_per_s": round(held[-1]["per_s"]),
        "slope_percent_per_10min": round(slope, 1),
        "ratio": round(held[-1]["per_s"] / before, 3),
    }
    if recovery := by_phase.get("recovery"):
        found["after_first_per_s"] = round(recovery[0]["per_s"])
        found["after_1min_per_s"] = round(recovery[-1]["per_s"])
        found["after_ratio"] = round(recovery[-1]["per_s"] / before, 3)
    if after := by_phase.get("after"):
        found["after_end_per_s"] = round(median(b["per_s"] for b in after))
    return found


def _page(result: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "# Soak",
        "",
        "Written by `make bench-soak`; do not edit. How: the head of [bench/soak.py](../bench/soak.py).",
        "",
        f"{result['at']} UTC, PostgreSQL {result['server']}; server, worker and producer share"
        f" {result['cores']} core(s). Load: {result['rate_per_s']} rows/s, {result['share']:.0%} of the"
        f" {result['sustained_per_s']} rows/s that the three together sustain (a burst of 20,000 rows drains"
        f" at {result['peak_per_s']} rows/s). Rows are kept for {result['retention_s']} s.",
    ]
    if result["held_from"]:
        lines.append(
            f"A foreign transaction held its snapshot from minute {result['held_from']} to"
            f" {result['held_until']}."
        )
    lines += ["", "![Soak](benchmarks/soak.svg)"]
    for name, figures in found.items():
        lines += ["", f"## {name.capitalize()}", "", "| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in figures.items()]
    lines += [
        "",
        "`first` and `last`: medians of ten minutes with no snapshot held. `lost`: rows inserted but never"
        " seen done; `odd`: rows seen in another end than done, or with a second attempt; `unaccounted`: ids"
        " that were given, less the rows that prune said it deleted, less those that are there.",
    ]
    return "\n".join(lines) + "\n"


def _plot(result: dict[str, Any]) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sendoff"
    from matplotlib import pyplot

    minutes, bursts = result["minutes_seen"], result["bursts"]
    at = [m["at_s"] / 60 for m in minutes]
    fig, (latency, rate, size) = pyplot.subplots(3, figsize=(8, 7), sharex=True, layout="constrained")
    for key, colour in (("p99_ms", "#2a6f97"), ("p50_ms", "#999999")):
        latency.semilogy(at, [m[key] for m in minutes], color=colour, label=key[:3])
    latency.set_title("Start latency, ms", fontsize=10)
    shown = [b for b in bursts if b["at_s"] >= 0 and b["phase"] not in ("warm", "peak")]
    rate.plot(
        [b["at_s"] / 60 for b in shown], [b["per_s"] for b in shown], ".-", color="#2a6f97", label="bursts"
    )
    rate.axhline(result["rate_per_s"], color="#999999", label="load")
    rate.set_title("Rows a second", fontsize=10)
    rate.set_ylim(bottom=0)
    for key, colour in (("table_mb", "#2a6f97"), ("index_mb", "#999999")):
        size.plot(at, [m[key] for m in minutes], color=colour, label=key[:5])
    size.set_title("Size, MB", fontsize=10)
    size.set_ylim(bottom=0)
    size.set_xlabel("minutes")
    for axes in (latency, rate, size):
        if result["held_from"]:
            axes.axvspan(result["held_from"], result["held_until"], color="#f2e8cf", label="snapshot held")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    PLOT.parent.mkdir(exist_ok=True)
    fig.savefig(PLOT, metadata={"Date": None})
    pyplot.close(fig)
    return True
