"""Limits of HTTP connections, between the socket and uvicorn.

Anybody who can connect can send bytes, long before a token says who it is. uvicorn's parser (httptools) has
no limit: it collects a head for as long as one comes. So this module counts.

1. A head has at most MAX_HEAD bytes, MAX_HEADERS headers and a URL of MAX_URL bytes. What comes after the
   head without being body (trailers, chunk extensions) is counted in the same way.
2. A head must be complete within HEAD_TIMEOUT seconds, the rest of its request within BODY_TIMEOUT.
3. A process has at most `most` connections. One that is waited for (its request has not arrived wholly, or it
   is idle) makes room for a new one, the oldest first, and strangers before those that have shown a token.
   An honest client's request arrives within milliseconds, so slow ones lose.
4. A client address has at most `share` connections that have not shown a token. Its own oldest one that is
   waited for makes room.
5. If nothing can make room, a new connection gets 503 and is closed.

Each case is logged, at most once a second for each kind.
"""

import asyncio
import ipaddress
import logging
import resource
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from outwake.settings import Settings
from outwake.telemetry.log import get_logger

MAX_HEAD = 32_768  # bytes; exact to two pieces, in the client's favour
MAX_HEADERS = 100
MAX_URL = 8192  # bytes
MAX_PIPELINED = 16  # requests that wait for the answer before them
PIECE = 8192  # bytes parsed at a time
HEAD_TIMEOUT = 10.0  # seconds
BODY_TIMEOUT = 60.0  # seconds
OTHER_FILES = 64  # descriptors for all but connections and the pool
LOG_PAUSE = 1.0  # seconds

_REFUSALS = {
    400: b"The request cannot be read.",
    408: b"The request did not arrive in time.",
    414: b"The URL is too long.",
    431: b"The request's headers are too large.",
    503: b"This process has no room for another connection.",
}
_PHRASES = {
    400: b"Bad Request",
    408: b"Request Timeout",
    414: b"URI Too Long",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}

Stage = Literal["head", "body"] | None
"""What has not arrived yet."""

log = get_logger("outwake.app.connections")


class Connections:
    """All connections of a process."""

    def __init__(self, most: int, share: int) -> None:
        self.most = most
        self._share = share
        self._open: set[HttpConnection] = set()
        # What is waited for, the longest first.
        self._strange_waiting: dict[HttpConnection, None] = {}
        self._known_waiting: dict[HttpConnection, None] = {}
        self._strangers: dict[str, dict[HttpConnection, None]] = {}
        self._told: Counter[str] = Counter()
        self._told_at = float("-inf")

    def __len__(self) -> int:
        return len(self._open)

    def add(self, new: "HttpConnection") -> bool:
        """Returns False if there is no room (step 5)."""
        strangers = self._strangers.get(new.address, {})
        if len(strangers) >= self._share and not self._drop_one_of(strangers, "address_share"):
            return False
        if len(self._open) >= self.most and not (
            self._drop_one_of(self._strange_waiting, "full") or self._drop_one_of(self._known_waiting, "full")
        ):
            return False
        self._strangers.setdefault(new.address, {})[new] = None
        self._open.add(new)
        self.waits_for(new)
        return True

    def remove(self, gone: "HttpConnection") -> None:
        self._open.discard(gone)
        self.has_arrived(gone)
        self._no_stranger(gone)

    def waits_for(self, one: "HttpConnection") -> None:
        """It has no complete request."""
        (self._known_waiting if one.known else self._strange_waiting)[one] = None

    def has_arrived(self, one: "HttpConnection") -> None:
        self._strange_waiting.pop(one, None)
        self._known_waiting.pop(one, None)

    def has_shown_a_token(self, one: "HttpConnection") -> None:
        one.known = True
        self._no_stranger(one)
        if one in self._strange_waiting:
            del self._strange_waiting[one]
            self._known_waiting[one] = None

    def _no_stranger(self, one: "HttpConnection") -> None:
        strangers = self._strangers.get(one.address)
        if strangers is not None:
            strangers.pop(one, None)
            if not strangers:
                del self._strangers[one.address]

    def _drop_one_of(self, some: Iterable["HttpConnection"], why: str) -> bool:
        """Close the first of them that is waited for."""
        found = next(
            (one for one in some if one in self._strange_waiting or one in self._known_waiting), None
        )
        if found is None:
            return False
        self.report(why, found.address)
        found.transport.abort()
        self.remove(found)
        return True

    def report(self, why: str, address: str) -> None:
        """Log that a connection was refused or closed."""
        self._told[why] += 1
        now = time.monotonic()
        if now - self._told_at >= LOG_PAUSE:
            self._told_at = now
            counts = dict(self._told)
            self._told.clear()
            log.warning("connections_limited", last_address=address, open=len(self._open), **counts)


