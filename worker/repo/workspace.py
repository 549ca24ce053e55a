"""A turn's clone of the repository, in a sandbox of any kind. Shell steps make it and read it.

    $OUTWAKE_HOME/repo              the clone, with the work branch checked out
    $OUTWAKE_HOME/git-credentials   mode 600, present only while a step needs it

How the work of one turn reaches the next:
1. Clone the repository, unless an earlier turn left its clone in this sandbox. Start from the commits stored
   with the session. If the repository's own work branch contains those commits, start from that branch. If
   no commits are stored, start from the repository's work branch, or else from the target branch.
2. The agent works. The sandbox holds no credentials during this time.
3. `save` commits what the agent left uncommitted. If pushing is enabled, it pushes the branch, on condition
   that the repository still has the commit seen in step 1. If the branch was not pushed, `save` returns the
   commits as a Git bundle, which is stored with the session in the transaction that ends the turn. So no work
   is lost with its sandbox or its host, and an attempt that lost its lease stores nothing.
"""

import asyncio
import base64
import binascii
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from outwake.telemetry.log import get_logger
from outwake.worker.errors import PermanentError, SessionError, TransientError
from outwake.worker.repo import steps
from outwake.worker.repo.git import explain
from outwake.worker.sandboxes.base import Sandbox, StepError

COMMITS = 1000
BUNDLE_LIMIT = 16 * 2**20
AUTHOR = ("user.name=Outwake agent", "user.email=agent@outwake.invalid")
_CHUNK = 96 * 1024  # bytes of a bundle printed by one step
_PUSH_AGAIN = (1.0, 5.0)
_FORGET_TIMEOUT = 10.0  # seconds; used when something has already gone wrong

log = get_logger(__name__)


@dataclass(frozen=True)
class Commit:
    sha: str
    subject: str


@dataclass(frozen=True)
class Remote:
    """The repository as a sandbox reaches it. url: accepted by `outwake/session/names.py`."""

    url: str
    push: bool = False
    allow_file: bool = False
    credentials: bytes | None = field(default=None, repr=False)

    @property
    def transports(self) -> str:
        """The transports that git may use for this repository."""
        return "https:ssh:file" if self.allow_file else "https:ssh"

    @asynccontextmanager
    async def credentials_in(self, sandbox: Sandbox, path: str) -> AsyncIterator[None]:
        """Put the credentials into the sandbox, in a file of mode 600; remove the file on leaving.

        If this process dies, the file stays until the sandbox is swept, before its next use or its return.
        """
        if self.credentials is None:
            yield
            return
        # The directory is closed to other users, whatever mode the sandbox gives a new file.
        await sandbox.write(f"{path.rpartition('/')[0]}/git-credentials", self.credentials)
        try:
            yield
        except BaseException:
            with suppress(SessionError, StepError):
                script = steps.GIT + steps.FORGET
                await sandbox.run("remove the credentials", script, timeout=_FORGET_TIMEOUT)
            raise
        await _run(sandbox, "remove the credentials", steps.FORGET)


