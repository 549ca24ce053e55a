"""Those who enqueue: the library inside transactions, psql, HTTP; and a person who meddles at psql.

Each transaction has a tag, found again in its rows' payloads, or in the session's title; together with
its rows it books the tag in a table of its own. The history learns how it ended: acked, rolled_back, or
unknown when the commit's answer was lost.
"""

import asyncio
import json
import random
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg

from outwake import enqueue
from tests.chaos.check import PERSON
from tests.chaos.history import History

Connection = psycopg.AsyncConnection[Any]

KEYS = [f"key-{n}" for n in range(12)]

_CREATE_SESSION = """
SELECT session_create(
    of_id => %(id)s, of_user => 'chaos', of_repo => 'https://example.org/repo.git',
    of_target_branch => 'main', of_branch => 'outwake/' || %(id)s, of_title => %(title)s,
    of_parent => NULL, of_callback_url => NULL, moment => clock_timestamp(),
    prompt_text => %(prompt)s, worker_present => true)
"""


class RollBack(Exception):
    """Wanted: the transaction is to leave nothing."""


@dataclass
class Producers:
    """All of them, until `stop` is set. `url` leads through their own proxy, `direct` does not."""

    url: str
    direct: str
    lone_url: str
    lone_direct: str
    psql: Path
    history: History
    random: random.Random
    api: str | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    recent: list[int] = field(default_factory=list)
    meddled: dict[str, int] = field(default_factory=dict)
    _tags: Any = field(default_factory=lambda: count(1))

    async def run(self) -> None:
        """Until stopped, and each has finished what it was at."""
        makers = [self._library, self._library, self._sessions, self._lone, self._by_psql, self._meddle]
        if self.api is not None:
            makers.append(self._by_http)
        await asyncio.gather(*(self._keep(maker) for maker in makers))

    async def _keep(self, maker: Callable[[], Awaitable[None]]) -> None:
        while not self.stop.is_set():
            with suppress(psycopg.Error, OSError, TimeoutError, httpx.HTTPError):
                await maker()
            await self._pause(0.2)

    async def _pause(self, most: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self.random.uniform(0, most)):
                await self.stop.wait()

    def _tag(self, by: str) -> str:
        return f"{by}-{next(self._tags)}"

    # The library, on a connection of the producer's.

    async def _library(self) -> None:
        async with await self._connect(self.url) as conn:
            while not self.stop.is_set():
                await self._transaction(conn, self._some_rows())
                await self._pause(0.12)

    async def _connect(self, url: str) -> Connection:
        return await psycopg.AsyncConnection.connect(
            url, autocommit=True, connect_timeout=3, application_name="chaos producer"
        )

    async def _transaction(
        self, conn: Connection, rows: list[dict[str, Any]], *, dawdle: float = 0.0
    ) -> list[int]:
        """One transaction: the booking, the rows, and now and then a rollback. The ids if acked."""
        tag = self._tag("library")
        ids: list[int] = []
        line = {"tag": tag, "by": "library", "booked": True, "rows": len(rows), "topic": rows[0]["topic"]}
        give_up = self.random.random() < 0.1 and not dawdle
        if self.random.random() < 0.1:
            await conn.set_isolation_level(
                self.random.choice(
                    [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE]
                )
            )
        else:
            await conn.set_isolation_level(None)
        outcome = "unknown"
        try:
            async with asyncio.timeout(20), conn.transaction():
                await conn.execute("INSERT INTO chaos_booked VALUES (%s, %s)", (tag, len(rows)))
                for row in rows:
                    payload = {**row.pop("payload"), "tag": tag}
                    ids.append(await enqueue(conn, payload=payload, **row))
                await asyncio.sleep(dawdle if dawdle else self.random.choice([0, 0, 0.01, 0.05]))
                if give_up:
                    raise RollBack
            outcome = "acked"
        except RollBack:
            outcome = "rolled_back"
        except psycopg.errors.SerializationFailure:
            outcome = "rolled_back"
        finally:  # unknown: the connection was lost, perhaps during the commit
            self.history.tell("enqueue", ids=ids, outcome=outcome, **line)
        if outcome != "acked":
            return []
        if not dawdle:
            self.recent = (self.recent + ids)[-40:]
        return ids

    def _some_rows(self) -> list[dict[str, Any]]:
        if self.random.random() < 0.07:  # all workers at once for the few places of a topic
            return [{"topic": "limited", "payload": {"ms": 10}, "max_attempts": 5} for _ in range(6)]
        return [self._a_row() for _ in range(self.random.choice([1, 1, 1, 2, 3]))]

    def _a_row(self) -> dict[str, Any]:
        rnd = self.random
        topic = rnd.choices(
            ["plain", "keyed", "transactional", "stepwise", "limited", "long", "threaded", "timed"],
            [20, 25, 15, 12, 10, 3, 6, 3],
        )[0]
        payload: dict[str, Any] = {"ms": rnd.choice([0, 2, 5, 20, 60])}
        if topic == "long":
            payload["ms"] = rnd.choice([1500, 3000, 5000])
        elif topic == "timed":
            payload["ms"] = rnd.choice([5, 150, 400])
        elif topic == "threaded":
            payload["ms"] = rnd.choice([5, 100, 600])
        elif topic == "stepwise":
            payload["steps"] = rnd.choice([1, 2, 4])
            payload["ms"] = rnd.choice([2, 20, 300])
        payload["hold_ms"] = rnd.choice([0, 0, 10, 100])
        if rnd.random() < 0.2:
            payload["plan"] = rnd.choice(
                [["retry", "ok"], ["fail", "ok"], ["permanent"], ["hand_back"], ["retry", "fail", "retry"],
                 ["retry", "retry", "ok"]]
            )  # fmt: skip
        row: dict[str, Any] = {"topic": topic, "payload": payload, "max_attempts": rnd.choice([3, 5, 5])}
        if topic == "keyed" or (topic not in ("plain", "long") and rnd.random() < 0.5):
            row["ordering_key"] = rnd.choice(KEYS)
        if rnd.random() < 0.3:
            row["priority"] = rnd.choice([-5, 5, 100])
        if rnd.random() < 0.15:  # a delayed row delays those of its key too
            most = 0.4 if "ordering_key" in row else 4
            row["available_at"] = datetime.now(UTC) + timedelta(seconds=rnd.uniform(0.05, most))
        return row

    # Rows of a topic that one worker with one slot serves. It goes to sleep after each, while the second's
    # transaction dawdles between insert and commit: there the race is that parking has to win.

    async def _lone(self) -> None:
        async with (
            await self._connect(self.lone_url) as conn,
            await psycopg.AsyncConnection.connect(self.lone_direct, autocommit=True) as watch,
        ):
            while not self.stop.is_set():
                ids = []
                # The last ones are longer than a worker stays awake after its slot was full.
                for dawdle in (
                    0.0005,
                    self.random.choice([0.001, 0.003, 0.006, 0.012, 0.03, 0.1, 0.27, 0.3, 0.35, 0.5]),
                ):
                    row = {"topic": "lone", "payload": {"ms": self.random.choice([0, 3])}, "max_attempts": 5}
                    ids += await self._transaction(conn, [row], dawdle=dawdle)
                for row_id in ids:
                    await self._until_ended(watch, row_id)
                await self._pause(0.03)

    async def _until_ended(self, watch: Connection, row_id: int) -> None:
        """A closed loop: the next lone row must not hide that this one was missed."""
        began = time.monotonic()
        while not self.stop.is_set() and time.monotonic() - began < 30:
            cursor = await watch.execute("SELECT state FROM outbox WHERE id = %s", (row_id,))
            found = await cursor.fetchone()
            if found is None or found[0] in ("done", "dead", "cancelled"):
                return
            await asyncio.sleep(0.01 if time.monotonic() - began < 1 else 0.2)

    # Sessions, as the API writes them.

    async def _sessions(self) -> None:
        async with await self._connect(self.url) as conn:
            while not self.stop.is_set():
                await self._a_session(conn)
                await self._pause(0.5)

    def _session_plan(self) -> str:
        rnd = self.random
        plan = {"messages": rnd.choice([1, 3, 8]), "ms": rnd.choice([1, 10, 60])}
        if rnd.random() < 0.3:
            plan |= {"fail_at": 1, "failures": rnd.choice([1, 2])}
        return json.dumps(plan)

    async def _a_session(self, conn: Connection) -> None:
        tag, session = self._tag("session"), uuid4()
        outcome = "unknown"
        rows = 1
        try:
            async with asyncio.timeout(20), conn.transaction():
                await conn.execute(
                    _CREATE_SESSION, {"id": session, "title": tag, "prompt": self._session_plan()}
                )
                if self.random.random() < 0.4:
                    await conn.execute(
                        "SELECT prompt_create(%s, NULL, %s, true)", (session, self._session_plan())
                    )
                    rows = 2
            outcome = "acked"
        finally:
            self.history.tell(
                "enqueue", tag=tag, ids=[], rows=rows, booked=False, by="session", outcome=outcome
            )
        await self._meddle_with_session(conn, session)

    async def _meddle_with_session(self, conn: Connection, session: UUID) -> None:
        if self.random.random() < 0.25:
            await self._pause(0.3)
            function = self.random.choice(["session_cancel", "session_archive"])
            async with asyncio.timeout(20):
                await conn.execute(f"SELECT {function}(%s)", (session,))
            self._count(function)

    def _count(self, what: str) -> None:
        self.meddled[what] = self.meddled.get(what, 0) + 1

    # psql: a process of its own each time.

    async def _by_psql(self) -> None:
        tag = self._tag("psql")
        rows = [self._a_row() for _ in range(2)]
        values = ", ".join(
            f"('{row['topic']}', '{json.dumps({**row['payload'], 'tag': tag})}',"
            f" {_quoted(row.get('ordering_key'))}, {row.get('priority', 0)}, {row['max_attempts']})"
            for row in rows
        )
        statement = (
            f"BEGIN; INSERT INTO chaos_booked VALUES ('{tag}', 2);"
            f" INSERT INTO outbox (topic, payload, ordering_key, priority, max_attempts) VALUES {values}"
            " RETURNING id; "
        )
        rolled_back = self.random.random() < 0.2
        status, output = await self._psql(statement + ("ROLLBACK" if rolled_back else "COMMIT"), self.url)
        outcome = "unknown" if status else "rolled_back" if rolled_back else "acked"
        ids = [int(word) for word in output.split() if word.isdigit()]
        self.history.tell("enqueue", tag=tag, ids=ids, rows=2, booked=True, by="psql", outcome=outcome)
        await self._pause(1.0)

    async def _psql(self, statement: str, url: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            str(self.psql), "-XqAt", "-v", "ON_ERROR_STOP=1", url,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(15):
                output, _ = await process.communicate(statement.replace("; ", ";\n").encode())
        except TimeoutError:
            process.kill()
            await process.wait()
            return 1, ""
        assert process.returncode is not None
        return process.returncode, output.decode()

    # A person at psql: several rows in one transaction in any order, which deadlocks with the workers.

    async def _meddle(self) -> None:
        await self._pause(1.5)
        if len(self.recent) < 3:
            return
        rows = self.random.sample(self.recent, 3)
        word = self.random.choice(["cancel", "cancel", "retry", "discard", "state", "mark", "take", "take"])
        statements = {
            "cancel": "SELECT outbox_cancel({0})",
            "retry": "SELECT outbox_retry({0})",
            "discard": "SELECT outbox_discard({0})",
            "state": "UPDATE outbox SET state = 'cancelled' WHERE id = {0} AND state = 'ready'",
            "mark": "UPDATE outbox SET cancel_requested_at = now()"
            " WHERE id = {0} AND state IN ('ready', 'running')",
            "take": "UPDATE outbox SET state = 'ready'"
            " WHERE state = 'running' AND id = (SELECT min(id) FROM outbox"
            " WHERE state = 'running' AND id > (SELECT max(id) FROM outbox) - {0} % 30)",
        }
        body = "; ".join(statements[word].format(row) + "; SELECT pg_sleep(0.02)" for row in rows)
        lines = f"SET application_name = '{PERSON}'; BEGIN; {body}; COMMIT"
        status, _ = await self._psql(lines, self.direct)
        self._count(f"person {word}{' failed' if status else ''}")

    # HTTP, if there is an API.

    async def _by_http(self) -> None:
        assert self.api is not None
        async with httpx.AsyncClient(base_url=self.api, timeout=10) as client:
            while not self.stop.is_set():
                await self._post(client)
                await self._pause(0.5)

    async def _post(self, client: httpx.AsyncClient) -> None:
        """Asks again under the same Idempotency-Key until it is answered: there must be one session."""
        tag = self._tag("http")
        body = {"repo": "octo/tools", "target_branch": "main", "title": tag, "prompt": self._session_plan()}
        line = {"tag": tag, "ids": [], "rows": 1, "booked": False, "by": "http"}
        for _ in range(40):
            with suppress(httpx.HTTPError):
                answer = await client.post("/sessions", json=body, headers={"Idempotency-Key": tag})
                if answer.is_success:
                    self.history.tell("enqueue", outcome="acked", **line)
                    return
                if answer.status_code < 500:
                    raise AssertionError(f"the API refused: {answer.status_code} {answer.text}")
            if self.stop.is_set():
                break
            await self._pause(0.5)
        self.history.tell("enqueue", outcome="unknown", **line)


def _quoted(text: str | None) -> str:
    return "NULL" if text is None else f"'{text}'"
