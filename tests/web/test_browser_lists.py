"""The pages that are looked at every morning, in a real browser: what they say, how they are used, how they look."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from dicomnode import reconcile
from dicomnode.troubles import Machine
from dicomnode.web import overview
from tests.web.browser import DESK, PHONE, OpenPage, Served, axe, fits, go, opening, serve, shot
from tests.web.nodes import NOW, ROUTE, TOML

PAGES = {"tonight": "/", "studies": "/studies", "nothing-found": "/studies?q=NOPE&state=held", "nights": "/nights",
         "night": "/nights/2026-09-23", "alerts": "/alerts", "node": "/node"}


@pytest.fixture
def reported(served: Served) -> Served:
    """The node with the reconciliation of the night written."""
    site = served.app.state.site
    report = reconcile.report(site.ledger, site.config, day=date(2026, 9, 23), now=served.now)
    reconcile.write(report, site.config.node.data_dir)
    return served


def _job(served: Served, state: str) -> int:
    assert served.node is not None
    return int(served.ledger.jobs_of_series(served.node.series[state])[-1]["id"])


def _refresh(page: Page) -> None:
    """What the page does by itself every few seconds, now."""
    with page.expect_response(lambda answer: answer.url.endswith(("/tonight", "/alerts/now"))):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


# --- all of them


@pytest.mark.parametrize(("size", "dark", "rules"), [
    (DESK, False, ()), (DESK, True, ("color-contrast",)), (PHONE, False, ("scrollable-region-focusable",))],
    ids=["light", "dark", "phone"])
def test_every_page_is_legible_for_all(open_page: OpenPage, reported: Served, size: tuple[int, int], dark: bool,
                                       rules: tuple[str, ...]) -> None:
    """Light, dark and on a phone: axe-core finds nothing, the body never scrolls sideways, no complaint."""
    page = open_page(size, dark=dark)
    for name, path in PAGES.items():
        go(page, path)
        axe(page, *rules)
        fits(page)
        shot(page, f"{name}{'-dark' if dark else '-phone' if size == PHONE else ''}")


@pytest.mark.parametrize(("script", "complaint"), [
    ("console.error('broken')", "console: broken"),
    ("setTimeout(() => { throw new Error('torn'); })", "page error: "),
    ("fetch('http://elsewhere.test/x').catch(() => 0)", "http://elsewhere.test/x"),
    ("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')", "CSP: script-src"),
], ids=["console", "error", "origin", "policy"])
def test_no_complaint_of_the_browser_is_overheard(chromium: Browser, served: Served, script: str,
                                                  complaint: str) -> None:
    """An error in a page, a request to another origin or a breach of the policy fails the test that provoked it."""
    def provoke() -> None:
        with opening(chromium, served) as make:
            page = make()
            go(page, "/")
            page.evaluate(script)
            page.wait_for_timeout(80)

    with pytest.raises(AssertionError, match=re.escape(complaint)):
        provoke()


# --- tonight


def test_tonight_tells_in_one_look_what_matters(page: Page, served: Served) -> None:
    """What waits for a person has reason, remedy and a link; what runs its stage; what waits its forecast."""
    assert served.node is not None
    go(page, "/")
    held = page.get_by_role("region", name="For a person")
    expect(held).to_contain_text("the result is not safe: kernel-maximum 0.31 > 0.25")
    expect(held).to_contain_text("try another preset, method or setting")
    expect(held.get_by_role("link", name="ACC11")).to_have_attribute("href", f"/studies/{served.node.studies['held']}")
    runs = page.get_by_role("region", name="Runs now")
    expect(runs).to_contain_text("main step 120 of 400")
    expect(runs.get_by_role("progressbar")).to_have_attribute("value", "120")
    queue = page.get_by_role("region", name="Queue").first
    expect(queue.get_by_role("row", name="ACC14")).to_contain_text("fits tonight")
    expect(queue.get_by_role("row", name="ACC12")).to_contain_text("failed, tried again")
    expect(page.get_by_role("region", name="Coming in")).to_contain_text("waits until 24 Sep 20:51")
    expect(page.get_by_role("region", name="Delivered")).to_contain_text("PHANTOM")
    expect(page.get_by_role("region", name="The night")).to_contain_text("times of Europe/Berlin")
    expect(page.locator("#summary")).to_have_text("1 running, 2 queued, 1 for a person, 1 delivered in 24 h")


def test_tonight_follows_the_ledger_by_itself(page: Page, served: Served) -> None:
    """A step of progress and a study that is held show without anybody loading the page again."""
    go(page, "/")
    job = _job(served, "running")
    served.now += 2  # what viewers share is a second old at most
    served.ledger.renew(job, "here:1:cpu", now=served.now, lease_s=9e6,
                        progress={"stage": "main", "step": 300, "steps": 400, "loss": 0.001})
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "300")
    served.ledger.set_job(job, "held", now=served.now, code="gate", reason="it drifted. Remedy: look at it")
    _refresh(page)
    expect(page.get_by_role("region", name="For a person")).to_contain_text("it drifted")
    expect(page.locator("#summary")).to_have_text("0 running, 2 queued, 2 for a person, 1 delivered in 24 h")


def test_what_follows_disturbs_nobody(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The focus stays where it is when something changes, and what did not change is not put in again."""
    monkeypatch.setattr(overview.machine, "look", lambda *_, **__: Machine(free_bytes=10**12))
    go(page, "/")
    _refresh(page)
    page.locator("#held-" + served.node.series["held"][-12:]).focus()  # type: ignore[union-attr]
    page.evaluate("document.querySelector('#h-runs').dataset.mark = 'here'")
    _refresh(page)
    _refresh(page)
    expect(page.locator("#h-runs")).to_have_attribute("data-mark", "here")
    served.now += 2
    served.ledger.renew(_job(served, "running"), "here:1:cpu", now=served.now, lease_s=9e6,
                        progress={"stage": "main", "step": 301, "steps": 400})
    _refresh(page)
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "301")
    expect(page.get_by_role("link", name="ACC11")).to_be_focused()


