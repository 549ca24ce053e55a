"""axe-core, the rules of accessibility that tools agree on."""

from importlib import resources

from playwright.async_api import Page

_SOURCE = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()


async def serious_violations(page: Page) -> list[str]:
    """Of the page as it is now: each rule's name and the first element that breaks it."""
    await page.evaluate(_SOURCE)
    found = await page.evaluate("axe.run().then((result) => result.violations)")
    return [
        f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")
    ]
