"""What a person does with sessions, in a browser, with a real API; with a real worker where work is done."""

import re

from playwright.async_api import BrowserContext, Locator, Page, expect

from tests.browser.conftest import TIMEOUT, StartWorker
from tests.browser.scene import returned, say, tool
from tests.support.api import Api
from tests.support.manual_worker import ManualWorker

expect.set_options(timeout=TIMEOUT)


def status(page: Page) -> Locator:
    return page.locator("#session-status")


async def mark(page: Page) -> None:
    """So that a page that was loaded anew is told from one that changed."""
    await page.evaluate("window.marked = true")


async def marked(page: Page) -> bool:
    return bool(await page.evaluate("window.marked === true"))


async def test_a_session_is_created_followed_live_and_followed_up(
    page: Page, start_worker: StartWorker, repository: str
) -> None:
    async with start_worker() as worker:
        await worker.event("parked")
        await page.goto("/")
        await page.get_by_role("link", name="New session").click()
        await page.get_by_label("Repository").fill(repository)
        await page.get_by_label("Prompt").fill("Write a note lines:3")
        await page.get_by_role("button", name="Start session").click()
        await page.wait_for_url(re.compile(r"/ui/sessions/[0-9a-f-]{36}$"))
        await mark(page)
        await expect(page.get_by_role("heading", name="Write a note")).to_be_visible()
        await expect(page.get_by_text("I am a scripted agent")).to_be_visible()
        await expect(page.get_by_text("The agent ended")).to_be_visible()
        await expect(status(page)).to_have_text("completed")
        await expect(page.locator(".turn-end").get_by_text("succeeded")).to_be_visible()
        await expect(page.locator(".commits")).to_contain_text("Note what was asked")

        # A tool call is folded, with its result inside.
        call = page.locator("details.tool").filter(has_text="Bash")
        await expect(call.locator("pre").first).to_be_hidden()
        await call.locator("summary").click()
        await expect(call.get_by_text("git add SCRIPTED_AGENT.md && git commit").last).to_be_visible()
        await expect(call.get_by_label("Result")).to_contain_text("Note what was asked")

        follow_up = page.get_by_label("Follow-up")
        await follow_up.fill("Once more")
        await follow_up.press("Control+Enter")
        await expect(follow_up).to_have_value("")
        await expect(page.locator(".turn")).to_have_count(2)
        await expect(page.locator(".turn-end").nth(1)).to_contain_text("succeeded")
        await expect(status(page)).to_have_text("completed")
        assert await marked(page), "the page was loaded anew"


async def test_a_running_turn_is_cancelled_and_retried(
    page: Page, api: Api, start_worker: StartWorker, repository: str
) -> None:
    async with start_worker() as worker:
        await worker.event("parked")
        session = await api.create(repo=repository, prompt="wait-forever")
        await page.goto(f"/ui/sessions/{session['id']}")
        await mark(page)
        await expect(page.locator(".turn-end")).to_contain_text("running")
        await expect(page.get_by_text("I am a scripted agent")).to_be_visible()
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator(".turn-end")).to_contain_text("cancelled")
        await expect(status(page)).to_have_text("completed")
        await expect(page.get_by_role("button", name="Cancel")).to_have_count(0)

        await page.get_by_role("button", name="Retry").click()
        await expect(page.locator(".turn-end")).to_contain_text("running")
        # What the first attempt said no longer counts.
        await expect(page.get_by_text("Attempt 1 was superseded")).to_be_visible()
        await page.get_by_role("button", name="Cancel").click()
        await expect(page.locator(".turn-end")).to_contain_text("cancelled")
        assert await marked(page), "the page was loaded anew"


async def test_a_tools_result_that_comes_later_is_put_under_its_call(
    page: Page, api: Api, manual: ManualWorker
) -> None:
    session = await api.create()
    await page.goto(f"/ui/sessions/{session['id']}")
    await expect(page.get_by_text("live", exact=True)).to_be_visible()
    await manual.claim()
    await manual.store(tool("a", "Read", file_path="a.py"), tool("b", "Bash", command="make"))
    calls = page.locator("details.tool")
    await expect(calls).to_have_count(2)
    await calls.nth(0).locator("summary").click()
    await manual.store(returned("b", "no rule", error=True), returned("a", "print(1)"))
    await expect(calls.nth(0).get_by_label("Result")).to_have_text("print(1)")
    await expect(calls.nth(1).get_by_label("Result")).to_have_text("no rule")
    await expect(calls.nth(1).locator(".returned")).to_have_class(re.compile("failed"))
    assert await calls.nth(0).get_attribute("open") is not None, "what was open was closed"
    # The same after a reload, made by the server.
    await page.reload()
    await expect(calls.nth(0).locator(".returned pre")).to_have_text("print(1)")


async def test_every_message_is_shown_once_and_in_order(page: Page, api: Api, manual: ManualWorker) -> None:
    session = await api.create()
    await page.goto(f"/ui/sessions/{session['id']}")
    await manual.claim()
    for start in range(0, 700, 70):  # more than one answer to the script holds
        await manual.store(*(say(f"word {number}") for number in range(start, start + 70)))
    await expect(page.locator(".message")).to_have_count(700)
    shown = await page.locator(".message").all_inner_texts()
    assert [text.strip() for text in shown] == [f"word {number}" for number in range(700)]


