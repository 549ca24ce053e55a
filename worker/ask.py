"""One HTTP request to an allocator, a sandbox or a Git host, whose answer is limited in size and in time.

Whoever is root in a sandbox may answer anything: gigabytes, a few compressed bytes that become gigabytes, or
a byte a minute. So the answer is read as it comes and counted, it is asked for uncompressed, and the whole
request has a time limit. No redirect is followed.
"""

import asyncio
import json
from typing import Any, NamedTuple

import httpx

CONNECT = 10.0  # seconds
LIMIT = 16 * 2**20  # bytes of an answer: far more than any step prints
_IN_LOOP = 64 * 1024  # bytes of JSON that are parsed in a millisecond


class NoAnswer(Exception):
    """The answer did not come, or not in time, or was too large. The request may have had its effect."""


class NotSent(NoAnswer):
    """No connection could be made, so the request had no effect."""


class Answer(NamedTuple):
    status: int
    headers: httpx.Headers
    json: Any
    """None in place of an answer that is not JSON."""


async def ask(
    client: httpx.AsyncClient,
    method: str,
    path: str,
    *,
    seconds: float,
    limit: int = LIMIT,
    body: Any = None,
    query: dict[str, str | float] | None = None,
) -> Answer:
    """The answer. seconds: for the whole request. limit: bytes of the answer. Raises NoAnswer."""
    try:
        async with (
            asyncio.timeout(seconds),
            client.stream(
                method,
                path,
                json=body,
                params=query,
                headers={"Accept-Encoding": "identity"},
                timeout=httpx.Timeout(seconds, connect=CONNECT),
            ) as response,
        ):
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > limit:
                    raise NoAnswer(f"its answer has more than {limit >> 20} MiB")
            status, headers = response.status_code, response.headers
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise NotSent(type(error).__name__) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoAnswer(type(error).__name__) from error
    except TimeoutError:
        raise NoAnswer(f"its answer took over {seconds:g} s") from None
    if len(content) <= _IN_LOOP:
        return Answer(status, headers, _parsed(content))
    return Answer(status, headers, await asyncio.to_thread(_parsed, content))


def _parsed(content: bytearray) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
