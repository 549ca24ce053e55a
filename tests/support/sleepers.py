"""What becomes of a row beside a worker that sleeps, and the end of its connections."""

from tests.support.steps import Connection, get, one
from tests.support.worker import ObservedWorker


async def runs(worker: ObservedWorker, row_id: int) -> None:
    """The row is not missed."""
    await worker.has_run(row_id)


async def is_missed(worker: ObservedWorker, conn: Connection, row_id: int) -> None:
    """The harm: the worker sleeps, nothing will wake it, and the row waits."""
    await worker.asleep()
    assert await worker.sleeps_for_ever(conn)
    assert await get(conn, row_id) == "ready"


async def end_listener(conn: Connection) -> None:
    """Cut the worker's LISTEN connection as an operator would."""
    await end_session(conn, "outwake worker listen")


async def end_session(conn: Connection, name: str) -> None:
    query = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE application_name = %s AND datname = current_database()"
    )
    assert await one(conn, query, name)
