"""Kill the worker between every two steps of a turn, and count the sandboxes that stay borrowed.

Every request to a stand-in is a step, met before its effect and before its answer (tests/support/faults.py).
The worker is blocked there and killed; another one takes over. A request that had no effect yet is lost
with its worker. What the allocator's interface leaves open is counted apart: it has lent a sandbox, and
the worker dies before it can say so.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connect
from tests.support.api import Api, serving
from tests.support.faults import Fault
from tests.support.process import Process, running
from tests.support.production import Production, production, rows

PROMPT = (
    "tool: cd {repo} && echo more >> README.md && git add . "
    "&& git -c user.name=A -c user.email=a@b commit -qm 'Say more'"
)


@dataclass(frozen=True)
class Point:
    """Where the worker is killed: at the nth meeting of that name. late: the request has its effect after."""

    name: str
    nth: int
    late: bool = False

    @property
    def in_window(self) -> bool:
        return self.name == "borrow done" or (self.name == "borrow" and self.late)


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncIterator[Production]:
    async with production(tmp_path, sandboxes=2) as made:
        yield made


async def test_a_crash_at_every_step_leaks_nothing_outside_the_window(
    parts: Production, database: str, connect: Connect, tmp_path: Path
) -> None:
    conn = await connect()
    credentials = tmp_path / "credentials"
    credentials.write_text("https://user:planted-git-token@git.test\n")
    env = parts.environment(database, OUTWAKE_GIT_CREDENTIALS=str(credentials), OUTWAKE_GIT_PUSH="true")
    leaked: Counter[str] = Counter()
    workers: list[Process] = []
    async with (
        AsyncExitStack() as stack,
        serving(database, OUTWAKE_ALLOW_FILE_REPOS=True) as api,
        _explained(conn, parts, workers),
    ):

        async def start() -> Process:
            workers.append(await stack.enter_async_context(running("worker", "--concurrency", "1", env=env)))
            return workers[-1]

        worker = await start()
        await worker.event("parked")
        created = await api.create(repo=parts.repo, prompt=PROMPT)
        await _end_of(api, parts, created["id"], borrowed=0)
        await _all_done(conn, worker)
        points = _points(parts.steps.met)
        assert {"borrow", "exec", "write", "tool", "return"} <= {point.name for point in points}
        for point in points:
            fault = parts.steps.arm(point.name, Fault(), nth=point.nth)
            created = await api.create(repo=parts.repo, prompt=PROMPT)
            await fault.reached()
            victim, worker = worker, await start()
            await worker.event("parked")
            victim.kill()
            await victim.ended()
            await conn.execute(
                "SELECT outbox_end_worker(id, 'killed') FROM worker WHERE pid = %s", (victim.pid,)
            )
            fault.release(drop=not (point.late or point.name.endswith("done")))
            await _end_of(api, parts, created["id"], borrowed=int(point.in_window))
            await _all_done(conn, worker)
            suspects = await rows(conn, "DELETE FROM sandbox_borrow RETURNING id")
            assert len(suspects) == (point.name.startswith("borrow")), point
            where = "in the window" if point.in_window else "elsewhere"
            leaked[where] += len(parts.allocator.borrowed)
            print(f"leaks: killed at {point.name} {point.nth}: {len(parts.allocator.borrowed)} {where}")
            while parts.allocator.borrowed:
                await parts.allocator.submit(parts.allocator.borrowed.popitem()[1])
    assert not await rows(
        conn, "SELECT * FROM outbox WHERE topic IN ('session.run', 'sandbox.return') AND state <> 'done'"
    )
    print(
        f"leaks: {len(points)} points, {leaked['elsewhere']} leaked, {leaked['in the window']} in the window"
    )
    assert leaked["elsewhere"] == 0
    assert leaked["in the window"] == 2


@asynccontextmanager
async def _explained(conn: Any, parts: Production, workers: list[Process]) -> AsyncIterator[None]:
    """A failure prints what was met, the logs, and the rows, as they are before the workers are stopped."""
    try:
        yield
    except BaseException:
        print("steps:", *parts.steps.met[-40:])
        for worker in workers[-2:]:
            print(f"worker {worker.pid}:", *worker.stderr[-100:], sep="\n")
        for query in (
            "SELECT id, topic, state, blocked, attempt, failures, available_at, worker_id, errors FROM outbox"
            " ORDER BY id DESC LIMIT 10",
            "SELECT * FROM worker ORDER BY started_at DESC LIMIT 3",
            "SELECT id, inbox_status, sandbox FROM session ORDER BY created_at DESC LIMIT 2",
            "SELECT status, reason, result FROM prompt ORDER BY created_at DESC LIMIT 2",
            "SELECT * FROM sandbox_borrow",
        ):
            print(query, *await rows(conn, query), sep="\n")
        raise


def _points(met: list[str]) -> list[Point]:
    """Each meeting of a clean run, and a borrow that has its effect when its worker is dead."""
    counts: Counter[str] = Counter()
    points = [Point("borrow", 1, late=True)]
    for name in met:
        counts[name] += 1
        points.append(Point(name, counts[name]))
    return points


async def _all_done(conn: Any, worker: Process) -> None:
    """The rows that return sandboxes have ended: no step of theirs is met in the next round."""
    for (row_id,) in await rows(
        conn, "SELECT id FROM outbox WHERE topic = 'sandbox.return' AND state <> 'done'"
    ):
        await worker.event("completed", rows=[row_id])


async def _end_of(api: Api, parts: Production, session_id: str, *, borrowed: int) -> None:
    async with api.follow(session_id) as events:
        state: dict[str, Any] = await events.status(inbox_status="completed")
    assert state["inbox_status"] == "completed"
    await parts.steps.until(f"{borrowed} to be borrowed", lambda: len(parts.allocator.borrowed) == borrowed)
    shown = (await api.client.get(f"/sessions/{session_id}")).json()
    assert [prompt["status"] for prompt in shown["prompts"]] == ["succeeded"], shown
