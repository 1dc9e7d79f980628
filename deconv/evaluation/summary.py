"""What the rows say together: mean and worst case of every method, seed-to-seed spread, and the promises.

A promise is a figure of the design and what was measured for it. It is reached, not reached, or not measured: nothing
is taken for granted where a case is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from deconv.evaluation.measures import spread
from deconv.evaluation.rows import Row
from deconv.evaluation.running import Evaluation

__all__ = ["FIGURES", "Figure", "Promise", "Spread", "Summary", "figure_of", "promises", "spreads", "summaries"]


@dataclass(frozen=True)
class Figure:
    """One number of a row, of which the largest is the worst (`worst` max), or the smallest (min)."""

    name: str
    title: str
    of: Callable[[Row], float | None]
    worst: Callable[..., Any] = max
    format: str = ".3f"


def figure_of(row: Row, name: str) -> float | None:
    """A figure stored under that name; None where it was not measured."""
    value = row.figures.get(name)
    return None if value is None else float(value)


def _stored(name: str) -> Callable[[Row], float | None]:
    return lambda row: figure_of(row, name)


def _largest(row: Row, name: str) -> float | None:
    """The largest absolute value of a figure that holds one number an axis."""
    errors = row.figures.get(name)
    return None if errors is None else max(map(abs, errors))


def _rc_max_off(row: Row, from_mm: float = 10.0) -> float | None:
    """The largest |RC_max - 1| of the spheres of at least `from_mm`."""
    found = [abs(sphere["max"] - 1.0) for sphere in row.figures["recovery"] if sphere["diameter_mm"] >= from_mm]
    return max(found) if found else None


#: what the summary tells of every method
FIGURES: tuple[Figure, ...] = (
    Figure("nrmse", "NRMSE", _stored("nrmse")),
    Figure("kernel_inner_product", "kernel inner product", _stored("kernel_inner_product"), min),
    Figure("fwhm_error_mm", "largest FWHM error mm", lambda row: _largest(row, "fwhm_error_mm"), format=".2f"),
    Figure("skewness_error", "largest skewness error", lambda row: _largest(row, "skewness_error"), format=".2f"),
    Figure("rc_max_off", "RC_max off 1, ≥ 10 mm", _rc_max_off),
    Figure("overshoot_local", "overshoot, local", _stored("overshoot_local")),
    Figure("background_cv", "background CV", _stored("background_cv")),
    Figure("activity", "activity change %", lambda row: 100 * abs(row.figures["activity_change"]), format=".4f"),
    Figure("cpu_seconds", "CPU s", lambda row: row.cpu_seconds, format=".1f"),
    Figure("peak_mb", "peak MB", lambda row: row.peak_mb, format=".0f"),
)


@dataclass(frozen=True)
class Spread:
    """How far the results of different seeds lie apart on one case: the largest ||a - b|| / ||truth|| of all pairs."""

    case_label: str
    method: str
    seeds: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Summary:
    """One figure of one method over all cases and seeds."""

    method: str
    figure: str
    mean: float
    worst: float
    worst_case: str
    runs: int


@dataclass(frozen=True)
class Promise:
    """One figure of the design. measured is None, and reached too, where the cases for it were not run."""

    text: str
    target: str
    measured: float | None
    reached: bool | None
    where: str = ""


def summaries(rows: Iterable[Row]) -> tuple[Summary, ...]:
    """Mean and worst of every figure for every method that has it; failed runs have none."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        if not row.failed:
            by_method.setdefault(row.method, []).append(row)
    found = []
    for method, own in by_method.items():
        for figure in FIGURES:
            pairs = [(value, row) for row in own if (value := figure.of(row)) is not None]
            if pairs:
                worst, row = figure.worst(pairs, key=lambda pair: pair[0])
                mean = float(np.mean([value for value, _ in pairs]))
                found.append(Summary(method, figure.name, mean, worst, row.case_label, len(pairs)))
    return tuple(found)


