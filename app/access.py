"""What is kept of a request: one log line, never with its body, its query or its headers, and the metrics.

One middleware for both: each layer around a request costs it 1 to 2 us.
"""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outwake.app.api import metrics
from outwake.telemetry.log import get_logger, writes

log = get_logger("outwake.app.access")


class Access:
    """ASGI middleware. A stream is logged when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, answered = 500, 0.0

        async def note_start(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], time.perf_counter()
            await send(message)

        metrics.IN_PROGRESS.inc()
        begun = time.perf_counter()
        try:
            await self._app(scope, receive, note_start)
        finally:
            ended = time.perf_counter()
            metrics.IN_PROGRESS.dec()
            state = scope.get("state", {})
            route = state.get("route")  # set by the routes; what matches none stays unnamed
            metrics.count(scope["method"], route, status, (answered or ended) - begun)
            if writes(logging.INFO):
                _log(scope, route, state, status, ended - begun)


def _log(scope: Scope, route: str | None, state: dict[str, Any], status: int, seconds: float) -> None:
    session = state.get("session")
    if session is None and route and route.startswith("/sessions/{id"):
        session = scope.get("path_params", {}).get("id")
    fields = {"session": str(session)} if session else {}
    log.info(
        "request",
        method=scope["method"],
        route=route,
        status=status,
        duration_ms=round(seconds * 1000, 1),
        **fields,
    )
