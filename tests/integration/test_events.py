"""Event streams: nothing missed, nothing twice, whatever happens to writers, clients and connections."""

import asyncio
import json
import random
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from psycopg import AsyncConnection

import outwake.connect
from outwake.app.live.hub import BATCH_BYTES, HELD_FOR_READER, Hub
from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.manual_worker import ManualWorker
from tests.support.waits import awaiting, eventually

KILL_LISTENER = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'outwake api listener'
"""


async def begun(api: Api, manual: ManualWorker) -> str:
    """A session that the hand runs; its id."""
    created = await api.create()
    await manual.claim()
    return str(created["id"])


@pytest.fixture(autouse=True)
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts reads: how many run now, and how many were begun."""
    counts = [0, 0]
    query = Hub._query

    async def counted(hub: Hub, places: Any) -> Any:
        counts[0] += 1
        counts[1] += 1
        try:
            return await query(hub, places)
        finally:
            counts[0] -= 1

    monkeypatch.setattr(Hub, "_query", counted)
    return counts


async def watched(api: Api, reads: list[int], *, handshakes: int = 0) -> None:
    """Wait until what is followed is watched, with so many handshakes still waiting for writers, and all
    that this gave cause to read is read.
    """

    def settled() -> bool:
        hub = api.context.hub
        watch = hub._watches.current
        return (
            watch is not None
            and watch.ids == set(hub._streams)
            and len(watch.handshakes) == handshakes
            and reads[0] == 0
            and not hub._stale
        )

    await eventually(
        "the watch to be settled",
        settled,
        seen=lambda: (vars(api.context.hub), reads),
    )


async def notified(connect: Connect) -> AsyncConnection[Any]:
    """A connection that hears what the API's listener hears."""
    conn = await connect()
    await conn.execute("LISTEN outwake_session")
    return conn


async def heard(conn: AsyncConnection[Any]) -> list[str]:
    """What was notified until now: a notification of our own comes behind all of it."""
    end = str(uuid4())  # of no session: the API looks at nothing for it
    await conn.execute("SELECT pg_notify('outwake_session', %s)", (end,))
    found: list[str] = []
    async for notification in conn.notifies():
        if notification.payload == end:
            return found
        found.append(notification.payload)
    return found


async def test_stream_from_creation_to_completion(api: Api, manual: ManualWorker) -> None:
    created = await api.create()
    async with api.follow(created["id"], "?until=completed") as events:
        await events.status(inbox_status="active")
        await manual.claim()
        state = await events.status(inbox_status="pending")
        assert [prompt["status"] for prompt in state["prompts"]] == ["running"]
        await manual.say("one", "two")
        first = await events.next("message")
        assert (first.id, json.loads(first.data)["body"]["text"]) == ("1", "one")
        message = (await api.client.get(f"/sessions/{created['id']}/messages")).json()["messages"][0]
        assert json.loads(first.data) == message
        assert (await events.next("message")).id == "2"
        await manual.say("three")
        await manual.complete()
        rest = await events.rest()
    assert [event.event for event in rest] == ["message", "status"]
    assert rest[0].id == "3"
    final = json.loads(rest[1].data)
    assert final["inbox_status"] == "completed"
    assert final["prompts"][0]["status"] == "succeeded"


async def test_stream_of_a_completed_session_gives_all_and_ends(api: Api, manual: ManualWorker) -> None:
    session_id = await begun(api, manual)
    await manual.say(*(str(number) for number in range(250)))
    await manual.complete()
    async with api.follow(session_id, "?until=completed") as events:
        rest = await events.rest()
    assert [int(event.id) for event in rest if event.event == "message"] == list(range(1, 251))


async def test_stream_whose_messages_were_pruned(api: Api, manual: ManualWorker, reads: list[int]) -> None:
    session_id = await begun(api, manual)
    await manual.say("1", "2", "3")
    await manual.complete()
    await manual.conn.execute("DELETE FROM message WHERE seq > 1")
    async with api.follow(session_id, "?until=completed") as events:
        assert [event.event for event in await events.rest()] == ["status", "message"]
    await manual.conn.execute("DELETE FROM message")
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads)


