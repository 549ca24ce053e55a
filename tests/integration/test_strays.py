"""A claim whose answer is lost: committed by the server, never heard of by its worker."""

import pytest

from outbox import WorkerEnded, claim, enqueue, register
from tests.conftest import Connect
from tests.support.worker import watched

LISTENING = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sendoff worker listen'"
)


@pytest.mark.parametrize("rule", ["kept", "taken out"])
async def test_rows_nobody_knows_of_are_handed_back_at_the_next_connection(
    database: str, connect: Connect, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1. A worker's claim is committed, its answer lost: as if another connection had claimed in its name.
    2. The worker reconnects, as it must when an answer is lost. 3. It hands the row back, no failure
    counted, and runs it. Without this the row would be its own for ever: its lease is renewed.
    """
    psql = await connect()
    async with watched(database) as worker:
        held = worker.hold("claim")
        row_id = await enqueue(psql, "t")
        await held.wait()
        query = "SELECT count(*) FROM outbox_claim(%s, '{t}', 1, '1 hour')"
        assert await (await psql.execute(query, (worker.id,))).fetchone() == (1,)
        if rule == "taken out":

            async def ignore() -> None: ...

            monkeypatch.setattr(worker, "_give_back_strays", ignore)
        await psql.execute(LISTENING)
        held.release()
        if rule == "kept":
            await worker.has_run(row_id)
        await worker.asleep()
        state = await (await psql.execute("SELECT state, failures FROM outbox")).fetchone()
        assert (row_id in worker.ran) == (rule == "kept")
        assert state in ([("done", 0), ("running", 0)] if rule == "kept" else [("running", 0)])


async def test_a_claim_of_an_earlier_connection_claims_nothing(connect: Connect) -> None:
    """1. A claim is on its way when its connection breaks. 2. The worker reconnects and looks for strays.
    3. Only now the claim reaches the server: it must not claim, for nobody looks again.
    """
    psql = await connect()
    worker = await register(psql, ["t"], presence=1)
    await enqueue(psql, "t")
    await psql.execute("UPDATE worker SET presence = 2 WHERE id = %s", (worker,))
    with pytest.raises(WorkerEnded):
        await claim(psql, worker, ["t"], 1, presence=1)
    assert len(await claim(psql, worker, ["t"], 1, presence=2)) == 1
