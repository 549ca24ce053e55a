"""What every contestant's script does, whatever library it drives.

    SCRIPT setup | fill N | work VARIANT | produce | flood CLIENTS SECONDS

`work` runs a worker until SIGTERM and tells on stdout: `first NS` when a handler starts after none has for
QUIET, or, if BENCH_TELL is set, `start NS` for each. `produce` enqueues a job for each line of stdin and
tells `committed NS`. `flood` enqueues as fast as so many clients can, and tells how many a second.
All times are of the machine's monotonic clock, so that those of two processes can be compared.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable

URL = os.environ.get("DATABASE_URL", "")
QUIET = 100_000_000  # nanoseconds
_TELL = "BENCH_TELL" in os.environ
_last = 0


def mark() -> None:
    """A handler has started."""
    global _last
    now = time.monotonic_ns()
    if _TELL:
        _tell("start", now)
    elif now > _last + QUIET:
        _tell("first", now)
    _last = now


def _tell(what: str, now: int) -> None:
    """In one write: the processes under one parent share its stdout."""
    sys.stdout.write(f"{what} {now}\n")
    sys.stdout.flush()


CLIENTS = int(sys.argv[2]) if sys.argv[1:2] and sys.argv[1].startswith("flood") else 1
"""Connections that `produce` needs."""


async def produce(one: Callable[[], Awaitable[object]]) -> None:
    """Enqueue and commit a job for each line of stdin, or flood."""
    if sys.argv[1].startswith("flood"):
        print(await _flood(one, float(sys.argv[3])))
        return
    while await asyncio.to_thread(sys.stdin.readline):
        await one()
        _tell("committed", time.monotonic_ns())


async def _flood(one: Callable[[], Awaitable[object]], seconds: float) -> float:
    done = 0
    # Each connection loads and plans what it needs: 1 ms and more, of a burst's few hundred inserts.
    for _ in range(2):
        await asyncio.gather(*(one() for _ in range(CLIENTS)))
    started = time.monotonic()

    async def client() -> None:
        nonlocal done
        while time.monotonic() < started + seconds:
            await one()
            done += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done / (time.monotonic() - started)


async def stopped() -> None:
    """Wait for SIGTERM."""
    event = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, event.set)
    await event.wait()


def main(
    setup: Callable[[], Awaitable[object]],
    fill: Callable[[int], Awaitable[object]],
    work: Callable[[str], Awaitable[object]],
    enqueue: Callable[[], Awaitable[object]],
) -> None:
    """Do what the command line says."""
    match sys.argv[1:]:
        case ["setup"]:
            asyncio.run(_ignore(setup()))
        case ["fill", n]:
            asyncio.run(_ignore(fill(int(n))))
        case ["work", variant]:
            asyncio.run(_ignore(work(variant)))
        case ["produce"] | ["flood" | "flood-plain", _, _]:
            asyncio.run(_ignore(enqueue()))
        case _:
            sys.exit(__doc__)


async def _ignore(awaitable: Awaitable[object]) -> None:
    await awaitable