@dataclass
class Workspace:
    """The clone in a sandbox, made by `open_workspace`.

    path: the work tree in the sandbox. branch: the work branch, checked out. base: the commit from which
    the branch started in this attempt.
    bundle, problem: set by `save`: the commits that only we have, and why the branch was not pushed.
    """

    path: str
    branch: str
    base: str
    _sandbox: Sandbox
    _remote: Remote
    _known: str  # the repository's commit of the work branch at the start, empty if it had none
    _target: str
    bundle: bytes | None = None
    problem: str | None = None

    async def commits(self) -> list[Commit]:
        """The work branch's commits since `base`, oldest first; the last 1,000 at most."""
        lines = await self._run("list the commits", steps.LOG, str(COMMITS), self.base, self.branch)
        marked = (line.partition(" ") for line in lines.split("\n"))
        return [Commit(*rest.partition(" ")[::2]) for mark, _, rest in marked if mark == "="]

    async def save(self) -> str:
        """Save the work for the session's next turn and return the work branch's commit.

        Raises SessionError if the work can't be saved.
        """
        arguments = (self.branch, self._known, self._target)
        head, ours = _pair(await self._run("save the work branch", steps.SAVE, *arguments))
        if ours and not (self._remote.push and await self._push()):
            self.bundle = await self._read_bundle()
        return head

    async def _push(self) -> bool:
        """Whether the branch was pushed; else `problem` says why. A failed push does not repeat the turn."""
        remote = self._remote
        for pause in (*_PUSH_AGAIN, None):
            try:
                async with remote.credentials_in(self._sandbox, self.path):
                    arguments = (remote.transports, remote.url, self.branch, self._known)
                    await self._sandbox.run("push", steps.GIT + steps.PUSH, *arguments)
                log.info("pushed", branch=self.branch)
                return True
            except StepError as error:
                moved = "stale info" in error.output
                explained = explain(error, "the work branch was not pushed")
                if moved or pause is None or isinstance(explained, PermanentError):
                    self.problem = (
                        "the work branch was not pushed: somebody else has moved it"
                        if moved
                        else str(explained)
                    )
                    log.warning("push_failed", reason=self.problem)
                    return False
                await asyncio.sleep(pause)
        return False

    async def _read_bundle(self) -> bytes:
        digest, told = _pair(await self._run("save the work branch", steps.BUNDLE, self.branch))
        size = int(told) if told.isdigit() else 0
        if size > BUNDLE_LIMIT:
            raise PermanentError(f"the turn's commits are over {BUNDLE_LIMIT >> 20} MiB: they must be pushed")
        content = bytearray()
        while len(content) < size:
            arguments = (str(len(content) + 1), str(_CHUNK))
            try:
                chunk = base64.b64decode(await self._run("read the commits", steps.READ, *arguments))
            except binascii.Error:
                chunk = b""
            if not chunk:
                break
            content += chunk
        if hashlib.sha256(content).hexdigest() != digest:
            raise TransientError("the commits could not be read from the sandbox")
        return bytes(content)

    async def _run(self, step: str, script: str, *arguments: str) -> str:
        return await _run(self._sandbox, step, script, *arguments)


async def open_workspace(
    sandbox: Sandbox,
    remote: Remote,
    *,
    target_branch: str,
    branch: str,
    bundle: bytes | None,
    used: bool,
) -> Workspace:
    """Clone the repository in the sandbox and check out the work branch.

    bundle: the commits stored by the session's last turn. used: whether that turn's clone is still there.

    Raises PermanentError (no such repository or branch, an empty repository, no access) or TransientError
    (the network, the sandbox, a full disk, a timeout).
    """
    home = await _run(sandbox, "prepare the sandbox", steps.PREPARE, "used" if used else "new")
    path = f"{home.splitlines()[-1] if home else ''}/repo"
    if not path.startswith("/"):
        raise TransientError("the sandbox did not say where its home is")
    if used:
        head, known = _pair(await _run(sandbox, "find the work branch", steps.REUSE, branch))
        return Workspace(path, branch, head, sandbox, remote, known, target_branch)
    await _clone(sandbox, remote, path)
    if bundle is not None:
        await sandbox.write(f"{path.rpartition('/')[0]}/work.bundle", bundle)
    try:
        stored = "bundle" if bundle is not None else ""
        start = await sandbox.run("check out", steps.GIT + steps.START, target_branch, branch, stored)
    except StepError as error:
        match error.code:
            case 65:
                raise PermanentError(f"the repository has no branch {target_branch}") from error
            case 66:
                raise PermanentError("the repository is empty: it has no branch to start from") from error
        raise explain(error, f"cannot check out {branch}") from error
    base, known = _pair(start)
    return Workspace(path, branch, base, sandbox, remote, known, target_branch)


async def _clone(sandbox: Sandbox, remote: Remote, path: str) -> None:
    settings = [part for setting in AUTHOR for part in ("--config", setting)]
    try:
        async with remote.credentials_in(sandbox, path):
            await sandbox.run("clone", steps.GIT + steps.CLONE, remote.transports, remote.url, *settings)
    except StepError as error:
        raise explain(error, "cannot clone the repository") from error


def _pair(output: str) -> tuple[str, str]:
    """The two words of the last line; the second may be empty. stderr's text may come before that line."""
    first, _, second = output.rpartition("\n")[2].partition(" ")
    if not re.fullmatch("[0-9a-f]{40,64}", first):
        raise TransientError("the sandbox did not answer a step as its script would")
    return first, second.strip()


async def _run(sandbox: Sandbox, step: str, script: str, *arguments: str) -> str:
    try:
        return await sandbox.run(step, steps.GIT + script, *arguments)
    except StepError as error:
        raise explain(error, f"cannot {step}") from error
