"""A real browser on the real pages: Chromium, driven by playwright, on a server in a thread.

Fixtures (tests/web/conftest.py makes them known):

    served     the application over `node` (a copy of the furnished node), on a free port of the loopback; its clock is
               `served.now`, to be moved at will
    open_page  makes logged-in pages: open_page(), open_page(PHONE), open_page(dark=True), open_page(token=VIEWER'S);
               token="" does not log in
    page       open_page()

A test fails on any console error, page error, violation of the Content-Security-Policy or request to another origin.
What a test provokes on purpose it names: `page.forgiven.append("404")`. All tests share one browser; it is gone before
tests outside of this folder run, for the event loop of playwright lies in the main thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from dicomnode.config import parse
from dicomnode.ledger import Ledger
from dicomnode.web.access import operator_token
from dicomnode.web.app import create
from tests.web.nodes import Furnished

__all__ = ["DESK", "PHONE", "OpenPage", "Served", "axe", "chromium", "fits", "go", "open_page", "page", "serve",
           "served", "shot"]

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
DESK, PHONE = (1280, 800), (390, 844)
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
REPORT_VIOLATIONS = """document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`CSP: ${event.violatedDirective} refused ${event.blockedURI || event.sourceFile}`));"""

OpenPage = Callable[..., Page]


@dataclass
class Served:
    """A running application; `now` is what its clock says."""

    app: FastAPI
    url: str
    token: str
    now: float
    node: Furnished | None = None

    @property
    def ledger(self) -> Ledger:
        ledger: Ledger = self.app.state.site.ledger
        return ledger


@dataclass
class Watch:
    """What went wrong in the pages of one test; `forgiven`: parts of messages that the test expects."""

    origin: str
    found: list[str] = field(default_factory=list)
    forgiven: list[str] = field(default_factory=list)

    def over(self, context: BrowserContext) -> None:
        context.add_init_script(REPORT_VIOLATIONS)
        context.route(lambda url: not url.startswith((self.origin, "data:", "blob:")), self._refuse)
        context.on("console", lambda message: self._console(message))
        context.on("weberror", lambda error: self.found.append(f"page error: {error.error}"))

    def _refuse(self, route: Any) -> None:
        self.found.append(f"request to another origin: {route.request.url}")
        route.abort()

    def _console(self, message: Any) -> None:
        if message.type == "error":
            self.found.append(f"console: {message.text} ({message.location.get('url', '')})")

    def check(self) -> None:
        """Fails where a page complained of anything that was not expected."""
        wrong = [text for text in self.found if not any(part in text for part in self.forgiven)]
        assert not wrong, "the browser complains:\n" + "\n".join(wrong)


@contextmanager
def serve(toml: str, *, now: float, node: Furnished | None = None) -> Iterator[Served]:
    """The application of a configuration, on a free port, until the block is left."""
    config = parse(toml)
    hand = Served(FastAPI(), "", operator_token(config), now, node)
    hand.app = create(config, clock=lambda: hand.now)
    server = uvicorn.Server(uvicorn.Config(hand.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < limit, "the server does not start"
        time.sleep(0.005)
    hand.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hand
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        hand.app.state.site.ledger.close()


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """The one browser of these tests."""
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: the pages are not tried in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def served(node: Furnished) -> Iterator[Served]:
    """The application over `node`."""
    with serve(node.toml, now=node.now, node=node) as hand:
        yield hand


@pytest.fixture
def open_page(chromium: Browser, served: Served) -> Iterator[OpenPage]:
    """Makes logged-in pages on `served`; each has `forgiven`, a list. Checks all of them in the end."""
    with opening(chromium, served) as make:
        yield make


@contextmanager
def opening(browser: Browser, served: Served) -> Iterator[OpenPage]:
    """As the fixture open_page, for another server."""
    watch = Watch(served.url)
    contexts: list[BrowserContext] = []

    def make(size: tuple[int, int] = DESK, *, dark: bool = False, token: str | None = None) -> Page:
        context = browser.new_context(
            base_url=served.url, viewport={"width": size[0], "height": size[1]}, locale="en-GB",
            color_scheme="dark" if dark else "light", reduced_motion="reduce")
        context.set_default_timeout(10_000)
        if token != "":
            answer = context.request.post("/login", form={"token": token or served.token},
                                          headers={"Origin": served.url}, max_redirects=0)
            assert answer.status == 303, f"no login: {answer.status} {answer.text()[:300]}"
        contexts.append(context)
        watch.over(context)
        made = context.new_page()
        made.forgiven = watch.forgiven  # type: ignore[attr-defined]
        return made

    try:
        yield make
    finally:
        for context in contexts:
            context.close()
    watch.check()


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """A logged-in page on `served`, as wide as a desk's screen."""
    return open_page()


# --- what tests do with a page


def go(page: Page, path: str, *, status: int = 200) -> None:
    """Opens a path of the site; the answer must have that status."""
    answer = page.goto(path)
    assert answer is not None and answer.status == status, f"{path}: {answer and answer.status}"


def axe(page: Page, *rules: str) -> None:
    """Fails on any violation of WCAG 2.1 A and AA (or of those rules) that axe-core finds on the page; lists them."""
    found = Axe().run(page, options={"runOnly": rules or RULES, "resultTypes": ["violations"]}).response["violations"]
    lines = [f"{one['id']} ({one['impact']}): {one['help']}\n    " + "\n    ".join(
        node["html"][:200] for node in one["nodes"][:5]) for one in found]
    assert not lines, f"{page.url} is not accessible to all:\n" + "\n".join(lines)


def fits(page: Page) -> None:
    """Fails where the body of the page can be scrolled sideways."""
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= screen, f"{page.url} is {wide} px wide on a screen of {screen} px"


def shot(page: Page, name: str, *, whole: bool = True) -> None:
    """A picture of the page, NAME.png in the folder that DICOMNODE_SCREENSHOTS names; nothing where it is not set."""
    folder = os.environ.get("DICOMNODE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=whole)
