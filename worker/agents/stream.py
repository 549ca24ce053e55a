"""Convert an agent's output into lines that Postgres can store.

A stored line is a JSON object, one row of `message`. An agent may print anything. Text that jsonb would
refuse is changed, and the line says so under `outwake_note`:

| printed | stored |
|---|---|
| a JSON object | the object |
| another JSON value | `{"type": "json", "value": …}` |
| anything else | `{"type": "text", "text": …}` |
| a line over the limit | `{"type": "truncated", "bytes": N, "head": "…"}`: its first 4 KiB |
| an empty line | none |
"""

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from outwake.worker.agents.base import AgentLine

# An agent's tool results, apart from images, are well below this limit. A parsed line can take 50 times its
# size, so with this limit a worker of ten sessions fits into a small container.
LINE_LIMIT = 1 << 20
HEAD = 4096
# Far more than any real event has, far less than breaks json.dumps or the readers downstream.
DEPTH = 100

NOTE = "outwake_note"
_BYTES = "bytes that are not UTF-8 were replaced"
_CHARACTERS = "characters that cannot be stored were replaced"
_NUMBERS = "numbers that JSON does not have were made strings"
_NESTING = f"nesting deeper than {DEPTH} was cut"


class RawLine(NamedTuple):
    """A line without its newline. If it is longer than the limit, `head` is its beginning."""

    head: bytes
    size: int


class Splitter:
    """Cuts output into lines. Holds one line of at most `limit` bytes."""

    def __init__(self, limit: int = LINE_LIMIT) -> None:
        self._limit = limit
        self._line = bytearray()
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[RawLine]:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._add(chunk[start:end])
            yield from self.finish()
            start = end + 1
        self._add(chunk[start:])

    def finish(self) -> Iterator[RawLine]:
        """End the line. Call it at the end of the output; `feed` calls it at a newline."""
        line, size = bytes(self._line), self._size
        self._line, self._size = bytearray(), 0
        if line.strip():
            yield RawLine(line[:HEAD] if size > self._limit else line, size)

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= self._limit:
            self._line += piece
        elif len(self._line) < HEAD:
            self._line = (self._line + piece)[:HEAD]
        else:
            del self._line[HEAD:]


def stored(raw: RawLine) -> AgentLine | None:
    """The stored form of a line; None if it is blank. Never raises."""
    return parsed(raw.head) if len(raw.head) == raw.size else truncated(raw.head, raw.size)


def parsed(line: bytes) -> AgentLine | None:
    """The stored form of a line within the limit."""
    line = line.strip()
    if not line:
        return None
    notes: set[str] = set()
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = line.decode(errors="replace")
        notes.add(_BYTES)
    # Only an escape can hide a NUL or a lone surrogate, and only brackets nest. So most lines need no
    # further check.
    suspect = "\\u" in text or text.count("{") + text.count("[") > DEPTH
    try:
        value = _Decoder(notes).decode(text)
    except RecursionError:
        notes.add(_NESTING)
        return _noted({"type": "text", "text": text.replace("\0", "\ufffd")}, notes)
    except ValueError:  # not JSON, or a number with too many digits
        return _noted({"type": "text", "text": _clean(text, notes)}, notes)
    if suspect:
        value = _storable(value, DEPTH, notes)
    return _noted(value if isinstance(value, dict) else {"type": "json", "value": value}, notes)


def truncated(head: bytes, size: int) -> AgentLine:
    """The stored form of a line that is too long. size: of the line, in bytes. head: its beginning."""
    text = head[:HEAD].decode(errors="replace").rstrip("\ufffd")
    return {"type": "truncated", "bytes": size, "head": _clean(text, set())}


class _Decoder(json.JSONDecoder):
    """Decodes JSON as Python does, but NaN and Infinity (also 1e999) become strings."""

    def __init__(self, notes: set[str]) -> None:
        def string(text: str) -> str:
            notes.add(_NUMBERS)
            return text

        def number(text: str) -> float | str:
            value = float(text)
            return value if math.isfinite(value) else string(text)

        super().__init__(parse_constant=string, parse_float=number)


def _storable(value: Any, depth: int, notes: set[str]) -> Any:
    if isinstance(value, str):
        return _clean(value, notes)
    if isinstance(value, dict | list) and depth == 0:
        notes.add(_NESTING)
        return "\u2026"
    if isinstance(value, dict):
        return {_clean(key, notes): _storable(item, depth - 1, notes) for key, item in value.items()}
    if isinstance(value, list):
        return [_storable(item, depth - 1, notes) for item in value]
    return value


def _clean(text: str, notes: set[str]) -> str:
    cleaned = text.replace("\0", "\ufffd")
    try:
        cleaned.encode()
    except UnicodeEncodeError:
        cleaned = cleaned.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if cleaned != text:
        notes.add(_CHARACTERS)
    return cleaned


def _noted(made: AgentLine, notes: set[str]) -> AgentLine:
    return {**made, NOTE: sorted(notes)} if notes else made