async def test_new_attempt_supersedes(api: Api, manual: ManualWorker) -> None:
    session_id = await begun(api, manual)
    async with api.follow(session_id) as events:
        await manual.say("old")
        assert await events.texts(1) == ["old"]
        await manual.fail("no luck")
        await manual.claim()
        await manual.say("new")
        superseded = await events.next("superseded", "message")
        assert (superseded.event, superseded.id) == ("superseded", "2")
        assert json.loads(superseded.data)["body"]["attempt"] == 1
        assert await events.texts(1) == ["new"]


async def test_resume_by_header_and_by_parameter(api: Api, manual: ManualWorker) -> None:
    session_id = await begun(api, manual)
    await manual.say("1", "2", "3", "4")
    async with api.follow(session_id, "?after=2") as events:
        assert await events.texts(2) == ["3", "4"]
    async with api.follow(session_id, "?after=1", **{"Last-Event-ID": "3"}) as events:
        assert await events.texts(1) == ["4"]


async def test_client_that_has_all_of_an_ended_session_is_told_to_stay_away(
    api: Api, manual: ManualWorker
) -> None:
    session_id = await begun(api, manual)
    await manual.say("1")
    await manual.complete()
    path = f"/sessions/{session_id}/events"
    query = {"until": "completed"}
    # Its stream was cut behind the last message, so it does not know yet how the session ended.
    async with api.follow(session_id, "?until=completed", **{"Last-Event-ID": "1"}) as events:
        [last] = await events.rest()
    assert (last.event, json.loads(last.data)["inbox_status"]) == ("status", "completed")
    headers = {"Last-Event-ID": last.id}
    assert (await api.client.get(path, params=query, headers=headers)).status_code == 204
    await api.client.delete(f"/sessions/{session_id}")
    # Another end is news.
    async with api.follow(session_id, **headers) as events:
        [last] = await events.rest()
    assert json.loads(last.data)["inbox_status"] == "archived"
    headers = {"Last-Event-ID": last.id}
    assert (await api.client.get(path, headers=headers)).status_code == 204
    async with api.follow(session_id) as events:
        assert [event.event for event in await events.rest()] == ["status", "message"]
    assert not api.context.hub._streams


async def test_stream_ends_when_its_session_is_archived(api: Api) -> None:
    created = await api.create()
    async with api.follow(created["id"]) as events:
        await api.client.delete(f"/sessions/{created['id']}")
        rest = await events.rest()
    assert json.loads(rest[-1].data)["session_status"] == "archived"


async def test_rename_and_new_prompt_are_shown(api: Api) -> None:
    created = await api.create()
    async with api.follow(created["id"]) as events:
        await events.status()
        await api.client.patch(f"/sessions/{created['id']}", json={"title": "New"})
        await events.status(title="New")
        await api.client.post(f"/sessions/{created['id']}/prompts", json={"prompt": "More"})
        assert len((await events.status())["prompts"]) == 2


