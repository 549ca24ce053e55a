"""Backoff for handlers that do not use the outbox's own (outbox_backoff)."""

import random
from datetime import timedelta


def backoff(first: float, last: float, times: int) -> timedelta:
    """`first` seconds doubled `times` times, at most `last`; at random between half and all of it."""
    pause = min(last, first * 2 ** min(times, 20))
    return timedelta(seconds=pause * random.uniform(0.5, 1))  # noqa: S311 - jitter
