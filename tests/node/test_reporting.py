"""A study on paper: what the report says is what the ledger and the job's report say, in HTML and in PDF alike."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from typing import Any

import pytest
from pypdf import PdfReader
from typer.testing import CliRunner

from dicomnode import views
from dicomnode.cli import app
from dicomnode.config import Config, parse
from dicomnode.ledger import Ledger
from dicomnode.reporting import content, html, pdf
from dicomnode.reporting.blocks import Facts, StudyReport, Table
from dicomnode.spool import Spool
from tests.web.nodes import Furnished, furnished


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Furnished:
    """A node with a study in every state, one of them deblurred; not to be changed."""
    return furnished(tmp_path_factory.mktemp("reported"), preset="quick", method="tv")


@pytest.fixture(scope="module")
def config(node: Furnished) -> Config:
    return parse(node.toml)


@pytest.fixture(scope="module")
def ledger(node: Furnished) -> Iterator[Ledger]:
    with Ledger(node.folder / "data" / "ledger.sqlite3") as ledger:
        yield ledger


def told(node: Furnished, ledger: Ledger, config: Config, state: str) -> StudyReport:
    return content.compose(ledger, Spool(config.node.data_dir), config, node.studies[state], now=node.now)


@pytest.fixture(scope="module")
def delivered(node: Furnished, ledger: Ledger, config: Config) -> StudyReport:
    return told(node, ledger, config, "delivered")


def pdf_text(data: bytes) -> str:
    """All text without white space: where a line breaks does not count."""
    return squeezed("".join(page.extract_text() for page in PdfReader(BytesIO(data)).pages))


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def html_text(text: str) -> str:
    class Words(HTMLParser):
        found = ""

        def handle_data(self, data: str) -> None:
            self.found += data

    words = Words()
    words.feed(text)
    return squeezed(words.found)


def tables(report: StudyReport, title: str) -> list[Table]:
    return [block for section in report.sections for block in section.blocks
            if isinstance(block, Table) and block.title.startswith(title)]


def test_the_report_says_what_the_jobs_report_says(node, config, delivered):
    """Every gate, every check and the figures are those of report.json."""
    told = json.loads((config.node.data_dir / "derived" / str(node.job) / "report.json").read_text())
    gates = tables(delivered, "Gates")[0]
    assert [row[0].text for row in gates.rows] == [gate["name"] for gate in told["gates"]]
    assert gates.title == f"Gates: {len(told['gates'])} of {len(told['gates'])} passed"
    checks = tables(delivered, "Checks")[0]
    assert [(row[0].text, row[1].text) for row in checks.rows] == [
        (item["name"], item["message"]) for item in told["check"]["items"]]
    facts = {name: cell.text for section in delivered.sections for block in section.blocks
             if isinstance(block, Facts) for name, cell in block.rows}
    assert facts["Method"] == f"{told['method']}, preset {told['preset']}"
    assert facts["Derived series"] == told["derived_series_uid"]
    assert facts["Device"] == told["device"]
    for axis in "dhw":
        assert f"{told['metrics'][f'kernel_fwhm_{axis}_mm']:.2f} mm" in facts["Kernel FWHM"]


def test_the_report_says_what_the_ledger_says(node, ledger, delivered):
    """Series, deliveries and every line of history."""
    shown = views.show(ledger, node.studies["delivered"])
    assert [row[0].text for row in tables(delivered, "Series")[0].rows] == [one["series"] for one in shown["series"]]
    assert len(tables(delivered, "Every change")[0].rows) == len(shown["events"])
    deliveries = tables(delivered, "To whom")[0]
    assert [row[0].text for row in deliveries.rows] == ["PACS", "ARCHIVE"]
    assert {row[2].text for row in deliveries.rows} == {"32 of 32"}
    assert delivered.verdicts[0].tone == "good"


def test_both_writers_say_all_of_it(delivered):
    """Each text of the report is in the HTML and in the PDF."""
    web, paper = html_text(html.render(delivered)), pdf_text(pdf.render(delivered))
    for text in texts(delivered):
        assert squeezed(text) in web, text
        assert squeezed(text) in paper, text


def texts(report: StudyReport) -> Iterator[str]:
    """What is to be read in short pieces: cells that a page may break are taken word by word."""
    for verdict in report.verdicts:
        yield from (word for part in (verdict.text, verdict.remedy) for word in part.split())
    for section in report.sections:
        yield section.title
        for block in section.blocks:
            if isinstance(block, Facts):
                yield from (word for name, cell in block.rows for word in f"{name} {cell.text}".split())
            elif isinstance(block, Table):
                yield from (word for row in block.rows for cell in row for word in cell.text.split())


def test_the_same_report_gives_the_same_bytes(delivered):
    """Nothing is read from the air."""
    assert pdf.render(delivered) == pdf.render(delivered)
    assert html.render(delivered) == html.render(delivered)


@pytest.mark.parametrize(("state", "word", "todo"), [
    ("held", "Held because the result is not safe", "Try another preset"),
    ("failed", "The last attempt failed: MemoryError", "tried again"),
    ("waiting", "slices missing", "Send what is missing"),
    ("ignored", "Not processed: CorrectedImage", "as it should be"),
    ("queued", "Queued", "goes on by itself"),
    ("running", "step 120 of 400", "goes on by itself"),
])
def test_a_study_without_a_derived_series_is_told_of_too(node, ledger, config, state, word, todo):
    """Why there is none, and what to do."""
    report = told(node, ledger, config, state)
    verdict = report.verdicts[0]
    assert verdict.state == state and word in verdict.text and todo in verdict.remedy
    assert squeezed(word) in pdf_text(pdf.render(report))


def test_the_pages_are_numbered_and_listed(delivered):
    """Page n of m, the notice on each, an outline and a title."""
    paper = PdfReader(BytesIO(pdf.render(delivered)))
    pages = [squeezed(page.extract_text()) for page in paper.pages]
    for number, text in enumerate(pages, start=1):
        assert f"Page{number}of{len(pages)}" in text and squeezed(content.NOTICE) in text
    assert paper.metadata is not None and paper.metadata.title == "Deblurred PET: PHANTOM"
    assert paper.metadata.creation_date is not None
    assert paper.metadata.creation_date.timestamp() == int(delivered.seconds)
    titles: list[Any] = [entry for entry in paper.outline if not isinstance(entry, list)]
    assert [entry["/Title"] for entry in titles] == [one.title for one in delivered.sections if one.level == 2]


def test_every_font_is_embedded(delivered):
    """The file looks the same everywhere."""
    for page in PdfReader(BytesIO(pdf.render(delivered))).pages:
        for font in page["/Resources"]["/Font"].values():
            found = font.get_object()
            inner = found.get("/FontDescriptor") or found["/DescendantFonts"][0].get_object()["/FontDescriptor"]
            assert "/FontFile2" in inner.get_object(), found["/BaseFont"]


runner = CliRunner()


def test_the_command_writes_both_for_their_owner_alone(node, tmp_path):
    """Patient data: mode 0600; a second run replaces them."""
    arguments = ["report", "PHANTOM", "--config", str(node.config_file()), "--out", str(tmp_path / "new"), "--json"]
    for _ in range(2):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["accession_number"] == "PHANTOM" and said["verdicts"][0]["state"] == "delivered"
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["dicomnode-report-PHANTOM.html", "dicomnode-report-PHANTOM.pdf"]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o600}
