"""Connections that break: by a restart, by an operator, and without a sign.

A path that has gone silent sends no error: nothing is sent, so nothing fails. The tests swallow bytes in
a proxy, or take a network link down, and wait until the worker has noticed by itself.
"""

import asyncio
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest

from outwake import Job, migrate
from outwake._claim import Claimed
from outwake._notify import PRESENCES
from outwake.connect import connect as connect_noticing
from outwake.embedded.postgres import EmbeddedPostgres
from outwake.schema import in_schema
from outwake.worker import messages
from outwake.worker.engine.lease import Lease
from outwake.worker.messages import answer_soon, retry_until_available
from tests.conftest import Connect
from tests.support.database import set_search_path
from tests.support.process import ROOT, running
from tests.support.proxy import Proxy, address, on, proxied
from tests.support.sleepers import end_listener, end_session
from tests.support.steps import add, claim, column, get, new_worker, one, until
from tests.support.waits import awaiting
from tests.support.worker import install, watched


@pytest.mark.parametrize("lease", [0.2, 1, 3, 6, 60, 600, 3600])
async def test_both_ends_notice_silence_within_a_lease(lease: float, server: str) -> None:
    """What was asked for is in force: here by getsockopt, on the server by its settings."""
    if address(server)[0].startswith("/"):
        pytest.skip("not over TCP")
    async with await connect_noticing(server, "test", timedelta(seconds=lease)) as conn:
        with socket.socket(fileno=os.dup(conn.pgconn.socket)) as ours:
            options = [
                ours.getsockopt(socket.IPPROTO_TCP, name)
                for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            ]
            assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == lease * 1000
        names = ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        theirs = [int(await one(conn, f"SELECT current_setting('{name}')")) for name in names]
        assert theirs == options
        idle, interval, count = options
        assert idle + interval * count <= max(lease, 2)
        timeout = await one(conn, "SELECT setting FROM pg_settings WHERE name = 'tcp_user_timeout'")
        assert int(timeout) == lease * 1000


