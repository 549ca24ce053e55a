"""Where an agent works: a separate directory for every attempt.

    ROOT/SESSION/mirror.git       a bare repository that keeps the session's work branch
    ROOT/SESSION/RUN-ATTEMPT/     one attempt's clone, removed when the attempt ends

How the work of one turn reaches the next:
1. An attempt clones the repository and checks out the work branch. It starts from the mirror's branch if
   an earlier turn left one there. If the repository's own work branch contains that commit, it starts from
   the repository's branch. If the mirror has no branch, it starts from the repository's work branch, or
   else from the target branch.
2. The agent works. Attempts never share a directory. So an attempt that lost its lease and still runs does
   not harm its successor.
3. `keep` commits what the agent left uncommitted and pushes the branch to the mirror, on condition that
   the mirror still has the commit seen in step 1. So only one of two attempts succeeds.
4. The attempt removes its directory. If its worker died, the session's next attempt removes it: a live
   worker holds a lock on its directory, and the kernel drops that lock with the process.

Nothing is ever pushed to the repository itself. All turns of a session must use the same ROOT.
"""

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog

from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.repo.git import Git, GitError

COMMITS = 1000
AUTHOR = ("user.name=Outwake agent", "user.email=agent@outwake.invalid")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Commit:
    sha: str
    subject: str


@dataclass(frozen=True)
class Workspace:
    """An attempt's clone, made by `open_workspace`.

    path: the work tree. branch: the work branch, checked out. base: the commit from which the branch
    started in this attempt.
    """

    path: Path
    branch: str
    base: str
    _git: Git
    _mirror: Path
    _known: str  # the mirror's commit at the start, empty if it had none

    async def commits(self) -> list[Commit]:
        """The work branch's commits since `base`, oldest first; the last 1,000 at most.

        Raises SessionError if git cannot list them: the agent may have broken the repository.
        """
        since = f"{self.base}..refs/heads/{self.branch}"
        options = (f"--max-count={COMMITS}", "--reverse", "--topo-order", "--no-show-signature")
        try:
            lines = await self._run("log", *options, "--format=%H %s", since, "--")
        except GitError as error:
            raise error.explain("cannot list the commits") from error
        return [Commit(*line.split(" ", 1)) for line in lines.split("\n") if line]

    async def keep(self) -> str:
        """Save the work for the session's next turn and return the work branch's commit.

        First commits what is uncommitted on the work branch, except files that Git ignores.
        Raises TransientError if another attempt has saved its work meanwhile, SessionError if the work
        can't be saved.
        """
        ref = f"refs/heads/{self.branch}"
        try:
            if await self._head() == ref:
                await self._commit_rest()
            await self._git(
                *("push", "--quiet", "--no-verify", f"--force-with-lease={ref}:{self._known}"),
                *("--", str(self._mirror), f"{ref}:{ref}"),
                cwd=self.path,
                transports="file",
            )
            return await self._run("rev-parse", "--verify", ref)
        except GitError as error:
            if "stale info" in error.reason or "cannot lock ref" in error.reason:
                raise TransientError("another attempt of this session saved its work") from error
            raise error.explain("cannot save the work branch") from error

    async def _head(self) -> str:
        """The ref that is checked out, empty if the agent detached it."""
        try:
            return await self._run("symbolic-ref", "--quiet", "HEAD")
        except GitError as error:
            if error.code == 1:
                return ""
            raise

    async def _commit_rest(self) -> None:
        # An agent that is killed inside git leaves git's lock; no process holds that lock any more.
        await asyncio.to_thread((self.path / ".git" / "index.lock").unlink, missing_ok=True)
        await self._run("add", "--all", "--", ".")
        if await self._run("status", "--porcelain", "--untracked-files=no"):
            await self._run("commit", "--quiet", "-m", "Save what the agent left uncommitted")

    async def _run(self, *arguments: str) -> str:
        return await self._git(*arguments, cwd=self.path)


def attempt_directory(root: Path, session: UUID, run: UUID, attempt: int) -> Path:
    """The path of that attempt's directory, whether or not it exists."""
    return root / str(session) / f"{run}-{attempt}"


@asynccontextmanager
async def open_workspace(
    root: Path,
    *,
    session: UUID,
    run: UUID,
    attempt: int,
    url: str,
    target_branch: str,
    branch: str,
    git: Git,
    allow_file: bool = False,
) -> AsyncIterator[Workspace]:
    """Clone `url` for one attempt and check out the work branch; the clone is removed on leaving.

    url, target_branch, branch: accepted by `outwake/session/names.py`.
    allow_file: whether `url` may be a file:// URL.

    Raises PermanentError (no such repository or branch, an empty repository, no access) or
    TransientError (the network, a full disk, a timeout).
    """
    async with own_directory(root, session, run, attempt) as place:
        transports = "https:ssh:file" if allow_file else "https:ssh"
        path = place / "repo"
        mirror = place.parent / "mirror.git"
        await _clone(git, url, path, transports)
        base, known = await _start(git, path, mirror, target_branch, branch)
        await _check_out(git, path, branch, base)
        yield Workspace(path, branch, base, git, mirror, known)


