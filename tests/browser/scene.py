"""A made-up afternoon for the screenshots: sessions in each state, a conversation, an hour of traffic, dead
rows, two workers. Written by the SQL functions that the API and the workers call, then moved back in time.
"""

from datetime import timedelta
from typing import Any

import httpx
from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from outwake.schema import in_schema
from tests.support.manual_worker import ManualWorker

TOPICS = ["outbox.prune", "sandbox.return", "session.run", "webhook.deliver"]
LIVE_TITLE = "Retry webhooks with jittered backoff"

_SESSIONS = [
    # repo, title, prompt, minutes ago, how it ended
    ("octo/billing", "Round invoices half to even", "Round half to even in `invoice_total`.", 171, "done"),
    (
        "octo/site",
        "Fix the broken footer links",
        "Two links in the footer answer 404. Fix them.",
        148,
        "failed",
    ),
    ("octo/tools", "Drop Python 3.9", "Drop Python 3.9 from CI and from the package's metadata.", 96, "done"),
    (
        "octo/api",
        "Paginate /orders by keyset",
        "Replace OFFSET by keyset pagination in /orders.",
        64,
        "cancelled",
    ),
    (
        "octo/billing",
        "Explain the flaky test",
        "Why does test_monthly_close fail at month's end?",
        41,
        "done",
    ),
    ("octo/infra", "Pin the base images", "Pin all base images by digest.", 18, "dead"),
]


def tool(key: str, name: str, **given: Any) -> dict[str, Any]:
    return _assistant({"type": "tool_use", "id": key, "name": name, "input": given})


def returned(key: str, text: str, *, error: bool = False) -> dict[str, Any]:
    part = {"type": "tool_result", "tool_use_id": key, "content": text, "is_error": error}
    return {"type": "user", "message": {"role": "user", "content": [part]}}


def say(text: str) -> dict[str, Any]:
    return _assistant({"type": "text", "text": text})


def _assistant(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "assistant", "message": {"role": "assistant", "content": [part]}}


def result(cost: float, seconds: float, turns: int, *, error: bool = False) -> dict[str, Any]:
    return {
        "type": "result",
        "subtype": "error_during_execution" if error else "success",
        "is_error": error,
        "duration_ms": round(seconds * 1000),
        "num_turns": turns,
        "total_cost_usd": cost,
        "usage": {"input_tokens": 9_410, "cache_read_input_tokens": 88_000, "output_tokens": 2_316},
        "result": "",
    }


INIT = {"type": "system", "subtype": "init", "model": "claude-sonnet-4-5", "tools": ["Bash", "Edit", "Read"]}

_FIRST_TURN = [
    INIT,
    say("I'll look at how deliveries are retried today."),
    tool("t1", "Grep", pattern="def deliver", path="webhooks/"),
    returned(
        "t1", "webhooks/deliver.py:41:async def deliver(event)\nwebhooks/queue.py:12: await deliver(event)"
    ),
    tool("t2", "Read", file_path="webhooks/deliver.py"),
    returned(
        "t2",
        "41  async def deliver(event):\n42      for attempt in range(5):\n43          await asyncio.sleep(1)",
    ),
    say(
        "Deliveries are retried **every second, five times**, all at the same moment. After an outage every "
        "receiver gets all of them at once. I will:\n\n"
        "1. double the pause with each attempt, up to ten minutes;\n"
        "2. draw it at random between zero and that (`random.uniform(0, limit)`);\n"
        "3. respect `Retry-After` when the receiver sends one."
    ),
    tool(
        "t3",
        "Edit",
        file_path="webhooks/deliver.py",
        old_string="await asyncio.sleep(1)",
        new_string="await asyncio.sleep(pause(attempt, answer))",
    ),
    returned("t3", "The file webhooks/deliver.py has been updated."),
    tool("t4", "Bash", command="pytest -q tests/webhooks", description="Run the tests of webhooks"),
    returned(
        "t4",
        "1 failed, 23 passed in 2.31s\nFAILED tests/webhooks/test_deliver.py::test_gives_up_after_five",
        error=True,
    ),
    say("The test counted seconds. It should count attempts instead, which is what it is about."),
    tool(
        "t5",
        "Bash",
        command="pytest -q tests/webhooks && git commit -qam 'Back off with jitter'",
        description="Run them again and commit",
    ),
    returned("t5", "24 passed in 1.87s"),
    result(0.2381, 94.2, 11),
]
_SECOND_TURN = [
    INIT,
    say("I'll add the limit to the settings and document it."),
    tool("u1", "Grep", pattern="class Settings", path="."),
    returned("u1", "settings.py:9:class Settings(BaseSettings):"),
    tool("u2", "Edit", file_path="settings.py", new_string="retries = 5\nlongest_pause = 600.0"),
]  # fmt: skip


