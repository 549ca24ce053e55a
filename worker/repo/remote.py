"""A workspace in a borrowed sandbox. Shell steps make it and read it.

    ~/outwake/repo              the clone, with the work branch checked out
    ~/outwake/git-credentials   mode 600, present only while a step needs it

How the work of one turn reaches the next:
1. Clone the repository, unless an earlier turn left its clone in this sandbox. Start from the commits stored
   with the session. If the repository's own work branch contains those commits, start from that branch. If
   no commits are stored, start from the repository's work branch, or else from the target branch.
2. The agent works. The sandbox holds no credentials during this time.
3. `keep` commits what the agent left uncommitted. If pushing is enabled, it pushes the branch, on condition
   that the repository still has the commit seen in step 1. If the branch was not pushed, `keep` returns the
   commits as a Git bundle, which is stored with the session. So no work is lost with its sandbox.
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
from outwake.worker.repo.git import GitError
from outwake.worker.repo.workspace import AUTHOR, COMMITS, Commit
from outwake.worker.sandboxes.aio import Sandbox, StepError

BUNDLE_LIMIT = 16 * 2**20
_CHUNK = 96 * 1024  # bytes of a bundle printed by one step
_PUSH_AGAIN = (1.0, 5.0)
_FORGET_TIMEOUT = 10.0  # seconds; used when something has already gone wrong

log = get_logger(__name__)

# Every script begins with this text. $HOME is the sandbox's. The scripts' arguments are $1, $2, …
_GIT = """
export LC_ALL=C GIT_TERMINAL_PROMPT=0 GIT_ASKPASS= SSH_ASKPASS= GIT_SSH_COMMAND='ssh -o BatchMode=yes'
home=$HOME/outwake; repo=$home/repo; credentials=$home/git-credentials; bundle=$home/work.bundle
git() {
    command git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c gc.auto=0 -c commit.gpgSign=false \\
        -c credential.helper= -c credential.helper="store --file='$credentials'" "$@"
}
"""
_PREPARE = """
umask 077; mkdir -p "$home"; chmod 700 "$home"; cd "$home"
rm -f "$credentials" "$bundle"
if test "$1" = new; then rm -rf "$repo"; fi
: > "$credentials"
pwd -P
"""
_CLONE = """
chmod 600 "$credentials"; export GIT_ALLOW_PROTOCOL="$1"; url=$2; shift 2
git clone --quiet --no-checkout --template= --origin=origin "$@" -- "$url" "$repo" 2>&1
"""
_FORGET = 'rm -f "$credentials"'
_START = """
cd "$repo"; target=refs/remotes/origin/$1; branch=$2; kept=
theirs=$(git rev-parse --quiet --verify "refs/remotes/origin/$branch" || :)
if ! start=$(git rev-parse --quiet --verify "$target"); then
    test -n "$(git for-each-ref --count=1)" && exit 65
    exit 66
fi
start=${theirs:-$start}
if test "$3" = bundle; then
    GIT_ALLOW_PROTOCOL=file git fetch --quiet --no-tags --no-write-fetch-head \\
        -- "$bundle" "+refs/heads/$branch:refs/outwake/kept" 2>&1
    kept=$(git rev-parse --verify refs/outwake/kept)
    if test -z "$theirs" || ! git merge-base --is-ancestor "$kept" "$theirs"; then start=$kept; fi
fi
git checkout --quiet --no-track -B "$branch" "$start" -- 2>&1
echo "$start $theirs"
"""
_REUSE = """
cd "$repo"
head=$(git rev-parse --verify "refs/heads/$1")
theirs=$(git rev-parse --quiet --verify "refs/remotes/origin/$1" || :)
echo "$head $theirs"
"""
_COMMIT = """
cd "$repo"; branch=refs/heads/$1
if test "$(git symbolic-ref --quiet HEAD || :)" = "$branch"; then
    rm -f .git/index.lock
    git add --all -- . 2>&1
    left=$(git status --porcelain --untracked-files=no)
    if test -n "$left"; then git commit --quiet -m 'Save what the agent left uncommitted' 2>&1; fi
fi
head=$(git rev-parse --verify "$branch")
# Nothing is ours to save if the next turn would start from it anyhow. That the repository has the commits
# under some other name is not enough.
ours=ours
if test -n "$2"; then test "$head" != "$2" || ours=
elif git merge-base --is-ancestor "$head" "refs/remotes/origin/$3"; then ours=; fi
echo "$head $ours"
"""
_LOG = """
cd "$repo"
git log --max-count="$1" --reverse --topo-order --no-show-signature --format='= %H %s' \\
    "$2..refs/heads/$3" --
