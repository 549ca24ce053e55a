"""A figure's plot: SVG, small, the same for the same values."""

from pathlib import Path
from typing import Any

from bench.result import Table

OUTWAKE, PEER, FLOOR = "#1f6f9f", "#8c8c8c", "#c9c9c9"
FLOORS = ("floor", "no trigger", "by hand", "bare", "always")
SPAN = 15
"""From this ratio of greatest to least on, the axis is logarithmic: a poller is a thousand times slower."""


def plot(target: Path, title: str, table: Table) -> bool:
    """False if matplotlib is not installed. The best, the first row, is on top."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "outwake", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    middles = [seen.value for seen in table.values()]
    logarithmic = min(middles) > 0 and max(middles) / min(middles) > SPAN
    fig, axes = pyplot.subplots(figsize=(7.5, 0.75 + 0.27 * len(table)), layout="constrained")
    for place, (name, seen) in enumerate(table.items()):
        _row(axes, -place, name, seen, logarithmic)
    axes.set_yticks([-place for place in range(len(table))], list(table))
    axes.tick_params(axis="y", length=0)
    axes.set_title(title + (" (logarithmic)" if logarithmic else ""), fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(s.least for s in table.values()) / 1.5, max(s.greatest for s in table.values()) * 4)
    else:
        axes.set_xlim(0, max(s.greatest for s in table.values()) * 1.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    target.parent.mkdir(exist_ok=True)
    fig.savefig(target, metadata={"Date": None})
    pyplot.close(fig)
    return True


def _row(axes: Any, y: int, name: str, seen: Any, logarithmic: bool) -> None:
    """A bar from zero or, where there is no zero, a point; a line over the rounds' range; the value."""
    colour = FLOOR if name.startswith(FLOORS) else OUTWAKE if name.startswith("outwake") else PEER
    if logarithmic:
        axes.plot([seen.value], [y], "o", color=colour, markersize=7)
    else:
        axes.barh(y, seen.value, 0.66, color=colour)
    axes.plot([seen.least, seen.greatest], [y, y], color="#333333", linewidth=1)
    axes.annotate(
        _label(seen.value),
        (seen.greatest, y),
        (5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
