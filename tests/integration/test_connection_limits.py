"""What a stranger can send to an API process: heads, bodies and connections have limits."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest

from outwake.app import connections
from outwake.app.api.problems import Problem
from outwake.app.auth.identity import Identity
from outwake.app.auth.limits import AT_ONCE, BODIES, BODIES_OF_USER
from outwake.app.connections import MAX_HEAD, MAX_HEADERS, MAX_PIPELINED, MAX_URL, PIECE
from tests.support.api import Api, serving
from tests.support.waits import awaiting

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def raw(api: Api) -> AsyncIterator[Streams]:
    """A connection that sends what the test says."""
    url = httpx.URL(api.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status of the next answer; 0 if the server closed instead."""
    async with awaiting("the server's answer or its close"):
        try:
            line = await reader.readline()
        except ConnectionError:
            return 0
    return int(line.split()[1]) if line else 0


async def send(api: Api, parts: Iterator[bytes], most: int) -> tuple[int, int]:
    """Send parts until the server answers or `most` bytes are sent: the status and the bytes."""
    async with raw(api) as (reader, writer):
        answer = asyncio.create_task(status_of(reader))
        sent = 0
        try:
            while sent < most and not answer.done():
                part = next(parts)
                writer.write(part)
                sent += len(part)
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        return await answer, sent


def endless(start: bytes, part: bytes) -> Iterator[bytes]:
    yield start
    while True:
        yield part


START = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("name", "parts", "status"),
    [
        ("many headers", endless(START, b"X-A: b\r\n" * 4096), 431),
        ("one header's value", endless(START + b"X-A: ", b"b" * 65536), 431),
        ("one header's name", endless(START, b"b" * 65536), 431),
        ("the URL", endless(b"GET /", b"a" * 65536), 414),
        ("the query", endless(b"GET /?", b"a" * 65536), 414),
        ("the method", endless(b"", b"G" * 65536), 400),
        ("trailers", endless(CHUNKED + b"\r\n0\r\n", b"X-A: b\r\n" * 4096), 431),
        ("a trailer's value", endless(CHUNKED + b"\r\n0\r\nX-A: ", b"b" * 65536), 431),
        ("a chunk's extension", endless(CHUNKED + b"\r\n1;", b"b" * 65536), 431),
        ("empty lines", endless(b"", b"\r\n" * 32768), 431),
    ],
)
async def test_a_head_without_end_is_refused_after_some_kilobytes(
    api: Api, name: str, parts: Iterator[bytes], status: int
) -> None:
    answered, sent = await send(api, parts, 96 * 1024 * 1024)
    # 0: the answer was lost, because the server closed before the client had finished.
    assert answered in (status, 401, 415, 0), name
    # The server reads some more than it counts: the sockets' buffers are as large as the kernel makes them.
    assert sent < 16 * 1024 * 1024, name
    assert (await api.client.get("/healthz")).status_code == 200


async def test_a_head_below_the_limits_is_read(api: Api) -> None:
    filler = b"X-Filler: " + b"f" * (MAX_HEAD - 400) + b"\r\n"
    for head in (
        START + filler + b"\r\n",
        START + b"X-A: b\r\n" * (MAX_HEADERS - 1) + b"\r\n",
        b"GET /healthz?" + b"a" * (MAX_URL - 13) + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ):
        async with raw(api) as (reader, writer):
            for start in range(0, len(head), 1000):  # however it is cut
                writer.write(head[start : start + 1000])
                await writer.drain()
            assert await status_of(reader) == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (START + b"X-A: b\r\n" * MAX_HEADERS + b"\r\n", 431),
        (START + b"X-A: " + b"b" * (MAX_HEAD + 2 * PIECE) + b"\r\n\r\n", 431),
        (b"GET /?" + b"a" * MAX_URL + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET / HTTP/9\r\n\r\n", 400),
    ],
)
async def test_a_head_above_the_limits_is_told_so(api: Api, head: bytes, status: int) -> None:
    async with raw(api) as (reader, writer):
        writer.write(head)
        assert await status_of(reader) == status


