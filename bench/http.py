"""`POST /sessions` through uvicorn, one API process, 16 kept-alive connections, beside a bare route.

Who asks: the development identity, a user by a token of an OpenID Connect issuer (RS256; a real issuer on
loopback, its keys found by discovery), or a user by an API token. All settings are the defaults, so that no
user may have more than a hundred unfinished sessions: the load comes from many users, SESSIONS of each.
"""

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from statistics import median
from typing import NamedTuple, cast

from bench.contestant import ROOT, run, wait_until
from bench.server import STATE, Server, cpu_seconds, settle
from bench.workloads import OUTWAKE, Figures
from outwake.embedded.postgres import free_port
from outwake.schema import in_schema

CONNECTIONS = 16
SESSIONS = 50  # of a user
FASTEST = 6000  # requests a second that there are users for

FILL = in_schema("""
INSERT INTO :schema.session (user_id, repo, target_branch, branch, title, inbox_status)
SELECT 'before-' || n % 40, 'octo/tools', 'main', 'before/' || n, 'Before', 'completed'
FROM generate_series(1, 2000) AS n
""")
"""For both sides: a foreign key's check, planned while the table is known to be empty, would read all of it,
a thousand rows a request, until the next ANALYZE.
"""

APIS = ("bare", "development", "bearer", "api token")


def post_sessions(server: Server, names: Sequence[str], seconds: int) -> dict[str, Figures]:
    """By name (some of APIS): requests answered 201 a second, median of its bursts, and the CPU time that one
    costs the API and the load generator, which is another process.

    All are up at the same time, each with a database of its own, and take turns in bursts of a second: what
    else the machine does, a checkpoint or an autovacuum would meet one of them alone otherwise. One run, then
    the other, gave ratios of 0.68 and 0.86 for the same code.
    """
    bursts: dict[str, list[_Burst]] = {name: [] for name in names}
    with ExitStack() as stack:
        served = {name: stack.enter_context(_served(server, name, seconds)) for name in names}
        for burst in range(1 + seconds):
            for name in random.sample(list(names), len(names)):
                bursts[name].append(served[name](burst))
    # The first fills the pool of connections and prepares.
    return {name: _figures(found[1:]) for name, found in bursts.items()}


class _Burst(NamedTuple):
    answered: float
    took: float
    cpu: float
    load_cpu: float


def _figures(bursts: Sequence[_Burst]) -> Figures:
    count = sum(burst.answered for burst in bursts)
    return {
        "post_sessions_per_s": median(burst.answered / burst.took for burst in bursts),
        "post_sessions_cpu_us": sum(burst.cpu for burst in bursts) / count * 1e6,
        "post_sessions_load_cpu_us": sum(burst.load_cpu for burst in bursts) / count * 1e6,
    }


@contextmanager
def _served(server: Server, name: str, seconds: int) -> Iterator[Callable[[int], _Burst]]:
    """What sends the burst of that number, each by users of its own."""
    database = f"http{APIS.index(name)}"
    url = server.fresh(database)
    run(OUTWAKE, url, "setup")
    users = FASTEST // SESSIONS  # of a burst
    with _askers(url, name, (1 + seconds) * users) as (environment, tokens):
        with server.connect(database) as conn:
            conn.execute(FILL)
            settle(conn)
        with api(url, environment, bare=name == "bare") as (process, port):

            def burst(number: int) -> _Burst:
                before = cpu_seconds(process.pid)
                count, took, load = _loaded(port, 1, tokens[number * users : (number + 1) * users])
                return _Burst(count, took, cpu_seconds(process.pid) - before, load)

            yield burst
    server.drop(database)


