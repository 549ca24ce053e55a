"""The `worker` command with an observer beside its event loop: python -m tests.support.observed_loop

A thread asks the loop to run a callback, again and again, and measures how long that takes. It prints each
new maximum as the event `stalled`, in milliseconds. The time for which our threads were ready to run, and the
system ran others, does not count: it tells of other work on the machine.
"""

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from outwake.worker import cli

PAUSE = 0.002


def _waited_for_a_core() -> float:
    """Seconds that our threads were ready to run and did not."""
    total = 0
    for path in Path("/proc/self/task").iterdir():
        try:
            total += int((path / "schedstat").read_text().split()[1])
        except OSError:  # the thread has ended
            continue
    return total / 1e9


def _observe(loop: asyncio.AbstractEventLoop) -> None:
    longest = 0.0
    while True:
        answered = threading.Event()
        began, not_run = time.monotonic(), _waited_for_a_core()
        try:
            loop.call_soon_threadsafe(answered.set)
        except RuntimeError:  # the loop has ended
            return
        while True:
            over = answered.wait(1)
            stalled = time.monotonic() - began - max(0.0, _waited_for_a_core() - not_run)
            if stalled > longest:
                longest = stalled
                line = json.dumps({"event": "stalled", "ms": round(1000 * stalled, 1)})
                print(line, file=sys.stderr, flush=True)
            if over:
                break
        time.sleep(PAUSE)


_work = cli._work


async def _observed(*arguments: Any) -> None:
    threading.Thread(target=_observe, args=(asyncio.get_running_loop(),), daemon=True).start()
    await _work(*arguments)


if __name__ == "__main__":
    vars(cli)["_work"] = _observed
    cli.main()
