"""Topics of OUTWAKE_RELAY_TOPICS: publishes their rows to NATS JetStream, for fan-out beyond Postgres.

1. The message body is the payload's text from Postgres, not Python's reading of it: no number loses digits.
2. The message id is the same for all attempts at a row, so that JetStream drops duplicates. No other row may
   have the same id, because its message would be lost. That includes rows of another database, of a clone,
   and of a restored backup, which assigns the same row ids again. So the message id consists of the cluster,
   the database, the row's id and its creation time.
3. The row ends only when JetStream has acknowledged the message. If the worker dies before, another worker
   publishes the message again under the same id.

If NATS cannot be reached, nothing was sent and no row is at fault: the row is handed back without a failure.
So an outage of any length makes no row dead and keeps the order of each key. A message that was sent but not
acknowledged counts as a failure, with backoff. A message that is too large makes its row dead at once:
no retry can help.
"""

from datetime import timedelta
from urllib.parse import quote

from nats.errors import Error
from nats.js.errors import APIError, NoStreamResponseError

from outwake.errors import ConfigurationError, Fenced, HandBack, Permanent, Retry
from outwake.handler import Handler, Job
from outwake.schema import in_schema
from outwake.session.names import check_topics
from outwake.settings import Settings
from outwake.telemetry.log import get_logger
from outwake.worker.handlers.backoff import backoff
from outwake.worker.handlers.jetstream import TIMEOUT, JetStream, TooLarge, Unreachable, read_credentials

FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0  # seconds

_STREAM_TAKES_NO_SUCH_SIZE = 10054
"""JSStreamMessageExceedsMaximumErr, from nats-server's server/errors.json."""

_VISIBLE = "".join(map(chr, range(0x21, 0x7F))).replace("%", "")

# pg_control_system reads a file, which is cheap.
_MESSAGE = in_schema("""
    WITH made AS (
        SELECT payload, to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS at
        FROM :schema.outbox
        WHERE id = %(id)s AND attempt = %(attempt)s AND worker_id = %(worker)s AND state = 'running'
    )
    SELECT payload::text, at, concat_ws('.', system_identifier, oid, %(id)s::bigint, at)
    FROM made, pg_control_system(), pg_database
    WHERE datname = current_database()
""")

log = get_logger(__name__)


class Relay:
    """The handlers of the relayed topics, and the connection that they share."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigurationError. Opens no connection yet."""
        if settings.relay_url is None:
            raise ConfigurationError("OUTWAKE_RELAY_URL: is not set, and OUTWAKE_RELAY_TOPICS is")
        if settings.relay_credentials is not None:
            read_credentials(settings.relay_credentials)
        servers = [server.strip() for server in settings.relay_url.get_secret_value().split(",")]
        self._jetstream = JetStream(servers, settings.relay_credentials)
        self._prefix = settings.relay_prefix
        topics = check_topics(settings.relay_topics)
        self.handlers = {
            topic: Handler(topic, self.publish, timedelta(seconds=60), built_in=True) for topic in topics
        }

    async def publish(self, job: Job) -> None:
        """Try once. Raises HandBack, Retry or Permanent."""
        body, headers = await _message(job)
        subject = f"{self._prefix}.{job.row.topic}"
        try:
            ack = await self._jetstream.publish(subject, body, headers)
        except Unreachable as error:
            pause = backoff(FIRST_PAUSE, LAST_PAUSE, job.row.attempt - 1)
            raise HandBack(f"NATS cannot be reached: {error}", pause) from error
        except TooLarge as error:
            raise Permanent(f"the message is too large: {error}") from error
        except NoStreamResponseError as error:
            raise Retry(f"no stream takes the subject {subject}") from error
        except APIError as error:
            if error.err_code == _STREAM_TAKES_NO_SUCH_SIZE:
                raise Permanent(f"the message is too large: {error.description}") from error
            raise Retry(f"JetStream refused it: {error.description} ({error.err_code})") from error
        except TimeoutError as error:
            raise Retry(f"not acknowledged in {TIMEOUT:g} s") from error
        except Error as error:
            raise Retry(f"not published: {error}") from error
        log.debug("relayed", stream=ack.stream, seq=ack.seq, duplicate=bool(ack.duplicate))

    async def close(self) -> None:
        """Close the connection."""
        await self._jetstream.close()


async def _message(job: Job) -> tuple[bytes, dict[str, str]]:
    """Body and headers. Raises Fenced if the row no longer belongs to this attempt."""
    row_id, attempt = job.token
    async with job.connection() as conn:
        # Not prepared: a plan made while the outbox was empty would scan it completely.
        values = {"id": row_id, "attempt": attempt, "worker": job.worker_id}
        cursor = await conn.execute(_MESSAGE, values, prepare=False)
        found = await cursor.fetchone()
    if found is None:
        raise Fenced(row_id, attempt)
    payload, created_at, message_id = found
    headers = {
        "Nats-Msg-Id": message_id,
        "Outwake-Row": str(row_id),
        "Outwake-Attempt": str(attempt),
        "Outwake-Created-At": created_at,
    }
    if job.row.ordering_key is not None:
        headers["Outwake-Ordering-Key"] = quote(job.row.ordering_key, safe=_VISIBLE)
    if job.traceparent is not None:
        headers["traceparent"] = job.traceparent
    return payload.encode(), headers
