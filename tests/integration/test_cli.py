"""The `outwake` command as people and programs use it: real processes, real terminals."""

import asyncio
import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from outwake.cli.output import clean, duration
from tests.conftest import Connect
from tests.support.hand import Hand
from tests.support.process import ROOT, Process, command_line, running
from tests.support.scenario import SESSION, build
from tests.support.steps import TIMEOUT, add, one


async def run(database: str, *arguments: str) -> Process:
    async with running("outwake", *arguments, env={"DATABASE_URL": database}) as process:
        await process.ended()
    return process


async def test_status_as_tables(database: str, connect: Connect) -> None:
    await build(connect)
    process = await run(database, "status")
    text = "\n".join(process.stdout)
    assert text.startswith("NOT READY  row 15 of topic fax.send has been due for 00:05:")
    for line in ("topic paused", "worker lost", "550 no such mailbox", "worker-3", "no worker"):
        assert line in text
    assert await process.ended() == 1
    assert "\x1b" not in text


async def test_status_as_json(database: str, connect: Connect) -> None:
    scenario = await build(connect)
    process = await run(database, "status", "--json")
    [line] = process.stdout
    found = json.loads(line)
    assert found["ready"]["stuck"] is True
    states = {worker["id"]: worker["state"] for worker in found["workers"]}
    assert states[str(scenario.lost)] == "lost"
    reasons = {row["id"]: row["reason"] for row in found["waiting"]}
    assert reasons[scenario.rows["nobody"]] == "no worker"
    assert scenario.rows["scheduled"] not in reasons
    [nobody] = [row for row in found["waiting"] if row["id"] == scenario.rows["nobody"]]
    assert nobody["waited"] > 299  # seconds
    assert await process.ended() == 1


async def test_status_of_a_database_without_our_schema(empty_database: str) -> None:
    process = await run(empty_database, "status")
    assert await process.ended() == 2
    assert process.stderr == ["outwake: the database has schema 0, " + process.stderr[0].partition("0, ")[2]]


async def test_top_shows_what_changes(database: str, connect: Connect) -> None:
    conn = await connect()
    async with running("outwake", "top", "--json", "--every", "0.1", env={"DATABASE_URL": database}) as top:

        async def until(rows: int) -> None:
            async with asyncio.timeout(60):
                while not any(_rows(line) == rows for line in top.stdout[-1:]):
                    await top._news.wait()

        def _rows(line: str) -> int:
            return sum(row["rows"] for row in json.loads(line)["outbox"] if row["topic"] == "t")

        await until(0)
        await add(conn, "t")
        await until(1)
        top.send(signal.SIGINT)
        assert await top.ended() == 130
        assert top.stderr == []


_SIZE = {"COLUMNS": "200", "LINES": "60"}


