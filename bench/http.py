"""`POST /sessions` through uvicorn, one API process, 16 kept-alive connections, beside a bare route."""

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress

from bench.contestant import ROOT, run, wait_until
from bench.server import STATE, Server, settle
from bench.workloads import SENDOFF

CONNECTIONS = 16


def post_sessions(server: Server, name: str, seconds: int) -> dict[str, float]:
    """Requests answered 201 a second. The load comes from another process, with plain sockets."""
    url = server.fresh("bench")
    run(SENDOFF, url, "setup")
    with server.connect("bench") as conn:
        settle(conn)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DATABASE_URL": url,
        "SENDOFF_PORT": str(port),
        "SENDOFF_DEV_IDENTITY": "1",
        "SENDOFF_LOG_LEVEL": "warning",
        "PYTHONPATH": str(ROOT),
    }
    command = {
        "sendoff": ["-c", "from outbox.cli import main; main(['api'])"],
        "bare": [
            "-m",
            "uvicorn",
            "bench.bare:app",
            "--port",
            str(port),
            "--loop",
            "uvloop",
            "--http",
            "httptools",
            "--no-access-log",
            "--log-level",
            "warning",
        ],
    }[name]
    with (STATE / "api.log").open("ab") as log:
        api = subprocess.Popen([sys.executable, *command], env=environment, cwd=ROOT, stderr=log, stdout=log)
        try:
            wait_until(lambda: _accepts(port), timeout=30)
            done = subprocess.run(
                [sys.executable, "-m", "bench.http", str(port), str(seconds)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
                timeout=seconds + 60,
            )
        finally:
            api.terminate()
            api.wait(30)
    return {"post_sessions_per_s": float(done.stdout)}


def _accepts(port: int) -> bool:
    with suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        body = json.dumps({"repo": "octo/tools", "target_branch": "main", "prompt": "x"})
        connection.request("POST", "/sessions", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 201
    return False


async def _load(port: int, seconds: float) -> float:
    body = json.dumps(
        {"repo": "octo/tools", "target_branch": "main", "prompt": "Fix the date parser"}
    ).encode()
    request = (
        b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    answered = 0
    end = time.monotonic() + seconds

    async def client() -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 201"):
                raise RuntimeError(head.decode())
            length = next(
                int(line.partition(b":")[2])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            )
            await reader.readexactly(length)
            answered += 1
        writer.close()

    started = time.monotonic()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return answered / (time.monotonic() - started)


if __name__ == "__main__":
    import uvloop

    print(uvloop.run(_load(int(sys.argv[1]), float(sys.argv[2]))))
