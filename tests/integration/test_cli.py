"""The `outwake` command as people and programs use it: real processes, real terminals."""

import asyncio
import json
import os
import pty
import re
import shlex
import signal
import socket
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from outwake.cli.output import clean, duration
from outwake.sql import LINES, Line, files, newest
from tests.conftest import Connect
from tests.support.manual_worker import ManualWorker
from tests.support.process import ROOT, Process, command_line, running
from tests.support.scenario import SESSION, build
from tests.support.steps import add, one
from tests.support.waits import TIMEOUT, awaiting


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
    assert process.stderr == ["outwake: schema outwake has no outbox tables: run `outwake migrate`"]


async def test_top_shows_what_changes(database: str, connect: Connect) -> None:
    conn = await connect()
    async with running("outwake", "top", "--json", "--every", "0.1", env={"DATABASE_URL": database}) as top:

        async def until(rows: int) -> None:
            await top.says(f"{rows} rows", lambda: any(_rows(line) == rows for line in top.stdout[-1:]))

        def _rows(line: str) -> int:
            return sum(row["rows"] for row in json.loads(line)["outbox"] if row["topic"] == "t")

        await until(0)
        await add(conn, "t")
        await until(1)
        top.send(signal.SIGINT)
        assert await top.ended() == 130
        assert top.stderr == []