async def make_scene(client: httpx.AsyncClient, conn: AsyncConnection[Any]) -> str:
    """Fill an empty database. `conn` must stay open: it is what the workers' presence rests on.

    Returns the id of the session to look at.
    """
    manual = ManualWorker(conn)
    await manual.register()
    await conn.execute(
        "UPDATE worker SET host = 'runner-1', pid = 2114, version = '0.1.0', concurrency = 4, topics = %s,"
        " started_at = started_at - interval '3 hours 12 minutes' WHERE id = %s",
        (TOPICS, manual.id),
    )
    await _other_worker(conn)
    await _traffic(conn)
    for repo, title, prompt, minutes, end in _SESSIONS:
        await _session(client, manual, repo, title, prompt, minutes, end)
    live = await _conversation(client, manual)
    for title in ("Translate the onboarding mails", "Upgrade to Postgres 18"):
        await _create(client, "octo/site", title, f"{title}.")
    await _dead(conn)
    return live


async def _create(client: httpx.AsyncClient, repo: str, title: str, prompt: str) -> str:
    body = {"repo": repo, "target_branch": "main", "title": title, "prompt": prompt}
    answer = await client.post("/sessions", json=body)
    answer.raise_for_status()
    return str(answer.json()["id"])


async def _session(
    client: httpx.AsyncClient,
    manual: ManualWorker,
    repo: str,
    title: str,
    prompt: str,
    minutes: int,
    end: str,
) -> None:
    session = await _create(client, repo, title, prompt)
    await manual.claim()
    await manual.store(INIT, say("Done."), outcome := result(0.031 + minutes / 1000, 38 + minutes / 4, 6))
    if end == "cancelled":
        await client.post(f"/sessions/{session}/cancel")
        await manual.conn.execute("UPDATE outbox SET state = 'cancelled' WHERE id = %s", (manual.row,))
    elif end == "dead":
        await manual.fail("cannot clone octo/infra: the remote said: Repository not found.", permanent=True)
    else:
        await _conclude(manual, "succeeded" if end == "done" else "failed", outcome)
    await _move_back(manual.conn, session, timedelta(minutes=minutes))


async def _conclude(
    manual: ManualWorker, status: str, outcome: dict[str, Any], *commits: dict[str, str]
) -> None:
    reason = "the agent ended with exit status 1: no network" if status == "failed" else None
    done = {"branch": "outwake/work", "agent": outcome, "commits": list(commits)}
    await manual.conn.execute(
        "UPDATE prompt SET status = %s, reason = %s, result = %s, finished_at = clock_timestamp()"
        " WHERE id = %s",
        (status, reason, Jsonb(done), manual.payload["prompt_id"]),
    )
    await manual.complete()


async def _conversation(client: httpx.AsyncClient, manual: ManualWorker) -> str:
    prompt = (
        "Our webhooks are retried every second. Use exponential backoff with full jitter, at most 10 minutes."
    )
    session = await _create(client, "octo/webhooks", LIVE_TITLE, prompt)
    await manual.claim()
    await manual.store(INIT, say("I'll look at how deliveries are retried today."))
    await manual.fail("the agent was ended from outside (lease)")  # an attempt that a rescue ended
    await manual.claim()
    await manual.store(*_FIRST_TURN)
    commit = {"sha": "7c1f0be2a94d55e1", "subject": "Back off with jitter"}
    await _conclude(manual, "succeeded", _FIRST_TURN[-1], commit)
    await _move_back(manual.conn, session, timedelta(minutes=7))
    await client.post(f"/sessions/{session}/prompts", json={"prompt": "Make the longest pause a setting."})
    await manual.claim()
    await manual.store(*_SECOND_TURN)
    return session


