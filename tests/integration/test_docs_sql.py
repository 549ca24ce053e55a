"""docs/sql.md says what psql shows, and names every view and function that a person may use."""

import re

from tests.conftest import Connect
from tests.support.process import ROOT
from tests.support.scenario import build
from tests.support.steps import column
from tests.support.transcript import check

PAGE = ROOT / "docs" / "sql.md"


async def test_the_page_says_what_is_seen(connect: Connect) -> None:
    scenario = await build(connect)
    writer = await connect(autocommit=False, application_name="a forgotten psql")
    await writer.execute("UPDATE outbox SET priority = 0 WHERE topic = 'audit.log'")
    await check(PAGE, scenario.conn)


async def test_every_view_is_on_the_page(connect: Connect) -> None:
    views = await column(
        await connect(),
        "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = 'public'::regnamespace",
    )
    text = PAGE.read_text()
    hidden = {"worker_present", "outbox_front"}  # what the others are made of
    assert [name for name in views if name not in hidden and f"`{name}" not in text] == []


async def test_every_column_of_a_view_is_explained(connect: Connect) -> None:
    """`\\d+` has something to say. (Tables and functions: test_migrate.py.)"""
    unexplained = await column(
        await connect(),
        """
        SELECT c.relname || '.' || a.attname FROM pg_class AS c
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace
          -- The columns of these are those of worker and sandbox_borrow.
          AND c.relname NOT IN ('worker_present', 'sandbox_suspect')
          AND col_description(c.oid, a.attnum) IS NULL
        """,
    )
    assert unexplained == []


def test_links_within_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    heads = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^## (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= heads