@dataclass
class Terminal:
    """What a person at a terminal has of a process."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    descriptor: int

    def press(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)


@asynccontextmanager
async def on_a_terminal(
    database: str, *arguments: str, columns: int = 200, lines: int = 60
) -> AsyncIterator[Terminal]:
    """Run it where it finds a terminal."""
    size = {"COLUMNS": str(columns), "LINES": str(lines)}
    ours, theirs = pty.openpty()
    env = {**os.environ, "DATABASE_URL": database, "PYTHONPATH": str(ROOT), "TERM": "xterm"} | size
    process = await asyncio.create_subprocess_exec(
        *command_line("outwake"), *arguments, stdin=theirs, stdout=theirs, stderr=theirs, env=env
    )
    os.close(theirs)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", 0)
    )
    try:
        yield Terminal(process, reader, ours)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        transport.close()


async def test_top_on_a_terminal_gives_the_screen_back(database: str, connect: Connect) -> None:
    await build(connect)
    async with on_a_terminal(database, "top", "--every", "0.1") as terminal:
        process, reader = terminal.process, terminal.reader
        said = b""
        async with awaiting("top's screen, and its end", seen=lambda: said):
            while not (b"NOT READY" in said and b"topic paused" in said):
                said += await reader.read(65536)
            process.send_signal(signal.SIGINT)
            while b"\x1b[?1049l" not in said:
                said += await reader.read(65536)
            assert await process.wait() == 130
    assert said.index(b"\x1b[?1049h") < said.index(b"NOT READY")  # on the other screen


async def test_top_shows_what_is_stuck_on_a_small_screen_and_ends_by_q(
    database: str, connect: Connect
) -> None:
    """At 80 by 24 each row that waits has a line of its own, with its reason, and nothing comes before."""
    scenario = await build(connect)
    conn = await connect()
    stuck = "SELECT id::text, reason FROM outbox_waiting WHERE reason NOT IN ('due', 'scheduled')"
    expected = await (await conn.execute(stuck)).fetchall()
    assert len(expected) >= 5
    async with on_a_terminal(database, "top", "--every", "0.1", columns=80, lines=24) as terminal:
        said = b""
        async with awaiting("two screens of top", seen=lambda: said):
            while said.count(b"NOT READY") < 2:
                said += await terminal.reader.read(65536)
        terminal.press(b"q")
        async with awaiting("top to end", seen=lambda: said):
            while b"\x1b[?1049l" not in said:
                said += await terminal.reader.read(65536)
            assert await terminal.process.wait() == 0
    first = next(frame for frame in said.split(b"\x1b[H") if b"NOT READY" in frame).decode()
    screen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", first).splitlines()
    assert len(screen) <= 24
    assert max(map(len, screen)) <= 80
    begins = next(place for place, line in enumerate(screen) if line.startswith("Waiting or dead"))
    assert begins == 1
    for row, reason in expected:
        assert [line for line in screen if line.split()[:1] == [row] and reason in line], (row, screen)
    assert scenario.rows


async def test_top_ends_without_a_word_when_its_reader_has_gone(database: str) -> None:
    top = " ".join(map(shlex.quote, [*command_line("outwake"), "top", "--json", "--every", "0.1"]))
    process = await asyncio.create_subprocess_shell(
        f"{top} | head -n 2",
        env={**os.environ, "DATABASE_URL": database, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with awaiting("both to end"):
        output, errors = await process.communicate()
    assert len(output.splitlines()) == 2
    assert errors == b""


async def test_wake_says_what_it_did(database: str, connect: Connect, manual: ManualWorker) -> None:
    ear = await connect()
    await ear.execute("LISTEN outwake_wake")
    process = await run(database, "wake")
    assert process.stdout == ["woke every worker; present now: 1"]
    assert await process.ended() == 0
    async for note in ear.notifies(timeout=60, stop_after=1):
        assert note.payload == "*@0"


async def test_tail_follows_to_the_end(database: str, connect: Connect, manual: ManualWorker) -> None:
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
            await tail.says(f"{count} lines", lambda: len(tail.stdout) >= count)
            return [json.loads(line) for line in tail.stdout]

        assert (await lines(1))[0]["inbox_status"] == "active"
        await manual.claim()
        assert (await lines(2))[1]["inbox_status"] == "pending"
        await manual.say("one", "two")
        await lines(4)
        await manual.say("three")
        await conn.execute("SELECT outbox_complete(%s, %s, %s)", (manual.id, [manual.row], [manual.attempt]))
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


async def test_tail_goes_on_after_a_lost_connection(
    database: str, connect: Connect, manual: ManualWorker
) -> None:
    scenario = await build(connect)
    env = {"DATABASE_URL": database}
    async with running("outwake", "tail", str(SESSION), "--json", env=env) as tail:

        async def seen(seq: int) -> None:
            await tail.says(
                f"message {seq}", lambda: any(json.loads(line).get("seq") == seq for line in tail.stdout)
            )

        await seen(4)
        kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        assert await one(scenario.conn, kill, "outwake tail listener")
        await tail.says("that it reconnects", lambda: any("reconnecting" in line for line in tail.stderr))
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
    async with on_a_terminal(empty_database, "migrate") as terminal:
        process, reader = terminal.process, terminal.reader
        said = b""
        async with awaiting("the migrations, and the end", seen=lambda: said, timeout=TIMEOUT * 8):
            while _in_place("outbox", "session").encode() not in said:
                said += await reader.read(65536)
            assert await process.wait() == 0
    assert b"applying outbox/0001_" in said
    assert "━".encode() in said


def _in_place(*lines: Line) -> str:
    return "schema outwake: " + ", ".join(f"{line} {newest(line)}" for line in lines)


async def steps(database: str, *arguments: str) -> dict[str, list[str]]:
    """The names of `outwake migrate --list`, by state."""
    process = await run(database, "migrate", "--list", "--json", *arguments)
    assert await process.ended() == 0, process.stderr
    found: dict[str, list[str]] = {}
    for line in process.stdout:
        step = json.loads(line)
        found.setdefault(step["state"], []).append(step["name"])
    return found


async def test_migrate_tells_what_it_would_do(empty_database: str, connect: Connect) -> None:
    everything = [file for line in LINES for file in files(line)]
    names = [file.name for file in sorted(everything, key=lambda file: file.number is None)]
    process = await run(empty_database, "migrate", "--dry-run")
    assert process.stdout == [f"would apply {name}" for name in names]
    assert await steps(empty_database) == {"missing": names}
    conn = await connect(empty_database)
    assert await one(conn, "SELECT count(*) FROM pg_namespace WHERE nspname = 'outwake'") == 0

    process = await run(empty_database, "migrate", "--only", "outbox")
    outbox = [file.name for file in files("outbox")]
    assert process.stdout == [*(f"applying {name}" for name in outbox), _in_place("outbox")]
    assert await steps(empty_database, "--only", "outbox") == {"applied": outbox}
    missing = [name for name in names if name not in outbox]
    assert await steps(empty_database) == {"applied": outbox, "missing": missing}
    shown = "\n".join((await run(empty_database, "migrate", "--list")).stdout)
    assert re.search(r"^ outbox/0001_\w+ +numbered +applied +goes on +\d{4}-", shown, re.MULTILINE)
    assert re.search(r"^ session/0001_\w+ +numbered +missing", shown, re.MULTILINE)

    process = await run(empty_database, "migrate")
    assert process.stdout[-1] == _in_place("outbox", "session")
    assert (await run(empty_database, "migrate")).stdout == [_in_place("outbox", "session")]
    process = await run(empty_database, "migrate", "--dry-run")
    assert process.stdout == ["schema outwake: nothing to apply"]
    assert (await run(empty_database, "migrate", "--print")).stdout == []


async def test_migrate_prints_what_is_missing(empty_database: str, connect: Connect) -> None:
    """Without a database all of it; both give a database that has all."""
    await run(empty_database, "migrate", "--only", "outbox")
    conn = await connect(empty_database)
    for database in (empty_database, None):
        async with running("outwake", "migrate", "--print", env={"DATABASE_URL": database}) as process:
            assert await process.ended() == 0
        if database is None:
            await conn.execute("DROP SCHEMA outwake CASCADE")
        await conn.execute("\n".join(process.stdout).encode())
        assert list(await steps(empty_database)) == ["applied"]


async def test_uninstall_needs_no_database(empty_database: str, connect: Connect) -> None:
    await run(empty_database, "migrate")
    async with running("outwake", "uninstall", env={"DATABASE_URL": None}) as process:
        assert await process.ended() == 0
    assert process.stdout[0] == "DROP SCHEMA IF EXISTS outwake CASCADE;"
    conn = await connect(empty_database)
    await conn.execute("\n".join(process.stdout).encode())
    assert await one(conn, "SELECT count(*) FROM pg_namespace WHERE nspname = 'outwake'") == 0


@pytest.mark.parametrize("command", [["uninstall"], ["migrate", "--print"]], ids=" ".join)
async def test_another_schema(command: list[str]) -> None:
    env = {"DATABASE_URL": None, "OUTWAKE_SCHEMA": "shop_outbox"}
    async with running("outwake", *command, env=env) as process:
        assert await process.ended() == 0
    assert "shop_outbox" in process.stdout[0]
    async with running("outwake", *command, env={**env, "OUTWAKE_SCHEMA": "public"}) as process:
        assert await process.ended() == 2
    assert (process.stdout, len(process.stderr)) == ([], 1)
    assert process.stderr[0].startswith("outwake: OUTWAKE_SCHEMA: public ")


@pytest.mark.parametrize(
    "arguments",
    [["--json"], ["--list", "--print"], ["--dry-run", "--print"], ["--only", "session"]],
    ids=" ".join,
)
async def test_migrate_refuses_what_makes_no_sense(arguments: list[str]) -> None:
    process = await run("postgresql://nowhere/x", "migrate", *arguments)
    assert await process.ended() == 2
    assert process.stdout == []


async def test_output_that_nobody_reads_is_no_error() -> None:
    """`outwake migrate --print | head`"""
    env = {**os.environ, "DATABASE_URL": "", "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *command_line("outwake"), "migrate", "--print", stdout=PIPE, stderr=PIPE, env=env, limit=1
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert await process.stdout.read(1) == b"-"
    process.stdout._transport.close()  # type: ignore[attr-defined]
    assert await process.stderr.read() == b""
    assert await process.wait() == 1


async def test_version() -> None:
    async with running("outwake", "--version") as process:
        assert await process.ended() == 0
    assert process.stdout == [f"outwake {version('outwake')}"]


async def test_outwake_worker_is_worker() -> None:
    for arguments in (["--help"], ["--nosuch"], ["--check"]):
        said = []
        for command in (["outwake", "worker"], ["worker"]):
            env = {"DATABASE_URL": "postgresql://nowhere/x", "OUTWAKE_HEALTH_PORT": None}
            async with running(*command, *arguments, env=env) as process:
                status = await process.ended()
            said.append((status, process.stdout, process.stderr))
        assert said[0] == said[1]
        assert said[0][0] == (0 if arguments == ["--help"] else 2)


SECRET = "s3cr3t-passw0rd"
COMMANDS = [
    ["migrate"],
    ["migrate", "--list"],
    ["migrate", "--print"],
    ["api"],
    ["worker"],
    ["worker", "--check"],
    ["worker", "--processes", "2"],
    ["status"],
    ["top"],
    ["tail", str(SESSION)],
    ["retry", "1"],
    ["wake"],
    ["prune"],
    ["token", "list"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_a_url_that_cannot_be_read_is_not_shown(command: list[str], tmp_path: Path) -> None:
    """tests/unit/test_configuration.py has the many ways to be wrong."""
    url = f"postgresql+psycopg://u:{SECRET}@127.0.0.1:1/x?nosuch=1"
    (tmp_path / "url").write_text(url + "\n")
    for name, value in (("DATABASE_URL", url), ("OUTWAKE_DATABASE_URL_FILE", str(tmp_path / "url"))):
        async with running("outwake", *command, env={"DATABASE_URL": None, name: value}) as process:
            assert await process.ended() == 2
        assert (process.stdout, len(process.stderr)) == ([], 1)
        assert re.match(rf"(outwake|worker): {name}: has a connection option", process.stderr[0])
        assert SECRET not in process.stderr[0]


GO_ON = ("api", "worker", "tail")  # they wait for the database


@pytest.mark.parametrize("command", [words for words in COMMANDS if words[0] not in GO_ON], ids=" ".join)
async def test_a_database_that_is_away_shows_no_password(command: list[str]) -> None:
    with socket.socket() as taken:  # bound and not listening: it refuses
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql+asyncpg://u:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/x"
        process = await run(url, *command)
        assert await process.ended() == 1
    assert (process.stdout, len(process.stderr)) == ([], 1)
    assert process.stderr[0].startswith("outwake: ")
    assert SECRET not in process.stderr[0]


@pytest.mark.parametrize(
    ("command", "event"),
    [
        (["worker"], "disconnected"),
        (["worker", "--processes", "2"], "disconnected"),
        (["api"], "database_not_reached"),
    ],
)
async def test_a_process_that_waits_for_its_database_logs_no_password(command: list[str], event: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql+asyncpg://u:{SECRET}@127.0.0.1:{taken.getsockname()[1]}/x"
        env = {
            "DATABASE_URL": url,
            "OUTWAKE_LOG_LEVEL": "debug",
            "OUTWAKE_PORT": "0",
            "OUTWAKE_DRAIN_GRACE": "0",
        }
        async with running("outwake", *command, env=env) as process:
            await process.event(event)
            process.send(signal.SIGTERM)
            assert await process.ended() == 0
    assert SECRET not in "\n".join(process.stderr)


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("status", "rich", "cli"), ("migrate", "structlog", "cli"), ("token list", "pydantic_settings", "cli")],
)
async def test_a_package_that_is_missing(command: str, module: str, extra: str, tmp_path: Path) -> None:
    """The extras of their own, of `api` and `worker`, are in tests/wheel."""
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module', name={module!r})")
    env = {"DATABASE_URL": "postgresql://nowhere/x", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    async with running("outwake", *command.split(), env=env) as process:
        assert await process.ended() == 2
    name = command.split()[0]
    expected = f"outwake: the command {name} needs {module}: pip install 'outwake[{extra}]'"
    assert process.stderr == [expected]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (59, "59 s"), (61, "1 min 1 s"), (7300, "2 h 1 min"), (90000, "1 d 1 h"),
     (-3, "-3.0 s"), (-90, "-1 min 30 s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(timedelta(seconds=seconds)) == text


def test_control_characters_are_shown_not_obeyed() -> None:
    assert clean("a\x1b]0;x\x07\x9b2J\tb\nc\x7fé") == "a\\x1b]0;x\\x07\\x9b2J\tb\nc\\x7fé"
