"""A report as a PDF: A4, its fonts embedded, bookmarks, page n of m. The same report gives the same bytes.

The font is DejaVu Sans, a free one that matplotlib brings along (its folder holds the licence). A character that it
does not have is written as its code point, "[U+65E5]": nothing is left out unseen.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from reportlab.lib.colors import HexColor
from reportlab.lib.enums import TA_RIGHT
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase.pdfmetrics import getFont, registerFont, registerFontFamily, stringWidth
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import (
    BaseDocTemplate,
    CondPageBreak,
    Flowable,
    Frame,
    Image,
    KeepTogether,
    LongTable,
    PageTemplate,
    Spacer,
)
from reportlab.platypus import Paragraph as Text
from reportlab.platypus import Table as Grid

from dicomnode.reporting import blocks, charts
from dicomnode.reporting.blocks import Cell, Chart, Facts, Picture, Section, StudyReport, Table, Verdict

__all__ = ["render"]

SANS, BOLD, MONO = "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono"
MARGIN_X, TOP, BOTTOM = 16 * mm, 24 * mm, 20 * mm
WIDTH = A4[0] - 2 * MARGIN_X
HEIGHT = A4[1] - TOP - BOTTOM
INK, QUIET, RULE = HexColor("#1b222c"), HexColor("#566173"), HexColor("#d5dae1")
PAPERS = {"good": HexColor("#e3f4ea"), "wait": HexColor("#fdf1d8"), "bad": HexColor("#fdeceb"),
          "run": HexColor("#e4f0fb")}
INKS = {"good": "#1a7042", "wait": "#7a5200", "bad": "#b3261e", "run": "#0b5cad"}
LONG = 1000  # letters: a row with such a cell may be cut, lest it be higher than a page
OURS = ("FONTNAME", (0, 0), (-1, -1), SANS)  # a table's own font would be named in the file
TOTAL = "pages-in-all"  # a form that every page shows and that is drawn when their number is known
_one_at_a_time = threading.Lock()  # fonts are registered once for all documents of the process


def render(report: StudyReport) -> bytes:
    """The whole file."""
    with _one_at_a_time:
        _fonts()
        out = BytesIO()
        story = [*_heading(report), *_sections(report.sections)]
        _Document(report, out).build(story, canvasmaker=_Counting)
        return out.getvalue()


# --- text


@cache
def _fonts() -> None:
    spec = find_spec("matplotlib")  # where it lies; nothing of it is loaded
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the fonts of matplotlib are not installed. Remedy: pip install matplotlib")
    folder = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
    for name in (SANS, BOLD, MONO):
        registerFont(TTFont(name, str(folder / f"{name}.ttf")))
    registerFontFamily(SANS, normal=SANS, bold=BOLD, italic=SANS, boldItalic=BOLD)


def _shown(text: str, font: str = SANS) -> str:
    """What the font can show; a code point for what it cannot."""
    known = getFont(font).face.charToGlyph
    return "".join(c if ord(c) in known else f"[U+{ord(c):04X}]" for c in text)


@cache
def _style(name: str) -> ParagraphStyle:
    base = ParagraphStyle("text", fontName=SANS, fontSize=9, leading=12.5, textColor=INK, splitLongWords=1)
    return {
        "text": base,
        "quiet": ParagraphStyle("quiet", base, textColor=QUIET, fontSize=8.5, leading=12, spaceAfter=3),
        "cell": ParagraphStyle("cell", base, fontSize=7.5, leading=9.6),
        "number": ParagraphStyle("number", base, fontSize=7.5, leading=9.6, alignment=TA_RIGHT),
        "uid": ParagraphStyle("uid", base, fontName=MONO, fontSize=6.4, leading=8.6),
        "head": ParagraphStyle("head", base, fontName=BOLD, fontSize=6.7, leading=8.8, textColor=QUIET),
        "headnumber": ParagraphStyle("headnumber", base, fontName=BOLD, fontSize=6.7, leading=8.8, textColor=QUIET,
                                     alignment=TA_RIGHT),
        "label": ParagraphStyle("label", base, textColor=QUIET),
        "fact": base,
        "factuid": ParagraphStyle("factuid", base, fontName=MONO, fontSize=7.8, leading=12.5),
        "caption": ParagraphStyle("caption", base, fontName=BOLD, fontSize=8.5, spaceBefore=5, spaceAfter=2),
        "legend": ParagraphStyle("legend", base, fontSize=8, leading=10, textColor=QUIET),
        "title": ParagraphStyle("title", base, fontName=BOLD, fontSize=16, leading=20, spaceAfter=4),
        "h2": ParagraphStyle("h2", base, fontName=BOLD, fontSize=12.5, leading=16, spaceBefore=12, spaceAfter=4),
        "h3": ParagraphStyle("h3", base, fontName=BOLD, fontSize=10.5, leading=14, spaceBefore=9, spaceAfter=3),
    }[name]


def _text(text: str, style: str = "text") -> Text:
    shown = _style(style)
    return Text(escape(_shown(text, shown.fontName)), shown)


# --- blocks


def _heading(report: StudyReport) -> Iterator[Flowable]:
    yield _text(f"{report.title}: {report.name}", "title")
    yield _facts(Facts.of([
        ("Patient", report.patient), ("Accession number", report.accession_number),
        ("Study", blocks.uid(report.study)), ("As of", f"{report.at} {report.zone}"),
        ("Node, software", f"{report.node}, {report.software}")]))
    yield Spacer(0, 6)
    for verdict in report.verdicts:
        yield _verdict(verdict)


def _verdict(verdict: Verdict) -> Flowable:
    state = f'<font name="{BOLD}" color="{INKS.get(verdict.tone, "#566173")}">{escape(_shown(verdict.state))}</font>'
    lines = [[Text(f"{state} &nbsp; <b>{escape(_shown(verdict.text))}</b>", _style("text"))]]
    if verdict.remedy:
        lines.append([_text(f"What to do: {verdict.remedy}")])
    box = Grid(lines, colWidths=[WIDTH], spaceAfter=6, splitInRow=1)
    box.setStyle([OURS, ("LINEBEFORE", (0, 0), (0, -1), 4, HexColor(INKS.get(verdict.tone, "#566173"))),
                  ("BACKGROUND", (0, 0), (-1, -1), PAPERS.get(verdict.tone, HexColor("#f2f4f7"))),
                  ("LEFTPADDING", (0, 0), (-1, -1), 10), ("TOPPADDING", (0, 0), (-1, -1), 3),
                  ("BOTTOMPADDING", (0, 0), (-1, -1), 4)])
    return box


def _sections(sections: Sequence[Section]) -> Iterator[Flowable]:
    for section in sections:
        yield CondPageBreak(_first(section))
        yield _Heading.of(section.title, section.level)
        small: list[Chart] = []
        for block in section.blocks:
            if isinstance(block, Chart):
                small.append(block)
                continue
            yield from _three_abreast(small)
            small = []
            yield from _block(block)
        yield from _three_abreast(small)


def _first(section: Section) -> float:
    """What a heading needs on its page: room for itself and the beginning of what follows."""
    first = section.blocks[0] if section.blocks else None
    return 15 * mm + (_size(first)[1] if isinstance(first, Picture) else 30 * mm)


def _block(block: blocks.Block) -> Iterator[Flowable]:
    if isinstance(block, blocks.Paragraph):
        yield _text(block.text, "quiet" if block.quiet else "text")
    elif isinstance(block, Facts) and block.rows:
        yield _facts(block)
    elif isinstance(block, Table):
        yield CondPageBreak(28 * mm)
        yield _text(block.title, "caption")
        yield _table(block)
    elif isinstance(block, Picture):
        yield _picture(block)


def _facts(facts: Facts) -> Flowable:
    rows = [[_text(name, "label"), _text(cell.text, "factuid" if cell.tone == "uid" else "fact")]
            for name, cell in facts.rows]
    grid = Grid(rows, colWidths=[0.26 * WIDTH, 0.74 * WIDTH], hAlign="LEFT", splitInRow=1)
    grid.setStyle([OURS, ("VALIGN", (0, 0), (-1, -1), "TOP"), ("LEFTPADDING", (0, 0), (-1, -1), 0),
                   ("TOPPADDING", (0, 0), (-1, -1), 0.5), ("BOTTOMPADDING", (0, 0), (-1, -1), 0.5)])
    return grid


def _table(table: Table) -> Flowable:
    whole = sum(share for _, share in table.columns)
    heads = [_text(name, "headnumber" if is_number else "head")
             for (name, _), is_number in zip(table.columns, table.numbers, strict=True)]
    rows = [[_cell(value) for value in row] for row in table.rows]
    longest = max((len(cell.text) for row in table.rows for cell in row), default=0)
    grid = LongTable([heads, *rows], colWidths=[WIDTH * share / whole for _, share in table.columns], repeatRows=1,
                     splitInRow=int(longest > LONG), spaceAfter=6)
    grid.setStyle([OURS, ("VALIGN", (0, 0), (-1, -1), "TOP"), ("LINEBELOW", (0, 0), (-1, 0), 0.8, QUIET),
                   ("LINEBELOW", (0, 1), (-1, -1), 0.3, RULE), ("LEFTPADDING", (0, 0), (-1, -1), 3),
                   ("RIGHTPADDING", (0, 0), (-1, -1), 3), ("TOPPADDING", (0, 0), (-1, -1), 2),
                   ("BOTTOMPADDING", (0, 0), (-1, -1), 2.5)])
    return grid


def _cell(cell: Cell) -> Text:
    if cell.tone in INKS:
        return Text(f'<font name="{BOLD}" color="{INKS[cell.tone]}">{escape(_shown(cell.text))}</font>', _style("cell"))
    return _text(cell.text, cell.tone if cell.tone in ("number", "uid") else "cell")


def _picture(picture: Picture) -> Flowable:
    return KeepTogether([Image(BytesIO(picture.png), *_size(picture), hAlign="LEFT"), Spacer(0, 8)])


def _size(picture: Picture) -> tuple[float, float]:
    """Width and height on paper: as wide as the page, as long as it leaves room for a heading."""
    columns, rows = picture.size
    scale = min(WIDTH / columns, (HEIGHT - 30 * mm) / rows, 0.6)
    return columns * scale, rows * scale


def _three_abreast(some: Sequence[Chart]) -> Iterator[Flowable]:
    scale = (WIDTH / 3 - 6) / charts.WIDTH
    for k in range(0, len(some), 3):
        drawn = []
        for chart in some[k:k + 3]:
            drawn.append([_Painted(chart, scale), _text(_fitting(chart.title, WIDTH / 3 - 8, 8), "legend")])
        yield Grid([[*drawn, *[Spacer(0, 0)] * (3 - len(drawn))]], colWidths=[WIDTH / 3] * 3, spaceAfter=4,
                   style=[OURS, ("LEFTPADDING", (0, 0), (-1, -1), 0), ("VALIGN", (0, 0), (-1, -1), "TOP")])


# --- pages


class _Painted(Flowable):
    """A chart at some scale."""

    def __init__(self, chart: Chart, scale: float) -> None:
        super().__init__()
        self._chart, self._scale = chart, scale
        self.width, self.height = charts.WIDTH * scale, charts.HEIGHT * scale

    def draw(self) -> None:
        self.canv.scale(self._scale, self._scale)
        charts.paint(self._chart, self.canv, font=SANS)


class _Heading(Text):
    """A heading that the reader's outline lists: `entry` is its title and depth."""

    entry: tuple[str, int] | None = None

    @classmethod
    def of(cls, title: str, level: int) -> _Heading:
        made = cls(escape(_shown(title, BOLD)), _style(f"h{level}"))
        made.entry = title, level - 2
        return made


