"""Line plots and scales as inline SVG: small, sharp at any size, in the page's own colours by class, readable in print.

Before and after differ by dash and by a label at their line, not by colour alone. No script and no style attribute: a
strict Content-Security-Policy lets them pass. The numbers stand in a table beside each plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

from dicomnode.web.palette import stops

__all__ = ["Line", "line_plot", "scale_bar", "ticks"]

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 42


@dataclass(frozen=True)
class Line:
    """One line: its name, which is also its class ("before", "after", "kernel"), and its points."""

    name: str
    label: str
    x: Sequence[float]
    y: Sequence[float]

    def points(self) -> list[tuple[float, float]]:
        return list(zip(self.x, self.y, strict=True))


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`.

    >>> ticks(0, 23)
    [0.0, 5.0, 10.0, 15.0, 20.0]
    >>> ticks(-7, 7)
    [-5.0, 0.0, 5.0]
    """
    span = high - low
    if not span > 0:
        return [low]
    rough = span / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


def line_plot(lines: Sequence[Line], *, x_label: str, y_label: str, title: str, mark_x: Sequence[float] = (),
              mark_label: str = "") -> Markup:
    """A plot of lines over one pair of axes, y from zero (or below, where values are).

    mark_x   two places between which `mark_label` is written at half height: a full width at half maximum.

    Raises ValueError where there is nothing to draw.
    """
    if not any(len(line.x) for line in lines):
        raise ValueError(f"{title}: no points to draw")
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(0.0, min(ys)), max(ys) * 1.12 or 1.0

    def px(x: float) -> float:
        return LEFT + (x - x0) / ((x1 - x0) or 1.0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in ticks(y0, y1):
        parts.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x0, x1, 7):
        parts.append(f'<path class="tickmark" d="M{px(x):.1f} {HEIGHT - BOTTOM}v4"/>'
                     f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
                 f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">'
                 f'{escape(x_label)}</text>'
                 f'<text class="name" transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" '
                 f'text-anchor="middle">{escape(y_label)}</text>')
    for line in lines:
        points = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points())
        parts.append(f'<polyline class="line {escape(line.name)}" points="{points}"/>')
    parts += _labels(lines)
    if len(mark_x) == 2:
        left, right = px(mark_x[0]), px(mark_x[1])
        half = py(max(ys) / 2)
        parts.append(f'<path class="width" d="M{left:.1f} {half - 5:.1f}v10M{left:.1f} {half:.1f}H{right:.1f}'
                     f'M{right:.1f} {half - 5:.1f}v10"/><text class="label" x="{min(right + 8, WIDTH - RIGHT):.1f}" '
                     f'y="{half + 4:.1f}" text-anchor="start">{escape(mark_label)}</text>')
    return Markup("".join(parts) + "</svg>")


def _labels(lines: Sequence[Line]) -> list[str]:
    """Names with a piece of their line, in a row at the top right."""
    named = [line for line in lines if line.label]
    parts, right = [], WIDTH - RIGHT
    for line in reversed(named):
        width = 7 * len(line.label)
        parts.append(f'<path class="line {escape(line.name)}" d="M{right - width - 34} {TOP + 2}h28"/>'
                     f'<text class="label" x="{right}" y="{TOP + 6}" text-anchor="end">{escape(line.label)}</text>')
        right -= width + 46
    return parts


def scale_bar(palette: str, top: float, unit: str, *, signed: bool = False, identity: str = "scale") -> Markup:
    """The colours of a palette from zero (or -top) to `top`, with numbers and the unit."""
    low = -top if signed else 0.0
    gradient = "".join(f'<stop offset="{at}" stop-color="{colour}"/>' for at, colour in stops(palette, 17))
    texts = "".join(f'<text class="tick" x="{4 + 192 * share:.0f}" y="28" text-anchor="{anchor}">'
                    f'{low + share * (top - low):.4g}</text>'
                    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")))
    return Markup(f'<svg class="scale" viewBox="0 0 250 34" role="img" aria-label="Scale from {low:g} to {top:g} '
                  f'{escape(unit)}"><defs><linearGradient id="{escape(identity)}">{gradient}</linearGradient></defs>'
                  f'<rect x="4" y="3" width="192" height="12" class="frame" fill="url(#{escape(identity)})"/>{texts}'
                  f'<text class="label" x="204" y="14">{escape(unit)}</text></svg>')
