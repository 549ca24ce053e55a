"""The end of a connection is noticed however it comes, by a reader of notifications (outwake/_notify.py) and
by a reader that waits for an answer on the same connection (worker/engine/reply.py).
"""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest
import uvloop

from outwake._notify import ListenConnection
from outwake._statement import Statement
from outwake.worker.engine.listen import Listener
from outwake.worker.engine.reply import Reply
from tests.support.waits import awaiting


class Server:
    """As libpq: reads what is there, once a call, and raises at the end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.socket = sock.fileno()

    def consume_input(self) -> None:
        try:
            if not self._sock.recv(16384):
                raise psycopg.OperationalError("closed")
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise psycopg.OperationalError("reset") from error

    def notifies(self) -> None:
        return None

    def send_query_prepared(self, *what: object, result_format: int) -> None:
        pass

    def is_busy(self) -> bool:
        return True


async def nothing(timeout: float) -> AsyncIterator[None]:
    for _ in ():
        yield None


def connection(server: Server) -> ListenConnection:
    return ListenConnection(cast(Any, SimpleNamespace(notifies=nothing, pgconn=server)), 1)


def asks(listener: Listener) -> Reply[str]:
    statement = Statement("SELECT 1")
    listener._statements._names[statement] = b"prepared"
    return listener.ask(statement, [], str)


def listens(server: Server) -> Awaitable[None]:
    return asyncio.create_task(connection(server).hear(lambda channel, payload: None))


def waits(server: Server) -> Awaitable[str]:
    listener = Listener(connection(server), lambda channel, payload: None)
    listener.start(lambda: None)
    return asks(listener).done


class Behind(Server):
    """A notification came right behind an answer: libpq parses it when the answer has been taken."""

    results = 2

    def is_busy(self) -> bool:
        return False

    def get_result(self) -> object:
        self.results -= 1
        return "answer" if self.results else None

    def notifies(self) -> Any:
        if self.results == 0:
            self.results -= 1
            return SimpleNamespace(relname=b"outwake_wake", extra=b"t@0")
        return None


def test_what_comes_right_behind_an_answer_is_heard() -> None:
    heard: list[str] = []

    async def run() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        listener = Listener(connection(Behind(ours)), lambda channel, payload: heard.append(payload))
        listener.start(lambda: None)
        await asyncio.sleep(0)
        reply = asks(listener)
        theirs.sendall(b"both of them")
        async with awaiting("the answer", seen=lambda: heard):
            assert await reply.done == "answer"
        ours.close()
        theirs.close()

    uvloop.run(run())
    assert heard == ["t@0"]


@pytest.mark.parametrize("end", ["closed", "reset", "reset with last words"])
@pytest.mark.parametrize("who", [listens, waits])
def test_end_is_noticed(end: str, who: Callable[[Server], Awaitable[object]]) -> None:
    """uvloop tells of a reset but once; what was sent before it is read first."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        ours.setblocking(False)
        noticed = who(Server(ours))
        await asyncio.sleep(0)
        if "reset" in end:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if "words" in end:
            theirs.sendall(b"terminating connection")
        theirs.close()
        async with awaiting("the end of the connection to be noticed"):
            with pytest.raises(psycopg.OperationalError):
                await noticed
        ours.close()

    uvloop.run(run())
