"""Requests a second and open streams of a user, by a clock that the test moves."""

import pytest

from outwake.app.api.problems import Problem
from outwake.app.auth import limits
from outwake.app.auth.identity import Identity
from outwake.app.auth.limits import Limits
from outwake.settings import Settings

ALICE, BOB, OLGA = Identity("alice", False), Identity("bob", False), Identity("olga", True)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def made(clock: Clock, **changes: float) -> Limits:
    return Limits(Settings.model_validate({"DATABASE_URL": "x", **changes}), clock)


def admitted(limit: Limits, identity: Identity, most: int = 1000) -> int:
    """How many requests get through now."""
    for count in range(most):
        try:
            limit.admit(identity)
        except Problem:
            return count
    return most


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    limit = made(clock, OUTWAKE_REQUEST_RATE=2)
    assert admitted(limit, ALICE) == 20
    assert admitted(limit, BOB) == 20
    clock.now += 1
    assert admitted(limit, ALICE) == 2
    clock.now += 1e6
    assert admitted(limit, ALICE) == 20
    assert admitted(limit, OLGA) == 1000


@pytest.mark.parametrize(("rate", "seconds"), [(2.0, 1), (0.05, 20)])
def test_retry_after_is_long_enough(rate: float, seconds: int) -> None:
    clock = Clock()
    limit = made(clock, OUTWAKE_REQUEST_RATE=rate)
    admitted(limit, ALICE)
    with pytest.raises(Problem, match="a second") as raised:
        limit.admit(ALICE)
    assert int(raised.value.headers["Retry-After"]) == seconds
    clock.now += seconds
    limit.admit(ALICE)


def test_users_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMEMBERED", 10)
    limit = made(Clock(), OUTWAKE_REQUEST_RATE=0.1)
    for number in range(100):
        limit.admit(Identity(f"user-{number}", False))
    assert len(limit._buckets) == 10
    assert admitted(limit, Identity("user-99", False)) == 0


def test_streams_of_a_user_and_of_the_process() -> None:
    limit = made(Clock(), OUTWAKE_MAX_STREAMS=2, OUTWAKE_MAX_PROCESS_STREAMS=4)
    closing = [limit.open_stream(ALICE) for _ in range(2)]
    with pytest.raises(Problem, match="2 event streams"):
        limit.open_stream(ALICE)
    closing += [limit.open_stream(OLGA), limit.open_stream(OLGA)]
    for identity in (BOB, OLGA):
        with pytest.raises(Problem, match="no room"):
            limit.open_stream(identity)
    for close in closing:
        close()
    assert not limit._streams
    limit.open_stream(BOB)
