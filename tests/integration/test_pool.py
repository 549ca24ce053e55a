"""The API's pool: who gets which connection, and which are not used again."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from psycopg import OperationalError

from app import pool as pool_module
from app.connection import Connection
from app.pool import Pool
from tests.support.api import TIMEOUT

Make = Callable[[int], Pool]


@pytest.fixture
async def make(database: str) -> AsyncIterator[Make]:
    """Pools of so many connections."""
    made: list[Pool] = []

    async def connect() -> Connection:
        return await Connection.connect(database, autocommit=True)

    def pool(most: int) -> Pool:
        made.append(Pool(connect, most, lambda: pytest.fail("no connection could be opened")))
        made[-1].open()
        return made[-1]

    yield pool
    for each in made:
        await each.close()
        assert each.size == 0  # nobody kept one


@asynccontextmanager
async def taken(pool: Pool, count: int) -> AsyncIterator[list[Connection]]:
    """So many at once."""
    held = [await pool.take(TIMEOUT) for _ in range(count)]
    yield held
    for conn in held:
        pool.give_back(conn)


async def test_one_after_the_other_needs_one_and_many_at_once_the_last_first(make: Make) -> None:
    pool = make(5)
    for _ in range(3):
        async with taken(pool, 1):
            pass
    assert (pool.size, pool.free) == (1, 1)
    async with taken(pool, 3) as held:
        assert len(set(held)) == 3
    async with taken(pool, 1) as again:
        assert again == held[-1:]


async def test_who_waits_is_served_in_line(make: Make) -> None:
    pool = make(1)
    order: list[int] = []

    async def use(number: int) -> None:
        async with taken(pool, 1) as held:
            order.append(number)
            await held[0].execute("SELECT")

    await asyncio.gather(*(use(number) for number in range(5)))
    assert order == [0, 1, 2, 3, 4]
    assert pool.size == 1


async def test_nobody_waits_longer_than_he_wants_or_once_all_are_refused(make: Make) -> None:
    pool = make(1)
    async with taken(pool, 1):
        with pytest.raises(TimeoutError):
            await pool.take(0)
        waiting = asyncio.create_task(pool.take(TIMEOUT))
        await asyncio.sleep(0)
        pool.refuse()
        with pytest.raises(TimeoutError):
            await waiting
    assert pool.free == 1


async def test_one_that_came_as_its_taker_was_cancelled_goes_to_the_next(make: Make) -> None:
    pool = make(1)
    async with taken(pool, 1):
        cancelled, following = (asyncio.create_task(pool.take(TIMEOUT)) for _ in range(2))
        await asyncio.sleep(0)
        assert pool.waiting == 2
    cancelled.cancel()  # it has one, and has not run since
    pool.give_back(await following)
    assert cancelled.cancelled()
    assert pool.free == 1


async def test_one_in_a_transaction_or_closed_or_old_is_not_used_again(make: Make) -> None:
    pool = make(1)

    async def left(conn: Connection) -> bool:
        """Whether it was not used again, although somebody waited."""
        following = asyncio.create_task(pool.take(TIMEOUT))
        await asyncio.sleep(0)
        pool.give_back(conn)
        other = await following
        pool.give_back(other)
        return other is not conn and conn.closed

    conn = await pool.take(TIMEOUT)
    await conn.execute("BEGIN")
    assert await left(conn)
    conn = await pool.take(TIMEOUT)
    await conn.close()
    assert await left(conn)
    conn = await pool.take(TIMEOUT)
    conn.until = asyncio.get_running_loop().time() - 1
    assert await left(conn)
    assert not await left(await pool.take(TIMEOUT))
    assert (pool.size, pool.free) == (1, 1)


async def test_all_but_one_of_those_not_needed_are_closed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LOOK", TIMEOUT)
    pool = make(5)
    async with taken(pool, 4):
        pass
    pool._close_unneeded()
    assert pool.size == 4  # all were needed since the last look
    async with taken(pool, 2) as needed:
        pass
    pool._close_unneeded()
    assert pool.size == pool.free == 2
    assert not any(conn.closed for conn in needed)
    for _ in range(2):
        pool._close_unneeded()
    assert pool.size == pool.free == 1


async def test_one_given_back_after_the_end_is_closed(make: Make) -> None:
    pool = make(2)
    async with taken(pool, 1) as held:
        await pool.close()
        await pool.close()
    assert held[0].closed
    assert (pool.size, pool.free) == (0, 0)


async def test_end_while_one_is_being_opened(make: Make) -> None:
    pool = make(2)
    await asyncio.sleep(0)
    await pool.close()
    assert (pool.size, pool.free) == (0, 0)


async def test_one_that_could_not_be_opened_is_tried_again_whatever_the_reason(database: str) -> None:
    errors: list[Exception] = [OperationalError("no"), OSError("never")]
    failed: list[bool] = []

    async def connect() -> Connection:
        if errors:
            raise errors.pop(0)
        return await Connection.connect(database, autocommit=True)

    pool = Pool(connect, 1, lambda: failed.append(True))
    for error in (None, OSError):
        waiting = asyncio.create_task(pool.take(TIMEOUT))
        await asyncio.sleep(0)
        assert pool._opening is not None
        (done,), _ = await asyncio.wait([pool._opening])
        assert type(done.exception()) is (error or type(None))
        waiting.cancel()
    async with taken(pool, 1):
        assert len(failed) == 1  # the database's errors alone tell of an outage
    await pool.close()
