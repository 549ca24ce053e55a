"""GET /sessions/{id}/events: a session followed live, as Server-Sent Events.

    id: 17                              event: status
    event: message                      data: {"inbox_status": "pending", …}
    data: {"seq": 17, "body": {…}, …}

`status` has no id: it is sent first on every (re)connect, and when it changed. A client that comes back
with the Last-Event-ID of the last message it has gets each later message once.
"""

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from app.body import last_event_id, read_query
from app.context import Context, context
from app.hub import Stream
from app.identity import Identity
from app.models import EventQuery
from app.sessions import no_session

HEARTBEAT = 15.0  # seconds
RETRY = 1000  # milliseconds until an EventSource comes back
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back


async def follow_session(request: Request, identity: Identity) -> Response:
    asked = read_query(request, EventQuery)
    seen = last_event_id(request)
    here = context(request)
    stream = here.hub.follow(
        request.path_params["id"],
        asked.after if seen is None else seen,
        until_completed=asked.until == "completed",
    )
    try:
        await stream.begin()
        if identity.scope not in (None, stream.user_id):
            raise no_session()
    except BaseException:
        here.hub.leave(stream)
        raise
    if seen is not None and stream.nothing_left:
        here.hub.leave(stream)
        return Response(status_code=204)  # tells an EventSource to stay away
    return StreamingResponse(_events(here, stream), headers=HEADERS, media_type="text/event-stream")


async def _events(here: Context, stream: Stream) -> AsyncIterator[bytes]:
    try:
        yield f"retry: {RETRY}\n".encode()  # a line of the first event, which has been read
        while not stream.ended:
            if batch := await stream.take(HEARTBEAT):
                yield batch
            elif not stream.ended:
                yield b": heartbeat\n\n"
    finally:
        here.hub.leave(stream)
