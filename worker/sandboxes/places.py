"""Directories of attempts on this host.

    ROOT/SESSION/RUN-ATTEMPT          a directory sandbox (worker/sandboxes/directory.py)
    ROOT/SESSION/RUN-ATTEMPT-agent    what an agent needs on this worker, its HOME for instance

Attempts never share a directory, so an attempt that lost its lease and still runs does not harm its
successor. An attempt removes its directories when it ends, and the session's with the last of them. If its
worker died, the session's next attempt on this host removes them, or the return of the sandbox: a live worker
holds a lock on each, and the kernel drops that lock with the process.
"""

import asyncio
import fcntl
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import UUID

from outwake.telemetry.log import get_logger
from outwake.worker.errors import TransientError

log = get_logger(__name__)


def attempt_directory(root: Path, session: UUID, run: UUID, attempt: int) -> Path:
    """The path of that attempt's directory sandbox, whether or not it exists."""
    return root / str(session) / f"{run}-{attempt}"


def agent_directory(root: Path, session: UUID, run: UUID, attempt: int) -> Path:
    """The path of the directory for that attempt's agent, whether or not it exists."""
    return root / str(session) / f"{run}-{attempt}-agent"


@asynccontextmanager
async def own_directory(place: Path) -> AsyncIterator[Path]:
    """Make the directory, and remove it on leaving. Also removes those of the session's dead attempts.

    Raises TransientError if the directory can't be made.
    """
    try:
        lock = _claim(place)
    except OSError as error:
        raise TransientError(f"cannot make a workspace: {error.strerror}") from error
    try:
        await asyncio.to_thread(_remove_all_dead, place)
        yield place
    finally:
        await asyncio.shield(asyncio.to_thread(_remove, place, lock))


def _claim(place: Path) -> int:
    """Make the directory, lock it and return the lock. Close the lock when the directory is removed.

    Another attempt may take the directory for dead and remove it before we lock it. The lock then belongs to
    a directory without a name, and we start again.
    """
    while True:
        with suppress(FileExistsError, FileNotFoundError):  # the session's may be removed meanwhile
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            place.mkdir(mode=0o700)
        try:
            lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
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


def _remove_all_dead(own: Path) -> None:
    """Remove the directories of the same session's attempts whose worker is dead."""
    for place in own.parent.iterdir():
        if place != own and place.name != "mirror.git":  # the session's work, kept by version 1.0
            remove_dead(place)


def remove_dead(place: Path) -> None:
    """Remove an attempt's directory unless its worker lives; a live worker removes its own."""
    with suppress(OSError):  # locked, or gone
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
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
            log.warning("workspace_not_removed", path=str(place), error=str(error))
    finally:
        os.close(lock)
    with suppress(OSError):  # other attempts are there
        place.parent.rmdir()


def _make_writable(place: Path) -> None:
    os.chmod(place, 0o700)
    for parent, directories, _ in os.walk(place):  # top down: writable before it is entered
        for name in directories:
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(0o700)
