"""The checker must find nothing in a good history, and what is wrong in a bad one: each check is tried."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.check import (
    CHECKS,
    PERSON,
    Effect,
    Event,
    Life,
    Message,
    Prompt,
    Record,
    Row,
    Session,
    Snapshot,
    Token,
    check,
    excused,
    rescue_times,
)

A, B = "worker-a", "worker-b"


class Story:
    """Writes a record. Transactions are numbered in the order of their commits unless told otherwise."""

    def __init__(self) -> None:
        self.record = Record(limits={"limited": 1}, pids={A: 1, B: 2})
        self.xid = 100
        self.time = 0.0
        self._rows: dict[int, dict[str, Any]] = {}

    def commit(self) -> int:
        self.xid += 1
        self.time += 1
        return self.xid

    def event(
        self, row_id: int, new: str | None, *, xid: int | None = None, sees: str = "", **fields: Any
    ) -> int:
        """A change of state, in a transaction of its own that sees all before it."""
        xid = self.commit() if xid is None else xid
        row = self._rows.setdefault(
            row_id,
            {"topic": "t", "key": None, "attempt": 0, "failures": 0, "errors": 0, "error": None, "new": None,
             "worker_id": None},
        )  # fmt: skip
        row |= {"old": row["new"], "new": new, **fields}
        common = {"app": "worker", "limited": row["topic"] == "limited", "started": self.time}
        self.record.events.append(
            Event(
                seq=len(self.record.events), at=self.time, xid=xid, row_id=row_id,
                snapshot=Snapshot.parse(sees or f"{xid}:{xid}:"), **{**common, **row},
            )
        )  # fmt: skip
        return xid

    def insert(self, row_id: int, *, ack: bool = True, **fields: Any) -> None:
        self.event(row_id, "ready", **fields)
        if ack:
            self.line("enqueue", tag=f"tag-{row_id}", ids=[row_id], rows=1, booked=False, outcome="acked",
                      topic=fields.get("topic", "t"))  # fmt: skip

    def claim(self, row_id: int, worker: str = A, **fields: Any) -> int:
        attempt = self._rows[row_id]["attempt"] + 1
        key = self._rows[row_id]["key"]
        self.event(row_id, "running", attempt=attempt, worker_id=worker, **fields)
        self.line("start", id=row_id, attempt=attempt, worker=worker, pid=self.record.pids[worker], key=key,
                  topic="t", place="p")  # fmt: skip
        return int(attempt)

    def finish(self, row_id: int) -> None:
        self.time += 1
        self.line("finish", id=row_id, attempt=self._rows[row_id]["attempt"], how="returned")

    def rescue(self, row_id: int, reason: str = "its lease ran out") -> int:
        row = self._rows[row_id]
        return self.event(
            row_id, "ready", failures=row["failures"] + 1, errors=row["errors"] + 1, error=reason
        )

    def run(self, row_id: int, worker: str = A) -> int:
        """Claim, work, done. Returns the transaction that ended it."""
        self.claim(row_id, worker)
        self.finish(row_id)
        return self.event(row_id, "done")

    def line(self, event: str, **fields: Any) -> None:
        self.record.lines.append({"e": event, "t": self.time, "w": self.time, **fields})

    def close(self, **payloads: dict[str, Any]) -> Record:
        """Fill in the table as it is at the end. `row_1={…}` adds to a payload."""
        for row_id, row in self._rows.items():
            payload = {"tag": f"tag-{row_id}", **payloads.get(f"row_{row_id}", {})}
            errors = [{"error": row["error"]}] * row["errors"]
            self.record.rows.append(Row(row_id, row["topic"], row["new"], False, errors, payload))
        self.record.now = self.time
        return self.record


def good() -> Story:
    """Two rows of a key, a rescue, a retry by a person, an effect, a session with a sandbox and messages."""
    s = Story()
    s.insert(1, key="k", topic="transactional")
    s.insert(2, key="k")
    s.claim(1)
    s.time += 0.5
    s.line("died", pid=1)
    s.rescue(1)
    s.claim(1, B)
    s.finish(1)
    s.record.effects.append(Effect(s.event(1, "done"), 1, 2, "end"))
    s.run(2, B)
    s.insert(3, topic="limited")
    s.claim(3, B)
    s.finish(3)
    s.event(3, "dead", failures=1, errors=1, error="broke")
    s.event(3, "ready", failures=0)
    s.run(3, B)
    s.insert(4, topic="session.run", ack=False)
    s.line("enqueue", tag="title", ids=[], rows=1, booked=False, outcome="unknown")
    s.claim(4, B)
    s.record.borrowed.append(Token(s.commit(), "box", 4, 1))
    s.record.messages += [Message("s", n, "p", 1, {"n": n, "attempt": 1}, s.commit()) for n in (1, 2)]
    s.finish(4)
    ended = s.event(4, "done")
    s.event(5, "ready", xid=ended, topic="sandbox.return")
    s.claim(5, B)
    s.finish(5)
    s.record.returned.append(Token(s.event(5, "done"), "box", 5, 1))
    s.record.sessions.append(Session("s", "title", "completed", None, 2))
    s.record.prompts.append(Prompt("p", "succeeded", {"messages": 2}))
    return s


PAYLOADS: dict[str, dict[str, Any]] = {
    "row_4": {"tag": None, "session_id": "s", "prompt_id": "p"},
    "row_5": {"session_id": "s", "sandbox": {"borrow_token": "box"}},
}


def test_good_history_has_no_violation() -> None:
    record = good().close(**PAYLOADS)
    assert check(record) == []
    assert excused(record) == 0
    assert rescue_times(record) == {"parent": [], "lease": [1.0]}


def test_every_check_is_tried() -> None:
    assert {judge.__name__ for judge in CHECKS} == {name for name, _, _ in BAD}


def found(record: Record) -> set[str]:
    return {text.partition(":")[0] for text in check(record)}


# Each takes the good story and spoils it. `expected` is the check that must notice; others may too.
BAD: list[tuple[str, str, Callable[[Story], None]]] = []


def bad(expected: str) -> Callable[[Callable[[Story], None]], Callable[[Story], None]]:
    def add(spoil: Callable[[Story], None]) -> Callable[[Story], None]:
        BAD.append((expected, spoil.__name__, spoil))
        return spoil

    return add


@bad("promises")
def acked_row_is_lost(s: Story) -> None:
    s.line("enqueue", tag="lost", ids=[99], rows=1, booked=False, outcome="acked")


@bad("promises")
def rolled_back_row_is_there(s: Story) -> None:
    s.insert(20, ack=False)
    s.line("enqueue", tag="tag-20", ids=[20], rows=1, booked=False, outcome="rolled_back")
    s.run(20)


@bad("promises")
def half_of_a_transaction_is_there(s: Story) -> None:
    s.insert(20, ack=False)
    s.line("enqueue", tag="tag-20", ids=[20, 21], rows=2, booked=False, outcome="unknown")
    s.run(20)


@bad("promises")
def booking_without_its_row(s: Story) -> None:
    s.record.booked["gone"] = 1
    s.line("enqueue", tag="gone", ids=[99], rows=1, booked=True, outcome="unknown")


@bad("promises")
def session_created_twice_under_one_key(s: Story) -> None:
    s.record.sessions.append(Session("s2", "title", "completed", None, 0))
    s.event(20, "ready", topic="session.run")
    s.run(20)
    PAYLOADS_OF[20] = {"tag": None, "session_id": "s2"}


PAYLOADS_OF: dict[int, dict[str, Any]] = {}


@bad("starts")
def handler_ran_without_a_claim(s: Story) -> None:
    s.line("start", id=1, attempt=7, worker=A, pid=1, key="k", topic="t", place="p")


@bad("starts")
def handler_ran_twice_for_one_claim(s: Story) -> None:
    s.record.lines.append(next(line for line in s.record.lines if line["e"] == "start"))


@bad("starts")
def handler_ran_on_another_worker(s: Story) -> None:
    s.insert(20)
    s.claim(20, A)
    s.record.lines[-1]["worker"] = B
    s.event(20, "done")


@bad("chains")
def done_row_runs_again(s: Story) -> None:
    s.run(2)


@bad("chains")
def attempt_is_not_raised(s: Story) -> None:
    s.insert(20)
    s.event(20, "running", worker_id=A)
    s.event(20, "done")


@bad("chains")
def failure_without_an_error(s: Story) -> None:
    s.insert(20)
    s.claim(20)
    s.event(20, "ready", failures=1)
    s.run(20)


@bad("chains")
def error_is_lost(s: Story) -> None:
    s.insert(20)
    s.claim(20)
    s.rescue(20)
    s.run(20)
    s._rows[20]["errors"] = 0


@bad("exclusion")
def two_rows_of_a_key_run(s: Story) -> None:
    s.insert(20, key="k")
    s.insert(21, key="k")
    s.claim(20)
    s.claim(21, B)
    s.event(20, "done")
    s.event(21, "done")


@bad("exclusion")
def claimed_before_the_end_was_committed(s: Story) -> None:
    """By the clock and by seq the end came first, but the claim did not see it."""
    s.insert(20, key="k")
    s.insert(21, key="k")
    s.claim(20)
    s.finish(20)
    ended = s.event(20, "done")
    s.claim(21, B, sees=f"{ended}:{ended + 5}:{ended}")
    s.event(21, "done")


@bad("order")
def later_row_of_a_key_runs_first(s: Story) -> None:
    s.insert(20, key="k")
    s.insert(21, key="k")
    s.run(21)
    s.run(20)


@bad("limits")
def more_run_than_the_limit(s: Story) -> None:
    s.insert(20, topic="limited")
    s.insert(21, topic="limited")
    s.claim(20)
    s.claim(21, B)
    s.event(20, "done")
    s.event(21, "done")


@bad("fencing")
def effect_is_committed_after_the_rescue(s: Story) -> None:
    s.insert(20)
    s.claim(20)
    s.rescue(20)
    s.record.effects.append(Effect(s.commit(), 20, 1, "step"))
    s.run(20, B)


@bad("fencing")
def message_is_committed_while_the_rescue_runs(s: Story) -> None:
    """A check and then a write: its transaction is older, its commit is not seen by the rescue."""
    s.insert(20, topic="session.run")
    s.claim(20)
    writing = s.commit()
    rescued = s.xid + 1
    s.event(20, "ready", xid=s.commit(), sees=f"{writing}:{rescued}:{writing}")
    s.record.messages.append(Message("s", 3, "p20", 1, {"n": 1, "attempt": 1}, writing))
    PAYLOADS_OF[20] = {"session_id": "s", "prompt_id": "p20"}
    s.run(20)


@bad("fencing")
def effect_of_an_attempt_that_never_was(s: Story) -> None:
    s.record.effects.append(Effect(s.commit(), 1, 9, "step"))


@bad("effects")
def row_takes_effect_twice(s: Story) -> None:
    s.record.effects.append(s.record.effects[0])


@bad("effects")
def fenced_attempt_takes_effect(s: Story) -> None:
    end = s.record.effects.pop()
    s.record.effects.append(Effect(end.xid, 1, 1, "end"))


@bad("effects")
def done_without_its_effect(s: Story) -> None:
    s.record.effects.clear()


@bad("effects")
def done_with_half_its_steps(s: Story) -> None:
    s.insert(20, topic="stepwise")
    s.claim(20)
    s.record.effects.append(Effect(s.commit(), 20, 1, "step"))
    s.event(20, "done")
    PAYLOADS_OF[20] = {"steps": 2}


@bad("sandboxes")
def sandbox_is_not_returned(s: Story) -> None:
    s.record.returned.clear()


@bad("sandboxes")
def sandbox_is_returned_twice(s: Story) -> None:
    s.record.returned.append(s.record.returned[0])


@bad("sandboxes")
def sandbox_nobody_borrowed_is_returned(s: Story) -> None:
    s.record.returned.append(Token(s.xid, "other", 5, 1))


@bad("messages")
def message_is_missing(s: Story) -> None:
    s.record.messages.pop(0)


@bad("messages")
def message_is_there_twice(s: Story) -> None:
    s.record.messages.append(s.record.messages[-1])


@bad("messages")
def last_message_of_a_done_prompt_is_missing(s: Story) -> None:
    s.record.messages.pop()
    s.record.sessions[0] = Session("s", "title", "completed", None, 1)


@bad("messages")
def messages_are_out_of_order(s: Story) -> None:
    first, second = s.record.messages
    s.record.messages = [
        Message("s", 1, "p", 1, second.body, first.xid),
        Message("s", 2, "p", 1, first.body, second.xid),
    ]


@bad("messages")
def new_attempt_does_not_supersede(s: Story) -> None:
    s.record.messages.append(Message("s", 3, "p", 2, {"n": 1, "attempt": 2}, s.xid))
    s.record.sessions[0] = Session("s", "title", "completed", None, 3)


@bad("all_ended")
def row_waits_for_ever(s: Story) -> None:
    s.insert(20)


@bad("all_ended")
def session_is_active_for_ever(s: Story) -> None:
    s.record.sessions[0] = Session("s", "title", "active", None, 2)


@bad("all_ended")
def session_holds_its_sandbox(s: Story) -> None:
    s.record.sessions[0] = Session("s", "title", "completed", {"borrow_token": "box"}, 2)


@bad("all_ended")
def prompt_does_not_follow(s: Story) -> None:
    s.record.prompts[0] = Prompt("p", "running", {"messages": 2})


@bad("early")
def claimed_before_its_time(s: Story) -> None:
    s.insert(10, due=s.time + 60)
    s.run(10)


@bad("leases")
def worker_is_ended_before_its_lease(s: Story) -> None:
    s.record.lives.append(Life(at=10, worker_id=A, lease_until=10.5, reason="its lease ran out"))


@bad("overlaps")
def handed_back_while_it_goes_on(s: Story) -> None:
    s.insert(20)
    s.claim(20)
    s.event(20, "ready")
    s.claim(20, B)
    s.record.lines.append({"e": "finish", "t": s.time + 5, "w": 0, "id": 20, "attempt": 1, "how": "late"})
    s.event(20, "done")


@bad("lateness")
def lone_row_waits_in_a_lull(s: Story) -> None:
    s.insert(20, topic="lone")
    s.time += 20
    s.run(20)


@pytest.mark.parametrize(("expected", "spoil"), [(e, f) for e, _, f in BAD], ids=[name for _, name, _ in BAD])
def test_bad_history_is_found(expected: str, spoil: Callable[[Story], None]) -> None:
    PAYLOADS_OF.clear()
    story = good()
    spoil(story)
    more = {f"row_{row_id}": payload for row_id, payload in PAYLOADS_OF.items()}
    assert expected in found(story.close(**PAYLOADS, **more))


def test_overlap_after_a_rescue_is_counted_apart() -> None:
    s = good()
    s.insert(20)
    s.claim(20)
    s.rescue(20)
    s.claim(20, B)
    s.record.lines.append({"e": "finish", "t": s.time + 5, "w": 0, "id": 20, "attempt": 1, "how": "late"})
    s.event(20, "done")
    record = s.close(**PAYLOADS)
    assert check(record) == []
    assert excused(record) == 1


def test_overlap_of_a_handler_that_started_late_is_counted_apart() -> None:
    """Its claim's answer came when the row had been rescued, and ran elsewhere."""
    s = Story()
    s.insert(20)
    s.claim(20)
    late = s.record.lines.pop()
    s.rescue(20)
    s.claim(20, B)
    s.time += 1
    s.record.lines.append({**late, "t": s.time, "w": s.time})
    s.finish(20)
    s.event(20, "done")
    record = s.close()
    assert check(record) == []
    assert excused(record) == 1