async def test_options_of_the_url_stay(server: str) -> None:
    """The server's settings are added to those that the URL asks for."""
    url = psycopg.conninfo.make_conninfo(server, options="-c search_path=elsewhere")
    async with await connect_noticing(url, "test", timedelta(seconds=6)) as conn:
        assert await one(conn, "SHOW search_path") == "elsewhere"
        assert await one(conn, "SHOW tcp_keepalives_idle") == "2"


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server of the test's own, to be stopped and started."""
    server = EmbeddedPostgres(tmp_path / "data", settings={"fsync": "off"})
    try:
        server.start()
        set_search_path(server.url)
        yield server
    finally:
        server.remove()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_restart_of_postgres(mode: Literal["fast", "immediate"], postgres: EmbeddedPostgres) -> None:
    """1. W runs a row, with a lease shorter than the outage. 2. Postgres stops; W goes on with its work.
    3. Postgres is back: W completes the row under its first attempt, and starts a new one at once.
    """
    await migrate(postgres.url)
    goes_on, reached = asyncio.Event(), asyncio.Event()

    async def long(job: Job) -> None:
        reached.set()
        await goes_on.wait()

    async with watched(postgres.url, run=long, lease=0.5) as worker:
        async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as conn:
            row = await add(conn)
        async with awaiting("the handler to start"):
            await reached.wait()
        worker.parts.lease.renew_at = math.inf  # so that it is the LISTEN connection that tells
        await asyncio.to_thread(postgres.stop, mode)
        held = worker.hold("connect")
        await held.wait()
        held.release()
        ended = time.monotonic() + worker.parts.lease.remaining()
        while time.monotonic() < ended:  # noqa: ASYNC110 - its lease goes by, and nobody tells of that
            await asyncio.sleep(0.05)
        assert worker.readiness() | {"stage": ""} == {
            "ready": False, "worker_id": str(worker.id), "stage": "", "running": 1, "draining": False,
            "schema": "current",
        }  # fmt: skip
        await asyncio.to_thread(postgres.start)
        async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as conn:
            goes_on.set()
            await until(conn, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
            assert (await get(conn, row, "attempt"), await get(conn, row, "failures")) == (1, 0)
            second = await add(conn)
            await worker.has_run(second)


async def test_outage_rescues_nobody_for_a_lease(postgres: EmbeddedPostgres) -> None:
    """1. A's lease runs out while Postgres is down. 2. R, back first, waits for one lease. 3. A, back in
    time, keeps its row.
    """
    await migrate(postgres.url)
    async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as conn:
        a = await new_worker(conn)
        row = await add(conn)
        await claim(conn, a, lease=timedelta(seconds=1))
    await asyncio.to_thread(postgres.stop, "immediate")
    await asyncio.to_thread(postgres.start)
    async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as conn:
        r = await new_worker(conn)
        await conn.execute("UPDATE worker SET lease_until = now() - interval '1 hour' WHERE id = %s", (a,))
        assert await one(conn, "SELECT outbox_rescue(%s, '1 hour', '2 hours')", r) == 0
        deadline = (
            "SELECT lease_end BETWEEN '59 minutes' AND '1 hour'"
            " FROM outbox_next_deadline(%s, '{}', '1 h', '2 h')"
        )
        assert await one(conn, deadline, r) is True
        await conn.execute("SELECT outbox_renew(%s, '1 hour', ARRAY[%s::bigint], '{1}')", (a, row))
        assert await one(conn, "SELECT outbox_rescue(%s, '1 ms', '2 hours')", r) == 0
        assert await get(conn, row) == "running"


async def test_presence_is_new_for_each_connection(connect: Connect, database: str) -> None:
    """The lock of a connection that the server does not know to be dead must not stand in the way."""
    psql = await connect()
    async with watched(database) as worker:
        first = await one(psql, "SELECT presence FROM worker_present")
        held = worker.hold("connect")
        await end_listener(psql)
        await held.wait()
        await psql.execute(in_schema("SELECT pg_advisory_lock(:lock_presence, %s)"), (first,))  # the ghost
        held.release()
        await until(psql, "SELECT count(*) = 1 FROM worker_present WHERE presence <> %s AND parked", first)


async def test_presence_wraps(connect: Connect, database: str) -> None:
    """1. W has the last number. 2. Its connection breaks. 3. It comes back under a low number. 4. A late
    call of the connection before is refused.
    """
    psql = await connect()
    async with watched(database) as worker:
        worker.worker._presence = PRESENCES - 1
        await psql.execute("UPDATE worker SET presence = %s", (PRESENCES - 1,))
        held = worker.hold("connect")
        await end_listener(psql)
        await held.wait()
        held.release()
        await until(psql, "SELECT count(*) = 1 FROM worker_present WHERE presence < 10000 AND parked")
        with pytest.raises(psycopg.errors.RaiseException, match="given up"):
            await psql.execute("SELECT outbox_reconnect(%s, %s, '{}', '{}')", (worker.id, PRESENCES - 1))


async def test_a_connection_that_broke_while_idle_reaches_no_handler(connect: Connect, database: str) -> None:
    """1. A handler has used a connection. 2. The server ends it. 3. The next handler gets another."""
    psql = await connect()

    async def uses(job: Job) -> None:
        async with job.connection() as conn:
            await conn.execute("SELECT 1")

    async with watched(database, run=uses) as worker:
        for _ in range(3):
            row = await add(psql)
            await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
            assert (await get(psql, row, "attempt"), await get(psql, row, "failures")) == (1, 0)
            await worker.asleep()
            await end_session(psql, "outwake worker job")


@pytest.mark.parametrize("keeps", [False, True])
async def test_an_outage_is_no_failure_of_a_handler(keeps: bool, connect: Connect, database: str) -> None:
    """1. A handler's query is under way. 2. The server ends the connection. 3. The row runs again. But a row
    whose attempts always end so fails in the end.
    """
    psql = await connect()

    async def ends(job: Job) -> None:
        if keeps or job.row.attempt == 1:
            async with job.connection() as conn:
                await conn.execute("SELECT pg_terminate_backend(pg_backend_pid())")

    async with watched(database, run=ends):
        row = await add(psql, attempt=19 if keeps else 0)
        if keeps:
            await until(psql, "SELECT failures > 0 FROM outbox WHERE id = %s", row)
        else:
            await until(psql, "SELECT state = 'done' FROM outbox WHERE id = %s", row)
            assert (await get(psql, row, "attempt"), await get(psql, row, "failures")) == (2, 0)


@pytest.mark.parametrize("probe", [0.3, 0])
async def test_probe_finds_a_listen_connection_that_hears_nothing(
    probe: float, connect: Connect, database: str
) -> None:
    """For proxies that keep a socket open whose server has gone: keepalive cannot see that.

    1. W sleeps. 2. What its LISTEN connection should hear is swallowed. 3. P inserts. 4. The probe comes
    back to nobody: W reconnects. Without the probe it sleeps for ever.
    """
    psql = await connect()
    async with (
        proxied(database) as (proxy, url),
        watched(database, listen_database_url=url, listen_probe=probe, lease=0.6) as worker,
    ):
        (listening,) = proxy.connections
        listening.swallow_up = listening.swallow_down = True
        row = await add(psql)
        if probe:
            await worker.has_run(row)
        else:
            assert await worker.asleep() == math.inf
            assert (worker.readiness()["ready"], await get(psql, row)) == (True, "ready")
        listening.cut()


async def test_silent_statement_is_cut_within_a_lease(connect: Connect, database: str) -> None:
    """1. W sleeps. 2. What its other connection should hear is swallowed. 3. P inserts: W's claim gets no
    answer, and is cut. 4. W reconnects and runs the row.
    """
    psql = await connect()
    async with (
        proxied(database) as (proxy, url),
        watched(url, listen_database_url=database, lease=0.6) as worker,
    ):
        (control,) = proxy.connections
        control.swallow_up = control.swallow_down = True
        row = await add(psql)
        await worker.has_run(row)
        control.cut()


async def test_worker_cut_off_while_its_sessions_are_ended_stops_in_time(
    connect: Connect, database: str
) -> None:
    """A session that was terminated is no proof of an outage, in which nobody could rescue.

    1. W runs a row. 2. An operator ends its session, and the network is gone in the same moment. 3. W
    stops at the end of its lease, and not of its grace for outages.
    """
    psql = await connect()
    stopped = asyncio.Event()

    async def tells(job: Job) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            stopped.set()

    async with (
        proxied(database) as (proxy, url),
        watched(url, run=tells, lease=0.6, outage_grace=600.0) as worker,
    ):
        row = await add(psql)
        await worker.has_run(row)
        held = worker.hold("connect")
        await end_session(psql, "outwake worker")  # it finds out when it renews
        await held.wait()
        proxy.swallow_new = True
        held.release()
        async with awaiting("the handler to be stopped"):
            await stopped.wait()
        await proxy.heal()


async def test_partitioned_worker_stops_in_time(connect: Connect, database: str) -> None:
    """1. W runs a row; everything it sends and hears is swallowed. 2. Its lease ends: it stops what it ran,
    before anybody may run it again. 3. It is let in again, and hands the row back, or finds it rescued.
    """
    psql = await connect()
    stopped = asyncio.Event()

    async def tells(job: Job) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            stopped.set()

    async with proxied(database) as (proxy, url), watched(url, run=tells, lease=0.6) as worker:
        row = await add(psql)
        await worker.has_run(row)
        proxy.swallow_new = True
        for connection in proxy.connections:
            connection.swallow_up = connection.swallow_down = True
        async with awaiting("the handler to be stopped"):
            await stopped.wait()
        assert await get(psql, row) == "running"  # nobody has rescued it yet
        await proxy.heal()
        await until(psql, "SELECT attempt > 1 FROM outbox WHERE id = %s", row)


@pytest.fixture
def lonely() -> Iterator[tuple[str, str, str]]:
    """A network namespace with one link to here: its name, the link's end here, and the address here."""
    name, number = f"outwake-{os.getpid()}", os.getpid() % 200
    here, there, net = f"sdoff{number}", f"sdofn{number}", f"10.213.{number}"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip(8)")
    commands = [
        f"ip netns add {name}",
        f"ip link add {here} type veth peer name {there} netns {name}",
        f"ip addr add {net}.1/24 dev {here}",
        f"ip link set {here} up",
        f"ip -n {name} addr add {net}.2/24 dev {there}",
        f"ip -n {name} link set {there} up",
    ]
    try:
        for line in commands:
            done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{line}: {done.stderr.strip()}")
        yield name, here, f"{net}.1"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", here], capture_output=True, check=False)


class At(Proxy):
    """A proxy on an address of its own."""

    def __init__(self, host: str, server: tuple[str, int]) -> None:
        super().__init__("test", server)
        self._host = host

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, self._host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]