def spreads(evaluation: Evaluation) -> tuple[Spread, ...]:
    """The spread of every (case, method) that ran with at least two seeds and whose images were kept."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in evaluation.rows:
        if not row.failed:
            groups.setdefault((row.case_label, row.method), []).append(row)
    truths = {case.label: case for case in evaluation.plan.cases}
    found = []
    for (case, method), rows in groups.items():
        kept = [(row.seed, arrays.image) for row in rows if (arrays := evaluation.store.arrays(row.key)) is not None]
        if len(kept) > 1:
            truth = truths[case].build().truth.array
            value = max(spread(a, b, truth) for (_, a), (_, b) in combinations(kept, 2))
            found.append(Spread(case, method, tuple(seed for seed, _ in kept), value))
    return tuple(found)


def promises(rows: Sequence[Row], spread_found: Sequence[Spread], method: str) -> tuple[Promise, ...]:
    """The design's figures of `method`, each from the worst of its runs on the cases it speaks of."""
    own = [row for row in rows if row.method == method and not row.failed]
    spheres, noisy, head = (_on(own, *which) for which in _DESIGN_CASES)
    design = [*spheres, *noisy, *head]
    skewed = [row for row in own if row.case["skew"]]
    found = [
        _at_most("NRMSE, spheres", 0.20, spheres, _stored("nrmse")),
        _at_most("NRMSE, spheres, 10 % noise", 0.26, noisy, _stored("nrmse")),
        _at_most("NRMSE, head and neck", 0.20, head, _stored("nrmse")),
        _at_most("CPU seconds a phantom", 300.0, design, lambda row: row.cpu_seconds),
        _at_most("CPU seconds a phantom, the stretch", 60.0, design, lambda row: row.cpu_seconds),
        _at_least("kernel inner product", 0.95, design, _stored("kernel_inner_product")),
        *(_at_least(f"kernel inner product, PSF skewed along {'DHW'[axis]}", 0.95,
                    [row for row in skewed if row.case["skew_axis"] == axis], _stored("kernel_inner_product"))
          for axis in range(3)),
        _at_most("RC_max off 1, spheres ≥ 10 mm", 0.05, spheres, _rc_max_off),
        _at_most("RC_max off 1, spheres ≥ 10 mm, 10 % noise", 0.05, noisy, _rc_max_off),
        _spread_promise(spread_found, method),
        _at_most("activity change", 0.0005, own, lambda row: abs(row.figures["activity_change"])),
    ]
    return (*found, *_comparisons(rows, own))


_DESIGN_CASES = (("spheres", (24, 48, 48), 0.0), ("spheres", (24, 48, 48), 0.1), ("head-and-neck", (32, 48, 48), 0.0))


def _on(rows: Sequence[Row], phantom: str, shape: tuple[int, ...], noise: float) -> list[Row]:
    """Rows on the design's cases: 6 mm, not skewed, the same everywhere, the paper's voxels."""
    def fits(case: Mapping[str, Any]) -> bool:
        usual = case["fwhm_mm"] == 6.0 and not case["skew"] and not case.get("radial")
        return usual and case["phantom"] == phantom and tuple(case["shape"]) == shape and case["noise"] == noise
    return [row for row in rows if fits(row.case)]


def _at_most(text: str, limit: float, rows: Sequence[Row], of: Callable[[Row], float | None]) -> Promise:
    return _limited(text, f"≤ {limit:g}", rows, of, max, lambda value: value <= limit)


def _at_least(text: str, limit: float, rows: Sequence[Row], of: Callable[[Row], float | None]) -> Promise:
    return _limited(text, f"≥ {limit:g}", rows, of, min, lambda value: value >= limit)


def _limited(
    text: str, target: str, rows: Sequence[Row], of: Callable[[Row], float | None], worst: Callable[..., Any],
    reached: Callable[[float], bool],
) -> Promise:
    pairs = [(value, row) for row in rows if (value := of(row)) is not None]
    if not pairs:
        return Promise(text, target, None, None)
    value, row = worst(pairs, key=lambda pair: pair[0])
    return Promise(text, target, value, reached(value), f"{row.case_label}, seed {row.seed}")


def _spread_promise(found: Sequence[Spread], method: str) -> Promise:
    own = [one for one in found if one.method == method]
    if not own:
        return Promise("seed-to-seed NRMSE", "≤ 0.03", None, None)
    worst = max(own, key=lambda one: one.value)
    return Promise("seed-to-seed NRMSE", "≤ 0.03", worst.value, worst.value <= 0.03, worst.case_label)


def _comparisons(rows: Sequence[Row], own: Sequence[Row]) -> list[Promise]:
    """Better than the others in NRMSE: the largest ratio, on any case both ran, must stay below 1."""
    found = []
    for rival in _RIVALS:
        theirs: dict[str, float] = {}
        for row in rows:
            if row.variant == rival and not row.failed:
                theirs[row.case_label] = min(theirs.get(row.case_label, np.inf), row.figures["nrmse"])
        pairs = [(row.figures["nrmse"] / theirs[row.case_label], row) for row in own if row.case_label in theirs
                 and row.variant != rival]
        text = f"NRMSE over that of {rival}"
        if pairs:
            ratio, row = max(pairs, key=lambda pair: pair[0])
            found.append(Promise(text, "< 1", ratio, ratio < 1, f"{row.case_label}, seed {row.seed}"))
        else:
            found.append(Promise(text, "< 1", None, None))
    return found


_RIVALS = ("cubic", "richardson-lucy true PSF", "tv PSF 1 mm too narrow", "tv PSF 1 mm too wide", "paper")
