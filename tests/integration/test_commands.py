"""The operator's commands: what they print, and their exit status."""

import socket

import pytest

from tests.conftest import Connect
from tests.support.process import running
from tests.support.steps import add, get
from tests.support.worker import watched


async def outwake(*arguments: str, **env: str | None) -> tuple[int, list[str], list[str]]:
    async with running("outwake", *arguments, env=env) as process:
        status = await process.ended()
        return status, process.stdout, process.stderr


async def test_retry_discard_and_cancel(connect: Connect, database: str) -> None:
    conn = await connect()
    first, second, waits = await add(conn, state="dead"), await add(conn, state="dead"), await add(conn)
    assert await outwake("retry", str(first), DATABASE_URL=database) == (0, [f"{first} ready"], [])
    assert await outwake("discard", str(second), DATABASE_URL=database) == (0, [f"{second} cancelled"], [])
    assert await outwake("cancel", str(waits), str(first), DATABASE_URL=database) == (
        0,
        [f"{waits} cancelled", f"{first} cancelled"],
        [],
    )


async def test_row_that_is_in_no_state_for_it(connect: Connect, database: str) -> None:
    """Exit status 1; the other rows named are still done."""
    conn = await connect()
    ready, dead = await add(conn), await add(conn, state="dead")
    status, out, err = await outwake("retry", str(ready), "999999", str(dead), DATABASE_URL=database)
    assert (status, err) == (1, [])
    assert out[0].startswith(f"{ready} unchanged")
    assert out[1].startswith("999999 unchanged")
    assert out[2] == f"{dead} ready"
    assert await get(conn, dead) == "ready"


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["unknown"], ["un\nknown"], ["--unknown"], ["retry"], ["retry", "seven"], ["cancel", "1.5"]),
        *(["top", "--every", "0"], ["top", "--every", "x"], ["tail"], ["tail", "no id"], ["status", "1"]),
        *(["migrate", "--list", "--print"], ["migrate", "--only", "x"], ["wake", "x"], ["prune", "--json"]),
        *(["token"], ["token", "create"], ["token", "create", "--user", "u", "--name", "n", "--days", "x"]),
        *(["worker", "--concurrency", "0"], ["worker", "--concurrency", "x"], ["worker", "x"]),
    ],
    ids=" ".join,
)
async def test_wrong_usage_is_one_line_and_status_2(arguments: list[str], database: str) -> None:
    status, out, err = await outwake(*arguments, DATABASE_URL=database)
    assert (status, out, len(err)) == (2, [], 1), err
    assert err[0].startswith(("outwake: ", "worker: "))
    assert err[0].endswith("--help`")


async def test_number_that_no_row_can_have(database: str) -> None:
    """One line, no traceback."""
    status, out, err = await outwake("retry", "99999999999999999999999", DATABASE_URL=database)
    assert (status != 0, out, len(err)) == (True, [], 1), err


@pytest.mark.parametrize("command", [["retry", "1"], ["wake"], ["migrate"]], ids=" ".join)
async def test_setting_that_is_missing(command: list[str]) -> None:
    status, out, err = await outwake(*command, DATABASE_URL=None)
    assert (status, out, err) == (2, [], ["outwake: DATABASE_URL: is not set"])


@pytest.mark.parametrize("command", [["retry", "1"], ["wake"], ["migrate"]], ids=" ".join)
async def test_database_that_is_not_there(command: list[str]) -> None:
    with socket.socket() as taken:  # bound and not listening: it refuses
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql://postgres@127.0.0.1:{taken.getsockname()[1]}/x"
        status, out, err = await outwake(*command, DATABASE_URL=url)
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith("outwake: ")


@pytest.mark.parametrize("command", [["retry", "1"], ["wake"]], ids=" ".join)
async def test_database_without_our_schema(command: list[str], empty_database: str) -> None:
    status, out, err = await outwake(*command, DATABASE_URL=empty_database)
    assert (status, out, len(err)) == (1, [], 1)


async def test_wake(connect: Connect, database: str) -> None:
    """1. W sleeps. 2. A row comes that no trigger saw. 3. `outwake wake`."""
    psql = await connect()
    async with watched(database) as worker:
        await psql.execute("ALTER TABLE outbox DISABLE TRIGGER USER")
        row = await add(psql)
        assert await outwake("wake", DATABASE_URL=database) == (0, ["woke every worker; present now: 1"], [])
        await worker.has_run(row)


async def test_migrate_prints_the_sql_without_a_database() -> None:
    status, out, err = await outwake("migrate", "--print", DATABASE_URL=None)
    assert (status, err) == (0, [])
    assert out[0].startswith("-- Outwake ")
    tables = out.index("-- outbox/0001_tables")
    assert tables < out.index("-- session/0001_tables") < out.index("-- outbox/claim")


async def test_worker_with_a_wrong_setting(database: str) -> None:
    """One line that names the variable, exit status 2."""
    for env, name in (
        ({"DATABASE_URL": None}, "DATABASE_URL"),
        ({"DATABASE_URL": database, "OUTWAKE_LEASE": "soon"}, "OUTWAKE_LEASE"),
        ({"DATABASE_URL": database, "OUTWAKE_LOG_LEVEL": "loud"}, "OUTWAKE_LOG_LEVEL"),
    ):
        async with running("worker", env=env) as process:
            assert await process.ended() == 2
            assert len(process.stderr) == 1
            assert process.stderr[0].startswith(f"worker: {name}: ")


async def test_worker_with_an_old_schema(empty_database: str) -> None:
    async with running("worker", env={"DATABASE_URL": empty_database}) as process:
        assert await process.ended() == 2
        assert process.stderr[-1].endswith("run `outwake migrate`")


async def test_worker_with_a_topic_nobody_handles(database: str) -> None:
    async with running("worker", "--topics", "nosuch", env={"DATABASE_URL": database}) as process:
        assert await process.ended() == 2
        assert "no handler for the topic 'nosuch'" in process.stderr[-1]
