"""`make dashboard-figures`: what the pages weigh, and how long until something live is on the screen."""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page
from psycopg import AsyncConnection

from outwake._migrate import migrate
from outwake.telemetry.log import configure
from tests.browser.chromium import chromium
from tests.browser.scene import INIT, make_scene, say
from tests.support.api import Api, serving
from tests.support.database import new_database
from tests.support.manual_worker import ManualWorker
from tests.support.server import running_server, with_database

SAMPLES = 40

# Bytes on the wire, bytes unpacked and requests of a page, and when it was drawn first.
_WEIGHT = """async () => {
  const painted = await new Promise((found) => new PerformanceObserver((list) => {
    const first = list.getEntriesByName("first-contentful-paint")[0];
    if (first) found(first.startTime);
  }).observe({ type: "paint", buffered: true }));
  const all = [...performance.getEntriesByType("navigation"), ...performance.getEntriesByType("resource")];
  const sum = (name) => all.reduce((total, entry) => total + entry[name], 0);
  return [all.length, sum("transferSize"), sum("decodedBodySize"), painted];
}"""

# When a stream said something first, in ms since the page was asked for.
_NOTE_FIRST_EVENT = """
  const add = EventSource.prototype.addEventListener;
  window.firstEvent = new Promise((found) => {
    EventSource.prototype.addEventListener = function (name, listener) {
      add.call(this, name, listener);
      if (name === "status") add.call(this, name, () => found(performance.now()));
    };
  });
"""

# When a text appeared, by the clock that this process reads too.
_APPEARED = """(text) => new Promise((found) => {
  const look = () => document.getElementById("turns").textContent.includes(text) && found(Date.now());
  new MutationObserver(look).observe(document.getElementById("turns"), { childList: true, subtree: true });
  look();
})"""


async def _measure(url: str) -> None:
    await migrate(url)
    async with (
        await AsyncConnection.connect(url, autocommit=True) as conn,
        serving(url) as api,
        chromium() as browser,
    ):
        session = await make_scene(api.client, conn)
        await _weigh(browser, api, session)
    async with (
        await AsyncConnection.connect(url, autocommit=True) as conn,
        serving(url) as api,
        chromium() as browser,
    ):
        await conn.execute("TRUNCATE outbox, session, worker CASCADE")
        await _time(browser, api, conn)


async def _weigh(browser: Browser, api: Api, session: str) -> None:
    print(f"{'page':10} {'first visit':>24} {'later':>12}   first paint")
    paths = {
        "sessions": "/",
        "session": f"/ui/sessions/{session}",
        "new": "/ui/new",
        "outbox": "/ui/outbox",
        "workers": "/ui/workers",
        "dead": "/ui/dead",
    }
    for name, path in paths.items():
        context = await browser.new_context()
        first = await _load(await context.new_page(), api.url + path)
        again = await _load(await context.new_page(), api.url + path)
        requests, wire, size, painted = first
        print(
            f"{name:10} {wire / 1024:7.1f} KB in {requests} requests ({size / 1024:5.1f} KB unpacked)"
            f" {again[1] / 1024:7.1f} KB {painted:8.0f} ms"
        )
        await context.close()


async def _load(page: Page, url: str) -> Any:
    await page.goto(url, wait_until="load")
    return await page.evaluate(_WEIGHT)


async def _time(browser: Browser, api: Api, conn: AsyncConnection[Any]) -> None:
    manual = ManualWorker(conn)
    await manual.register()
    session = await api.create()
    await manual.claim()
    await manual.store(INIT, say("Begun."))
    context = await browser.new_context()
    await context.add_init_script(_NOTE_FIRST_EVENT)
    opened = []
    for _ in range(SAMPLES):
        page = await context.new_page()
        await page.goto(f"{api.url}/ui/sessions/{session['id']}")
        opened.append(float(await page.evaluate("window.firstEvent")))
        await page.close()
    _tell("page asked for -> first live event", opened)

    page = await context.new_page()
    await page.goto(f"{api.url}/ui/sessions/{session['id']}")
    await page.get_by_text("live", exact=True).wait_for()
    shown = []
    for number in range(SAMPLES):
        appeared = asyncio.create_task(page.evaluate(_APPEARED, f"sample {number}."))
        await page.evaluate("1")  # the observer is there
        await manual.store(say(f"sample {number}."))
        committed = time.time() * 1000
        shown.append(await appeared - committed)
        await asyncio.sleep(0.4)  # an agent's pace, not a burst
    _tell("message committed -> on the screen", shown)
    await context.close()


def _tell(what: str, samples: list[float]) -> None:
    ordered = sorted(samples)
    median, high = statistics.median(ordered), ordered[int(len(ordered) * 0.95)]
    print(f"{what}: median {median:.0f} ms, 95% within {high:.0f} ms ({len(ordered)} samples)")


def main() -> None:
    configure(level="error")
    with (
        tempfile.TemporaryDirectory() as directory,
        running_server(Path(directory) / "data") as server,
        new_database(server) as name,
    ):
        asyncio.run(_measure(with_database(server, name)))


if __name__ == "__main__":
    main()