def test_whoever_is_logged_out_meanwhile_is_asked_to_log_in(page: Page) -> None:
    """A page that follows by itself leads to the login when the session is over; it never shows a page in a page."""
    go(page, "/")
    page.context.clear_cookies()
    page.forgiven.append("401")  # type: ignore[attr-defined]
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page).to_have_url(re.compile("/login"))
    expect(page.get_by_label("Token")).to_be_visible()


# --- studies


def test_a_study_is_found_by_accession_number_and_the_address_holds_the_search(page: Page, served: Served) -> None:
    """Whoever gets the address sees the same; the state narrows it; "/" leads to the search."""
    assert served.node is not None
    go(page, "/studies")
    expect(page.locator("tbody tr")).to_have_count(7)
    page.keyboard.press("/")
    expect(page.locator("#q")).to_be_focused()
    page.keyboard.type("ACC1")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"\?q=ACC1&"))
    expect(page.locator("tbody tr")).to_have_count(4)
    page.get_by_label("State").select_option("held")
    page.get_by_role("button", name="Search").click()
    expect(page).to_have_url(re.compile("state=held"))
    expect(page.locator("tbody a.open")).to_have_text(["ACC11"])
    expect(page.locator("#q")).to_have_value("ACC1")
    go(page, f"/studies?q={served.node.series['delivered']}")
    expect(page.locator("tbody a.open")).to_have_text(["PHANTOM"])


def test_the_list_is_walked_by_keys(page: Page, served: Served) -> None:
    """j, k and the arrows move from study to study, Enter opens the one that has the focus."""
    assert served.node is not None
    go(page, "/studies")
    rows = page.locator("tbody a.open")
    for key, at in (("j", 0), ("j", 1), ("ArrowDown", 2), ("k", 1), ("ArrowUp", 0), ("k", 0)):
        page.keyboard.press(key)
        expect(rows.nth(at)).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(re.escape(served.node.studies["waiting"]) + "$"))


def test_an_empty_result_says_what_was_looked_for(page: Page) -> None:
    """It names every condition and offers the search without each; a day that is none is explained."""
    go(page, "/studies?q=NOPE&state=held&from=2026-09-01")
    main = page.locator("main")
    expect(main).to_contain_text("begins with NOPE in state held, received from 2026-09-01")
    page.get_by_role("link", name="without the text").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.forgiven.append("400")  # type: ignore[attr-defined]
    go(page, "/studies?from=yesterday", status=400)
    expect(page.get_by_role("alert")).to_contain_text("write it as 2026-09-23")


