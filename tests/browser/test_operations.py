"""What an operator sees and does: the outbox, workers, dead rows; and what holds for every page."""

import re

import pytest
from playwright.async_api import Browser, Page, expect

from tests.browser.axe import serious_violations
from tests.browser.conftest import TIMEOUT, StartWorker
from tests.browser.scene import make_scene
from tests.conftest import Connect
from tests.support.api import Api
from tests.support.manual_worker import ManualWorker

expect.set_options(timeout=TIMEOUT)

PAGES = ["/", "/ui/new", "/ui/outbox", "/ui/workers", "/ui/dead"]


async def test_a_dead_row_is_retried_and_another_discarded(
    page: Page, api: Api, manual: ManualWorker, start_worker: StartWorker, repository: str
) -> None:
    first = await api.create(repo=repository, title="First")
    for _ in range(2):
        await manual.claim()
        await manual.fail("no such host: git.example", permanent=True)
        await api.create(repo=repository, title="Second")
    await page.goto("/ui/dead")
    rows = page.locator("li.dead")
    await expect(rows).to_have_count(2)
    await expect(rows.first).to_contain_text("no such host: git.example")
    await expect(page.get_by_role("navigation", name="Main").get_by_text("2")).to_be_visible()
    async with start_worker():
        await page.get_by_role("button", name="Retry row 1").click()
        await expect(rows).to_have_count(1)
        await page.locator("summary", has_text="Discard").click()
        await page.get_by_role("button", name="Discard row").click()
        await expect(page.get_by_text("No row is dead.")).to_be_visible()
        await page.goto(f"/ui/sessions/{first['id']}")
        await expect(page.locator(".turn-end")).to_contain_text("succeeded")


async def test_without_a_worker_every_page_says_so(
    page: Page, api: Api, start_worker: StartWorker, connect: Connect
) -> None:
    """The failure this project was made for: the API runs, nobody works, and it shows."""
    session = await api.create()
    for path in [*PAGES, f"/ui/sessions/{session['id']}"]:
        await page.goto(path)
        await expect(page.locator("#banner")).to_contain_text("No worker is present.")
    # And at the session itself, why.
    await expect(page.locator(".turn-end")).to_contain_text("no worker")
    await page.goto("/")
    await expect(page.get_by_role("listitem").locator(".state")).to_have_text("active")
    async with start_worker() as worker:
        await worker.event("parked")
        # The page asks again every ten seconds; the test does not wait that long.
        await expect(page.locator("#banner")).to_be_empty()


async def test_workers_and_what_they_run(page: Page, api: Api, manual: ManualWorker) -> None:
    await api.create(title="Long work")
    await manual.claim()
    await page.goto("/ui/workers")
    card = page.get_by_role("listitem").filter(has_text="test:1").first
    await expect(card).to_contain_text("busy")
    await expect(card).to_contain_text("1 of 1 slots")
    await card.get_by_role("link", name="Long work").click()
    await expect(page.get_by_role("heading", name="Long work")).to_be_visible()


async def test_the_outbox_by_state_and_a_row(page: Page, api: Api, manual: ManualWorker) -> None:
    for number in range(3):
        await api.create(title=f"Session {number}")
    await manual.claim()
    await manual.complete()
    await manual.claim()
    await page.goto("/ui/outbox")
    await expect(page.locator("figure")).to_have_count(3)
    await expect(page.get_by_role("img", name=re.compile("Finished.*1 done"))).to_be_visible()
    await expect(page.get_by_role("row", name=re.compile("session.run"))).to_contain_text("1")
    await expect(page.locator("li.row")).to_contain_text(["workers busy"])
    for state, count in (("running", 1), ("done", 1), ("cancelled", 0), ("ready", 1)):
        await page.get_by_role("navigation", name="State").get_by_role("link", name=state).click()
        await expect(page.locator("li.row")).to_have_count(count)
    await page.locator("li.row a.title").click()
    await expect(page.get_by_role("heading", level=1)).to_contain_text("Row 3")
    await expect(page.locator(".history")).to_contain_text("workers busy")
    await page.locator("summary", has_text="Cancel").click()
    await page.get_by_role("button", name="Cancel row").click()
    await expect(page.locator(".where")).to_contain_text("cancelled")


async def test_an_action_that_came_too_late_says_so(
    page: Page, api: Api, manual: ManualWorker, tolerated: set[str]
) -> None:
    tolerated.add("status of 409")
    await api.create()
    await manual.claim()
    await manual.fail("no", permanent=True)
    await page.goto("/ui/dead")
    await api.client.post("/outbox/1/retry")
    await page.locator("summary", has_text="Discard").click()
    await page.get_by_role("button", name="Discard row").click()
    await expect(page.locator("#notice")).to_contain_text("cannot take this: discard")


@pytest.mark.parametrize("look", ["light", "dark", "narrow"])
async def test_pages_are_accessible_and_fit(look: str, browser: Browser, api: Api, connect: Connect) -> None:
    session = await make_scene(api.client, await connect())
    context = await browser.new_context(
        base_url=api.url,
        color_scheme="dark" if look == "dark" else "light",
        viewport={"width": 360 if look == "narrow" else 1180, "height": 720},
        reduced_motion="reduce",
    )
    page = await context.new_page()
    try:
        for path in [
            *PAGES,
            f"/ui/sessions/{session}",
            "/ui/outbox/1",
            "/ui/outbox?state=done",
            "/ui/nothing",
        ]:
            await page.goto(path)
            await page.evaluate(
                "document.querySelectorAll('.fold, .attempt').forEach((e) => (e.open = true))"
            )
            width = await page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert width <= 0, f"{path} is {width} pixels too wide"
            assert not await serious_violations(page), path
    finally:
        await context.close()
