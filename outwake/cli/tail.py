"""`outwake tail SESSION`: a session's messages as they come."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import psycopg
from rich.text import Text as Styled

from outwake.cli.output import as_json, clean, console
from outwake.session.events import (
    AgentEvent,
    Result,
    Started,
    Superseded,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
    Unknown,
    pretty,
)
from outwake.session.lines import read
from outwake.session.watch import NoSession, follow
from outwake.settings import Settings

_RETRY = 1.0  # seconds
_WIDTH = 200  # characters of a tool's input or result


async def tail(settings: Settings, session_id: UUID, *, after: int, json: bool, until_completed: bool) -> int:
    """Print until interrupted, or until the session has nothing left to run. Returns 1 if the session does
    not exist.
    """
    out = console()
    while True:
        try:
            async with aclosing(follow(settings, session_id, after)) as events:
                async for kind, event in events:
                    if kind == "message":
                        after = event["seq"]
                    if json:
                        print(as_json({"event": kind, **event}), flush=True)
                    else:
                        for line in _lines(kind, event):
                            out.print(line, soft_wrap=True)
                    if (
                        kind == "status"
                        and until_completed
                        and event["inbox_status"] in ("completed", "archived")
                    ):
                        return 0
        except NoSession:
            print(f"outwake: there is no session {session_id}", file=sys.stderr)
            return 1
        except psycopg.OperationalError as error:
            print(f"outwake: {str(error).strip().splitlines()[0]}; reconnecting", file=sys.stderr)
            await asyncio.sleep(_RETRY)


def _lines(kind: str, event: dict[str, Any]) -> Iterator[Styled]:
    if kind == "status":
        yield Styled(f"── {event['inbox_status']}: {clean(event['title'])}", style="bold")
        for prompt in event["prompts"] or []:
            if prompt["reason"]:
                yield Styled(f"   {prompt['status']}: {clean(prompt['reason'])}", style="yellow")
        if pull_request := event["pull_request"]:
            told = pull_request["url"] or f"not opened: {pull_request['error']}"
            yield Styled(f"   pull request: {clean(told)}")
        return
    head = f"{event['created_at'].astimezone():%H:%M:%S} {event['seq']:>5}  "
    for style, text in map(_says, read(event["body"])):
        first, *more = clean(text).splitlines() or [""]
        yield Styled.assemble((head, "dim"), (first, style))
        for line in more:
            yield Styled.assemble(" " * len(head), (line, style))


def _says(event: AgentEvent) -> tuple[str, str]:
    """An event's content as (style, text)."""
    match event:
        case Text(text):
            return "", text
        case Thinking(text):
            return "dim", _short(text)
        case ToolCall(_, name, given):
            return "cyan", f"{name} {_short(given)}"
        case ToolResult():
            return "dim", f"→ {_short(event.text)}"
        case Result():
            price = "" if event.cost is None else f", {event.cost:.4f} USD"
            words = event.text if event.error is None else event.error
            return "green" if event.error is None else "red", f"result: {event.kind}{price} {_short(words)}"
        case Superseded(attempt):
            return "yellow", f"attempt {attempt} is superseded: what it said no longer counts"
        case Started():
            return "dim", f"started: model {event.model}" if event.model else "started"
        case Unknown():
            return "dim", f"{event.name} {_short(event.content)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else pretty(value, 4 * _WIDTH)
    text = " ".join(text[: 4 * _WIDTH].split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
