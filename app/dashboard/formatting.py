"""Formats times and amounts for people."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

LARGEST = 1e15
"""Of numbers that are shown. psql can write any."""


def duration(span: timedelta | float | None) -> str:
    """12 ms, 3.4 s, 5 min 6 s, 2 h 10 min or 3 d 4 h. None gives an empty string."""
    if span is None:
        return ""
    seconds = span.total_seconds() if isinstance(span, timedelta) else float(span)
    if seconds < 0.0005:
        return "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _two(whole // 60, "min", whole % 60, "s")
    if whole < 86400:
        return _two(whole // 3600, "h", whole % 3600 // 60, "min")
    return _two(whole // 86400, "d", whole % 86400 // 3600, "h")


def _two(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large} {large_unit}" + (f" {small} {small_unit}" if small else "")


def moment(at: datetime | str) -> datetime:
    """A time of the database or of its JSON, in UTC."""
    parsed = datetime.fromisoformat(at) if isinstance(at, str) else at
    return parsed.astimezone(UTC)


def ago(at: datetime | str) -> str:
    """`just now`, `3 min ago` or `5 d ago`; `in 3 min` for a future time."""
    seconds = (datetime.now(UTC) - moment(at)).total_seconds()
    if abs(seconds) < 5:
        return "just now"
    size = abs(seconds)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if size >= length:
            words = f"{int(size // length)} {unit}"
            break
    return f"{words} ago" if seconds > 0 else f"in {words}"


def money(dollars: float | None) -> str:
    if dollars is None:
        return ""
    if not abs(dollars) < LARGEST:
        return "$?"
    return f"${dollars:.2f}" if dollars >= 0.01 or dollars == 0 else f"${dollars:.4f}"


def count(number: float) -> str:
    """4,312 in full; larger numbers rounded: 12k, 3.4M."""
    if not abs(number) < LARGEST:
        return "very many"
    if number < 10_000:
        return f"{number:,.0f}"
    return f"{number / 1000:.0f}k" if number < 1_000_000 else f"{number / 1_000_000:.1f}M"


def pretty(value: Any) -> str:
    """JSON, indented."""
    return json.dumps(value, indent=2, ensure_ascii=False)
