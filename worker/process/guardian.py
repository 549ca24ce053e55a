"""The guardian: a small process that ends an agent when its worker can't.

`worker/process/guarded.py` runs it as `python -I -S guardian.py DEADLINE NOTICE GRACE COMMAND [ARGUMENT...]`,
with one end of a socket pair as stdin. It imports only small modules so that it starts in milliseconds.

The protocol:
1. On Linux the guardian becomes a child subreaper: orphans of its tree become its children. So it still finds
   a grandchild that left the group and the session. It then starts the command in a session and process group
   of its own, with stdin from /dev/null, and reports `started PID` or `failed ERRNO`. If the guardian is
   killed, the kernel kills the command (Linux) and the worker kills the group.
2. The worker may send `deadline T`: it holds its lease until T, and nothing of the tree may be alive then. T
   is absolute, on the monotonic clock that all processes of a host share. So a message that is read late does
   not lengthen the lease.
3. The guardian ends the tree when the first of these happens, and reports that cause:
   - `exited`: the command ended; the processes it left behind are ended too.
   - `stop`: the worker sent `stop GRACE` (cancel, timeout, drain).
   - `deadline`: NOTICE seconds are left until the last T: the worker hangs, is stopped, or lost its lease.
   - `worker`: the socket closed: the worker died, possibly by SIGKILL. A process forked off the worker may
     hold the socket open; the deadline covers that case.
   - `signal`: somebody sent the guardian SIGTERM, SIGINT or SIGHUP.
4. To end the tree, the guardian sends SIGTERM to all of it. After GRACE seconds, or at T if that comes first,
   it sends SIGKILL, and repeats it until nothing is left, because a process may fork while it is counted. No
   later message lengthens the grace. A new `stop` or the loss of the worker may shorten it.
5. The guardian reports `ended CODE CAUSE LEFT NAMES` when no child is left. CODE is the command's exit
   status, or minus the signal that ended it. LEFT counts processes that outlived SIGKILL for 10 seconds,
   because they hang in the kernel or run as another user; it is 0 otherwise. NAMES are those of the
   processes, apart from the command itself, that lived when the guardian began to end the tree, with commas
   between them, or `-`.
6. A process that runs as the same user can stop the guardian. The worker continues it with each message, and
   kills the tree itself if no report comes. If the worker dies, the kernel continues the guardian (Linux).
"""

import contextlib
import ctypes
import math
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_AGAIN = 0.05
GIVE_UP = 10.0
NAMES = 10
LINUX = sys.platform == "linux"
CONTROL, STDOUT = 0, 1


