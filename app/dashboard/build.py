"""Pages are built by threads of their own, so that a large page does not keep the event loop.

A user's pages are built one after the other, so one user's pages do not make another wait for all of them.
"""

import asyncio
import gzip
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from outwake.app.dashboard.formatting import pretty

Made = TypeVar("Made")

LONGEST_NUMBER = 300  # digits; a longer one is shown as a text
PACKED_FROM = 1000  # bytes
DEEPEST = 100  # levels of a row's JSON that are shown
LEVEL = 5  # of gzip: the levels above cost twice the time for some percent

_THREADS = ThreadPoolExecutor(2, "outwake-page")
_TURNS: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]')
_HEAD = re.compile(r'\{"seq": (\d+), "body": ')
_TAIL = re.compile(r', "attempt": (\d+), "prompt_id": "([^"]+)", "created_at": "([^"]+)"\}$')


async def off_loop(user: str, make: Callable[[], Made]) -> Made:
    """Call `make` in a thread, when this user's page before is built."""
    turn = _TURNS.setdefault(user, asyncio.Lock())
    async with turn:
        return await asyncio.get_running_loop().run_in_executor(_THREADS, make)


def packed(text: str, accepted: str) -> tuple[bytes, dict[str, str]]:
    """The body of a page, and its headers. `accepted` is the request's Accept-Encoding."""
    body = text.encode()
    headers = {"Vary": "Accept-Encoding, Cookie"}
    if len(body) < PACKED_FROM or "gzip" not in accepted:
        return body, headers
    return gzip.compress(body, LEVEL), {**headers, "Content-Encoding": "gzip"}


def parse(text: str) -> Any:
    """JSON of the database. A very long number becomes a text: Python would refuse it."""
    return json.loads(text, parse_int=_number)


def _number(digits: str) -> int | str:
    return int(digits) if len(digits) <= LONGEST_NUMBER else digits


def parse_row(text: str) -> Any:
    """A row. Whoever inserts it chooses the payload, so what is nested too deeply to be shown is cut out."""
    depth = begin = 0
    kept = []
    for token in _TOKEN.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth == DEEPEST:
                kept.append(text[begin : token.start()])
        elif token[0] in "]}":
            if depth == DEEPEST:
                kept.append('"\u2026"')
                begin = token.end()
            depth -= 1
    return parse("".join(kept) + text[begin:])


def parse_message(text: str) -> dict[str, Any]:
    """A message. The beginning of its text takes the place of a body that is nested too deeply to parse."""
    try:
        found: dict[str, Any] = parse(text)
        pretty(found["body"])
    except RecursionError:
        head, tail = _HEAD.match(text), _TAIL.search(text[-300:])
        assert head is not None
        assert tail is not None
        body = {"type": "truncated", "bytes": len(text), "head": text[head.end() : head.end() + 20_000]}
        attempt, prompt, at = tail.groups()
        found = {
            "seq": int(head[1]),
            "body": body,
            "attempt": int(attempt),
            "prompt_id": prompt,
            "created_at": at,
        }
    return found
