import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outwake.worker.agents.stream import DEPTH, HEAD, NOTE, Splitter, parsed, stored

BAD = "\ufffd"


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


def assert_storable(made: dict[str, Any]) -> None:
    text = json.dumps(made, allow_nan=False, ensure_ascii=False)
    text.encode()  # refuses lone surrogates
    assert "\\u0000" not in text
    assert depth(made) <= DEPTH + 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"type": "assistant", "n": 1.5}\r', {"type": "assistant", "n": 1.5}),
        (b'{"no": "type"}', {"no": "type"}),
        (b"[1, 2]", {"type": "json", "value": [1, 2]}),
        (b"null", {"type": "json", "value": None}),
        (b"plain words", {"type": "text", "text": "plain words"}),
        (b'{"cut": ', {"type": "text", "text": '{"cut":'}),
        (
            '"\\ud83d\\ude00 \U0001f600"'.encode(),
            {"type": "json", "value": "\U0001f600 \U0001f600"},
        ),
        (b"", None),
        (b" \t\r", None),
    ],
)
def test_lines_that_need_no_change(line: bytes, expected: dict[str, Any] | None) -> None:
    assert parsed(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": "x\\u0000y"}', {"a": f"x{BAD}y"}),
        (b'{"a\\u0000": 1}', {f"a{BAD}": 1}),
        (b'{"a": "\\ud800"}', {"a": BAD}),
        (b'{"a": [NaN, -Infinity, 1e999]}', {"a": ["NaN", "-Infinity", "1e999"]}),
        (b'{"a": "\xff"}', {"a": BAD}),
        (b"nul \x00 here", {"type": "text", "text": f"nul {BAD} here"}),
    ],
)
def test_what_jsonb_refuses_is_replaced_and_noted(line: bytes, expected: dict[str, Any]) -> None:
    made = parsed(line)
    assert made is not None
    assert made.pop(NOTE)
    assert made == expected


@pytest.mark.parametrize("levels", [DEPTH + 1, 500, 5000, 500_000])
def test_deep_nesting_is_cut(levels: int) -> None:
    made = parsed(b"[" * levels + b"]" * levels)
    assert made is not None
    assert made[NOTE]
    assert_storable(made)


def test_many_brackets_side_by_side_are_kept() -> None:
    value: list[Any] = [{"a": []} for _ in range(1000)]
    assert parsed(json.dumps(value).encode()) == {"type": "json", "value": value}


def test_a_number_with_too_many_digits_is_text() -> None:
    made = parsed(b"1" * 10_000)
    assert made == {"type": "text", "text": "1" * 10_000}


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
)


@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary())
@example(b'{"\\ud800": "\\udc00"}')
@settings(deadline=None)
def test_every_line_is_storable(line: bytes) -> None:
    made = parsed(line.replace(b"\n", b" "))
    if made is not None:
        assert_storable(made)


def feed(data: bytes, chunk: int, limit: int = 100) -> list[dict[str, Any]]:
    splitter = Splitter(limit)
    starts = range(0, len(data), chunk)
    raw = [line for start in starts for line in splitter.feed(data[start : start + chunk])]
    return [made for line in (*raw, *splitter.finish()) if (made := stored(line)) is not None]


@given(st.binary(max_size=400) | st.text("ab{}\n").map(str.encode), st.integers(1, 200))
def test_chunks_do_not_matter(data: bytes, chunk: int) -> None:
    assert feed(data, chunk) == feed(data, len(data) or 1)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_long_lines_are_truncated(chunk: int) -> None:
    data = b'{"a": 1}\n' + b"x" * 5000 + b'\n"' + b"y" * 98 + b'"\nz'
    assert feed(data, chunk) == [
        {"a": 1},
        {"type": "truncated", "bytes": 5000, "head": "x" * HEAD},
        {"type": "json", "value": "y" * 98},
        {"type": "text", "text": "z"},
    ]


def test_a_head_is_not_cut_inside_a_character() -> None:
    (made,) = feed("\u00e9".encode() * 3000 + b"\n", 1000, limit=HEAD + 1)
    assert made["head"] == "\u00e9" * (HEAD // 2)
    (made,) = feed(b"x" + "\u00e9".encode() * 3000, 1000, limit=HEAD + 1)
    assert made["head"] == "x" + "\u00e9" * (HEAD // 2 - 1)
