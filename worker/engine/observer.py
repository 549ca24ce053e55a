"""What a worker tells while it works, for a test or a program that watches it.

The hooks do nothing here. They run on the worker's event loop, between its steps, so they must not block.
"""

from collections.abc import Sequence
from typing import Literal

from outwake._claim import Claimed

Step = Literal["connect", "claim", "park", "writers", "schedule", "sleep", "leave"]
"""connect: before it connects. claim: before a scan. park: before it sets its parked flag. writers: before it
asks which transactions write. schedule: before it asks for the next deadlines. sleep: before it sleeps, once
it is parked. leave: before it ends its life."""


class WorkerObserver:
    """Override the hooks of what you want to know."""

    async def step(self, step: Step) -> None:
        """The worker is about to take this step. It waits there until this returns."""

    def scanned(self) -> None:
        """A scan was answered; its rows may still have to be read."""

    def asked(self, row_id: int) -> None:
        """The worker claims a single row by its id."""

    def claimed(self, rows: Sequence[Claimed]) -> None:
        """These rows were claimed, and their handlers were started."""

    def renewed(self) -> None:
        """The lease was renewed."""

    def heard(self, channel: str, payload: str) -> None:
        """A notification came, and the worker has taken note of it."""

    def parked(self) -> None:
        """The parking protocol is over: nothing is due that the worker could claim."""

    def sleeps(self, until: float) -> None:
        """The worker waits for something to happen, until this time of the monotonic clock."""