@contextmanager
def link(name: str) -> Iterator[None]:
    """Down while the block runs."""
    subprocess.run(["ip", "link", "set", name, "down"], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "set", name, "up"], check=True)


async def test_network_path_that_goes_silent(
    lonely: tuple[str, str, str], connect: Connect, database: str, tmp_path: Path
) -> None:
    """1. W sleeps, in a network of its own. 2. The link goes down: no error, no end of file. 3. W notices
    by keepalive. 4. The link is up again: W reconnects, and runs what came meanwhile.
    """
    namespace, here, host = lonely
    psql = await connect()

    forwarder = At(host, address(database))
    await forwarder.open()
    code = "from outwake.worker.cli import main; main()"
    command = ["netns", "exec", namespace, sys.executable, "-c", code]
    env = {
        "DATABASE_URL": on(database, host, forwarder.port),
        "PYTHONPATH": f"{ROOT}:{install(tmp_path / 'handlers')}",
        "OUTWAKE_LEASE": "3",
        "OUTWAKE_LOG_LEVEL": "debug",
    }
    try:
        async with running("ip", *command, env=env) as worker:
            parked = await worker.event("parked")
            with link(here):
                await worker.event("disconnected", after=parked)
                row = await add(psql, "noop")
            again = await worker.event("reconnected", after=parked)
            await worker.event("completed", after=again, rows=[row])
    finally:
        await forwarder.close()


