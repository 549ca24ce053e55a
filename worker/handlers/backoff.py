"""For handlers whose rows are to wait otherwise than by the outbox's own backoff (outbox_backoff)."""

import random
from datetime import timedelta


def backoff(first: float, last: float, times: int) -> timedelta:
    """`first` seconds doubled so many times, `last` at most; in half of it at random."""
    pause = min(last, first * 2 ** min(times, 20))
    return timedelta(seconds=pause * random.uniform(0.5, 1))  # noqa: S311 - jitter
