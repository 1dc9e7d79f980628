"""Pictures for quality control, drawn from looks: MIPs at one scale, kernel, uptake regions with profiles, residual.

For the Secondary Capture series, the HTML report and the PDF. Black on white as PET MIPs are read; every axis in mm of
the patient's frame (LPS); sizes in pixels, so that letters stay legible on a PACS viewer that shows a picture at half
its size. The same looks give the same bytes. Loads matplotlib.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image as PngImage

from dicomnode.looks import Looks, extent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FOOTER", "QcPicture", "draw"]

FOOTER = "Research use, not for diagnosis"
WIDTH = 1400  # pixels
DPI = 100
EDGE = 36
INK, QUIET, LINE = "#1b1f24", "#57606a", "#d0d7de"
BEFORE, AFTER, MARK = "#c2410c", "#1d4e89", "#b42318"
TITLE, HEAD, TEXT, SMALL = 18.0, 14.5, 12.5, 11.0  # points, 1.4 pixels each
AIR = 0.02  # of the grey scale: what is darker everywhere is cut off at the sides
AXIS_NAMES = {"left-right": "right – left", "front-back": "front – back", "head-foot": "head – foot"}

Picture = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class QcPicture:
    """name "mips", "kernel", "regions" or "residual"; title for people; rgb (rows, columns, 3) uint8."""

    name: str
    title: str
    rgb: NDArray[np.uint8]

    def png(self) -> bytes:
        """The picture as a PNG file."""
        held = io.BytesIO()
        PngImage.fromarray(self.rgb).save(held, format="png", optimize=True)
        return held.getvalue()


def draw(looks: Looks, heading: str) -> list[QcPicture]:
    """The pictures, each under `heading`; that of the kernel only where there is one, that of regions likewise."""
    found = [_mips(looks, heading)]
    if looks.measures["kernel"] is not None:
        found.append(_kernel(looks, heading))
    if looks.measures["regions"]:
        found.append(_regions(looks, heading))
    return [*found, _residual(looks, heading)]


class _Sheet:
    """A white page of WIDTH pixels; places are (left, top, width, height) in pixels from its upper left corner."""

    def __init__(self, title: str, heading: str, body: int) -> None:
        lines = textwrap.wrap(heading, 120)[:2] or [""]
        self.start = 74 + 24 * len(lines)
        self.height = self.start + body + 52
        self.figure = Figure(figsize=(WIDTH / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        self.write(EDGE, 24, title, size=TITLE, weight="bold")
        for number, line in enumerate(lines):
            self.write(EDGE, 60 + 24 * number, line, colour=QUIET)
        self.write(WIDTH / 2, self.height - 36, FOOTER, size=TEXT, colour=MARK, weight="bold", ha="center")

    def write(self, x: float, y: float, text: str, *, size: float = TEXT, colour: str = INK, weight: str = "normal",
              ha: str = "left") -> None:
        self.figure.text(x / WIDTH, 1 - y / self.height, text, fontsize=size, color=colour, fontweight=weight, ha=ha,
                         va="top")

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        place = (left / WIDTH, 1 - (top + height) / self.height, width / WIDTH, height / self.height)
        panel = self.figure.add_axes(place)
        panel.tick_params(labelsize=SMALL, colors=QUIET, length=4)
        for spine in panel.spines.values():
            spine.set_color(LINE)
        return panel

    def bar(self, image: Any, left: float, top: float, height: float, label: str, **options: Any) -> None:
        bar = self.figure.colorbar(image, cax=self.panel(left, top, 18, height), **options)
        bar.set_label(label, fontsize=TEXT, color=INK)
        bar.outline.set_edgecolor(LINE)
        bar.ax.tick_params(labelsize=SMALL, colors=QUIET)

    def picture(self, name: str, title: str) -> QcPicture:
        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        return QcPicture(name, title, np.array(np.asarray(canvas.buffer_rgba())[..., :3]))


# --- projections


@dataclass(frozen=True)
class _View:
    """One projection to be shown: LPS mm that are seen, (left, right, bottom, top)."""

    plane: str
    seen: tuple[float, float, float, float]

    @property
    def width_mm(self) -> float:
        return abs(self.seen[1] - self.seen[0])

    @property
    def height_mm(self) -> float:
        return abs(self.seen[3] - self.seen[2])


def _views(looks: Looks) -> list[_View]:
    """Coronal and sagittal without the air around, both over the same part of the head-foot axis."""
    return [_View(plane, _seen(looks, plane)) for plane in ("coronal", "sagittal")]


def _seen(looks: Looks, plane: str, margin_mm: float = 12.0) -> tuple[float, float, float, float]:
    image = looks.arrays[f"before.{plane}"]
    left, right, bottom, top = extent(looks.measures, "before", plane, _shape(image))
    columns = np.flatnonzero(image.max(axis=0) > AIR * looks.measures["top"])
    if not len(columns):
        return left, right, bottom, top
    step = (right - left) / image.shape[1]
    first, last = left + columns[0] * step, left + (columns[-1] + 1) * step
    return max(left, first - margin_mm), min(right, last + margin_mm), bottom, top


def _shape(image: Picture) -> tuple[int, int]:
    rows, columns = image.shape
    return rows, columns


def _row(views: Sequence[_View], *, most: int, gap: int = 84, right: int = 130) -> tuple[float, float, list[float]]:
    """(pixels per mm, height in pixels, left edges) of panels side by side at one scale."""
    room = WIDTH - EDGE - gap * len(views) - right
    scale = min(room / sum(view.width_mm for view in views), most / max(view.height_mm for view in views))
    left, edges = float(EDGE + gap), []
    spare = (room - scale * sum(view.width_mm for view in views)) / len(views)
    for view in views:
        edges.append(left + spare / 2)
        left += scale * view.width_mm + gap + spare
    return scale, scale * max(view.height_mm for view in views), edges


def _show(panel: Axes, looks: Looks, name: str, view: _View, **options: Any) -> Any:
    """The picture `name` of the view in a panel, in mm."""
    image = looks.arrays[f"{name}.{view.plane}"]
    grid = "after" if name in ("after", "uncertainty") else "before"
    left, right, bottom, top = extent(looks.measures, grid, view.plane, _shape(image))
    shown = panel.imshow(image, extent=(left, right, bottom, top), interpolation="nearest", aspect="auto", **options)
    panel.set_xlim(view.seen[0], view.seen[1])
    panel.set_ylim(view.seen[2], view.seen[3])
    panel.set_xlabel("x, mm (right – left)" if view.plane == "coronal" else "y, mm (front – back)", fontsize=SMALL,
                     color=QUIET)
    panel.locator_params(axis="x", nbins=4)
    return shown


def _mips(looks: Looks, heading: str) -> QcPicture:
    measures = looks.measures
    coronal, sagittal = _views(looks)
    shown = [("before", coronal), ("after", coronal), ("before", sagittal), ("after", sagittal)]
    scale, height, edges = _row([view for _, view in shown], most=1000)
    title = "Maximum intensity projections, before and after, at one scale"
    sheet = _Sheet(title, heading, round(height) + 150)
    for (name, view), left in zip(shown, edges, strict=True):
        panel = sheet.panel(left, sheet.start + 62, scale * view.width_mm, height)
        image = _show(panel, looks, name, view, cmap="gray_r", vmin=0, vmax=measures["top"])
        panel.set_title(f"{'Before' if name == 'before' else 'After'}, {view.plane}", fontsize=HEAD, color=INK,
                        fontweight="bold", pad=10)
        if left == edges[0]:
            panel.set_ylabel("z, mm (foot – head)", fontsize=SMALL, color=QUIET)
        _mark(panel, measures["regions"], view)
    over = any(looks.arrays[f"{name}.coronal"].max() > measures["top"] for name in ("before", "after"))
    sheet.bar(image, WIDTH - EDGE - 84, sheet.start + 62, min(height, 420), measures["unit"],
              extend="max" if over else "neither")
    return sheet.picture("mips", title)


def _mark(panel: Axes, regions: Sequence[Mapping[str, Any]], view: _View) -> None:
    """The number of each region beside it."""
    for region in regions:
        x, y, z = region["centre_mm"]
        across = x if view.plane == "coronal" else y
        panel.annotate(region["label"], (across, z), xytext=(13, 0), textcoords="offset points", fontsize=SMALL,
                       color=MARK, fontweight="bold", va="center",
                       arrowprops={"arrowstyle": "-", "color": MARK, "lw": 0.9, "shrinkA": 0, "shrinkB": 4})


def _residual(looks: Looks, heading: str) -> QcPicture:
    measures = looks.measures
    coronal, sagittal = _views(looks)
    told = "uncertainty.coronal" in looks.arrays
    shown = [("residual", coronal), ("residual", sagittal)]
    shown += [("uncertainty", coronal), ("uncertainty", sagittal)] if told else []
    scale, height, edges = _row([view for _, view in shown], most=1000, gap=96, right=230 if told else 130)
    title = "Residual and uncertainty" if told else "Residual"
    sheet = _Sheet(title, heading, round(height) + 200)
    limits = _limits(looks)
    for number, ((name, view), left) in enumerate(zip(shown, edges, strict=True)):
        left += 110 if number > 1 else 0
        panel = sheet.panel(left, sheet.start + 62, scale * view.width_mm, height)
        image = _show(panel, looks, name, view, **limits[name])
        panel.set_title(f"{name.capitalize()}, {view.plane}", fontsize=HEAD, color=INK, fontweight="bold", pad=10)
        if number == 0:
            panel.set_ylabel("z, mm (foot – head)", fontsize=SMALL, color=QUIET)
        if number % 2:
            label = f"source minus model, {measures['unit']}" if name == "residual" else "standard deviation, %"
            sheet.bar(image, left + scale * view.width_mm + 20, sheet.start + 62, min(height, 420), label,
                      extend="both" if name == "residual" else "max")
    sheet.write(EDGE, sheet.height - 100, _residual_words(measures), colour=QUIET)
    return sheet.picture("residual", title)


def _limits(looks: Looks) -> dict[str, dict[str, Any]]:
    off = np.abs(looks.arrays["residual.coronal"])
    most = max(float(np.percentile(off, 99.5)), 1e-3 * looks.measures["top"])
    return {"residual": {"cmap": "RdBu_r", "vmin": -most, "vmax": most},
            "uncertainty": {"cmap": "magma_r", "vmin": 0, "vmax": 50}}


def _residual_words(measures: Mapping[str, Any]) -> str:
    words = (f"Source minus {measures['residual_of']}; the value farthest from zero along each ray. "
             f"Root mean square {measures['residual_rms']:.3g} {measures['unit']}.")
    if measures["uncertainty"]:
        words += f" Median uncertainty {measures['uncertainty']['median_percent']:.0f} % of what the MIP shows."
    return words


# --- kernel


def _kernel(looks: Looks, heading: str) -> QcPicture:
    kernel = looks.measures["kernel"]
    title = "Kernel: the blur that was estimated"
    sheet = _Sheet(title, heading, 860)
    names = ("slices", "rows", "columns")
    for axis in range(3):
        down, across = (other for other in range(3) if other != axis)
        projection = looks.arrays[f"kernel.{'dhw'[axis]}"]
        half = [n * kernel["spacing_mm"][other] / 2 for n, other in zip(projection.shape, (down, across), strict=True)]
        side = 300 / max(half)
        left = EDGE + 90 + axis * 440
        panel = sheet.panel(left, sheet.start + 56, side * half[1], side * half[0])
        panel.imshow(projection, cmap="gray_r", interpolation="nearest", aspect="auto", vmin=0,
                     extent=(-half[1], half[1], half[0], -half[0]))
        panel.set_title(f"Seen along the {names[axis]}", fontsize=HEAD, color=INK, fontweight="bold", pad=10)
        panel.set_xlabel(f"mm along the {names[across]}", fontsize=SMALL, color=QUIET)
        panel.set_ylabel(f"mm along the {names[down]}", fontsize=SMALL, color=QUIET)
        _kernel_line(sheet.panel(left, sheet.start + 490, 300, 290), kernel, axis, names[axis])
    return sheet.picture("kernel", title)


def _kernel_line(panel: Axes, kernel: Mapping[str, Any], axis: int, name: str) -> None:
    """The values through the maximum, and the width at half of it."""
    line, step, width = kernel["lines"][axis], kernel["spacing_mm"][axis], kernel["fwhm_mm"][axis]
    mm = (np.arange(len(line)) - len(line) // 2) * step
    panel.plot(mm, line, "o-", color=AFTER, lw=2, ms=5)
    panel.axhline(max(line) / 2, color=LINE, lw=1.2, zorder=0)
    panel.set_ylim(0, max(line) * 1.08)
    panel.set_title(f"FWHM {width:.2f} mm", fontsize=HEAD, color=INK, fontweight="bold", pad=8)
    panel.set_xlabel(f"mm along the {name}", fontsize=SMALL, color=QUIET)
    panel.spines[["top", "right"]].set_visible(False)


# --- regions and profiles


def _regions(looks: Looks, heading: str) -> QcPicture:
    measures = looks.measures
    rows = list(dict.fromkeys(profile["region"] for profile in measures["profiles"]))
    table = 92 + 34 * len(measures["regions"])
    title = "Largest uptakes: the same regions before and after"
    sheet = _Sheet(title, heading, table + 290 * len(rows) + 40)
    _table(sheet, measures)
    for number, label in enumerate(rows):
        lines = [profile for profile in measures["profiles"] if profile["region"] == label]
        for place, profile in enumerate(lines):
            panel = sheet.panel(EDGE + 70 + place * 445, sheet.start + table + 42 + 290 * number, 370, 190)
            _profile(panel, profile, measures["unit"], legend=number == 0 and place == 0)
    return sheet.picture("regions", title)


COLUMNS = (("region", 0), ("volume, mL", 110), ("from, %", 240), ("x, y, z, mm", 350), ("max", 620), ("peak", 870),
           ("mean", 1120))


def _table(sheet: _Sheet, measures: Mapping[str, Any]) -> None:
    top = sheet.start + 14
    for text, place in COLUMNS:
        told = f"{measures['unit']} {text}" if text in ("max", "peak", "mean") else text
        sheet.write(EDGE + place, top, told, colour=QUIET, weight="bold")
    for number, region in enumerate(measures["regions"], start=1):
        y = top + 34 * number
        centre = ", ".join(f"{value:.0f}" for value in region["centre_mm"])
        for (_, place), text in zip(COLUMNS, (region["label"], f"{region['volume_ml']:.2f}",
                                              f"{100 * region['threshold']:.0f}", centre)):
            sheet.write(EDGE + place, y, text)
        for key, place in COLUMNS[4:]:
            sheet.write(EDGE + place, y, _change(region["before"][key], region["after"][key]))


def _change(before: float, after: float) -> str:
    share = f" ({100 * (after / before - 1):+.0f} %)" if before > 0 else ""
    return f"{_number(before)} → {_number(after)}{share}"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _profile(panel: Axes, profile: Mapping[str, Any], unit: str, *, legend: bool) -> None:
    for name, colour in (("before", BEFORE), ("after", AFTER)):
        panel.plot(profile[f"{name}_mm"], profile[name], ".-", color=colour, lw=2, ms=5, label=name)
    panel.set_ylim(min(0.0, panel.get_ylim()[0]), None)
    panel.set_title(f"Region {profile['region']}: {AXIS_NAMES[profile['axis']]}", fontsize=TEXT, color=INK,
                    fontweight="bold", loc="left")
    panel.set_xlabel("mm from its centre", fontsize=SMALL, color=QUIET)
    panel.set_ylabel(unit, fontsize=SMALL, color=QUIET)
    panel.spines[["top", "right"]].set_visible(False)
    if legend:
        panel.legend(fontsize=SMALL, frameon=False, loc="upper right")
