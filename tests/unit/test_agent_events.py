"""An agent's line is read in one place, whatever it holds."""

import json
from typing import Any

import pytest
from hypothesis import given

from outwake.session.events import (
    LONGEST_JSON,
    PARTS,
    Result,
    Started,
    Superseded,
    Text,
    Thinking,
    Tokens,
    ToolCall,
    ToolResult,
    Unknown,
    pretty,
)
from outwake.session.lines import read, result_of
from tests.support.process import ROOT
from tests.unit.test_dashboard import EVENTS, JSON


def events(body: Any) -> list[Any]:
    return list(read(body))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"type": "assistant", "message": {"content": "words"}}, Text("words")),
        ({"type": "user", "message": {"content": [{"type": "text", "text": "x"}]}}, Text("x", "user")),
        (
            {"type": "assistant", "message": {"content": [{"type": "thinking", "thinking": "x"}]}},
            Thinking("x"),
        ),
        ({"type": "assistant", "text": "words"}, Text("words")),
        ({"type": "text", "text": "a plain line"}, Text("a plain line", "output")),
        ({"type": "superseded", "attempt": 3}, Superseded(3)),
        ({"type": "json", "value": [1]}, Unknown("json", {"type": "json", "value": [1]})),
        ({"type": "system", "subtype": "x"}, Unknown("system / x", {"type": "system", "subtype": "x"})),
        ({"type": "truncated", "bytes": 9, "head": "h"}, Unknown("a line of 9 bytes, its beginning", "h")),
        ([1], Unknown("part", [1])),
        ({}, Unknown("event", {})),
    ],
)
def test_a_line_has_an_event(body: Any, said: Any) -> None:
    assert events(body) == [said]


def test_a_call_and_its_result() -> None:
    call = {"type": "tool_use", "id": "t", "name": "Bash", "input": {"command": "ls"}}
    image = {"type": "image", "source": "…"}
    back = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "a"}, image]}
    assert events({"type": "assistant", "message": {"content": [call]}}) == [
        ToolCall("t", "Bash", {"command": "ls"})
    ]
    (result,) = events({"type": "user", "message": {"content": [{**back, "is_error": True}]}})
    assert isinstance(result, ToolResult)
    assert (result.key, result.failed, result.text) == ("t", True, "a\n[an image]")


def test_what_is_told_at_the_start() -> None:
    servers = [{"name": "s", "status": "connected"}, "nonsense"]
    body = {"type": "system", "subtype": "init", "session_id": "i", "model": "m", "tools": ["a", "b"]}
    assert events({**body, "mcp_servers": servers}) == [Started("i", "m", 2, (("s", "connected"),))]
    assert events({"type": "system", "subtype": "init"}) == [Started()]


def test_what_is_told_at_the_end() -> None:
    body = {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "session_id": "i",
        "result": "Done.",
        "duration_ms": 1500,
        "num_turns": 2,
        "total_cost_usd": 0.25,
        "usage": {"input_tokens": 1, "cache_read_input_tokens": 20, "output_tokens": 3},
        "permission_denials": [{"tool_name": "Write"}, {}],
    }
    result = result_of(body)
    assert result == Result(
        text="Done.",
        session="i",
        kind="success",
        cost=0.25,
        tokens=Tokens(input=1, output=3, cache_read=20),
        seconds=1.5,
        turns=2,
        denied=("Write", "a tool"),
    )
    assert result.tokens.read == 21


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"is_error": True, "result": "no such model", "subtype": "success"}, "no such model"),
        ({"is_error": True, "subtype": "error_during_execution", "errors": ["a", "b"]}, "a; b"),
        ({"is_error": True, "subtype": "error_during_execution"}, "error_during_execution"),
        ({"subtype": "error_max_turns"}, "error_max_turns"),
        ({"is_error": True}, "an error"),
        ({"is_error": False, "subtype": "success", "errors": ["a"]}, None),
        ({}, None),
    ],
)
def test_an_error_is_told_in_the_agents_words(body: dict[str, Any], error: str | None) -> None:
    result = result_of({"type": "result", **body})
    assert result is not None
    assert result.error == error


@pytest.mark.parametrize(
    "nonsense", [None, "3", True, -1, float("nan"), float("inf"), [1], 10**400, -(10**400), 1e300]
)
def test_a_number_that_is_none_is_not_given(nonsense: Any) -> None:
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    result = result_of(
        {
            "type": "result",
            "total_cost_usd": nonsense,
            "duration_ms": nonsense,
            "num_turns": nonsense,
            "usage": dict.fromkeys(names, nonsense),
        }
    )
    assert result == Result()


@given(EVENTS | JSON)
def test_reading_never_raises(body: Any) -> None:
    for event in read(body):
        if isinstance(event, ToolResult | Unknown):
            assert isinstance(event.text, str)


def test_a_line_has_a_bounded_number_of_events() -> None:
    content = [{"type": "text", "text": "x"}] * (PARTS + 5)
    *texts, last = events({"type": "assistant", "message": {"content": content}})
    assert len(texts) == PARTS
    assert last == Unknown("5 more parts", "")


def test_indented_json_is_bounded() -> None:
    deep: Any = list(range(100_000))
    for _ in range(99):
        deep = [deep]
    assert len(json.dumps(deep)) < 1 << 20
    assert len(pretty(deep)) < LONGEST_JSON + 1000
    assert pretty(10**5000) == "…"
    assert pretty({"a": [1]}) == '{\n  "a": [\n    1\n  ]\n}'


def test_no_other_module_knows_the_form_of_a_line() -> None:
    """But for the scripted agent, which prints such lines, and the sum of what version 1.0 stored."""
    words = ("total_cost_usd", "tool_use_id", "permission_denials", "num_turns", "is_error")
    allowed = {"outwake/session/claude.py", "app/dashboard/queries.py", "embedded/agent.py"}
    paths = [
        path for room in ("app", "worker", "outwake", "embedded") for path in (ROOT / room).rglob("*.py")
    ]
    knowing = {
        str(path.relative_to(ROOT)) for path in paths if any(word in path.read_text() for word in words)
    }
    assert knowing <= allowed
