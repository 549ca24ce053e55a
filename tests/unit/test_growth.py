"""The work on text that others control grows with the text, and not faster.

docs/security.md lists the places. Each is fed what is known to be worst for it, up to a mebibyte.
"""

from collections.abc import Callable

import pytest

from outwake.cli.tail import _says
from outwake.session.events import LONGEST_JSON, ToolResult, Unknown, pretty
from outwake.session.lines import read
from outwake.telemetry.log import LONGEST, _redact_value, redact_text
from outwake.worker.agents.base import as_in_tools
from outwake.worker.agents.stream import parsed, truncated
from outwake.worker.agents.summary import pull_request
from outwake.worker.repo.git import reason_of
from outwake.worker.sandboxes.aio import _text
from outwake.worker.sandboxes.base import StepError
from outwake.worker.secrets import Secrets
from tests.support.growth import assert_linear
from tests.support.process import ROOT

SECRETS = Secrets([f"secret-value-{number}" for number in range(20)])


def line(text: str) -> object:
    return parsed(text.encode())


def array(text: str) -> object:
    return parsed(b"[" + text.encode().rstrip(b",") + b"]")


def hidden(text: str) -> object:
    return SECRETS.line({"type": "text", "text": text})


def told(text: str) -> object:
    return [_says(event) for event in read({"type": text, "text": text, "result": [text]})]


WORST: dict[str, tuple[Callable[[str], object], list[str]]] = {
    "an agent's line, parsed": (
        line,
        ["[", '{"a":[', "[]", "1", "\\u0000", '"\\ud800', '"', "\xff", "1.5,", " ", "1e9"],
    ),
    "an agent's JSON, made storable": (
        array,
        ["1,", "[],", "{},", '"\\u0000",', "1.5,", "NaN,", '"\\ud800",'],
    ),
    "a line that is too long": (lambda text: truncated(text.encode(), 1 << 30), ["\xff", "x"]),
    "known secrets in a line": (hidden, ["secret-value-", "secret-value-1", "x", '"', "\\"]),
    "known secrets in a text": (SECRETS.text, ["secret-value-", "secret-value-1", "token-"]),
    "the end of stderr": (lambda text: SECRETS.last(text, 2000), ["token-", "secret-value-1", "\n"]),
    "what looks like a secret": (
        redact_text,
        [
            *(
                "token-",
                "token ",
                "token=",
                "a.",
                "a-",
                "://",
                "://a:",
                "http://",
                "x@",
                "basic ",
                "bearer  ",
            ),
            *('secret="', "secret='", "token=\"'", "secret  ", "api_key-", "password: ", "key", "api-"),
        ],
    ),
    "a field of a log line": (_redact_value, ["token-", "a.", "://a:"]),
    "the address of a pull request": (
        pull_request,
        [
            "http://",
            "https://a",
            "https://a/pull/1 ",
            "https://a/pull/1/pull/",
            "/pull/1",
            "https://a/pulls/",
        ],
    ),
    "what git prints": (
        lambda text: reason_of(StepError("step", 1, text).output),
        ["repository '", "transport '", "error: x\n", "remote error:", "a \n", "x"],
    ),
    "what a sandbox's step prints": (_text, ["\x1b[", "\x1b[0;", "\r", "\ud800"]),
    "the name of an MCP server": (as_in_tools, ["a", "/"]),
    "events as tail prints them": (told, ["x", " ", "\n", "\x1b"]),
    "JSON that is shown": (lambda text: pretty([text, {text: text}]), ["x", '"', "\x1b"]),
    "a tool's result": (lambda text: ToolResult("k", [{"type": "text", "text": text}] * 3).text, ["x"]),
}


@pytest.mark.parametrize(
    ("place", "pattern"), [(place, pattern) for place, (_, patterns) in WORST.items() for pattern in patterns]
)
def test_work_grows_with_the_text_and_not_faster(place: str, pattern: str) -> None:
    assert_linear(WORST[place][0], pattern)


def test_what_is_cut_is_cut_before_it_is_searched() -> None:
    text = _redact_value("x " * LONGEST)
    assert len(text) < LONGEST + 100
    assert text.endswith("more characters")
    assert len(Unknown("x", list(range(10**6))).text) < LONGEST_JSON + 100


def test_the_page_lists_each_place() -> None:
    page = (ROOT / "docs/security.md").read_text()
    assert [place for place in WORST if f"| {place} |" not in page] == []
