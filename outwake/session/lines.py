"""What a stored line of an agent means, whatever kind of agent printed it.

A line is read long after it was printed, by the dashboard or `outwake tail`, and it does not name its kind.
So its own form tells which reader it belongs to, and `read` is not a part of AgentAdapter
(worker/agents/base.py).

A reader is a function. It gets a JSON object and returns its events, or None if the line is not of its form.
It never raises, its work is linear in the size of the line, and it returns a bounded number of events.

To add a reader: write a module like outwake/session/claude.py, and name its function in _READERS. A form that
another kind uses too for something else must be told apart by a field that only one of them has.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from outwake.session import claude
from outwake.session.events import AgentEvent, Result, Superseded, Text, Unknown, count, unknown


def read(body: Any) -> Iterable[AgentEvent]:
    """The events of one stored line. Never raises."""
    if isinstance(body, dict):
        for reader in _READERS:
            if (events := reader(body)) is not None:
                return events
    return [unknown(body)]


def result_of(body: Any) -> Result | None:
    """The result event that a stored line is, if it is one."""
    return next((event for event in read(body) if isinstance(event, Result)), None)


def _ours(body: Mapping[str, Any]) -> Iterable[AgentEvent] | None:
    """Lines that Outwake makes: of output that is no JSON object (worker/agents/stream.py), of attempts."""
    match body:
        case {"type": "text", "text": str(text)}:
            return [Text(text, "output")]
        case {"type": "superseded"}:
            return [Superseded(count(body.get("attempt")))]
        case {"type": "truncated", "head": str(head)}:
            return [Unknown(f"a line of {count(body.get('bytes')) or 'many'} bytes, its beginning", head)]
    return None


_READERS: tuple[Callable[[Mapping[str, Any]], Iterable[AgentEvent] | None], ...] = (_ours, claude.read)
