"""The parts of the dashboard that need no server."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outwake.app.dashboard.build import parse_row
from outwake.app.dashboard.charts import HEIGHT, WIDTH, charts
from outwake.app.dashboard.conversation import attempts_of, blocks_of
from outwake.app.dashboard.formatting import ago, count, duration, money, pretty
from outwake.app.dashboard.markdown import to_html
from outwake.app.dashboard.queries import Bin

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NAMES = ("type", "subtype", "message", "content", "text", "id", "name", "input", "tool_use_id", "is_error")
EVENTS = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=5),
    JSON | st.sampled_from(["assistant", "user", "result", "system", "init", "tool_use", "tool_result"]),
)


@given(EVENTS | JSON)
def test_any_event_has_blocks(body: Any) -> None:
    for block in blocks_of(body):
        assert block.kind in ("text", "thinking", "tool", "tool-result", "result", "note", "event")


@given(st.text())
def test_markdown_has_no_tag_of_the_texts(text: str) -> None:
    assert "<zz" not in to_html(f"{text}<zz onload=a>{text}")


@pytest.mark.parametrize("text", ["<b>", "![](b)", "[a](javascript:b)", "|a|\n|:-:|\n|b|", "<!-- a -->"])
def test_markdown_makes_nothing_active(text: str) -> None:
    made = to_html(text)
    assert not any(part in made for part in ("<b>", "<img", 'javascript:b"', "style", "<!--"))


def _message(seq: int, attempt: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"seq": seq, "prompt_id": "p", "attempt": attempt, "body": body, "created_at": ""}


def test_results_find_their_calls_within_an_attempt_only() -> None:
    use = {"type": "tool_use", "id": "x", "name": "Bash", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "x", "content": "out"}
    call = {"type": "assistant", "message": {"content": [use]}}
    back = {"type": "user", "message": {"content": [result]}}
    superseded = {"type": "superseded", "attempt": 1}
    messages = [
        _message(1, 1, call),
        _message(2, 2, superseded),
        _message(3, 2, back),
        _message(4, 2, call),
        _message(5, 2, back),
    ]
    first, second = attempts_of(messages)["p"]
    assert [message.seq for message in first.messages] == [1]
    assert first.messages[0].blocks[0].result is None
    assert [message.seq for message in second.messages] == [3, 4]
    paired = second.messages[1].blocks[0].result
    assert paired is not None
    assert paired.text == "out"


@given(
    st.lists(
        st.tuples(*(st.integers(0, 10**7) for _ in range(4)), st.none() | st.floats(0, 10**6)),
        min_size=1,
        max_size=90,
    )
)
def test_charts_stay_in_their_box(values: list[tuple[int, int, int, int, float | None]]) -> None:
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    bins = [
        Bin(begin + place * timedelta(minutes=1), depth, done, dead, cancelled, wait, wait)
        for place, (depth, done, dead, cancelled, wait) in enumerate(values)
    ]
    for chart in charts(bins, timedelta(minutes=1)):
        assert len(chart.columns) == len(bins)
        for column in chart.columns:
            for bar in column.bars:
                assert bar.x >= 0
                assert bar.y >= 0
                assert bar.x + bar.width <= WIDTH + 0.1
                assert bar.y + bar.height <= HEIGHT + 2
        for _, path in chart.lines:
            numbers = [
                float(text) for text in path.replace("M", " ").replace("L", " ").replace("Z", "").split()
            ]
            assert all(-0.1 <= y <= HEIGHT for y in numbers[1::2])


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.012, "12 ms"),
        (3.44, "3.4 s"),
        (59.6, "1 min"),
        (306, "5 min 6 s"),
        (7800, "2 h 10 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
    assert duration(timedelta(seconds=seconds)) == said


def test_amounts() -> None:
    assert [money(0), money(0.004), money(1.234), money(None)] == ["$0.00", "$0.0040", "$1.23", ""]
    assert [count(4312), count(12_345), count(3_400_000)] == ["4,312", "12k", "3.4M"]
    assert ago(datetime.now(UTC) - timedelta(minutes=3)) == "3 min ago"
    assert ago(datetime.now(UTC) + timedelta(hours=2, minutes=1)) == "in 2 h"


@pytest.mark.parametrize("depth", [98, 99, 100, 300, 900, 100_000])
def test_a_row_is_shown_however_deep_its_payload_is(depth: int) -> None:
    inside = '["}", "\\\\", "\\"[", ' + "[" * depth + "]" * depth + ", {}]"
    row = parse_row('{"id": 7, "payload": ' + inside + ', "state": "dead"}')
    assert (row["id"], row["state"]) == (7, "dead")
    assert [row["payload"][place] for place in (0, 1, 2, 4)] == ["}", "\\", '"[', {}]
    assert ("\u2026" in pretty(row)) == (depth > 97)
