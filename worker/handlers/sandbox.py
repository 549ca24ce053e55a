"""Topic `sandbox.return`: returns a sandbox.

The row is written in the transaction that ends the session's work, so the return is scheduled even if the
worker dies. The row is retried with backoff without end; monitoring alerts on its age.
"""

from psycopg.types.json import Jsonb

from outwake.errors import Retry
from outwake.handler import Handler, Job
from outwake.schema import in_schema
from outwake.settings import load
from outwake.telemetry.log import get_logger
from outwake.worker.errors import SessionError
from outwake.worker.sandboxes.allocator import allocator

TOPIC = "sandbox.return"

_LET_GO = in_schema("SELECT :schema.sandbox_let_go(%s, %s::jsonb)")

log = get_logger(__name__)


async def give_back(job: Job) -> None:
    """Return the sandbox named in the payload, unless its session has reused it meanwhile.

    A second return does no harm.
    """
    session_id, sandbox = job.payload.get("session_id"), job.payload["sandbox"]
    async with job.transaction() as conn:
        cursor = await conn.execute(_LET_GO, (session_id, Jsonb(sandbox)))
        row = await cursor.fetchone()
    if row is not None and not row[0]:
        log.info("sandbox_kept")
        return
    try:
        await allocator(load()).give_back(sandbox)
    except SessionError as error:
        raise Retry(str(error)) from error
    log.info("sandbox_returned")


handler = Handler(TOPIC, give_back, line="session", built_in=True)
