"""The allocator's and the sandbox's adapters against stand-ins that fail, hang, lie or answer late."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from outwake.errors import HandBack
from outwake.worker.ask import LIMIT
from outwake.worker.errors import OutcomeUnknown, PermanentError, TransientError
from outwake.worker.sandboxes import aio
from outwake.worker.sandboxes import allocator as allocator_module
from outwake.worker.sandboxes.aio import AioSandbox
from outwake.worker.sandboxes.allocator import AllocatorProvider
from outwake.worker.sandboxes.base import Request, StepError
from tests.support.allocator import allocator
from tests.support.faults import Fault, Steps
from tests.support.loopback import loopback
from tests.support.production import Production, parts

__all__ = ["parts"]  # fixtures


@pytest.fixture
async def client(parts: Production) -> AsyncIterator[AioSandbox]:
    async with AioSandbox.connect(parts.sandboxes[0].item) as made:
        yield made


def provider(url: str, wait: float = 0) -> AllocatorProvider:
    return AllocatorProvider(url, wait, keep=0)


async def borrow(provider: AllocatorProvider) -> dict[str, Any]:
    return await provider.acquire(Request(uuid4(), uuid4(), uuid4(), 1))


async def test_borrow_waits_for_a_sandbox_that_comes_free() -> None:
    steps = Steps()
    async with loopback() as server:
        lender = allocator(server, steps)
        borrowing = asyncio.create_task(borrow(provider(lender.url, wait=60)))
        await steps.until("a borrow", lambda: "borrow" in steps.met)
        await lender.submit({"api_url": "http://sandbox.test"})
        sandbox = await borrowing
        assert sandbox["item"] == {"api_url": "http://sandbox.test"}
        assert set(lender.borrowed) == {sandbox["borrow_token"]}
        assert lender.asked[0].keys() == {"borrow_id", "session_id", "run", "attempt"}


async def test_a_sandbox_is_returned_once_and_a_second_time_does_no_harm(parts: Production) -> None:
    made = provider(parts.allocator.url)
    first = await borrow(made)
    await made.release(first)
    second = await borrow(made)
    await made.release(first)  # refused: the token is of an earlier borrowing
    assert set(parts.allocator.borrowed) == {second["borrow_token"]}


async def test_a_sandbox_that_does_not_answer_is_returned_all_the_same(parts: Production) -> None:
    made = provider(parts.allocator.url)
    sandbox = await borrow(made)
    parts.steps.arm("exec", Fault((500, {})))
    await made.release(sandbox)
    assert not parts.allocator.borrowed


async def test_a_return_that_fails_in_the_background_is_an_error(parts: Production) -> None:
    made = provider(parts.allocator.url)
    sandbox = await borrow(made)
    parts.allocator.return_status = "failed"
    with pytest.raises(TransientError, match="return failed"):
        await made.release(sandbox)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((503, {"err": "busy", "msg": "nothing is free"}), HandBack),
        ((404, {"err": "none", "msg": "nothing is free"}), HandBack),
        ((400, {"err": "params", "msg": "bad"}), PermanentError),
        ((422, {"err": "params", "msg": "bad"}), PermanentError),
        ((403, {"err": "forbidden", "msg": "no"}), TransientError),
        ((500, {"err": "broken", "msg": "no"}), TransientError),
        ((502, {"err": "subscriber", "msg": "refused"}), TransientError),
        # Not the allocator's words: whoever said this may have cut off its answer.
        ((404, {"detail": "Not Found"}), OutcomeUnknown),
        ((504, "gateway timeout"), OutcomeUnknown),
        ((200, {"item": {}}), OutcomeUnknown),
        ((200, ["item"]), OutcomeUnknown),
    ],
)
async def test_answers_to_a_borrow(
    parts: Production, answer: tuple[int, Any], expected: type[Exception]
) -> None:
    parts.steps.arm("borrow", Fault(answer))
    with pytest.raises(expected) as caught:
        await borrow(provider(parts.allocator.url))
    assert type(caught.value) is expected


@pytest.mark.parametrize(
    "answer",
    [
        (500, {"err": "broken", "msg": "no"}),
        (403, {"err": "forbidden", "msg": "no"}),
        (404, {"detail": "Not Found"}),
        (200, "nonsense"),
    ],
)
async def test_a_return_that_was_not_taken_is_an_error(parts: Production, answer: tuple[int, Any]) -> None:
    made = provider(parts.allocator.url)
    sandbox = await borrow(made)
    parts.steps.arm("return", Fault(answer))
    with pytest.raises(TransientError):
        await made.release(sandbox)
    assert parts.allocator.borrowed


async def test_an_allocator_that_is_not_there_was_not_asked() -> None:
    with pytest.raises(TransientError) as caught:
        await borrow(provider("http://127.0.0.1:1"))
    assert not isinstance(caught.value, OutcomeUnknown)


async def test_a_borrow_that_is_cut_off_may_have_leaked() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(OutcomeUnknown, match="did not answer"):
            await borrow(provider(f"http://127.0.0.1:{port}"))


@asynccontextmanager
async def answering(head: str, body: bytes, *, times: int = 1, pause: float = 0) -> AsyncIterator[list[int]]:
    """A server that answers anything with this, `body` as often as it is read; its port, and bytes sent."""
    told = [0, 0]
    answers: list[asyncio.Task[None]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answers.append(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{head}\r\n".encode())
            for _ in range(times):
                writer.write(body)
                await writer.drain()
                told[1] += len(body)
                await asyncio.sleep(pause)
        writer.transport.abort()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        told[0] = server.sockets[0].getsockname()[1]
        yield told
        for task in answers:
            task.cancel()
        await asyncio.gather(*answers)


BOMB = gzip.compress(b'"' + bytes(100 * 2**20) + b'"')
GZIP = f"Content-Encoding: gzip\r\nContent-Length: {len(BOMB)}\r\n"
DEEP = b'{"success": true, "data": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"


@pytest.mark.parametrize(
    ("head", "body", "times", "pause"),
    [
        ("", b"x" * 2**20, 1000, 0),
        (GZIP, BOMB, 1, 0),
        ("", b" ", 100_000, 0.01),
        ("", DEEP, 1, 0),
    ],
    ids=["endless", "compressed", "dripping", "deep"],
)
async def test_an_answer_is_bounded_in_size_and_time(
    monkeypatch: pytest.MonkeyPatch, head: str, body: bytes, times: int, pause: float
) -> None:
    """Of a sandbox and of an allocator. What is compressed is not unpacked."""
    for module in (aio, allocator_module):
        monkeypatch.setattr(module, "_ANSWER", 1.0)
    monkeypatch.setattr(allocator_module, "_MARGIN", 1.0)
    async with answering(head, body, times=times, pause=pause) as told:
        url = f"http://127.0.0.1:{told[0]}"
        async with AioSandbox.connect({"api_url": url}) as client:
            with pytest.raises(TransientError):
                await client.write("x", b"y")
        with pytest.raises(OutcomeUnknown):
            await borrow(provider(url))
        with pytest.raises(TransientError):
            await provider(url).release({"item": None})
        assert told[1] < 4 * (LIMIT + 8 * 2**20)


async def test_arguments_reach_the_shell_as_they_are(client: AioSandbox) -> None:
    odd = "a b;\"$(touch x)`id`'\n*\\"
    assert await client.run("say", 'printf "%s|" "$@"', odd, "", "-n") == f"{odd}||-n|"


async def test_a_file_arrives_as_it_is(client: AioSandbox, parts: Production) -> None:
    content = bytes(range(256)) * 5000  # more than one request holds
    path = parts.sandboxes[0].home / "file"
    await client.write(str(path), content)
    assert path.read_bytes() == content
    with pytest.raises(TransientError, match="outside"):
        await client.write("/elsewhere", content)


async def test_an_exit_code_is_an_error_that_shows_what_was_said(client: AioSandbox) -> None:
    with pytest.raises(StepError, match="try it: exit code 3: no luck") as caught:
        await client.run("try it", "echo no luck; exit 3")
    assert caught.value.code == 3


async def test_a_failing_command_ends_its_script(client: AioSandbox) -> None:
    with pytest.raises(StepError):
        await client.run("try it", "false; echo went on")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, {"success": False, "message": "no shell", "data": None}), TransientError),
        ((200, {"success": True, "data": {"status": "hard_timeout", "exit_code": 0}}), TransientError),
        ((200, {"success": True, "data": {"status": "terminated", "exit_code": 0}}), TransientError),
        ((200, {"success": True, "data": {"status": "completed", "exit_code": None}}), TransientError),
        ((200, {"success": True, "data": {"status": "completed", "exit_code": 1}}), StepError),
        ((200, {"success": True}), TransientError),
        ((200, "done"), TransientError),
        ((500, {"success": True}), TransientError),
        ((404, {"success": True}), PermanentError),
        ((422, {"success": True}), PermanentError),
    ],
)
async def test_200_alone_proves_nothing(
    client: AioSandbox, parts: Production, answer: tuple[int, Any], expected: type[Exception]
) -> None:
    parts.steps.arm("exec", Fault(answer))
    with pytest.raises(expected):
        await client.run("try it", "true")


async def test_a_quiet_step_is_waited_for(client: AioSandbox, parts: Production, tmp_path: Path) -> None:
    parts.sandboxes[0].patience = 0.01
    gate = tmp_path / "gate"
    await client.run("make", 'mkfifo "$1"', str(gate))
    running = asyncio.create_task(client.run("wait", 'read line < "$1"; echo "$line"', str(gate)))
    await parts.steps.until(
        "the client to ask again", lambda: "view done" in parts.steps.met or "wait" in parts.steps.met
    )
    await asyncio.to_thread(gate.write_text, "at last\n")
    assert await running == "at last"


async def test_a_step_that_does_not_end_is_killed(client: AioSandbox, parts: Production) -> None:
    parts.sandboxes[0].patience = 0.01
    with pytest.raises(TransientError, match="sleep: not done within 1 seconds"):
        await client.run("sleep", "sleep 1000", timeout=1)
    assert "kill done" in parts.steps.met
    assert all(shell.terminated for shell in parts.sandboxes[0].shells.values())


async def test_a_step_is_killed_when_its_caller_is_cancelled(client: AioSandbox, parts: Production) -> None:
    running = asyncio.create_task(client.run("sleep", "sleep 1000"))
    await parts.steps.until("the step to start", lambda: bool(parts.sandboxes[0].commands))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert "kill done" in parts.steps.met
