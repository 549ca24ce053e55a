"""The examples of docs/producers.md run, with the real libraries."""

import os
import sys
from pathlib import Path

import pytest

from tests.adopt.examples import EXAMPLES, RUN, SENT, Shop, copy_of, has_node, mail_of
from tests.conftest import Connect
from tests.support.database import set_search_path
from tests.support.pages import EXAMPLE, blocks, install_example
from tests.support.process import ROOT
from tests.support.worker import command


@pytest.mark.parametrize("example", RUN)
async def test_the_order_and_its_mail(
    example: str, database: str, empty_database: str, connect: Connect, tmp_path: Path
) -> None:
    if example == "node_shop" and not has_node():
        pytest.skip("node-postgres is not installed: `make pg` does it, and needs node and npm")
    url = empty_database if example == "fastapi_shop" else database  # which migrates by itself
    set_search_path(url, "$user", "public")
    conn = await connect(url)
    (handlers := tmp_path / "handlers").mkdir()
    install_example(EXAMPLE, handlers)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shop = Shop(copy_of(example, tmp_path), Path(sys.executable), url, environment)
    row_id = await RUN[example](shop)
    await conn.execute(SENT)
    async with command(url, handlers, "--topics", "email.send") as worker:
        await mail_of(row_id, worker, conn)


def test_the_page_shows_the_examples_as_they_are() -> None:
    shown = [*blocks("producers.md", "python"), *blocks("producers.md", "js")]
    names = ("shop.py", "env.py", "outwake_1_0.py", "views.py", "shop.mjs")
    there = [path.read_text() for name in names for path in EXAMPLES.rglob(f"*_shop/**/{name}")]
    assert sorted(shown) == sorted(there)
