"""GET /sessions/{id}/events: follow a session live by Server-Sent Events.

    id: 17                              event: status
    event: message                      data: {"inbox_status": "pending", …}
    data: {"seq": 17, "body": {…}, …}

A stream ends when the token that opened it expires. The client reconnects with a new one.

`status` is the first event of each connection, and is sent again when the status changes. Only the last one
has an id, `SEQ-MARK`, where the mark names the state. A client that reconnects with its Last-Event-ID gets
each later message once, and the last state unless it has it: then the answer is 204.
"""

import time
from collections.abc import AsyncIterator, Callable

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from outwake.app.api.body import last_event_id, read_query
from outwake.app.api.models import EventQuery
from outwake.app.api.sessions import no_session
from outwake.app.auth.identity import Identity
from outwake.app.context import context
from outwake.app.live.streams import Stream

HEARTBEAT = 15.0  # seconds
RETRY = 1000  # milliseconds until an EventSource reconnects
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would buffer events


async def follow_session(request: Request, identity: Identity) -> Response:
    asked = read_query(request, EventQuery)
    seen = last_event_id(request)
    here = context(request)
    close = here.limits.open_stream(identity)
    stream = here.hub.follow(
        request.path_params["id"],
        asked.after if seen is None else seen.seq,
        until_completed=asked.until == "completed",
        mark=seen.mark if seen else None,
        reader=identity.scope or "",
    )

    def leave() -> None:
        here.hub.leave(stream)
        close()

    try:
        await stream.begin()
        if not identity.sees(stream.user_id):
            raise no_session()
    except BaseException:
        leave()
        raise
    if seen is not None and stream.nothing_left:
        leave()
        return Response(status_code=204)  # tells an EventSource not to reconnect
    return Following(_events(stream, identity.until), leave)


class Following(StreamingResponse):
    """Always calls `leave`. The generator cannot, because its `finally` does not run if it never started."""

    def __init__(self, events: AsyncIterator[bytes], leave: Callable[[], None]) -> None:
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if release := scope.get("state", {}).get("release"):
            release()  # it counts as a stream, not as a request
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _events(stream: Stream, until: float) -> AsyncIterator[bytes]:
    yield f"retry: {RETRY}\n".encode()  # a line of the first event, which is ready already
    while not stream.ended and (left := until - time.monotonic()) > 0:
        if batch := await stream.take(min(HEARTBEAT, left)):
            yield batch
        elif not stream.ended:
            yield b": heartbeat\n\n"