class _Counting(Canvas):
    """Draws the number of pages when the last one is done."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{**named, "initialFontName": SANS})  # else every page names Helvetica too

    def save(self) -> None:
        pages = self.getPageNumber() - 1  # the next one was begun
        self.beginForm(TOTAL)
        self.setFont(SANS, 7)
        self.setFillColor(QUIET)
        self.drawString(0, 0, str(pages))
        self.endForm()
        super().save()


class _Document(BaseDocTemplate):
    def __init__(self, report: StudyReport, out: BytesIO) -> None:
        super().__init__(
            out, pagesize=A4, leftMargin=MARGIN_X, rightMargin=MARGIN_X, topMargin=TOP, bottomMargin=BOTTOM,
            title=f"{report.title}: {report.name}", author=report.node, creator=report.software,
            subject=f"study {report.study}", keywords=[report.notice] if report.notice else [], lang="en",
            displayDocTitle=True, invariant=1)
        self._report, self._entries = report, 0
        frame = Frame(MARGIN_X, BOTTOM, WIDTH, HEIGHT, leftPadding=0, rightPadding=0, topPadding=0, bottomPadding=0)
        self.addPageTemplates(PageTemplate("page", [frame], onPage=self._frame_of_page))

    def beforeDocument(self) -> None:
        at = datetime.fromtimestamp(self._report.seconds, UTC)
        self.canv.setDateFormatter(lambda *_: f"D:{at:%Y%m%d%H%M%S}+00'00'")

    def afterFlowable(self, flowable: Flowable) -> None:
        if isinstance(flowable, _Heading) and flowable.entry:
            title, depth = flowable.entry
            key = f"heading-{self._entries}"
            self._entries += 1
            self.canv.bookmarkPage(key, fit="XYZ", left=0, top=self.frame._y + flowable.height + 12)
            self.canv.addOutlineEntry(title, key, level=depth)

    def _frame_of_page(self, canvas: Canvas, _document: Any) -> None:
        report, right, top = self._report, A4[0] - MARGIN_X, A4[1] - 15 * mm
        canvas.saveState()
        canvas.setFillColor(QUIET)
        canvas.setStrokeColor(RULE)
        canvas.setLineWidth(0.6)
        canvas.setFont(BOLD, 8)
        canvas.drawRightString(right, top, report.notice)
        canvas.setFont(SANS, 8)
        canvas.drawString(MARGIN_X, top, _fitting(f"{report.title}: {report.name}", 0.6 * WIDTH, 8))
        canvas.line(MARGIN_X, top - 5, right, top - 5)
        canvas.line(MARGIN_X, 13.5 * mm, right, 13.5 * mm)
        canvas.setFont(SANS, 7)
        told = f"{report.software} · study {report.study}"
        canvas.drawString(MARGIN_X, 10 * mm, _fitting(told, 0.86 * WIDTH, 7))
        of = f"Page {canvas.getPageNumber()} of "
        canvas.drawRightString(right - stringWidth("000", SANS, 7), 10 * mm, of)
        canvas.translate(right - stringWidth("000", SANS, 7), 10 * mm)
        canvas.doForm(TOTAL)
        canvas.restoreState()


def _fitting(text: str, width: float, size: float) -> str:
    """As much of a line as fits."""
    shown = _shown(text)
    while stringWidth(shown, SANS, size) > width:
        shown = shown[:-2] + "…" if len(shown) > 2 else ""
    return shown
