"""`outwake tail SESSION`: a session's messages as they come."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import psycopg
from rich.text import Text

from outwake.cli.output import as_json, clean, console
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


def _lines(kind: str, event: dict[str, Any]) -> Iterator[Text]:
    if kind == "status":
        yield Text(f"── {event['inbox_status']}: {clean(event['title'])}", style="bold")
        for prompt in event["prompts"] or []:
            if prompt["reason"]:
                yield Text(f"   {prompt['status']}: {clean(prompt['reason'])}", style="yellow")
        return
    head = f"{event['created_at'].astimezone():%H:%M:%S} {event['seq']:>5}  "
    for style, text in _says(event["body"]):
        first, *more = clean(text).splitlines() or [""]
        yield Text.assemble((head, "dim"), (first, style))
        for line in more:
            yield Text.assemble(" " * len(head), (line, style))


def _says(body: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """An event's content as (style, text): the Claude Code CLI's forms, else the event's JSON."""
    content = body["message"].get("content") if isinstance(body.get("message"), dict) else None
    if isinstance(content, str):
        yield "", content
    elif isinstance(content, list):
        for part in content:
            yield _part(part if isinstance(part, dict) else {"type": "text", "text": str(part)})
    elif isinstance(body.get("text"), str):
        yield "", body["text"]
    elif body.get("type") == "result":
        cost = body.get("total_cost_usd")
        price = f", {cost:.4f} USD" if isinstance(cost, int | float) else ""
        yield "green", f"result: {body.get('subtype', '')}{price} {_short(body.get('result', ''))}"
    elif body.get("type") == "superseded":
        yield "yellow", f"attempt {body.get('attempt')} is superseded: what it said no longer counts"
    else:
        yield "dim", _short(as_json(body))


def _part(part: dict[str, Any]) -> tuple[str, str]:
    match part.get("type"):
        case "text":
            return "", str(part.get("text", ""))
        case "tool_use":
            return "cyan", f"{part.get('name')} {_short(as_json(part.get('input')))}"
        case "tool_result":
            return "dim", f"→ {_short(part.get('content'))}"
    return "dim", _short(as_json(part))


def _short(value: Any) -> str:
    text = " ".join((value if isinstance(value, str) else as_json(value)).split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"
