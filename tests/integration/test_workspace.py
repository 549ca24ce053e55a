"""Workspaces of real repositories, with real git."""

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from math import inf
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from outwake.worker.agents.run import Agent
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.repo.hosts import Limits, Remote
from outwake.worker.repo.workspace import Saved, Workspace, open_workspace
from outwake.worker.sandboxes.base import Request
from outwake.worker.sandboxes.directory import DirectoryProvider
from outwake.worker.sandboxes.places import _claim, _remove

ROOT = Path(__file__).parents[2]
SESSION = UUID(int=1)
NOBODY = 65534


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


class Repository:
    """A work tree with a remote of its own."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path = path
        self.home = home
        path.mkdir()
        self("init", "--quiet", "--initial-branch=main")

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        identity = ("-c", "user.name=Ann", "-c", "user.email=ann@example.com")
        done = subprocess.run(
            ["git", *identity, *arguments],
            cwd=self.path,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home)},
            check=True,
            input=stdin,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout.strip()

    def commit(self, name: str, text: str = "text") -> str:
        (self.path / name).write_text(text)
        self("add", name)
        self("commit", "--quiet", "-m", f"Add {name}")
        return self("rev-parse", "HEAD")

    @property
    def url(self) -> str:
        return f"file://{self.path}"


@pytest.fixture
def origin(tmp_path: Path, home: Path) -> Repository:
    repository = Repository(tmp_path / "origin", home)
    repository.commit("README.md")
    return repository


Open = Callable[..., AbstractAsyncContextManager[Workspace]]


@pytest.fixture
def opened(tmp_path: Path, origin: Repository) -> Open:
    """A turn's workspace in a directory; `after` is the turn whose stored work it goes on from."""

    @asynccontextmanager
    async def opened(
        url: str = origin.url,
        after: Saved | None = None,
        allow_file: bool = True,
        limits: Limits | None = None,
        **given: Any,
    ) -> AsyncIterator[Workspace]:
        provider = DirectoryProvider(tmp_path / "root")
        held = await provider.acquire(Request(uuid4(), SESSION, uuid4(), 1))
        settings: dict[str, Any] = {"target_branch": "main", "branch": "work/x", "used": False}
        bundle = after.bundle if after else None
        async with provider.connect(held) as sandbox:
            remote = Remote(url, allow_file=allow_file, limits=limits or Limits())
            yield await open_workspace(sandbox, remote, bundle=bundle, **(settings | given))

    return opened


def sh(workspace: Workspace, script: str) -> None:
    """Do in the work tree what an agent might, as somebody with a name."""
    env = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": "/nonexistent"}
    env |= {f"GIT_{who}_{what}": "agent" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["sh", "-euc", script], cwd=workspace.path, env=env, check=True, capture_output=True)


def files(workspace: Workspace) -> set[str]:
    """The files of the work tree, without Git's own."""
    root = Path(workspace.path)
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file() or path.is_symlink())
    return {str(path) for path in found if ".git" not in path.parts}


async def work(workspace: Workspace, prompt: str) -> None:
    argv = [sys.executable, "-P", "-m", "outwake.embedded.agent", prompt]
    env = {"PYTHONPATH": str(ROOT)}
    async with Agent.start(argv, cwd=Path(workspace.path), env=env, deadline=inf) as agent:
        async for _ in agent.lines():
            pass
        assert (await agent.wait()).code == 0


async def test_the_next_turn_goes_on_where_the_last_ended(opened: Open, origin: Repository) -> None:
    async with opened() as first:
        assert first.base == origin("rev-parse", "main")
        await work(first, "one")
        kept = await first.save()
        assert (kept.lost, kept.notes) == ([], [])
        (commit,) = kept.commits
        assert commit.subject == "Note what was asked: one"
        assert kept.head == commit.sha
    assert not Path(first.path).parent.exists()
    origin.commit("later.txt")
    async with opened(after=kept) as second:
        assert second.base == commit.sha
        await work(second, "two")
        await work(second, "three")
        subjects = [commit.subject for commit in (await second.save()).commits]
        assert subjects == ["Note what was asked: two", "Note what was asked: three"]
    assert origin("branch", "--format=%(refname:short)") == "main"


async def test_work_that_is_not_committed_is_kept(opened: Open) -> None:
    async with opened() as first:
        await work(first, "no-commit leave:draft.txt")
        Path(first.path, ".git", "index.lock").touch()
        kept = await first.save()
        (commit,) = kept.commits
        assert commit.sha == kept.head
    async with opened(after=kept) as second:
        assert Path(second.path, "draft.txt").read_text() == "left behind\n"