def most_connections(settings: Settings) -> int:
    """OUTWAKE_MAX_CONNECTIONS, or fewer if the process may not open as many descriptors."""
    needed = settings.max_connections + settings.pool_size + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        if wanted < needed:
            most = max(1, wanted - settings.pool_size - OTHER_FILES)
            log.warning("few_descriptors", descriptors=wanted, connections=most)
            return most
    return settings.max_connections


def has_shown_a_token(request: Request) -> None:
    """The request's connection is no stranger's any more."""
    connection = request.scope.get("extensions", {}).get("outwake")
    if isinstance(connection, HttpConnection) and not connection.known:
        connection.all.has_shown_a_token(connection)


class HttpConnection(HttpToolsProtocol):
    """One connection. uvicorn's protocol does the work; this class counts."""

    all: Connections
    """Set by a subclass that `limited` makes, because uvicorn creates the objects."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = _place(self.client[0]) if self.client else "local"
        self.known = False
        self._stage: Stage = "head"
        self._timed: Stage = None
        self._timer: asyncio.TimerHandle | None = None
        self._silent = 0  # bytes since the parser last reported anything
        self._refusal = 400
        if self.all.add(self):
            self._wait()
        else:
            self.all.report("no_room", self.address)
            self._refuse(503)

    def connection_lost(self, exc: Exception | None) -> None:
        self.all.remove(self)
        self._stage = None
        self._wait()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE] if len(data) > PIECE else data
            self._silent += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._silent > MAX_HEAD + PIECE or self._too_many:
                self._refuse(431)
                return
        if self._timed != self._stage:
            self._wait()

    @property
    def _too_many(self) -> bool:
        return self._stage is not None and len(self.headers or ()) > MAX_HEADERS

    # What the parser reports

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"outwake": self}  # type: ignore[dict-item]
        self._stage = "head"

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > MAX_URL:
            self._stop(414)

    def on_headers_complete(self) -> None:
        if len(self.headers) > MAX_HEADERS:
            self._stop(431)
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(400)
        self._silent = 0
        self._stage = "body"
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._silent = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._silent = 0
        self._stage = None
        self.all.has_arrived(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and not self.pipeline:
            self.all.waits_for(self)

    # Refusals

    def _stop(self, status: int) -> None:
        """Leave the parser. uvicorn then calls send_400_response."""
        self._refusal = status
        raise ValueError(status)

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def _refuse(self, status: int) -> None:
        self.all.report(f"refused_{status}", self.address)
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            text = _REFUSALS[status]
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%s" % (status, _PHRASES[status], len(text), text)
            )
        self.transport.close()

    def _wait(self) -> None:
        """Wait for the rest of a head or of a body, but not for ever."""
        if self._timer:
            self._timer.cancel()
        self._timed = self._stage
        seconds = HEAD_TIMEOUT if self._stage == "head" else BODY_TIMEOUT
        self._timer = self.loop.call_later(seconds, self._refuse, 408) if self._stage else None


def _place(address: str) -> str:
    """What counts as one address. Of IPv6 a client has a network of 64 bits at least."""
    if ":" not in address:
        return address
    if address.startswith("::ffff:"):  # IPv4
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether uvicorn's line is worth a line. A stranger could have one for each request."""
    return record.msg not in ("Invalid HTTP request received.", "Unsupported upgrade request.")


def limited(settings: Settings) -> type[HttpConnection]:
    """The protocol of a process, for uvicorn."""
    logging.getLogger("uvicorn.error").addFilter(_is_ours)
    found = Connections(most_connections(settings), settings.max_address_connections)
    members: dict[str, Any] = {"all": found}
    return type("LimitedConnection", (HttpConnection,), members)
