"""Judges a chaos run: pure functions from what was recorded to the violations found.

There are two records. The database's own (tables.sql) tells every change of state, with the transaction
that made it and the snapshot it saw: what it shows is exact, no clock is asked. The other (history.py) is
told by handlers and producers from outside: what they were promised, and when they really ran.

Two handlers may overlap in time although the database gave the row to one only: nothing can stop a
process that is frozen past its lease. Such overlaps are counted apart; one that the database does not
explain by having taken the row away first is a violation.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from tests.chaos.history import Line

ENDED = frozenset({"done", "dead", "cancelled"})
PERSON = "chaos person"
_MOST_ERRORS = 100
"""Errors that a row keeps (outbox_error)."""
LATE = 3.0
"""Seconds after which a due row should long have started, if nothing troubles its worker or the server."""
RECOVERY = 6.0
"""Seconds after a fault in which a worker may still be on its way back: a start, a backoff, a lease."""


@dataclass(frozen=True)
class Snapshot:
    """Which transactions a statement saw."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> "Snapshot":
        """PostgreSQL's form, `xmin:xmax:xid,xid`."""
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(x) for x in running.split(",") if x))

    def sees(self, xid: int) -> bool:
        """Whether it shows what this committed transaction did."""
        return xid < self.xmin or (xid < self.xmax and xid not in self.running)


@dataclass(frozen=True)
class Event:
    """A row was inserted (old is None), deleted (new is None) or changed."""

    seq: int
    at: float
    xid: int
    snapshot: Snapshot
    app: str
    row_id: int
    topic: str
    key: str | None
    old: str | None
    new: str | None
    attempt: int
    failures: int
    errors: int
    error: str | None
    worker_id: str | None
    limited: bool
    started: float | None
    due: float = 0.0
    """When it may run: available_at."""

    def sees(self, other: "Event") -> bool:
        """Whether the other was committed before this, or is of the same transaction."""
        return self.xid == other.xid or self.snapshot.sees(other.xid)

    @property
    def by_person(self) -> bool:
        return self.app == PERSON


@dataclass(frozen=True)
class Life:
    """A worker's life that ended, with the lease it had."""

    at: float
    worker_id: str
    lease_until: float | None
    reason: str | None


@dataclass(frozen=True)
class Row:
    """A row of the outbox at the end."""

    id: int
    topic: str
    state: str
    blocked: bool
    errors: list[dict[str, Any]]
    payload: dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """What an attempt wrote. `end`: in the transaction that ended the row."""

    xid: int
    row_id: int
    attempt: int
    kind: str


@dataclass(frozen=True)
class Token:
    """A sandbox that an attempt borrowed or returned."""

    xid: int
    token: str
    row_id: int
    attempt: int


@dataclass(frozen=True)
class Message:
    session_id: str
    seq: int
    prompt_id: str
    attempt: int
    body: dict[str, Any]
    xid: int


@dataclass(frozen=True)
class Session:
    id: str
    title: str
    inbox_status: str
    sandbox: Any
    last_seq: int