async def _move_back(conn: AsyncConnection[Any], session: str, span: timedelta) -> None:
    for query in (
        "UPDATE session SET created_at = created_at - %(span)s, updated_at = updated_at - %(span)s"
        " WHERE id = %(id)s",
        "UPDATE prompt SET created_at = created_at - %(span)s, started_at = started_at - %(span)s,"
        " finished_at = finished_at - %(span)s + interval '94 seconds' WHERE session_id = %(id)s",
        "UPDATE outbox SET created_at = created_at - %(span)s, available_at = available_at - %(span)s,"
        " started_at = started_at - %(span)s, finished_at = finished_at - %(span)s + interval '94 seconds'"
        " WHERE payload ->> 'session_id' = %(id)s AND state NOT IN ('ready', 'running')",
    ):
        await conn.execute(query.encode(), {"span": span, "id": session})


async def _other_worker(conn: AsyncConnection[Any]) -> None:
    await conn.execute(
        "INSERT INTO worker (host, pid, version, topics, concurrency, presence, parked, started_at)"
        " VALUES ('runner-2', 871, '0.1.0', '{webhook.deliver,sandbox.return}', 16, 8, true,"
        "         clock_timestamp() - interval '26 hours')",
    )
    await conn.execute(in_schema("SELECT pg_advisory_lock(:lock_presence, 8)"))


async def _traffic(conn: AsyncConnection[Any]) -> None:
    """An hour of webhooks with a burst in its middle, and some that wait for a later try."""
    await conn.execute(
        """
        INSERT INTO outbox (topic, state, created_at, available_at, started_at, finished_at, attempt)
        SELECT 'webhook.deliver', CASE WHEN n % 61 = 0 THEN 'cancelled' ELSE 'done' END,
               c.at, c.at, c.at + c.wait, c.at + c.wait + interval '180 ms', 1
        FROM generate_series(0, 59) AS m
        CROSS JOIN generate_series(1, 12 + (9 * sin(m / 4.0))::integer
                                      + CASE WHEN m BETWEEN 26 AND 32 THEN 55 ELSE 0 END) AS n
        CROSS JOIN LATERAL (
            SELECT date_trunc('minute', clock_timestamp()) - make_interval(mins => 59 - m)
                       + make_interval(secs => n % 50) AS at,
                   make_interval(secs => 0.02 + (n * 7919 % 100) / 900.0
                       + CASE WHEN m BETWEEN 27 AND 36
                              THEN (n % 40) * 2.1 * (1 - abs(m - 31) / 6.0) ELSE 0 END
                   ) AS wait
        ) AS c
        WHERE c.wait > '0' AND c.at + c.wait + interval '180 ms' < clock_timestamp()
        """
    )
    await conn.execute(
        "INSERT INTO outbox (topic, available_at, failures, attempt, errors)"
        " SELECT 'webhook.deliver', clock_timestamp() + n * interval '4 minutes', n, n, %s"
        " FROM generate_series(1, 3) AS n",
        (Jsonb([_error(1, "hooks.example.net answered 503")]),),
    )


def _error(attempt: int, text: str) -> dict[str, Any]:
    return {"attempt": attempt, "at": "2026-01-01T00:00:00+00:00", "error": text, "worker_id": None}


async def _dead(conn: AsyncConnection[Any]) -> None:
    await conn.execute(
        """
        INSERT INTO outbox (topic, payload, state, attempt, failures, max_attempts, errors,
                            created_at, available_at, started_at, finished_at)
        SELECT 'webhook.deliver', '{"event": "invoice.paid", "url": "https://hooks.example.net/in"}',
               'dead', 3, 3, 3,
               (SELECT jsonb_agg(jsonb_build_object(
                    'attempt', a, 'at', d.at - (3 - a) * interval '2 minutes',
                    'error', 'hooks.example.net answered 503', 'worker_id', NULL) ORDER BY a)
                FROM generate_series(1, 3) AS a),
               d.at - interval '5 minutes', d.at, d.at - interval '1 second', d.at
        FROM generate_series(1, 2) AS n
        CROSS JOIN LATERAL (SELECT clock_timestamp() - n * interval '23 minutes' AS at) AS d
        """
    )
