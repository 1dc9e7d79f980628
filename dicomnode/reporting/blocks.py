"""What a report is made of. Both writers render these values in their order and add nothing of their own."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal

__all__ = ["Block", "Cell", "Chart", "Facts", "Line", "Paragraph", "Picture", "Section", "StudyReport", "Table",
           "Tone", "Verdict", "as_json", "clean", "mark", "number", "uid"]

#: good, wait, bad, run: as the states of the status page; uid: letters of one width; number: to the right.
Tone = Literal["", "good", "wait", "bad", "run", "uid", "number"]


def clean(text: object) -> str:
    """One line of characters that can be shown; what cannot (controls, halves of surrogate pairs) is U+FFFD.

    >>> clean("a\\n  b\\x00") == "a b\\ufffd"
    True
    """
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else "\ufffd" for c in line)


@dataclass(frozen=True)
class Cell:
    """A text, and how it is set."""

    text: str
    tone: Tone = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", clean(self.text))


def mark(text: object, tone: Tone) -> Cell:
    """A state: a word in the colour of what it means."""
    return Cell(str(text), tone)


def uid(text: object) -> Cell:
    return Cell(str(text), "uid")


def number(text: object) -> Cell:
    return Cell(str(text), "number")


def _cell(value: Cell | object) -> Cell:
    return value if isinstance(value, Cell) else Cell(str(value))


@dataclass(frozen=True)
class Paragraph:
    """Running text; `quiet`: an explanation that may be passed over."""

    kind: ClassVar[str] = "paragraph"
    text: str
    quiet: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", clean(self.text))


@dataclass(frozen=True)
class Facts:
    """Names and what they are, one below the other."""

    kind: ClassVar[str] = "facts"
    rows: tuple[tuple[str, Cell], ...]

    @classmethod
    def of(cls, rows: Iterable[tuple[str, Cell | object]]) -> Facts:
        """Rows without a text are left out."""
        cells = [(name, _cell(value)) for name, value in rows]
        return cls(tuple((name, cell) for name, cell in cells if cell.text))


@dataclass(frozen=True)
class Table:
    """`title` says what it holds; `columns` are (name, share of the width); every row has as many cells."""

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[tuple[str, float], ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of(cls, title: str, columns: Iterable[tuple[str, float]], rows: Iterable[Iterable[Cell | object]]) -> Table:
        """Raises ValueError where a row has other than one cell for each column."""
        names, cells = tuple(columns), tuple(tuple(_cell(value) for value in row) for row in rows)
        if any(len(row) != len(names) for row in cells):
            raise ValueError(f"table {title!r}: a row has not one cell for each of {len(names)} columns")
        return cls(title, names, cells)

    @property
    def numbers(self) -> tuple[bool, ...]:
        """Which columns hold figures: their heads stand to the right too."""
        return tuple(bool(self.rows) and all(row[k].tone == "number" for row in self.rows)
                     for k in range(len(self.columns)))


@dataclass(frozen=True)
class Picture:
    """A PNG of `size` (columns, rows) pixels that bears its title; `alt` says in words what it shows."""

    kind: ClassVar[str] = "picture"
    title: str
    alt: str
    png: bytes
    size: tuple[int, int]

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Line:
    """A line of a chart: `role` "before" or "after" decides colour and dashes."""

    name: str
    role: Literal["before", "after"]
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    """Lines over a common x axis."""

    kind: ClassVar[str] = "chart"
    title: str
    alt: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


Block = Paragraph | Facts | Table | Picture | Chart


@dataclass(frozen=True)
class Section:
    """A heading of its own; `level` 2 is a part of the report, 3 a part of that part."""

    title: str
    blocks: tuple[Block, ...]
    level: int = 2


@dataclass(frozen=True)
class Verdict:
    """What became of a series, for the reader with 20 seconds: a word, a sentence, and what to do ("": nothing)."""

    state: str
    tone: Tone
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", clean(self.text))
        object.__setattr__(self, "remedy", clean(self.remedy))


@dataclass(frozen=True)
class StudyReport:
    """The report of one study as it stood at `seconds` since 1970; `at`: the same on the clock of `zone`."""

    title: str
    study: str
    accession_number: str
    patient: str  # "" unless the site shows names
    at: str
    zone: str
    seconds: float
    node: str
    software: str
    notice: str  # "" where the site wants none
    verdicts: tuple[Verdict, ...]
    sections: tuple[Section, ...]

    @property
    def name(self) -> str:
        """How the study is called in headings: its accession number where it has one."""
        return clean(self.accession_number) or self.study


def as_json(value: Any) -> Any:
    """A report as plain JSON values; of a picture its size instead of its bytes."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: as_json(getattr(value, field.name)) for field in fields(value) if field.name != "png"}
        return {"kind": value.kind, **plain} if hasattr(value, "kind") else plain
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return value
