"""When a single announced row is left to a full scan."""

from typing import Any, cast

import pytest

from outwake import Handler, Job
from outwake.settings import Settings
from outwake.worker.engine.fastpath import FastPath
from outwake.worker.engine.parking import Stage
from outwake.worker.engine.parts import Parts
from outwake.worker.engine.wakes import Reason
from outwake.worker.engine.worker import Worker


async def nothing(job: Job) -> None:
    """A handler with nothing to do."""


@pytest.fixture
async def parts() -> Parts:
    """A worker that is parked."""
    handlers = {"t": Handler("t", nothing)}
    parts = Worker(Settings(database_url="postgresql://nowhere.invalid"), handlers, 3).parts
    parts.parking.stage = Stage.PARKED
    parts.wakes.reasons.clear()
    return parts


async def hears(parts: Parts, *rows: int) -> set[Reason]:
    """Why it scans, if it hears of these rows before its next cycle. It claims none of them by its id: that
    would need a connection.
    """
    path = FastPath(
        cast(Any, None), cast(Any, None), parts.running, parts.parking, parts.wakes, parts.observer
    )
    for row in rows:
        path.announced(row)
    assert await path.take(1.0) is None
    return parts.wakes.reasons


async def test_several_rows_are_scanned_for(parts: Parts) -> None:
    assert await hears(parts, 5, 6) == {Reason.SINGLES}


async def test_a_row_is_a_reason_of_its_own_beside_a_background_scan(parts: Parts) -> None:
    """The scan that follows a background scan looks only where that has seen rows, and after the cursors."""
    parts.wakes.reasons.add(Reason.BACKGROUND)
    assert Reason.SINGLES in await hears(parts, 5)


async def test_the_last_free_slot_is_filled_by_a_scan(parts: Parts) -> None:
    parts.running.arriving = 2
    assert await hears(parts, 5) == {Reason.SINGLES}
