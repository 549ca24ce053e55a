"""Finalize an attempt that was not simply completed: it failed, was handed back or was cancelled."""

from datetime import timedelta
from uuid import UUID

from outwake._claim import fail, hand_back
from outwake.errors import Fenced
from outwake.handler import Connection
from outwake.schema import in_schema
from outwake.telemetry import trace
from outwake.telemetry.log import get_logger
from outwake.worker.engine.attempt import End, Outcome

log = get_logger(__name__)

_END_CANCELLED = in_schema("SELECT :schema.outbox_end_cancelled(%s, %s, %s)")

_AS_COUNTED = {
    "settled by its handler": "done",
    "ready": "retry",
    "dead": "dead",
    "cancelled": "cancelled",
    "handed back": "handed_back",
    "fenced": "fenced",
}
"""The metrics' name of the state in which an attempt left its row."""


async def finalize(conn: Connection, worker_id: UUID, outcome: Outcome) -> str:
    """Write the outcome. Returns its name in the metrics (worker/engine/metrics.py, OUTCOMES)."""
    job = outcome.job
    try:
        state = await _write(conn, worker_id, outcome)
    except Fenced:
        state = "fenced"
    log.info(
        "ended",
        outbox_id=job.row.id,
        attempt=job.row.attempt,
        topic=job.row.topic,
        state=state,
        reason=outcome.reason or None,
        **trace.log_fields(job.traceparent),
    )
    return _AS_COUNTED[state]


async def _write(conn: Connection, worker_id: UUID, outcome: Outcome) -> str:
    job = outcome.job
    match outcome.end:
        case End.FAIL:
            return await fail(
                conn,
                worker_id,
                job.token,
                outcome.reason,
                delay=outcome.delay,
                permanent=outcome.permanent,
            )
        case End.HAND_BACK:
            back = await hand_back(conn, worker_id, [job.token], outcome.delay or timedelta(0))
            return "handed back" if back else "fenced"
        case End.CANCELLED:
            cursor = await conn.execute(_END_CANCELLED, (worker_id, *job.token))
            ended = await cursor.fetchone()
            assert ended is not None
            return {True: "cancelled", False: "handed back", None: "fenced"}[ended[0]]
        case _:
            return "settled by its handler" if job.settled else "fenced"
