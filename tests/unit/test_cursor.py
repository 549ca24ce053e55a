"""Where a claim begins to scan, and when a background scan begins: from the head, unless that is slow."""

from datetime import UTC, datetime, timedelta

import pytest

from outwake import Claimed
from outwake._claim import Lane
from outwake.worker.engine import cursor as module
from outwake.worker.engine.cursor import NEAR, SOON, Cursors, Scan, Seen

T = datetime(2026, 1, 1, tzinfo=UTC)
HEAD = Scan(None)
TOPICS = ["t", "u"]


def at(seconds: int) -> datetime:
    return T + timedelta(seconds=seconds)


def row(seconds: int, topic: str = "t", priority: int = 0) -> Claimed:
    return Claimed(
        seconds, topic, None, {}, 1, 0, 10, None, None, timedelta(0), priority, at(seconds)
    )  # its id is its time


def seen(seconds: int, topic: str = "t", priority: int = 0, due_in: float = -1) -> Seen:
    return Seen(topic, priority, at(seconds), seconds, due_in)


def lane(seconds: int, topic: str = "t", priority: int = 0, *, alone: bool = False) -> Lane:
    return Lane(topic, priority, at(seconds), seconds, alone)


def far(*rows: Claimed) -> Cursors:
    """Its scans from the head were slow, the last found these, at 0; no scan begins earlier for long."""
    cursors = Cursors()
    cursors.scanned(HEAD, [], began=-1, ended=-0.5)
    cursors.scanned(HEAD, rows, began=-0.5, ended=0)
    cursors.scanned(Scan([], near=True), [], began=-999, ended=1)
    return cursors


def test_quick_scans_begin_at_the_head() -> None:
    cursors = Cursors()
    for slow in (0.005, 0.5, 0.005, 0.5):
        cursors.scanned(HEAD, [row(1)], began=0, ended=slow)
    assert cursors.next_scan(TOPICS, 10, 0.5) == HEAD
    assert not cursors.background_is_due(1)


def test_while_rows_keep_coming_scans_from_the_head_take_a_tenth_of_the_time() -> None:
    cursors = Cursors()
    assert cursors.next_scan(TOPICS, 10, 0, busy=True) == HEAD  # there is no cursor yet
    cursors.scanned(HEAD, [row(7), row(8)], began=0, ended=0.01)
    between = Scan([Lane("t", 0, at(8) - SOON, 8, alone=False)])
    cursors.scanned(between, [row(9)], began=0.01, ended=0.1)
    between = Scan([Lane("t", 0, at(9) - SOON, 9, alone=False)])
    assert cursors.next_scan(TOPICS, 10, 0.1, busy=True) == between
    assert cursors.next_scan(TOPICS, 10, 0.1) == HEAD
    assert cursors.next_scan(TOPICS, 10, 0.01 + 0.01 * module.NEAR_SHARE, busy=True) == HEAD


def test_after_a_slow_scan_the_next_begin_at_its_cursors_topics_in_turn() -> None:
    cursors = far(row(1), row(2), row(1, "u", 5))
    assert cursors.next_scan(TOPICS, 10, 1.1).lanes == [lane(2), lane(1, "u", 5)]
    scan = cursors.next_scan(["u", "t"], 10, 1.1)
    assert scan.lanes == [lane(1, "u", 5), lane(2)]
    cursors.scanned(scan, [row(7), row(3, "t", 1)], began=1.1, ended=2)
    assert cursors.next_scan(TOPICS, 10, 2).lanes == [lane(7), lane(3, "t", 1), lane(1, "u", 5)]


def test_an_end_does_not_go_back() -> None:
    cursors = far(row(5))
    cursors.scanned(cursors.next_scan(TOPICS, 10, 2), [row(3)], began=2, ended=2.1)
    assert cursors.places == {("t", 0): (at(5), 5)}