"""
_PUSH = """
cd "$repo"; chmod 600 "$credentials"; export GIT_ALLOW_PROTOCOL="$1"; branch=refs/heads/$3
git push --quiet --no-verify --force-with-lease="$branch:$4" -- "$2" "$branch:$branch" 2>&1
git update-ref "refs/remotes/origin/$3" "$branch"
"""
_BUNDLE = """
cd "$repo"; rm -f "$bundle"; branch=refs/heads/$1
set -- --remotes=origin
# Git makes no empty bundle: if the repository has all of the commits, the last goes along.
if test "$(git rev-list --count "$branch" --not --remotes=origin)" = 0; then set -- "$branch^@"; fi
git bundle create --quiet "$bundle" "$branch" --not "$@" 2>&1
digest=$(sha256sum < "$bundle"); size=$(wc -c < "$bundle")
echo "${digest%% *} $size"
"""
_READ = 'tail -c "+$1" "$bundle" | head -c "$2" | base64'
_SWEEP = 'rm -rf "$home"'


@dataclass
class RemoteWorkspace:
    """The clone in a sandbox, made by `open_remote`.

    path: the work tree in the sandbox. branch: the work branch, checked out. base: the commit from which
    the branch started in this attempt.
    bundle, problem: set by `keep`: the commits that only we have, and why the branch was not pushed.
    """

    path: str
    branch: str
    base: str
    _sandbox: Sandbox
    _remote: "Remote"
    _known: str  # the repository's commit of the work branch at the start, empty if it had none
    _target: str
    bundle: bytes | None = None
    problem: str | None = None

    async def commits(self) -> list[Commit]:
        """The work branch's commits since `base`, oldest first; the last 1,000 at most."""
        lines = await self._run("list the commits", _LOG, str(COMMITS), self.base, self.branch)
        # The sandbox mixes stderr into the output, so the script marks its own lines.
        marked = (line.partition(" ") for line in lines.split("\n"))
        return [Commit(*rest.partition(" ")[::2]) for mark, _, rest in marked if mark == "="]

    async def keep(self) -> str:
        """Save the work for the session's next turn and return the work branch's commit.

        Raises SessionError if the work can't be saved.
        """
        arguments = (self.branch, self._known, self._target)
        head, ours = _pair(await self._run("save the work branch", _COMMIT, *arguments))
        if ours and not (self._remote.push and await self._push()):
            self.bundle = await self._read_bundle()
        return head

    async def _push(self) -> bool:
        """Whether the branch was pushed; else `problem` says why. A failed push does not repeat the turn."""
        remote = self._remote
        for pause in (*_PUSH_AGAIN, None):
            try:
                async with remote.credentials_in(self._sandbox, self.path):
                    await self._sandbox.run(
                        "push", _GIT + _PUSH, remote.transports, remote.url, self.branch, self._known
                    )
                log.info("pushed", branch=self.branch)
                return True
            except StepError as error:
                moved = "stale info" in error.said
                explained = GitError(error.code, error.said).explain("the work branch was not pushed")
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
        digest, told = _pair(await self._run("save the work branch", _BUNDLE, self.branch))
        size = int(told) if told.isdigit() else 0
        if size > BUNDLE_LIMIT:
            raise PermanentError(f"the turn's commits are over {BUNDLE_LIMIT >> 20} MiB: they must be pushed")
        content = bytearray()
        while len(content) < size:
            arguments = (str(len(content) + 1), str(_CHUNK))
            try:
                chunk = base64.b64decode(await self._run("read the commits", _READ, *arguments))
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
            with suppress(SessionError):
                await sandbox.run("remove the credentials", _GIT + _FORGET, timeout=_FORGET_TIMEOUT)
            raise
        await _run(sandbox, "remove the credentials", _FORGET)


async def open_remote(
    sandbox: Sandbox,
    remote: Remote,
    *,
    target_branch: str,
    branch: str,
    bundle: bytes | None,
    used: bool,
) -> RemoteWorkspace:
    """Clone the repository in the sandbox and check out the work branch.

    bundle: the commits stored by the session's last turn. used: whether that turn's clone is still there.

    Raises PermanentError (no such repository or branch, an empty repository, no access) or TransientError
    (the network, the sandbox, a full disk, a timeout).
    """
    home = await _run(sandbox, "prepare the sandbox", _PREPARE, "used" if used else "new")
    path = f"{home.splitlines()[-1] if home else ''}/repo"
    if not path.startswith("/"):
        raise TransientError("the sandbox did not say where its home is")
    if used:
        head, known = _pair(await _run(sandbox, "find the work branch", _REUSE, branch))
        return RemoteWorkspace(path, branch, head, sandbox, remote, known, target_branch)
    settings = [part for setting in AUTHOR for part in ("--config", setting)]
    try:
        async with remote.credentials_in(sandbox, path):
            await sandbox.run("clone", _GIT + _CLONE, remote.transports, remote.url, *settings)
    except StepError as error:
        raise GitError(error.code, error.said).explain("cannot clone the repository") from error
    if bundle is not None:
        await sandbox.write(f"{path.rpartition('/')[0]}/work.bundle", bundle)
    try:
        start = await sandbox.run(
            "check out", _GIT + _START, target_branch, branch, "bundle" if bundle is not None else ""
        )
    except StepError as error:
        match error.code:
            case 65:
                raise PermanentError(f"the repository has no branch {target_branch}") from error
            case 66:
                raise PermanentError("the repository is empty: it has no branch to start from") from error
        raise GitError(error.code, error.said).explain("cannot find where to start") from error
    base, known = _pair(start)
    return RemoteWorkspace(path, branch, base, sandbox, remote, known, target_branch)


async def sweep(sandbox: Sandbox) -> None:
    """Remove our files from a sandbox before it is returned."""
    await _run(sandbox, "sweep the sandbox", _SWEEP)


def _pair(output: str) -> tuple[str, str]:
    """The two words of the last line; the second may be empty. stderr's text may come before that line."""
    first, _, second = output.rpartition("\n")[2].partition(" ")
    if not re.fullmatch("[0-9a-f]{40,64}", first):
        raise TransientError("the sandbox did not answer a step as its script would")
    return first, second.strip()


async def _run(sandbox: Sandbox, step: str, script: str, *arguments: str) -> str:
    try:
        return await sandbox.run(step, _GIT + script, *arguments)
    except StepError as error:
        raise GitError(error.code, error.said).explain(f"cannot {step}") from error
