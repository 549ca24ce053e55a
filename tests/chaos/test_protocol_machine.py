"""The protocol in SQL alone, against a model: random interleavings of workers, producers and people.

Each rule is one call of a function of sql/ by one of several workers; after each the whole state is
compared with the model's, and what must hold in any state is checked. Nothing runs concurrently here: the
interleavings inside a call are those of tests/integration. `HYPOTHESIS_PROFILE=deep` runs for long.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import errors
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from tests.chaos.broken import break_rule

COMMON: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "print_blob": True,
    "report_multiple_bugs": False,
}
settings.register_profile("quick", max_examples=150, stateful_step_count=30, **COMMON)
settings.register_profile("deep", max_examples=5000, stateful_step_count=120, **COMMON)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

ENDED = ("done", "dead", "cancelled")
TOPICS = ("plain", "limited", "other")
LIMIT = 2
WORKERS = 3
KEYS = st.sampled_from([None, None, "a", "b"])
MAX_ATTEMPTS = 3


@dataclass
class Row:
    """What the model knows of a row."""

    id: int
    topic: str
    key: str | None
    priority: int
    delayed: bool
    unique: str | None = None
    session: str | None = None
    state: str = "ready"
    attempt: int = 0
    failures: int = 0
    errors: int = 0
    worker: int | None = None
    marked: bool = False

    @property
    def unfinished(self) -> bool:
        return self.state in ("ready", "running")


@dataclass
class Worker:
    """A life of a worker: its id, and whether its lease has run out or its life has ended."""

    id: str
    leased: bool = False
    over: bool = False
    ended: bool = False


@dataclass
class Session:
    prompts: list[tuple[str, int]] = field(default_factory=list)
    """(prompt id, row id)"""
    held: str | None = None
    returned: list[str] = field(default_factory=list)


class Protocol(RuleBasedStateMachine):
    """`conn` is given by the test."""

    conn: psycopg.Connection[Any]

    rows = Bundle("rows")
    attempts = Bundle("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.conn.execute("BEGIN")  # and never committed: the next example begins with an empty database
        self.model: dict[int, Row] = {}
        self.sessions: dict[str, Session] = {}
        self.workers = [self._new_worker() for _ in range(WORKERS)]

    def teardown(self) -> None:
        self.conn.execute("ROLLBACK")

    # What each does, and what should follow.

    @initialize(target=rows)
    def begin(self) -> Any:
        """Something of each kind, so that little is wasted on an empty database."""
        found = [self.enqueue("limited", None, 0, False, None) for _ in range(LIMIT + 1)]
        found += [self.enqueue("plain", "a", priority, False, None) for priority in (0, 5)]
        found += self.create_session(False).values
        return multiple(*found)

    @rule(
        target=rows,
        topic=st.sampled_from(TOPICS),
        key=KEYS,
        priority=st.sampled_from([0, 0, 5]),
        delayed=st.sampled_from([False, False, False, True]),
        unique=st.sampled_from([None, None, "u"]),
    )
    def enqueue(self, topic: str, key: str | None, priority: int, delayed: bool, unique: str | None) -> Any:
        taken = any(row.unique == unique and row.unfinished for row in self.model.values()) and unique
        query = (
            "INSERT INTO outbox (topic, ordering_key, priority, available_at, unique_key, max_attempts)"
            " VALUES (%s, %s, %s, clock_timestamp() + %s * interval '1 day', %s, %s) RETURNING id"
        )
        try:
            with self.conn.transaction():
                found = self._one(query, topic, key, priority, int(delayed), unique, MAX_ATTEMPTS)
        except errors.UniqueViolation:
            assert taken
            return multiple()
        assert not taken
        self.model[found] = Row(found, topic, key, priority, delayed, unique)
        return found

    @rule(target=rows, second=st.booleans())
    def create_session(self, second: bool) -> Any:
        session = str(uuid4())
        self.conn.execute(
            "SELECT session_create(%s, 'u', 'r', 'm', %s, 't', NULL, NULL, now(), 'first', true)",
            (session, session),
        )
        if second:
            self.conn.execute("SELECT prompt_create(%s, NULL, 'second', true)", (session,))
        found = self._rows(
            "SELECT id, payload ->> 'prompt_id' AS prompt FROM outbox WHERE payload ->> 'session_id' = %s"
            " ORDER BY id", session,
        )  # fmt: skip
        self.sessions[session] = Session([(row["prompt"], row["id"]) for row in found])
        for row in found:
            self.model[row["id"]] = Row(
                row["id"], "session.run", f"session:{session}", 0, False, session=session
            )
        return multiple(*(row["id"] for row in found))

    @rule(
        target=attempts,
        who=st.integers(0, WORKERS - 1),
        slots=st.integers(1, 4),
        topics=st.sampled_from([[*TOPICS, "session.run"], ["session.run"], ["limited"], ["other", "plain"]]),
    )
    def claim(self, who: int, slots: int, topics: list[str]) -> Any:
        worker = self.workers[who]
        query = "SELECT id, attempt FROM outbox_claim(%s, %s, %s, '1 hour')"
        if worker.ended:
            with pytest.raises(psycopg.Error, match="has ended"), self.conn.transaction():
                self.conn.execute(query, (worker.id, topics, slots))
            worker = self.workers[who] = self._new_worker()
        could = {row.id for row in self._claimable(topics)}
        claimed = self._rows(query, worker.id, topics, slots)
        assert len(claimed) <= slots
        for found in claimed:
            row = self.model[found["id"]]
            assert row.id in could, f"{row} was claimed"
            assert found["attempt"] == row.attempt + 1
            row.state, row.attempt, row.worker = "running", found["attempt"], who
            worker.leased, worker.over = True, False
        # A first look may only find rows blocked; each look marks those it meets, so that looks end.
        if not claimed and could:
            for _ in range(len(self.model)):
                if claimed := self._rows(query, worker.id, topics, slots):
                    break
            assert claimed, f"nobody can claim {could}"
            for found in claimed:
                row = self.model[found["id"]]
                assert row.id in could
                row.state, row.attempt, row.worker = "running", found["attempt"], who
                worker.leased, worker.over = True, False
        return multiple(*((found["id"], found["attempt"], who) for found in claimed))

    @rule(token=attempts)
    def complete(self, token: tuple[int, int, int]) -> None:
        row_id, attempt, _ = token
        ended = self._one("SELECT outbox_complete(%s, %s, %s)", self._life(token), [row_id], [attempt])
        if self._fenced(token):
            assert ended is None
            return
        assert ended == row_id
        row = self.model[row_id]
        row.state = "cancelled" if row.marked else "done"

    @rule(token=attempts, permanent=st.booleans())
    def fail(self, token: tuple[int, int, int], permanent: bool) -> None:
        row_id, attempt, _ = token
        state = self._one(
            "SELECT outbox_fail(%s, %s, %s, 'broke', '0', %s)", self._life(token), row_id, attempt, permanent
        )
        if self._fenced(token):
            assert state is None
            return
        row = self.model[row_id]
        self._failed(row, permanent)
        assert state == row.state

    @rule(token=attempts)
    def hand_back(self, token: tuple[int, int, int]) -> None:
        row_id, attempt, _ = token
        back = self._one("SELECT outbox_hand_back(%s, %s, %s)", self._life(token), [row_id], [attempt])
        if self._fenced(token):
            assert back is None
            return
        row = self.model[row_id]
        row.state = "cancelled" if row.marked else "ready"

    @rule(token=attempts)
    def end_cancelled(self, token: tuple[int, int, int]) -> None:
        row_id, attempt, _ = token
        ended = self._one("SELECT outbox_end_cancelled(%s, %s, %s)", self._life(token), row_id, attempt)
        if self._fenced(token):
            assert ended is None
            return
        row = self.model[row_id]
        assert ended == row.marked
        row.state = "cancelled" if row.marked else "ready"
        row.delayed = not row.marked  # it was not asked for: back, in a while

    @rule(token=attempts)
    def borrow(self, token: tuple[int, int, int]) -> None:
        """As a session's handler does, unless a sandbox is held; on any other row, only the fence."""
        row_id, attempt, _ = token
        row = self.model.get(row_id)
        session = None if row is None or row.session is None else self.sessions[row.session]
        with self.conn.transaction():
            mark = self._one("SELECT outbox_fence(%s, %s, %s)", self._life(token), row_id, attempt)
            assert (mark is None) == self._fenced(token)
            if mark is not None and row is not None and session is not None and session.held is None:
                session.held = str(uuid4())
                self.conn.execute(
                    "UPDATE session SET sandbox = %s WHERE id = %s",
                    (Jsonb({"item": {}, "borrow_token": session.held}), row.session),
                )

    @rule(token=attempts, count=st.integers(1, 3))
    def say(self, token: tuple[int, int, int], count: int) -> None:
        row_id, attempt, _ = token
        row = self.model.get(row_id)
        if row is None or row.session is None:
            return
        prompt = next(p for p, r in self.sessions[row.session].prompts if r == row_id)
        bodies = [Jsonb({"n": n}) for n in range(count)]
        fenced = self._one(
            "SELECT fenced FROM message_append(%s, %s, %s, %s, %s, %s::jsonb[])",
            self._life(token), row_id, attempt, row.session, prompt, bodies,
        )  # fmt: skip
        assert fenced == self._fenced(token)

    @precondition(lambda self: any(row.state == "running" for row in self.model.values()))
    @rule(
        index=st.integers(0, 7), how=st.sampled_from(["complete", "complete", "fail", "hand back", "go on"])
    )
    def proceed(self, index: int, how: str) -> None:
        """An attempt that is not fenced goes its way."""
        running = [row for row in self.model.values() if row.state == "running"]
        row = running[index % len(running)]
        assert row.worker is not None
        token = (row.id, row.attempt, row.worker)
        if row.session is not None:
            self.borrow(token)
            self.say(token, 1)
        if how == "complete":
            self.complete(token)
        elif how == "fail":
            self.fail(token, False)
        elif how == "hand back":
            self.hand_back(token)

    @rule(who=st.integers(0, WORKERS - 1))
    def renew(self, who: int) -> None:
        worker = self.workers[who]
        mine = [row for row in self.model.values() if row.state == "running" and self._holds(who, row)]
        query = "SELECT id, attempt, cancel FROM outbox_renew(%s, '1 hour', %s, %s)"
        # It believes to run one more, which is not its own: it must learn that.
        values = (worker.id, [row.id for row in mine] + [0], [row.attempt for row in mine] + [1])
        if worker.ended:
            with pytest.raises(psycopg.Error, match="has ended"), self.conn.transaction():
                self.conn.execute(query, values)
            return
        found = {(r["id"], r["attempt"], r["cancel"]) for r in self._rows(query, *values)}
        assert found == {(row.id, row.attempt, row.marked) for row in mine}
        worker.leased, worker.over = True, False

    @rule(who=st.integers(0, WORKERS - 1))
    def run_out(self, who: int) -> None:
        """Its lease ends now."""
        worker = self.workers[who]
        if worker.leased and not worker.ended:
            self.conn.execute(
                "UPDATE worker SET lease_until = clock_timestamp() - interval '1 minute' WHERE id = %s",
                (worker.id,),
            )
            worker.over = True

    @rule(who=st.integers(0, WORKERS - 1))
    def rescue(self, who: int) -> None:
        self.conn.execute("SELECT outbox_rescue(%s, '1 us', '1 hour')", (self.workers[who].id,))
        for other, worker in enumerate(self.workers):
            if other != who and worker.over and not worker.ended:
                if any(self._runs(other)):
                    self._life_ends(other)
                worker.leased = worker.over = False

    @rule(who=st.integers(0, WORKERS - 1), how=st.sampled_from(["parent", "delete", "leave"]))
    def end_worker(self, who: int, how: str) -> None:
        worker = self.workers[who]
        query = {
            "parent": "SELECT outbox_end_worker(%s, 'its worker died')",
            "delete": "DELETE FROM worker WHERE id = %s",
            "leave": "UPDATE worker SET ended_at = clock_timestamp(), parked = false, lease_until = NULL"
            " WHERE id = %s AND ended_at IS NULL",
        }[how]
        self.conn.execute(query, (worker.id,))
        if not worker.ended:
            self._life_ends(who)

    @rule(who=st.integers(0, WORKERS - 1))
    def park(self, who: int) -> None:
        worker = self.workers[who]
        if worker.ended:
            with pytest.raises(psycopg.Error, match="has ended"), self.conn.transaction():
                self.conn.execute("SELECT outbox_park(%s)", (worker.id,))
            return
        self.conn.execute("SELECT outbox_park(%s)", (worker.id,))
        # The others have no connection that holds their presence.
        assert self._rows("SELECT id::text FROM worker WHERE parked") == [{"id": worker.id}]

    @rule(who=st.integers(0, WORKERS - 1), lost=st.booleans())
    def reconnect(self, who: int, lost: bool) -> None:
        """It knows of what it runs, or the answers to its claims were lost."""
        worker = self.workers[who]
        mine = self._runs(who)
        known = [] if lost else mine
        query = "SELECT outbox_reconnect(%s, 1, %s::bigint[], %s::int[])"
        values = (worker.id, [row.id for row in known], [row.attempt for row in known])
        if worker.ended:
            with pytest.raises(psycopg.Error, match="has ended"), self.conn.transaction():
                self.conn.execute(query, values)
            return
        self.conn.execute(query, values)
        for row in mine:
            if row not in known:
                row.state = "cancelled" if row.marked else "ready"

    @rule(row_id=rows)
    def cancel(self, row_id: int) -> None:
        state = self._one("SELECT outbox_cancel(%s)", row_id)
        row = self.model.get(row_id)
        if row is None or not row.unfinished:
            assert state is None
            return
        row.marked = True
        if row.state == "ready":
            row.state = "cancelled"
        assert state == row.state

    @rule(row_id=rows)
    def retry(self, row_id: int) -> None:
        row = self.model.get(row_id)
        taken = row is not None and row.unique is not None and any(
            other.unique == row.unique and other.unfinished for other in self.model.values()
        )  # fmt: skip
        try:
            with self.conn.transaction():
                state = self._one("SELECT outbox_retry(%s)", row_id)
        except errors.UniqueViolation:
            assert taken
            return
        if row is None or row.state not in ("dead", "cancelled"):
            assert state is None
            return
        assert state == "ready"
        assert not taken
        row.state, row.failures, row.marked, row.delayed = "ready", 0, False, False

    @rule(row_id=rows)
    def discard(self, row_id: int) -> None:
        state = self._one("SELECT outbox_discard(%s)", row_id)
        row = self.model.get(row_id)
        if row is not None and row.state == "dead":
            row.state = "cancelled"
            assert state == "cancelled"
        else:
            assert state is None

    @rule(row_id=consumes(rows))
    def delete(self, row_id: int) -> None:
        self.conn.execute("DELETE FROM outbox WHERE id = %s", (row_id,))
        self.model.pop(row_id, None)

    @rule(row_id=rows, state=st.sampled_from(["ready", "done", "dead", "cancelled"]))
    def type_state(self, row_id: int, state: str) -> None:
        """A person at psql ends an unfinished row, or takes it away from its worker."""
        row = self.model.get(row_id)
        if row is not None and row.unfinished:
            self.conn.execute("UPDATE outbox SET state = %s WHERE id = %s", (state, row_id))
            row.state = "cancelled" if state == "ready" and row.marked else state

    @rule(row_id=rows, key=KEYS)
    def type_key(self, row_id: int, key: str | None) -> None:
        """A person gives a row that waits another key."""
        row = self.model.get(row_id)
        if row is not None and row.state == "ready" and row.session is None:
            self.conn.execute("UPDATE outbox SET ordering_key = %s WHERE id = %s", (key, row_id))
            row.key = key

    @rule(row_id=rows)
    def type_due(self, row_id: int) -> None:
        """A person makes a row due."""
        row = self.model.get(row_id)
        if row is not None and row.state == "ready":
            self.conn.execute("UPDATE outbox SET available_at = clock_timestamp() WHERE id = %s", (row_id,))
            row.delayed = False

    # What must hold in any state.

    @invariant()
    def agrees(self) -> None:
        query = (
            "SELECT id, state, attempt, failures, jsonb_array_length(errors) AS errors,"
            " cancel_requested_at IS NOT NULL AS marked FROM outbox WHERE topic <> 'sandbox.return'"
        )
        found = {r["id"]: r for r in self._rows(query)}
        assert found.keys() == self.model.keys()
        for row in self.model.values():
            r = found[row.id]
            # An error leaves the backoff to chance; the model makes the row due at once.
            assert (r["state"], r["attempt"], r["failures"], r["errors"]) == (
                row.state, row.attempt, row.failures, row.errors,
            ), row  # fmt: skip
            assert r["marked"] == row.marked, row

    @invariant()
    def key_runs_once_and_in_order(self) -> None:
        for key in {row.key for row in self.model.values()} - {None}:
            unfinished = [row for row in self.model.values() if row.key == key and row.unfinished]
            assert sum(row.state == "running" for row in unfinished) <= 1

    @invariant()
    def limit_holds(self) -> None:
        assert sum(r.topic == "limited" and r.state == "running" for r in self.model.values()) <= LIMIT

    @invariant()
    def nothing_is_blocked_for_ever(self) -> None:
        for r in self._rows("SELECT id, ordering_key AS key FROM outbox WHERE blocked"):
            row = self.model[r["id"]]
            assert row.state == "ready"
            assert any(
                other.key == row.key
                and (other.state == "running" or (other.unfinished and other.id < row.id))
                for other in self.model.values()
            ), f"{row} is blocked by nothing"

    @invariant()
    def sessions_follow(self) -> None:
        query = "SELECT id::text, inbox_status, sandbox ->> 'borrow_token' AS held FROM session"
        found = {r["id"]: r for r in self._rows(query)}
        for session_id, session in self.sessions.items():
            states = [self.model[r].state for _, r in session.prompts if r in self.model]
            wanted = "pending" if "running" in states else "active" if "ready" in states else "completed"
            if wanted == "completed" and session.held is not None:
                session.returned.append(session.held)
                session.held = None
            assert found[session_id]["inbox_status"] == wanted
            assert found[session_id]["held"] == session.held
        asked = self._rows(
            "SELECT payload #>> '{sandbox,borrow_token}' AS token FROM outbox WHERE topic = 'sandbox.return'"
        )
        wanted_back = [token for session in self.sessions.values() for token in session.returned]
        assert sorted(r["token"] for r in asked) == sorted(wanted_back)

    @invariant()
    def messages_count_without_a_gap(self) -> None:
        assert not self._rows(
            "SELECT s.id FROM session AS s LEFT JOIN message AS m ON m.session_id = s.id GROUP BY s.id"
            " HAVING s.last_seq <> count(m.seq) OR coalesce(max(m.seq), 0) <> count(m.seq)"
        )

    @invariant()
    def prompts_follow(self) -> None:
        status = {"ready": "queued", "running": "running", "done": "succeeded", "dead": "failed",
                  "cancelled": "cancelled"}  # fmt: skip
        found = {r["id"]: r["status"] for r in self._rows("SELECT id::text, status FROM prompt")}
        for session in self.sessions.values():
            for prompt, row_id in session.prompts:
                if row_id in self.model:
                    wanted = status[self.model[row_id].state]
                    assert found[prompt] == wanted or self._discarded(row_id, found[prompt])

    def _discarded(self, row_id: int, status: str) -> bool:
        """A dead row that is discarded is cancelled; its prompt stays failed."""
        return self.model[row_id].state == "cancelled" and status == "failed"

    # The model's own.

    def _new_worker(self) -> Worker:
        return Worker(
            self._one(
                "INSERT INTO worker (host, pid, version, topics, concurrency, presence)"
                " VALUES ('h', 1, '0', %s, 4, 1) RETURNING id::text", list(TOPICS),
            )
        )  # fmt: skip

    def _life(self, token: tuple[int, int, int]) -> str:
        """Under which id that attempt was claimed, or its successor's, whose attempts are others."""
        return self.workers[token[2]].id

    def _holds(self, who: int, row: Row) -> bool:
        return row.worker == who

    def _runs(self, who: int) -> list[Row]:
        return [row for row in self.model.values() if row.state == "running" and row.worker == who]

    def _fenced(self, token: tuple[int, int, int]) -> bool:
        row_id, attempt, who = token
        row = self.model.get(row_id)
        return row is None or (row.state, row.attempt, row.worker) != ("running", attempt, who)

    def _claimable(self, topics: list[str]) -> Iterator[Row]:
        """Rows that a claim may take. Of a key only the first, and only if none of it runs."""
        room = LIMIT - sum(r.topic == "limited" and r.state == "running" for r in self.model.values())
        for row in self.model.values():
            if row.state != "ready" or row.delayed or row.topic not in topics:
                continue
            if row.topic == "limited" and room <= 0:
                continue
            if row.key is not None and any(
                o.key == row.key
                and o is not row
                and (o.state == "running" or (o.unfinished and o.id < row.id))
                for o in self.model.values()
            ):
                continue
            yield row

    def _failed(self, row: Row, permanent: bool = False) -> None:
        row.failures += 1
        row.errors += 1
        spent = permanent or row.failures >= MAX_ATTEMPTS + 7 * (row.session is not None)
        row.state = "cancelled" if row.marked else "dead" if spent else "ready"

    def _life_ends(self, who: int) -> None:
        for row in self._runs(who):
            again = row.failures > 0
            self._failed(row)
            if again and row.state == "ready":  # it backs off; make it due, as the model has it
                self.conn.execute(
                    "UPDATE outbox SET available_at = clock_timestamp() WHERE id = %s", (row.id,)
                )
        self.workers[who].ended = True

    def _rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        with self.conn.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), values).fetchall()

    def _one(self, query: str, *values: Any) -> Any:
        row = self.conn.execute(query.encode(), values).fetchone()
        return None if row is None else row[0]


@pytest.fixture
def machine(database: str) -> Iterator[type[RuleBasedStateMachine]]:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("DELETE FROM outbox")
        conn.execute("INSERT INTO topic (name, max_running) VALUES ('limited', %s)", (LIMIT,))
        yield type("Machine", (Protocol,), {"conn": conn})


def test_protocol_agrees_with_its_model(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=PROFILE)


@pytest.mark.parametrize("broken", ["fence", "order", "room", "keep", "return"])
def test_machine_notices_a_broken_rule(machine: type[RuleBasedStateMachine], broken: str) -> None:
    break_rule(vars(machine)["conn"], broken)
    # Whatever it raises: a model that disagrees, or the server that refuses what follows.
    with pytest.raises((AssertionError, psycopg.Error)):
        run_state_machine_as_test(
            machine, settings=settings(PROFILE, phases=[Phase.generate], max_examples=1000)
        )
