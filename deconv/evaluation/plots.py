"""One page of pictures: error bars, recovery, kernels, images, seed spread. The same colour is the same method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from deconv.evaluation.cases import Case
from deconv.evaluation.measures import Truth
from deconv.evaluation.rows import Arrays, Row
from deconv.evaluation.running import Evaluation
from deconv.evaluation.summary import spreads

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

__all__ = ["page", "write_page"]

COLOURS: Mapping[str, str] = {
    "nearest": "#c9cdd3", "cubic": "#8a8f98", "richardson-lucy true PSF": "#e0a030", "tv true PSF": "#1d4e89",
    "tv PSF 1 mm too narrow": "#6f9bd1", "tv PSF 1 mm too wide": "#a9c6e8", "preview": "#3a9d6e", "paper": "#d1495b",
    "best": "#5b2a86",
}
HEAD: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "color": "#222222", "loc": "left"}
NOTE: dict[str, Any] = {"fontsize": 8.5, "color": "#555555"}
IMAGES = ("richardson-lucy true PSF", "tv true PSF", "preview", "paper", "best")  # beside truth and measurement
GROUPS_AT_MOST = 6  # more cases than that are drawn together by phantom and noise


def write_page(evaluation: Evaluation, path: Path) -> None:
    """The page as a PNG. Needs at least one run that gave a result."""
    page(evaluation).savefig(path, dpi=110)


def page(evaluation: Evaluation) -> Figure:
    """The page. Raises ValueError where no run gave a result."""
    rows = [row for row in evaluation.rows if not row.failed]
    if not rows:
        raise ValueError("no run gave a result: there is nothing to draw")
    shown = _shown(evaluation.plan.cases)
    figure = Figure(figsize=(16, 14.4 + 2.9 * len(shown)), layout="constrained", facecolor="white")
    heights = [0.5, 4.0, 3.7, 3.2, *[2.9] * len(shown), 3.0]
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    _legend(parts[0], rows)
    _error_bars(parts[1].subplots(), rows)
    _recovery(parts[2], rows)
    _kernels(parts[3], evaluation, rows, shown[0])
    for part, case in zip(parts[4:], shown, strict=False):
        _images(part, evaluation, rows, case)
    _last_row(parts[-1], evaluation, rows)
    return figure


def _shown(cases: Sequence[Case]) -> list[Case]:
    """Of every phantom the case with the most noise, the last of them: at most three rows of images."""
    chosen = {case.phantom: case for case in sorted(cases, key=lambda case: case.noise)}
    return list(chosen.values())[:3]


def _legend(part: SubFigure, rows: Sequence[Row]) -> None:
    names = {row.method: row.variant for row in rows}
    handles = [Line2D([], [], color=COLOURS[variant], lw=7, solid_capstyle="butt") for variant in names.values()]
    part.legend(handles, list(names), loc="center", ncols=5, frameon=False, fontsize=10)


@dataclass(frozen=True)
class _Group:
    """Bars that stand together: the values of every method on one or several cases."""

    name: str
    values: Mapping[str, list[float]]


def _groups(rows: Sequence[Row], figure: str) -> list[_Group]:
    labels = dict.fromkeys(row.case_label for row in rows)

    def name(row: Row) -> str:
        if len(labels) <= GROUPS_AT_MOST:
            return row.case_label.replace(", ", "\n")
        noise = f"\nnoise {100 * row.case['noise']:g} %" if row.case["noise"] else "\nno noise"
        return f"{row.case['phantom']}{noise}"

    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.figures.get(figure) is not None:
            found.setdefault(name(row), {}).setdefault(row.variant, []).append(row.figures[figure])
    return [_Group(name, values) for name, values in found.items()]


def _error_bars(axes: Axes, rows: Sequence[Row]) -> None:
    groups, variants = _groups(rows, "nrmse"), list(dict.fromkeys(row.variant for row in rows))
    width = 0.84 / len(variants)
    for g, group in enumerate(groups):
        for i, variant in enumerate(variants):
            values = group.values.get(variant, [])
            if not values:
                continue
            at = g + (i - (len(variants) - 1) / 2) * width
            axes.bar(at, np.mean(values), 0.92 * width, color=COLOURS[variant])
            if max(values) - min(values) > 1e-3:
                axes.vlines(at, min(values), max(values), color="#222222", lw=1.2)
            axes.text(at, max(values) + 0.005, f"{np.mean(values):.3f}", ha="center", va="bottom", rotation=90, **NOTE)
    axes.set_xticks(range(len(groups)), [group.name for group in groups], fontsize=9.5)
    axes.set_ylim(0, 1.18 * max(max(v) for group in groups for v in group.values.values()))
    axes.set_title("NRMSE on the fine grid (less is better); line: least to largest over cases and seeds", **HEAD)
    _plain(axes)


def _recovery(part: SubFigure, rows: Sequence[Row]) -> None:
    """RC_max and RC_mean over diameter, mean over the sphere cases, without and with noise."""
    spheres = [row for row in rows if row.case["phantom"] == "spheres"]
    kinds = [(noisy, name) for noisy, name in ((False, "no noise"), (True, "noise"))
             if any((row.case["noise"] > 0) == noisy for row in spheres)]
    if not kinds:
        part.subplots().set_axis_off()
        part.text(0.5, 0.5, "no sphere phantom was run: no recovery coefficients", ha="center", **NOTE)
        return
    for axes, (noisy, name, figure) in zip(
            _row_of(part, 2 * len(kinds)),
            [(noisy, name, figure) for noisy, name in kinds for figure in ("max", "mean")], strict=True):
        for variant in dict.fromkeys(row.variant for row in spheres):
            own = [row for row in spheres if row.variant == variant and (row.case["noise"] > 0) == noisy]
            by_size: dict[float, list[float]] = {}
            for row in own:
                for one in row.figures["recovery"]:
                    by_size.setdefault(one["diameter_mm"], []).append(one[figure])
            sizes = sorted(by_size)
            axes.plot(sizes, [np.mean(by_size[size]) for size in sizes], "o-", ms=3.5, lw=1.8,
                      color=COLOURS[variant])
        if figure == "max":
            axes.axhspan(0.95, 1.05, xmin=0, color="#000000", alpha=0.06, lw=0)
        axes.axhline(1.0, color="#222222", lw=0.8)
        axes.set_ylim(0, 2.4)
        axes.set_xlabel("diameter, mm")
        axes.set_title(f"RC_{figure}, spheres, {name}", **HEAD)
        _plain(axes)


def _kernels(part: SubFigure, evaluation: Evaluation, rows: Sequence[Row], case: Case) -> None:
    """Every kernel summed over two axes, along the third, and the true one."""
    truth = Truth.of(case)
    kept = [(row, arrays) for row, arrays in _arrays(evaluation, rows, case) if arrays.kernel is not None]
    _subtitle(part, f"kernels on {case.label}, on the PET grid; dashed: the true one")
    for axis, axes in enumerate(_row_of(part, 3)):
        step = float(truth.phantom.measured.spacing[axis])
        for row, arrays in kept:
            if row.variant != "richardson-lucy true PSF" and arrays.kernel is not None:
                _profile(axes, arrays.kernel, axis, step, color=COLOURS[row.variant], lw=1.8, marker="o", ms=3)
        _profile(axes, truth.kernel, axis, step, color="#111111", lw=1.4, ls="--", marker="s", ms=3)
        axes.set_xlim(-14, 14)
        axes.set_xlabel(f"mm along {'DHW'[axis]}")
        axes.set_title(f"kernel along {'DHW'[axis]}", **HEAD)
        _plain(axes)


def _profile(axes: Axes, kernel: NDArray[Any], axis: int, step: float, **style: Any) -> None:
    """The kernel's sum over the other two axes."""
    line = kernel.sum(axis=tuple(other for other in range(3) if other != axis))
    axes.plot((np.arange(len(line)) - len(line) // 2) * step, line, **style)


def _images(part: SubFigure, evaluation: Evaluation, rows: Sequence[Row], case: Case) -> None:
    """The slice with the most hot voxels: truth, measurement, methods at one scale; then the uncertainty."""
    truth = Truth.of(case)
    phantom = truth.phantom
    fine = int(truth.hot.sum(axis=(1, 2)).argmax())
    panels: list[tuple[str, NDArray[Any], str]] = [
        ("truth", phantom.truth.array[fine], ""), ("measured", phantom.measured.array[fine // 2], "")]
    uncertainty: tuple[str, NDArray[Any]] | None = None
    for row, arrays in _arrays(evaluation, rows, case):
        if row.variant in IMAGES:
            panels.append((row.method, arrays.image[fine], f"NRMSE {row.figures['nrmse']:.3f}"))
        if arrays.uncertainty is not None:
            uncertainty = (row.method, arrays.uncertainty[fine])
    count = len(panels) + (uncertainty is not None)
    top = float(phantom.truth.array.max())
    extent = (0.0, phantom.truth.shape[2] * float(phantom.truth.spacing[2]),
              phantom.truth.shape[1] * float(phantom.truth.spacing[1]), 0.0)
    _subtitle(part, f"{case.label}: slice {fine} of {phantom.truth.shape[0]}; black is the truth's maximum, "
                    f"{top / 1000:.0f} kBq/mL")
    every = _row_of(part, count)
    for axes, (name, image, note) in zip(every, panels, strict=False):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=top, extent=extent, interpolation="nearest")
        axes.set_title(name, fontsize=9.5, color="#222222")
        axes.set_xlabel(note, **NOTE)
        axes.set_xticks([])
        axes.set_yticks([])
    if uncertainty is not None:
        name, sd = uncertainty
        shown = every[-1].imshow(sd, cmap="magma", vmin=0, extent=extent, interpolation="nearest")
        every[-1].set_title(f"uncertainty of {name}", fontsize=9.5, color="#222222")
        every[-1].set_xticks([])
        every[-1].set_yticks([])
        part.colorbar(shown, ax=every[-1], shrink=0.8, label="Bq/mL")


def _last_row(part: SubFigure, evaluation: Evaluation, rows: Sequence[Row]) -> None:
    """Seed-to-seed spread, and CPU seconds over NRMSE."""
    left, right = _row_of(part, 2, sharey=False)
    found = spreads(evaluation)
    by_variant = {row.method: row.variant for row in rows}
    for method in dict.fromkeys(one.method for one in found):
        own = [one for one in found if one.method == method]
        left.plot([one.value for one in own], range(len(own)), "o", ms=7, color=COLOURS[by_variant[method]])
        left.set_yticks(range(len(own)), [one.case_label for one in own], fontsize=8.5)
    if found:
        left.axvline(0.03, color="#222222", lw=0.8, ls="--")
        left.margins(y=0.25)
        left.set_xlim(0, max(0.035, 1.1 * max(one.value for one in found)))
    else:
        left.text(0.5, 0.5, "one seed only", ha="center", transform=left.transAxes, **NOTE)
        left.set_yticks([])
    left.set_title("seed-to-seed NRMSE (dashed: promised)", **HEAD)
    for row in rows:
        right.plot(max(row.cpu_seconds, 0.01), row.figures["nrmse"], "o", ms=6, alpha=0.8, color=COLOURS[row.variant])
    right.set_xscale("log")
    right.set_ylim(bottom=0)
    right.set_xlabel("CPU seconds")
    right.set_title("NRMSE over cost, every run", **HEAD)
    for axes in (left, right):
        _plain(axes)


def _arrays(evaluation: Evaluation, rows: Sequence[Row], case: Case) -> list[tuple[Row, Arrays]]:
    """Of every method its first run on the case whose arrays are here."""
    found: dict[str, tuple[Row, Arrays]] = {}
    for row in rows:
        if row.case_label == case.label and row.method not in found:
            arrays = evaluation.store.arrays(row.key)
            if arrays is not None:
                found[row.method] = (row, arrays)
    return list(found.values())


def _row_of(part: SubFigure, count: int, *, sharey: bool = True) -> list[Axes]:
    return list(part.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _subtitle(part: SubFigure, text: str) -> None:
    part.suptitle(text, fontsize=10.5, color="#222222", x=0.005, ha="left")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e6ea", lw=0.8)
    axes.set_axisbelow(True)