@dataclass(frozen=True)
class Prompt:
    id: str
    status: str
    plan: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One attempt as the database saw it: the claim, and what ended it, if anything has."""

    claim: Event
    end: Event | None


@dataclass
class Record:
    """All that was recorded. `final`: faults are over, and all had time to end."""

    lines: list[Line] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    booked: dict[str, int] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    borrowed: list[Token] = field(default_factory=list)
    returned: list[Token] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    limits: dict[str, int] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)
    """The process of each worker id."""
    now: float = 0.0
    final: bool = True

    @cached_property
    def chains(self) -> dict[int, list[Event]]:
        """Each row's events. A row's changes follow each other by its lock, so seq is their order.

        But a trigger that changes a row again (outbox_settle) does so before the first change is recorded.
        """
        found: dict[int, list[Event]] = defaultdict(list)
        for event in sorted(self.events, key=lambda e: e.seq):
            chain = found[event.row_id]
            again = chain[-1] if chain else None
            if (
                again is not None
                and again.xid == event.xid
                and again.old == event.new != event.old
                and (event.old is None if len(chain) == 1 else chain[-2].new == event.old)
            ):
                chain.insert(-1, event)
            else:
                chain.append(event)
        return found

    @cached_property
    def runs(self) -> dict[tuple[int, int], Run]:
        """Each attempt, by (id, attempt)."""
        found = {}
        for row_id, chain in self.chains.items():
            for place, event in enumerate(chain):
                if event.new == "running" and event.old != "running":
                    end = next((e for e in chain[place + 1 :] if e.new != "running"), None)
                    found[row_id, event.attempt] = Run(event, end)
        return found

    @cached_property
    def payloads(self) -> dict[int, dict[str, Any]]:
        return {row.id: row.payload for row in self.rows}

    def of(self, event: str) -> Iterator[Line]:
        """The lines of that kind."""
        return (line for line in self.lines if line["e"] == event)


Check = Callable[[Record], Iterator[str]]


def promises(record: Record) -> Iterator[str]:
    """What was acknowledged is there, what was rolled back is not, what is unknown is whole or absent."""
    titles = {session.id: session.title for session in record.sessions}
    found: dict[str, int] = defaultdict(int)
    for row in record.rows:
        if row.topic != "sandbox.return":
            found[row.payload.get("tag") or titles.get(str(row.payload.get("session_id")), "")] += 1
    for line in record.of("enqueue"):
        tag, wanted, booked = line["tag"], line["rows"], line["booked"]
        whole = found[tag] == wanted and (not booked or record.booked.get(tag) == wanted)
        absent = found[tag] == 0 and tag not in record.booked
        allowed = {"acked": whole, "rolled_back": absent, "unknown": whole or absent}
        if not allowed[line["outcome"]]:
            yield f"{line['outcome']} transaction {tag} of {wanted} rows has {found[tag]}"


def starts(record: Record) -> Iterator[str]:
    """A handler starts only for a claim that was committed, and once for each."""
    seen = set()
    for line in record.of("start"):
        token = (line["id"], line["attempt"])
        run = record.runs.get(token)
        if run is None and record.final:
            yield f"attempt {token} ran, and no such claim was committed"
        elif run is not None and run.claim.worker_id != line["worker"]:
            yield f"attempt {token} is {run.claim.worker_id}'s, and ran on {line['worker']}"
        if token in seen:
            yield f"attempt {token} ran twice"
        seen.add(token)


def early(record: Record) -> Iterator[str]:
    """No row is claimed before its time, by the database's clock."""
    for (row_id, attempt), run in record.runs.items():
        started = run.claim.started
        if started is not None and started < run.claim.due:
            yield f"attempt {row_id, attempt} was claimed {run.claim.due - started:.3f} s before its time"


_TRANSITIONS = {
    (None, "ready"), ("ready", "running"), ("running", "done"), ("running", "ready"), ("running", "dead"),
    ("running", "cancelled"), ("ready", "cancelled"), ("dead", "cancelled"), ("dead", "ready"),
    ("cancelled", "ready"),
}  # fmt: skip


def chains(record: Record) -> Iterator[str]:
    """States follow the graph; attempt rises with each claim, failures with each error; errors are kept."""
    for row_id, chain in record.chains.items():
        if chain[0].old is not None:
            yield f"row {row_id} was never inserted"
        for before, event in pairwise(chain):
            what = f"row {row_id}: {event.old} -> {event.new} (attempt {event.attempt})"
            if event.old != before.new:
                yield f"{what} after {before.new}"
            if event.old != event.new and (event.old, event.new) not in _TRANSITIONS:
                yield f"{what} is no transition"
            if event.attempt != before.attempt + (event.new == "running" and event.old != "running"):
                yield f"{what}: attempt was {before.attempt}"
            forgiven = event.old in ("dead", "cancelled") and event.new == "ready"
            failed = event.errors - before.errors
            if before.errors == _MOST_ERRORS:
                failed = int(event.failures > before.failures)  # the oldest error made room
            if event.failures != (0 if forgiven else before.failures + failed) or failed not in (0, 1):
                yield f"{what}: failures {before.failures} -> {event.failures}, errors {failed:+}"
    for row in record.rows:
        chain = record.chains.get(row.id, [])
        if chain and (len(row.errors) != chain[-1].errors or not all(e.get("error") for e in row.errors)):
            yield f"row {row.id} lost errors"


def exclusion(record: Record) -> Iterator[str]:
    """When a row of a key is claimed, no other of that key runs."""
    for key, runs in _by_key(record).items():
        for run in runs:
            for other in _running_at(run.claim, runs):
                yield f"key {key}: row {run.claim.row_id} was claimed while {other.claim.row_id} ran"


