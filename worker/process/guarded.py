"""A process that ends with its worker, because it runs under the guardian (`worker/process/guardian.py`).

Output is read from the pipe only on request, so a slow reader makes the process wait and does not fill our
memory. Only the end of stderr is kept.

The guardian runs as the same user as the process, which can therefore stop or kill it. So we do not rely on
the guardian alone:
1. Each message to the guardian is followed by SIGCONT.
2. If it does not report LATE seconds after the process should be gone, we kill the tree ourselves, and then
   the guardian.
3. If it ended without a report, we kill what it left. These processes are found by their process group, by
   their parents, and by MARK in their environment, which children inherit.
A process that changes its environment and kills its guardian is not found: that needs isolation.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

from outwake.telemetry.log import get_logger
from outwake.worker.errors import PermanentError, TransientError

STDERR_TAIL = 64 * 1024
CHUNK = 64 * 1024
MARK = "OUTWAKE_GUARDED"
"""The variable by which a process that lost its guardian is found."""
LATE = 12.0  # more than the guardian's GIVE_UP
KILL_AGAIN = 0.05
KILLS = 200  # times that we try

INHERITED = ("PATH", "HOME", "LANG", "TERM")

Cause = Literal["exited", "stop", "deadline", "worker", "signal", "timeout", "lost"]

_GUARDIAN = Path(__file__).with_name("guardian.py")
_LONGEST = 86_400.0  # seconds of a timer
_watchers: set[asyncio.Task["Exit"]] = set()  # the event loop holds tasks only weakly
_killing: set[asyncio.Task[None]] = set()

log = get_logger(__name__)


@dataclass(frozen=True)
class Exit:
    """How a guarded process ended.

    code: the exit status, or minus the number of the signal that ended it.
    cause: `exited` if the process ended by itself, `lost` if somebody killed the guardian, `timeout` if it
        ran longer than its timeout; otherwise a cause listed in `worker/process/guardian.py`.
    stderr: the last 64 KiB, without characters that Postgres refuses in text.
    left: how many of its processes outlived SIGKILL, nearly always 0.
    stopped: names of the processes that it had started and that had to be ended, ten at most.
    """

    code: int
    cause: Cause
    stderr: str
    left: int
    stopped: tuple[str, ...] = ()


class Guarded:
    """A running process; made by `Guarded.start`."""

    def __init__(self, process: Process, control: socket.socket, stdout: int, stderr: int, mark: str) -> None:
        self._process = process
        self._mark = mark
        self._late: asyncio.TimerHandle | None = None
        self._control = control
        self._stdout = stdout
        self._stderr = stderr
        self._tail = b""
        self._timed_out = False
        self._reader: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[int] = self._loop.create_future()  # the process id, or -errno
        self._loop.add_reader(stderr, self._take_stderr)
        self._watcher = asyncio.create_task(self._watch())
        _watchers.add(self._watcher)
        self._watcher.add_done_callback(_watchers.discard)
        self._watcher.add_done_callback(lambda _: self._wake())

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        deadline: float,
        notice: float = 0.0,
        grace: float = 5.0,
        timeout: float | None = None,
    ) -> AsyncIterator[Self]:
        """Run `argv` in `cwd`; on leaving, none of its processes is alive.

        env: added to an allow-list from our environment (PATH, HOME, LANG, TERM). Nothing else of our
            environment reaches the process.
        deadline: when the process must be gone unless `extend` is called before, on `time.monotonic()`'s
            clock. notice: seconds before it at which SIGTERM comes.
        grace: seconds from SIGTERM to SIGKILL, unless `stop` gives another value or the deadline comes first.
        timeout: seconds after which the process is ended, regardless of `extend`.

        Raises PermanentError if the command can't be run, TransientError if the system is short
        of processes, memory or files.
        """
        process = await cls._spawn(argv, cwd, env, (deadline, notice, grace))
        timer = process._loop.call_later(timeout, process._time_out, grace) if timeout else None
        try:
            await process._check_started(argv[0])
            yield process
        finally:
            if timer:
                timer.cancel()
            await process._close(grace)

    @classmethod
    async def _spawn(
        cls, argv: Sequence[str], cwd: Path, env: Mapping[str, str], times: tuple[float, float, float]
    ) -> Self:
        ours, theirs = socket.socketpair()
        stdout, stdout_end = os.pipe()
        stderr, stderr_end = os.pipe()
        mark = uuid4().hex
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_GUARDIAN), *map(repr, times)),
                *argv,
                cwd=cwd,
                env={**environment(env), MARK: mark},
                stdin=theirs.fileno(),
                stdout=stdout_end,
                stderr=stderr_end,
                start_new_session=True,  # the worker handles Ctrl-C at a terminal
            )
            ours.setblocking(False)
            os.set_blocking(stdout, False)
            os.set_blocking(stderr, False)
            return cls(process, ours, stdout, stderr, mark)
        except BaseException as error:
            ours.close()
            os.close(stdout)
            os.close(stderr)
            if isinstance(error, OSError | ValueError):
                raise _refusal(argv[0], error) from error
            raise
        finally:
            theirs.close()
            os.close(stdout_end)
            os.close(stderr_end)

    def extend(self, deadline: float) -> None:
        """Let the process run until `deadline`, on `time.monotonic()`'s clock."""
        self._tell(f"deadline {deadline!r}")

    def stop(self, grace: float) -> None:
        """Ask the process to end: SIGTERM now, SIGKILL `grace` seconds later. May be called again."""
        if self._watcher.done():
            return
        self._tell(f"stop {grace!r}")
        if self._late is not None:
            self._late.cancel()
        self._late = self._loop.call_later(min(grace, _LONGEST) + LATE, self._kill)

    async def read(self, timeout: float | None = None) -> bytes | None:
        """The next output, at most 64 KiB; b"" at its end; None if nothing comes within `timeout` seconds."""
        await asyncio.sleep(0)  # a process that prints without pause must not starve the loop
        while True:
            over = self._watcher.done()  # checked before the read: if true, the pipe already holds all output
            try:
                return os.read(self._stdout, CHUNK)
            except BlockingIOError:
                if over:
                    return b""
            if not await self._readable(timeout):
                return None

    async def wait(self) -> Exit:
        """How the process ended. Read the output to its end first, or a full pipe may block the process."""
        return await asyncio.shield(self._watcher)

    async def _readable(self, timeout: float | None) -> bool:
        """Whether there may be more to read; False after `timeout` seconds."""
        self._reader = self._loop.create_future()
        self._loop.add_reader(self._stdout, self._wake)
        try:
            async with asyncio.timeout(timeout):
                await self._reader
        except TimeoutError:
            return False
        finally:
            self._loop.remove_reader(self._stdout)
            self._reader = None
        return True

    def _wake(self) -> None:
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    def _tell(self, line: str) -> None:
        # The guardian may be gone, or too busy ending the process to read. It needs no more orders then.
        with contextlib.suppress(OSError):
            self._control.send(f"{line}\n".encode())
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGCONT)

    def _kill(self) -> None:
        """The guardian is late: end the tree without it."""
        log.warning("guardian_is_late", pid=self._process.pid)
        killing = asyncio.create_task(asyncio.to_thread(kill_tree, self._process.pid, self._mark))
        _killing.add(killing)
        killing.add_done_callback(_killing.discard)

    def _time_out(self, grace: float) -> None:
        self._timed_out = True
        self.stop(grace)

    async def _check_started(self, command: str) -> None:
        number = await asyncio.shield(self._started)
        if number < 0:
            raise _refusal(command, OSError(-number, os.strerror(-number)))

    async def _watch(self) -> Exit:
        """Follow the guardian until it ends."""
        report: list[bytes] = []
        try:
            async for word, *values in self._reports():
                if word == b"ended":
                    report = values
                elif not self._started.done():
                    self._started.set_result(int(values[0]) * (1 if word == b"started" else -1))
            await self._process.wait()
            if not report:
                await self._lose()
        finally:
            if self._late is not None:
                self._late.cancel()
            self._control.close()
            self._take_stderr()  # a pipe holds at most one chunk
            self._loop.remove_reader(self._stderr)
            os.close(self._stderr)
        stderr = self._tail.decode(errors="replace").replace("\0", "\ufffd")
        if not report:
            report = [str(-signal.SIGKILL).encode(), b"lost" if self._late is None else b"stop", b"0", b"-"]
        code, cause, left = int(report[0]), report[1].decode(), int(report[2])
        if self._timed_out and cause == "stop":
            cause = "timeout"
        names = () if report[3] == b"-" else tuple(report[3].decode().split(","))
        return Exit(code, cause, stderr, left, names)  # type: ignore[arg-type]

    async def _reports(self) -> AsyncIterator[list[bytes]]:
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := await self._loop.sock_recv(self._control, 4096):
                *lines, received = (received + data).split(b"\n")
                for line in lines:
                    yield line.split()

    async def _lose(self) -> None:
        """The guardian ended without a report: kill what it left."""
        if not self._started.done():
            self._started.set_exception(TransientError("the guardian ended before it began"))
            return
        if self._started.result() > 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._started.result(), signal.SIGKILL)
            await asyncio.to_thread(kill_marked, self._mark)

    def _take_stderr(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._stderr, CHUNK)
            self._tail = (self._tail + data)[-STDERR_TAIL:]
            if not data:
                self._loop.remove_reader(self._stderr)

    async def _close(self, grace: float) -> None:
        self.stop(grace)
        os.close(self._stdout)  # nobody reads any more, so the process must not hang on a full pipe
        try:
            await self.wait()
        except asyncio.CancelledError:
            # We may not wait. The guardian takes the closed socket for our death and ends the process.
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)
            raise


