"""From the soak's result: a summary line, a plot over time, docs/soak.md or docs/held.md."""

from pathlib import Path
from statistics import linear_regression, median
from typing import Any

DOCS = Path("docs")


def report(result: dict[str, Any]) -> None:
    name, figures = ("held", _held(result)) if result["held"] else ("soak", _soak(result))
    print(name, " ".join(f"{key} {value}" for key, value in figures.items()), flush=True)
    if _plot(result, name):
        (DOCS / f"{name}.md").write_text(_page(result, name, figures))


def _soak(result: dict[str, Any]) -> dict[str, Any]:
    """The first and the last ten minutes, those left out in which nothing was pruned yet."""
    calm = result["minutes_seen"][-(-result["retention_s"] // 60) :] or result["minutes_seen"]
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
    p99s = [m["p99_ms"] or 0 for m in result["minutes_seen"]]
    found["p99_ms"], found["p99_worst_minute_ms"] = round(median(p99s), 1), max(p99s)
    found["minutes_above_twice_p99"] = sum(p99 > 2 * median(p99s) for p99 in p99s)
    for key in ("used", "others"):
        found[key] = median(m[key] for m in result["minutes_seen"])
    found["others_worst_minute"] = max(m["others"] for m in result["minutes_seen"])
    for key in ("p50_ms", "p99_ms", "table_mb", "index_mb", "worker_mb"):
        found |= ends(key)
    if "done" in result:
        made = result["produced"]
        found |= {"rows": made, "lost": made - result["done"], "left": result["left"], "odd": result["odd"]}
        found["unaccounted"] = result["last_id"] - result["pruned"] - result["kept"]
        found["skipped"] = result["minutes_seen"][-1]["skipped"]
    return found


def _held(result: dict[str, Any]) -> dict[str, Any]:
    """Bursts before, while and after; the slope is of a line through those while, in percent of before."""
    by_phase: dict[str, list[dict[str, Any]]] = {"before": [], "held": [], "after": []}
    for burst in result["bursts"]:
        by_phase.get(burst["phase"], []).append(burst)
    held, after = by_phase["held"], by_phase["after"]
    before = median(b["per_s"] for b in by_phase["before"])
    cpu_before = median(b["cpu_us"] for b in by_phase["before"])
    found: dict[str, Any] = {
        "minutes": result["held"],
        "load": result["rate_per_s"],
        "before_per_s": round(before),
        "before_cpu_us": round(cpu_before, 1),
    }

    def ratio(name: str, bursts: list[dict[str, Any]]) -> None:
        if bursts:
            found[f"{name}_ratio"] = round(median(b["per_s"] for b in bursts) / before, 3)
            found[f"{name}_ratio_cpu"] = round(cpu_before / median(b["cpu_us"] for b in bursts), 3)

    ratio("held_end", held[-3:])
    if len(held) > 1:
        ratio("held_worst_minute", [min(held, key=lambda b: b["per_s"])])
        times = [b["at_s"] / 600 for b in held]
        slope = linear_regression(times, [b["per_s"] / before * 100 for b in held]).slope
        found["slope_percent_per_10min"] = round(slope, 1)
    if after:
        first = after[0]["at_s"]
        for minute in range(5):
            ratio(
                f"after_minute_{minute + 1}", [b for b in after if 0 <= b["at_s"] - first - 60 * minute < 59]
            )
    for name, minutes in (
        ("before", [m for m in result["minutes_seen"] if not m["held"]][:3]),
        ("held", [m for m in result["minutes_seen"] if m["held"]]),
    ):
        for key in ("p50_ms", "p99_ms"):
            values = [m[key] for m in minutes if m[key] is not None]
            if values:
                found[f"{name}_{key}"] = round(median(values), 1)
                found[f"{name}_worst_{key}"] = round(max(values), 1)
    if "done" in result:
        found |= {"rows": result["produced"], "left": result["left"], "odd_of_a_tenth": result["odd"]}
        found["unaccounted"] = result["last_id"] - result["pruned"] - result["kept"]
    return found


_NOTES = {
    "soak": "Latency is from when a row was due to its claim; `p99_ms` is the median of the minutes' p99. "
    "`first` and `last`: medians of ten minutes, those before the first rows were pruned left out. `used`, "
    "`others`: the share of the cores' time that the soak and its server, and that other processes used. "
    "`lost`: rows inserted but never seen done; `odd`: rows seen in another end than done, or with a second "
    "attempt; `unaccounted`: ids that were given, less the rows that prune said it deleted, less those that "
    "are there; `skipped`: rows that the producer did not insert, as 50,000 waited.",
    "held": "Ratios are to the median of the nine bursts before: `held_end` of the last three minutes of "
    "the hold, `after_minute_N` of three bursts in that minute after its end. `ratio_cpu`: of the "
    "CPU time that the worker and its session used for a row, before divided by then: what "
    "neighbours do to the rate is not in it. Latencies: median and worst of the minutes. `left`: "
    "not done in the end; `unaccounted`: ids that were given, less the rows that prune said it "
    "deleted, less those that are there; `odd`: of every tenth row, those seen in another end "
    "than done, or with a second attempt.",
}


def _page(result: dict[str, Any], name: str, figures: dict[str, Any]) -> str:
    title, target = ("A snapshot that is held", "bench-held") if name == "held" else ("Soak", "bench-soak")
    lines = [
        f"# {title}",
        "",
        f"Written by `make {target}`; do not edit. How: the head of [bench/soak.py](../bench/soak.py).",
        "",
        f"{result['at']} UTC, PostgreSQL {result['server']}; server, worker and producer share"
        f" {result['cores']} core(s). Load: {result['rate_per_s']} rows/s, {result['share']:.0%} of the"
        f" {result['sustained_per_s']} rows/s that the three together sustain (a burst of 20,000 rows drains"
        f" at {result['peak_per_s']} rows/s). Rows are kept for {result['retention_s']} s.",
    ]
    if result["held"]:
        lines.append(f"A foreign transaction held its snapshot for {result['held']} minutes.")
    lines += ["", f"![{title}](benchmarks/{name}.svg)", "", "| figure | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in figures.items()]
    lines += ["", _NOTES[name]]
    return "\n".join(lines) + "\n"


def _plot(result: dict[str, Any], name: str) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "outwake"
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
        if held := [m["at_s"] / 60 for m in minutes if m["held"]]:
            axes.axvspan(held[0] - 1, held[-1], color="#f2e8cf", label="snapshot held")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    plot = DOCS / f"benchmarks/{name}.svg"
    plot.parent.mkdir(exist_ok=True)
    fig.savefig(plot, metadata={"Date": None})
    pyplot.close(fig)
    return True