@contextmanager
def api(
    url: str, environment: dict[str, str], *, bare: bool = False, observed: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process of the API, or of the bare route, and its port. An observed one logs its stalls."""
    port = free_port()
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "OUTWAKE_PORT": str(port),
        "OUTWAKE_LOG_LEVEL": "warning",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    options = f"--port {port} --loop uvloop --http httptools --no-access-log --log-level warning"
    command = ["-c", "from outwake.cli import main; main(['api'])"]
    if bare:
        command = ["-m", "uvicorn", "bench.bare:app", *options.split()]
    elif observed:
        command = ["-m", "tests.support.observed_loop", "api"]
    with (STATE / "api.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, cwd=ROOT, stderr=log, stdout=log
        )
        try:
            wait_until(lambda: accepts(port), timeout=30)
            yield process, port
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def _askers(url: str, name: str, users: int) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Settings of the API, and a token for each user; without authentication empty ones."""
    names = [f"user-{number}" for number in range(users)]
    if name == "bearer":
        from anyio.from_thread import start_blocking_portal

        from tests.support.issuer import issuing

        with start_blocking_portal() as portal, portal.wrap_async_context_manager(issuing()) as issuer:
            exp = int(time.time()) + 3600
            yield {"OUTWAKE_OIDC_ISSUER": issuer.url}, [issuer.token(user, exp=exp) for user in names]
    elif name == "api token":
        yield {"OUTWAKE_REQUIRE_TOKEN": "1"}, api_tokens(url, names)
    else:
        yield {"OUTWAKE_DEV_IDENTITY": "1"}, [""] * users


def api_tokens(url: str, names: list[str]) -> list[str]:
    import psycopg

    from outwake.session.token import create

    async def made() -> list[str]:
        async with await psycopg.AsyncConnection.connect(url) as conn:
            return [(await create(conn, name, "bench"))[1] for name in names]

    return asyncio.run(made())


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody listens there."""
    with suppress(OSError):
        socket.create_connection((host, port), timeout=5).close()
        return True
    return False


def _loaded(port: int, seconds: int, tokens: list[str]) -> tuple[float, float, float]:
    """Requests answered, how long it took, and the generator's CPU time."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.http", str(port), str(seconds)],
        cwd=ROOT,
        input=json.dumps(tokens),
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    count, took, cpu = map(float, done.stdout.split())
    return count, took, cpu


BODY = b'{"repo": "octo/tools", "target_branch": "main", "prompt": "Fix the date parser"}'


class _Client(asyncio.Protocol):
    """One connection: the next request as soon as an answer is there. As little as can be: the load must
    not be what is measured.
    """

    def __init__(self, requests: Iterator[bytes], end: float) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answered = 0
        self._requests = requests
        self._end = end
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it
        self._transport.write(next(self._requests))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
            return
        self._buffer = b""
        if not head.startswith(b"HTTP/1.1 201"):
            self.done.set_exception(RuntimeError(f"{head!r} {body!r}"))
            self._transport.close()
            return
        self.answered += 1
        if time.monotonic() < self._end:
            self._transport.write(next(self._requests))
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def _requests(tokens: list[str]) -> Iterator[bytes]:
    """SESSIONS requests of each user. Raises StopIteration when all have asked."""
    for token in tokens:
        lines = [b"POST /sessions HTTP/1.1", b"Host: localhost", b"Content-Type: application/json"]
        lines.append(b"Content-Length: %d" % len(BODY))
        if token:
            lines.append(b"Authorization: Bearer " + token.encode())
        request = b"\r\n".join(lines) + b"\r\n\r\n" + BODY
        for _ in range(SESSIONS):
            yield request


async def _load(port: int, seconds: float, tokens: list[str], host: str) -> tuple[int, float]:
    loop = asyncio.get_running_loop()
    started = time.monotonic()
    end = started + seconds
    clients = []
    for number in range(CONNECTIONS):
        mine = _requests(tokens[number::CONNECTIONS])
        _, client = await loop.create_connection(
            lambda mine=mine: _Client(mine, end),  # type: ignore[misc]
            host,
            port,
        )
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))
    return sum(client.answered for client in clients), time.monotonic() - started


if __name__ == "__main__":
    import uvloop

    cpu = time.process_time()
    at = sys.argv[3] if sys.argv[3:] else "127.0.0.1"
    count, took = uvloop.run(_load(int(sys.argv[1]), float(sys.argv[2]), json.load(sys.stdin), at))
    print(count, took, time.process_time() - cpu)
