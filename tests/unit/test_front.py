"""Where a claim begins to look, and when a scout goes: from the front, unless that has become slow."""

from datetime import UTC, datetime, timedelta

import pytest

from outwake import Claimed
from outwake._claim import Level
from outwake.worker.engine import cursor as module
from outwake.worker.engine.cursor import NEAR, SOON, Front, Look, Seen

T = datetime(2026, 1, 1, tzinfo=UTC)
FRONT = Look(None)
TOPICS = ["t", "u"]


def at(seconds: int) -> datetime:
    return T + timedelta(seconds=seconds)


def row(seconds: int, topic: str = "t", priority: int = 0) -> Claimed:
    return Claimed(
        seconds, topic, None, {}, 1, 0, 10, None, None, timedelta(0), priority, at(seconds)
    )  # its id is its time


def seen(seconds: int, topic: str = "t", priority: int = 0, due_in: float = -1) -> Seen:
    return Seen(topic, priority, at(seconds), seconds, due_in)


def level(seconds: int, topic: str = "t", priority: int = 0, *, alone: bool = False) -> Level:
    return Level(topic, priority, at(seconds), seconds, alone)


def far(*rows: Claimed) -> Front:
    """Its looks from the front were slow, the last found these, at 0; no look begins earlier for long."""
    front = Front()
    front.looked(FRONT, [], began=-1, ended=-0.5)
    front.looked(FRONT, rows, began=-0.5, ended=0)
    front.looked(Look([], near=True), [], began=-999, ended=1)
    return front


def test_quick_looks_begin_at_the_front() -> None:
    front = Front()
    for slow in (0.005, 0.5, 0.005, 0.5):
        front.looked(FRONT, [row(1)], began=0, ended=slow)
    assert front.look(TOPICS, 10, 0.5) == FRONT
    assert not front.scout_is_due(1)


def test_while_rows_keep_coming_looks_from_the_front_take_a_tenth_of_the_time() -> None:
    front = Front()
    assert front.look(TOPICS, 10, 0, busy=True) == FRONT  # there is no end yet
    front.looked(FRONT, [row(7), row(8)], began=0, ended=0.01)
    between = Look([Level("t", 0, at(8) - SOON, 8, alone=False)])
    front.looked(between, [row(9)], began=0.01, ended=0.1)
    between = Look([Level("t", 0, at(9) - SOON, 9, alone=False)])
    assert front.look(TOPICS, 10, 0.1, busy=True) == between
    assert front.look(TOPICS, 10, 0.1) == FRONT
    assert front.look(TOPICS, 10, 0.01 + 0.01 * module.NEAR_SHARE, busy=True) == FRONT


def test_after_a_slow_look_the_next_begin_at_its_ends_topics_in_turn() -> None:
    front = far(row(1), row(2), row(1, "u", 5))
    assert front.look(TOPICS, 10, 1.1).levels == [level(2), level(1, "u", 5)]
    look = front.look(["u", "t"], 10, 1.1)
    assert look.levels == [level(1, "u", 5), level(2)]
    front.looked(look, [row(7), row(3, "t", 1)], began=1.1, ended=2)
    assert front.look(TOPICS, 10, 2).levels == [level(7), level(3, "t", 1), level(1, "u", 5)]


def test_an_end_does_not_go_back() -> None:
    front = far(row(5))
    front.looked(front.look(TOPICS, 10, 2), [row(3)], began=2, ended=2.1)
    assert front.ends == {("t", 0): (at(5), 5)}


def test_now_and_then_a_look_begins_earlier() -> None:
    front = Front()
    front.looked(FRONT, [row(5)], began=-2, ended=0)
    look = front.look(TOPICS, 10, 0)
    assert look == Look([Level("t", 0, at(5) - NEAR, 5, alone=False)], near=True)
    front.looked(look, [], began=0, ended=1)
    assert not front.look(TOPICS, 10, 1 + module.NEAR_SHARE - 0.1).near
    assert front.look(TOPICS, 10, 1 + module.NEAR_SHARE).near


def test_a_scout_goes_at_once_and_then_after_a_multiple_of_what_it_took() -> None:
    front = far(row(5))
    assert front.scout_is_due(0)
    front.scouted(dict(front.ends), [], began=1, ended=1.1)
    assert not front.scout_is_due(1.1 + module.REST - 0.1)
    assert front.scout_is_due(1.1 + module.REST)
    front.scouted(dict(front.ends), [], began=2, ended=4)
    assert not front.scout_is_due(4 + 2 * module.SHARE - 0.1)
    assert front.scout_is_due(4 + 2 * module.SHARE)


def test_the_next_looks_go_to_each_row_that_it_brought_once_then_to_the_ends() -> None:
    front = far(row(50))
    front.scouted(dict(front.ends), [seen(3), seen(4), seen(20), seen(60)], began=2, ended=4)
    assert not front.scout_is_due(1000)  # it would bring them again
    assert front.look(TOPICS, 2, 4).levels == [level(3, alone=True), level(4, alone=True), level(50)]
    assert front.look(TOPICS, 2, 4).levels == [level(20, alone=True), level(50)]
    assert front.look(TOPICS, 2, 4).levels == [level(50)]
    assert front.scout_is_due(1000)


