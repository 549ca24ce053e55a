"""An agent's output as a person reads it: text, folded tool calls with their results, and the outcome.

It shows the events of outwake/session/events.py. An event of no known form is shown as JSON, so nothing is
hidden. A tool's result is shown in its call's slot. The script moves a result that comes later into the slot
that it names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

from outwake.app.dashboard.markdown import Budget, to_html
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
from outwake.session.lines import read, result_of

LONGEST = 20_000  # characters shown of one text; the API has the rest
_BRIEF = 160
_TELLING = ("description", "command", "file_path", "pattern", "path", "url", "query", "prompt")


@dataclass
class Block:
    """A part of a message. `kind` is text, thinking, tool, tool-result, result, note or event."""

    kind: str
    text: str = ""
    title: str = ""
    brief: str = ""
    html: str = ""
    key: str = ""
    """The id of a tool call. Its result has the same id."""
    slot: str = ""
    """The id of the element on the page that shows a call's result. The call and the result have it."""
    failed: bool = False
    result: "Block | None" = None
    cut: int = 0
    """How many characters were left out."""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Message:
    seq: int
    at: str
    blocks: list[Block]


@dataclass
class AttemptOutput:
    """The messages of one attempt of a turn. Only the last attempt counts."""

    number: int
    messages: list[Message]


def attempts_of(
    messages: Sequence[dict[str, Any]], budget: Budget | None = None
) -> dict[str, list[AttemptOutput]]:
    """The attempts by prompt id. `messages` are as the API lists them."""
    budget = budget or Budget()
    found: dict[str, list[AttemptOutput]] = {}
    calls: dict[str, Block] = {}
    for message in messages:
        prompt, number = message["prompt_id"], message["attempt"]
        attempts = found.setdefault(prompt, [])
        if not attempts or attempts[-1].number != number:
            attempts.append(AttemptOutput(number, []))
        kept = []
        for block in blocks_of(message["body"], budget):
            if block.key:
                block.slot = f"s-{prompt}-{number}-{block.key}"
            if block.kind == "tool":
                calls[block.slot] = block
            if block.kind == "tool-result" and (call := calls.get(block.slot)) and call.result is None:
                call.result = block
            else:
                kept.append(block)
        if kept:
            attempts[-1].messages.append(Message(message["seq"], message["created_at"], kept))
    return found


def blocks_of(body: Any, budget: Budget | None = None) -> Iterator[Block]:
    """The parts of one stored line, of any form."""
    budget = budget or Budget()
    for event in read(body):
        if not isinstance(event, Superseded):
            yield _block(event, budget)


def _block(event: AgentEvent, budget: Budget) -> Block:
    match event:
        case Text(text):
            return _prose(text, budget)
        case Thinking(text):
            return _clipped("thinking", text, title="Thinking")
        case ToolCall(key, name, given):
            return _clipped("tool", _given(given), title=name, brief=_brief(given), key=key)
        case ToolResult():
            return _clipped("tool-result", event.text, key=event.key, failed=event.failed)
        case Started():
            return Block("note", _started(event))
        case Result():
            text = event.text if event.error is None else event.error
            failed = event.error is not None
            return _clipped("result", text, title=event.kind, failed=failed, facts=facts_of(event))
        case Unknown():
            return _clipped("event", event.text, title=event.name)
        case Superseded():
            return Block("note")


def _prose(text: str, budget: Budget) -> Block:
    """Without `html`, the text is shown as it is."""
    block = _clipped("text", text)
    block.html = to_html(block.text, budget)
    return block


def _clipped(kind: str, text: str, **more: Any) -> Block:
    return Block(kind, text[:LONGEST], cut=max(0, len(text) - LONGEST), **more)


def _given(given: Any) -> str:
    """A tool's input as text, because multi-line strings are hard to read in JSON."""
    if not isinstance(given, dict) or not all(
        isinstance(value, str | int | float) for value in given.values()
    ):
        return pretty(given)
    if len(given) == 1:
        return str(next(iter(given.values())))
    return "\n".join(
        f"{name}:\n{indent(value, '  ')}" if isinstance(value, str) and "\n" in value else f"{name}: {value}"
        for name, value in given.items()
    )


def _brief(given: Any) -> str:
    if not isinstance(given, dict):
        return ""
    values = [given[name] for name in _TELLING if isinstance(given.get(name), str)]
    words = " ".join(values[0].split()) if values else ""
    return words if len(words) <= _BRIEF else words[: _BRIEF - 1] + "…"


def _started(event: Started) -> str:
    words = ["Agent started"]
    if event.model is not None:
        words.append(f"model {event.model}")
    if event.tools is not None:
        words.append(f"{event.tools} tools")
    return " · ".join(words)


def facts_of(result: Result | None) -> dict[str, Any]:
    """cost (USD), seconds, turns, tokens_in and tokens_out of a result. Unknown ones are left out."""
    if result is None:
        return {}
    found = {
        "cost": result.cost,
        "seconds": result.seconds,
        "turns": result.turns,
        "tokens_in": result.tokens.read,
        "tokens_out": result.tokens.output,
    }
    return {name: value for name, value in found.items() if value is not None}


def outcome_of(result: Any) -> dict[str, Any]:
    """The content of prompt.result: `facts` of the agent's result, and `commits` as (sha, subject)."""
    result = result if isinstance(result, dict) else {}
    commits = result.get("commits")
    return {
        "facts": facts_of(result_of(result.get("agent"))),
        "commits": [
            (str(commit.get("sha", "")), str(commit.get("subject", "")))
            for commit in (commits if isinstance(commits, list) else [])
            if isinstance(commit, dict)
        ],
    }