def order(record: Record) -> Iterator[str]:
    """When a row of a key is claimed, none with a lower id waits whose commit was known before."""
    acked = {row_id: line["w"] for line in record.of("enqueue") if line["outcome"] == "acked"
             for row_id in line["ids"]}  # fmt: skip
    waiting: dict[str, list[tuple[float, int, Event | None]]] = defaultdict(list)
    for row_id, chain in record.chains.items():
        if (key := chain[0].key) is not None and row_id in acked:
            waiting[key].append((acked[row_id], row_id, next((e for e in chain if e.new in ENDED), None)))
    for key, runs in _by_key(record).items():
        for claim in (run.claim for run in runs):
            assert claim.started is not None
            for known, row_id, end in waiting[key]:
                waits = row_id < claim.row_id and known < claim.started
                if waits and (end is None or not claim.sees(end)):
                    yield f"key {key}: row {claim.row_id} was claimed before {row_id}"


def limits(record: Record) -> Iterator[str]:
    """No claim makes more rows of a topic run than its limit."""
    topics: dict[str, list[Run]] = defaultdict(list)
    for run in record.runs.values():
        if run.claim.topic in record.limits:
            topics[run.claim.topic].append(run)
    for topic, runs in topics.items():
        for run in runs:
            count = 1 + len(_running_at(run.claim, runs))
            if count > record.limits[topic]:
                yield f"topic {topic}: {count} ran when row {run.claim.row_id} was claimed"


def _by_key(record: Record) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in record.runs.values():
        if run.claim.key is not None:
            found[run.claim.key].append(run)
    return found


def _running_at(claim: Event, runs: Iterable[Run]) -> list[Run]:
    """Which of these, but the claim's own row, ran as the claim's snapshot shows."""
    oldest = claim.snapshot.xmin
    return [
        run
        for run in runs
        # The first condition follows from the last; it is cheap and true of nearly all.
        if (run.end is None or run.end.xid >= oldest)
        and run.claim.row_id != claim.row_id
        and claim.sees(run.claim)
        and (run.end is None or not claim.sees(run.end))
    ]


def fencing(record: Record) -> Iterator[str]:
    """What an attempt wrote was committed while the row was its own: before, or with, what ended it."""
    written = [(f"effect {e.kind}", e.xid, e.row_id, e.attempt) for e in record.effects]
    written += [("a borrowed sandbox", t.xid, t.row_id, t.attempt) for t in record.borrowed]
    written += [("a returned sandbox", t.xid, t.row_id, t.attempt) for t in record.returned]
    prompt_row = {str(p.get("prompt_id")): i for i, p in record.payloads.items() if "prompt_id" in p}
    written += [
        ("a message", m.xid, prompt_row[m.prompt_id], m.attempt)
        for m in record.messages
        if m.prompt_id in prompt_row
    ]
    for what, xid, row_id, attempt in written:
        run = record.runs.get((row_id, attempt))
        if run is None:
            yield f"{what} of attempt ({row_id}, {attempt}), which never was"
        elif run.end is not None and run.end.xid != xid and not run.end.snapshot.sees(xid):
            yield f"{what} of attempt ({row_id}, {attempt}) was committed after it had ended as {run.end.new}"


def effects(record: Record) -> Iterator[str]:
    """Of a row that is done, exactly the effects of the attempt that ended it are there, and once."""
    ends: dict[int, list[Effect]] = defaultdict(list)
    count: dict[tuple[int, int], int] = defaultdict(int)
    for effect in record.effects:
        if effect.kind == "end":
            ends[effect.row_id].append(effect)
        else:
            count[effect.row_id, effect.attempt] += 1
    for row_id, found in ends.items():
        if len(found) > 1:
            yield f"row {row_id} took effect {len(found)} times"
        for effect in found:
            run = record.runs.get((row_id, effect.attempt))
            if run is not None and (run.end is None or (run.end.new, run.end.xid) != ("done", effect.xid)):
                yield f"row {row_id} took effect by attempt {effect.attempt}, which did not end it"
    for (row_id, attempt), run in record.runs.items():
        if run.end is None or run.end.new != "done" or run.end.by_person:
            continue
        if run.claim.topic == "transactional" and not ends[row_id]:
            yield f"row {row_id} is done without its effect"
        wanted = record.payloads.get(row_id, {}).get("steps")
        if run.claim.topic == "stepwise" and wanted is not None and count[row_id, attempt] != wanted:
            yield f"row {row_id} is done with {count[row_id, attempt]} of {wanted} steps"