def test_what_was_passed_since_the_scout_was_sent_is_not_missed() -> None:
    front = far(row(50))
    known = dict(front.ends)
    front.looked(front.look(TOPICS, 10, 2), [row(70)], began=2, ended=2.1)
    front.scouted(known, [seen(60)], began=2, ended=4)
    assert front.look(TOPICS, 10, 4).levels == [level(70)]


def test_a_topic_or_priority_that_has_no_end_begins_at_its_first_row() -> None:
    front = far(row(50))
    front.scouted(dict(front.ends), [seen(3, priority=9), seen(90, "u", due_in=5)], began=2, ended=4)
    assert front.look(TOPICS, 10, 4).levels == [level(50), level(3, priority=9), level(90, "u")]


def test_a_scout_that_brought_all_it_carries_goes_again_when_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CARRIES", 2)
    front = far(row(50))
    front.scouted(dict(front.ends), [seen(3), seen(4)], began=2, ended=4)
    front.look(TOPICS, 2, 4)
    assert front.scout_is_due(4)


def test_a_quick_scout_takes_looks_back_to_the_front_and_is_trusted_for_a_while() -> None:
    front = far(row(5))
    front.scouted(dict(front.ends), [seen(3)], began=2, ended=2.001)
    assert front.look(TOPICS, 10, 2.001) == FRONT
    for time in (2.1, 3.1):
        front.looked(FRONT, [row(8)], began=time, ended=time + 0.5)
    assert not front.far
    for time in (2.1, 3.1):
        front.looked(FRONT, [row(9)], began=time + module.TRUST, ended=time + 0.5 + module.TRUST)
    assert front.look(TOPICS, 10, 5).levels == [level(9)]


def test_what_every_look_takes_is_not_slow() -> None:
    """On a crowded machine each look waits for its turn, and so does a scout."""
    front = Front()
    front.looked(FRONT, [row(5)], began=0, ended=0.01)
    ends = Look([level(5)])
    for time in range(1, 50):
        front.looked(ends, [row(5)], began=time, ended=time + 0.05)
    for time in (50, 51, 52):
        front.looked(FRONT, [row(5)], began=time, ended=time + 0.1)
    assert not front.far
    for time in (53, 54):
        front.looked(FRONT, [row(5)], began=time, ended=time + 0.3)
    assert front.far
    front.scouted(dict(front.ends), [], began=55, ended=55.2)
    assert front.far
    front.scouted(dict(front.ends), [], began=56, ended=56.04)
    assert not front.far


def test_what_looks_took_under_load_is_forgotten_with_the_first_that_is_quick() -> None:
    front = Front()
    for time in range(50):
        front.looked(Look([level(5)]), [row(5)], began=time, ended=time + 0.05)
    front.looked(FRONT, [row(5)], began=50, ended=50.001)
    for time in (51, 52):
        front.looked(FRONT, [row(5)], began=time, ended=time + 0.03)
    assert front.far


def test_a_look_that_was_cut_off_was_slow() -> None:
    front = Front()
    front.gave_up(FRONT, began=0, ended=6)
    assert front.look(TOPICS, 10, 6).levels == []
    assert front.scout_is_due(6)


def test_ends_of_before_are_kept_when_the_front_goes_far() -> None:
    front = Front()
    front.looked(FRONT, [row(5)], began=0, ended=0.005)
    front.gave_up(FRONT, began=0, ended=6)
    assert front.far
    assert [(lvl.topic, lvl.id) for lvl in front.look(TOPICS, 10, 6).levels or ()] == [("t", 5)]


def test_a_scout_that_failed_is_not_sent_again_at_once() -> None:
    front = far(row(5))
    front.scout_failed(began=2, now=2)
    assert not front.scout_is_due(2.9)
    assert front.scout_is_due(3)


def test_clear_says_a_scout_that_began_later_and_saw_nothing_due() -> None:
    front = far(row(50))
    assert not front.is_clear(-100)
    front.scouted(dict(front.ends), [seen(60, due_in=3), seen(90, "u", due_in=2)], began=2, ended=4)
    assert front.is_clear(2)
    assert not front.is_clear(2.1)
    assert front.next_due == at(60)
    front.scouted(dict(front.ends), [seen(40)], began=22, ended=24)
    assert not front.is_clear(22)


def test_clear_says_a_look_from_the_front_only_while_that_is_near() -> None:
    """A slow one has seen all too, but nothing tells what is due next; a quick scout keeps nothing."""
    front = Front()
    front.looked(FRONT, [], began=0, ended=0.005)
    assert front.is_clear(0)
    front.gave_up(FRONT, began=1, ended=1.005)
    assert not front.is_clear(1)
    for time in (2, 3):
        front.looked(FRONT, [row(5)], began=time, ended=time + 0.5)
    assert front.far
    assert not front.is_clear(2)
    front.scouted(dict(front.ends), [seen(3)], began=4, ended=4.001)
    assert not front.far
    assert not front.is_clear(4)
    front.looked(FRONT, [row(3)], began=5, ended=5.005)
    assert front.is_clear(5)


def test_the_levels_of_a_look_are_bounded() -> None:
    front = far(*(row(n, priority=n) for n in range(500)))
    assert set(front.ends) == {("t", n) for n in range(400, 500)}
