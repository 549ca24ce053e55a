"""A foreign transaction holds its snapshot, so that the entries of claimed rows stay: worker/front.py."""

import math
from typing import Any

import pytest

from outbox.claim import complete_and_claim
from tests.conftest import Connect
from tests.integration.test_claim_plans import FEW_BUFFERS, explain
from tests.support.steps import Rule, add, new_worker, one, until, with_and_without
from tests.support.worker import watched
from worker import front

CLAIM = "SELECT * FROM outbox_complete_and_claim(%s, '{}', '{}', '{t}', 10, '6 s', false, NULL, %s, %s)"


@with_and_without
async def test_a_claim_that_begins_later_reads_none_of_what_is_over(rule: Rule, connect: Connect) -> None:
    """20,000 rows were claimed and completed under the snapshot. Taken out: the look from the front."""
    psql, foreign = await connect(), await connect()
    worker = await new_worker(psql)
    await foreign.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await foreign.execute("SELECT 1 FROM outbox LIMIT 1")
    await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 20000)")
    rows, _ = await complete_and_claim(psql, worker, [], ["t"], 20000)
    await complete_and_claim(psql, worker, [(row.id, row.attempt) for row in rows], ["t"], 10)
    await psql.execute("VACUUM outbox")
    ends = ([rows[-1].priority], [rows[-1].available_at]) if rule == "kept" else (None, None)
    for _ in range(3):
        await add(psql)
        plans = await explain(psql, CLAIM, worker, *ends)
    assert (plans.buffers() < FEW_BUFFERS) == (rule == "kept"), plans.buffers()


async def test_levels_are_all_that_is_looked_for(connect: Connect) -> None:
    psql = await connect()
    worker = await new_worker(psql)
    early = await add(psql)
    first = await add(psql)
    urgent = await add(psql, priority=5)
    later = await add(psql)
    other = await add(psql, topic="u")
    start = await one(psql, "SELECT available_at FROM outbox WHERE id = %s", first)
    rows, _ = await complete_and_claim(psql, worker, [], ["t", "u"], 10, levels=[("t", 0, start)])
    assert [row.id for row in rows] == [first, later]
    rows, _ = await complete_and_claim(psql, worker, [], ["t", "u"], 10)
    assert [row.id for row in rows] == [urgent, early, other]


async def test_what_lies_before_is_found_all_the_same(
    monkeypatch: pytest.MonkeyPatch, database: str, connect: Connect
) -> None:
    """Every look from the front counts as slow; rows keep coming; one is committed late, one is urgent."""
    looked = front.Front.looked

    def never_blaming_the_server(self: front.Front, levels: Any, *rest: Any) -> None:
        self._took = math.inf
        looked(self, levels, *rest)

    monkeypatch.setattr(front, "SLOW", -1.0)
    monkeypatch.setattr(front.Front, "looked", never_blaming_the_server)
    psql, late = await connect(), await connect()
    async with watched(database, "t", concurrency=4) as worker:
        await late.execute("BEGIN")
        straggler = await add(late)
        for number in range(60):
            await psql.execute("INSERT INTO outbox (topic) SELECT 't' FROM generate_series(1, 20)")
            if number == 20:
                await late.execute("COMMIT")
                urgent = await add(psql, priority=9)
        await until(psql, "SELECT NOT EXISTS (SELECT FROM outbox WHERE state <> 'done' AND topic = 't')")
        assert {straggler, urgent} < set(worker.ran)
