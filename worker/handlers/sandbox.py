"""Topic `sandbox.return`: gives a sandbox back.

Its row was written in the transaction that ended the session's work, so it is owed whatever happened to
the worker. It never gives up: it backs off, and its age is what monitoring alerts on.
"""

from pathlib import Path

from outbox.handler import Handler, Job
from outbox.settings import load
from worker.local import LocalAllocator

TOPIC = "sandbox.return"


async def give_back(job: Job) -> None:
    """Return the sandbox named in the payload. Giving it back twice does no harm, so nothing is fenced."""
    await LocalAllocator(Path(load().workspace_root)).give_back(job.payload["sandbox"])


handler = Handler(TOPIC, give_back)