BOUNCER = """
[databases]
* = host={host} port={port} user={user} {password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
min_pool_size = 0
ignore_startup_parameters = extra_float_digits
"""


@pytest.fixture
def bouncer(server: str, tmp_path: Path) -> Iterator[int]:
    """The port of a PgBouncer in transaction mode, with two server connections for each database."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed (on Debian: apt install pgbouncer)")
    host, port = address(server)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = free.getsockname()[1]
    parts = urlsplit(server)
    config = tmp_path / "pgbouncer.ini"
    config.write_text(
        BOUNCER.format(
            host=host, port=port, user=parts.username or "postgres", listen=listen,
            password=f"password={parts.password}" if parts.password else "",
        )
    )  # fmt: skip
    arguments = [program, "-q", str(config)]
    if os.geteuid() == 0:
        arguments[1:1] = ["-u", "nobody"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", listen)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.02)
        yield listen
    finally:
        process.terminate()
        process.wait()


async def test_everything_but_listen_goes_through_pgbouncer(
    bouncer: int, connect: Connect, database: str, tmp_path: Path
) -> None:
    """In transaction mode, where each transaction may have another server connection: rows run with fenced
    effects, fail, are retried and cancelled, at a concurrency above the number of server connections.
    """
    psql = await connect()
    await psql.execute("CREATE TABLE effect (row_id bigint, attempt integer)")
    handlers = install(tmp_path / "handlers")
    pooled = on(database, "127.0.0.1", bouncer)
    env = {
        "DATABASE_URL": pooled,
        "LISTEN_DATABASE_URL": database,
        "PYTHONPATH": f"{ROOT}:{handlers}",
        "OUTWAKE_LEASE": "2",
        "OUTWAKE_DRAIN_GRACE": "0",
        "OUTWAKE_LOG_LEVEL": "debug",
    }
    async with running("worker", "--concurrency", "8", env=env) as worker:
        await worker.event("parked")
        async with await psycopg.AsyncConnection.connect(
            pooled, autocommit=True, prepare_threshold=None
        ) as p:
            rows = [await add(p, "effect", ordering_key=f"k{n % 5}") for n in range(40)]
            flaky = await add(p, "flaky", payload={"times": 1})
            hangs = await add(p, "hang")
            await worker.event("started", outbox_id=hangs)
            await p.execute("SELECT outbox_cancel(%s)", (hangs,))
        await worker.event("ended", outbox_id=hangs, state="cancelled")
        await psql.execute("UPDATE outbox SET available_at = clock_timestamp() WHERE id = %s", (flaky,))
        await until(psql, "SELECT bool_and(state = 'done') FROM outbox WHERE topic IN ('effect', 'flaky')")
        assert sorted(await column(psql, "SELECT row_id FROM effect")) == rows
        assert await get(psql, flaky, "failures") == 1
        assert (await one(psql, "SELECT count(*) FROM worker_present")) == 1


async def test_migrate_takes_the_direct_connection(bouncer: int, empty_database: str) -> None:
    """Its lock belongs to a session, which the pooler does not give."""
    env = {"DATABASE_URL": on(empty_database, "127.0.0.1", bouncer), "LISTEN_DATABASE_URL": empty_database}
    async with running("outwake", "migrate", env=env) as process:
        assert await process.ended() == 0
    async with await psycopg.AsyncConnection.connect(empty_database) as conn:
        assert await one(conn, "SELECT count(*) FROM migration") > 0


async def test_notifications_of_strangers_do_no_harm(database: str, connect: Connect) -> None:
    """1. A sleeps. 2. Somebody notifies its channels with payloads of their own. 3. A hears the next row."""
    psql = await connect()
    async with watched(database) as worker:
        for channel in ("outwake_wake", "outwake_cancel", "outwake_probe"):
            for payload in ("", "x", "t@x", "@", "*@", "99999999999999999999999@1e9"):
                await psql.execute("SELECT pg_notify(%s, %s)", (channel, payload))
        row = await add(psql)
        await worker.has_run(row)
        assert not worker.task.done()


async def test_a_write_on_a_connection_that_has_gone_silent_is_repeated_on_another(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half open: what the server answers does not arrive, and no error comes."""
    monkeypatch.setattr(messages, "ANSWER", 0.5)
    answers: list[int] = []
    async with proxied(database) as (proxy, url):
        urls = iter([url, database])

        @asynccontextmanager
        async def connection() -> AsyncIterator[psycopg.AsyncConnection[Any]]:
            async with await psycopg.AsyncConnection.connect(next(urls), autocommit=True) as conn:
                for proxied_connection in proxy.connections:
                    proxied_connection.swallow_down = True
                yield conn

        row = Claimed(1, "t", None, {}, 1, 0, 10, None, None, timedelta(0), 0, datetime.now(UTC))
        job = Job(row, uuid4(), Lease(600, 0, lambda: None), connection)
        answer_soon(job)

        async def write() -> None:
            async with job.connection() as conn:
                await conn.execute("SELECT 1")
                answers.append(conn.info.port)

        async with awaiting("the write to be repeated"):
            await retry_until_available(write)
        assert answers == [address(database)[1]]
        for silent in proxy.connections:
            silent.cut()
