"""The reader of the Claude Code CLI's stream-json, which simple programs print too (docs/agent.md)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from outwake.session.events import (
    LARGEST,
    LARGEST_COST,
    NAME,
    PARTS,
    AgentEvent,
    Result,
    Started,
    Text,
    Thinking,
    Tokens,
    ToolCall,
    ToolResult,
    Unknown,
    count,
    name_of,
    number,
    unknown,
)

Body = Mapping[str, Any]


def read(body: Body) -> Iterable[AgentEvent] | None:
    """The events of a line; None if it is not of this form."""
    match body:
        case {"type": "assistant" | "user" as role, "message": {"content": str() | list() as content}}:
            return _parts(content, "agent" if role == "assistant" else "user")
        case {"type": "assistant", "text": str(text)}:
            return [Text(text)]
        case {"type": "system", "subtype": "init"}:
            return [_started(body)]
        case {"type": "result"}:
            return [_result(body)]
    return None


def _parts(content: str | list[Any], by: Literal["agent", "user"]) -> Iterator[AgentEvent]:
    if isinstance(content, str):
        yield Text(content, by)
        return
    for part in content[:PARTS]:
        match part:
            case {"type": "text", "text": str(text)}:
                yield Text(text, by)
            case {"type": "thinking", "thinking": str(text)}:
                yield Thinking(text)
            case {"type": "tool_use", "id": str(key), "name": str(name)}:
                yield ToolCall(key[:NAME], name[:NAME], part.get("input", {}))
            case {"type": "tool_result", "tool_use_id": str(key)}:
                yield ToolResult(key[:NAME], part.get("content"), part.get("is_error") is True)
            case _:
                yield unknown(part)
    if len(content) > PARTS:
        yield Unknown(f"{len(content) - PARTS} more parts", "")


def _started(body: Body) -> Started:
    tools, servers = body.get("tools"), body.get("mcp_servers")
    return Started(
        session=name_of(body.get("session_id")),
        model=name_of(body.get("model")),
        tools=len(tools) if isinstance(tools, list) else None,
        servers=tuple(
            (str(server.get("name"))[:NAME], str(server.get("status"))[:NAME])
            for server in servers[:PARTS]
            if isinstance(server, dict)
        )
        if isinstance(servers, list)
        else None,
    )


def _result(body: Body) -> Result:
    text = body["result"] if isinstance(body.get("result"), str) else ""
    kind = name_of(body.get("subtype")) or ""
    seconds = number(body.get("duration_ms"), LARGEST)
    usage = body.get("usage")
    return Result(
        text=text,
        error=_error(body, text, kind),
        session=name_of(body.get("session_id")),
        kind=kind,
        cost=number(body.get("total_cost_usd"), LARGEST_COST),
        tokens=_tokens(usage) if isinstance(usage, dict) else Tokens(),
        seconds=None if seconds is None else seconds / 1000,
        turns=count(body.get("num_turns")),
        denied=tuple(_denied(body.get("permission_denials"))),
    )


def _error(body: Body, text: str, kind: str) -> str | None:
    """The CLI tells of an error by is_error with words, by a list `errors`, or by the subtype alone."""
    if not body.get("is_error") and not kind.startswith("error"):
        return None
    errors = body.get("errors")
    listed = [words for words in errors[:PARTS] if isinstance(words, str)] if isinstance(errors, list) else []
    return text or "; ".join(listed) or kind or "an error"


def _denied(denials: Any) -> Iterator[str]:
    for denial in denials[:PARTS] if isinstance(denials, list) else ():
        name = denial.get("tool_name") if isinstance(denial, dict) else None
        yield name_of(name) or "a tool"


def _tokens(usage: Body) -> Tokens:
    return Tokens(
        input=count(usage.get("input_tokens")),
        output=count(usage.get("output_tokens")),
        cache_read=count(usage.get("cache_read_input_tokens")),
        cache_write=count(usage.get("cache_creation_input_tokens")),
    )
