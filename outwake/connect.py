"""Connections that notice when the other side has gone.

A path that goes silent must be noticed within a lease, on both ends: here, so that the worker reconnects;
on the server, so that a dead client's session and its locks do not stay for two hours, its default.
"""

import asyncio
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import error_from_result


def conninfo(url: str, name: str, lease: timedelta, *, pooled: bool = False, shared: bool = False) -> str:
    """`url` with keepalive and user timeout for `lease`; a pooler takes no server options.

    `shared`: a user's code runs on the connection too, so it keeps the search_path of its role and database.
    Otherwise nothing but our own queries runs on it. They name the schema, and nothing is found without one.
    """
    seconds = lease.total_seconds()
    # First probe after a third, then ten at most over the rest, so that silence is known before the
    # lease is out. The kernel counts whole seconds, and refuses more than 127 probes.
    idle = max(1, int(seconds / 3))
    rest = max(1, int(seconds) - idle - 1)
    count = min(rest, 10)
    interval = rest // count
    # jit is off: before PostgreSQL 18 a scan that is off, but is the only way, looks so expensive that each
    # call would be compiled (sql/outbox/functions/claim.sql).
    server = (
        f"-c tcp_keepalives_idle={idle} -c tcp_keepalives_interval={interval} "
        f"-c tcp_keepalives_count={count} "
        f"-c tcp_user_timeout={int(seconds * 1000)} "
        "-c jit=off"
    )
    if not shared:
        server += " -c search_path=pg_catalog"
    own = conninfo_to_dict(url).get("options") or ""  # what the URL asks for stays
    extra: dict[str, Any] = {} if pooled else {"options": f"{server} {own}"}
    return make_conninfo(
        url,
        application_name=name,
        connect_timeout=max(2, int(seconds)),
        keepalives=1,
        keepalives_idle=idle,
        keepalives_interval=interval,
        keepalives_count=count,
        tcp_user_timeout=int(seconds * 1000),
        **extra,
    )


async def connect(
    url: str, name: str, lease: timedelta, *, pooled: bool = False
) -> psycopg.AsyncConnection[tuple[Any, ...]]:
    """An autocommit connection. Through a pooler nothing is prepared: its server may be another each time."""
    return await psycopg.AsyncConnection.connect(
        conninfo(url, name, lease, pooled=pooled),
        autocommit=True,
        prepare_threshold=None if pooled else 2,
    )


@contextmanager
def bounded(conn: psycopg.AsyncConnection[Any], seconds: float) -> Iterator[None]:
    """Cut the connection if the block takes longer: what waits on it then fails with OperationalError.

    A cancelled task would not do: psycopg asks the server to cancel and waits for its answer, which a
    path gone silent never brings.
    """
    timer = cut_after(conn, seconds)
    try:
        yield
    finally:
        timer.cancel()


def cut_after(conn: psycopg.AsyncConnection[Any], seconds: float) -> asyncio.TimerHandle:
    """What `bounded` sets and cancels."""
    return asyncio.get_running_loop().call_later(seconds, cut, conn)


def cut(conn: psycopg.AsyncConnection[Any]) -> None:
    """Break the connection at once, without a word to the server: whoever waits on it is told."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(conn.pgconn.socket)) as peer:
        peer.shutdown(socket.SHUT_RDWR)


async def answer(conn: psycopg.AsyncConnection[Any]) -> pq.abc.PGresult:
    """What the server answers to the one statement that was sent by libpq itself. Raises psycopg.Error.

    By psycopg's wait, which looks again now and then: uvloop does not call a reader whose connection was
    reset, and what waits for that alone waits for ever.
    """
    result: pq.abc.PGresult
    (result,) = await conn.wait(generators.execute(conn.pgconn))
    return checked(result, conn)


def checked(result: pq.abc.PGresult, conn: psycopg.AsyncConnection[Any]) -> pq.abc.PGresult:
    """The same result. Raises psycopg.Error if it is an error."""
    if result.status == pq.ExecStatus.FATAL_ERROR:
        raise error_from_result(result, conn.info.encoding)
    return result


Heard = Callable[[str, str], None]
"""Is called with the channel and the payload of a notification."""


async def hear(
    conn: psycopg.AsyncConnection[Any], heard: Heard, answered: Callable[[], None] = lambda: None
) -> None:
    """Pass on what a LISTEN connection hears, until it breaks. `answered` is called when something was read:
    to take the whole answer, if it is there, to a statement that was sent meanwhile by libpq itself.

    psycopg's own notifies() wakes ten times a second to look at its clock: 0.4 s of CPU time in ten idle
    minutes. Raises psycopg.OperationalError when the connection is broken, and what `heard` raises.
    """
    # What came before this is in psycopg's backlog, what comes from now on is read here.
    async for notification in conn.notifies(timeout=0):
        heard(notification.channel, notification.payload)
    loop, server = asyncio.get_running_loop(), conn.pgconn
    descriptor, broken = server.socket, loop.create_future()

    def read() -> None:
        try:
            for _ in range(2):  # an end that came with last words: uvloop may tell of both but once
                server.consume_input()
                # First: libpq does not come to what follows an answer before that has been taken.
                answered()
                while note := server.notifies():
                    heard(note.relname.decode(), note.extra.decode())
        except Exception as error:
            loop.remove_reader(descriptor)  # it stays readable
            if not broken.done():
                broken.set_exception(error)

    # No task between the socket and who is told: a sleeping worker is on its way some 40 us sooner.
    loop.add_reader(descriptor, read)
    try:
        await broken
    finally:
        loop.remove_reader(descriptor)


_OUTAGES = {
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now: it starts up, shuts down or recovers
    "53100",  # disk_full
    "25006",  # read_only_sql_transaction
}


def is_outage(error: BaseException) -> bool:
    """Whether this says that the server itself is down or takes no writes, for anybody: then nobody
    else can be rescuing our rows.
    """
    if isinstance(error, psycopg.Error) and error.sqlstate in _OUTAGES:
        return True
    text = str(error)
    return "Connection refused" in text or "the database system is" in text


def will_not_pass(error: BaseException, mend: str) -> str | None:
    """What an operator has to do before the statement can succeed, in one line; None if it may pass.

    `mend`: what gives the right, if one is missing (`grant`).
    """
    said = str(error).partition("\n")[0]
    match error:
        case psycopg.errors.InsufficientPrivilege():
            return f"{said}: {mend}"
        case psycopg.errors.UndefinedTable() | psycopg.errors.UndefinedFunction():
            return f"{said}: run `outwake migrate`"
        case psycopg.errors.UndefinedColumn() | psycopg.errors.UndefinedObject():
            return f"{said}: run `outwake migrate`"
    return None


def grant(what: str, url: str) -> str:
    """The statement that gives a right, or a role, to the role that `url` logs in as."""
    user = conninfo_to_dict(url).get("user") or os.environ.get("PGUSER")
    return f"GRANT {what} TO {_identifier(str(user)) if user else 'your role'}"


def _identifier(name: str) -> str:
    """As SQL has it; a name that need not be quoted is not."""
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def is_away(error: psycopg.Error) -> bool:
    """Whether the same statement may succeed later: no connection, an outage, or a deadlock."""
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) or is_outage(error)
