"""Runs the examples of docs/producers.md: each stores an order, and the worker sends the mail."""

import asyncio
import json
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from outwake.schema import in_schema
from tests.support.process import ROOT, Process, running
from tests.support.steps import Connection, one
from tests.support.waits import awaiting

EXAMPLES = ROOT / "docs/examples"
PG = ROOT / ".state/pg"

SENT = "CREATE TABLE public.sent (row_id bigint, article text)"
"""What the handler of email.send writes: docs/examples/email_topic."""


@dataclass(frozen=True)
class Shop:
    """A copy of an example, in an environment that has what it needs."""

    directory: Path
    python: Path
    """Of the environment. Its commands lie beside it."""
    url: str
    environment: Mapping[str, str]

    async def run(self, *command: str | Path, **env: str) -> str:
        """Run a command to its end; what it printed. Raises AssertionError if it fails."""
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.directory, env=self._env(env), stdin=DEVNULL, stdout=PIPE, stderr=PIPE
        )
        async with awaiting(f"{command} to end"):
            printed, complained = await process.communicate()
        assert process.returncode == 0, printed.decode() + complained.decode()
        return printed.decode()

    @asynccontextmanager
    async def serving(self, *command: str | Path) -> AsyncIterator[Process]:
        """Run a command while the block runs."""
        line, *arguments = command
        env: dict[str, str | None] = {**self._env({}), "PYTHONPATH": self.environment.get("PYTHONPATH")}
        async with running(str(line), "-P", *arguments, env=env) as process:
            yield process

    def _env(self, changes: Mapping[str, str]) -> dict[str, str]:
        return {**self.environment, "SHOP_DATABASE_URL": self.url, **changes}


async def fastapi(shop: Shop) -> int:
    """Migrate by Alembic, serve, order: the id of the row."""
    psycopg = Shop(
        shop.directory,
        shop.python,
        shop.url.replace("postgresql://", "postgresql+psycopg://"),
        shop.environment,
    )
    printing = "import sys; from outwake.__main__ import main; sys.argv[0] = 'outwake'; sys.exit(main())"
    words = ["migrate", "--only", "outbox", "--print", "--no-transaction"]
    printed = await shop.run(shop.python, "-c", printing, *words, DATABASE_URL=shop.url)
    (shop.directory / "migrations/versions/outwake_1_0.sql").write_text(printed)
    await psycopg.run(shop.python, "-m", "alembic", "upgrade", "head")
    assert "No new upgrade operations" in await psycopg.run(shop.python, "-m", "alembic", "check")
    serve = ("-m", "uvicorn", "--app-dir", str(shop.directory), "--port", "0", "shop:app")
    async with psycopg.serving(shop.python, *serve) as server:
        await server.says("where it listens", lambda: _listening(server) is not None)
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(f"{_listening(server)}/orders", json={"article": "lamp"})
        assert answer.status_code == 201, answer.text
        return int(answer.json()["row"])


def _listening(server: Process) -> str | None:
    found = re.search(r"running on (http://\S+)", "\n".join(server.stderr))
    return found and found[1]


async def django(shop: Shop) -> int:
    """Migrate, then order by Django's own client: the id of the row."""
    key = {"SHOP_SECRET_KEY": "of the test alone"}
    await shop.run(shop.python, "manage.py", "migrate", **key)
    assert "No changes" in await shop.run(shop.python, "manage.py", "makemigrations", "--check", **key)
    order = "from django.test import Client; "
    order += "a = Client().post('/orders', {'article': 'lamp'}, HTTP_HOST='localhost'); "
    order += "assert a.status_code == 201, a; print(a.content.decode())"
    printed = await shop.run(shop.python, "manage.py", "shell", "-v", "0", "-c", order, **key)
    return int(json.loads(printed)["row"])


async def asyncpg(shop: Shop) -> int:
    """Order: the id of the row."""
    return int(await shop.run(shop.python, "shop.py", "lamp"))


async def node(shop: Shop) -> int:
    """Order: the id of the row."""
    (shop.directory / "node_modules").symlink_to(PG / "node_modules")
    program = shutil.which("node")
    assert program is not None
    return int(await shop.run(program, "shop.mjs", "lamp"))


RUN: dict[str, Callable[[Shop], Awaitable[int]]] = {
    "fastapi_shop": fastapi,
    "django_shop": django,
    "asyncpg_shop": asyncpg,
    "node_shop": node,
}


def has_node() -> bool:
    """Whether node and node-postgres are here."""
    return shutil.which("node") is not None and PG.joinpath("node_modules/pg").exists()


def copy_of(example: str, directory: Path) -> Path:
    """Its files, in a directory of their own."""
    ignored = shutil.ignore_patterns("__pycache__", "node_modules")
    return Path(shutil.copytree(EXAMPLES / example, directory / example, ignore=ignored))


async def mail_of(row_id: int, worker: Process, conn: Connection) -> None:
    """Return when the mail has been sent. Raises AssertionError if there is another order or mail."""
    await worker.event("ended", outbox_id=row_id)
    assert await one(conn, "SELECT array_agg(article) FROM public.shop_order") == ["lamp"]
    assert await one(conn, "SELECT array_agg(article) FROM public.sent") == ["lamp"]
    state = in_schema("SELECT state FROM :schema.outbox WHERE id = %s")
    assert await one(conn, state, row_id) == "done"