async def test_what_came_while_the_stream_was_down_is_shown(
    page: Page, api: Api, manual: ManualWorker
) -> None:
    session = await api.create()
    await page.goto(f"/ui/sessions/{session['id']}")
    await manual.claim()
    await manual.store(say("Before."))
    await expect(page.get_by_text("Before.")).to_be_visible()
    for streams in list(api.context.hub._streams.values()):
        for stream in list(streams):
            stream.end()  # as when the API is started anew: the browser comes back by itself
    await manual.store(tool("a", "Read", file_path="a.py"))
    await manual.store(returned("a", "meanwhile"))
    await expect(page.locator("details.tool .returned pre")).to_have_text("meanwhile")
    await manual.store(say("After."))
    await expect(page.get_by_text("After.")).to_be_visible()
    assert await page.locator(".message:visible").count() == 3


async def test_the_list_shows_what_happens(page: Page, api: Api, manual: ManualWorker) -> None:
    session = await api.create(title="The one")
    await page.goto("/")
    await mark(page)
    badge = page.get_by_role("listitem").filter(has_text="The one").locator(".state")
    await expect(badge).to_have_text("active")
    await manual.claim()
    await expect(badge).to_have_text("pending")
    await manual.complete()
    await expect(badge).to_have_text("completed")
    assert await marked(page), "the page was loaded anew"
    await page.get_by_role("link", name="The one").click()
    await page.wait_for_url(f"**/ui/sessions/{session['id']}")


async def test_a_session_is_renamed_and_archived(page: Page, api: Api) -> None:
    session = await api.create()
    await page.goto(f"/ui/sessions/{session['id']}")
    await page.locator("summary", has_text="Rename").click()
    await page.get_by_label("Title").fill("Another name")
    await page.get_by_role("button", name="Rename").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Another name")
    await page.locator("summary", has_text="Archive").click()
    await page.get_by_role("button", name="Archive session").click()
    await expect(page.get_by_text("it can only be read")).to_be_visible()
    await expect(status(page)).to_have_text("archived")
    await expect(page.get_by_label("Follow-up")).to_have_count(0)


async def test_the_keyboard_is_enough(page: Page, api: Api) -> None:
    await page.goto("/")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="New session")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="New session")).to_be_visible()
    await page.get_by_label("Repository").focus()
    await page.keyboard.type("octo/tools")
    await page.keyboard.press("Tab")
    await expect(page.get_by_label("Target branch")).to_be_focused()
    await page.keyboard.press("Tab")
    await page.keyboard.type("By keyboard")
    await page.keyboard.press("Control+Enter")
    await page.wait_for_url(re.compile(r"/ui/sessions/[0-9a-f-]{36}$"))
    cancel = page.get_by_role("button", name="Cancel")
    for _ in range(15):
        await page.keyboard.press("Tab")
        if await cancel.evaluate("e => e === document.activeElement"):
            break
    await expect(cancel).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator(".turn-end")).to_contain_text("cancelled")
    archive = page.locator("summary", has_text="Archive")
    await archive.focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Archive session")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Archive session")).to_be_hidden()
    await expect(archive).to_be_focused()


async def test_what_is_typed_survives_what_happens(page: Page, api: Api, manual: ManualWorker) -> None:
    session = await api.create()
    await page.goto(f"/ui/sessions/{session['id']}")
    await page.get_by_label("Follow-up").fill("half a thou")
    await manual.claim()
    await manual.store(say("Working."))
    await manual.complete()
    await expect(status(page)).to_have_text("completed")
    await page.get_by_label("Follow-up").press_sequentially("ght")
    await expect(page.get_by_label("Follow-up")).to_have_value("half a thought")


async def test_a_wrong_form_keeps_what_was_given(page: Page, tolerated: set[str]) -> None:
    tolerated.add("status of 422")
    await page.goto("/ui/new")
    await page.get_by_label("Repository").fill("octo/tools")
    await page.get_by_label("Prompt").fill("two\nlines")
    await page.locator("summary", has_text="More").click()
    await page.get_by_label("Title").fill("T")
    await page.get_by_label("Work branch").fill("so wrong..")
    async with page.expect_response("**/ui/sessions") as answer:
        await page.get_by_role("button", name="Start session").click()
    assert (await answer.value).status == 422
    await expect(page.get_by_role("alert").filter(has_text="not created")).to_be_visible()
    await expect(page.get_by_label("Work branch")).to_have_attribute("aria-invalid", "true")
    await expect(page.get_by_label("Prompt")).to_have_value("two\nlines")


async def test_pages_work_without_script(context: BrowserContext, api: Api, manual: ManualWorker) -> None:
    browser = context.browser
    assert browser is not None
    plain = await browser.new_context(base_url=api.url, java_script_enabled=False)
    page = await plain.new_page()
    await page.goto("/ui/new")
    await page.get_by_label("Repository").fill("octo/tools")
    await page.get_by_label("Prompt").fill("Do it")
    await page.get_by_role("button", name="Start session").click()
    await manual.claim()
    await manual.store(say("Words without script."))
    await page.reload()
    await expect(page.get_by_text("Words without script.")).to_be_visible()
    await page.get_by_role("button", name="Cancel").click()
    await expect(page.get_by_text("its worker stops it")).to_be_visible()
    await page.get_by_label("Follow-up").fill("And more")
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator(".turn")).to_have_count(2)
    await page.get_by_role("button", name="Colours: auto. Change to dark.").click()
    await expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    await plain.close()
