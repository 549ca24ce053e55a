"""What is checked of each producer, on a database with a worker that sleeps."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from outwake.schema import in_schema
from tests.support.process import Process
from tests.support.steps import Connection, column, one, until
from tests.support.waits import awaiting

NODE = "node-postgres, `outwake.enqueue`"
COLUMNS = ("enqueue", "rollback", "duplicate", "woken", "traced")

SERVED, UNSERVED = "noop", "unserved"
"""Topics: the worker serves one. Rows of the other stay as they were inserted."""

TABLES = "CREATE TABLE shop_order (id bigserial PRIMARY KEY, article text)"

_TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
_ROW: dict[str, Any] = {
    "topic": UNSERVED,
    "payload": {"to": "a%s\"'\\é\U0001f600", "copies": [1, 2]},
    "ordering_key": "k",
    "priority": -3,
    "available_at": "2100-01-02T03:00:00+00:00",
    "max_attempts": 2,
    "traceparent": _TRACE,
}
_READ = in_schema("""
    SELECT jsonb_build_object(
        'topic', topic, 'payload', payload, 'ordering_key', ordering_key, 'priority', priority,
        'available_at', available_at AT TIME ZONE 'UTC', 'max_attempts', max_attempts,
        'traceparent', traceparent)
    FROM :schema.outbox WHERE id = %s
""")


class Producer:
    """An application of tests/adopt/kinds.py or producer.mjs, in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def transaction(
        self, *rows: Mapping[str, Any], commit: bool = True, model: bool = False, span: bool = False
    ) -> dict[str, Any]:
        """Enqueue these rows in one transaction: the answer of each, and the traceparent of the span."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(
            json.dumps({"rows": rows, "commit": commit, "model": model, "span": span}).encode() + b"\n"
        )
        async with awaiting("the application's answer"):
            line = await stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise AssertionError((await self._process.stderr.read()).decode())
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def producing(*command: str | Path, env: Mapping[str, str]) -> AsyncIterator[Producer]:
    """Start it, and end it with the block."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=env)
    try:
        yield Producer(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        async with awaiting("the application's end"):
            await process.wait()


async def row_of(producer: Producer, conn: Connection, worker: Process, *, traces: bool) -> dict[str, str]:
    """A row of the table of producers: what the producer does in each column. `traces`: it has a span."""
    checks: dict[str, Callable[[], Any]] = {
        "enqueue": lambda: _enqueue(producer, conn, models=traces),
        "rollback": lambda: _rollback(producer, conn),
        "duplicate": lambda: _duplicate(producer, conn),
        "woken": lambda: _woken(producer, conn, worker),
        "traced": lambda: _traced(producer, conn, traces),
    }
    cells = {}
    for name, check in checks.items():
        try:
            cells[name] = await check()
        except AssertionError as error:
            cells[name] = f"no: {error}"
    return cells


async def _enqueue(producer: Producer, conn: Connection, *, models: bool) -> str:
    """Each argument is its column, and the row is the transaction's."""
    for model in {False, models}:
        [row_id] = (await producer.transaction(_ROW, model=model))["answers"]
        found = await one(conn, _READ, row_id)
        assert found == {**_ROW, "available_at": "2100-01-02T03:00:00"}, found
        xmin = in_schema("SELECT xmin::text FROM :schema.outbox WHERE id = %s")
        order = "SELECT xmin::text FROM shop_order ORDER BY id DESC LIMIT 1"
        assert await one(conn, xmin, row_id) == await one(conn, order), "another transaction"
    return "yes"


async def _rollback(producer: Producer, conn: Connection) -> str:
    await producer.transaction({"topic": UNSERVED, "unique_key": "rolled back"}, commit=False)
    left = in_schema("SELECT id FROM :schema.outbox WHERE unique_key = 'rolled back'")
    assert await column(conn, left) == [], "the row is there"
    return "yes"


async def _duplicate(producer: Producer, conn: Connection) -> str:
    """All in one transaction, which a refused duplicate leaves usable."""
    row = {"topic": UNSERVED, "unique_key": "u"}
    choices = [{"on_duplicate": choice} for choice in ("reject", "keep", "replace")]
    rows = [{**row, **choice, "payload": {"n": n}} for n, choice in enumerate([{}, *choices])]
    answers = (await producer.transaction(*rows))["answers"]
    assert answers == [answers[0], {"duplicate_of": answers[0]}, answers[0], answers[0]], answers
    found = await one(conn, in_schema("SELECT payload FROM :schema.outbox WHERE id = %s"), answers[0])
    assert found == {"n": 3}, found
    await conn.execute(in_schema("DELETE FROM :schema.outbox WHERE unique_key = 'u'"))
    return "reject, keep, replace"


async def _woken(producer: Producer, conn: Connection, worker: Process) -> str:
    """A worker that is asleep runs it: nothing polls."""
    await until(conn, in_schema("SELECT every(parked) FROM :schema.worker WHERE ended_at IS NULL"))
    [row_id] = (await producer.transaction({"topic": SERVED}))["answers"]
    await worker.event("completed", rows=[row_id])
    return "yes"


async def _traced(producer: Producer, conn: Connection, traces: bool) -> str:
    given = {} if traces else {"traceparent": _TRACE}
    answer = await producer.transaction({"topic": UNSERVED, **given}, span=traces)
    found = await one(
        conn, in_schema("SELECT traceparent FROM :schema.outbox WHERE id = %s"), answer["answers"][0]
    )
    assert found == (answer["traceparent"] or _TRACE), found
    return "by itself" if traces else "by `traceparent`"


def table(rows: Mapping[str, Mapping[str, str]]) -> str:
    """As docs/producers.md has it."""
    lines = [f"| connection | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {kind} | {' | '.join(row[name] for name in COLUMNS)} |" for kind, row in rows.items()]
    return "".join(f"{line}\n" for line in lines)
