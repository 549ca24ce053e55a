"""Kind `directory`: a directory on this host, without isolation.

    ROOT/SESSION/RUN-ATTEMPT/repo     the clone

The agent runs with the worker's own rights. Steps run with the directory as HOME, so that no Git
configuration, `.netrc` or credential of the worker's account has a part in them. (ssh finds its keys by the
account.)

It is borrowed and given back by the same protocol as every sandbox, so it shows what production relies on.
What the next turn goes on from is in the database, as with every kind: another host serves it as well.
"""

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

from outwake.worker.agents.base import Command
from outwake.worker.errors import TransientError
from outwake.worker.process.guarded import Guarded
from outwake.worker.sandboxes.base import STEP_TIMEOUT, Item, Request, StepError, StepTimeout
from outwake.worker.sandboxes.places import attempt_directory, own_directory, remove_dead

OUTPUT = 16 * 2**20  # bytes that a step may print


class DirectorySandbox:
    """A directory that this worker holds."""

    def __init__(self, place: Path) -> None:
        self._place = place

    async def run(self, step: str, script: str, *arguments: str, timeout: float = STEP_TIMEOUT) -> str:
        """Run the script under the guardian: it ends with the worker, together with all its children."""
        env = {"HOME": str(self._place), "OUTWAKE_HOME": str(self._place)}
        argv = ["sh", "-euc", f"exec 2>&1\n{script}", "sh", *arguments]
        output = bytearray()
        async with Guarded.start(
            argv, cwd=self._place, env=env, deadline=math.inf, grace=1.0, timeout=timeout
        ) as process:
            while chunk := await process.read():
                output += chunk
                if len(output) > OUTPUT:
                    raise TransientError(f"{step}: printed more than {OUTPUT >> 20} MiB")
            ended = await process.wait()
        if ended.cause == "timeout":
            raise StepTimeout(f"{step}: not done within {timeout:g} seconds")
        if ended.cause != "exited":
            raise TransientError(f"{step}: was ended from outside")
        text = output.decode(errors="replace").replace("\0", "\ufffd").rstrip("\n")
        if ended.code:
            raise StepError(step, ended.code, text)
        return text

    async def write(self, path: str, content: bytes) -> None:
        """Write a file that only this account may read."""
        try:
            await asyncio.to_thread(_write, path, content)
        except OSError as error:
            raise TransientError(f"cannot write a file of the workspace: {error.strerror}") from error

    def agent_command(self, command: Command) -> Command:
        """As given: the agent runs on this host."""
        return command

    def mcp_config(self) -> str | None:
        """None: the agent uses its own tools."""
        return None


class DirectoryProvider:
    """Names directories below `root`. The return removes one whose worker died."""

    kind = "directory"

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    async def acquire(self, request: Request) -> Item:
        """The path of the attempt's directory, which is made when it is connected to."""
        place = attempt_directory(self._root, request.session_id, request.run, request.attempt)
        return {"kind": self.kind, "item": {"workspace": str(place)}, "borrow_token": str(uuid4())}

    @asynccontextmanager
    async def connect(self, held: Item) -> AsyncIterator[DirectorySandbox]:
        """Make the directory; it is removed on leaving."""
        place = self._place(held)
        if place is None:
            raise TransientError("the sandbox is a directory of another host")
        async with own_directory(place):
            yield DirectorySandbox(place)

    async def release(self, held: Item) -> None:
        """Remove the directory, unless a worker still has it or it is another host's."""
        if (place := self._place(held)) is not None:
            await asyncio.to_thread(remove_dead, place)

    def _place(self, held: Item) -> Path | None:
        """The directory, which is ROOT/SESSION/NAME whatever the item says; None for any other path."""
        item = held.get("item")
        named = item.get("workspace") if isinstance(item, dict) else None
        if not isinstance(named, str) or "\0" in named:
            return None
        place = Path(named)
        if ".." in place.parts or place.parent.parent != self._root or place.parent.is_symlink():
            return None
        return place


def _write(path: str, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)
