"""An outbox in which everything that can be seen is there to be seen, made by real calls of the protocol.

Two workers are present, one has died while it ran a row. Rows wait for every reason that needs no clock.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

import outwake
from outwake import Claimed
from outwake.schema import in_schema
from tests.conftest import Connect
from tests.support.steps import Connection, add

SESSION = UUID("0199a2c4-6f00-7000-8000-000000000001")
PROMPT = UUID("0199a2c4-6f00-7000-8000-000000000002")
LEASE = timedelta(hours=1)


@dataclass
class Scenario:
    """What a test may want to name."""

    conn: Connection
    busy: UUID
    parked: UUID
    lost: UUID
    rows: dict[str, int]


async def build(connect: Connect) -> Scenario:
    """Make it in an empty, migrated database."""
    conn = await connect()
    topics = ("email.send", "invoice.send", "report.make", "session.run", "sms.send")
    busy = await _present(connect, conn, 101, topics, concurrency=4)
    parked = await _present(connect, conn, 102, ("audit.log",), concurrency=10)
    lost = await outwake.register(conn, topics, concurrency=4)
    await conn.execute("UPDATE worker SET host = 'worker-3', pid = 103 WHERE id = %s", (lost,))
    await conn.execute("SELECT outbox_park(%s)", (parked,))
    await conn.execute("INSERT INTO topic VALUES ('sms.send', 0, NULL), ('report.make', 1, NULL)")

    rows: dict[str, int] = {}
    for _ in range(5):
        await add(conn, "email.send")
    for row in await _claim(conn, busy, "email.send", 5):
        await outwake.complete(conn, busy, [(row.id, row.attempt)])

    rows["dead"] = await _claimed_one(conn, busy, "email.send", payload={"to": "nobody@example.org"})
    await outwake.fail(conn, busy, (rows["dead"], 1), "550 no such mailbox", permanent=True)
    rows["retry"] = await _claimed_one(conn, busy, "email.send")
    await outwake.fail(conn, busy, (rows["retry"], 1), "connection refused", delay=timedelta(minutes=10))
    rows["lost"] = await _claimed_one(conn, lost, "email.send")
    await conn.execute(
        "UPDATE worker SET lease_until = clock_timestamp() - interval '2 minutes' WHERE id = %s", (lost,)
    )
    rows["running"] = await _claimed_one(conn, busy, "email.send")
    rows["first"] = await add(conn, "invoice.send", ordering_key="customer:7")
    rows["behind"] = await add(conn, "invoice.send", ordering_key="customer:7")
    await _claim(conn, busy, "invoice.send", 2)
    rows["report"] = await add(conn, "report.make")
    rows["limited"] = await add(conn, "report.make")
    await _claim(conn, busy, "report.make", 2)
    rows["paused"] = await add(conn, "sms.send")
    rows["nobody"] = await add(conn, "fax.send")
    rows["scheduled"] = await add(conn, "email.send")
    await conn.execute(
        "UPDATE outbox SET available_at = clock_timestamp() + interval '1 day' WHERE id = %s",
        (rows["scheduled"],),
    )
    rows["session"] = await _session(conn, busy)
    # As if time had passed.
    await conn.execute(
        "UPDATE outbox SET available_at = available_at - interval '5 minutes' WHERE id = %s",
        (rows["nobody"],),
    )
    return Scenario(conn, busy, parked, lost, rows)


async def _present(
    connect: Connect, conn: Connection, number: int, topics: tuple[str, ...], concurrency: int
) -> UUID:
    """A worker whose presence lock a connection of the test holds."""
    holder = await connect()
    await holder.execute(in_schema("SELECT pg_advisory_lock(:lock_presence, %s)"), (number,))
    worker = await outwake.register(conn, topics, concurrency=concurrency, presence=number)
    await conn.execute(
        "UPDATE worker SET host = %s, pid = %s WHERE id = %s", (f"worker-{number - 100}", number, worker)
    )
    return worker


async def _claim(conn: Connection, worker: UUID, topic: str, slots: int) -> list[Claimed]:
    return await outwake.claim(conn, worker, [topic], slots, lease=LEASE)


async def _claimed_one(conn: Connection, worker: UUID, topic: str, **columns: Any) -> int:
    row_id = await add(conn, topic, **columns)
    claimed = await _claim(conn, worker, topic, 1)
    assert [row.id for row in claimed] == [row_id]
    return row_id


async def _session(conn: Connection, worker: UUID) -> int:
    """A session whose turn took two attempts."""
    await conn.execute(
        "INSERT INTO session (id, repo, target_branch, branch, title)"
        " VALUES (%s, 'octo/tools', 'main', 'outwake/fix', 'Fix the build')",
        (SESSION,),
    )
    await conn.execute(
        "INSERT INTO prompt (id, session_id, text) VALUES (%s, %s, 'Fix the build')", (PROMPT, SESSION)
    )
    payload = {"session_id": str(SESSION), "prompt_id": str(PROMPT)}
    key = f"session:{SESSION}"
    row_id = await _claimed_one(conn, worker, "session.run", payload=payload, ordering_key=key)
    await _say(conn, worker, row_id, 1, ["Looking"])
    await outwake.fail(conn, worker, (row_id, 1), "git: connection reset", delay=timedelta(0))
    await _claim(conn, worker, "session.run", 1)
    await _say(conn, worker, row_id, 2, ["Looking", "Fixed"])
    await outwake.complete(conn, worker, [(row_id, 2)])
    return row_id


async def _say(conn: Connection, worker: UUID, row_id: int, attempt: int, texts: list[str]) -> None:
    await conn.execute(
        "SELECT message_append(%s, %s, %s, %s, %s, %s)",
        (worker, row_id, attempt, SESSION, PROMPT, [Jsonb({"type": "text", "text": t}) for t in texts]),
    )
