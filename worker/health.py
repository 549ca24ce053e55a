"""A worker's health, over HTTP on loopback. It answers from what the worker knows and asks nobody.

`/healthz`: the process and its loop are alive. `/readyz`: it is connected, so that it hears of new rows.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from typing import Any

Readiness = Callable[[], dict[str, Any]]
"""What /readyz shows; `ready` decides the status."""

_TIMEOUT = 5.0


async def serve(port: int, readiness: Readiness) -> asyncio.Server:
    """Answer health checks on 127.0.0.1 until the server returned is closed. Raises OSError."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(_TIMEOUT):
                request = await reader.readline()
                while (await reader.readline()).strip():  # headers, of no interest
                    pass
                writer.write(_response(request, readiness))
                await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", port, limit=8192)


def _response(request: bytes, readiness: Readiness) -> bytes:
    method, _, rest = request.decode("latin-1").partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    status, body = "404 Not Found", {"title": "Not Found", "status": 404}
    if method not in ("GET", "HEAD"):
        status, body = "405 Method Not Allowed", {"title": "Method Not Allowed", "status": 405}
    elif path == "/healthz":
        status, body = "200 OK", {"alive": True}
    elif path == "/readyz":
        body = readiness()
        status = "200 OK" if body["ready"] else "503 Service Unavailable"
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + (b"" if method == "HEAD" else text)


def check(port: int) -> str | None:
    """Ask the worker on this host whether it is ready; None if it is, else why not."""
    connection = HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except (OSError, HTTPException) as error:
        return f"no worker answers on port {port}: {error}"
    finally:
        connection.close()
    return None if response.status == 200 else f"the worker is not ready: {text}"