def kill_tree(guardian: int, mark: str) -> None:
    """Kill everything that a guardian guards, then the guardian itself. Blocks for up to ten seconds."""
    kill_marked(mark, but=guardian)
    with contextlib.suppress(ProcessLookupError):
        os.kill(guardian, signal.SIGKILL)
    kill_marked(mark)


def kill_marked(mark: str, but: int = 0) -> None:
    """Kill the processes that have this MARK, and all below them, until none is left. Linux only."""
    for _ in range(KILLS if sys.platform == "linux" else 0):
        members = _marked(f"{MARK}={mark}".encode()) - {but}
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(KILL_AGAIN)


def _marked(wanted: bytes) -> set[int]:
    """The live processes with that variable, and those below them."""
    found: set[int] = set()
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            stat = (path / "stat").read_bytes()
            state, parent = stat[stat.rindex(b")") + 2 :].split()[:2]
            if state in (b"Z", b"X"):
                continue
            pid = int(path.name)
            parents[pid] = int(parent)
            if wanted in (path / "environ").read_bytes().split(b"\0"):
                found.add(pid)
    level = found
    while level := {pid for pid, parent in parents.items() if parent in level} - found:
        found |= level
    return found


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a guarded process: an allow-list, then `given`. It holds none of our secrets."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {"PATH": os.defpath, **inherited, **given}


def _refusal(command: str, error: OSError | ValueError) -> PermanentError | TransientError:
    short = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
    reason = error.strerror if isinstance(error, OSError) else str(error)
    kind = TransientError if getattr(error, "errno", None) in short else PermanentError
    return kind(f"cannot run {Path(command).name}: {reason}")
