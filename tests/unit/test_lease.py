"""The worker's own idea of its lease: never longer than the database's, but in an outage."""

import time

import pytest

from outwake.worker.engine.lease import Lease


class Clock:
    """time.monotonic, set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(Lease, "_arm", lambda self: None)
    return clock


def lease(grace: float = 300.0) -> Lease:
    return Lease(6.0, grace, lambda: None)


def test_counts_from_before_it_asked(clock: Clock) -> None:
    """A renewal that took 2 seconds leaves 4."""
    held = lease()
    clock.now += 2
    held.renewed(1000.0)
    assert held.remaining() == 4.0
    assert held.renew_at == 1002.0


def test_a_claim_leaves_half_a_lease(clock: Clock) -> None:
    """All that outbox_claim promises; it must be renewed in a third of that."""
    held = lease()
    held.claimed(1000.0)
    assert held.remaining() == 3.0
    assert held.renew_at == 1001.0


def test_a_claim_never_shortens(clock: Clock) -> None:
    held = lease()
    held.renewed(1000.0)
    clock.now += 1
    held.claimed(1001.0)
    assert held.remaining() == 5.0


def test_each_refusal_of_the_server_is_worth_one_lease(clock: Clock) -> None:
    held = lease()
    held.renewed(1000.0)
    for _ in range(10):
        clock.now += 5
        assert held.remaining() > 0
        held.outage()
        assert held.remaining() == 6.0


def test_outage_is_bounded_from_the_last_contact(clock: Clock) -> None:
    held = lease(grace=20.0)
    held.renewed(1000.0)
    for _ in range(4):
        clock.now += 4
        held.outage()
    clock.now += 3.9
    held.outage()
    assert 0 < held.remaining() < 0.2
    clock.now += 1
    held.outage()
    assert held.remaining() < 0


def test_worker_that_is_cut_off_after_an_outage_stops_one_lease_after_the_last_refusal(clock: Clock) -> None:
    """It cannot know that the server is back, and that others may rescue."""
    held = lease(grace=300.0)
    held.renewed(1000.0)
    clock.now += 5
    held.outage()
    clock.now += 6.1
    assert held.remaining() < 0


def test_contact_ends_the_outage(clock: Clock) -> None:
    held = lease(grace=20.0)
    held.renewed(1000.0)
    clock.now += 5
    held.outage()
    held.renewed(1005.0)
    clock.now += 5
    held.outage()
    assert held.remaining() == 6.0
