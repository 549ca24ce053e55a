"""Where a turn's agent runs, and how its files get there and back.

| the sandbox | the agent runs | its files are |
|---|---|---|
| is reached by MCP | on this worker | in a directory of this worker (worker/sandboxes/places.py) |
| is none such | in the sandbox, where `Sandbox.agent_command` brings it | in `agent` beside the work tree |

In both cases the worker starts the command under its guardian, and removes the files with the attempt or
before the next one.
"""

import asyncio
import os
import tarfile
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from outwake.telemetry.log import get_logger
from outwake.worker.agents.archive import pack, plain, unpack
from outwake.worker.agents.base import Box, Command
from outwake.worker.errors import PermanentError
from outwake.worker.sandboxes.base import Sandbox
from outwake.worker.sandboxes.files import DIGEST, again, digest_of, read_file

MEMORY_LIMIT = 32 * 2**20
"""Bytes of an agent's memory, compressed. A larger one is not stored."""

_CLEAR = 'umask 077; rm -rf "$1"; mkdir -p "$1/home"'
_UNPACK = 'umask 077; cd "$1/home"; tar -xzf ../memory.tar.gz; rm ../memory.tar.gz'
_PACK = (
    """
umask 077; cd "$1/home"; rm -f ../memory.tar.gz
if ! test -d "$2"; then exit; fi
tar -czf ../memory.tar.gz "$2"
set -- ../memory.tar.gz
"""
    + DIGEST
)

log = get_logger(__name__)


class AgentPlace(Protocol):
    """Where an agent runs, for one attempt."""

    box: Box

    async def lay_out(self, command: Command) -> Command:
        """Write the command's files, readable by nobody else, and its HOME. Returns what this worker starts.

        Raises SessionError or StepError.
        """

    async def memory(self, below: str) -> bytes | None:
        """The files below that path of HOME, as a tar.gz; None if there are none, or too much to store.

        Raises OSError, tarfile.TarError, SessionError or StepError if they cannot be read.
        """


def place_of(sandbox: Sandbox, tree: str, directory: Path) -> AgentPlace:
    """tree: the work tree in the sandbox. directory: of this worker, for this attempt's agent."""
    config = sandbox.mcp_config()
    if config is None:
        return _Inside(sandbox, Box(tree, f"{tree.rpartition('/')[0]}/agent"))
    return _OnWorker(sandbox, Box(tree, str(directory), config))


class _OnWorker:
    def __init__(self, sandbox: Sandbox, box: Box) -> None:
        self.box = box
        self._sandbox = sandbox

    async def lay_out(self, command: Command) -> Command:
        await asyncio.to_thread(self._write, command)
        return self._sandbox.agent_command(_with_home(command, self.box))

    def _write(self, command: Command) -> None:
        for name, content in command.files.items():
            path = Path(self.box.place, name)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
        if command.home is not None:
            Path(self.box.home).mkdir(mode=0o700)
        if command.home:
            with _unpacking():
                unpack(command.home, Path(self.box.home))

    async def memory(self, below: str) -> bytes | None:
        home = Path(self.box.home)
        if not (home / below).is_dir():
            return None
        packed = await asyncio.to_thread(pack, home, Path(below), MEMORY_LIMIT)
        if packed is None:
            log.warning("transcript_too_large")
        return packed


class _Inside:
    def __init__(self, sandbox: Sandbox, box: Box) -> None:
        self.box = box
        self._sandbox = sandbox

    async def lay_out(self, command: Command) -> Command:
        place, write = self.box.place, self._sandbox.write
        if command.files or command.home is not None:
            await self._sandbox.run("prepare the agent", _CLEAR, place)
        for name, content in command.files.items():
            await write(f"{place}/{name}", content.encode())
        if command.home:
            # It may come from another sandbox, where the agent could make it anything.
            with _unpacking():
                checked = await asyncio.to_thread(plain, command.home)
            await write(f"{place}/memory.tar.gz", checked)
            await self._sandbox.run("unpack the agent's memory", _UNPACK, place)
        return self._sandbox.agent_command(_with_home(command, self.box))

    async def memory(self, below: str) -> bytes | None:
        step = "read the agent's memory"

        def run(script: str, *arguments: str) -> Coroutine[Any, Any, str]:
            return again(step, lambda: self._sandbox.run(step, script, *arguments))

        told = await run(_PACK, self.box.place, below)
        if not told:
            return None
        digest, size = digest_of(told)
        if size > MEMORY_LIMIT:
            log.warning("transcript_too_large")
            return None
        return await read_file(run, f"{self.box.place}/memory.tar.gz", digest, size)


def _with_home(command: Command, box: Box) -> Command:
    """The command, with HOME if it has one of its own."""
    return command if command.home is None else replace(command, env={**command.env, "HOME": box.home})


@contextmanager
def _unpacking() -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise PermanentError(f"the agent's memory cannot be unpacked: {error}") from error
