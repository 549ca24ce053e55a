"""One log line a request: never its body, its query or its headers."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outbox.log import get_logger

log = get_logger("app.access")


class AccessLog:
    """ASGI middleware. A stream is logged when it ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        begun = time.perf_counter()
        try:
            await self._app(scope, receive, note_status)
        finally:
            state = scope.get("state", {})
            route = state.get("route")  # set by the routes; what matches none stays unnamed
            session = state.get("session")
            if session is None and route and route.startswith("/sessions/{id"):
                session = scope.get("path_params", {}).get("id")
            fields = {"session": str(session)} if session else {}
            log.info(
                "request",
                method=scope["method"],
                route=route,
                status=status,
                duration_ms=round((time.perf_counter() - begun) * 1000, 1),
                **fields,
            )
