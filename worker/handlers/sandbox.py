"""Topic `sandbox.return`: returns a sandbox.

The row is written in the transaction that ends the session's work, so the return is scheduled even if the
worker dies. The row is retried with backoff without end; monitoring alerts on its age.

The sandbox's kind says which provider gets it. A worker that is not configured for that kind retries the row,
until a worker that is takes it.
"""

from psycopg.types.json import Jsonb

from outwake.errors import Permanent, Retry
from outwake.handler import Handler, Job
from outwake.schema import in_schema
from outwake.settings import load
from outwake.telemetry.log import get_logger
from outwake.worker.errors import SessionError
from outwake.worker.messages import answer_soon
from outwake.worker.sandboxes.choice import provider_of

TOPIC = "sandbox.return"

_LET_GO = in_schema("SELECT :schema.sandbox_let_go(%s, %s::jsonb)")

log = get_logger(__name__)


async def give_back(job: Job) -> None:
    """Return the sandbox named in the payload, unless its session has reused it meanwhile.

    A second return does no harm.
    """
    answer_soon(job)
    payload = job.payload if isinstance(job.payload, dict) else {}
    session_id, held = payload.get("session_id"), payload.get("sandbox")
    if not isinstance(held, dict):
        raise Permanent("the payload holds no sandbox")
    async with job.transaction() as conn:
        cursor = await conn.execute(_LET_GO, (session_id, Jsonb(held)))
        row = await cursor.fetchone()
    if row is not None and not row[0]:
        log.info("sandbox_kept")
        return
    try:
        await provider_of(held, load()).release(held)
    except SessionError as error:
        raise Retry(str(error)) from error
    log.info("sandbox_returned")


handler = Handler(TOPIC, give_back, line="session", built_in=True)
