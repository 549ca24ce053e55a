"""A turn's clone of the repository, in a sandbox of any kind. Shell steps make it and read it.

    $OUTWAKE_HOME/repo              the clone, with the work branch checked out
    $OUTWAKE_HOME/git-credentials   mode 600, present only while a step needs it

How the work of one turn reaches the next:
1. Clone the repository, unless an earlier turn left its clone in this sandbox. Start from the commits stored
   with the session. If the repository's own work branch contains those commits, start from that branch. If
   no commits are stored, start from the repository's work branch, or else from the target branch.
2. The agent works. The sandbox holds no credentials during this time.
3. `save` commits what the agent left uncommitted, whatever it has done to the repository. If pushing is
   enabled, it pushes the branch, on condition that the repository still has the commit seen in step 1. If the
   branch was not pushed, `save` returns the commits as a Git bundle, which is stored with the session in the
   transaction that ends the turn. So no work is lost with its sandbox or its host, and an attempt that lost
   its lease stores nothing.

After the agent has run, nothing may run it again. So `save` raises nothing: it tries again what may pass, and
what could not be kept is part of its answer.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from outwake.telemetry.log import get_logger
from outwake.worker.errors import PermanentError, SessionError, TransientError
from outwake.worker.repo import steps
from outwake.worker.repo.git import explain
from outwake.worker.repo.hosts import Limits, Remote
from outwake.worker.sandboxes.base import Sandbox, StepError, StepTimeout
from outwake.worker.sandboxes.files import AGAIN, again, digest_of, read_file

COMMITS = 1000
BUNDLE_LIMIT = 16 * 2**20
AUTHOR = ("Outwake agent", "agent@outwake.invalid")
TOLD = 20  # lines of a kind that a turn's result holds
_FORGET_TIMEOUT = 10.0  # seconds; used when something has already gone wrong

_STALE = re.compile(r"^!\t.*\[rejected\] \(stale info\)$", re.MULTILINE)  # git push --porcelain
_TOO_LARGE = re.compile("File too large")  # EFBIG: a file met the limit of its size
_COMMIT = re.compile("[0-9a-f]{40,64}")

log = get_logger(__name__)


@dataclass(frozen=True)
class Commit:
    sha: str
    subject: str


@dataclass(frozen=True)
class Saved:
    """What has become of a turn's work.

    head: the work branch's commit; None if it could not be read. pushed: whether the repository's work branch
    has it, if pushing is enabled. commits: those since the turn's start,
    oldest first; the last 1,000 at most. bundle: the commits that only we have; None if there are none.
    lost: what could not be kept, or not pushed, in words for the user. notes: what was kept in another way
    than the agent left it.
    """

    head: str | None
    pushed: bool = False
    commits: list[Commit] = field(default_factory=list)
    bundle: bytes | None = field(default=None, repr=False)
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Workspace:
    """The clone in a sandbox, made by `open_workspace`.

    path: the work tree in the sandbox. branch: the work branch, checked out. base: the commit from which
    the branch started in this attempt. stored: the commits stored by the session's last turn.
    """

    path: str
    branch: str
    base: str
    stored: bytes | None = field(repr=False)
    _sandbox: Sandbox
    _remote: Remote
    _known: str  # the repository's commit of the work branch at the start, empty if it had none
    _target: str

    async def save(self) -> Saved:
        """Save the work for the session's next turn. Raises no SessionError."""
        try:
            saved = await self._again("save the work branch", steps.SAVE, *self._save_arguments())
        except SessionError as error:
            log.warning("work_not_saved", reason=str(error))
            return Saved(None, bundle=self.stored, lost=[str(error)])
        head, ours, lost, notes = _read_saved(saved)
        if head is None:
            return Saved(None, bundle=self.stored, lost=["the sandbox did not say what it saved"])
        bundle = None
        pushed = self._remote.push and (await self._push(lost) if ours else bool(self._known))
        if ours and not pushed:
            try:
                bundle = await self._read_bundle()
            except SessionError as error:
                lost.append(str(error))
                bundle = self.stored
        return Saved(head, pushed, await self._commits(lost), bundle, lost, notes)

    def _save_arguments(self) -> tuple[str, ...]:
        return (self.branch, self.base, self._known, self._target, *AUTHOR)

    async def _commits(self, lost: list[str]) -> list[Commit]:
        try:
            arguments = (str(COMMITS), self.base, self.branch)
            lines = await self._again("list the commits", steps.LOG, *arguments)
        except SessionError as error:
            lost.append(str(error))
            return []
        marked = (line.partition(" ") for line in lines.split("\n"))
        pairs = (rest.partition(" ") for mark, _, rest in marked if mark == "=")
        return [Commit(sha, subject.rstrip()) for sha, _, subject in pairs]

    async def _push(self, lost: list[str]) -> bool:
        """Whether the branch was pushed; else `lost` says why."""
        try:
            for pause in (*AGAIN, None):
                try:
                    await self._push_once()
                    log.info("pushed", branch=self.branch)
                    return True
                except TransientError:
                    if pause is None:
                        raise
                    await asyncio.sleep(pause)
        except SessionError as error:
            log.warning("push_failed", reason=str(error))
            lost.append(str(error))
        return False

    async def _push_once(self) -> None:
        remote = self._remote
        arguments = (remote.transports, remote.resolved, remote.url, self.branch, self._known)
        try:
            async with _credentials_in(self._sandbox, remote, self.path):
                await self._sandbox.run("push", steps.GIT + steps.PUSH, *arguments)
        except StepError as error:
            if _STALE.search(error.output):
                said = "the work branch was not pushed: somebody else has moved it"
                raise PermanentError(said) from error
            raise explain(error, "the work branch was not pushed") from error

    async def _read_bundle(self) -> bytes:
        """Raises PermanentError if it is too large, TransientError if it can't be read."""
        digest, size = digest_of(await self._again("save the work branch", steps.BUNDLE, self.branch))
        if size > BUNDLE_LIMIT:
            raise PermanentError(f"the turn's commits are over {BUNDLE_LIMIT >> 20} MiB: they must be pushed")
        path = f"{self.path.rpartition('/')[0]}/work.bundle"
        return await read_file(partial(self._again, "read the commits"), path, digest, size)

    async def _again(self, step: str, script: str, *arguments: str) -> str:
        return await again(step, lambda: _run(self._sandbox, step, script, *arguments))


