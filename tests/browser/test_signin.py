"""Signing in at an issuer, in a browser that enforces cookies and the pages' policy."""

from playwright.async_api import Browser, expect

from tests.browser.axe import serious_violations
from tests.browser.conftest import TIMEOUT
from tests.support.api import serving
from tests.support.browser_issuer import sign_in_issuer

expect.set_options(timeout=TIMEOUT)


async def test_a_person_signs_in_works_and_signs_out(browser: Browser, database: str) -> None:
    async with sign_in_issuer() as issuer, serving(database, OUTWAKE_OIDC_ISSUER=issuer.url) as api:
        context = await browser.new_context(base_url=api.url)
        context.set_default_timeout(TIMEOUT)
        wrong: list[str] = []
        context.on("console", lambda message: wrong.append(message.text))
        page = await context.new_page()
        await page.goto("/ui/new")
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert not await serious_violations(page)
        await page.get_by_role("link", name="Sign in at").click()
        await expect(page.get_by_role("heading", name="New session")).to_be_visible()
        await page.get_by_label("Repository").fill("octo/tools")
        await page.get_by_role("button", name="Start session").click()
        # The stream takes the cookie too.
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator("#session-status")).to_have_text("completed")
        await expect(page.get_by_role("link", name="Outbox")).to_have_count(0)
        await page.get_by_role("button", name="Sign out").click()
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        await page.goto("/")
        await expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert not wrong
        await context.close()