async def test_a_turn_without_work_keeps_the_base(opened: Open) -> None:
    async with opened() as workspace:
        assert (await workspace.save()).head == workspace.base


async def test_an_existing_work_branch_is_the_start(opened: Open, origin: Repository) -> None:
    origin("checkout", "--quiet", "-b", "work/x")
    theirs = origin.commit("theirs.txt")
    origin("checkout", "--quiet", "main")
    async with opened() as first:
        assert first.base == theirs
        await work(first, "one")
        kept = await first.save()
        assert kept.head is not None
        origin("fetch", "--quiet", first.path, "work/x")
    origin("checkout", "--quiet", "work/x")
    origin.commit("diverged.txt")
    async with opened(after=kept) as second:
        assert second.base == kept.head  # our work is not lost
    origin("reset", "--quiet", "--hard", kept.head)
    merged = origin.commit("merged.txt")
    async with opened(after=kept) as third:
        assert third.base == merged  # theirs has ours in it
        assert (await third.save()).head == merged


async def test_work_that_version_1_0_kept_in_a_mirror_is_the_start(
    opened: Open, origin: Repository, tmp_path: Path
) -> None:
    kept = origin("commit-tree", "-p", "main", "-m", "Saved", "main^{tree}")
    mirror = tmp_path / "root" / str(SESSION) / "mirror.git"
    origin("clone", "--quiet", "--bare", str(origin.path), str(mirror))
    origin("push", "--quiet", str(mirror), f"{kept}:refs/heads/work/x")
    async with opened() as workspace:
        assert workspace.base == kept
        await work(workspace, "one")
        latest = await workspace.save()
    async with opened(after=latest) as following:
        assert following.base == latest.head


async def test_target_and_work_branch_may_be_one(opened: Open, origin: Repository) -> None:
    async with opened(branch="main") as workspace:
        assert workspace.base == origin("rev-parse", "main")


async def test_a_missing_repository_is_permanent(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="does not appear to be a git repository"):
        async with opened(url=f"file://{tmp_path}/none"):
            pass
    assert list((tmp_path / "root").iterdir()) == []


async def test_a_missing_branch_is_permanent(opened: Open) -> None:
    with pytest.raises(PermanentError, match="has no branch release"):
        async with opened(target_branch="release"):
            pass


async def test_an_empty_repository_is_permanent(opened: Open, tmp_path: Path, home: Path) -> None:
    empty = Repository(tmp_path / "empty", home)
    with pytest.raises(PermanentError, match="the repository is empty"):
        async with opened(url=empty.url):
            pass


async def test_a_branch_below_another_is_permanent(opened: Open) -> None:
    with pytest.raises(PermanentError, match="cannot check out main/fix"):
        async with opened(branch="main/fix"):
            pass


async def test_file_only_where_allowed(opened: Open) -> None:
    with pytest.raises(PermanentError, match="transport 'file' not allowed"):
        async with opened(allow_file=False):
            pass


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(files=9), "over 9 files (OUTWAKE_CLONE_FILES)"),
        (Limits(size=100_000), "over 100000 bytes (OUTWAKE_CLONE_BYTES)"),
        (Limits(size=20_000), "over 20000 bytes (OUTWAKE_CLONE_BYTES)"),
    ],
)
async def test_a_repository_over_a_limit_is_refused(
    opened: Open, origin: Repository, limits: Limits, said: str
) -> None:
    """Of its files, of what they are unpacked, of what is fetched."""
    for number in range(10):
        (origin.path / str(number)).write_bytes(os.urandom(3_000) + bytes(10_000))
    origin("add", ".")
    origin.commit("last")
    with pytest.raises(PermanentError) as caught:
        async with opened(limits=limits):
            pass
    assert str(caught.value) == f"the repository is too large: it has {said}"
    async with opened(limits=Limits(files=12, size=140_000)):
        pass


async def test_a_few_bytes_that_stand_for_endless_files_are_refused(opened: Open, origin: Repository) -> None:
    """Each tree has the one below ten times: 10 to the power of 10 files."""
    below = origin("rev-parse", "HEAD:README.md")
    for level in range(10):
        kind = "100644 blob" if level == 0 else "040000 tree"
        entries = "".join(f"{kind} {below}\t{name}\n" for name in range(10))
        below = origin("mktree", stdin=entries)
    bomb = origin("commit-tree", "-m", "Bomb", below)
    origin("update-ref", "refs/heads/bomb", bomb)
    with pytest.raises(PermanentError, match="over 500000 files"):
        async with opened(target_branch="bomb"):
            pass