def test_now_and_then_a_scan_begins_earlier() -> None:
    cursors = Cursors()
    cursors.scanned(HEAD, [row(5)], began=-2, ended=0)
    scan = cursors.next_scan(TOPICS, 10, 0)
    assert scan == Scan([Lane("t", 0, at(5) - NEAR, 5, alone=False)], near=True)
    cursors.scanned(scan, [], began=0, ended=1)
    assert not cursors.next_scan(TOPICS, 10, 1 + module.NEAR_SHARE - 0.1).near
    assert cursors.next_scan(TOPICS, 10, 1 + module.NEAR_SHARE).near


def test_a_background_scan_goes_at_once_and_then_after_a_multiple_of_what_it_took() -> None:
    cursors = far(row(5))
    assert cursors.background_is_due(0)
    cursors.background_saw(dict(cursors.places), [], began=1, ended=1.1)
    assert not cursors.background_is_due(1.1 + module.REST - 0.1)
    assert cursors.background_is_due(1.1 + module.REST)
    cursors.background_saw(dict(cursors.places), [], began=2, ended=4)
    assert not cursors.background_is_due(4 + 2 * module.SHARE - 0.1)
    assert cursors.background_is_due(4 + 2 * module.SHARE)


def test_the_next_scans_go_to_each_row_that_it_brought_once_then_to_the_cursors() -> None:
    cursors = far(row(50))
    cursors.background_saw(dict(cursors.places), [seen(3), seen(4), seen(20), seen(60)], began=2, ended=4)
    assert not cursors.background_is_due(1000)  # it would bring them again
    assert cursors.next_scan(TOPICS, 2, 4).lanes == [lane(3, alone=True), lane(4, alone=True), lane(50)]
    assert cursors.next_scan(TOPICS, 2, 4).lanes == [lane(20, alone=True), lane(50)]
    assert cursors.next_scan(TOPICS, 2, 4).lanes == [lane(50)]
    assert cursors.background_is_due(1000)


def test_no_scan_goes_to_a_row_that_is_not_due_yet() -> None:
    cursors = far(row(50))
    cursors.background_saw(dict(cursors.places), [seen(3, due_in=3600), seen(4)], began=2, ended=4)
    assert cursors.next_scan(TOPICS, 10, 4).lanes == [lane(4, alone=True), lane(50)]


def test_what_was_passed_since_the_background_scan_was_sent_is_not_missed() -> None:
    cursors = far(row(50))
    known = dict(cursors.places)
    cursors.scanned(cursors.next_scan(TOPICS, 10, 2), [row(70)], began=2, ended=2.1)
    cursors.background_saw(known, [seen(60)], began=2, ended=4)
    assert cursors.next_scan(TOPICS, 10, 4).lanes == [lane(70)]


def test_a_topic_or_priority_that_has_no_end_begins_at_its_first_row() -> None:
    cursors = far(row(50))
    cursors.background_saw(
        dict(cursors.places), [seen(3, priority=9), seen(90, "u", due_in=5)], began=2, ended=4
    )
    assert cursors.next_scan(TOPICS, 10, 4).lanes == [lane(50), lane(3, priority=9), lane(90, "u")]


def test_a_background_scan_that_brought_all_it_carries_goes_again_when_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CARRIES", 2)
    cursors = far(row(50))
    cursors.background_saw(dict(cursors.places), [seen(3), seen(4)], began=2, ended=4)
    cursors.next_scan(TOPICS, 2, 4)
    assert cursors.background_is_due(4)


def test_a_quick_background_scan_takes_scans_back_to_the_head_and_is_trusted_for_a_while() -> None:
    cursors = far(row(5))
    cursors.background_saw(dict(cursors.places), [seen(3)], began=2, ended=2.001)
    assert cursors.next_scan(TOPICS, 10, 2.001) == HEAD
    for time in (2.1, 3.1):
        cursors.scanned(HEAD, [row(8)], began=time, ended=time + 0.5)
    assert not cursors.far
    for time in (2.1, 3.1):
        cursors.scanned(HEAD, [row(9)], began=time + module.TRUST, ended=time + 0.5 + module.TRUST)
    assert cursors.next_scan(TOPICS, 10, 5).lanes == [lane(9)]


