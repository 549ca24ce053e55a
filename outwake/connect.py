"""Connections that notice when the other side has gone.

Both ends must notice a silent path within a lease. The client then reconnects. The server then ends a dead
client's session and frees its locks; by default it would keep them for two hours.
"""

import asyncio
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psycopg
from psycopg import generators, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import error_from_result


def conninfo(url: str, name: str, lease: timedelta, *, pooled: bool = False, shared: bool = False) -> str:
    """`url` with keepalive and user timeout for `lease`. `pooled`: a pooler accepts no server options.

    `shared`: a user's code also runs on the connection, so it keeps the search_path of its role and database.
    Otherwise only our own queries run on it. They name the schema, so the search_path is pg_catalog alone.
    """
    seconds = lease.total_seconds()
    # The first probe comes after a third of the lease, then at most ten over the rest, so that silence is
    # noticed before the lease expires. The kernel counts whole seconds and refuses more than 127 probes.
    idle = max(1, int(seconds / 3))
    rest = max(1, int(seconds) - idle - 1)
    count = min(rest, 10)
    interval = rest // count
    # jit is off. Before PostgreSQL 18 a disabled scan that is the only possible plan has a very high cost, so
    # each call would be compiled (sql/outbox/functions/claim.sql).
    server = (
        f"-c tcp_keepalives_idle={idle} -c tcp_keepalives_interval={interval} "
        f"-c tcp_keepalives_count={count} "
        f"-c tcp_user_timeout={int(seconds * 1000)} "
        "-c jit=off "
        "-c DateStyle=ISO -c IntervalStyle=postgres"  # psycopg reads no others
    )
    if not shared:
        server += " -c search_path=pg_catalog"
    own = conninfo_to_dict(url).get("options") or ""  # options of the URL stay
    extra: dict[str, Any] = {} if pooled else {"options": f"{server} {own}"}
    return make_conninfo(
        url,
        application_name=name,
        client_encoding="UTF8",
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
    """An autocommit connection. With `pooled` nothing is prepared: the server may be another each time."""
    return await psycopg.AsyncConnection.connect(
        conninfo(url, name, lease, pooled=pooled),
        autocommit=True,
        prepare_threshold=None if pooled else 2,
    )


@contextmanager
def deadline(conn: psycopg.AsyncConnection[Any], seconds: float) -> Iterator[None]:
    """Break the connection if the block takes longer. What waits on it then fails with OperationalError.

    Cancelling the task is not enough: psycopg then asks the server to cancel and waits for its answer, which
    never comes over a silent path.
    """
    timer = abort_after(conn, seconds)
    try:
        yield
    finally:
        timer.cancel()


def abort_after(conn: psycopg.AsyncConnection[Any], seconds: float) -> asyncio.TimerHandle:
    """The timer that `deadline` sets and cancels."""
    return asyncio.get_running_loop().call_later(seconds, abort, conn)


def abort(conn: psycopg.AsyncConnection[Any]) -> None:
    """Break the connection at once, without telling the server. What waits on it gets an error."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(conn.pgconn.socket)) as peer:
        peer.shutdown(socket.SHUT_RDWR)


async def answer(conn: psycopg.AsyncConnection[Any]) -> pq.abc.PGresult:
    """The server's answer to the one statement that was sent through libpq directly. Raises psycopg.Error.

    Waits by psycopg's own wait, which also checks at intervals. uvloop does not call a reader whose
    connection was reset, so a wait for the reader alone might never end.
    """
    result: pq.abc.PGresult
    (result,) = await conn.wait(generators.execute(conn.pgconn))
    return checked(result, conn)


def checked(result: pq.abc.PGresult, conn: psycopg.AsyncConnection[Any]) -> pq.abc.PGresult:
    """The same result. Raises psycopg.Error if it is an error."""
    if result.status == pq.ExecStatus.FATAL_ERROR:
        raise error_from_result(result, conn.info.encoding)
    return result


_OUTAGES = {
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now: starting up, shutting down or recovering
    "53100",  # disk_full
    "25006",  # read_only_sql_transaction
}


def is_outage(error: BaseException) -> bool:
    """Whether the error says that the server is down, or accepts no writes, for everybody. Then no other
    worker can be rescuing our rows.
    """
    if isinstance(error, psycopg.Error) and error.sqlstate in _OUTAGES:
        return True
    text = str(error)
    return "Connection refused" in text or "the database system is" in text


def will_not_pass(error: BaseException, mend: str) -> str | None:
    """What an operator must do before the statement can succeed, in one line; None if it may succeed later.

    `mend`: the statement that gives a missing right (`grant`).
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
    """The name as SQL needs it, quoted only if necessary."""
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def is_away(error: psycopg.Error) -> bool:
    """Whether the same statement may succeed later: no connection, an outage, or a deadlock."""
    return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) or is_outage(error)
