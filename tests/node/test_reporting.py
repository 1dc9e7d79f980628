"""A study on paper: what the report says is what the ledger and the job's report say, in HTML and in PDF alike."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pypdf import PdfReader
from typer.testing import CliRunner

from dicomnode import looks, qcpictures, views
from dicomnode.cli import app
from dicomnode.config import Config, parse
from dicomnode.errors import RefusedInput
from dicomnode.ledger import Ledger
from dicomnode.reporting import blocks, charts, content, files, html, pdf
from dicomnode.reporting.blocks import (
    Chart,
    Facts,
    Line,
    Paragraph,
    Picture,
    Section,
    StudyReport,
    Table,
    Verdict,
    mark,
)
from dicomnode.reporting.verdicts import tell
from dicomnode.reporting.words import Times
from dicomnode.spool import Spool
from dicomnode.states import JOB_STATES, SERIES_STATES
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
        assert f"{told['metrics'][f'psf_fwhm_{axis}_mm']:.2f} mm" in facts["PSF FWHM"]
    for width in told["looks"]["kernel"]["fwhm_mm"]:
        assert f"{width:.2f} mm" in facts["Kernel FWHM"]


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
        alone = any(text.endswith(squeezed(one.title)) for one in delivered.sections)
        assert not alone or paper.pages[number - 1].images, "a heading without what it is of"
    assert paper.metadata is not None and paper.metadata.title == "Deblurred PET: PHANTOM"
    assert paper.metadata.creation_date is not None
    assert paper.metadata.creation_date.timestamp() == int(delivered.seconds)
    titles: list[Any] = [entry for entry in paper.outline if not isinstance(entry, list)]
    assert [entry["/Title"] for entry in titles] == [one.title for one in delivered.sections if one.level == 2]


def test_a_site_that_turns_the_notice_off_has_none_anywhere(node, ledger, config, monkeypatch):
    """`derived.research_use = false` holds for the report, for both of its formats and for the pictures in them."""
    asked = []
    monkeypatch.setattr(qcpictures, "draw", lambda *_, footer, **__: asked.append(footer) or [])
    off = config.model_copy(update={"derived": config.derived.model_copy(update={"research_use": False})})
    quiet, usual = (content.compose(ledger, Spool(config.node.data_dir), one, node.studies["delivered"], now=node.now)
                    for one in (off, config))
    assert asked == ["", content.NOTICE]
    assert content.NOTICE in html.render(usual) and content.NOTICE not in html.render(quiet)
    assert squeezed(content.NOTICE) in squeezed(pdf_text(pdf.render(usual)))
    assert squeezed(content.NOTICE) not in squeezed(pdf_text(pdf.render(quiet)))


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
    arguments = ["report", "ACC11", "--config", str(node.config_file()), "--out", str(tmp_path / "new"), "--json"]
    for _ in range(2):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["accession_number"] == "ACC11" and said["verdicts"][0]["state"] == "held"
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["dicomnode-report-ACC11.html", "dicomnode-report-ACC11.pdf"]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o600}


@pytest.mark.parametrize("state", ["delivered", "held", "failed", "running", "queued", "waiting", "ignored"])
def test_the_html_needs_nothing_else(node, ledger, config, delivered, state):
    """No address in it leads out of the file: it can be mailed."""
    text = html.render(delivered if state == "delivered" else told(node, ledger, config, state))
    assert addresses(text) == [] and "url(" not in text and "@import" not in text and "<script" not in text
    assert len(text.encode()) < 3_000_000


def addresses(text: str) -> list[str]:
    """Every address that a browser would follow or load, data: aside."""
    found: list[str] = []

    class Sources(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attributes
                         if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href")
                         and not (value or "").startswith("data:image/png;base64,"))

    Sources().feed(text)
    return found


def test_pictures_come_with_words(delivered):
    """MIPs, kernel and residual, each a PNG that says in words what it shows."""
    pictures = [block for section in delivered.sections for block in section.blocks if isinstance(block, Picture)]
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.png.startswith(b"\x89PNG") and len(picture.alt) > 40 and picture.size[0] > 500
    assert len(re.findall(r'<img src="data:image/png', html.render(delivered))) == 3
    assert sum(len(page.images) for page in PdfReader(BytesIO(pdf.render(delivered))).pages) == 3


def test_regions_and_profiles_are_those_of_the_looks(node, config, delivered):
    """The figures before, after and their change; the lines point by point."""
    measures = looks.load(config.node.data_dir / "derived" / str(node.job) / looks.LOOKS_FILE).measures
    rows = tables(delivered, "Uptake in SUVbw")[0].rows
    assert len(rows) == len(measures["regions"]) > 0
    for row, region in zip(rows, measures["regions"], strict=True):
        for column, kind in ((3, "max"), (6, "mean"), (9, "peak")):
            before, after = region["before"][kind], region["after"][kind]
            assert float(row[column].text) == pytest.approx(before, abs=0.00501)
            assert float(row[column + 1].text) == pytest.approx(after, abs=0.00501)
            assert row[column + 2].text == f"{100 * (after / before - 1):+.1f} %"
    drawn = [block for section in delivered.sections for block in section.blocks if isinstance(block, Chart)]
    assert [list(chart.lines[1].y) for chart in drawn] == [profile["after"] for profile in measures["profiles"]]


def test_a_purged_study_is_still_told_of(node, config, tmp_path):
    """Figures stay, pictures go, and the report says since when."""
    shutil.copytree(node.folder / "data", tmp_path / "data")
    elsewhere = parse(node.toml.replace(str(node.folder / "data"), str(tmp_path / "data")))
    shutil.rmtree(tmp_path / "data" / "derived" / str(node.job))
    shutil.rmtree(tmp_path / "data" / "objects")
    with Ledger(tmp_path / "data" / "ledger.sqlite3") as ledger:
        ledger.query("UPDATE job SET derived_path = NULL, purged_at = ? WHERE id = ?", (node.now, node.job))
        ledger.query("UPDATE series SET purged_at = ? WHERE study_uid = ?", (node.now, node.studies["delivered"]))
        report = told(node, ledger, elsewhere, "delivered")
    day = Times("Europe/Berlin").minute(views.timestamp(node.now))
    said = " ".join(block.text for section in report.sections for block in section.blocks
                    if isinstance(block, Paragraph))
    assert f"received objects were removed from the node on {day}" in said
    assert "pictures were removed with the derived files" in said
    assert tables(report, "Uptake in SUVbw") and tables(report, "Gates")
    pdf.render(report)


@pytest.mark.parametrize("content_of_file", [b"", b"PK\x03\x04 not whole", b"\x00" * 300])
def test_damaged_pictures_are_said_to_be_damaged(node, tmp_path, content_of_file):
    """The rest of the report is there all the same."""
    shutil.copytree(node.folder / "data", tmp_path / "data")
    elsewhere = parse(node.toml.replace(str(node.folder / "data"), str(tmp_path / "data")))
    (tmp_path / "data" / "derived" / str(node.job) / looks.LOOKS_FILE).write_bytes(content_of_file)
    with Ledger(tmp_path / "data" / "ledger.sqlite3") as ledger:
        report = told(node, ledger, elsewhere, "delivered")
    said = [block.text for section in report.sections for block in section.blocks if isinstance(block, Paragraph)]
    assert any(text.startswith("The pictures cannot be read") for text in said)
    assert tables(report, "Gates")


def test_companions_are_listed_and_count_as_delivered(node, ledger, config):
    """What went beside the derived series, and what could not be made."""
    shown = views.show(ledger, node.studies["delivered"])
    job = next(one["jobs"][-1] for one in shown["series"] if one["jobs"])
    job["report"]["also"] = {
        "wanted": ["report", "kernel"], "left_out": {"kernel": "nearest has no kernel"},
        "series": [{"kind": "report", "of": "report", "series_uid": "2.25.77", "series_number": 2001,
                    "description": "NBD report", "modality": "SR", "instances": 1, "files": {"report-1.dcm": "0"}}]}
    study = content._Study(ledger, Spool(config.node.data_dir), config, Times("UTC"), "PHANTOM")
    blocks = list(content._deliveries(job, ledger.job(job["job"]), study))
    table = next(block for block in blocks if isinstance(block, Table) and block.title == "What goes with it")
    assert [cell.text for cell in table.rows[0]] == ["report", "SR", "2001 NBD report", "1", "2.25.77"]
    assert any(isinstance(block, Paragraph) and "nearest has no kernel" in block.text for block in blocks)


def test_no_name_unless_the_site_shows_names(node, ledger, config):
    """The patient is named by choice alone; then by name and ID."""
    header = dcmread(next((config.node.data_dir / "objects" / node.studies["held"]).rglob("*.dcm")))
    words = [*str(header.PatientName).split("^"), str(header.PatientID)]
    assert len(words) == 3 and all(words)
    report = told(node, ledger, config, "held")
    for text in (html.render(report), pdf_text(pdf.render(report))):
        assert not any(word in text for word in words)
    report = told(node, ledger, parse(node.toml + "\n[web]\nshow_names = true\n"), "held")
    assert report.patient == f"{words[0]} {words[1]}, ID {words[2]}"
    assert squeezed(report.patient) in pdf_text(pdf.render(report))
    assert squeezed(report.patient) in html_text(html.render(report))


def small(**changed: Any) -> StudyReport:
    """A report of one page."""
    given_text = changed.pop("text", "a reason")
    blocks_of = (Paragraph(given_text), Facts.of([("Reason", given_text)]),
                 Table.of(f"Why {given_text}", (("Who", 1.0), ("What", 1.0)), [[given_text, mark(given_text, "bad")]]),
                 Chart(given_text, given_text, given_text, given_text,
                       (Line("before", "before", (0.0, 1.0), (0.0, 1.0)),)))
    return replace(StudyReport(
        title="Deblurred PET", study="1.2.3", accession_number="A1", patient="", at="2026-09-23 21:06:40", zone="UTC",
        seconds=1_790_200_000.0, node="NODE", software="dicomnode 0", notice=content.NOTICE,
        verdicts=(Verdict("held", "bad", given_text, given_text),), sections=(Section(given_text, blocks_of),)),
        **changed)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80) | st.sampled_from([
    "<script>alert(1)</script>", "a & b < c > d", "</title><img src=x onerror=alert(1)>", "&amp; &#0; &nbsp;", "]]>",
    "<para><b>", "{{ 7 * 7 }}", "\u202eevil\u202c", "", " ", "\x00\x1b[31m", "'\"`=", "<font color=\"x\">", "%s %d",
    "日本語 Ελληνικά äöü עברית"]))
def test_any_text_is_shown_as_it_is(text):
    """Nothing that a peer writes becomes markup, in HTML or in PDF, and nothing is lost but what cannot be shown."""
    report = small(text=text)
    web = html.render(report)
    assert addresses(web) == [] and tags(web) == tags(html.render(small(text="x" if blocks.clean(text) else "")))
    assert squeezed(blocks.clean(text)) in html_text(web)
    shown = squeezed(pdf._shown(blocks.clean(text)))
    assert shown in pdf_text(pdf.render(small(text=text))) or not shown.isascii()


def tags(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Every element with the names of its attributes."""
    found: list[tuple[str, tuple[str, ...]]] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.append((tag, tuple(name for name, _ in attributes)))

    Tags().feed(text)
    return found


