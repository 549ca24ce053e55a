"""Event streams: one API process, many clients that each follow a session, a message a second in each.

1. `count` sessions, each with a turn that the bench holds as a worker would.
2. A process opens all streams over loopback, and waits until each has shown its state.
3. Another appends the messages by message_append, each in a transaction of its own as the worker does, spread
   evenly over the second, and notes when each had committed.
4. The first notes when each arrived. Both clocks are the machine's monotonic one. What was committed and has
   not arrived SETTLE seconds after the last one is lost; twice is what came more than once.
"""

import asyncio
import json
import re
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from statistics import median
from typing import IO, Any

import psycopg

from bench.contestant import ROOT, run
from bench.http import api
from bench.server import Server, cpu_seconds, resident_mb, settle
from bench.workloads import OUTWAKE
from outwake.schema import in_schema

WRITERS = 32  # connections, shared by all sessions: as many commits may wait for the disk at once
OPENING = 100  # streams that are opened at once
SETTLE = 10.0  # seconds

_SESSIONS = in_schema("""
WITH w AS (
    INSERT INTO :schema.worker (host, pid, version, topics, concurrency, lease_until)
    VALUES ('bench', 1, '1', '{session.run}', 10000, clock_timestamp() + interval '1 day')
    RETURNING id
),
s AS (
    INSERT INTO :schema.session (repo, target_branch, branch, title, inbox_status)
    SELECT 'octo/tools', 'main', 'bench/' || n, 'bench', 'pending' FROM generate_series(1, %s) AS n
    RETURNING id
),
p AS (
    INSERT INTO :schema.prompt (session_id, text, status) SELECT s.id, 'bench', 'running' FROM s
    RETURNING id, session_id
),
o AS (
    INSERT INTO :schema.outbox (topic, ordering_key, payload, state, attempt, worker_id)
    SELECT 'session.run', 'session:' || p.session_id,
           jsonb_build_object('session_id', p.session_id, 'prompt_id', p.id), 'running', 1, w.id
    FROM p, w
    RETURNING id, worker_id, payload
)
SELECT o.worker_id::text, o.id, 1, p.session_id::text, p.id::text
FROM o JOIN p ON p.id = (o.payload ->> 'prompt_id')::uuid
""")
# As worker/messages.py does.
_APPEND = in_schema("""
SELECT last_seq, watched FROM :schema.message_append(%s, %s, %s, %s, %s, ARRAY[%s::jsonb], NULL, true)
WHERE NOT fenced
""")
_NOTIFY = in_schema("SELECT :schema.session_notify(%s)")
_LISTENING = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'outwake api listener'"
# An assistant's event of a common size, as the agent prints it.
_BODY = json.dumps({"type": "assistant", "message": {"content": [{"type": "text", "text": "word " * 40}]}})

Moments = list[tuple[int, int, int]]
"""Of each message: the place of its session, its seq, and the nanosecond."""


