"""What a process of the API takes under all limits at once: `python -m bench.limits [SECONDS]`.

Strangers and a user do together what docs/limits.md bounds, each for some seconds. An observer inside the
process (tests/support/observed_loop.py) measures the longest stall of its event loop, in milliseconds of CPU.
The last line: `limits: stall_ms X peak_mb Y`.
"""

import asyncio
import json
import multiprocessing
import subprocess
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from bench.contestant import ROOT
from bench.http import api, api_tokens
from bench.server import STATE, Server, resident_mb

SECONDS = 20
HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
FORM = b"POST /ui/sign-in HTTP/1.1\r\nHost: x\r\nSec-Fetch-Site: same-origin\r\n"
TEXTS = ["[" * 20_000, "![" * 10_000, ">" * 10_000 + "\na" * 5_000, "**a_" * 5_000]

BODIES = [
    json.dumps({"repo": "o/t", "target_branch": "main", "prompt": "x" * 190_000}),
    '{"repo": "o/t", "target_branch": "main", "prompt": "' + "\\u0041" * 170_000 + '"}',
    "[" * 1_000_000,
    "{" + ",".join(f'"{n}":1' for n in range(90_000)) + "}",
]


async def _send(port: int, parts: list[bytes], end: float) -> None:
    """Send the first part, then the second one over and over, on connection after connection."""
    while time.monotonic() < end:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(parts[0])
                while time.monotonic() < end:
                    writer.write(parts[1])
                    await writer.drain()
                    if len(parts) > 2:  # slowly
                        await asyncio.sleep(1)
            finally:
                writer.transport.abort()
        await asyncio.sleep(0.05)


async def _ask(client: httpx.AsyncClient, paths: list[str], end: float) -> None:
    while time.monotonic() < end:
        for path in paths:
            with suppress(httpx.HTTPError):
                await client.get(path)


async def _send_bodies(client: httpx.AsyncClient, end: float) -> None:
    while time.monotonic() < end:
        for body in BODIES:
            with suppress(httpx.HTTPError):
                await client.post("/sessions", content=body, headers={"Content-Type": "application/json"})


async def _follow_without_reading(port: int, token: str, session: str, end: float) -> None:
    with suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        path = f"/sessions/{session}/events"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        writer.transport.abort()


async def _all(port: int, token: str, operators: str, session: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    url = f"http://127.0.0.1:{port}"
    path = f"/sessions/{session}"
    bearer = {"Authorization": f"Bearer {token}"}
    cookies = {"outwake": token}
    async with (
        httpx.AsyncClient(base_url=url, headers=bearer, timeout=60) as user,
        httpx.AsyncClient(base_url=url, cookies=cookies, timeout=60) as browser,
        httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {operators}"},
            cookies={"outwake": operators},
            timeout=60,
        ) as operator,
        httpx.AsyncClient(base_url=url, timeout=60) as stranger,
    ):
        await asyncio.gather(
            *(_send(port, [HEAD, b"X-A: b\r\n" * 8192], end) for _ in range(10)),
            *(_send(port, [HEAD + b"X-A: ", b"b" * 65536], end) for _ in range(10)),
            *(_send(port, [b"GET /", b"a" * 65536], end) for _ in range(10)),
            *(_send(port, [HEAD, b"X: y\r\n", b"slow"], end) for _ in range(400)),
            *(_send(port, [FORM + b"Content-Length: 16000\r\n\r\n", b"a", b"slow"], end) for _ in range(100)),
            *(_follow_without_reading(port, token, session, end) for _ in range(50)),
            *(_ask(user, [f"{path}/messages?limit=1000", path], end) for _ in range(3)),
            *(_ask(browser, [f"/ui{path}", "/"], end) for _ in range(3)),
            *(
                _ask(operator, ["/outbox?limit=200", "/ui/dead", "/ui/outbox?state=dead"], end)
                for _ in range(2)
            ),
            _send_bodies(user, end),
            *(_ask(stranger, ["/metrics", "/readyz?workers=1"], end) for _ in range(10)),
        )


def _run(*arguments: Any) -> None:
    asyncio.run(_all(*arguments))


def _fill(url: str, server: Server, database: str) -> str:
    """A session of alice with large messages, costly texts and many prompts; its id."""
    with server.connect(database) as conn:
        row = conn.execute(
            "INSERT INTO outwake.session (user_id, repo, target_branch, branch, title)"
            " VALUES ('alice', 'octo/tools', 'main', 'b', 't') RETURNING id::text"
        ).fetchone()
        assert row is not None
        session = str(row[0])
        conn.execute(
            "INSERT INTO outwake.prompt (session_id, text, result)"
            " SELECT %s, repeat('x', 200000), %s::jsonb FROM generate_series(1, 250)",
            (session, json.dumps({"agent": {"type": "result", "result": "x" * 500_000}})),
        )
        conn.execute(
            "INSERT INTO outwake.outbox (topic, state, payload, finished_at)"
            " SELECT 'never', 'dead', %s::jsonb, clock_timestamp() FROM generate_series(1, 200)",
            (json.dumps({"x": "y" * 1_000_000}),),
        )
        seq = count(1)
        for text in ["x" * 1_000_000] * 100 + TEXTS * 10:
            conn.execute(
                "INSERT INTO outwake.message (session_id, seq, prompt_id, attempt, body)"
                " SELECT p.session_id, %s, p.id, 1, %s::jsonb FROM outwake.prompt AS p"
                " WHERE p.session_id = %s ORDER BY p.id DESC LIMIT 1",
                (next(seq), json.dumps({"type": "assistant", "text": text}), session),
            )
        conn.execute("UPDATE outwake.session SET last_seq = %s WHERE id = %s", (next(seq) - 1, session))
        conn.execute(
            "INSERT INTO outwake.outbox (topic, payload) SELECT 'never', '{}' FROM generate_series(1, 300000)"
        )
    return session


def _stalls(log: Path, after: int) -> list[dict[str, Any]]:
    """What the observer of the event loop has told since the log had `after` bytes."""
    with log.open("rb") as lines:
        lines.seek(after)
        told = [json.loads(line) for line in lines if line.startswith(b"{")]
    return [event for event in told if event["event"] == "stalled"]


def main(seconds: float) -> None:
    with Server.running() as server:
        url = server.fresh("limits")
        subprocess.run(
            [sys.executable, "-c", "from outwake.cli import main; main(['migrate'])"],
            env={"DATABASE_URL": url, "PYTHONPATH": str(ROOT)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        session = _fill(url, server, "limits")
        tokens = api_tokens(url, ["alice", "olga"])
        with server.connect("limits") as conn:
            conn.execute("UPDATE outwake.api_token SET operator = true WHERE user_id = 'olga'")
        log = STATE / "api.log"
        start = log.stat().st_size if log.exists() else 0
        with api(url, {"OUTWAKE_REQUIRE_TOKEN": "1"}, observed=True) as (process, port):
            before = resident_mb(process.pid)
            sender = multiprocessing.Process(target=_run, args=(port, *tokens, session, seconds))
            sender.start()
            peak = before
            while sender.is_alive():
                peak = max(peak, resident_mb(process.pid))
                time.sleep(0.05)
            after = resident_mb(process.pid)
        stalls = _stalls(log, start)
    for stall in stalls[-3:]:
        print(f"{stall['ms']} ms at {' '.join(stall['at'])}")
    print(f"limits: memory_mb {before:.0f} {after:.0f}")
    print(f"limits: stall_ms {stalls[-1]['ms']:.0f} peak_mb {peak:.0f}")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS)
