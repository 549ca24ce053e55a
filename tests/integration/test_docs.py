"""What the pages show is run."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connect
from tests.support.database import set_search_path
from tests.support.process import ROOT, running

EXAMPLE = ROOT / "docs" / "examples" / "email_topic"


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def install(example: Path, target: Path) -> None:
    """What pip would leave behind: the module, and the metadata that names its entry points."""
    project = tomllib.loads((example / "pyproject.toml").read_text())
    name = project["project"]["name"].replace("-", "_")
    (target / f"{name}.py").write_text((example / f"{name}.py").read_text())
    metadata = target / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = []
    for group, entries in project["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{topic} = {value}" for topic, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


async def test_the_example_topic_runs(database: str, tmp_path: Path, connect: Connect) -> None:
    set_search_path(database, "public")
    conn = await connect()
    await conn.execute("CREATE TABLE shop_order (article text)")
    await conn.execute("CREATE TABLE sent (row_id bigint, article text)")
    install(EXAMPLE, tmp_path)
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
