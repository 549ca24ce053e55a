"""How a turn ended, from the agent's exit and from what it said."""

from typing import Any

import pytest

from outwake.session.lines import read
from outwake.worker.agents.summary import AgentSummary, pull_request
from outwake.worker.agents.verdict import REASON, judge
from outwake.worker.errors import TransientError
from outwake.worker.process.guarded import Exit
from outwake.worker.secrets import Secrets

START = {"type": "system", "subtype": "init", "session_id": "s"}
GOOD = {"type": "result", "subtype": "success", "result": "Done."}


def denied(*names: str) -> dict[str, Any]:
    return {**GOOD, "permission_denials": [{"tool_name": name} for name in names]}


def used(name: str, *, failed: bool = False) -> list[dict[str, Any]]:
    call = {"type": "tool_use", "id": name, "name": name}
    back = {"type": "tool_result", "tool_use_id": name, "is_error": failed}
    return [
        {"type": "assistant", "message": {"content": [call]}},
        {"type": "user", "message": {"content": [back]}},
    ]


def summary(*lines: dict[str, Any], lingered: bool = False) -> AgentSummary:
    made = AgentSummary(lingered=lingered)
    for line in lines:
        for event in read(line):
            made.on_event(event, line)
    return made


def verdict(
    made: AgentSummary,
    code: int = 0,
    cause: Any = "exited",
    stderr: str = "",
    promised: bool = False,
    stopped: tuple[str, ...] = (),
) -> tuple[str, str | None]:
    return judge(Exit(code, cause, stderr, 0, stopped), made, promised, 60, Secrets(["s3cr3t-value"]))


def test_a_run_with_a_good_result_succeeded() -> None:
    assert verdict(summary(START, GOOD)) == ("succeeded", None)
    assert verdict(summary(START, {**GOOD, "is_error": True})) == ("failed", "the agent reported Done.")


@pytest.mark.parametrize("cause", ["exited", "stop"])
def test_a_program_that_stays_after_its_result_is_judged_by_the_result(cause: str) -> None:
    reason = "the agent did not exit after its result and was ended, with node, sleep"
    made = summary(START, GOOD, lingered=True)
    assert verdict(made, -15, cause, stopped=("node", "sleep")) == ("succeeded", reason)
    bad = summary(START, {**GOOD, "is_error": True}, lingered=True)
    assert verdict(bad, -15, cause) == ("failed", "the agent reported Done.")


def test_a_run_that_announced_itself_must_end_with_a_result() -> None:
    say = {"type": "assistant", "text": "I begin"}
    reason = "the agent ended without a result; it last said 'I begin': no memory"
    assert verdict(summary(START, say), stderr="no memory\n") == ("failed", reason)
    assert verdict(summary(), promised=True) == ("failed", "the agent ended without a result")


def test_a_plain_program_is_judged_by_its_exit_status() -> None:
    line = {"type": "text", "text": "hello"}
    assert verdict(summary(line)) == ("succeeded", None)
    assert verdict(summary(line), 3, stderr="x s3cr3t-value") == (
        "failed",
        "the agent ended with exit status 3: x ***",
    )


@pytest.mark.parametrize(
    ("lines", "status", "reason"),
    [
        ([denied("Write")], "failed", "the agent was not allowed to use Write"),
        ([*used("Read"), denied("Write", "Edit")], "failed", "the agent was not allowed to use Edit, Write"),
        ([*used("Write", failed=True), denied("Write")], "failed", "the agent was not allowed to use Write"),
        ([denied("mcp__box__shell")], "failed", "the agent was not allowed to use mcp__box__shell"),
        (
            [*used("Write"), denied("Write", "Write")],
            "succeeded",
            "the agent was not allowed to use Write (2 times)",
        ),
        ([*used("Read"), denied("Bash")], "succeeded", "the agent was not allowed to use Bash (once)"),
    ],
)
def test_what_was_denied_is_told_and_a_turn_without_edits_has_not_succeeded(
    lines: list[dict[str, Any]], status: str, reason: str
) -> None:
    assert verdict(summary(START, *lines)) == (status, reason)


def test_the_errors_that_the_agent_lists_are_the_reason() -> None:
    line = {
        "type": "result",
        "subtype": "error_during_execution",
        "is_error": True,
        "errors": ["No conversation found with session ID: x"],
    }
    reason = "the agent reported No conversation found with session ID: x"
    assert verdict(summary(line), 1) == ("failed", reason)


def test_a_run_whose_guardian_was_killed_is_not_run_again() -> None:
    assert verdict(summary(START), -9, "lost")[0] == "failed"


@pytest.mark.parametrize("cause", ["stop", "deadline", "worker", "signal"])
def test_a_run_that_was_ended_from_outside_is_no_verdict(cause: str) -> None:
    with pytest.raises(TransientError, match=cause):
        verdict(summary(START), -15, cause)


def test_a_reason_is_bounded() -> None:
    long = {**GOOD, "is_error": True, "result": "x" * 10**6}
    assert len(verdict(summary(long))[1] or "") == REASON
    named = [{"tool_name": f"tool-{number}" * 20} for number in range(1000)]
    assert len(verdict(summary({**GOOD, "permission_denials": named}))[1] or "") <= REASON


def test_a_summary_is_bounded() -> None:
    made = summary(*(line for number in range(20_000) for line in used(f"t{number}")[:1]))
    assert len(made._calls) == 10_000


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see https://git.test/o/t/pull/7.", "https://git.test/o/t/pull/7"),
        ("(http://a/b/merge_requests/1) [https://a/b/pull-requests/22]", "https://a/b/pull-requests/22"),
        ("https://a/o/t/pull/7/files and https://a/o/t", "https://a/o/t/pull/7"),
        ("https://a/o/t/pulls/ https://a/pull/x http:///pull/7 /pull/7", None),
        ("https://a/pull/7 " + "x" * 10**6, None),
        ("x" * 10**6 + " https://a/pull/7", "https://a/pull/7"),
    ],
)
def test_the_last_pull_request_is_found(text: str, found: str | None) -> None:
    assert pull_request(text) == found
