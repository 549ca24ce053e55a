"""A span for each request (outwake/telemetry/trace.py). Rows that the request enqueues join its trace."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outwake.telemetry import trace


class Tracing:
    """ASGI middleware. It is outside of the access log, so that log lines have a trace_id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
        if not given and not trace.exporting():  # nothing would record the span
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        attributes = {"http.request.method": method, "url.path": scope["path"]}
        with trace.span(method, given.decode("latin-1"), "server", attributes) as span:

            async def note_status(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.note(http__response__status_code=message["status"])
                    if message["status"] >= 500:
                        span.fail(str(message["status"]))
                await send(message)

            try:
                await self._app(scope, receive, note_status)
            finally:
                if route := scope.get("state", {}).get("route"):
                    span.name(f"{method} {route}")
                    span.note(http__route=route)
