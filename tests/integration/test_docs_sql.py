"""docs/sql.md says what psql shows, and names every view and function that a person may use."""

import re
import secrets

from tests.conftest import Connect
from tests.support.process import ROOT
from tests.support.roles import roles_of
from tests.support.scenario import build
from tests.support.steps import column, one
from tests.support.transcript import check

PAGE = ROOT / "docs" / "sql.md"


async def test_the_page_says_what_is_seen(connect: Connect) -> None:
    """Without a search_path: every statement names the schema."""
    scenario = await build(connect)
    writer = await connect(autocommit=False, application_name="a forgotten psql")
    await writer.execute("UPDATE outbox SET priority = 0 WHERE topic = 'audit.log'")
    await scenario.conn.execute("SET search_path = public")
    await check(PAGE, scenario.conn)


async def test_each_role_of_the_page_may_do_what_it_says(database: str, connect: Connect) -> None:
    """Of each part the first block makes a role, and the next is the role's to run."""
    scenario = await build(connect)
    conn = scenario.conn
    await conn.execute("SET search_path = public")
    _, *parts = PAGE.read_text().partition("## Roles")[2].partition("\n## ")[0].split("\n### ")
    ran = {}
    with roles_of(database) as roles:
        for part in parts:
            makes, *runs = re.findall(r"```sql\n(.*?)```", part, re.DOTALL)
            [told] = re.findall(r"CREATE ROLE (\w+) LOGIN", makes)
            name = f"{told}_{secrets.token_hex(4)}"  # roles belong to the cluster
            roles.will_drop(name)
            await conn.execute(re.sub(rf"\b{told}\b", name, makes).encode())
            await conn.execute(f"SET ROLE {name}".encode())
            for statements in runs:
                for statement in re.split(r";\n", statements.strip() + "\n"):
                    await conn.execute(statement.encode())
            await conn.execute("RESET ROLE")
            ran[part.partition("\n")[0]] = len(runs)
    assert ran == {"A producer": 1, "A worker": 0, "A monitor": 1, "An operator": 1}
    assert (
        await one(conn, "SELECT count(*) FROM outwake.outbox WHERE topic = 'invoice.send' AND id > 17") == 1
    )
    assert await one(conn, "SELECT state FROM outwake.outbox WHERE id = %s", scenario.rows["dead"]) == "ready"
    assert await one(conn, "SELECT max_running FROM outwake.topic WHERE name = 'email.send'") == 5


async def test_every_view_is_on_the_page(connect: Connect) -> None:
    views = await column(
        await connect(),
        "SELECT relname FROM pg_class WHERE relkind = 'v' AND relnamespace = 'outwake'::regnamespace",
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
        WHERE c.relkind = 'v' AND c.relnamespace = 'outwake'::regnamespace
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
        for head in re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= heads
