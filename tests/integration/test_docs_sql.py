"""docs/sql.md says what psql shows, and names every view and function that a person may use."""

import re

import pytest

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


@pytest.mark.parametrize("kind", ["relation", "column", "function"])
async def test_everything_is_explained(connect: Connect, kind: str) -> None:
    """`\\d+` and `\\df+` have something to say."""
    query = {
        "relation": """
            SELECT relname FROM pg_class
            WHERE relkind IN ('r', 'v') AND relnamespace = 'public'::regnamespace
              AND obj_description(oid, 'pg_class') IS NULL
        """,
        "column": """
            SELECT c.relname || '.' || a.attname FROM pg_class AS c
            JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            WHERE c.relkind = 'v' AND c.relnamespace = 'public'::regnamespace
              AND c.relname <> 'worker_present' -- its columns are those of worker
              AND col_description(c.oid, a.attnum) IS NULL
        """,
        "function": """
            SELECT p.proname FROM pg_proc AS p
            WHERE p.pronamespace = 'public'::regnamespace AND p.prorettype <> 'trigger'::regtype
              AND obj_description(p.oid, 'pg_proc') IS NULL
        """,
    }[kind]
    unexplained = set(await column(await connect(), query))
    assert unexplained - _EXPLAINED_ELSEWHERE == set()


# What no person calls; their reasons stand in the SQL. The ledger is the migration's.
_EXPLAINED_ELSEWHERE = {
    "schema_migration",
    "outbox_take_key",
    "outbox_topic_room",
    "outbox_notify_lease",
    "outbox_error",
    "session_notify",
}


def test_links_within_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    heads = {
        re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^## (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= heads