async def test_heartbeat_while_nothing_happens(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outwake.app.live.events.HEARTBEAT", 0.01)
    created = await api.create()
    async with api.client.stream("GET", f"/sessions/{created['id']}/events") as response:
        lines = response.aiter_lines()
        assert await anext(lines) == "retry: 1000"
        seen: list[str] = []
        async with awaiting("a heartbeat", seen=lambda: seen):
            async for line in lines:
                seen.append(line)
                if line == ": heartbeat":
                    return
    pytest.fail(f"the stream ended without a heartbeat: {seen}")


async def test_only_what_is_followed_is_notified(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    ear = await notified(connect)
    session_id = await begun(api, manual)
    await manual.say("unseen")
    assert await heard(ear) == []
    async with api.follow(session_id) as events:
        assert await events.texts(1) == ["unseen"]
        await watched(api, reads)
        await manual.say("seen")
        assert await events.texts(1) == ["seen"]
        assert await heard(ear) == [session_id]
    await eventually("the streams to end", lambda: not api.context.hub._streams)
    await watched(api, reads)
    await manual.say("unseen again")
    assert await heard(ear) == []


# The handshake. Each writer is stopped between its insert and its commit.


async def test_writer_that_looked_before_the_watch_and_commits_after_it(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    """It saw no watch, so it notifies nobody: only the second read, after its end, shows the message."""
    session_id = await begun(api, manual)
    ear, writer = await notified(connect), await connect(autocommit=False)
    await manual.say("late", conn=writer)
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads, handshakes=1)
        await writer.commit()
        assert await events.texts(1) == ["late"]
        await watched(api, reads)
    assert await heard(ear) == []


async def test_writer_that_looked_after_the_watch(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    session_id = await begun(api, manual)
    ear, writer = await notified(connect), await connect(autocommit=False)
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads)
        await manual.say("later", conn=writer)
        await writer.commit()
        assert await events.texts(1) == ["later"]
    assert await heard(ear) == [session_id]


async def test_writer_that_began_before_the_watch_and_looked_after_it(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    session_id = await begun(api, manual)
    writer = await connect(autocommit=False)
    await writer.execute("LOCK TABLE message IN ROW EXCLUSIVE MODE")
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads, handshakes=1)
        await manual.say("later", conn=writer)
        await writer.commit()
        assert await events.texts(1) == ["later"]
        await watched(api, reads)


async def test_change_of_state_by_a_writer_that_looked_before_the_watch(
    api: Api, connect: Connect, reads: list[int]
) -> None:
    created = await api.create()
    ear, writer = await notified(connect), await connect(autocommit=False)
    await writer.execute("UPDATE session SET title = 'Late' WHERE id = %s", (created["id"],))
    async with api.follow(created["id"]) as events:
        assert (await events.status())["title"] == "Do it"
        await watched(api, reads, handshakes=1)
        await writer.commit()
        await events.status(title="Late")
    assert await heard(ear) == []


async def test_long_foreign_transaction_holds_nobody_back(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    """Of two writers in the set one ends: what it wrote is shown while the other goes on."""
    session_id = await begun(api, manual)
    foreign, writer = await connect(autocommit=False), await connect(autocommit=False)
    await foreign.execute("UPDATE session SET title = title WHERE false")
    await manual.say("late", conn=writer)
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads, handshakes=1)
        await writer.commit()
        assert await events.texts(1) == ["late"]
        await manual.say("by notification")
        assert await events.texts(1) == ["by notification"]
        await watched(api, reads, handshakes=1)
        await foreign.rollback()
        await watched(api, reads)


async def test_writer_that_rolls_back(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    session_id = await begun(api, manual)
    writer = await connect(autocommit=False)
    await manual.say("never", conn=writer)
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads, handshakes=1)
        await writer.rollback()
        await watched(api, reads)
        await manual.say("said")
        first = await events.next("message")
        assert (first.id, json.loads(first.data)["body"]["text"]) == ("1", "said")


# Interruptions.


async def test_resume_again_and_again_while_messages_are_written(api: Api, manual: ManualWorker) -> None:
    session_id = await begun(api, manual)
    total, seed = 600, random.randrange(2**32)
    dice = random.Random(seed)

    async def write() -> None:
        written = 0
        while written < total:
            count = min(dice.randint(1, 9), total - written)
            await manual.say(*(str(written + number) for number in range(1, count + 1)))
            written += count
        await manual.complete()

    async def read() -> list[int]:
        got: list[int] = []
        while True:
            headers = {"Last-Event-ID": str(got[-1])} if got else {}
            path = f"/sessions/{session_id}/events?until=completed"
            stop = len(got) + dice.randint(1, 60)
            async with api.client.stream("GET", path, headers=headers) as response:
                if response.status_code == 204:
                    return got
                async for line in response.aiter_lines():
                    if line.startswith("id: ") and "-" not in line:
                        got.append(int(line[4:]))
                    if len(got) == stop:
                        break
                else:
                    return got

    _, *readers = await asyncio.gather(write(), *(read() for _ in range(5)))
    for got in readers:
        assert got == list(range(1, total + 1)), f"seed {seed}"


async def test_listener_is_killed_while_streaming(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    session_id = await begun(api, manual)
    operator = await connect()
    total = 200

    async def write() -> None:
        for number in range(1, total + 1):
            if number % 40 == 0:
                await operator.execute(KILL_LISTENER)
            await manual.say(str(number))
        await manual.complete()

    async with api.follow(session_id, "?until=completed") as events:
        await watched(api, reads)
        _, rest = await asyncio.gather(write(), events.rest())
    ids = [int(event.id) for event in rest if event.event == "message"]
    assert ids == list(range(1, total + 1))
    assert json.loads(rest[-1].data)["inbox_status"] == "completed"


async def test_what_is_said_while_the_listener_is_away(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is notified to nobody, and nothing else follows."""
    session_id = await begun(api, manual)
    operator, gate = await connect(), asyncio.Event()

    async def gated(*arguments: Any) -> Any:
        await gate.wait()
        return await outwake.connect.connect(*arguments)

    monkeypatch.setattr("outwake._notify.connect", gated)
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads)
        await operator.execute(KILL_LISTENER)
        await eventually("the API to lose its listener", lambda: not api.context.hub.listening)
        await manual.say("missed")
        gate.set()
        assert await events.texts(1) == ["missed"]


async def test_killed_listener_comes_back_under_a_new_presence(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    session_id = await begun(api, manual)
    operator = await connect()
    query = "SELECT presence FROM watcher"
    async with api.follow(session_id) as events:
        await watched(api, reads)
        before = await (await operator.execute(query)).fetchall()
        lost = api.context.hub._watches.current
        await operator.execute(KILL_LISTENER)
        await eventually("a new watch", lambda: api.context.hub._watches.current not in (lost, None))
        await watched(api, reads)
        after = await (await operator.execute(query)).fetchall()
        assert len(after) == 1
        assert after != before
        await manual.say("heard")
        assert await events.texts(1) == ["heard"]


async def test_slow_client_holds_one_batch_and_no_more(
    api: Api, manual: ManualWorker, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    """What is not taken is not read: the stream stays at its cursor, and goes on from there."""
    monkeypatch.setattr("outwake.app.live.hub.BATCH", 10)
    session_id = await begun(api, manual)
    hub = api.context.hub
    stream = hub.follow(UUID(session_id), 0, until_completed=False)
    await stream.begin()
    await stream.take(0)
    await watched(api, reads)
    await manual.say(*(str(number) for number in range(100)))
    await eventually("the stream to be full", lambda: stream.full)
    async with api.follow(session_id) as events:
        assert len(await events.texts(100)) == 100
    assert stream.cursor == 10
    ids: list[int] = []
    while len(ids) < 100:
        lines = (await stream.take(10)).decode().splitlines()
        ids += [int(line[4:]) for line in lines if line.startswith("id: ")]
    assert ids == list(range(1, 101))
    hub.leave(stream)
    await eventually("the stream to end", lambda: not hub._streams)


async def test_client_that_takes_nothing_is_cut_off(
    database: str, manual: ManualWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outwake.app.main.STALL_TIMEOUT", 1)
    async with serving(database) as api:
        session_id = await begun(api, manual)
        body = {"type": "assistant", "text": "x" * 60_000}
        for _ in range(20):
            await manual.store(*[body] * 20)
        url = httpx.URL(api.url)
        assert url.port is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", url.port, limit=1024)
        writer.write(
            f"GET /sessions/{session_id}/events HTTP/1.1\r\nHost: {url.netloc.decode()}\r\n\r\n".encode()
        )
        await eventually("the stream to begin", lambda: bool(api.context.hub._streams))
        await eventually("the streams to end", lambda: not api.context.hub._streams)
        writer.transport.abort()
        del reader


async def test_streams_end_when_the_process_stops(database: str) -> None:
    async with serving(database) as api:
        created = await api.create()
        async with api.follow(created["id"]) as events:
            await events.status()
            api.server.should_exit = True
            assert await events.rest() == []


async def test_notification_that_is_not_understood_reads_every_stream(
    api: Api, manual: ManualWorker, connect: Connect, reads: list[int]
) -> None:
    """A newer schema may say more: any session may be meant."""
    session_id = await begun(api, manual)
    async with api.follow(session_id) as events:
        await events.status()
        await watched(api, reads)
        await manual.conn.execute("DELETE FROM watcher")  # so that the next message notifies nobody
        await manual.say("one")
        before = reads[1]
        assert await heard(await notified(connect)) == []
        assert reads[1] == before
        await manual.conn.execute("NOTIFY outwake_session, 'v2:all'")
        assert await events.texts(1) == ["one"]


async def test_many_streams_are_read_by_few_statements(
    api: Api, manual: ManualWorker, reads: list[int]
) -> None:
    session_id = await begun(api, manual)
    hub = api.context.hub
    streams = [hub.follow(UUID(session_id), 0, until_completed=False) for _ in range(1000)]
    await asyncio.gather(*(stream.begin() for stream in streams))
    for stream in streams:
        await stream.take(0)
    await watched(api, reads)
    before = reads[1]
    await manual.say("one")
    batches = await asyncio.gather(*(stream.take(10) for stream in streams))
    assert all(b"one" in batch for batch in batches)
    assert reads[1] - before <= 2
    for stream in streams:
        hub.leave(stream)
    await watched(api, reads)


async def test_a_worker_notifies_after_its_commit_and_only_who_watches(
    database: str, connect: Connect
) -> None:
    async with serving(database) as api:
        manual = ManualWorker(await connect())
        await manual.register()
        session_id = await begun(api, manual)
    listener = await connect()
    await listener.execute("LISTEN outwake_session")

    async def heard() -> list[str]:
        """What was notified until now: another transaction's notification comes after it."""
        await manual.conn.execute("NOTIFY outwake_session, 'now'")
        found = []
        async for notification in listener.notifies(timeout=60):
            if notification.payload == "now":
                break
            found.append(notification.payload)
        return found

    assert await manual.say_later("nobody watches") is False
    assert await heard() == []
    await manual.conn.execute("INSERT INTO watcher (session_id, presence) VALUES (%s, 1)", (session_id,))
    assert await manual.say_later("watched") is True
    assert await heard() == []
    await manual.conn.execute("SELECT session_notify(%s)", (session_id,))
    assert await heard() == [session_id]
    async with manual.conn.transaction():  # what was put off does not put off others
        await manual.say_later("watched")
        await manual.say("at once")
    assert await heard() == [session_id]


async def test_a_client_that_stays_is_told_the_end_once(api: Api, manual: ManualWorker) -> None:
    session_id = await begun(api, manual)
    async with api.follow(session_id, "?until=completed") as events:
        await events.next("status")
        await manual.say("1")
        assert await events.texts(1) == ["1"]
        await manual.complete()
        rest = await events.rest()
    assert [event.event for event in rest][-1] == "status"
    assert rest[-1].id.startswith("1-")
    path = f"/sessions/{session_id}/events?until=completed"
    answer = await api.client.get(path, headers={"Last-Event-ID": rest[-1].id})
    assert answer.status_code == 204


async def test_streams_that_do_not_read_hold_a_share_of_the_memory(api: Api, manual: ManualWorker) -> None:
    session_id = await begun(api, manual)
    for _ in range(4):
        await manual.say(*("x" * 200_000 for _ in range(5)))
    hub = api.context.hub
    idle = [hub.follow(UUID(session_id), 0, until_completed=False, reader="bob") for _ in range(200)]
    await eventually("bob's first batches", lambda: any(stream.held for stream in idle))
    other = hub.follow(UUID(session_id), 0, until_completed=False, reader="alice")
    await other.begin()
    # A batch may go beyond its size by one message, and one round of reads had begun.
    assert all(stream.held < 400_000 for stream in idle)
    assert sum(stream.held > 0 for stream in idle) <= HELD_FOR_READER // BATCH_BYTES
    for stream in [*idle, other]:
        hub.leave(stream)