def sandboxes(record: Record) -> Iterator[str]:
    """Every sandbox borrowed is returned, once, and none else."""
    borrowed = [token.token for token in record.borrowed]
    returned = [token.token for token in record.returned]
    asked = [r.payload["sandbox"]["borrow_token"] for r in record.rows if r.topic == "sandbox.return"]
    for name, tokens in (("borrowed", borrowed), ("returned", returned), ("asked back", asked)):
        for token in {t for t in tokens if tokens.count(t) > 1}:
            yield f"sandbox {token} was {name} {tokens.count(token)} times"
    for token in set(returned) - set(borrowed):
        yield f"sandbox {token} was returned and never borrowed"
    if record.final:
        for token in set(borrowed) - set(returned):
            yield f"sandbox {token} was not returned"


def messages(record: Record) -> Iterator[str]:
    """A session's messages count from 1 without gap or double, and a done prompt's last attempt is whole."""
    by_session: dict[str, list[Message]] = defaultdict(list)
    for message in record.messages:
        by_session[message.session_id].append(message)
    last_seq = {session.id: session.last_seq for session in record.sessions}
    for session, found in by_session.items():
        seqs = sorted(m.seq for m in found)
        if seqs != list(range(1, len(seqs) + 1)) or last_seq.get(session) != len(seqs):
            yield f"session {session} has messages {seqs}, last_seq {last_seq.get(session)}"
    yield from _prompts_messages(record)


def _prompts_messages(record: Record) -> Iterator[str]:
    by_prompt: dict[str, list[Message]] = defaultdict(list)
    for message in sorted(record.messages, key=lambda m: (m.session_id, m.seq)):
        by_prompt[message.prompt_id].append(message)
    plans = {prompt.id: prompt.plan for prompt in record.prompts}
    for row in record.rows:
        prompt = str(row.payload.get("prompt_id"))
        if row.topic != "session.run" or prompt not in plans:
            continue
        said: dict[int, list[int]] = defaultdict(list)
        attempt = 0
        for message in by_prompt[prompt]:
            if message.attempt < attempt:
                yield f"prompt {prompt}: attempt {message.attempt} wrote after {attempt}"
            if 0 < attempt < message.attempt and message.body.get("type") != "superseded":
                yield f"prompt {prompt}: attempt {message.attempt} does not say that it supersedes"
            attempt = message.attempt
            if "n" in message.body:
                said[attempt].append(message.body["n"])
                if message.body.get("attempt") != attempt:
                    yield f"prompt {prompt}: attempt {message.body.get('attempt')} wrote as {attempt}"
        for attempt, numbers in said.items():
            if numbers != list(range(1, len(numbers) + 1)):
                yield f"prompt {prompt}: attempt {attempt} said {numbers}"
        last = record.chains[row.id][-1] if row.id in record.chains else None
        if last is not None and last.new == "done" and not last.by_person:
            wanted = plans[prompt]["messages"]
            if len(said[last.attempt]) != wanted:
                yield f"prompt {prompt} is done, with {len(said[last.attempt])} of {wanted} messages"


_PROMPT_OF_ROW = {"done": "succeeded", "dead": "failed", "cancelled": "cancelled"}


def all_ended(record: Record) -> Iterator[str]:
    """In the end every row has ended, and sessions and prompts say so."""
    if not record.final:
        return
    prompts = {prompt.id: prompt.status for prompt in record.prompts}
    for row in record.rows:
        if row.topic == "outbox.prune":
            continue
        if row.state not in ENDED or row.blocked:
            yield f"row {row.id} ({row.topic}) is {row.state}{', blocked' if row.blocked else ''}"
        status = prompts.get(str(row.payload.get("prompt_id")))
        if row.topic == "session.run" and status not in (None, _PROMPT_OF_ROW.get(row.state)):
            yield f"row {row.id} is {row.state}, its prompt {status}"
    for session in record.sessions:
        if session.inbox_status not in ("completed", "archived") or session.sandbox is not None:
            held = ", holds a sandbox" if session.sandbox is not None else ""
            yield f"session {session.id} is {session.inbox_status}{held}"


def leases(record: Record) -> Iterator[str]:
    """A life is ended for its lease only when the lease was over."""
    for life in record.lives:
        if life.reason == "its lease ran out" and (life.lease_until is None or life.lease_until > life.at):
            left = 0.0 if life.lease_until is None else life.lease_until - life.at
            yield f"worker {life.worker_id} was ended {left:.3f} s before its lease"


