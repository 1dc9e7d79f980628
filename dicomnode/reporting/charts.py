"""A chart as inline SVG and on a PDF page, both from one layout: what is drawn where is decided once.

SVG colours come from classes of report.css, so that they follow light and dark; "before" is dashed: it can be told from
"after" without colours too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

from dicomnode.reporting.blocks import Chart

if TYPE_CHECKING:
    from reportlab.pdfgen.canvas import Canvas

__all__ = ["HEIGHT", "WIDTH", "paint", "svg", "ticks"]

WIDTH, HEIGHT = 240.0, 150.0  # points
LEFT, RIGHT, TOP, BOTTOM = 34.0, 8.0, 17.0, 28.0
FONT = 8.0
COLOURS = {"before": "#c13f52", "after": "#1d5ea8", "grid": "#d5dae1", "label": "#566173"}
DASHES = {"before": ([4.0, 2.5],)}


@dataclass(frozen=True)
class _Stroke:
    """A line through points, x to the right and y down from the upper left corner."""

    role: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class _Label:
    x: float
    y: float
    anchor: Literal["start", "middle", "end"]
    role: str
    text: str


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from `low` to `high`, steps of 1, 2 or 5 times a power of ten.

    >>> ticks(0.0, 23.0)
    [0.0, 5.0, 10.0, 15.0, 20.0]
    """
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _layout(chart: Chart) -> tuple[list[_Stroke], list[_Label]]:
    xs = [x for line in chart.lines for x in line.x] or [0.0, 1.0]
    ys = [y for line in chart.lines for y in line.y] or [0.0, 1.0]
    x0, x1, y0, y1 = min(xs), max(xs), min(0.0, *ys), max(ys)
    y1 = y1 if y1 > y0 else y0 + 1.0
    x1 = x1 if x1 > x0 else x0 + 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM))

    strokes, labels = [], []
    for y in ticks(y0, y1):
        strokes.append(_Stroke("grid", (at(x0, y), at(x1, y))))
        labels.append(_Label(LEFT - 5, at(x0, y)[1] + FONT / 3, "end", "label", f"{y:g}"))
    for x in ticks(x0, x1, 7):
        strokes.append(_Stroke("grid", (at(x, y0), at(x, y1))))
        labels.append(_Label(at(x, y0)[0], HEIGHT - BOTTOM + FONT + 3, "middle", "label", f"{x:g}"))
    labels.append(_Label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "middle", "label", chart.x_label))
    labels.append(_Label(4, FONT + 1, "start", "label", chart.y_label))
    for k, line in enumerate(chart.lines):
        strokes.append(_Stroke(line.role, tuple(at(x, y) for x, y in zip(line.x, line.y, strict=True))))
        end = WIDTH - RIGHT - 54 * (len(chart.lines) - 1 - k)
        strokes.append(_Stroke(line.role, ((end - 52, FONT - 2), (end - 34, FONT - 2))))
        labels.append(_Label(end - 30, FONT + 1, "start", line.role, line.name))
    return strokes, labels


def svg(chart: Chart) -> str:
    """An <svg> element for inlining; every text of the chart is escaped."""
    strokes, labels = _layout(chart)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(chart.alt)}">']
    for stroke in strokes:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in stroke.points)
        parts.append(f'<polyline class="{stroke.role}" fill="none" points="{points}"/>')
    for label in labels:
        parts.append(f'<text class="{label.role}" x="{label.x:.1f}" y="{label.y:.1f}" font-size="{FONT:g}" '
                     f'text-anchor="{label.anchor}">{escape(label.text)}</text>')
    return "".join([*parts, "</svg>"])


def paint(chart: Chart, canvas: Canvas, *, font: str) -> None:
    """The same on a PDF canvas, WIDTH by HEIGHT from its origin, in a font that is registered."""
    strokes, labels = _layout(chart)
    canvas.setLineJoin(1)
    for stroke in strokes:
        canvas.setStrokeColor(COLOURS[stroke.role])
        canvas.setLineWidth(0.4 if stroke.role == "grid" else 1.3)
        canvas.setDash(*DASHES.get(stroke.role, ((),)))
        line = canvas.beginPath()
        for k, (x, y) in enumerate(stroke.points):
            (line.lineTo if k else line.moveTo)(round(x, 1), round(HEIGHT - y, 1))
        canvas.drawPath(line)
    draw = {"start": canvas.drawString, "middle": canvas.drawCentredString, "end": canvas.drawRightString}
    canvas.setFont(font, FONT)
    for label in labels:
        canvas.setFillColor(COLOURS[label.role])
        draw[label.anchor](label.x, HEIGHT - label.y, label.text)