def test_letters_that_the_font_lacks_are_written_as_code_points():
    """A name in Japanese is not a row of empty boxes."""
    text = pdf_text(pdf.render(small(patient="山田 Müller Ωμέγα Łódź")))
    assert "[U+5C71][U+7530]MüllerΩμέγαŁódź" in text
    assert "山田" in html_text(html.render(small(patient="山田")))


@pytest.mark.parametrize("length", [3_000, 9_000])
def test_a_reason_longer_than_a_page_is_printed_whole(length):
    """A row may be higher than a page; nothing is refused and nothing is cut."""
    words = [f"w{k}" for k in range(length // 6)]
    text = pdf_text(pdf.render(small(text=" ".join(words))))
    assert all(word in text for word in words)


def test_a_chart_is_the_same_on_both():
    """Ticks, names and labels; "before" is dashed, for those who do not see its colour."""
    chart = Chart("t", "alt <b>", "mm", "SUV", (Line("before", "before", (-5.0, 5.0), (0.0, 2.5)),
                                              Line("after", "after", (-5.0, 5.0), (1.0, 4.0))))
    drawn = charts.svg(chart)
    assert 'aria-label="alt &lt;b&gt;"' in drawn
    on_paper = pdf_text(pdf.render(small(sections=(Section("x", (chart,)),))))
    for label in re.findall(r">([^<]+)</text>", drawn):
        assert squeezed(label) in on_paper
    assert re.search(r"polyline\.before \{[^}]*dasharray", html.render(small()))


@pytest.mark.parametrize("ys", [(), (0.0, 0.0), (1e-9, 2e-9), (-3.0, 5.0), (1e6, 5e6)])
def test_a_chart_of_anything_can_be_drawn(ys):
    """Nothing, a flat line, very small and very large values."""
    chart = Chart("t", "t", "mm", "x", (Line("after", "after", tuple(map(float, range(len(ys)))), ys),))
    pdf.render(small(sections=(Section("x", (chart,)),)))
    assert "nan" not in charts.svg(chart)


# --- files


def test_a_file_says_its_format(node, tmp_path):
    """--out report.pdf writes that file alone."""
    done = runner.invoke(app, ["report", "ACC11", "--config", str(node.config_file()), "-o", str(tmp_path / "x.pdf")])
    assert done.exit_code == 0 and done.output.split() == [str(tmp_path / "x.pdf")]
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (["NOSUCH"], 2, "nothing in the ledger is called 'NOSUCH'"),
    (["PHANTOM", "--format", "docx"], 2, "--format takes html, pdf"),
    (["PHANTOM", "--format", "html", "--out", "x.pdf"], 2, "--format asks for html"),
])
def test_what_cannot_be_done_is_said(node, arguments, code, said):
    """Unknown study, unknown format, a format against the name of the file."""
    done = runner.invoke(app, ["report", *arguments, "--config", str(node.config_file())])
    assert done.exit_code == code and said in done.output