@asynccontextmanager
async def own_directory(root: Path, session: UUID, run: UUID, attempt: int) -> AsyncIterator[Path]:
    """A directory for one attempt, removed on leaving. Also removes those of the session's dead attempts.

    Raises TransientError if the directory can't be made.
    """
    place = attempt_directory(root, session, run, attempt)
    try:
        lock = _claim(place)
    except OSError as error:
        raise TransientError(f"cannot make a workspace: {error.strerror}") from error
    try:
        await asyncio.to_thread(_remove_all_dead, place.parent, place)
        yield place
    finally:
        await asyncio.shield(asyncio.to_thread(_remove, place, lock))


async def _clone(git: Git, url: str, path: Path, transports: str) -> None:
    settings = [part for setting in AUTHOR for part in ("--config", setting)]
    options = ("--quiet", "--no-checkout", "--template=", "--origin=origin", *settings)
    try:
        await git("clone", *options, "--", url, str(path), cwd=path.parent, transports=transports)
    except GitError as error:
        raise error.explain("cannot clone the repository") from error


async def _start(git: Git, path: Path, mirror: Path, target_branch: str, branch: str) -> tuple[str, str]:
    """The commit to start from, and the mirror's commit, which is empty if the mirror has none."""
    try:
        heads = await _refs(git, path, "refs/remotes/origin/", target_branch, branch)
        if target_branch not in heads:
            if await git("for-each-ref", "--count=1", cwd=path):
                raise PermanentError(f"the repository has no branch {target_branch}")
            raise PermanentError("the repository is empty: it has no branch to start from")
        theirs = heads.get(branch)
        await _make_mirror(git, mirror)
        kept = (await _refs(git, mirror, "refs/heads/", branch)).get(branch)
        if not kept:
            return theirs or heads[target_branch], ""
        await git(
            *("fetch", "--quiet", "--no-tags", "--no-write-fetch-head"),
            *("--", str(mirror), f"refs/heads/{branch}"),
            cwd=path,
            transports="file",
        )
        if theirs and await _contains(git, path, theirs, kept):
            return theirs, kept
        return kept, kept
    except GitError as error:
        raise error.explain("cannot find where to start") from error


async def _make_mirror(git: Git, mirror: Path) -> None:
    """Make the mirror, or finish one whose creator died."""
    await git("init", "--quiet", "--bare", "--template=", "--", str(mirror), cwd=mirror.parent)
    # The push ends all its processes when it ends, so git must not run gc in the background.
    await git(f"--git-dir={mirror}", "config", "gc.autoDetach", "false", cwd=mirror.parent)


async def _check_out(git: Git, path: Path, branch: str, commit: str) -> None:
    try:
        await git("checkout", "--quiet", "--no-track", "-B", branch, commit, "--", cwd=path)
    except GitError as error:
        raise error.explain(f"cannot check out {branch}") from error


async def _refs(git: Git, repository: Path, prefix: str, *names: str) -> dict[str, str]:
    """The branches that exist, with their commits."""
    lines = await git(
        *("for-each-ref", "--format=%(objectname) %(refname)"),
        *(prefix + name for name in names),
        cwd=repository,
    )
    pairs = (line.split(" ", 1) for line in lines.split("\n") if line)
    return {ref.removeprefix(prefix): commit for commit, ref in pairs}


async def _contains(git: Git, path: Path, commit: str, ancestor: str) -> bool:
    try:
        await git("merge-base", "--is-ancestor", ancestor, commit, cwd=path)
    except GitError as error:
        if error.code == 1:
            return False
        raise
    return True


def _claim(place: Path) -> int:
    """Make the directory, lock it and return the lock. Close the lock when the directory is removed.

    Another attempt may take the directory for dead and remove it before we lock it. The lock then belongs to
    a directory without a name, and we start again.
    """
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(place.stat(), os.fstat(lock)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _remove_all_dead(home: Path, own: Path) -> None:
    """Remove the directories of the same session's attempts whose worker is dead."""
    for place in home.iterdir():
        if place not in (own, home / "mirror.git"):
            remove_dead(place)


def remove_dead(place: Path) -> None:
    """Remove an attempt's directory unless its worker lives; a live worker removes its own."""
    with suppress(OSError):  # locked, or gone
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
        _remove(place, lock)


def _remove(place: Path, lock: int) -> None:
    """Remove the directory and drop its lock. The next attempt removes what can't be removed now."""
    try:
        shutil.rmtree(place)
    except FileNotFoundError:
        pass
    except OSError:
        try:
            _make_writable(place)
            shutil.rmtree(place)
        except OSError as error:
            _log.warning("workspace_not_removed", path=str(place), error=str(error))
    finally:
        os.close(lock)


def _make_writable(place: Path) -> None:
    os.chmod(place, 0o700)
    for parent, directories, _ in os.walk(place):  # top down: writable before it is entered
        for name in directories:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o700)
