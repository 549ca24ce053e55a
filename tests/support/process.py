"""Run a real process, such as `worker`, and wait for what its log says.

    async with running("worker", "--concurrency", "2", env={"DATABASE_URL": url}) as worker:
        parked = await worker.event("parked")
        ...
        claimed = await worker.event("claimed", after=parked, outbox_id=7)
        worker.send(signal.SIGTERM)
        assert await worker.ended() == 0

Events are the JSON lines on its stderr; all are kept, so one that came before it was asked for is
found. Nothing polls: a test sleeps on the pipe. The timeouts only bound a test that hangs.

Leaving the block fails if the process still runs and did not end by SIGTERM, or if anything it had
started lives on after it.
"""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from tests.support.waits import TIMEOUT

ROOT = Path(__file__).parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

MARK = "OUTWAKE_TEST_PROCESS"  # tells a process's descendants, also those in sessions of their own
LINE_LIMIT = 16 * 2**20  # bytes


class Event(dict[str, Any]):
    """One log line's fields, and where it stood in the log."""

    def __init__(self, fields: Mapping[str, Any], index: int) -> None:
        super().__init__(fields)
        self.index = index


class ProcessError(AssertionError):
    """The process did not do what the test waited for; the text ends with what it printed."""


class Process:
    """A running process. Made by `running`."""

    def __init__(self, process: subprocess.Popen[bytes], name: str, mark: str) -> None:
        self.pid = process.pid
        self.events: list[Event] = []
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._process = process
        self._name = name
        self._mark = mark
        self._news = asyncio.Event()  # a new one for each line
        self._descendants: set[psutil.Process] = set()
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self.stdout)),
            asyncio.create_task(self._read(process.stderr, self.stderr)),
        ]
        for reader in self._readers:
            reader.add_done_callback(lambda _: self._tell())
        self._exit = _exit_of(process)

    async def event(
        self, name: str, *, after: Event | None = None, timeout: float = TIMEOUT, **fields: Any
    ) -> Event:
        """The first event of that name with these fields, behind `after`, waiting until it comes.

        Raises ProcessError when the process ends without it.
        """
        wanted = {"event": name, **fields}
        position = 0 if after is None else after.index + 1
        try:
            async with asyncio.timeout(timeout):
                while True:
                    for event in self.events[position:]:
                        if wanted.items() <= event.items():
                            return event
                    position = len(self.events)
                    if self._readers[1].done():
                        raise self._error(f"ended without {wanted}")
                    await self._news.wait()
        except TimeoutError:
            raise self._error(f"did not say {wanted} in {timeout:.0f} s") from None

    async def says(self, what: str, condition: Callable[[], bool]) -> None:
        """Return when the condition holds; looked at after each line on its stdout or stderr."""
        try:
            async with asyncio.timeout(TIMEOUT):
                while not condition():
                    if self._readers[1].done():
                        raise self._error(f"ended without {what}")
                    await self._news.wait()
        except TimeoutError:
            raise self._error(f"waited {TIMEOUT:.0f} s for {what}") from None

    async def ended(self, *, timeout: float = TIMEOUT) -> int:
        """Wait until process and output have ended. The exit status, or minus the signal."""
        try:
            async with asyncio.timeout(timeout):
                await asyncio.wait(self._readers)
                return await asyncio.shield(self._exit)
        except TimeoutError:
            raise self._error(f"did not end in {timeout:.0f} s") from None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, after a note of whom the process has started."""
        self._note_descendants()
        self._process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    @property
    def running(self) -> bool:
        return not self._exit.done()

    async def close(self) -> None:
        """End the process and what it left behind. Raises ProcessError if that took force."""
        faults: list[str] = []
        if self.running:
            self.send(signal.SIGTERM)
            try:
                async with asyncio.timeout(TIMEOUT):
                    await asyncio.shield(self._exit)
            except TimeoutError:
                self.kill()
                faults.append("did not end by SIGTERM")
        await self._exit
        leaked = await asyncio.to_thread(self._end_leaked)
        faults += [f"left running: {line}" for line in leaked]
        ended, held = await asyncio.wait(self._readers, timeout=TIMEOUT)
        for reader in held:
            reader.cancel()
            faults.append("something that was not found still holds its output open")
        faults += [f"unreadable output: {reader.exception()}" for reader in ended if reader.exception()]
        if faults:
            raise self._error("; ".join(faults))

    async def _read(self, pipe: IO[bytes], lines: list[str]) -> None:
        stream = asyncio.StreamReader(limit=LINE_LIMIT)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), pipe
        )
        try:
            async for raw in stream:
                line = raw.decode(errors="replace").rstrip("\n")
                lines.append(line)
                if lines is self.stderr:
                    self._keep_event(line)
                self._tell()
        finally:
            transport.close()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _keep_event(self, line: str) -> None:
        with suppress(ValueError):
            fields = json.loads(line)
            if isinstance(fields, dict) and "event" in fields:
                self.events.append(Event(fields, len(self.events)))

    def _note_descendants(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self._descendants.update(psutil.Process(self.pid).children(recursive=True))

    def _end_leaked(self) -> list[str]:
        """Give descendants time, as they may just be ending. Kill and name those who don't."""
        _, alive = psutil.wait_procs(self._descendants | self._marked(), timeout=TIMEOUT / 2)
        leaked = []
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    leaked.append(f"{process.pid} {' '.join(process.cmdline())}")
                    process.kill()
        return leaked

    def _marked(self) -> set[psutil.Process]:
        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found.add(process)
        return found

    def _error(self, text: str) -> ProcessError:
        output = "\n".join([*self.stdout[-20:], *self.stderr[-40:]])
        return ProcessError(f"{self._name} {text}\n{output}")


def command_line(name: str) -> list[str]:
    """What runs a console script of ours as the script itself would; any other name as it is."""
    entry = SCRIPTS.get(name)
    if entry is None:
        return [name]
    module, _, function = entry.partition(":")
    code = f"import sys; from {module} import {function}; sys.argv[0] = {name!r}; sys.exit({function}())"
    return [sys.executable, "-c", code]


def _exit_of(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """The exit status to come. asyncio's own wait() would also wait for the pipes to close."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[int] = loop.create_future()

    def wait() -> None:
        status = process.wait()
        loop.call_soon_threadsafe(future.set_result, status)

    threading.Thread(target=wait, daemon=True).start()
    return future


@asynccontextmanager
async def running(
    command: str, *arguments: str | Path, env: Mapping[str, str | None] | None = None
) -> AsyncIterator[Process]:
    """Start one of pyproject.toml's console scripts, or any program by its path.

    It gets this process's environment, changed by `env`; None takes a variable out. The script is
    taken from this tree, wherever the environment's installed packages come from.
    """
    mark = secrets.token_hex(8)
    # A worker without its agent serves no session. Tests that run one name it.
    agent = {"OUTWAKE_AGENT_COMMAND": "true"}
    changes: dict[str, str | None] = {MARK: mark, "PYTHONPATH": str(ROOT), **agent, **(env or {})}
    environment = {name: value for name, value in {**os.environ, **changes}.items() if value is not None}
    child = subprocess.Popen(  # noqa: ASYNC220 - see _exit_of
        [*command_line(command), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    process = Process(child, command, mark)
    try:
        yield process
    finally:
        await process.close()