@asynccontextmanager
async def on_a_terminal(database: str, *arguments: str) -> AsyncIterator[tuple[Any, asyncio.StreamReader]]:
    """Run it where it finds a terminal, 200 columns wide."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "DATABASE_URL": database, "PYTHONPATH": str(ROOT), "TERM": "xterm"} | _SIZE
    process = await asyncio.create_subprocess_exec(
        *command_line("outwake"), *arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", 0)
    )
    try:
        yield process, reader
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        transport.close()


async def test_top_on_a_terminal_gives_the_screen_back(database: str, connect: Connect) -> None:
    await build(connect)
    async with on_a_terminal(database, "top", "--every", "0.1") as (process, reader):
        said = b""
        async with asyncio.timeout(60):
            while not (b"NOT READY" in said and b"topic paused" in said):
                said += await reader.read(65536)
            process.send_signal(signal.SIGINT)
            while b"\x1b[?1049l" not in said:
                said += await reader.read(65536)
            assert await process.wait() == 130
    assert said.index(b"\x1b[?1049h") < said.index(b"NOT READY")  # on the other screen


async def test_tail_follows_to_the_end(database: str, connect: Connect, hand: Hand) -> None:
    conn = await connect()
    await conn.execute(
        "INSERT INTO session (id, repo, target_branch, branch, title)"
        " VALUES (%s, 'o/t', 'main', 'b', 'Title')",
        (SESSION,),
    )
    prompt = UUID("0199a2c4-6f00-7000-8000-000000000002")
    await conn.execute("INSERT INTO prompt (id, session_id, text) VALUES (%s, %s, 'x')", (prompt, SESSION))
    payload = {"session_id": str(SESSION), "prompt_id": str(prompt)}
    await add(conn, "session.run", payload=payload, ordering_key=f"session:{SESSION}")
    env = {"DATABASE_URL": database}
    async with running("outwake", "tail", str(SESSION), "--json", "--until-completed", env=env) as tail:

        async def lines(count: int) -> list[dict[str, Any]]:
            async with asyncio.timeout(60):
                while len(tail.stdout) < count:
                    await tail._news.wait()
            return [json.loads(line) for line in tail.stdout]

        assert (await lines(1))[0]["inbox_status"] == "active"
        await hand.claim()
        assert (await lines(2))[1]["inbox_status"] == "pending"
        await hand.say("one", "two")
        await lines(4)
        await hand.say("three")
        await conn.execute("SELECT outbox_complete(%s, %s, %s)", (hand.id, [hand.row], [hand.attempt]))
        assert await tail.ended() == 0
        events = [json.loads(line) for line in tail.stdout]
    assert [event["body"]["text"] for event in events if event["event"] == "message"] == [
        "one",
        "two",
        "three",
    ]
    assert [event["seq"] for event in events if event["event"] == "message"] == [1, 2, 3]
    assert events[-1]["inbox_status"] == "completed"
    assert await one(conn, "SELECT count(*) FROM watcher") == 0

    # For people, and a terminal that must not obey what an agent printed.
    await build_escape(connect)
    text = "\n".join((await run(database, "tail", str(SESSION), "--until-completed")).stdout)
    assert "three" in text
    assert "\\x1b[2J" in text
    assert "\x1b" not in text
    later = await run(database, "tail", str(SESSION), "--json", "--after", "3", "--until-completed")
    assert [json.loads(line).get("seq") for line in later.stdout] == [4, None]


async def build_escape(connect: Connect) -> None:
    conn = await connect()
    await conn.execute(
        "INSERT INTO message (session_id, seq, prompt_id, attempt, body)"
        " SELECT session_id, 4, prompt_id, attempt, %s FROM message LIMIT 1",
        ('{"type": "text", "text": "\\u001b[2Jgone"}',),
    )


async def test_tail_goes_on_after_a_lost_connection(database: str, connect: Connect, hand: Hand) -> None:
    scenario = await build(connect)
    env = {"DATABASE_URL": database}
    async with running("outwake", "tail", str(SESSION), "--json", env=env) as tail:

        async def seen(seq: int) -> None:
            async with asyncio.timeout(60):
                while not any(json.loads(line).get("seq") == seq for line in tail.stdout):
                    await tail._news.wait()

        await seen(4)
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        assert await one(scenario.conn, kill, "outwake tail listener")
        async with asyncio.timeout(60):
            while not any("reconnecting" in line for line in tail.stderr):
                await tail._news.wait()
        await scenario.conn.execute(
            "INSERT INTO message (session_id, seq, prompt_id, attempt, body)"
            " SELECT session_id, 5, prompt_id, attempt, '{}' FROM message LIMIT 1"
        )
        await seen(5)
        seqs = [json.loads(line)["seq"] for line in tail.stdout if "seq" in json.loads(line)]
        assert seqs == [1, 2, 3, 4, 5]
        tail.send(signal.SIGINT)
        assert await tail.ended() == 130


async def test_tail_of_no_session(database: str) -> None:
    process = await run(database, "tail", str(SESSION))
    assert process.stderr == [f"outwake: there is no session {SESSION}"]
    assert await process.ended() == 1
    process = await run(database, "tail", "nonsense")
    assert await process.ended() == 2


async def test_prune_deletes_what_is_past_its_retention(database: str, connect: Connect) -> None:
    conn = await connect()
    await conn.execute("DELETE FROM outbox")
    await conn.execute(
        "INSERT INTO outbox (topic, state, created_at, finished_at)"
        " SELECT 't', 'done', now() - interval '9 days', now() - interval '8 days'"
        " FROM generate_series(1, 2500)"
    )
    await conn.execute("INSERT INTO outbox (topic, state, finished_at) VALUES ('t', 'done', now())")
    process = await run(database, "prune")
    assert process.stdout == ["deleted 2500 rows of outbox and 0 of other tables"]
    assert await one(conn, "SELECT count(*) FROM outbox") == 1


async def test_migrate_shows_progress_on_a_terminal(empty_database: str) -> None:
    async with on_a_terminal(empty_database, "migrate") as (process, reader):
        async with asyncio.timeout(TIMEOUT * 8):
            said = b""
            while b"is in place" not in said:
                said += await reader.read(65536)
            assert await process.wait() == 0
    assert b"applying 0001_tables" in said
    assert "━".encode() in said


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (59, "59 s"), (61, "1 min 1 s"), (7300, "2 h 1 min"), (90000, "1 d 1 h"),
     (-3, "-3.0 s"), (-90, "-1 min 30 s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(timedelta(seconds=seconds)) == text


def test_control_characters_are_shown_not_obeyed() -> None:
    assert clean("a\x1b]0;x\x07\x9b2J\tb\nc\x7fé") == "a\\x1b]0;x\\x07\\x9b2J\tb\nc\\x7fé"
