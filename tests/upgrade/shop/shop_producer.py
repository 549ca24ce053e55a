"""An application that enqueues in its own transactions until SIGTERM: by the library it finds, or by SQL.

    python -m shop_producer library|sql NAME SEED

Each transaction books its rows in a table of the application; some are rolled back. A transaction begins with
a shared advisory lock: whoever holds it exclusively has all producers wait, each between two transactions.
"""

import asyncio
import json
import os
import random
import signal
import sys
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import psycopg

GATE = 4711
KEYS = 4
Row = dict[str, Any]
Connection = psycopg.AsyncConnection[Any]


class RollBack(Exception):
    """Wanted."""


class Producer:
    """One of them, on one connection: rows of its ordering keys are committed in the order of their ids."""

    def __init__(self, conn: Connection, name: str, seed: int) -> None:
        self.stop = asyncio.Event()
        self._conn = conn
        self._name = name
        self._random = random.Random(seed)
        self._tags = count(1)

    async def run(self) -> None:
        """Until stopped."""
        while not self.stop.is_set():
            with suppress(RollBack):
                async with self._conn.transaction():
                    await self._conn.execute("SELECT pg_advisory_xact_lock_shared(%s)", (GATE,))
                    await self._transaction()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0, 0.12)):
                    await self.stop.wait()

    async def _transaction(self) -> None:
        rnd = self._random
        if rnd.random() < 0.1:
            tag = f"{self._name}-{next(self._tags)}"
            payloads = [{"ms": 1, "tag": tag} for _ in range(rnd.randint(2, 8))]
            await self.insert_many("shop.returned", payloads)
            await self._conn.execute("INSERT INTO public.booked_many VALUES (%s, %s)", (tag, len(payloads)))
        else:
            for _ in range(rnd.choice([1, 1, 2, 3])):
                row_id = await self.insert(self._a_row())
                await self._conn.execute("INSERT INTO public.booked VALUES (%s)", (row_id,))
        if rnd.random() < 0.1:
            raise RollBack

    def _a_row(self) -> Row:
        rnd = self._random
        topic = rnd.choices(["shop.plain", "shop.returned", "shop.keyed", "shop.limited"], [4, 2, 2, 1])[0]
        payload: dict[str, Any] = {"ms": rnd.choice([0, 1, 5, 20])}
        row: Row = {"topic": topic, "payload": payload}
        if rnd.random() < 0.15:
            payload["plan"] = rnd.choice(["retry", "retry", "retry", "fail", "dead"])
        if topic == "shop.keyed":
            row["ordering_key"] = f"{self._name}-{rnd.randrange(KEYS)}"
        elif topic == "shop.plain" and rnd.random() < 0.2:
            row["unique_key"] = f"{self._name}-{rnd.randrange(3)}"
            row["on_duplicate"] = rnd.choice(["keep", "replace", "reject"])
        if rnd.random() < 0.15:
            row["available_at"] = datetime.now(UTC) + timedelta(seconds=rnd.uniform(0.02, 0.8))
        if rnd.random() < 0.2:
            row["priority"] = rnd.choice([-5, 5])
        return row

    async def insert(self, row: Row) -> int:
        raise NotImplementedError

    async def insert_many(self, topic: str, payloads: list[Row]) -> None:
        raise NotImplementedError


class ByLibrary(Producer):
    """As docs/outbox.md has it, by the library of this process's version."""

    async def insert(self, row: Row) -> int:
        from outwake import Duplicate, enqueue

        try:
            return await enqueue(self._conn, **row)
        except Duplicate:
            raise RollBack from None

    async def insert_many(self, topic: str, payloads: list[Row]) -> None:
        from outwake import enqueue_many

        await enqueue_many(self._conn, topic, payloads)


class BySql(Producer):
    """As an application in another language: INSERT, or the function."""

    async def insert(self, row: Row) -> int:
        values = {**row, "payload": json.dumps(row["payload"])}
        on_duplicate = values.pop("on_duplicate", None)
        if on_duplicate is not None or self._random.random() < 0.3:
            values |= {} if on_duplicate is None else {"on_duplicate": on_duplicate}
            text = ", ".join(f"{name} => %({name})s{_CASTS.get(name, '')}" for name in values)
            return await self._id(f"SELECT outwake.enqueue({text})", values)
        places = ", ".join(f"%({name})s" for name in values)
        return await self._id(
            f"INSERT INTO outwake.outbox ({', '.join(values)}) VALUES ({places}) RETURNING id", values
        )

    async def _id(self, query: str, values: Row) -> int:
        try:
            cursor = await self._conn.execute(query.encode(), values)
        except psycopg.errors.UniqueViolation:
            raise RollBack from None
        found = await cursor.fetchone()
        assert found is not None
        return int(found[0])

    async def insert_many(self, topic: str, payloads: list[Row]) -> None:
        await self._conn.execute(
            "INSERT INTO outwake.outbox (topic, payload) SELECT %s, p FROM unnest(%s::jsonb[]) AS p",
            (topic, [json.dumps(payload) for payload in payloads]),
        )


_CASTS = {"payload": "::jsonb", "topic": "::text", "ordering_key": "::text", "unique_key": "::text",
          "on_duplicate": "::text", "priority": "::integer"}  # fmt: skip


async def main(how: str, name: str, seed: int) -> None:
    kind = {"library": ByLibrary, "sql": BySql}[how]
    url = os.environ["DATABASE_URL"]
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, application_name=name) as conn:
        producer = kind(conn, name, seed)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, producer.stop.set)
        print(json.dumps({"event": "producing"}), file=sys.stderr, flush=True)
        await producer.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