def test_a_change_made_by_a_trigger_comes_after_the_one_that_caused_it() -> None:
    """A person makes a marked row ready, and a trigger ends it. That is recorded the other way round."""
    s = Story()
    s.insert(20)
    s.claim(20)
    s.finish(20)
    xid = s.event(20, "ready", app=PERSON)
    s.event(20, "cancelled", app=PERSON, xid=xid)
    outer, nested = s.record.events[-2:]
    s.record.events[-2:] = [replace(nested, seq=outer.seq), replace(outer, seq=nested.seq)]
    assert check(s.close()) == []


def test_a_row_that_fails_for_ever_loses_its_oldest_errors() -> None:
    s = Story()
    s.insert(20)
    for _ in range(102):
        s.claim(20)
        s.finish(20)
        s.rescue(20)
        row = s._rows[20]
        row["errors"] = min(row["errors"], 100)
        s.record.events[-1] = replace(s.record.events[-1], errors=row["errors"])
    s.run(20)
    assert check(s.close()) == []


def test_overlap_after_a_person_took_the_row_is_counted_apart() -> None:
    s = good()
    s.insert(20)
    s.claim(20)
    s.event(20, "ready", app=PERSON)
    s.claim(20, B, app="worker")
    s.record.lines.append({"e": "finish", "t": s.time + 5, "w": 0, "id": 20, "attempt": 1, "how": "late"})
    s.event(20, "done")
    assert check(s.close(**PAYLOADS)) == []


@pytest.mark.parametrize(("target", "late"), [("lone", False), ("postgres", False), ("one", True)])
def test_lateness_is_excused_by_a_fault_that_can_cause_it(target: str, late: bool) -> None:
    s = good()
    s.insert(20, topic="lone")
    s.line("fault", n=1, kind="partition", target=target)
    s.time += 20
    s.line("healed", n=1)
    s.run(20)
    assert ("lateness" in found(s.close(**PAYLOADS))) == late


def test_what_runs_is_judged_only_at_the_end() -> None:
    s = good()
    s.insert(20)
    record = s.close(**PAYLOADS)
    record.final = False
    assert check(record) == []
