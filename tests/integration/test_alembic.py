"""Outwake in an application that migrates by Alembic, as docs/adopt.md shows it, with real drivers."""

import asyncio
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Connect
from tests.support.database import set_search_path
from tests.support.pages import blocks
from tests.support.process import ROOT, running
from tests.support.schema import describe
from tests.support.steps import column, one
from tests.support.worker import command, install

_, REVISION, INCLUDE_NAME = blocks("adopt.md", "python")
PRINT = "outwake migrate --only outbox --print --no-transaction"

METADATA = """
from sqlalchemy import Column, Integer, MetaData, Table, Text

target_metadata = MetaData()
Table("ticket", target_metadata, Column("id", Integer, primary_key=True), Column("subject", Text))
"""
# A revision of the application's, in the same transaction as ours and after it.
NEXT = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "5be0c2a94f11", "0c1d5a7e9b30"

def upgrade():
    op.create_table(
        "ticket", sa.Column("id", sa.Integer, primary_key=True), sa.Column("subject", sa.Text))

def downgrade():
    op.drop_table("ticket")
"""
UNCHANGED = "No new upgrade operations detected."


@dataclass
class Project:
    """An application's directory."""

    directory: Path

    async def alembic(self, *words: str) -> tuple[int, str]:
        """Run the command; its exit status, and all that it said."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "alembic", *words),
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, said.decode()

    async def succeeds(self, *words: str) -> str:
        status, said = await self.alembic(*words)
        assert status == 0, said
        return said

    def configure(self, *, include_name: str) -> None:
        """With include_schemas=True. `include_name`: the block of the page, or another."""
        environment = self.directory / "migrations" / "env.py"
        text = environment.read_text().replace("target_metadata = None", METADATA + include_name)
        configured = "target_metadata=target_metadata, include_schemas=True, include_name=include_name"
        assert text.count("target_metadata=target_metadata") == 2
        environment.write_text(text.replace("target_metadata=target_metadata", configured))


@pytest.fixture(params=["psycopg", "psycopg2"])
async def project(request: pytest.FixtureRequest, empty_database: str, tmp_path: Path) -> Project:
    """A project that has our revision and one of its own, on a database with the usual search_path."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    set_search_path(empty_database, "$user", "public")
    made = Project(tmp_path)
    await made.succeeds("init", "migrations")
    ini = tmp_path / "alembic.ini"
    url = empty_database.replace("postgresql://", f"postgresql+{request.param}://")
    lines = [
        f"sqlalchemy.url = {url}" if line.startswith("sqlalchemy.url") else line
        for line in ini.read_text().split("\n")
    ]
    ini.write_text("\n".join(lines))
    versions = tmp_path / "migrations" / "versions"
    [script] = [block for block in blocks("adopt.md", "console") if PRINT in block]
    target = tmp_path / script.partition(" > ")[2].strip()
    async with running(*PRINT.split(), env={"DATABASE_URL": empty_database}) as printing:
        assert await printing.ended() == 0
    target.write_text("\n".join(printing.stdout))
    (versions / "outwake.py").write_text(REVISION)
    (versions / "ticket.py").write_text(NEXT)
    return made


async def test_alembic_applies_and_removes_what_outwake_prints(
    project: Project, empty_database: str, connect: Connect, tmp_path: Path
) -> None:
    project.configure(include_name=INCLUDE_NAME)
    await project.succeeds("upgrade", "head")
    conn = await connect(empty_database)
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    assert await column(conn, tables) == ["alembic_version", "ticket"]
    async with running(
        "outwake", "migrate", "--only", "outbox", env={"DATABASE_URL": empty_database}
    ) as migrate:
        assert await migrate.ended() == 0
        assert [line for line in migrate.stdout if "applying" in line] == []
    async with command(empty_database, install(tmp_path / "handlers")) as worker:
        await worker.event("parked")
        row = await one(conn, "INSERT INTO outwake.outbox (topic) VALUES ('noop') RETURNING id")
        await worker.event("completed", rows=[row])

    assert UNCHANGED in await project.succeeds("check")
    await project.succeeds("revision", "--autogenerate", "-m", "nothing")
    [made] = (tmp_path / "migrations" / "versions").glob("*_nothing.py")
    assert made.read_text().count("    pass") == 2
    made.unlink()

    await project.succeeds("downgrade", "base")
    assert await column(conn, tables) == ["alembic_version"]
    assert await one(conn, "SELECT to_regnamespace('outwake')") is None


async def test_alembic_makes_the_same_schema_as_migrate(
    project: Project, empty_database: str, connect: Connect
) -> None:
    await project.succeeds("upgrade", "0c1d5a7e9b30")
    async with running("outwake", "migrate", env={"DATABASE_URL": empty_database}) as migrate:
        assert await migrate.ended() == 0
    set_search_path(empty_database)
    assert await describe(await connect(empty_database)) == await describe(await connect())


async def test_autogenerate_looks_at_our_tables_unless_they_are_left_out(project: Project) -> None:
    """So the block of the page is needed where include_schemas=True."""
    project.configure(include_name="def include_name(*_):\n    return True\n")
    await project.succeeds("upgrade", "head")
    status, said = await project.alembic("check")
    assert status != 0
    assert "outwake" in said