def test_an_accession_number_of_two_studies_is_refused(node, tmp_path):
    """Which one is meant cannot be guessed."""
    shutil.copytree(node.folder / "data", tmp_path / "data")
    with Ledger(tmp_path / "data" / "ledger.sqlite3") as ledger:
        ledger.query("UPDATE series SET accession_number = 'PHANTOM' WHERE study_uid = ?", (node.studies["held"],))
    toml = tmp_path / "node.toml"
    toml.write_text(node.toml.replace(str(node.folder / "data"), str(tmp_path / "data")))
    done = runner.invoke(app, ["report", "PHANTOM", "--config", str(toml), "--out", str(tmp_path)])
    assert done.exit_code == 3 and "stands for 2 studies" in done.output


@pytest.mark.parametrize("suffix", files.FORMATS)
def test_nothing_else_is_overwritten(tmp_path, suffix):
    """Not another study's report, not a letter, not what a link points at; --force replaces a file."""
    rendered = {"html": lambda one: html.render(one).encode(), "pdf": pdf.render}[suffix]
    path = tmp_path / f"r.{suffix}"
    other = small(study="1.2.3.4")
    for there in (b"a letter", b"", rendered(other)):
        path.write_bytes(there)
        with pytest.raises(RefusedInput, match="is not a report of study"):
            files.write(small(), {path: b"new"})
        assert path.read_bytes() == there
    files.write(small(), {path: rendered(small())}, force=True)
    files.write(small(), {path: rendered(small())})
    link = tmp_path / f"link.{suffix}"
    link.symlink_to(path)
    with pytest.raises(RefusedInput, match="no plain file"):
        files.write(small(), {link: b"new"})


