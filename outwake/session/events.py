"""What an agent says, in one form for every kind of agent.

`message.body` holds an agent's line as it was printed. `read` is the only code that knows what such a line
means. The worker, the dashboard, `outwake tail` and the metrics use the events that it returns.

| the line | the events |
|---|---|
| the first event of a run | `Started` |
| words of the agent, of the user, or a line that is no JSON | `Text` |
| its reasoning | `Thinking` |
| a tool is called; the call returns | `ToolCall`, `ToolResult` |
| the last event of a run | `Result` |
| of our own: a new attempt began | `Superseded` |
| anything else | `Unknown`, with the JSON |

An agent may print anything. So every value is checked, numbers are bounded, and the work is linear in the
size of the line. `read` never raises.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PARTS = 1000
"""Parts of one line that are read. One more event tells how many were left out."""
NAME = 200
"""Characters of a name, such as a tool's."""
LARGEST_COST = 1e6
"""US dollars. A larger number is a mistake or an attack, and counts as not given."""
LONGEST_JSON = 100_000
"""Characters of JSON that is shown."""
_LARGEST = 1e15
_INDENTED = json.JSONEncoder(indent=2, ensure_ascii=False)

Body = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Started:
    """A run has begun. tools: how many there are. servers: MCP servers as (name, status), if it tells."""

    session: str | None = None
    model: str | None = None
    tools: int | None = None
    servers: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Words. `by` tells whose: the agent's, the user's, or a program's that prints plain lines."""

    text: str
    by: Literal["agent", "user", "output"] = "agent"


@dataclass(frozen=True, slots=True)
class Thinking:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`key` finds the ToolResult, within one attempt."""

    key: str
    name: str
    given: Any = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    key: str
    content: Any = None
    failed: bool = False

    @property
    def text(self) -> str:
        """The content for a person."""
        if isinstance(self.content, str):
            return self.content
        if not isinstance(self.content, list):
            return pretty(self.content)
        more = len(self.content) - PARTS
        texts = [_part_text(part) for part in self.content[:PARTS]]
        return "\n".join([*texts, f"[{more} more parts]"] if more > 0 else texts)


@dataclass(frozen=True, slots=True)
class Tokens:
    """How many tokens the model read and wrote; None where the agent does not tell."""

    input: int | None = None
    output: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None

    @property
    def read(self) -> int | None:
        """All that was read, from the cache or not."""
        counts = [count for count in (self.input, self.cache_read, self.cache_write) if count is not None]
        return sum(counts) if counts else None


@dataclass(frozen=True, slots=True)
class Result:
    """A run has ended.

    error: why it failed, in the agent's words; None if it did not. cost: in US dollars. seconds: how long it
    took. turns: answers of the model. denied: the tools that it was not allowed to use, one for each call.
    """

    text: str = ""
    error: str | None = None
    session: str | None = None
    kind: str = ""
    cost: float | None = None
    tokens: Tokens = field(default_factory=Tokens)
    seconds: float | None = None
    turns: int | None = None
    denied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Superseded:
    """What this attempt said no longer counts."""

    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class Unknown:
    """An event of no known form: a name for it, and its content, which is JSON or a text."""

    name: str
    content: Any = None

    @property
    def text(self) -> str:
        """The content for a person."""
        return self.content if isinstance(self.content, str) else pretty(self.content)


AgentEvent = Started | Text | Thinking | ToolCall | ToolResult | Result | Superseded | Unknown


def read(body: Any) -> Iterator[AgentEvent]:
    """The events of one stored line: the stream-json of the Claude Code CLI, and what
    worker/agents/stream.py makes of lines that are no JSON object.
    """
    if not isinstance(body, dict):
        yield _unknown(body)
        return
    match body:
        case {"type": "assistant" | "user" as role, "message": {"content": str() | list() as content}}:
            yield from _parts(content, "agent" if role == "assistant" else "user")
        case {"type": "assistant", "text": str(text)}:
            yield Text(text)
        case {"type": "text", "text": str(text)}:
            yield Text(text, "output")
        case {"type": "system", "subtype": "init"}:
            yield _started(body)
        case {"type": "result"}:
            yield _result(body)
        case {"type": "superseded"}:
            yield Superseded(_count(body.get("attempt")))
        case {"type": "truncated", "head": str(head)}:
            yield Unknown(f"a line of {_count(body.get('bytes')) or 'many'} bytes, its beginning", head)
        case _:
            yield _unknown(body)


def result_of(body: Any) -> Result | None:
    """The result event that a stored line is, if it is one."""
    return next((event for event in read(body) if isinstance(event, Result)), None)


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
                yield _unknown(part)
    if len(content) > PARTS:
        yield Unknown(f"{len(content) - PARTS} more parts", "")


def _part_text(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image"}:
            return "[an image]"
    return pretty(part)


def _started(body: Body) -> Started:
    tools, servers = body.get("tools"), body.get("mcp_servers")
    return Started(
        session=_name(body.get("session_id")),
        model=_name(body.get("model")),
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
    kind = _name(body.get("subtype")) or ""
    seconds = _number(body.get("duration_ms"), _LARGEST)
    usage = body.get("usage")
    return Result(
        text=text,
        error=_error(body, text, kind),
        session=_name(body.get("session_id")),
        kind=kind,
        cost=_number(body.get("total_cost_usd"), LARGEST_COST),
        tokens=_tokens(usage) if isinstance(usage, dict) else Tokens(),
        seconds=None if seconds is None else seconds / 1000,
        turns=_count(body.get("num_turns")),
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
        yield _name(name) or "a tool"


def _tokens(usage: Body) -> Tokens:
    return Tokens(
        input=_count(usage.get("input_tokens")),
        output=_count(usage.get("output_tokens")),
        cache_read=_count(usage.get("cache_read_input_tokens")),
        cache_write=_count(usage.get("cache_creation_input_tokens")),
    )


def _unknown(value: Any) -> Unknown:
    if not isinstance(value, dict) or "type" not in value:
        return Unknown("event" if isinstance(value, dict) else "part", value)
    names = [_name(value.get(key)) for key in ("type", "subtype")]
    return Unknown(" / ".join(name for name in names if name) or "event", value)


def pretty(value: Any, longest: int = LONGEST_JSON) -> str:
    """A value as indented JSON, cut at about `longest` characters: indentation can make it a hundred times as
    large.
    """
    pieces: list[str] = []
    size = 0
    try:
        for piece in _INDENTED.iterencode(value):
            pieces.append(piece)
            size += len(piece)
            if size > longest:
                pieces.append("\u2026")
                break
    except (RecursionError, ValueError):  # too deep, or a number with too many digits
        pieces.append("\u2026")
    return "".join(pieces)


def _name(value: Any) -> str | None:
    return value[:NAME] if isinstance(value, str) else None


def _number(value: Any, largest: float) -> float | None:
    """A number that is neither negative nor too large, else None. JSON has integers of any size."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= largest:
        return None
    return float(value)


def _count(value: Any) -> int | None:
    number = _number(value, _LARGEST)
    return None if number is None else int(number)
