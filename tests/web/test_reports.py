"""The report of a study, as the status page hands it out and as a browser shows the file."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from playwright.sync_api import Browser
from pypdf import PdfReader

from dicomnode.config import parse
from dicomnode.ledger import Ledger
from dicomnode.reporting import content, html
from dicomnode.spool import Spool
from tests.web.browser import DESK, PHONE, axe
from tests.web.nodes import Furnished


@pytest.mark.parametrize(("suffix", "kind", "begins"), [
    ("html", "text/html; charset=utf-8", b"<!doctype html>"), ("pdf", "application/pdf", b"%PDF")])
def test_the_report_is_handed_out_as_a_file(client: TestClient, node: Furnished, suffix: str, kind: str,
                                            begins: bytes) -> None:
    """With a name that says whose it is, to be saved, not to be kept by a cache."""
    answer = client.get(f"/studies/{node.studies['held']}/report.{suffix}")
    assert answer.status_code == 200 and answer.content.startswith(begins)
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"] == f'attachment; filename="dicomnode-report-ACC11.{suffix}"'
    assert "no-store" in answer.headers["cache-control"]


def test_the_report_of_the_page_is_that_of_the_ledger(client: TestClient, node: Furnished) -> None:
    """The PDF of a deblurred study, with its pictures."""
    paper = PdfReader(BytesIO(client.get(f"/studies/{node.studies['delivered']}/report.pdf").content))
    assert "PHANTOM" in paper.pages[0].extract_text() and sum(len(page.images) for page in paper.pages) == 3


@pytest.mark.parametrize("path", ["/studies/1.2.3/report.html", "/studies/1.2.3/report.pdf"])
def test_there_is_no_report_of_an_unknown_study(client: TestClient, path: str) -> None:
    """Said as for every other page."""
    answer = client.get(path)
    assert answer.status_code == 404 and "1.2.3" in answer.text


def test_nobody_gets_a_report_without_a_token(app: FastAPI, client: TestClient, node: Furnished) -> None:
    """It is patient data."""
    stranger = TestClient(app, base_url=str(client.base_url), follow_redirects=False)
    answer = stranger.get(f"/studies/{node.studies['held']}/report.pdf")
    assert answer.status_code in (401, 303) and b"%PDF" not in answer.content


@pytest.fixture(scope="module")
def written(furnished_once: Furnished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the deblurred study, as a file."""
    config = parse(furnished_once.toml)
    with Ledger(config.node.data_dir / "ledger.sqlite3") as ledger:
        report = content.compose(ledger, Spool(config.node.data_dir), config, furnished_once.studies["delivered"],
                                 now=furnished_once.now)
    path = tmp_path_factory.mktemp("written") / "report.html"
    path.write_text(html.render(report), encoding="utf-8")
    return path


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_file_opens_from_a_disk(chromium: Browser, written: Path, size: tuple[int, int], scheme: str) -> None:
    """It asks for nothing, complains of nothing, shows its pictures, fits the screen and is accessible."""
    context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(written.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert page.evaluate("[...document.images].every(one => one.naturalWidth > 500)")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    axe(page)
    assert said == []
    context.close()


def test_the_file_prints_on_a4(chromium: Browser, written: Path) -> None:
    """Heads of tables are repeated, nothing is cut at the side."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(written.as_uri())
    paper = PdfReader(BytesIO(page.pdf(prefer_css_page_size=True)))
    context.close()
    assert {(round(sheet.mediabox.width), round(sheet.mediabox.height)) for sheet in paper.pages} == {(595, 842)}
    texts = [sheet.extract_text() for sheet in paper.pages]
    first = next(k for k, text in enumerate(texts) if "Checks of the derived series" in text)
    assert "What was found" in texts[first] and "What was found" in texts[first + 1]
