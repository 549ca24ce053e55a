"""The worker's own idea of its lease: never longer than the database's, but in an outage."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from outwake.worker.engine.lease import CLAIMED, NOTICE, RENEWED, Lease
from tests.support.process import ROOT
from tests.support.waits import awaiting, eventually

LEASE = 6.0


class Clock:
    """A monotonic clock, set by the test."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


Made = Callable[..., Lease]


@pytest.fixture
async def lease(clock: Clock) -> AsyncIterator[Made]:
    """Makes leases, whose timers end with the test."""
    made: list[Lease] = []

    def make(
        seconds: float = LEASE, grace: float = 300.0, on_lost: Callable[[], None] = lambda: None
    ) -> Lease:
        made.append(Lease(seconds, grace, on_lost, clock))
        return made[-1]

    yield make
    for held in made:
        held.close()


async def test_counts_from_before_it_asked(clock: Clock, lease: Made) -> None:
    """A renewal that took 2 seconds leaves 4."""
    held = lease()
    clock.now += 2
    held.renewed(1000.0)
    assert held.remaining() == 4.0
    assert held.renew_at == 1002.0


async def test_a_claim_leaves_half_a_lease(clock: Clock, lease: Made) -> None:
    """All that outbox_claim promises; it must be renewed in a third of that."""
    held = lease()
    held.claimed(1000.0)
    assert held.remaining() == 3.0
    assert held.renew_at == 1001.0


async def test_a_claim_never_shortens(clock: Clock, lease: Made) -> None:
    held = lease()
    held.renewed(1000.0)
    clock.now += 1
    held.claimed(1001.0)
    assert held.remaining() == 5.0


async def test_each_refusal_of_the_server_is_worth_one_lease(clock: Clock, lease: Made) -> None:
    held = lease()
    held.renewed(1000.0)
    for _ in range(10):
        clock.now += 5
        assert held.remaining() > 0
        held.outage()
        assert held.remaining() == 6.0


async def test_outage_is_bounded_from_the_last_contact(clock: Clock, lease: Made) -> None:
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


async def test_worker_that_is_cut_off_after_an_outage_stops_one_lease_after_the_last_refusal(
    clock: Clock, lease: Made
) -> None:
    """It cannot know that the server is back, and that others may rescue."""
    held = lease(grace=300.0)
    held.renewed(1000.0)
    clock.now += 5
    held.outage()
    clock.now += 6.1
    assert held.remaining() < 0


async def test_contact_ends_the_outage(clock: Clock, lease: Made) -> None:
    held = lease(grace=20.0)
    held.renewed(1000.0)
    clock.now += 5
    held.outage()
    held.renewed(1005.0)
    clock.now += 5
    held.outage()
    assert held.remaining() == 6.0


async def test_when_it_ends_what_runs_is_stopped(clock: Clock, lease: Made) -> None:
    """And not before: the timer that was set for the first end looks at the clock again."""
    lost = asyncio.Event()
    held = lease(0.01, on_lost=lost.set)
    held.renewed(clock.now)
    clock.now += 0.009
    held.renewed(clock.now)
    asked = clock.asked
    await eventually("the timer to look at the clock", lambda: clock.asked > asked)
    assert not lost.is_set()
    clock.now += 0.011
    async with awaiting("the end of the lease to be noticed", seen=held.remaining):
        await lost.wait()


async def test_a_lease_that_is_closed_stops_nothing(clock: Clock, lease: Made) -> None:
    lost: list[str] = []
    held, other = lease(0.01, on_lost=lambda: lost.append("closed")), asyncio.Event()
    held.renewed(clock.now)
    held.close()
    later = lease(0.011, on_lost=other.set)
    later.renewed(clock.now)
    clock.now += 1
    async with awaiting("the end of the other lease"):
        await other.wait()
    assert not lost


def test_the_worker_relies_on_no_more_than_a_claim_leaves_in_the_database() -> None:
    text = (ROOT / "sql/outbox/functions/lease.sql").read_text()
    assert f"me.lease_until < moment + lease * {CLAIMED}" in text


def test_two_renewals_may_fail_before_an_agent_is_told_to_end() -> None:
    assert NOTICE < 1 - 2 * RENEWED
