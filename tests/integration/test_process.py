"""The helper that other tests trust: it must notice what it is there to notice."""

import os
import signal
import sys
from textwrap import dedent

import pytest

from tests.support.process import ProcessError, running

PRELUDE = """
import json, os, signal, subprocess, sys, time
def say(event, **fields):
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)
def until_term():
    signal.sigwait({signal.SIGTERM})
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
"""


def script(body: str) -> list[str]:
    return ["-c", PRELUDE + dedent(body)]


async def test_event_is_found_by_name_and_fields_and_in_order() -> None:
    body = """
        print("plain text", file=sys.stderr)
        say("claimed", id=1); say("claimed", id=2); say("claimed", id=1, again=True)
        until_term()
    """
    async with running(sys.executable, *script(body)) as process:
        second = await process.event("claimed", id=2)
        assert second.index == 1
        assert (await process.event("claimed", id=1)).index == 0
        assert (await process.event("claimed", after=second))["again"] is True
        process.send(signal.SIGTERM)
        assert await process.ended() == 0
        assert process.stderr[0] == "plain text"


async def test_event_fails_at_once_when_the_process_ends_without_it() -> None:
    async with running(sys.executable, *script("sys.exit('gave up')")) as process:
        with pytest.raises(ProcessError, match=r"ended without(.|\n)*gave up"):
            await process.event("parked")
        assert await process.ended() == 1


async def test_event_fails_when_it_does_not_come() -> None:
    async with running(sys.executable, *script("until_term()")) as process:
        with pytest.raises(ProcessError, match="did not say"):
            await process.event("parked", timeout=0.01)


async def test_killed_process_reports_the_signal() -> None:
    async with running(sys.executable, *script("say('up'); until_term()")) as process:
        await process.event("up")
        process.kill()
        assert await process.ended() == -signal.SIGKILL


async def test_an_unfindable_child_that_holds_the_output_is_a_leak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is in no tree of the process, which has ended, and bears no mark."""
    monkeypatch.setattr("tests.support.process.TIMEOUT", 1.0)
    body = """
        child = subprocess.Popen(["/bin/sleep", "600"], start_new_session=True, env={})
        say("up", child=child.pid)
        os._exit(0)
    """
    children: list[int] = []

    async def leave_a_child() -> None:
        async with running(sys.executable, *script(body)) as process:
            children.append((await process.event("up"))["child"])
            await process._exit

    with pytest.raises(ProcessError, match="holds its output open"):
        await leave_a_child()
    os.kill(children[0], signal.SIGKILL)


@pytest.mark.parametrize("start", ["session", "environment"])
async def test_child_that_outlives_the_process_is_a_leak(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the tree before a signal, or by the mark in its environment after an exit."""
    monkeypatch.setattr("tests.support.process.TIMEOUT", 1.0)
    options = "start_new_session=True" + (", env={}" if start == "session" else "")
    body = f"""
        child = subprocess.Popen(["/bin/sleep", "600"], stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL, {options})
        say("up")
        {"until_term()" if start == "session" else ""}
    """
    with pytest.raises(ProcessError, match=r"left running: \d+ /bin/sleep 600"):
        async with running(sys.executable, *script(body)) as process:
            await process.event("up")
