"""JSON answers. The database makes most of them, and the API passes their text on unparsed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

SLICE = 65_536  # bytes

Place = TypeVar("Place", str, int)


@dataclass(frozen=True)
class Page(Generic[Place]):
    """A page of a list. `items` are JSON texts. `next` tells where the next page begins, if there is one."""

    items: Sequence[str]
    next: Place | None


class Answer(Response):
    """An answer that is sent in slices. Each waits until the client has taken the ones before, so a client
    that does not read keeps its request open, and Limits counts that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytes(self.body)
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, max(len(body), 1), SLICE):
            part, more = body[start : start + SLICE], start + SLICE < len(body)
            await send({"type": "http.response.body", "body": part, "more_body": more})


def json_response(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Answer(text, status, headers, "application/json")
