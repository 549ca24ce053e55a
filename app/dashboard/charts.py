"""Charts as SVG shapes. A template draws them in a box of 0..WIDTH by 0..HEIGHT, which the page stretches.

Axis labels are HTML beside the box, so that text keeps its size on a phone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from outwake.app.dashboard.formatting import duration
from outwake.app.dashboard.queries import Bin

WIDTH = 600
HEIGHT = 120
_SPANS = [scale * step for scale in (0.001, 0.01, 0.1, 1) for step in (1, 2, 5)]
_SPANS += [10, 20, 60, 120, 240, 600, 1200, 3600, 7200, 14400, 43200, 86400, 172800, 604800]


@dataclass(frozen=True)
class Bar:
    """A rectangle. `shade` is its CSS class, which sets the colour."""

    x: float
    y: float
    width: float
    height: float
    shade: str


@dataclass(frozen=True)
class Column:
    """One step of time: its bars and its label."""

    x: float
    width: float
    bars: Sequence[Bar]
    label: str


@dataclass(frozen=True)
class Chart:
    """`lines` are (shade, path). `scale` has the labels of the y axis, from the top down."""

    key: str
    title: str
    summary: str
    columns: Sequence[Column]
    lines: Sequence[tuple[str, str]]
    legend: Sequence[tuple[str, str]]
    scale: tuple[str, str, str]
    times: tuple[str, str, str]


def charts(bins: Sequence[Bin], step: timedelta) -> list[Chart]:
    """Charts of depth, wait times and throughput. The bins are in the order of time."""
    return [_depth(bins, step), _waits(bins, step), _throughput(bins, step)]


def _depth(bins: Sequence[Bin], step: timedelta) -> Chart:
    top = _round_up(max((one.depth for one in bins), default=0))
    values = [float(one.depth) for one in bins]
    line = _path(values, top)
    area = f"{line} L{WIDTH} {HEIGHT} L0 {HEIGHT} Z" if line else ""
    said = [f"{one.depth:,} unfinished" for one in bins]
    return Chart(
        "depth",
        "Depth",
        f"Rows that wait or run: {bins[-1].depth:,} now, {max(one.depth for one in bins):,} at most.",
        _columns(bins, said),
        [("area", area), ("line-1", line)],
        [("line-1", "waiting or running")],
        _scale(top, "{:,.0f}".format),
        _times(bins, step),
    )


def _waits(bins: Sequence[Bin], step: timedelta) -> Chart:
    highest = max((one.wait_p95 or 0 for one in bins), default=0)
    top = next((span for span in _SPANS if span >= highest), highest)
    said = [
        "no row done"
        if one.wait_p50 is None
        else f"half started within {duration(one.wait_p50)}, 95% within {duration(one.wait_p95)}"
        for one in bins
    ]
    waits = [one.wait_p95 for one in bins if one.wait_p95 is not None]
    return Chart(
        "waits",
        "Wait before start",
        f"The slowest step: 95% started within {duration(max(waits))}." if waits else "No row was done.",
        _columns(bins, said),
        [
            ("line-2", _path([one.wait_p95 for one in bins], top)),
            ("line-1", _path([one.wait_p50 for one in bins], top)),
        ],
        [("line-1", "median"), ("line-2", "95%")],
        _scale(top, duration),
        _times(bins, step),
    )


def _throughput(bins: Sequence[Bin], step: timedelta) -> Chart:
    parts = [(one.done, one.cancelled, one.dead) for one in bins]
    top = _round_up(max((sum(part) for part in parts), default=0))
    done, cancelled, dead = (sum(column) for column in zip(*parts, strict=True))
    said = [f"{a:,} done, {b:,} cancelled, {c:,} dead" for a, b, c in parts]
    return Chart(
        "throughput",
        f"Finished per {duration(step).removeprefix('1 ')}",
        f"{done:,} done, {cancelled:,} cancelled, {dead:,} dead.",
        _columns(bins, said, [_stack(part, top, place, len(bins)) for place, part in enumerate(parts)]),
        [],
        [("bar-1", "done"), ("bar-2", "cancelled"), ("bar-3", "dead")],
        _scale(top, "{:,.0f}".format),
        _times(bins, step),
    )


def _columns(
    bins: Sequence[Bin], said: Sequence[str], stacks: Sequence[Sequence[Bar]] | None = None
) -> list[Column]:
    width = WIDTH / len(bins)
    return [
        Column(
            round(place * width, 2),
            round(width, 2),
            stacks[place] if stacks else (),
            f"{one.at:%a %H:%M} UTC: {text}",
        )
        for place, (one, text) in enumerate(zip(bins, said, strict=True))
    ]


def _stack(counts: tuple[int, ...], top: float, place: int, bins: int) -> list[Bar]:
    width = WIDTH / bins
    bars, below = [], float(HEIGHT)
    for number, count in enumerate(counts, 1):
        if count:
            # At least about a pixel, so that one dead row among thousands stays visible.
            height = max(count / top * HEIGHT, 1.5)
            below -= height
            bars.append(
                Bar(
                    round(place * width + width * 0.1, 2),
                    round(max(below, 0), 2),
                    round(width * 0.8, 2),
                    round(height, 2),
                    f"bar-{number}",
                )
            )
    return bars


def _path(values: Sequence[float | None], top: float) -> str:
    """A line through the middle of each step. It has a gap at each unknown value."""
    width = WIDTH / len(values)
    parts: list[str] = []
    pen_up = True
    for place, value in enumerate(values):
        if value is None:
            pen_up = True
            continue
        x, y = (place + 0.5) * width, HEIGHT - value / top * HEIGHT
        if pen_up:
            parts.append(f"M{max(x - width / 2, 0):.1f} {y:.1f}")
        parts.append(f"L{x:.1f} {y:.1f}")
        if place + 1 == len(values) or values[place + 1] is None:
            parts.append(f"L{x + width / 2:.1f} {y:.1f}")
        pen_up = False
    return " ".join(parts)


def _round_up(value: int) -> float:
    """The next round number, for the top of an axis."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    return next(power * step for step in (1, 2, 4, 5, 10) if power * step >= value)


def _scale(top: float, say: Callable[[float], str]) -> tuple[str, str, str]:
    half = "" if say is not duration and top % 2 else say(top / 2)
    return say(top), half, "0"


def _times(bins: Sequence[Bin], step: timedelta) -> tuple[str, str, str]:
    def label(at: datetime) -> str:
        return f"{at:%H:%M}" if step < timedelta(hours=1) else f"{at:%d %b}"

    return label(bins[0].at), label(bins[len(bins) // 2].at), "now"
