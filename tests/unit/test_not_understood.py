"""A notification that is not understood means "scan": a newer version may say more than this one knows."""

import asyncio
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
import structlog

from outwake import Handler, Job
from outwake.app.live.hub import Hub
from outwake.app.live.streams import Stream
from outwake.session import watch
from outwake.settings import Settings
from outwake.worker.engine.inbox import Inbox
from outwake.worker.engine.listen import CANCEL, PROBE, WAKE
from outwake.worker.engine.worker import Worker

PRESENCE = 7
OTHER = UUID("0199a2c4-6f00-7000-8000-000000000003")


async def nothing(job: Job) -> None:
    """A handler with nothing to do."""


class Hearing:
    """A worker that has scanned all there was, and has not connected to anything, hears."""

    def __init__(self) -> None:
        handlers = {topic: Handler(topic, nothing) for topic in ("t", "a.b")}
        self.parts = parts = Worker(Settings(database_url="postgresql://nowhere.invalid"), handlers, 2).parts
        self.wakes = parts.wakes
        self.wakes.reasons.clear()
        self.singles: list[int] = []
        self.heard = Inbox(
            PRESENCE,
            parts.handlers,
            parts.running,
            parts.parking,
            parts.wakes,
            parts.timers,
            parts.probe,
            parts.backup,
            self.singles.append,
        ).heard


@pytest.fixture
async def worker() -> Hearing:
    return Hearing()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as events:
        yield cast(list[Any], events)


NONSENSE = [
    "",
    "end",
    "t",
    "t@",
    "t@x",
    "t@0#",
    "t@0#x",
    "t@0#1,2",
    "t@0#1,2,3,4",
    "t@0#1,2,-3",
    f"t@0#{2**63}",
    f"t@0#1,{2**31},3",
    f"t@0#1,2,{'9' * 400}",
    f"t@{'9' * 400}",
    "t@0!",
    "*@",
    "t,u@0",
    "T@0",
    "#1@0",
    '{"topic": "t"}',
]


@pytest.mark.parametrize("payload", NONSENSE)
async def test_nonsense_makes_a_worker_scan(payload: str, worker: Hearing) -> None:
    worker.heard(WAKE, payload)
    assert worker.wakes.reasons
    assert worker.wakes.event.is_set()
    assert worker.singles == []
    assert worker.parts.backup.at == math.inf


@pytest.mark.parametrize(
    "payload",
    ["other@0", "other@0#1,2,3", "other@4102444800001", "o_t-h.er2@0", f"#{OTHER}@0", "other@in a new form"],
)
async def test_what_is_for_others_does_not(payload: str, worker: Hearing, logged: list[Any]) -> None:
    worker.heard(WAKE, payload)
    assert not worker.wakes.reasons
    assert not worker.wakes.event.is_set()
    assert logged == []


@pytest.mark.parametrize(("payload", "told"), [("t@0#5", [5]), ("a.b@0#5,7,2", [5]), ("t@0#5,8,2", [])])
async def test_a_single_row_is_understood(payload: str, told: list[int], worker: Hearing) -> None:
    worker.heard(WAKE, payload)
    assert worker.singles == told
    assert not worker.wakes.reasons


@pytest.mark.parametrize("payload", ["*@0", "t@0", "a.b@0"])
async def test_rows_are_understood(payload: str, worker: Hearing, logged: list[Any]) -> None:
    worker.heard(WAKE, payload)
    assert worker.wakes.reasons
    assert logged == []


@pytest.mark.parametrize(("payload", "asks"), [("now", True), ("5 all", True), ("", True), ("5", False)])
async def test_a_cancel_that_is_not_understood_is_asked_for(
    payload: str, asks: bool, worker: Hearing
) -> None:
    """A renewal says which rows are to be cancelled."""
    worker.heard(CANCEL, payload)
    assert worker.wakes.renewal is asks
    assert worker.wakes.event.is_set() is asks
    assert not worker.wakes.reasons


async def test_a_probe_of_another_is_none_of_ours(worker: Hearing, logged: list[Any]) -> None:
    worker.heard(PROBE, "8.1")
    assert not worker.wakes.event.is_set()
    assert logged == []


async def test_is_said_once_of_each_channel(worker: Hearing, logged: list[Any]) -> None:
    for payload in ("new", "newer"):
        worker.heard(WAKE, payload)
        worker.heard(CANCEL, payload)
    assert [(event["log_level"], event["channel"], event["payload"]) for event in logged] == [
        ("info", WAKE, "new"),
        ("info", CANCEL, "new"),
    ]


def hub(*sessions: UUID) -> tuple[Hub, Callable[[str], None]]:
    """A hub with a stream of each session, all of them read, and what tells it of a notification."""
    made = Hub(cast(Any, None), "postgresql://nowhere.invalid")
    for session_id in sessions:
        made._streams[session_id].add(Stream(made._taken, session_id, 0, until_completed=False))
    return made, lambda payload: made._listener._heard(watch.CHANNEL, payload)


@pytest.mark.parametrize("payload", ["", "end", "v2:*", "all"])
async def test_nonsense_makes_the_api_read_all_that_it_streams(payload: str, logged: list[Any]) -> None:
    first, second = uuid4(), uuid4()
    made, heard = hub(first, second)
    for _ in range(2):
        heard(payload)
    assert {stream.session_id for stream in made._stale} == {first, second}
    assert made._to_read.is_set()
    assert [(event["log_level"], event["event"]) for event in logged] == [("info", "not_understood")]


async def test_the_api_reads_the_session_that_is_named_and_no_other() -> None:
    first, second = uuid4(), uuid4()
    made, heard = hub(first, second)
    for payload in (str(OTHER), str(first)):
        heard(payload)
    assert {stream.session_id for stream in made._stale} == {first}


@pytest.mark.parametrize(("payload", "looks"), [(str(OTHER), False), ("all", True), ("", True)])
async def test_who_follows_one_session_looks_too(payload: str, looks: bool) -> None:
    async def hear(heard: Callable[[str, str], None]) -> None:
        heard(watch.CHANNEL, payload)

    news = asyncio.Event()
    await watch._listen(cast(Any, SimpleNamespace(hear=hear)), uuid4(), news)
    assert news.is_set() is looks
