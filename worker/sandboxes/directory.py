"""The embedded form of a sandbox: a workspace directory on this host.

It is borrowed and returned by the same protocol as a real sandbox (worker/handlers/session.py), so the
embedded form exercises what production relies on.
"""

import asyncio
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

from outwake.worker.errors import TransientError
from outwake.worker.repo.workspace import attempt_directory, remove_dead

Sandbox = dict[str, Any]
"""What a session holds: {"item", "borrow_token"}; "keep", in seconds, if the next turn may reuse it."""


class Allocator(Protocol):
    """The source of sandboxes."""

    async def borrow(self, intent: UUID, session_id: UUID, run: UUID, attempt: int) -> Sandbox:
        """A sandbox for this attempt, requested under the id `intent`.

        Raises HandBack if none is free, Unclear if one may have been lent, SessionError if none was lent.
        """

    async def give_back(self, sandbox: Sandbox) -> None:
        """Return the sandbox. A second return does no harm. Raises TransientError if it was not accepted."""


class LocalAllocator:
    """Names directories below `root`. On return it removes a directory whose worker died."""

    def __init__(self, root: Path) -> None:
        self._root = root

    async def borrow(self, intent: UUID, session_id: UUID, run: UUID, attempt: int) -> Sandbox:
        """The path of the attempt's directory, which is created when the workspace is opened."""
        place = attempt_directory(self._root, session_id, run, attempt)
        return {"item": {"workspace": str(place.absolute())}, "borrow_token": str(uuid4())}

    async def give_back(self, sandbox: Sandbox) -> None:
        """Remove the directory if its worker died; a live worker removes its own."""
        item = sandbox["item"]
        if not isinstance(item, dict) or "workspace" not in item:
            raise TransientError("IP_ALLOCATOR_URL is not set, and this sandbox is an allocator's")
        place = Path(item["workspace"])
        if place.is_relative_to(self._root.absolute()):
            await asyncio.to_thread(remove_dead, place)
