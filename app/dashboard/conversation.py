"""An agent's output as a person reads it: text, folded tool calls with their results, and the outcome.

This reads the events of the Claude Code CLI (`--output-format stream-json`). An event of any other kind is
shown as JSON, so nothing is hidden. A tool's result is shown below its call if both are on the page. The
script does the same with results that come later.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from textwrap import indent
from typing import Any

from outwake.app.dashboard.markdown import to_html
from outwake.app.dashboard.words import pretty

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
class Attempt:
    """The messages of one attempt of a turn. Only the last attempt counts."""

    number: int
    messages: list[Message]


def attempts_of(messages: Sequence[dict[str, Any]]) -> dict[str, list[Attempt]]:
    """The attempts by prompt id. `messages` are as the API lists them."""
    found: dict[str, list[Attempt]] = {}
    calls: dict[tuple[str, int, str], Block] = {}
    for message in messages:
        prompt, number = message["prompt_id"], message["attempt"]
        attempts = found.setdefault(prompt, [])
        if not attempts or attempts[-1].number != number:
            attempts.append(Attempt(number, []))
        kept = []
        for block in blocks_of(message["body"]):
            place = (prompt, number, block.key)
            if block.kind == "tool":
                calls[place] = block
            if block.kind == "tool-result" and (call := calls.get(place)) and call.result is None:
                call.result = block
            else:
                kept.append(block)
        if kept:
            attempts[-1].messages.append(Message(message["seq"], message["created_at"], kept))
    return found


def blocks_of(body: Any) -> Iterator[Block]:
    """The parts of one event of any form."""
    kind = body.get("type") if isinstance(body, dict) else None
    content = _content(body) if kind in ("assistant", "user") else None
    if kind == "superseded":
        return
    if content is not None:
        for part in content:
            yield _part(part)
    elif kind == "system" and body.get("subtype") == "init":
        yield Block("note", _init(body))
    elif kind == "result":
        yield _result(body)
    elif kind in ("text", "assistant") and isinstance(body.get("text"), str):
        yield _prose(body["text"])
    elif kind == "truncated" and isinstance(body.get("head"), str):
        yield _clipped("event", body["head"], title=f"a line of {body.get('bytes')} bytes, its beginning")
    else:
        name = " / ".join(str(body[key]) for key in ("type", "subtype") if key in body) if kind else "event"
        yield _clipped("event", pretty(body), title=name)


def _content(body: dict[str, Any]) -> list[Any] | None:
    message = body.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else None


def _part(part: Any) -> Block:
    match part:
        case {"type": "text", "text": str(text)}:
            return _prose(text)
        case {"type": "thinking", "thinking": str(text)}:
            return _clipped("thinking", text, title="Thinking")
        case {"type": "tool_use", "id": str(key), "name": str(name)}:
            given = part.get("input", {})
            return _clipped("tool", _given(given), title=name, brief=_brief(given), key=key)
        case {"type": "tool_result", "tool_use_id": str(key)}:
            failed = part.get("is_error") is True
            return _clipped("tool-result", _returned(part.get("content")), key=key, failed=failed)
    name = str(part.get("type", "part")) if isinstance(part, dict) else "part"
    return _clipped("event", pretty(part), title=name)


def _prose(text: str) -> Block:
    block = _clipped("text", text)
    block.html = to_html(block.text)
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


def _returned(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return pretty(content)
    texts = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image"}:
                texts.append("[an image]")
            case _:
                texts.append(pretty(part))
    return "\n".join(texts)


def _init(body: dict[str, Any]) -> str:
    model, tools = body.get("model"), body.get("tools")
    words = ["Agent started"]
    if isinstance(model, str):
        words.append(f"model {model}")
    if isinstance(tools, list):
        words.append(f"{len(tools)} tools")
    return " · ".join(words)


def _result(body: dict[str, Any]) -> Block:
    failed = body.get("is_error") is True
    text = body["result"] if isinstance(body.get("result"), str) else ""
    block = _clipped("result", text, title=str(body.get("subtype", "")), failed=failed)
    block.facts = facts_of(body)
    return block


def facts_of(result: Any) -> dict[str, Any]:
    """cost (USD), seconds, turns, tokens_in and tokens_out of a result event. Unknown ones are left out."""
    if not isinstance(result, dict):
        return {}
    usage = result.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    read = [
        usage.get(name) for name in ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    ]
    duration = _number(result.get("duration_ms"))
    found = {
        "cost": _number(result.get("total_cost_usd")),
        "seconds": None if duration is None else duration / 1000,
        "turns": _number(result.get("num_turns")),
        "tokens_in": sum(_number(count) or 0 for count in read) if usage else None,
        "tokens_out": _number(usage.get("output_tokens")),
    }
    return {name: value for name, value in found.items() if value is not None}


def outcome_of(result: Any) -> dict[str, Any]:
    """The content of prompt.result: `facts` of the agent's result, and `commits` as (sha, subject)."""
    result = result if isinstance(result, dict) else {}
    commits = result.get("commits")
    return {
        "facts": facts_of(result.get("agent")),
        "commits": [
            (str(commit.get("sha", "")), str(commit.get("subject", "")))
            for commit in (commits if isinstance(commits, list) else [])
            if isinstance(commit, dict)
        ],
    }


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