@asynccontextmanager
async def _credentials_in(sandbox: Sandbox, remote: Remote, path: str) -> AsyncIterator[None]:
    """Put the credentials into the sandbox, in a file of mode 600; remove the file on leaving.

    If this process dies, the file stays until the sandbox is swept, before its next use or its return.
    """
    if remote.credentials is None:
        yield
        return
    # The directory is closed to other users, whatever mode the sandbox gives a new file.
    await sandbox.write(f"{path.rpartition('/')[0]}/git-credentials", remote.credentials)
    try:
        yield
    except BaseException:
        with suppress(SessionError, StepError):
            script = steps.GIT + steps.FORGET
            await sandbox.run("remove the credentials", script, timeout=_FORGET_TIMEOUT)
        raise
    await _run(sandbox, "remove the credentials", steps.FORGET)


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
        return Workspace(path, branch, head, bundle, sandbox, remote, known, target_branch)
    await _clone(sandbox, remote, path)
    if bundle is not None:
        await sandbox.write(f"{path.rpartition('/')[0]}/work.bundle", bundle)
    stored = "bundle" if bundle is not None else ""
    limits = remote.limits
    arguments = (target_branch, branch, stored, str(limits.files), str(limits.size))
    try:
        start = await sandbox.run("check out", steps.GIT + steps.START, *arguments)
    except StepError as error:
        raise _not_started(error, target_branch, branch, limits) from error
    base, known = _pair(start)
    return Workspace(path, branch, base, bundle, sandbox, remote, known, target_branch)


async def _clone(sandbox: Sandbox, remote: Remote, path: str) -> None:
    name, mail = AUTHOR  # for the agent's own commits
    settings = ("--config", f"user.name={name}", "--config", f"user.email={mail}")
    limits = remote.limits
    arguments = (remote.transports, remote.resolved, remote.url, str(limits.size // 512), *settings)
    try:
        async with _credentials_in(sandbox, remote, path):
            await sandbox.run("clone", steps.GIT + steps.CLONE, *arguments, timeout=limits.seconds)
    except StepTimeout as error:
        setting = "OUTWAKE_CLONE_TIMEOUT"
        raise PermanentError(f"the clone took over {limits.seconds:g} s ({setting})") from error
    except StepError as error:
        if _TOO_LARGE.search(error.output):
            raise _too_large(f"{limits.size} bytes (OUTWAKE_CLONE_BYTES)") from error
        raise explain(error, "cannot clone the repository") from error


def _not_started(error: StepError, target_branch: str, branch: str, limits: Limits) -> SessionError:
    match error.code:
        case 65:
            return PermanentError(f"the repository has no branch {target_branch}")
        case 66:
            return PermanentError("the repository is empty: it has no branch to start from")
        case 67:
            return _too_large(f"{limits.files} files (OUTWAKE_CLONE_FILES)")
        case 68:
            return _too_large(f"{limits.size} bytes (OUTWAKE_CLONE_BYTES)")
    return explain(error, f"cannot check out {branch}")


def _too_large(limit: str) -> PermanentError:
    return PermanentError(f"the repository is too large: it has over {limit}")


def _pair(output: str) -> tuple[str, str]:
    """The two words of the last line; the second may be empty. stderr's text may come before that line."""
    first, _, second = output.rpartition("\n")[2].partition(" ")
    if not _COMMIT.fullmatch(first):
        raise TransientError("the sandbox did not answer a step as its script would")
    return first, second.strip()


def _read_saved(output: str) -> tuple[str | None, bool, list[str], list[str]]:
    """What SAVE printed: the work branch's commit, whether it is ours to keep, what was lost, notes."""
    head, ours = None, False
    told: dict[str, list[str]] = {"lost": [], "note": []}
    for line in output.split("\n"):
        word, _, text = line.partition(" ")
        if word in told:
            told[word].append(text)
        elif word == "head":
            commit, _, mark = text.partition(" ")
            head, ours = (commit, mark == "ours") if _COMMIT.fullmatch(commit) else (None, False)
    lost, notes = (_few(told[word]) for word in ("lost", "note"))
    return head, ours, [f"not kept: {text}" for text in lost], notes


def _few(texts: list[str]) -> list[str]:
    rest = len(texts) - TOLD
    return texts if rest <= 0 else [*texts[:TOLD], f"and {rest} more"]


async def _run(sandbox: Sandbox, step: str, script: str, *arguments: str) -> str:
    try:
        return await sandbox.run(step, steps.GIT + script, *arguments)
    except StepError as error:
        raise explain(error, f"cannot {step}") from error
