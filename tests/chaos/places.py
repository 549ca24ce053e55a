"""The workers under test: each place has a proxy of its own, and a worker that is replaced when it ends."""

import asyncio
import os
import secrets
import signal
import subprocess
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil

from tests.chaos.handlers import HANDLERS
from tests.chaos.history import History
from tests.support.process import ROOT
from tests.support.proxy import Proxy


def install_handlers(directory: Path) -> None:
    """Make the handlers findable, and only those: a distribution that hides the installed one.

    importlib.metadata takes the first of a name on the path.
    """
    info = directory / f"outwake-{version('outwake')}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: outwake\nVersion: {version('outwake')}\n")
    lines = [f"{handler.topic} = tests.chaos.handlers:{name}" for name, handler in HANDLERS.items()]
    (info / "entry_points.txt").write_text("\n".join(["[outwake.handlers]", *lines, ""]))


class Place:
    """Where one worker runs, or the API, and its successor after it."""

    def __init__(
        self,
        name: str,
        command: list[str],
        proxy: Proxy,
        environment: Mapping[str, str],
        history: History,
        log: Path,
    ) -> None:
        self.name = name
        self.proxy = proxy
        self.lives = 0
        self.statuses: list[int] = []
        """Exit statuses of those that were drained."""
        self._command = command
        self._environment = {**os.environ, **environment, "CHAOS_PLACE": name}
        self._history = history
        self._log = log
        self._current: asyncio.subprocess.Process | None = None
        self._old: set[asyncio.Task[None]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._ending = False
        self._changing = asyncio.Lock()
        """A death and a replacement at once must not leave two workers."""

    async def start(self) -> None:
        """Start the first worker and keep one alive from then on."""
        self._current = await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def _spawn(self) -> asyncio.subprocess.Process:
        self.lives += 1
        with self._log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def _keep(self) -> None:
        while not self._ending:
            process = self._current
            assert process is not None
            status = await process.wait()
            async with self._changing:
                if self._current is process and not self._ending:
                    if status >= 0:
                        self._history.tell("exit", place=self.name, pid=process.pid, status=status)
                    await asyncio.sleep(0.05)
                    self._current = await self._spawn()

    def pids(self) -> list[int]:
        """The processes that serve here: the worker, or the parent and its children."""
        if self._current is None or self._current.returncode is not None:
            return []
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._current.pid)
            return [process.pid, *(child.pid for child in process.children())]
        return []

    def last_words(self, lines: int = 8) -> str:
        """The end of its log."""
        with self._log.open(errors="replace") as log:
            return "".join(deque(log, lines))

    def kill(self, pid: int) -> None:
        """SIGKILL one of them; the history learns of it first."""
        self._history.tell("died", pid=pid, place=self.name)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    async def replace(self, *, hasten: float | None = None) -> None:
        """A rolling restart: start the successor, drain the old one; a second SIGTERM after `hasten` s."""
        async with self._changing:
            old = self._current
            assert old is not None
            self._current = await self._spawn()
        # The keeper still waits for the old one; it then finds the new one.
        task = asyncio.create_task(self._drain(old, hasten))
        self._old.add(task)
        task.add_done_callback(self._old.discard)

    async def _drain(self, process: asyncio.subprocess.Process, hasten: float | None) -> None:
        _terminate(process)
        if hasten is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(hasten):
                    await process.wait()
            _terminate(process)
        self.statuses.append(await process.wait())

    async def old_ended(self, seconds: float) -> bool:
        """Wait for those that drain. Whether all have ended in that time."""
        if not self._old:
            return True
        _, late = await asyncio.wait(self._old, timeout=seconds)
        return not late

    async def end(self, seconds: float) -> int | None:
        """Drain the last one. Its exit status, None if it had to be killed."""
        self._ending = True
        process = self._current
        assert process is not None
        _terminate(process)
        try:
            async with asyncio.timeout(seconds):
                return await process.wait()
        except TimeoutError:
            return None

    async def close(self) -> None:
        """End whatever is left, by force."""
        self._ending = True
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._keeper is not None:
            self._keeper.cancel()
        for task in self._old:
            task.cancel()
        await asyncio.gather(*self._old, return_exceptions=True)


def mark() -> dict[str, str]:
    """Environment by which the runner finds a run's processes again, should any be left."""
    return {"CHAOS_RUN": secrets.token_hex(8), "PYTHONPATH": str(ROOT)}


def _terminate(process: asyncio.subprocess.Process) -> None:
    """By os.kill: `terminate` would reap a process that has just ended, and asyncio would say status 255."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
