"""Records each request: one log line and the metrics.

The log line never has the request's body, query or headers. One middleware does both, because each layer
around a request costs time.
"""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outwake.app.api import metrics
from outwake.telemetry.log import get_logger, writes

log = get_logger("outwake.app.access_log")


class Access:
    """ASGI middleware. It logs a stream when the stream ends."""

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
            if release := state.get("release"):  # app/auth/limits.py
                release()
            route = state.get("route")  # set by the routes; None if no route matched
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
