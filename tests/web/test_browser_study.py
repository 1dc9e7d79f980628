"""The study page in a real browser: pictures, slices, keys, live progress, actions; readable by all, on a phone too."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.web.browser import PHONE, OpenPage, Served, axe, fits, go, shot


def study(served: Served, state: str) -> str:
    assert served.node is not None
    return f"/studies/{served.node.studies[state]}"


def opened(page: Page, served: Served, state: str = "delivered") -> None:
    go(page, study(served, state))
    if page.locator("#viewer").count():
        page.wait_for_selector("[data-viewer][data-ready]")


def hrefs(page: Page, which: str) -> list[str]:
    return [str(one.get_attribute("href")) for one in page.locator(which).all()]


@pytest.mark.parametrize(("state", "dark"), [("delivered", False), ("delivered", True), ("held", True),
                                             ("running", False)])
def test_the_page_is_readable_by_all(open_page: OpenPage, served: Served, state: str, dark: bool):
    """WCAG 2.1 AA, light and dark."""
    page = open_page(dark=dark)
    opened(page, served, state)
    axe(page)
    shot(page, f"study-{state}{'-dark' if dark else ''}")


def test_the_page_fits_a_phone(open_page: OpenPage, served: Served):
    """No scrolling sideways; the viewer works by its sliders."""
    page = open_page(PHONE)
    opened(page, served)
    fits(page)
    axe(page)
    page.locator("[data-slice]").fill("3")
    expect(page.locator("[data-slice-said]")).to_contain_text("4 of 32")
    shot(page, "study-phone")
    page = open_page(PHONE)
    opened(page, served, "held")
    fits(page)


def test_one_key_swaps_before_and_after(page: Page, served: Served):
    """B and the space bar, as the button does; in all pictures at once."""
    opened(page, served)
    before, after = (page.locator(f"#pictures .half.{when}").first for when in ("before", "after"))
    expect(before).to_be_visible()
    expect(after).to_be_visible()
    page.keyboard.press("b")
    expect(before).to_be_visible()
    expect(after).to_be_hidden()
    page.keyboard.press("Space")
    expect(before).to_be_hidden()
    expect(after).to_be_visible()
    page.get_by_role("button", name=re.compile("Swap")).click()
    expect(before).to_be_visible()
    page.get_by_text("Side by side").click()
    expect(after).to_be_visible()


def test_keys_of_one_letter_can_be_switched_off(page: Page, served: Served):
    """The list of keys says so, and it is remembered."""
    opened(page, served)
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.locator("#keys-on").uncheck()
    page.get_by_role("button", name="Close").click()
    page.keyboard.press("b")
    expect(page.locator("#pictures .half.after").first).to_be_visible()
    page.reload()
    page.keyboard.press("b")
    expect(page.locator("#pictures .half.after").first).to_be_visible()


def test_one_scale_and_palette_move_all_pictures(page: Page, served: Served):
    """Before and after never have different ends of the scale; the bar says the new one."""
    opened(page, served)
    page.locator("#pictures input.top").fill("4")
    page.locator("#pictures input.top").press("Enter")
    page.locator("#pictures select").select_option("hot")
    images = "#pictures .half image"
    expect(page.locator(images).last).to_have_attribute("href", re.compile("top=4&palette=hot"))
    expect(page.locator(images).first).to_have_attribute("href", re.compile("top=4&palette=hot"))
    assert len(hrefs(page, images)) == 8
    expect(page.locator("[data-scale=hot] .tick").last).to_have_text("4")


def test_the_patient_turns_by_hand_where_motion_is_not_wanted(page: Page, served: Served):
    """With prefers-reduced-motion there is no play button; the slider turns both."""
    opened(page, served)
    expect(page.locator("[data-play]")).to_be_hidden()
    page.locator(".turner input").fill("6")
    for when in ("before", "after"):
        expect(page.locator(f".half.{when} image[data-src*='/turn/']")).to_have_attribute(
            "href", re.compile(f"/turn/{when}/6.png"))


def test_the_patient_turns_by_itself_when_asked(open_page: OpenPage, served: Served):
    """Play, and stop."""
    page = open_page()
    page.emulate_media(reduced_motion="no-preference")
    opened(page, served)
    page.locator("[data-play]").click()
    expect(page.locator("[data-play]")).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".turner input")).not_to_have_value(re.compile("^[0-2]$"))
    page.keyboard.press("p")
    expect(page.locator("[data-play]")).to_have_attribute("aria-pressed", "false")


def test_slices_by_slider_keys_and_wheel(page: Page, served: Served):
    """Each way leads to a slice of both grids at the same place."""
    opened(page, served)
    stage, said = page.locator("[data-stage]"), page.locator("[data-slice-said]")
    page.locator("[data-slice]").fill("9")
    expect(said).to_contain_text("10 of 32, z =")
    expect(stage.locator("image[data-when=after]")).to_have_attribute("href", re.compile("/slice/after/axial/9.png"))
    expect(stage.locator("image[data-when=before]")).to_have_attribute("href", re.compile("/slice/before/axial/8.png"))
    stage.focus()
    page.keyboard.press("ArrowUp")
    expect(said).to_contain_text("11 of 32")
    page.keyboard.press("2")
    expect(stage.locator("image[data-when=after]")).to_have_attribute("href", re.compile("/slice/after/coronal/"))
    page.keyboard.press("1")
    stage.hover()
    page.mouse.wheel(0, 100)
    expect(said).to_contain_text("12 of 32")


def test_the_divider_by_mouse_keys_and_slider(page: Page, served: Served):
    """What lies left of it is before."""
    opened(page, served)
    stage, split = page.locator("[data-stage]"), page.locator("[data-split]")
    stage.focus()
    page.keyboard.press("ArrowRight")
    expect(split).to_have_value("55")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    assert box is not None
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] - 100, middle[1], steps=4)
    page.mouse.up()
    assert 10 < float(split.input_value()) < 50
    split.fill("100")
    expect(page.locator("[data-split-said]")).to_have_text("all before")


def test_the_value_under_the_pointer_is_the_voxels(page: Page, served: Served):
    """The readout at a place of the image is what the node says of that place in mm."""
    opened(page, served)
    page.locator("[data-stage]").scroll_into_view_if_needed()
    place = page.evaluate("""() => {
        const stage = document.querySelector('[data-stage]');
        const point = new DOMPoint(58.7 + 1.365, 16.2 + 1.365).matrixTransform(stage.getScreenCTM());
        return [point.x, point.y];
    }""")
    page.mouse.move(*place)
    readout = page.locator("#readout")
    expect(readout).to_contain_text("after")
    expect(readout).to_contain_text(re.compile(r"place L 58\.\d, P 16\.\d"))
    shown = float(re.search(r"after ([\d.]+) SUVbw", readout.inner_text()).group(1))  # type: ignore[union-attr]
    x, y, z = (float(one) for one in re.search(  # type: ignore[union-attr]
        r"L ([\d.]+), P ([\d.]+), H ([\d.]+)", readout.inner_text()).groups())
    assert served.node is not None
    told = page.request.get(f"{study(served, 'delivered')}/jobs/{served.node.job}/value?x={x}&y={y}&z={z}").json()
    assert told["after"]["value"] == pytest.approx(shown, rel=1e-3)


def test_a_region_leads_to_its_slice(page: Page, served: Served):
    """A click on its name marks the place in all planes."""
    opened(page, served)
    page.locator("[data-slice]").fill("0")
    page.locator("[data-place]").nth(2).click()
    expect(page.locator("[data-slice-said]")).to_contain_text(re.compile("1[5-7] of 32"))
    assert page.locator(".cross").get_attribute("d")
    expect(page.locator("#readout")).to_contain_text("after")


def test_an_action_asks_acts_once_and_tells(page: Page, served: Served):
    """The dialog says what will happen; Escape does nothing; yes acts, and the page says it and who did it."""
    opened(page, served, "held")
    page.get_by_role("button", name="Retry…").click()
    dialog = page.locator("#ask")
    expect(dialog).to_contain_text("The job is queued again")
    axe(page)
    shot(page, "study-action", whole=False)
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(page.locator("#study")).to_have_attribute("data-state", "held")
    page.get_by_role("button", name="Retry…").press("Enter")
    page.get_by_role("button", name="Yes, retry").dblclick()
    expect(page.locator("#study")).to_have_attribute("data-state", "queued")
    expect(page.locator(".done")).to_have_text("It is tried again.")
    assert served.node is not None
    told = [event for event in served.ledger.events(study_uid=served.node.studies["held"]) if "web:" in event["actor"]]
    assert len(told) == 1


def test_a_stale_dialog_is_refused_in_words(page: Page, served: Served):
    """What happened meanwhile stands in the dialog; nothing was done."""
    opened(page, served, "running")
    page.get_by_role("button", name="Hold…").click()
    expect(page.locator("#ask")).to_contain_text("stops here")
    assert served.node is not None
    job = served.ledger.jobs_of_series(served.node.series["running"])[-1]
    served.ledger.set_job(job["id"], "cancelled", now=served.now, reason="", actor="anna")
    page.get_by_role("button", name="Yes, hold").click()
    expect(page.locator("#ask")).to_contain_text("cancelled, by anna")
    page.get_by_role("link", name="Look at it").click()
    expect(page.locator("#study")).to_have_attribute("data-state", "cancelled")


def test_a_running_job_is_followed(page: Page, served: Served):
    """Progress and change of state come by themselves, and are said aloud."""
    opened(page, served, "running")
    expect(page.locator("#live")).to_contain_text("step 120 of 400")
    assert served.node is not None
    job = served.ledger.jobs_of_series(served.node.series["running"])[-1]
    served.ledger.renew(job["id"], job["lease_owner"], now=served.now, lease_s=9e6,
                        progress={"stage": "main", "step": 300, "steps": 400, "loss": 0.001})
    expect(page.locator("#live")).to_contain_text("step 300 of 400")
    served.ledger.set_job(job["id"], "held", now=served.now, code="gate", reason="too sharp. Remedy: look at it")
    expect(page.locator("#study")).to_have_attribute("data-state", "held")
    expect(page.locator(".why")).to_contain_text("Look at it")
    expect(page.locator("#spoken")).to_have_text("The study is now held.")
    assert page.locator("#live").get_attribute("hx-trigger") is None


def test_actions_work_without_javascript(open_page: OpenPage, served: Served):
    """The button leads to a page that asks, its form acts."""
    page = open_page()
    context = page.context.browser.new_context(  # type: ignore[union-attr]
        base_url=served.url, java_script_enabled=False,
        extra_http_headers={"Authorization": f"Bearer {served.token}"})
    plain = context.new_page()
    try:
        go(plain, study(served, "held"))
        plain.locator(".actions a").first.click()
        plain.get_by_role("button", name="Yes, retry").click()
        expect(plain.locator("#study")).to_have_attribute("data-state", "queued")
    finally:
        context.close()
