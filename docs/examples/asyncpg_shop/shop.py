"""`python shop.py ARTICLE` stores an order, and the mail that must follow it, in one transaction."""

import asyncio
import os
import sys

import asyncpg

from outwake import enqueue


async def order(pool: asyncpg.Pool, article: str) -> int:
    """The mail will be sent if the order is there, and only then."""
    async with pool.acquire() as conn, conn.transaction():
        await conn.execute("INSERT INTO shop_order (article) VALUES ($1)", article)
        return await enqueue(conn, "email.send", {"article": article})


async def main(article: str) -> None:
    async with asyncpg.create_pool(os.environ["SHOP_DATABASE_URL"]) as pool:
        await pool.execute("CREATE TABLE IF NOT EXISTS shop_order (id bigserial PRIMARY KEY, article text)")
        print(await order(pool, article))


asyncio.run(main(sys.argv[1]))