def test_a_uid_is_copied_by_its_button(page: Page, served: Served) -> None:
    """The whole UID is in the clipboard, though only its end is shown."""
    assert served.node is not None
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    go(page, f"/studies?q={served.node.studies['held']}")
    page.get_by_role("button", name="Copy Study Instance UID").click()
    expect(page.locator("button.copied")).to_have_count(1)
    assert page.evaluate("navigator.clipboard.readText()") == served.node.studies["held"]


def test_ten_thousand_studies_are_leafed_through(chromium: Browser, crowded_data: Path) -> None:
    """Older and Newest lead through the list; no study is shown twice."""
    toml = (f'[node]\ndata_dir = "{crowded_data}"\n{TOML}[[peer]]\nname = "PACS"\nae_title = "PACS"\n'
            f'host = "127.0.0.1"\nport = 1\n{ROUTE.format(method="nbd", preset="best", also="")}')
    with serve(toml, now=NOW) as served, opening(chromium, served) as make:
        page = make()
        go(page, "/studies?state=delivered")
        seen = page.locator("tbody a.open").all_text_contents()
        for _ in range(2):
            page.get_by_role("link", name="Older").click()
            expect(page.locator("tbody a.open").first).not_to_have_text(seen[-50])
            seen += page.locator("tbody a.open").all_text_contents()
        assert len(seen) == len(set(seen)) == 150
        assert seen == sorted(seen, reverse=True)
        page.get_by_role("link", name="Newest").click()
        expect(page.locator("tbody a.open").first).to_have_text(seen[0])
        shot(page, "studies-ten-thousand", whole=False)


# --- nights, alerts, node


def test_a_night_names_what_is_missing_and_why(page: Page, reported: Served) -> None:
    """The list counts; one night's page gives the reason of each study that is not done and leads to it."""
    assert reported.node is not None
    go(page, "/nights")
    row = page.get_by_role("row", name="Wed 23 Sep 2026")
    expect(row).to_contain_text("5 studies not done")
    row.get_by_role("link").click()
    expect(page.locator("h1")).to_have_text("Wed 23 Sep 2026")
    held = page.get_by_role("row", name="ACC11")
    expect(held).to_contain_text("job 2 is held: the result is not safe")
    expect(held.get_by_role("link")).to_have_attribute("href", f"/studies/{reported.node.studies['held']}")


def test_alerts_come_and_go_by_themselves(page: Page, served: Served) -> None:
    """What is held is a problem with a link to its study; when it is cancelled, nothing is wrong any more."""
    go(page, "/alerts")
    now = page.get_by_role("region", name="Now")
    expect(now).to_contain_text("job 2 held (gate): accession ACC11")
    expect(page.locator("#summary")).to_have_text("1 problem, 0 warnings")
    served.ledger.set_job(_job(served, "held"), "cancelled", now=served.now)
    _refresh(page)
    expect(now).to_contain_text("Nothing is wrong.")
    expect(page.locator("#summary")).to_have_text("nothing is wrong")


def test_the_node_shows_its_peers_and_what_is_configured_but_no_secret(page: Page, served: Served) -> None:
    """Peers with their last delivery, routes, the PSF library, and keys that differ from the default."""
    go(page, "/node")
    expect(page.get_by_role("row", name="ARCHIVE ARCHIVE")).to_contain_text("20:48")
    expect(page.get_by_role("row", name="psma")).to_contain_text("Modality = PT")
    expect(page.get_by_role("region", name="PSF library").first).to_contain_text("DICOMNODE SYNTHETIC PHANTOM")
    expect(page.locator(".own").get_by_text("Europe/Berlin")).to_be_visible()
    assert served.token not in page.content()


def test_the_api_page_reads_on_a_phone(open_page: OpenPage) -> None:
    """Nothing is cut off at its right: what a request answers stands below it."""
    page = open_page(PHONE)
    go(page, "/api/docs")
    fits(page)
    assert page.evaluate("[...document.querySelectorAll('.table')].every(one => one.scrollWidth <= one.clientWidth)")
    axe(page)


def test_a_reason_with_a_long_path_stays_on_a_phone(open_page: OpenPage, served: Served) -> None:
    """Reasons name files, and a path has no blank at which a line could break."""
    served.ledger.query("UPDATE job SET reason = ? WHERE state = 'held'",
                        (f"/var/lib/{'dicomnode/' * 30} is gone. Remedy: look at /{'derived/' * 30}",))
    page = open_page(PHONE)
    for path in ("/", "/studies", "/alerts"):
        go(page, path)
        fits(page)
