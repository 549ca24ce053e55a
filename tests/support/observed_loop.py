"""The commands `worker` and `api` with an observer beside their event loop.

    python -m tests.support.observed_loop worker|api [ARGUMENTS]

A thread asks the loop to run a callback, again and again. A stall is the CPU that the loop's thread used
until it answered, and that other threads used while it waited for the interpreter. Time that the system gave
to other processes does not count. Each new longest stall is printed as the event `stalled`, in milliseconds;
`at` is where the loop was meanwhile, if it could be seen.
"""

import asyncio
import json
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

PAUSE = 0.002
LOOK = 0.03  # seconds after which the observer looks where the loop is


class _Moment(NamedTuple):
    """All in seconds. `cpu` and `ready` are of one thread, `process` of all."""

    wall: float
    cpu: float
    ready: float
    """How long it was ready to run and did not, because the system ran others."""
    process: float

    def kept_since(self, other: "_Moment") -> float:
        """How long the thread worked, or waited while other threads of the process worked."""
        wall, cpu, ready, process = (now - then for now, then in zip(self, other, strict=True))
        return cpu + max(0.0, min(wall - cpu - ready, process - cpu))


class Observer(threading.Thread):
    """Made by the loop's own thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(daemon=True)
        self._loop = loop
        self._watched = threading.get_ident(), threading.get_native_id()
        self.longest = 0.0  # seconds

    def run(self) -> None:
        own = threading.get_ident(), threading.get_native_id()
        before = _now(*own)
        while True:
            time.sleep(PAUSE)
            # A thread that keeps the interpreter from the loop keeps it from us as well.
            began = _now(*self._watched)
            self._note(_now(*own).kept_since(before) - PAUSE, [])
            answers: list[_Moment] = []
            answered = threading.Event()
            try:
                self._loop.call_soon_threadsafe(self._answer, answers, answered)
            except RuntimeError:  # the loop has ended
                return
            places: list[str] = []
            while not answered.wait(LOOK):
                places = self._places() or places
                self._note(_now(*self._watched).kept_since(began), places)
            self._note(answers[0].kept_since(began), places)
            before = _now(*own)

    def _answer(self, answers: list[_Moment], answered: threading.Event) -> None:
        answers.append(_now(*self._watched))
        answered.set()

    def _places(self) -> list[str]:
        frame = sys._current_frames().get(self._watched[0])
        return [f"{one.filename}:{one.lineno}" for one in traceback.extract_stack(frame)[-6:]]

    def _note(self, stalled: float, places: list[str]) -> None:
        if stalled > self.longest:
            self.longest = stalled
            line = {"event": "stalled", "ms": round(1000 * stalled, 1), "at": places}
            print(json.dumps(line), file=sys.stderr, flush=True)


def _now(thread: int, number: int) -> _Moment:
    """thread: as Python names it. number: as the system does."""
    cpu = time.clock_gettime(time.pthread_getcpuclockid(thread))
    ready = int(Path(f"/proc/self/task/{number}/schedstat").read_text().split()[1]) / 1e9
    return _Moment(time.monotonic(), cpu, ready, time.process_time())


def _observe_worker() -> None:
    from outwake.worker import cli

    work = cli._work

    async def observed(*arguments: Any) -> None:
        Observer(asyncio.get_running_loop()).start()
        await work(*arguments)

    vars(cli)["_work"] = observed
    cli.main()


def _observe_api() -> None:
    from outwake.app import main as api
    from outwake.cli import main

    class Server(api.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            Observer(asyncio.get_running_loop()).start()

    vars(api)["Server"] = Server
    main(["api"])


if __name__ == "__main__":
    command = sys.argv.pop(1)
    {"worker": _observe_worker, "api": _observe_api}[command]()
