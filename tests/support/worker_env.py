"""A place where workers run sessions with the scripted agent, and FIFOs to direct it."""

import asyncio
import os
import shlex
import sys
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from tests.support.process import Process, running

LEASE = 2.0
"""Seconds; short, so that a rescue does not take long."""


class WorkerEnv:
    """Where a test's workers run."""

    def __init__(self, database: str, directory: Path) -> None:
        self.directory = directory
        self.environment: Mapping[str, str] = {
            "DATABASE_URL": database,
            "OUTWAKE_LOG_LEVEL": "debug",
            "OUTWAKE_LEASE": str(LEASE),
            "OUTWAKE_ALLOW_FILE_REPOS": "true",
            "OUTWAKE_WORKSPACE_ROOT": str(directory / "workspaces"),
            "OUTWAKE_AGENT_COMMAND": shlex.join([sys.executable, "-P", "-m", "outwake.embedded.agent"]),
            "OUTWAKE_DRAIN_GRACE": "0",
        }

    def worker(self, *arguments: str) -> AbstractAsyncContextManager[Process]:
        return running("worker", *arguments, env=self.environment)

    def fifo(self, name: str) -> Path:
        path = self.directory / name
        os.mkfifo(path)
        return path


async def held(fifo: Path) -> None:
    """Return when an agent and all its children have let go of the FIFO they hold (`hold:PATH`)."""
    await asyncio.to_thread(fifo.read_bytes)