def streams(server: Server, count: int, seconds: int) -> dict[str, float]:
    """Messages lost and delivered twice, from commit to arrival, and what a stream costs the API."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # for this process's children
    url = server.fresh("bench")
    run(OUTWAKE, url, "setup")
    with server.connect("bench") as conn:
        turns = [list(row) for row in conn.execute(_SESSIONS, (count,))]
        settle(conn)
        with api(url, {"OUTWAKE_DEV_IDENTITY": "1"}) as (process, port):
            _warm_up(port, turns)
            resident = resident_mb(process.pid)
            with _started("follow", str(port)) as follower:
                _say(follower, [turn[3] for turn in turns])
                _hear(follower)
                spent = cpu_seconds(process.pid)
                with _started("write", url, str(seconds)) as writer:
                    _say(writer, turns)
                    written: Moments = _hear(writer)
                _say(follower, len(written))
                arrived: Moments = _hear(follower)
                spent = cpu_seconds(process.pid) - spent
                grown = resident_mb(process.pid) - resident
                listening = conn.execute(_LISTENING).fetchone()
    assert listening is not None
    committed = {(place, seq): at for place, seq, at in written}
    came = Counter((place, seq) for place, seq, _ in arrived)
    taken = sorted(
        (at - committed[place, seq]) / 1e6 for place, seq, at in arrived if (place, seq) in committed
    )
    return {
        "count": count,
        "messages_per_s": round((len(written) - 1) / (written[-1][2] - written[0][2]) * 1e9),
        "lost": len(committed.keys() - came.keys()),
        "twice": sum(1 for times in came.values() if times > 1),
        "p50_ms": round(median(taken), 1),
        "p99_ms": round(taken[int(len(taken) * 0.99)], 1),
        "kb_per_stream": round(grown * 1e3 / count, 1),
        "cpu_us_per_message": round(spent / len(written) * 1e6),
        "listen_connections": listening[0],
    }


def _warm_up(port: int, turns: list[list[Any]]) -> None:
    """A few streams come and go: what the API needs but once is not counted to the streams."""
    with _started("follow", str(port)) as follower:
        _say(follower, [turn[3] for turn in turns[:20]])
        _hear(follower)
        _say(follower, 0)
        _hear(follower)


@contextmanager
def _started(*arguments: str) -> Any:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.streams", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _say(process: subprocess.Popen[str], what: object) -> None:
    assert process.stdin is not None
    print(json.dumps(what), file=process.stdin, flush=True)


def _hear(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


# In the processes of their own


def write(url: str, seconds: int, told: IO[str]) -> Moments:
    """Append a message to each session each second; when each commit had returned."""
    turns = json.loads(told.readline())
    start = time.monotonic() + 0.5
    written: Moments = []

    def writer(number: int) -> None:
        mine = range(number, len(turns), WRITERS)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.prepare_threshold = 1
            for second in range(seconds):
                for place in mine:
                    time.sleep(max(0.0, start + second + place / len(turns) - time.monotonic()))
                    row = conn.execute(_APPEND, (*turns[place], _BODY)).fetchone()
                    assert row is not None, "fenced"
                    written.append((place, row[0], time.monotonic_ns()))
                    if row[1]:
                        conn.execute(_NOTIFY, (turns[place][3],))

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return written


_EVENT = re.compile(rb"(?:id: (\d+)\n)?event: (\w+)\ndata: ")


class _Follower(asyncio.Protocol):
    """One stream. Of an event it reads no more than its name and id."""

    def __init__(self, session: str, place: int, arrived: Moments) -> None:
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = f"GET /sessions/{session}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        self._place = place
        self._arrived = arrived
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        whole, found, rest = (self._rest + data).rpartition(b"\n\n")
        self._rest = rest
        now = time.monotonic_ns()
        for event in _EVENT.finditer(whole + found):
            if event[2] == b"message":
                self._arrived.append((self._place, int(event[1]), now))
            elif not self.begun.done():
                self.begun.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.begun.done():
            self.begun.set_exception(ConnectionError("the stream ended before it began"))


async def follow(port: int, told: IO[str]) -> Moments:
    """Open a stream for each session and say so; take as many messages as are told, and when each came."""
    loop = asyncio.get_running_loop()
    arrived: Moments = []
    room = asyncio.Semaphore(OPENING)

    async def begin(session: str, place: int) -> None:
        async with room:
            _, follower = await loop.create_connection(
                lambda: _Follower(session, place, arrived), "127.0.0.1", port
            )
            await follower.begun

    sessions = json.loads(told.readline())
    await asyncio.gather(*(begin(session, place) for place, session in enumerate(sessions)))
    print(json.dumps("begun"), flush=True)
    wanted = json.loads(await asyncio.to_thread(told.readline))
    end = time.monotonic() + SETTLE
    while len(arrived) < wanted and time.monotonic() < end:  # noqa: ASYNC110 - an event would cost the load
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)  # what comes twice
    return arrived


if __name__ == "__main__":
    import uvloop

    match sys.argv[1:]:
        case ["follow", port]:
            print(json.dumps(uvloop.run(follow(int(port), sys.stdin))), flush=True)
        case ["write", url, seconds]:
            print(json.dumps(write(url, int(seconds), sys.stdin)), flush=True)
