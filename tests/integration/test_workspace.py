"""Workspaces of real repositories, with real git."""

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from math import inf
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from outwake.worker.agents.run import Agent
from outwake.worker.errors import PermanentError, TransientError
from outwake.worker.repo.git import Git
from outwake.worker.repo.workspace import Workspace, _claim, _remove, open_workspace

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

    def __call__(self, *arguments: str) -> str:
        identity = ("-c", "user.name=Ann", "-c", "user.email=ann@example.com")
        done = subprocess.run(
            ["git", *identity, *arguments],
            cwd=self.path,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home)},
            check=True,
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
def opened(tmp_path: Path, home: Path, origin: Repository) -> Open:
    def opened(**given: Any) -> AbstractAsyncContextManager[Workspace]:
        settings: dict[str, Any] = {
            "session": SESSION,
            "run": uuid4(),
            "attempt": 1,
            "url": origin.url,
            "target_branch": "main",
            "branch": "work/x",
            "git": Git({"HOME": str(home)}),
            "allow_file": True,
        }
        return open_workspace(tmp_path / "root", **(settings | given))

    return opened


async def work(workspace: Workspace, prompt: str) -> None:
    argv = [sys.executable, "-P", "-m", "outwake.embedded.agent", prompt]
    env = {"PYTHONPATH": str(ROOT)}
    async with Agent.start(argv, cwd=workspace.path, env=env, deadline=inf) as agent:
        async for _ in agent.lines():
            pass
        assert (await agent.wait()).code == 0


async def test_the_next_turn_goes_on_where_the_last_ended(opened: Open, origin: Repository) -> None:
    async with opened() as first:
        assert first.base == origin("rev-parse", "main")
        await work(first, "one")
        (commit,) = await first.commits()
        assert commit.subject == "Note what was asked: one"
        assert await first.keep() == commit.sha
    assert not first.path.parent.exists()
    origin.commit("later.txt")
    async with opened() as second:
        assert second.base == commit.sha
        assert await second.commits() == []
        await work(second, "two")
        await work(second, "three")
        subjects = [commit.subject for commit in await second.commits()]
        assert subjects == ["Note what was asked: two", "Note what was asked: three"]
    assert origin("branch", "--format=%(refname:short)") == "main"


async def test_work_that_is_not_committed_is_kept(opened: Open) -> None:
    async with opened() as first:
        await work(first, "no-commit leave:draft.txt")
        (first.path / ".git" / "index.lock").touch()
        kept = await first.keep()
        (commit,) = await first.commits()
        assert commit.sha == kept
    async with opened() as second:
        assert (second.path / "draft.txt").read_text() == "left behind\n"


async def test_a_turn_without_work_keeps_the_base(opened: Open) -> None:
    async with opened() as workspace:
        assert await workspace.keep() == workspace.base


async def test_a_detached_head_is_left_alone(opened: Open) -> None:
    async with opened() as workspace:
        await workspace._run("checkout", "--quiet", "--detach")
        (workspace.path / "draft.txt").touch()
        assert await workspace.keep() == workspace.base


async def test_an_existing_work_branch_is_the_start(opened: Open, origin: Repository) -> None:
    origin("checkout", "--quiet", "-b", "work/x")
    theirs = origin.commit("theirs.txt")
    origin("checkout", "--quiet", "main")
    async with opened() as first:
        assert first.base == theirs
        await work(first, "one")
        kept = await first.keep()
    origin("checkout", "--quiet", "work/x")
    origin.commit("diverged.txt")
    async with opened() as second:
        assert second.base == kept  # our work is not lost
    origin("fetch", "--quiet", str(second._mirror), "work/x")
    origin("reset", "--quiet", "--hard", kept)
    merged = origin.commit("merged.txt")
    async with opened() as third:
        assert third.base == merged  # theirs has ours in it
        assert await third.keep() == merged


async def test_target_and_work_branch_may_be_one(opened: Open, origin: Repository) -> None:
    async with opened(branch="main") as workspace:
        assert workspace.base == origin("rev-parse", "main")


async def test_of_two_attempts_one_gets_through(opened: Open) -> None:
    run = uuid4()
    async with opened(run=run) as stalled, opened(run=run, attempt=2) as rescuer:
        await work(stalled, "stalled")
        await work(rescuer, "rescuer")
        kept = await rescuer.keep()
        with pytest.raises(TransientError, match="another attempt"):
            await stalled.keep()
    async with opened() as following, opened(attempt=2) as stalled:
        assert following.base == kept
        await work(following, "following")
        await following.keep()
        await work(stalled, "stalled")
        with pytest.raises(TransientError, match="another attempt"):
            await stalled.keep()


async def test_a_missing_repository_is_permanent(opened: Open, tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="does not appear to be a git repository"):
        async with opened(url=f"file://{tmp_path}/none"):
            pass
    assert list((tmp_path / "root" / str(SESSION)).iterdir()) == []


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


@pytest.fixture
def deaf() -> Iterator[int]:
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def test_network_trouble_is_transient(opened: Open, deaf: int, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    with pytest.raises(TransientError, match="onnect"):
        async with opened(url=f"https://127.0.0.1:{closed}/x"):
            pass
    git = Git({"HOME": str(home)}, timeout=1)
    with pytest.raises(TransientError, match="git clone took over 1 seconds"):
        async with opened(url=f"https://127.0.0.1:{deaf}/x", git=git):
            pass


async def test_no_hook_runs(opened: Open, home: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    def plant(hooks: Path) -> None:
        hooks.mkdir(parents=True, exist_ok=True)
        for name in ("post-checkout", "pre-commit", "post-commit", "pre-push", "post-index-change"):
            (hooks / name).write_text(f"#!/bin/sh\ntouch {ran}\n")
            (hooks / name).chmod(0o755)

    plant(home / "template" / "hooks")
    (home / ".gitconfig").write_text(f"[init]\ntemplateDir = {home}/template\n")
    async with opened() as workspace:
        plant(workspace.path / ".git" / "hooks")
        await work(workspace, "no-commit leave:x")
        await workspace.keep()
        assert len(await workspace.commits()) == 1
    assert not ran.exists()


HOLDER = """
import sys, time
from pathlib import Path
from outwake.worker.repo.workspace import _claim
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
