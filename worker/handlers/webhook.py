"""Topic `webhook.deliver`: posts an event to a session's callback_url, signed to Standard Webhooks.

Any 2xx is success. Any other answer is retried, by backoff or after the Retry-After, until the row is dead.
An operator may then retry the row. 410 Gone means that the receiver wants no more events: the session's
callback_url is removed. A row whose URL is not allowed is dead at once.

An error text quotes the status, never the answer's body: a user must not use it to read what is behind a URL.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from outwake.errors import Permanent, Retry
from outwake.handler import Handler, Job
from outwake.schema import in_schema
from outwake.session.callback import CallbackError, parse_networks, parse_secrets
from outwake.settings import Settings, load
from outwake.telemetry.log import get_logger
from outwake.worker.handlers.backoff import backoff
from outwake.worker.messages import answer_soon

if TYPE_CHECKING:  # at run time where they are used: an idle worker saves httpx's memory
    import httpx

    from outwake.worker.checked_transport import Resolve

TOPIC = "webhook.deliver"

TIMEOUT = 15.0  # seconds, from name resolution to the answer's head
FIRST_PAUSE, LAST_PAUSE = 5.0, 3600.0  # seconds; 20 tries take 7 to 12 hours
MAX_RETRY_AFTER = 3600  # seconds

_FORGET = in_schema("UPDATE :schema.session SET callback_url = NULL WHERE id = %s AND callback_url = %s")

log = get_logger(__name__)


async def deliver(job: Job) -> None:
    """Try once. Raises Permanent or Retry."""
    import httpx

    answer_soon(job)
    settings = load()
    payload = job.payload
    if not isinstance(payload, dict) or not payload.keys() >= {"event", "id", "url"}:
        raise Permanent("the payload holds no event")
    pause = backoff(FIRST_PAUSE, LAST_PAUSE, job.row.failures)
    body = json.dumps(payload["event"], separators=(",", ":"), ensure_ascii=False).encode()
    try:
        status, retry_after = await post(payload["url"], payload["id"], body, job.traceparent, settings)
    except CallbackError as error:
        raise Permanent(str(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise Retry(f"not delivered: {type(error).__name__}", pause) from error
    log.info("webhook_answered", status=status)
    if status == 410:
        await _forget(job)
        raise Permanent("answered 410: its owner wants no more")
    if not 200 <= status < 300:
        raise Retry(f"answered {status}", max(pause, retry_after))


async def post(
    url: str,
    message_id: str,
    body: bytes,
    traceparent: str | None,
    settings: Settings,
    resolve: "Resolve | None" = None,
) -> tuple[int, timedelta]:
    """Send the message once; return the status and the value of Retry-After.

    Raises CallbackError, httpx.HTTPError, TimeoutError, Retry if no secret is set.
    """
    import httpx

    from outwake.worker.checked_transport import CallbackTransport

    if settings.webhook_secret is None:
        raise Retry("this worker has no OUTWAKE_WEBHOOK_SECRET")
    keys = parse_secrets(settings.webhook_secret.get_secret_value())
    now = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "outwake",
        "webhook-id": message_id,
        "webhook-timestamp": str(now),
        "webhook-signature": sign(keys, message_id, now, body),
        **({"traceparent": traceparent} if traceparent else {}),
    }
    transport = CallbackTransport(parse_networks(settings.webhook_allow), resolve)
    async with (
        httpx.AsyncClient(transport=transport, timeout=TIMEOUT, trust_env=False) as client,
        # A limit for the whole: a receiver that sends a byte now and then would hold us for ever.
        asyncio.timeout(TIMEOUT),
        client.stream("POST", url, content=body, headers=headers) as response,
    ):
        return response.status_code, _retry_after(response)  # the answer's body is not read


def sign(keys: list[bytes], message_id: str, at: int, body: bytes) -> str:
    """The webhook-signature header: `v1,` and base64 for each key."""
    text = f"{message_id}.{at}.".encode() + body
    made = (hmac.digest(key, text, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(signature).decode()}" for signature in made)


def _retry_after(response: "httpx.Response") -> timedelta:
    """Retry-After in seconds. Its other form, a date, is rare and is ignored."""
    given = response.headers.get("retry-after", "")
    seconds = int(given) if re.fullmatch(r"[0-9]{1,9}", given) else 0
    return timedelta(seconds=min(seconds, MAX_RETRY_AFTER))


async def _forget(job: Job) -> None:
    async with job.transaction() as conn:
        await conn.execute(_FORGET, (job.payload["session_id"], job.payload["url"]))


handler = Handler(TOPIC, deliver, timeout=timedelta(seconds=60), line="session", built_in=True)
