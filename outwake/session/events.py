"""What an agent says, in one form for every kind of agent.

`message.body` holds an agent's line as it was printed. outwake/session/lines.py reads these events out of it.
The worker, the dashboard, `outwake tail` and the metrics use the events only.

| the line | the events |
|---|---|
| the first event of a run | `Started` |
| words of the agent, of the user, or a line that is no JSON | `Text` |
| its reasoning | `Thinking` |
| a tool is called; the call returns | `ToolCall`, `ToolResult` |
| the last event of a run | `Result` |
| of our own: a new attempt began | `Superseded` |
| anything else | `Unknown`, with the JSON |

An agent may print anything, so a reader checks every value by the functions at the end of this module.
"""

import json
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
LARGEST = 1e15
"""No count and no time is larger."""
_INDENTED = json.JSONEncoder(indent=2, ensure_ascii=False)


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


def _part_text(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image"}:
            return "[an image]"
    return pretty(part)


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


def unknown(value: Any) -> Unknown:
    """An event for a value of no known form."""
    if not isinstance(value, dict) or "type" not in value:
        return Unknown("event" if isinstance(value, dict) else "part", value)
    names = [name_of(value.get(key)) for key in ("type", "subtype")]
    return Unknown(" / ".join(name for name in names if name) or "event", value)


def name_of(value: Any) -> str | None:
    """The beginning of a name; None if the value is no text."""
    return value[:NAME] if isinstance(value, str) else None


def number(value: Any, largest: float) -> float | None:
    """A number that is neither negative nor too large, else None. JSON has integers of any size."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= largest:
        return None
    return float(value)


def count(value: Any) -> int | None:
    """A number as an integer, else None."""
    found = number(value, LARGEST)
    return None if found is None else int(found)