def test_a_report_is_whole_or_not_there(tmp_path, monkeypatch):
    """What breaks off while it is written leaves the old one, and nothing beside it."""
    path = tmp_path / "r.html"
    files.write(small(), {path: html.render(small()).encode()})
    old = path.read_bytes()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write(small(), {path: b"new"})
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("accession", "name"), [
    ("ACC 12/3", "dicomnode-report-ACC_12_3.pdf"), ("../../etc/passwd", "dicomnode-report-etc_passwd.pdf"),
    ("", "dicomnode-report-1.2.3.pdf"), ("///", "dicomnode-report-1.2.3.pdf"), ("日本", "dicomnode-report-1.2.3.pdf")])
def test_a_file_name_holds_nothing_odd(accession, name):
    """Whatever an accession number is, the file lies in the folder that was named."""
    assert files.file_name(small(accession_number=accession), "pdf") == name


# --- what became of it


def series(state: str, **changed: Any) -> dict[str, Any]:
    """A PET series as dicomnode.views.show has it, in some state."""
    job = {"job": 7, "deliveries": [{"peer": "PACS", "state": "waiting", "reason": "no answer"}]}
    return {"modality": "PT", "series": "1.2", "series_number": "4", "state": state, "code": "", "reason": "",
            "until": "2026-09-24T18:51:39Z", "job": 7, "jobs": [job], "instances": 8, "derived_instances": 16,
            "progress": None} | changed


@pytest.mark.parametrize("state", sorted({*SERIES_STATES, *JOB_STATES}))
@pytest.mark.parametrize("reason", ["", "too few slices. Remedy: send the series again"])
def test_every_state_is_told_in_a_sentence(state, reason):
    """Whatever the state, a person reads one whole sentence, and a remedy that the reason names."""
    verdict, = tell([series(state, reason=reason)], {}, Times("UTC"))
    assert verdict.state == state and verdict.text.endswith(".") and ".." not in verdict.text
    assert "Remedy" not in verdict.text
    if state in ("held", "waiting", "ignored") and reason:
        assert verdict.remedy == "Send the series again." and "too few slices" in verdict.text


def test_the_worst_of_several_series_stands_first():
    """Each with its number; what is ignored is not counted where there is another."""
    found = list(tell([series("delivered", series_number="1"), series("ignored"), series("held", series_number="2")],
                      {}, Times("UTC")))
    assert [verdict.state for verdict in found] == ["held", "delivered"]
    assert found[0].text.startswith("PET series 2: Held")


def test_a_study_without_a_pet_says_so():
    """Only a CT came."""
    verdict, = tell([series("ignored", modality="CT")], {}, Times("UTC"))
    assert verdict.text == "No PET series of this study came, only CT." and "Send" in verdict.remedy
