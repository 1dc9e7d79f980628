"""The pages that are looked at every morning, in a real browser: what they say, how they are used, how they look."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.web.browser import Served, axe, go, opening, shot


def test_tonight_opens_in_a_browser(page: Page, served: Served) -> None:
    """The front page of a node opens without a complaint of the browser."""
    go(page, "/")
    expect(page.locator("h1")).to_have_text("Tonight")
    axe(page)
    shot(page, "tonight")


@pytest.mark.parametrize(("script", "complaint"), [
    ("console.error('broken')", "console: broken"),
    ("setTimeout(() => { throw new Error('torn'); })", "page error: "),
    ("fetch('http://elsewhere.test/x').catch(() => 0)", "CSP: connect-src refused http://elsewhere.test/x"),
])
def test_no_complaint_of_the_browser_is_overheard(chromium: Browser, served: Served, script: str,
                                                  complaint: str) -> None:
    """An error in a page or a request to another origin fails the test that provoked it."""
    def provoke() -> None:
        with opening(chromium, served) as make:
            page = make()
            go(page, "/")
            page.evaluate(script)
            page.wait_for_timeout(50)

    with pytest.raises(AssertionError, match=re.escape(complaint)):
        provoke()
