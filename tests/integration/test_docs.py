"""What the pages show is run."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connect
from tests.support.database import set_search_path
from tests.support.pages import EXAMPLE, blocks, install_example
from tests.support.process import ROOT, running


async def test_the_example_topic_runs(database: str, tmp_path: Path, connect: Connect) -> None:
    set_search_path(database, "public")
    conn = await connect()
    await conn.execute("CREATE TABLE shop_order (article text)")
    await conn.execute("CREATE TABLE sent (row_id bigint, article text)")
    install_example(EXAMPLE, tmp_path)
    environment = {
        "DATABASE_URL": database,
        "OUTWAKE_LOG_LEVEL": "debug",
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
    }
    async with running("worker", "--topics", "email.send", env=environment) as worker:
        await worker.event("parked")
        names: dict[str, Any] = {}
        exec(blocks("outbox.md", "python")[0], names)  # noqa: S102
        row_id = await names["order"](database, "lamp")
        await worker.event("ended", outbox_id=row_id, state="settled by its handler")
        [statement] = blocks("outbox.md", "sql")
        await conn.execute(statement.encode())
        await worker.event("ended", outbox_id=row_id + 1)
        await conn.execute("INSERT INTO outwake.outbox (topic) VALUES ('email.send')")
        await worker.event("ended", outbox_id=row_id + 2, state="dead", reason="no article")
    sent = await (await conn.execute("SELECT row_id, article FROM sent ORDER BY row_id")).fetchall()
    assert sent == [(row_id, "lamp"), (row_id + 1, "lamp")]


def test_the_page_shows_the_example_as_it_is() -> None:
    shown, there = blocks("outbox.md", "python")[1], (EXAMPLE / "email_topic.py").read_text()
    without_docstrings = re.sub(r' *"""[^"]*"""\n+', "", there)
    assert re.sub(r"\n+", "\n", shown) == re.sub(r"\n+", "\n", without_docstrings)
    assert blocks("outbox.md", "toml")[0] in (EXAMPLE / "pyproject.toml").read_text()


async def test_the_loop_of_ones_own_runs(
    database: str, connect: Connect, capsys: pytest.CaptureFixture[str]
) -> None:
    set_search_path(database, "public")
    conn = await connect()
    await conn.execute("""INSERT INTO outwake.outbox (topic, payload) VALUES ('email.send', '{"a": 1}')""")
    names: dict[str, Any] = {}
    exec(blocks("outbox.md", "python")[2], names)  # noqa: S102
    assert await names["work_once"](conn) == 1
    assert capsys.readouterr().out == "{'a': 1}\n"
    assert await (await conn.execute("SELECT state FROM outwake.outbox")).fetchall() == [("done",)]


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
