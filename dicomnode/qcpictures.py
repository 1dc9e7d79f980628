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
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image as PngImage

from dicomnode.looks import Looks, extent
from dicomnode.wording import AXES, change, uptake, volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FOOTER", "QcPicture", "draw"]

FOOTER = "Research use, not for diagnosis"  # unless the site turns it off (derived.research_use)
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


def draw(looks: Looks, heading: str, *, regions: bool = True, footer: str = FOOTER) -> list[QcPicture]:
    """The pictures, each under `heading`; that of the kernel only where there is one, that of regions likewise.

    regions   False: without that of the regions, for a page that has them as a table and charts.
    footer    stands below each; "" for none.
    """
    frame = _Frame(heading, footer)
    found = [_mips(looks, frame)]
    if looks.measures["kernel"] is not None:
        found.append(_kernel(looks, frame))
    if regions and looks.measures["regions"]:
        found.append(_regions(looks, frame))
    return [*found, _residual(looks, frame)]


@dataclass(frozen=True)
class _Frame:
    """What every picture bears: its heading, and the words below."""

    heading: str
    footer: str


class _Sheet:
    """A white page of WIDTH pixels; places are (left, top, width, height) in pixels from its upper left corner."""

    def __init__(self, title: str, frame: _Frame, body: int) -> None:
        lines = textwrap.wrap(frame.heading, 130, max_lines=2, placeholder=" …") or [""]
        self.start = 74 + 24 * len(lines)
        self.height = self.start + body + 52
        self.figure = Figure(figsize=(WIDTH / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        self.write(EDGE, 24, title, size=TITLE, weight="bold")
        for number, line in enumerate(lines):
            self.write(EDGE, 60 + 24 * number, line, colour=QUIET)
        self.write(WIDTH / 2, self.height - 36, frame.footer, size=TEXT, colour=MARK, weight="bold", ha="center")

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


@dataclass(frozen=True)
class _Place:
    """A panel: what it shows, pixels from the left and from the start of the sheet, and what belongs to it.

    upright  it tells the mm of its own vertical axis;  bar  a colour bar stands to its right.
    """

    name: str
    view: _View
    left: float
    top: float
    width: float
    height: float
    upright: bool
    bar: bool


Pair = tuple[tuple[str, _View], tuple[str, _View]]


def _two_views(looks: Looks) -> tuple[bool, _View, _View]:
    """A tall field is seen from the front and from the side, a flat one, such as a phantom's, from above and the front.

    Returns (whether it is tall, first view, second view).
    """
    front, above = _View("coronal", _seen(looks, "coronal")), _View("axial", _seen(looks, "axial"))
    if front.height_mm > front.width_mm:
        return True, front, _View("sagittal", _seen(looks, "sagittal"))
    return False, above, front


def _placed(pairs: Sequence[Pair], *, one_row: bool, bar_each: bool) -> list[_Place]:
    """Pairs of panels side by side, or one below the other, all at one scale; a bar behind each pair or each row."""
    rows = [list(pairs)] if one_row else [[pair] for pair in pairs]
    scale = min(min((WIDTH - 2 * EDGE - _gaps(row, bar_each)) / sum(view.width_mm for pair in row for _, view in pair)
                    for row in rows),
                (1000 if one_row else 620) / max(view.height_mm for pair in pairs for _, view in pair))
    places: list[_Place] = []
    top = 44.0
    for row in rows:
        wide = _gaps(row, bar_each) + scale * sum(view.width_mm for pair in row for _, view in pair)
        left = (WIDTH - wide) / 2
        for number, pair in enumerate(row):
            left += AXIS_GAP if number == 0 else 0
            for place, (name, view) in enumerate(pair):
                own = (place == 1 and not _alike(pair)) or (place == 0 and number == 0)
                left += (PANEL_GAP if _alike(pair) else AXIS_GAP) if place else 0
                bar = place == 1 and (bar_each or number == len(row) - 1)
                places.append(_Place(name, view, left, top, scale * view.width_mm, scale * view.height_mm, own, bar))
                left += scale * view.width_mm
            left += BAR_GAP if bar_each else PAIR_GAP
        top = max(place.top + place.height for place in places) + ROW_GAP
    return places


AXIS_GAP, PANEL_GAP, PAIR_GAP, BAR_GAP = 84, 20, 36, 130


def _alike(pair: Pair) -> bool:
    """Whether both have the same vertical axis."""
    return (pair[0][1].plane == "axial") == (pair[1][1].plane == "axial")


def _gaps(row: Sequence[Pair], bar_each: bool) -> float:
    """What lies between and beside the panels of a row."""
    inner = sum(PANEL_GAP if _alike(pair) else AXIS_GAP for pair in row)
    return AXIS_GAP + inner + (len(row) - 1) * (BAR_GAP if bar_each else PAIR_GAP) + BAR_GAP


ROW_GAP = 116  # below a panel: its axis, and the title of the next


def _bottom(places: Sequence[_Place]) -> float:
    return max(place.top + place.height for place in places) + 72


def _seen(looks: Looks, plane: str, margin_mm: float = 12.0) -> tuple[float, float, float, float]:
    """What a picture of the plane shows: all from head to foot, without the air around."""
    image = looks.arrays[f"before.{plane}"]
    left, right, bottom, top = extent(looks.measures, "before", plane, _shape(image))
    left, right = _without_air(image.max(axis=0) > AIR * looks.measures["top"], left, right, margin_mm)
    if plane == "axial":
        top, bottom = _without_air(image.max(axis=1) > AIR * looks.measures["top"], top, bottom, margin_mm)
    return left, right, bottom, top


def _without_air(body: NDArray[np.bool_], start: float, end: float, margin_mm: float) -> tuple[float, float]:
    """The part of the line from start to end mm, one step for each element, that holds all of the body."""
    inside = np.flatnonzero(body)
    if not len(inside):
        return start, end
    step = (end - start) / len(body)
    margin = int(np.ceil(margin_mm / abs(step)))
    return (start + step * max(0, int(inside[0]) - margin),
            start + step * min(len(body), int(inside[-1]) + 1 + margin))


def _shape(image: Picture) -> tuple[int, int]:
    rows, columns = image.shape
    return rows, columns


def _show(sheet: _Sheet, looks: Looks, place: _Place, **options: Any) -> tuple[Axes, Any]:
    """The picture in its panel, in mm; (panel, image)."""
    view = place.view
    panel = sheet.panel(place.left, sheet.start + place.top, place.width, place.height)
    picture = looks.arrays[f"{place.name}.{view.plane}"]
    if place.name == "uncertainty":  # nothing is told of what is dark
        picture = np.where(picture > 0, picture, np.float32(np.nan))
    grid = "after" if place.name in ("after", "uncertainty") else "before"
    where = extent(looks.measures, grid, view.plane, _shape(picture))
    image = panel.imshow(picture, extent=where, interpolation="nearest", aspect="auto", **options)
    panel.set_xlim(view.seen[0], view.seen[1])
    panel.set_ylim(view.seen[2], view.seen[3])
    panel.set_xlabel("y, mm (front – back)" if view.plane == "sagittal" else "x, mm (right – left)", fontsize=SMALL,
                     color=QUIET)
    panel.locator_params(axis="x", nbins=5)
    panel.tick_params(axis="y", labelleft=place.upright)
    if place.upright:
        panel.set_ylabel("y, mm (back – front)" if view.plane == "axial" else "z, mm (foot – head)", fontsize=SMALL,
                         color=QUIET)
    panel.set_title(f"{place.name.capitalize()}, {view.plane}", fontsize=HEAD, color=INK, fontweight="bold", pad=10)
    return panel, image


def _bar(sheet: _Sheet, place: _Place, image: Any, label: str, extend: str) -> None:
    """The scale, to the right of a panel."""
    sheet.bar(image, place.left + place.width + 24, sheet.start + place.top, min(place.height, 420), label,
              extend=extend)


def _mips(looks: Looks, frame: _Frame) -> QcPicture:
    top, unit = looks.measures["top"], looks.measures["unit"]
    one_row, *views = _two_views(looks)
    places = _placed([(("before", view), ("after", view)) for view in views], one_row=one_row, bar_each=False)
    title = "Maximum intensity projections, before and after, at one scale"
    sheet = _Sheet(title, frame, round(_bottom(places)))
    over = any(looks.arrays[f"{name}.coronal"].max() > top for name in ("before", "after"))
    for place in places:
        panel, image = _show(sheet, looks, place, cmap="gray_r", vmin=0, vmax=top)
        if place.view.plane == places[0].view.plane:
            _mark(panel, looks.measures["regions"], place.view)
        if place.bar:
            _bar(sheet, place, image, unit, "max" if over else "neither")
    return sheet.picture("mips", title)


def _mark(panel: Axes, regions: Sequence[Mapping[str, Any]], view: _View) -> None:
    """The number of each region beside it, on a white rim that keeps it legible on what is dark."""
    rim = [withStroke(linewidth=3, foreground="white")]
    low, high = sorted(view.seen[2:])
    edge = view.height_mm / 60
    for region in regions:
        x, y, z = region["centre_mm"]
        down = min(max(y if view.plane == "axial" else z, low + edge), high - edge)
        panel.annotate(region["label"], (x, down), xytext=(11, 0),
                       textcoords="offset points", fontsize=SMALL, color=MARK, fontweight="bold", va="center",
                       path_effects=rim)


def _residual(looks: Looks, frame: _Frame) -> QcPicture:
    told = "uncertainty.coronal" in looks.arrays
    one_row, first, second = _two_views(looks)
    names = ("residual", "uncertainty") if told else ("residual",)
    places = _placed([((name, first), (name, second)) for name in names], one_row=one_row, bar_each=True)
    title = "Residual and uncertainty" if told else "Residual"
    words = _residual_words(looks.measures)
    sheet = _Sheet(title, frame, round(_bottom(places)) + 24 * len(words) + 10)
    limits = _limits(looks)
    for place in places:
        _, image = _show(sheet, looks, place, **limits[place.name])
        if place.bar:
            signed = place.name == "residual"
            _bar(sheet, place, image, looks.measures["unit"] if signed else "%", "both" if signed else "max")
    for number, line in enumerate(words):
        sheet.write(EDGE, sheet.start + _bottom(places) + 8 + 24 * number, line, colour=QUIET)
    return sheet.picture("residual", title)


def _limits(looks: Looks) -> dict[str, dict[str, Any]]:
    off = np.abs(looks.arrays["residual.coronal"])
    most = max(float(np.percentile(off, 99.5)), 1e-3 * looks.measures["top"])
    return {"residual": {"cmap": "RdBu_r", "vmin": -most, "vmax": most},
            "uncertainty": {"cmap": "magma_r", "vmin": 0, "vmax": 50}}


def _residual_words(measures: Mapping[str, Any]) -> list[str]:
    words = [f"Residual: source minus {measures['residual_of']}, the value farthest from zero along each ray; root "
             f"mean square {measures['residual_rms']:.3g} {measures['unit']}.",
             "Noise is to be expected; the outline of an organ or lesion is what the kernel does not explain."]
    if measures["uncertainty"]:
        words.append("Uncertainty: standard deviation of the voxel that the MIP shows, in percent of it, where it is "
                     f"bright; median {measures['uncertainty']['median_percent']:.0f} %.")
    return words


# --- kernel


def _kernel(looks: Looks, frame: _Frame) -> QcPicture:
    kernel = looks.measures["kernel"]
    title = "Kernel: the blur that was taken out"
    sheet = _Sheet(title, frame, 830)
    names = ("slices", "rows", "columns")
    reach = max(len(line) * step / 2 for line, step in zip(kernel["lines"], kernel["spacing_mm"], strict=True))
    for axis in range(3):
        down, across = (other for other in range(3) if other != axis)
        projection = looks.arrays[f"kernel.{'dhw'[axis]}"]
        half = [n * kernel["spacing_mm"][other] / 2 for n, other in zip(projection.shape, (down, across), strict=True)]
        left = EDGE + 90 + axis * 440
        panel = sheet.panel(left, sheet.start + 44, 320, 320)
        panel.imshow(projection, cmap="gray_r", interpolation="nearest", aspect="auto", vmin=0,
                     extent=(-half[1], half[1], half[0], -half[0]))
        panel.set(xlim=(-reach, reach), ylim=(reach, -reach))
        panel.set_title(f"Summed over the {names[axis]}", fontsize=HEAD, color=INK, fontweight="bold", pad=10)
        panel.set_xlabel(f"mm {AXES[across]}", fontsize=SMALL, color=QUIET)
        panel.set_ylabel(f"mm {AXES[down]}", fontsize=SMALL, color=QUIET)
        _kernel_line(sheet.panel(left, sheet.start + 486, 320, 280), kernel, axis, reach)
    return sheet.picture("kernel", title)


def _kernel_line(panel: Axes, kernel: Mapping[str, Any], axis: int, reach: float) -> None:
    """The values through the maximum, and the width at half of it."""
    line, step, width = kernel["lines"][axis], kernel["spacing_mm"][axis], kernel["fwhm_mm"][axis]
    mm = (np.arange(len(line)) - len(line) // 2) * step
    panel.plot(mm, line, "o-", color=AFTER, lw=2, ms=5)
    panel.axhline(max(line) / 2, color=QUIET, lw=1.2, ls="--", zorder=0)
    panel.set(xlim=(-reach, reach), ylim=(0, max(line) * 1.08))
    panel.set_title(f"FWHM {width:.2f} mm", fontsize=HEAD, color=INK, fontweight="bold", pad=8)
    panel.set_xlabel(f"mm {AXES[axis]}", fontsize=SMALL, color=QUIET)
    if axis == 0:
        panel.set_ylabel("share of the activity", fontsize=SMALL, color=QUIET)
    panel.spines[["top", "right"]].set_visible(False)


# --- regions and profiles


def _regions(looks: Looks, frame: _Frame) -> QcPicture:
    measures = looks.measures
    rows = list(dict.fromkeys(profile["region"] for profile in measures["profiles"]))
    table = 140 + 34 * len(measures["regions"])
    title = "Largest uptakes: the same regions before and after"
    sheet = _Sheet(title, frame, table + 290 * len(rows) + 40)
    _table(sheet, measures)
    for number, label in enumerate(rows):
        lines = [profile for profile in measures["profiles"] if profile["region"] == label]
        for place, profile in enumerate(lines):
            panel = sheet.panel(EDGE + 70 + place * 445, sheet.start + table + 42 + 290 * number, 370, 190)
            _profile(panel, profile, measures["unit"])
    return sheet.picture("regions", title)


COLUMNS = (("region", 0), ("volume, mL", 110), ("threshold", 245), ("centre, mm (LPS)", 370), ("max", 620),
           ("peak", 870), ("mean", 1120))


def _table(sheet: _Sheet, measures: Mapping[str, Any]) -> None:
    top = sheet.start + 14
    for text, place in COLUMNS:
        told = f"{measures['unit']} {text}" if text in ("max", "peak", "mean") else text
        sheet.write(EDGE + place, top, told, colour=QUIET, weight="bold")
    for number, region in enumerate(measures["regions"], start=1):
        y = top + 34 * number
        centre = ", ".join(f"{value:.0f}" for value in region["centre_mm"])
        for (_, place), text in zip(COLUMNS, (region["label"], volume(region["volume_ml"]),
                                              f"{100 * region['threshold']:.0f} %", centre)):
            sheet.write(EDGE + place, y, text)
        for key, place in COLUMNS[4:]:
            sheet.write(EDGE + place, y, f"{uptake(region['before'][key])} → {uptake(region['after'][key])} "
                        f"({change(region['before'][key], region['after'][key])})")
    y = top + 34 * (len(measures["regions"]) + 1) + 8
    sheet.write(EDGE, y, "A region: source voxels above the threshold, a share of its maximum. Peak: highest mean in a "
                "sphere of 1 mL.", colour=QUIET)
    for name, colour, place in (("before", BEFORE, 1140), ("after", AFTER, 1275)):
        sheet.write(place, y + 42, f"— {name}", colour=colour, weight="bold", size=HEAD)


def _profile(panel: Axes, profile: Mapping[str, Any], unit: str) -> None:
    for name, colour in (("before", BEFORE), ("after", AFTER)):
        panel.plot(profile[f"{name}_mm"], profile[name], ".-", color=colour, lw=2, ms=5)
    panel.set_ylim(min(0.0, panel.get_ylim()[0]), None)
    panel.set_title(f"Region {profile['region']}: {AXIS_NAMES[profile['axis']]}", fontsize=TEXT, color=INK,
                    fontweight="bold", loc="left")
    panel.set_xlabel("mm from its centre", fontsize=SMALL, color=QUIET)
    panel.set_ylabel(unit, fontsize=SMALL, color=QUIET)
    panel.spines[["top", "right"]].set_visible(False)
