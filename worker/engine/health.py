"""A worker's health and metrics, over HTTP.

`/healthz`: the process and its loop are alive. `/readyz`: it is connected, so it hears of new rows. Both
answer from what the worker knows, without a query. `/readyz?workers=1` also asks the database whether a
worker is present and whether no row waits too long. `/metrics` asks how many rows wait. Each of these two
uses one connection and one query at a request, and none in between.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg

from outwake.connect import connect, deadline
from outwake.settings import Settings
from outwake.telemetry.metrics import CONTENT_TYPE, database_metrics, render, unreachable
from outwake.telemetry.ready import outbox_ready
from outwake.worker.engine.metrics import Snapshot, families

_TIMEOUT = 5.0
_DATABASE_TIMEOUT = 3.0
_JSON = "application/json"


@dataclass(frozen=True)
class Source:
    """What this process knows about itself."""

    readiness: Callable[[], dict[str, Any]]
    """What /readyz shows; `ready` decides the status."""
    snapshot: Callable[[], Awaitable[Snapshot]]


async def serve(settings: Settings, source: Source) -> asyncio.Server:
    """Answer on OUTWAKE_HEALTH_HOST and OUTWAKE_HEALTH_PORT until the returned server is closed.

    Raises OSError.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT):
                request = await reader.readline()
                while (await reader.readline()).strip():  # headers are ignored
                    pass
                method, _, rest = request.decode("latin-1").partition(" ")
                status, kind, body = await _answer(method, rest.partition(" ")[0], settings, source)
                writer.write(_response(status, kind, b"" if method == "HEAD" else body, len(body)))
                await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, settings.health_host, settings.health_port, limit=8192)


async def _answer(
    method: str, target: str, settings: Settings, source: Source
) -> tuple[HTTPStatus, str, bytes]:
    url = urlsplit(target)
    if method not in ("GET", "HEAD"):
        return _problem(HTTPStatus.METHOD_NOT_ALLOWED)
    match url.path:
        case "/healthz":
            return HTTPStatus.OK, _JSON, json.dumps({"alive": True}).encode()
        case "/readyz":
            body = source.readiness()
            if parse_qs(url.query).get("workers") == ["1"]:
                body |= await _others(settings)
            ready = body["ready"] and body.get("outbox_ready", True)
            status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
            return status, _JSON, json.dumps(body).encode()
        case "/metrics":
            database = await _database_metrics(settings)
            return HTTPStatus.OK, CONTENT_TYPE, render(families(await source.snapshot()), database)
    return _problem(HTTPStatus.NOT_FOUND)


def _problem(status: HTTPStatus) -> tuple[HTTPStatus, str, bytes]:
    return status, "application/problem+json", json.dumps({"title": status.phrase, "status": status}).encode()


def _response(status: HTTPStatus, kind: str, body: bytes, length: int) -> bytes:
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


async def _others(settings: Settings) -> dict[str, Any]:
    """What the database says, as in the API's /readyz?workers=1."""
    try:
        async with asyncio.timeout(_DATABASE_TIMEOUT), await _connect(settings) as conn:
            with deadline(conn, _DATABASE_TIMEOUT):
                found = await outbox_ready(conn, timedelta(seconds=settings.stuck_after))
    except (psycopg.Error, OSError, TimeoutError) as error:
        return {"outbox_ready": False, "reason": f"the database does not answer: {str(error).strip()}"}
    return {"outbox_ready": found.ready, "workers": found.workers, "reason": found.reason}


async def _database_metrics(settings: Settings) -> list[Any]:
    try:
        async with asyncio.timeout(_DATABASE_TIMEOUT), await _connect(settings) as conn:
            with deadline(conn, _DATABASE_TIMEOUT):
                return await database_metrics(conn)
    except (psycopg.Error, OSError, TimeoutError):
        return unreachable()


async def _connect(settings: Settings) -> psycopg.AsyncConnection[tuple[Any, ...]]:
    lease = timedelta(seconds=settings.lease)
    return await connect(settings.database_url, "outwake worker health", lease, pooled=settings.pooled)


def check(host: str, port: int) -> str | None:
    """Ask the worker on this host whether it is ready. Returns None if it is, else the reason."""
    everywhere = host in ("", "0.0.0.0", "::")  # noqa: S104
    connection = HTTPConnection("127.0.0.1" if everywhere else host, port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        return f"no worker answers on port {port}: {error}"
    finally:
        connection.close()
    return None if response.status == 200 else f"the worker is not ready: {text}"