async def test_a_clone_that_does_not_end_is_given_up(opened: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"https://127.0.0.1:{deaf.getsockname()[1]}/x"
        with pytest.raises(PermanentError, match=r"took over 0.5 s \(OUTWAKE_CLONE_TIMEOUT\)"):
            async with opened(url=url, limits=Limits(seconds=0.5)):
                pass


async def test_git_connects_to_the_addresses_that_were_checked(tmp_path: Path) -> None:
    """Whatever the name means now: it is resolved once."""
    provider = DirectoryProvider(tmp_path)
    held = await provider.acquire(Request(uuid4(), SESSION, uuid4(), 1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        remote = Remote(
            f"https://git.invalid:{port}/x", f"git.invalid:{port}:127.0.0.1", limits=Limits(seconds=1)
        )
        async with provider.connect(held) as sandbox:
            with pytest.raises(PermanentError, match="took over"):
                await open_workspace(
                    sandbox, remote, target_branch="main", branch="x", bundle=None, used=False
                )
        server.settimeout(5)
        server.accept()[0].close()


async def test_network_trouble_is_transient(opened: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    with pytest.raises(TransientError, match="onnect"):
        async with opened(url=f"https://127.0.0.1:{closed}/x"):
            pass


async def test_a_step_that_takes_too_long_is_transient(tmp_path: Path) -> None:
    provider = DirectoryProvider(tmp_path)
    held = await provider.acquire(Request(uuid4(), SESSION, uuid4(), 1))
    async with provider.connect(held) as sandbox:
        with pytest.raises(TransientError, match="wait: not done within 1 seconds"):
            await sandbox.run("wait", "sleep 1000", timeout=1)


async def test_no_hook_runs(
    opened: Open, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of a template of the worker's account nor of the clone."""
    monkeypatch.setenv("HOME", str(home))
    ran = tmp_path / "ran"

    def plant(hooks: Path) -> None:
        hooks.mkdir(parents=True, exist_ok=True)
        for name in ("post-checkout", "pre-commit", "post-commit", "pre-push", "post-index-change"):
            (hooks / name).write_text(f"#!/bin/sh\ntouch {ran}\n")
            (hooks / name).chmod(0o755)

    plant(home / "template" / "hooks")
    (home / ".gitconfig").write_text(f"[init]\ntemplateDir = {home}/template\n")
    async with opened() as workspace:
        plant(Path(workspace.path, ".git", "hooks"))
        await work(workspace, "no-commit leave:x")
        assert len((await workspace.save()).commits) == 1
    assert not ran.exists()


HOLDER = """
import sys, time
from pathlib import Path
from outwake.worker.sandboxes.places import _claim
_claim(Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The worker of another attempt of the session, in `left`."""
    left = tmp_path / "root" / str(SESSION) / "left-1"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(left)], cwd=ROOT, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout
        holder.stdout.readline()
        (left / "file").touch()
        yield holder
        holder.kill()


async def test_what_a_dead_attempt_left_is_removed(
    opened: Open, tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    root = tmp_path / "root"
    other = root / "other-session" / "left-1"
    other.mkdir(parents=True)
    async with opened():
        assert (root / str(SESSION) / "left-1" / "file").exists()  # its worker lives
    holder.kill()
    holder.wait()
    async with opened():
        assert not (root / str(SESSION) / "left-1").exists()
    assert other.exists()


def test_a_workspace_has_one_owner(tmp_path: Path) -> None:
    place = tmp_path / "session" / "run-1"
    lock = _claim(place)
    with pytest.raises(BlockingIOError):
        _claim(place)
    _remove(place, lock)
    with pytest.raises(OSError, match="Bad file"):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(_claim(place))


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A directory, and for root the rights of somebody who may be refused."""
    with tempfile.TemporaryDirectory() as name:
        root = os.geteuid() == 0
        if root:
            os.chown(name, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            if root:
                os.seteuid(0)


def test_read_only_files_are_removed_and_links_not_followed() -> None:
    with unprivileged() as path:
        outside = path / "outside"
        outside.mkdir()
        outside.chmod(0o500)
        place = path / "session" / "run-1"
        lock = _claim(place)
        inner = place / "a" / "b"
        inner.mkdir(parents=True)
        (inner / "file").touch(0o400)
        (inner / "link").symlink_to(outside)
        inner.chmod(0o500)
        (place / "a").chmod(0o000)
        _remove(place, lock)
        assert not place.exists()
        assert outside.stat().st_mode & 0o777 == 0o500
