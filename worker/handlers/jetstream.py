"""The worker's one connection to NATS, and publishing on it.

1. The connection is opened when there is something to publish. All waiting handlers share it.
2. The client neither reconnects by itself nor buffers messages. A message that is sent long after its attempt
   ended could overtake others of its key. So a lost connection is closed together with its unsent messages,
   and the next message opens a new one. Nothing is tried while there is nothing to publish.
3. `tls://` enforces TLS. By itself the client would continue in plain text, and send its password, if the
   server does not ask for TLS.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from contextvars import Context
from pathlib import Path

from nats.aio.client import Client, RawCredentials
from nats.errors import Error, SecureConnWantedError
from nats.js import JetStreamContext
from nats.js.api import PubAck

from outwake.errors import ConfigurationError
from outwake.telemetry.log import get_logger

TIMEOUT = 5.0
"""Seconds for each step of connecting, and for an acknowledgement."""

_PING = 30
"""Seconds between pings. The connection is closed if a ping is unanswered when the next is due."""

log = get_logger(__name__)


class Unreachable(Exception):
    """There is no connection; nothing was sent."""


class TooLarge(Exception):
    """The server accepts no message of this size; nothing was sent."""


class JetStream:
    """Publishes to the servers of one cluster."""

    def __init__(self, servers: list[str], credentials: Path | None) -> None:
        self._servers = servers
        self._credentials = credentials
        self._opened: asyncio.Task[_Client] | None = None

    async def publish(self, subject: str, body: bytes, headers: Mapping[str, str]) -> PubAck:
        """Publish a message. Returns when JetStream acknowledges it: it is stored, or its id is known.

        Raises Unreachable and TooLarge if nothing was sent, nats.errors.Error if it may have been stored.
        """
        client = await self._connected()
        size = len(body) + _size(headers)
        if size > client.max_payload:
            raise TooLarge(f"{size} bytes, the server takes {client.max_payload}")
        try:
            return await client.stream.publish(subject, body, headers=dict(headers))
        except TimeoutError:
            if denied := client.denied.pop(subject.lower(), None):
                raise Error(denied) from None
            raise

    async def close(self) -> None:
        """Close the connection, if there is one."""
        opened, self._opened = self._opened, None
        if opened is None:
            return
        opened.cancel()  # without effect if the connection is open
        with suppress(Unreachable, asyncio.CancelledError):
            await _close(await opened)

    async def _connected(self) -> "_Client":
        """The open connection, or a new one."""
        opened = self._opened
        if opened is None or (opened.done() and (opened.exception() or opened.result().is_closed)):
            # In a context of its own, so that its log lines do not carry the first row's fields.
            opened = self._opened = asyncio.create_task(self._open(), context=Context())
        return await asyncio.shield(opened)

    async def _open(self) -> "_Client":
        try:
            credentials = read_credentials(self._credentials) if self._credentials else None
        except ConfigurationError as error:
            raise Unreachable(str(error)) from error
        client = _Client()
        try:
            await client.connect(
                self._servers,
                name="outwake worker",
                user_credentials=credentials,
                error_cb=client.failed,
                closed_cb=client.lost,
                allow_reconnect=False,
                max_reconnect_attempts=1,  # of connecting; 0 would mean for ever
                reconnect_time_wait=0,
                connect_timeout=int(TIMEOUT),
                flush_timeout=TIMEOUT,
                ping_interval=_PING,
                max_outstanding_pings=1,
            )
        except Exception as error:  # from the network, the server, TLS, or an invalid key
            cause = client.cause or error
            await _close(client)
            raise Unreachable(str(cause) or type(cause).__name__) from error
        assert client.connected_url is not None
        client.opened = True
        log.info("relay_connected", server=f"{client.connected_url.hostname}:{client.connected_url.port}")
        return client


class _Client(Client):
    """The library's client. It keeps the server's error messages and enforces rule 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = JetStreamContext(self, timeout=TIMEOUT)
        self.opened = False
        self.cause: Exception | None = None
        """Why it could not connect. The library reports only that no server is left."""
        self.denied: dict[str, str] = {}
        """The server's error for a subject. The subject is in lower case, as the library reports it. The
        server does not answer a message that it denies.
        """

    async def failed(self, error: Exception) -> None:
        """Called for an error outside of a call."""
        self.cause = error
        text = str(error) or type(error).__name__
        if self.opened:
            log.warning("relay_error", error=text)
        _, found, quoted = text.partition('publish to "')
        if found:
            self.denied[quoted.partition('"')[0]] = text

    async def lost(self) -> None:
        """Called when the connection is closed, by either side."""
        if self.opened:
            log.info("relay_disconnected", error=str(self.last_error) if self.last_error else None)

    def _connect_command(self) -> bytes:
        assert self._current_server is not None
        if self._current_server.uri.scheme == "tls" and not self._server_info.get("tls_required"):
            raise SecureConnWantedError
        return super()._connect_command()


def read_credentials(path: Path) -> RawCredentials:
    """The content of a credentials file. Raises ConfigurationError for others: the library loops on them."""
    try:
        text = path.read_text("ascii")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ConfigurationError(f"OUTWAKE_RELAY_CREDENTIALS: {path}: {reason}") from None
    for part in ("BEGIN NATS USER JWT", "BEGIN USER NKEY SEED"):
        if part not in text:
            raise ConfigurationError(f"OUTWAKE_RELAY_CREDENTIALS: {path}: has no {part!r}")
    return RawCredentials(text)


def _size(headers: Mapping[str, str]) -> int:
    """Bytes of the headers in the message: the first line, the empty line, and one line for each header."""
    lines = (len(name.encode()) + len(value.encode()) + len(": \r\n") for name, value in headers.items())
    return len("NATS/1.0\r\n\r\n") + sum(lines)


async def _close(client: Client) -> None:
    with suppress(OSError, Error, TimeoutError):
        async with asyncio.timeout(TIMEOUT):
            await client.close()