def overlaps(record: Record) -> Iterator[str]:
    """Handlers of one row or key ran side by side, and the database had not taken away the row of the first
    claim. That is not always the one that started first: an answer to a claim may be late, and a worker may
    be frozen between its claim and the start of a handler.
    """
    for first, second in _overlaps(record):
        found = [record.runs.get((line["id"], line["attempt"])) for line in (first, second)]
        runs = sorted((run for run in found if run is not None), key=lambda run: run.claim.seq)
        if runs and not _taken(record, runs[0]):
            what = "row" if first["id"] == second["id"] else "key"
            yield (
                f"attempt ({second['id']}, {second['attempt']}) ran beside "
                f"({first['id']}, {first['attempt']}) of the same {what}"
            )


def excused(record: Record) -> int:
    """How many overlaps followed a rescue, or a person who took the row away."""
    return sum(1 for _ in _overlaps(record)) - sum(1 for _ in overlaps(record))


def _overlaps(record: Record) -> Iterator[tuple[Line, Line]]:
    finished = {(line["id"], line["attempt"]): line["t"] for line in record.of("finish")}
    died: dict[int, float] = {}
    for line in record.of("died"):
        died.setdefault(line["pid"], line["t"])
    groups: dict[Any, list[Line]] = defaultdict(list)
    for line in record.of("start"):
        groups[line["id"] if line["key"] is None else line["key"]].append(line)
    for lines in groups.values():
        lines.sort(key=lambda line: float(line["t"]))
        for place, first in enumerate(lines):
            # Without a word of its end it ran until it was killed, or for as long as it is known to.
            end = finished.get((first["id"], first["attempt"]), died.get(first["pid"], first["t"]))
            for second in lines[place + 1 :]:
                if second["t"] >= end:
                    break
                yield first, second


def _taken(record: Record, run: Run) -> bool:
    """Whether the attempt was ended by somebody other than its worker."""
    if run.end is None:
        return False
    before = record.chains[run.claim.row_id]
    failed = run.end.errors > before[before.index(run.end) - 1].errors
    return run.end.by_person or (failed and (run.end.error or "").startswith("its "))


def lateness(record: Record) -> Iterator[str]:
    """No lone row waits for long while nothing troubles its worker or the server: no wake-up was lost."""
    troubles = _troubles(record)
    for line in record.of("enqueue"):
        if line["outcome"] != "acked" or line.get("topic") != "lone":
            continue
        for row_id in line["ids"]:
            run = record.runs.get((row_id, 1))
            until = record.now if run is None else run.claim.at
            over = next((e.at for e in record.chains.get(row_id, []) if e.new in ENDED), until)
            waited = _calm(line["w"], min(until, over), troubles)
            if waited > LATE:
                yield f"lone row {row_id} waited {waited:.1f} s although nothing troubled its worker"


def _troubles(record: Record) -> list[tuple[float, float]]:
    """When something did, in order."""
    ends = {line["n"]: line["w"] for line in record.of("healed")}
    return sorted(
        (line["w"], ends.get(line["n"], record.now) + RECOVERY)
        for line in record.of("fault")
        if line["target"] in ("lone", "postgres", "all")
    )


def _calm(begin: float, end: float, troubles: list[tuple[float, float]]) -> float:
    """The longest time within these bounds that no trouble touches."""
    longest, free_from = 0.0, begin
    for trouble_begin, trouble_end in troubles:
        if trouble_end > begin:
            longest = max(longest, min(trouble_begin, end) - free_from)
            free_from = max(free_from, trouble_end)
    return max(longest, end - free_from)


CHECKS: list[Check] = [
    promises, starts, early, chains, exclusion, order, limits, fencing, effects, sandboxes, messages,
    all_ended, leases, overlaps, lateness,
]  # fmt: skip


def check(record: Record) -> list[str]:
    """Every violation, each named by its check."""
    return [f"{judge.__name__}: {text}" for judge in CHECKS for text in judge(record)]


def rescue_times(record: Record) -> dict[str, list[float]]:
    """From a kill to the moment its rows were free again, by who noticed: the parent, or the lease."""
    found: dict[str, list[float]] = {"parent": [], "lease": []}
    killed = {line["pid"]: line["w"] for line in record.of("died")}
    for run in record.runs.values():
        pid = record.pids.get(run.claim.worker_id or "")
        if run.end is None or pid not in killed or not run.claim.at < killed[pid] < run.end.at:
            continue
        if (run.end.error or "").startswith("its worker died"):
            found["parent"].append(run.end.at - killed[pid])
        elif (run.end.error or "").startswith("its "):
            found["lease"].append(run.end.at - killed[pid])
    return found