class Guardian:
    def __init__(self, deadline: float, notice: float, grace: float) -> None:
        self.deadline = deadline
        self.notice = notice
        self.grace = grace
        self.pid = 0
        self.code: int | None = None
        self.cause: str | None = None
        self.kill_at = math.inf
        self.give_up_at = math.inf
        self.names: list[str] = []
        self._received = b""

    def run(self, command: list[str]) -> None:
        wake, wake_end = os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(wake_end, False)
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        try:
            self.pid = spawn(command)
        except OSError as error:
            say(f"failed {error.errno}")
            return
        # The worker reads the output to its end, so we must not hold the pipe open.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        say(f"started {self.pid}")
        poll = select.poll()
        poll.register(CONTROL, select.POLLIN)
        poll.register(wake, select.POLLIN)
        try:
            while self.advance():
                for fd, _ in poll.poll(self.pause()):
                    if fd == wake:
                        if set(os.read(wake, 4096)) - {signal.SIGCHLD}:
                            self.end("signal", self.grace)
                    elif not self.listen():
                        poll.unregister(CONTROL)
        except BaseException:
            self.kill(signal.SIGKILL)
            raise
        code = -signal.SIGKILL if self.code is None else self.code
        say(f"ended {int(code)} {self.cause or 'exited'} {len(self.members())} {','.join(self.names) or '-'}")

    def advance(self) -> bool:
        """Do what is due; return whether there is still something to wait for."""
        if not self.reap():
            return False
        now = time.monotonic()
        if self.code is not None:
            self.end("exited", self.grace)
        if now >= self.deadline - self.notice:
            self.end("deadline", self.grace)
        if now >= self.kill_at:
            if now >= self.give_up_at:
                return False
            self.give_up_at = min(self.give_up_at, now + GIVE_UP)
            self.kill(signal.SIGKILL)
            self.kill_at = now + KILL_AGAIN
        return True

    def pause(self) -> float | None:
        """Milliseconds until something is due; None without a deadline."""
        due = self.deadline - self.notice if self.cause is None else self.kill_at
        if due == math.inf:
            return None
        return math.ceil(min(max(due - time.monotonic(), 0), 86_400) * 1000)

    def listen(self) -> bool:
        """Obey the worker; return False once it is gone."""
        try:
            data = os.read(CONTROL, 4096)
        except ConnectionResetError:  # the worker died before it read all our messages
            data = b""
        if not data:
            self.end("worker", self.grace)
            return False
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            word, value = line.split()
            if word == b"deadline":
                self.deadline = float(value)
            else:
                self.end("stop", float(value))
        return True

    def end(self, cause: str, grace: float) -> None:
        """Begin to end the tree. If that has begun already, only shorten the grace."""
        if self.cause is None:
            self.cause = cause
            self.names = self.others()
            self.kill(signal.SIGTERM)
            self.kill(signal.SIGCONT)  # a stopped process takes no SIGTERM
        if cause in ("exited", "deadline"):  # both stay true, so only the first time counts
            grace = grace if self.kill_at == math.inf else math.inf
        now = time.monotonic()
        self.kill_at = min(self.kill_at, now + grace, max(self.deadline, now))

    def reap(self) -> bool:
        """Reap dead children, including adopted orphans; return whether any child is left."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == self.pid:
                    self.code = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            # On systems without a subreaper the group may live on without its leader.
            return not LINUX and self.group_lives()

    def kill(self, number: int) -> None:
        members = self.members()
        # One call signals the whole group, so no member escapes by forking while we loop.
        if self.pid in members.values() or (not LINUX and self.group_lives()):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
        for pid, group in members.items():
            if group != self.pid:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)

    def members(self) -> dict[int, int]:
        """The live processes below us, each with its process group; empty on systems without /proc."""
        parents, groups = {}, {}
        for name in os.listdir("/proc") if LINUX else ():
            if not name.isdigit():
                continue
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    stat = file.read()
                # The command's name comes first, in parentheses, and may hold any character.
                state, parent, group = stat[stat.rindex(b")") + 2 :].split()[:3]
                parents[int(name)] = int(parent)
                if state not in (b"Z", b"X"):
                    groups[int(name)] = int(group)
        below: set[int] = set()
        level = {os.getpid()}
        while level := {pid for pid, parent in parents.items() if parent in level} - below:
            below |= level
        return {pid: groups[pid] for pid in below if pid in groups}

    def others(self) -> list[str]:
        """The names of the live processes below us, apart from the command: each once, NAMES at most."""
        names = set()
        for pid in self.members().keys() - {self.pid}:
            with contextlib.suppress(OSError):
                with open(f"/proc/{pid}/comm", "rb") as file:
                    name = file.read(32).strip().decode("ascii", "replace")
                names.add("".join(c if c.isalnum() or c in "._+-" else "?" for c in name) or "?")
        return sorted(names)[:NAMES]

    def group_lives(self) -> bool:
        try:
            os.killpg(self.pid, 0)
        except (ProcessLookupError, PermissionError):  # macOS raises the latter for zombies
            return False
        return True


def spawn(command: list[str]) -> int:
    """Start `command` as leader of a new session. Raises OSError if it can't be executed."""
    guardian = os.getpid()
    failure, failure_end = os.pipe()  # a successful exec closes it
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != guardian:
                os._exit(1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), CONTROL)
            # Exec resets handlers, but it keeps ignored and blocked signals.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            os.execvp(command[0], command)  # noqa: S606 - we want no shell
        except OSError as error:
            os.write(failure_end, str(error.errno).encode())
        finally:
            os._exit(127)
    os.close(failure_end)
    errno = os.read(failure, 16)
    os.close(failure)
    if errno:
        raise OSError(int(errno), os.strerror(int(errno)))
    return pid


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # the worker does not listen any more
        os.write(CONTROL, f"{line}\n".encode())


def prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    # Some event loops leave copies of our socket and pipes open, which would hide that the others closed.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    Guardian(*map(float, sys.argv[1:4])).run(sys.argv[4:])
