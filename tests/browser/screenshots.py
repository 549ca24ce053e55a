"""`make screenshots`: every page in light, dark and narrow, into docs/screenshots/.

With names of pages as arguments only those; `--scene URL` fills a database and stays there for a look.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

from playwright.async_api import Browser
from psycopg import AsyncConnection, sql

from outwake._migrate import migrate
from tests.browser.chromium import chromium
from tests.browser.scene import make_scene
from tests.support.api import serving
from tests.support.database import set_search_path
from tests.support.server import running_server, with_database

DIRECTORY = Path(__file__).parents[2] / "docs" / "screenshots"
LOOKS = {
    "light": ("light", 1180, 780),
    "dark": ("dark", 1180, 780),
    "narrow": ("light", 360, 720),
}


async def _take(server: str, wanted: list[str]) -> None:
    name = "screenshots"
    async with await AsyncConnection.connect(server, autocommit=True) as admin:
        await admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    database = with_database(server, name)
    set_search_path(database)
    await migrate(database)
    async with (
        await AsyncConnection.connect(database, autocommit=True) as conn,
        serving(database) as api,
        chromium() as browser,
    ):
        await conn.execute("TRUNCATE outbox RESTART IDENTITY")
        session = await make_scene(api.client, conn)
        cursor = await conn.execute("SELECT max(id) FROM outbox WHERE state = 'dead'")
        row = await cursor.fetchone()
        assert row is not None
        pages = {
            "sessions": "/",
            "session": f"/ui/sessions/{session}",
            "new": "/ui/new",
            "outbox": "/ui/outbox",
            "workers": "/ui/workers",
            "dead": "/ui/dead",
            "row": f"/ui/outbox/{row[0]}",
        }
        chosen = {page: path for page, path in pages.items() if not wanted or page in wanted}
        await _shoot(browser, api.url, chosen)
        if not wanted or "sign-in" in wanted:
            async with serving(database, OUTWAKE_OIDC_ISSUER="https://id.example.com") as closed:
                await _shoot(browser, closed.url, {"sign-in": "/ui/sign-in"})
        if not wanted or "no-worker" in wanted:
            await conn.execute("SELECT pg_advisory_unlock_all()")
            await conn.execute("UPDATE worker SET parked = false")
            await asyncio.sleep(1.1)  # the API's answer about presence is a second old at most
            await _shoot(browser, api.url, {"no-worker": "/"})


async def _shoot(browser: Browser, url: str, pages: dict[str, str]) -> None:
    for look, (scheme, width, size) in LOOKS.items():
        context = await browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            viewport={"width": width, "height": size},
            reduced_motion="reduce",
        )
        page = await context.new_page()
        for name, path in pages.items():
            await page.goto(url + path)
            if name == "session":
                await page.get_by_text("live", exact=True).wait_for()
                await page.locator("details.tool").nth(3).evaluate("e => e.open = true")
                await page.locator("details.tool").nth(3).scroll_into_view_if_needed()
                await page.evaluate("scrollTo(0, 0)")
            file = DIRECTORY / f"{name}-{look}.png"
            if name == "session" and look != "dark":  # all of it: the form at its end is sticky
                height = await page.evaluate("document.documentElement.scrollHeight")
                await page.set_viewport_size({"width": width, "height": height})
            await page.screenshot(path=file)
            await page.set_viewport_size({"width": width, "height": size})
            print(f"{file.relative_to(DIRECTORY.parents[1])}  {file.stat().st_size / 1024:.0f} KB")
        await context.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.browser.screenshots", description=__doc__)
    parser.add_argument("pages", nargs="*")
    arguments = parser.parse_args()
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory, running_server(Path(directory) / "data") as server:
        asyncio.run(_take(server, arguments.pages))


if __name__ == "__main__":
    main()
