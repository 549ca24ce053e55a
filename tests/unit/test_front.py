"""Where a claim begins to look: from the front, unless that has become slow."""

from datetime import UTC, datetime, timedelta

from outbox import Claimed
from worker.front import Front

T = datetime(2026, 1, 1, tzinfo=UTC)


def row(seconds: int, topic: str = "t", priority: int = 0) -> Claimed:
    due = T + timedelta(seconds=seconds)
    return Claimed(seconds, topic, None, {}, 1, 0, 10, None, None, timedelta(0), priority, due)


def test_quick_looks_begin_at_the_front() -> None:
    front = Front()
    front.looked(None, [row(1)], began=0, ended=0.005)
    assert front.levels(0.005) is None


def test_after_a_slow_look_the_next_begin_at_its_end_for_twenty_times_as_long() -> None:
    front = Front()
    front.looked(None, [row(1), row(2), row(1, "u", 5)], began=0, ended=1)
    levels = front.levels(1)
    assert levels == [("t", 0, T + timedelta(seconds=2)), ("u", 5, T + timedelta(seconds=1))]
    front.looked(levels, [row(7)], began=1, ended=1.1)
    assert front.levels(1.1) == [("t", 0, T + timedelta(seconds=7)), ("u", 5, T + timedelta(seconds=1))]
    assert front.levels(20.9) is not None
    assert front.levels(21) is None


def test_a_slow_look_that_found_nothing_gives_no_place_to_begin() -> None:
    front = Front()
    front.looked(None, [], began=0, ended=1)
    assert front.levels(1) is None


def test_the_front_is_not_blamed_for_a_slow_server() -> None:
    front = Front()
    front.looked(None, [row(1)], began=0, ended=1)
    front.looked(front.levels(1), [row(2)], began=1, ended=1.9)
    assert front.levels(1.9) is None


def test_a_front_that_is_quick_again_is_used_again() -> None:
    front = Front()
    front.looked(None, [row(1)], began=0, ended=1)
    front.looked(None, [row(2)], began=21, ended=21.001)
    assert front.levels(21.001) is None


def test_a_look_that_was_cut_off_is_not_taken_again_at_once() -> None:
    """It took a whole lease, and would take one again: the worker would do nothing else."""
    front = Front()
    front.looked(None, [row(1)], began=0, ended=1)
    front.gave_up(None, began=21, now=27)
    assert front.levels(27) == [("t", 0, T + timedelta(seconds=1))]
    assert front.levels(27 + 120) is None