async def test_a_client_cannot_pile_up_requests_on_one_connection(api: Api) -> None:
    async with raw(api) as (reader, writer):
        writer.write((START + b"\r\n") * (MAX_PIPELINED + 20))
        async with awaiting("the server's answer or its close"):
            answers = await reader.read()
    assert len(re.findall(rb"HTTP/1.1 200", answers)) <= MAX_PIPELINED + 2


async def test_an_unfinished_head_and_a_slow_body_are_ended(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.2)
    monkeypatch.setattr(connections, "BODY_TIMEOUT", 0.2)
    for sent, status in (
        (b"", 408),
        (START, 408),
        (CHUNKED + b"\r\n", 415),  # refused before its body is read; the connection is closed later
        (b"POST /ui/sign-in HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n", 408),
    ):
        async with raw(api) as (reader, writer):
            writer.write(sent)
            assert await status_of(reader) == status
            async with awaiting("the server's answer or its close"):
                await reader.read()  # until the server closes


async def test_unfinished_heads_of_one_address_keep_nobody_out(database: str) -> None:
    async with serving(database, OUTWAKE_MAX_ADDRESS_CONNECTIONS=20, OUTWAKE_MAX_CONNECTIONS=40) as api:
        held = [raw(api) for _ in range(100)]
        pairs = [await one.__aenter__() for one in held]
        for _, writer in pairs:
            writer.write(START)
        async with awaiting("the server's answer or its close"):
            for reader, _ in pairs[:80]:
                await reader.read()  # the oldest were closed
        assert len(api.server.server_state.connections) <= 20
        assert (await api.client.get("/healthz")).status_code == 200
        for one in held:
            await one.__aexit__(None, None, None)


async def test_what_makes_room_is_a_stranger_before_a_user(database: str) -> None:
    async with serving(database, OUTWAKE_MAX_CONNECTIONS=10) as api:
        await api.create()  # the client's connection has shown who it is, and is idle now
        held = [raw(api) for _ in range(30)]
        for one in held:
            (await one.__aenter__())[1].write(START)
        assert len(api.server.server_state.connections) <= 10
        [user] = [one for one in api.server.server_state.connections if getattr(one, "known", False)]
        assert (await api.client.get("/sessions")).status_code == 200
        assert user in api.server.server_state.connections, "the same connection"
        for one in held:
            await one.__aexit__(None, None, None)


async def test_a_strangers_form_is_small(database: str) -> None:
    same = {"Sec-Fetch-Site": "same-origin"}
    async with (
        serving(database, OUTWAKE_REQUIRE_TOKEN=True) as api,
        httpx.AsyncClient(base_url=api.url, headers=same) as client,
    ):
        for path in ("/ui/sign-in", "/ui/theme", "/ui/sign-out"):
            answer = await client.post(path, data={"token": "x" * 20_000})
            assert answer.status_code in (413, 303), path
        assert (await client.post("/ui/sign-in", data={"token": "x" * 15_000})).status_code == 401
        # A form for users is not read before the user is known.
        assert (await client.post("/ui/sessions", data={"prompt": "x" * 1_000_000})).status_code == 401


async def test_a_user_has_so_many_requests_and_bytes_at_once(api: Api) -> None:
    limits = api.context.limits
    alice = Identity("alice", operator=False)
    ended = [limits.begin(alice) for _ in range(AT_ONCE)]
    with pytest.raises(Problem) as refused:
        limits.begin(alice)
    assert refused.value.status == 429
    ended[0]()
    ended[0]()  # twice is once
    limits.begin(alice)
    with pytest.raises(Problem):
        limits.begin(alice)
    with pytest.raises(Problem) as refused:
        limits.hold_body("alice", BODIES_OF_USER + 1)
    assert refused.value.status == 429
    limits.drop_body("alice", BODIES_OF_USER + 1)
    for number in range(BODIES // BODIES_OF_USER):
        limits.hold_body(f"user-{number}", BODIES_OF_USER)
    with pytest.raises(Problem) as refused:
        limits.hold_body("one more", 1)
    assert refused.value.status == 503
