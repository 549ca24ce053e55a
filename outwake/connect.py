"""The one place where connections to the database are opened.

1. Both ends notice within a lease that the other has gone. The client then reconnects. The server then ends a
   dead client's session and frees its locks; by default it would keep them for two hours.
2. The session has the settings that the code relies on (outwake/_options.py).
3. Of several hosts, the one that answered last is tried first, and a primary that was replaced is refused
   (outwake/_hosts.py).
"""

import asyncio
import os
import re
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Self

import psycopg
from psycopg import generators, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.errors import error_from_result

from outwake._hosts import Origin, answered, in_order, is_behind
from outwake._options import OWN, REPORTED, SHARED, SINCE_17, startup

_CONNECT_TIMEOUT = 2
"""Seconds for each of several hosts. It is libpq's minimum."""


def conninfo(url: str, name: str, lease: timedelta, *, pooled: bool = False, shared: bool = False) -> str:
    """`url` with the settings above, and with silence noticed within `lease`. Options of the URL win.

    `pooled`: a pooler accepts no server options. `shared`: a user's code also runs on the connection.
    """
    seconds = lease.total_seconds()
    # The first probe comes after a third of the lease, then at most ten over the rest, so that silence is
    # noticed before the lease expires. The kernel counts whole seconds and refuses more than 127 probes.
    idle = max(1, int(seconds / 3))
    rest = max(1, int(seconds) - idle - 1)
    count = min(rest, 10)
    interval = rest // count
    server = {
        "tcp_keepalives_idle": str(idle),
        "tcp_keepalives_interval": str(interval),
        "tcp_keepalives_count": str(count),
        "tcp_user_timeout": str(int(seconds * 1000)),
        **(SHARED if shared else OWN),
    }
    found = conninfo_to_dict(url)
    several = "," in str(found.get("host") or found.get("hostaddr") or "")
    extra = {} if pooled else {"options": f"{startup(server)} {found.get('options') or ''}"}
    return make_conninfo(
        url,
        application_name=name,
        client_encoding="UTF8",
        connect_timeout=_CONNECT_TIMEOUT if several else max(_CONNECT_TIMEOUT, int(seconds)),
        keepalives=1,
        keepalives_idle=idle,
        keepalives_interval=interval,
        keepalives_count=count,
        tcp_user_timeout=int(seconds * 1000),
        **extra,
    )


_ORIGIN = """
SELECT c.system_identifier, CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN pg_catalog.substr(
    pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8) END
FROM pg_catalog.pg_control_system() AS c
"""
"""Any role may ask this, unless somebody revoked it."""


class ServerConnection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection as it is opened here. The pools make such connections too."""

    origin = Origin(None, None)

    @classmethod
    async def connect(  # type: ignore[override]
        cls, conninfo: str = "", *, shared: bool = False, **more: Any
    ) -> Self:
        """Connect to the first host that answers and was not replaced. Raises psycopg.Error."""
        tries = 1 + str(conninfo_to_dict(conninfo).get("host") or "").count(",")
        while True:
            conn = await super().connect(in_order(conninfo), **more)
            try:
                with deadline(conn, float(conninfo_to_dict(conninfo).get("connect_timeout") or 10)):
                    await conn._introduce(shared=shared)
            except BaseException:
                await conn.close()
                raise
            host, port = conn.info.host, conn.info.port
            answered(conninfo, host, port, well=not conn.outdated)
            if not conn.outdated:
                return conn
            await conn.close()
            tries -= 1
            if not tries:
                raise psycopg.OperationalError(
                    f"the server at {host}:{port} was replaced: this process has seen a"
                    " newer timeline of its cluster. Stop that server"
                )

    @property
    def outdated(self) -> bool:
        """Whether another server has replaced this connection's."""
        return is_behind(self.origin)

    @property
    def usable(self) -> bool:
        """Whether nobody has closed it, and its server was not replaced. It costs no round trip: a connection
        that is not in use gets no data, unless the server closes it.
        """
        if self.closed or self.outdated:
            return False
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return not poll.poll(0)

    async def _introduce(self, *, shared: bool) -> None:
        """Set what the startup packet could not set, and learn which server this is."""
        wanted = {} if shared or self.info.server_version < 170000 else dict(SINCE_17)
        for name in REPORTED:
            value = (SHARED if shared else OWN).get(name)
            said = self.info.parameter_status(name)
            if value is not None and said is not None and said.partition(",")[0] != value:
                wanted[name] = value
        if wanted:
            await self._ask("; ".join(f"SET {name} = '{value}'" for name, value in wanted.items()))
        with suppress(psycopg.DatabaseError):
            found = await self._ask(_ORIGIN)
            cluster, timeline = found.get_value(0, 0), found.get_value(0, 1)
            if cluster is not None and timeline is not None:
                self.origin = Origin(cluster.decode(), int(timeline, 16))

    async def _ask(self, query: str) -> pq.abc.PGresult:
        """Without psycopg's cursor, which begins a transaction where the connection is not in autocommit."""
        self.pgconn.send_query(query.encode())
        *_, last = await self.wait(generators.execute(self.pgconn))
        return checked(last, self)


async def connect(url: str, name: str, lease: timedelta, *, pooled: bool = False) -> ServerConnection:
    """An autocommit connection. With `pooled` nothing is prepared: the server may be another each time."""
    return await ServerConnection.connect(
        conninfo(url, name, lease, pooled=pooled),
        autocommit=True,
        prepare_threshold=None if pooled else 2,
    )


async def check(conn: ServerConnection) -> None:
    """For a pool: close a connection that may not be used, and raise psycopg.OperationalError."""
    if not conn.usable:
        await conn.close()
        raise psycopg.OperationalError("the server has closed the connection, or was replaced")


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


_SIGNS = (
    "Connection refused",
    "the database system is",  # starting up, shutting down, in recovery
    # target_session_attrs in the URL: a standby, or a primary that takes no writes
    "session is read-only",
    "server is in hot standby mode",
)
"""A failure to connect has no SQLSTATE."""


def is_outage(error: BaseException) -> bool:
    """Whether the error says that the server is down, or accepts no writes, for everybody. Then no other
    worker can be rescuing our rows.
    """
    if isinstance(error, psycopg.Error) and error.sqlstate in _OUTAGES:
        return True
    first, several, failures = str(error).partition("All failures were:\n")
    # Of several hosts, each must say so: one that is silent may be the one that others use.
    return all(
        any(sign in failure for sign in _SIGNS)
        for failure in (failures.split("\n- host:") if several else [first])
    )


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