def test_what_every_scan_takes_is_not_slow() -> None:
    """On a crowded machine each scan waits for its turn, and so does a background scan."""
    cursors = Cursors()
    cursors.scanned(HEAD, [row(5)], began=0, ended=0.01)
    ends = Scan([lane(5)])
    for time in range(1, 50):
        cursors.scanned(ends, [row(5)], began=time, ended=time + 0.05)
    for time in (50, 51, 52):
        cursors.scanned(HEAD, [row(5)], began=time, ended=time + 0.1)
    assert not cursors.far
    for time in (53, 54):
        cursors.scanned(HEAD, [row(5)], began=time, ended=time + 0.3)
    assert cursors.far
    cursors.background_saw(dict(cursors.places), [], began=55, ended=55.2)
    assert cursors.far
    cursors.background_saw(dict(cursors.places), [], began=56, ended=56.04)
    assert not cursors.far


def test_what_scans_took_under_load_is_forgotten_with_the_first_that_is_quick() -> None:
    cursors = Cursors()
    for time in range(50):
        cursors.scanned(Scan([lane(5)]), [row(5)], began=time, ended=time + 0.05)
    cursors.scanned(HEAD, [row(5)], began=50, ended=50.001)
    for time in (51, 52):
        cursors.scanned(HEAD, [row(5)], began=time, ended=time + 0.03)
    assert cursors.far


def test_a_scan_that_was_cut_off_was_slow() -> None:
    cursors = Cursors()
    cursors.gave_up(HEAD, began=0, ended=6)
    assert cursors.next_scan(TOPICS, 10, 6).lanes == []
    assert cursors.background_is_due(6)


def test_cursors_of_before_are_kept_when_the_head_goes_far() -> None:
    cursors = Cursors()
    cursors.scanned(HEAD, [row(5)], began=0, ended=0.005)
    cursors.gave_up(HEAD, began=0, ended=6)
    assert cursors.far
    assert [(lane.topic, lane.id) for lane in cursors.next_scan(TOPICS, 10, 6).lanes or ()] == [("t", 5)]


def test_a_background_scan_that_failed_is_not_sent_again_at_once() -> None:
    cursors = far(row(5))
    cursors.background_failed(began=2, now=2)
    assert not cursors.background_is_due(2.9)
    assert cursors.background_is_due(3)


def test_clear_says_a_background_scan_that_began_later_and_saw_nothing_due() -> None:
    cursors = far(row(50))
    assert not cursors.is_clear(-100)
    cursors.background_saw(
        dict(cursors.places), [seen(60, due_in=3), seen(90, "u", due_in=2)], began=2, ended=4
    )
    assert cursors.is_clear(2)
    assert not cursors.is_clear(2.1)
    assert cursors.next_due == at(60)
    cursors.background_saw(dict(cursors.places), [seen(40)], began=22, ended=24)
    assert not cursors.is_clear(22)


def test_clear_says_a_scan_from_the_head_only_while_that_is_near() -> None:
    """A slow one has seen all too, but does not tell what is due next; a quick background scan keeps none."""
    cursors = Cursors()
    cursors.scanned(HEAD, [], began=0, ended=0.005)
    assert cursors.is_clear(0)
    cursors.gave_up(HEAD, began=1, ended=1.005)
    assert not cursors.is_clear(1)
    for time in (2, 3):
        cursors.scanned(HEAD, [row(5)], began=time, ended=time + 0.5)
    assert cursors.far
    assert not cursors.is_clear(2)
    cursors.background_saw(dict(cursors.places), [seen(3)], began=4, ended=4.001)
    assert not cursors.far
    assert not cursors.is_clear(4)
    cursors.scanned(HEAD, [row(3)], began=5, ended=5.005)
    assert cursors.is_clear(5)


def test_the_lanes_of_a_scan_are_bounded() -> None:
    cursors = far(*(row(n, priority=n) for n in range(500)))
    assert set(cursors.places) == {("t", n) for n in range(400, 500)}
