"""What is told: Markdown for people, JSON for programs. `plots` adds the page of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deconv.evaluation.kernels import KernelChecks
from deconv.evaluation.measures import HOT
from deconv.evaluation.methods import VARIANTS
from deconv.evaluation.pictures import ClipScore
from deconv.evaluation.rows import Row
from deconv.evaluation.running import Evaluation
from deconv.evaluation.summary import FIGURES, Promise, Spread, promises, spreads, summaries
from deconv.thresholds import PAPER_TABLE6, PaperRow

__all__ = ["markdown", "to_json", "write"]

NO_CHECKS = KernelChecks()


def to_json(
    evaluation: Evaluation, kernels: KernelChecks = NO_CHECKS, clip: Sequence[ClipScore] = ()
) -> dict[str, Any]:
    """Everything as JSON values: machine, rows, summary, seed spread, promises by method, checks of kernels."""
    spread_found = spreads(evaluation)
    return {
        "machine": dict(evaluation.machine),
        "skipped": list(evaluation.skipped),
        "rows": [asdict(row) for row in evaluation.rows],
        "summary": [asdict(one) for one in summaries(evaluation.rows)],
        "seed_spread": [asdict(one) for one in spread_found],
        "promises": {method: [asdict(one) for one in promises(evaluation.rows, spread_found, method)]
                     for method in _blind(evaluation.rows)},
        "kernels": asdict(kernels),
        "clip_iqa": [asdict(one) for one in clip],
    }


def markdown(
    evaluation: Evaluation, kernels: KernelChecks = NO_CHECKS, clip: Sequence[ClipScore] = ()
) -> str:
    """The report for people: summary, promises, then the figures of every case."""
    spread_found = spreads(evaluation)
    machine = evaluation.machine
    lines = ["# Phantom benchmark", "",
             f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['device']}; "
             f"Python {machine['python']}, torch {machine['torch']}. docs/evaluation.md defines every figure.", ""]
    lines += [*(f"{line}." for line in evaluation.skipped), ""] if evaluation.skipped else []
    for method in _blind(evaluation.rows):
        lines += [f"## Promises: {method}", "", *_promise_table(promises(evaluation.rows, spread_found, method)), ""]
    lines += ["## All cases", "", "Mean over cases and seeds / the worst.", "", *_summary_table(evaluation.rows), "",
              "The worst NRMSE of every method:", "", *_worst_table(evaluation.rows), ""]
    if spread_found:
        lines += ["## Seed-to-seed spread", "", *_spread_table(spread_found), ""]
    lines += _kernel_tables(kernels)
    lines += ["## CLIP-IQA", "", "1 fits the caption of a good photograph. The paper: 0.19 before deblurring,"
              " 0.39 after.", "", *_clip_table(clip), ""] if clip else []
    for label in dict.fromkeys(row.case_label for row in evaluation.rows):
        lines += [f"## {label}", "", *_case_tables([row for row in evaluation.rows if row.case_label == label]), ""]
    return "\n".join(lines).rstrip() + "\n"


def write(
    evaluation: Evaluation, out: Path, kernels: KernelChecks = NO_CHECKS, clip: Sequence[ClipScore] = ()
) -> None:
    """report.md, report.json and, where any run gave a result, report.png in `out`."""
    (out / "report.md").write_text(markdown(evaluation, kernels, clip), encoding="utf-8")
    text = json.dumps(to_json(evaluation, kernels, clip), indent=1, ensure_ascii=False) + "\n"
    (out / "report.json").write_text(text, encoding="utf-8")
    if any(not row.failed for row in evaluation.rows):
        from deconv.evaluation.plots import write_page  # loads matplotlib

        write_page(evaluation, out / "report.png")


def _blind(rows: Iterable[Row]) -> list[str]:
    """Labels of the methods that find the kernel themselves and gave at least one result."""
    return list(dict.fromkeys(row.method for row in rows if not row.failed and VARIANTS[row.variant].blind))


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [_line(header), "|---" * len(header) + "|", *(_line(cells) for cells in body)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _promise_table(found: Sequence[Promise]) -> list[str]:
    body = []
    for one in found:
        reached = "not measured" if one.reached is None else "yes" if one.reached else "**no**"
        measured = "-" if one.measured is None else f"{one.measured:.4g}"
        body.append((one.text, one.target, measured, reached, one.where or "-"))
    return _table(("promise", "target", "measured, worst", "reached", "where"), body)


def _summary_table(rows: Sequence[Row]) -> list[str]:
    found = {(one.method, one.figure): one for one in summaries(rows)}
    body = []
    for method in dict.fromkeys(row.method for row in rows if not row.failed):
        cells = [method]
        for figure in FIGURES:
            one = found.get((method, figure.name))
            cells.append("-" if one is None else f"{one.mean:{figure.format}} / {one.worst:{figure.format}}")
        body.append(cells)
    return _table(("method", *(figure.title for figure in FIGURES)), body)


def _worst_table(rows: Sequence[Row]) -> list[str]:
    return _table(("method", "NRMSE", "case"), [(one.method, f"{one.worst:.3f}", one.worst_case)
                                                for one in summaries(rows) if one.figure == "nrmse"])


def _spread_table(found: Sequence[Spread]) -> list[str]:
    return _table(("case", "method", "seeds", "largest ‖a − b‖ / ‖truth‖"),
                  [(one.case_label, one.method, " ".join(map(str, one.seeds)), f"{one.value:.4f}") for one in found])


def _kernel_tables(kernels: KernelChecks) -> list[str]:
    lines: list[str] = []
    if kernels.recovered:
        names = list(dict.fromkeys(one.kernel for one in kernels.recovered))
        methods = dict.fromkeys(one.method for one in kernels.recovered)
        found = {(one.method, one.kernel): one.inner_product for one in kernels.recovered}
        body = [(method, *(_number(found.get((method, name)), ".3f") for name in names)) for method in methods]
        lines += ["## Pseudo-kernels found again", "", "Inner products; the paper reports more than 0.90 for each.", "",
                  *_table(("method", *names), body), ""]
    if kernels.studies:
        rows = [(one.method, one.psf, str(one.count), f"{one.mean:.3f}", f"{one.sd:.3f}") for one in kernels.studies]
        lines += ["## Kernels of several measurements", "",
                  "Inner products of all pairs; the paper: 0.73 between patients, 0.93 ± 0.04 between phantoms.", "",
                  *_table(("method", "PSF", "measurements", "mean", "sd"), rows), ""]
    return lines


def _clip_table(clip: Sequence[ClipScore]) -> list[str]:
    """Cases down, methods across; of several seeds the mean."""
    cases, methods = (list(dict.fromkeys(getattr(one, name) for one in clip)) for name in ("case_label", "method"))
    body = []
    for case in cases:
        cells = [[one.value for one in clip if (one.case_label, one.method) == (case, method)] for method in methods]
        body.append((case, *(f"{sum(values) / len(values):.3f}" if values else "-" for values in cells)))
    return _table(("case", *methods), body)


def _case_tables(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        name = f"{row.method}, seed {row.seed}" if VARIANTS[row.variant].seeded else row.method
        if row.failed:
            body.append((name, f"failed: {row.failed}", *["-"] * 10))
            continue
        f = row.figures
        body.append((
            name, f"{f['nrmse']:.3f}", _number(f["kernel_inner_product"], ".3f"), _triple(f["fwhm_error_mm"]),
            _triple(f["skewness_error"]),
            _number(f["centroid_voxels"], ".2f"), _number(f["background_cv"], ".3f"),
            f"{f['overshoot']:+.2f} / {f['overshoot_local']:+.2f}", f"{100 * f['activity_change']:+.4f} %",
            f"{f['brisque']:.1f}", f"{row.cpu_seconds:.1f}", f"{row.peak_mb:.0f}"))
    lines = _table(("method", "NRMSE", "kernel inner product", "FWHM error D H W mm", "skewness error D H W",
                    "centroid voxels", "background CV", "overshoot / local", "activity change", "BRISQUE", "CPU s",
                    "peak MB"), body)
    good = [row for row in rows if not row.failed]
    for table in (_recovery_table(good), _lesion_table(good), *_threshold_tables(good), _uncertainty_table(good)):
        lines += ["", *table] if table else []
    return lines


def _recovery_table(rows: Sequence[Row]) -> list[str]:
    if not rows or not rows[0].figures["recovery"]:
        return []
    header = ("RC mean / median / max", *(f"{one['diameter_mm']:g} mm" for one in rows[0].figures["recovery"]))
    return _table(header, [(row.method, *(f"{one['mean']:.2f} / {one['median']:.2f} / {one['max']:.2f}"
                                          for one in row.figures["recovery"])) for row in rows])


def _lesion_table(rows: Sequence[Row]) -> list[str]:
    if not rows or not rows[0].figures["lesions"]:
        return []
    header = ("RC mean / max of lesions", *(one["name"] for one in rows[0].figures["lesions"]))
    return _table(header, [(row.method, *(f"{one['mean']:.2f} / {one['max']:.2f}" for one in row.figures["lesions"]))
                           for row in rows])


def _threshold_tables(rows: Sequence[Row]) -> list[list[str]]:
    """Table 6 of the paper: volumes and recovery of spheres contoured by one threshold, by one for every diameter."""
    rows = [row for row in rows if row.figures["table6"]]
    if not rows:
        return []
    found = []
    for kind, title in (("fixed", "one threshold"), ("variable", "a threshold for every diameter")):
        lines = [(row.method, [one for one in row.figures["table6"] if one["kind"] == kind]) for row in rows]
        lines += [(f"paper's Table 6, {when}", [_printed(one, i) for one in PAPER_TABLE6 if one.kind == kind])
                  for i, when in enumerate(("original", "deblurred"))]
        header = (f"{title}: % of maximum; V/V0; RC mean / median / max",
                  *(f"{one['diameter_mm']:g} mm" for one in lines[0][1]))
        found.append(_table(header, [(name, *(_contoured(cells.get(one["diameter_mm"])) for one in lines[0][1]))
                                     for name, of in lines for cells in [{one["diameter_mm"]: one for one in of}]]))
    return found


def _printed(row: PaperRow, which: int) -> dict[str, float]:
    return {"diameter_mm": row.diameter_mm, **{name: getattr(row, name)[which] for name in (
        "threshold_percent", "volume_ratio", "rc_mean", "rc_median", "rc_max")}}


def _contoured(one: Mapping[str, float] | None) -> str:
    if one is None:
        return "-"
    return (f"{one['threshold_percent']:.0f}; {one['volume_ratio']:.2f}; "
            f"{one['rc_mean']:.2f} / {one['rc_median']:.2f} / {one['rc_max']:.2f}")


def _uncertainty_table(rows: Sequence[Row]) -> list[str]:
    told = [row for row in rows if row.figures["uncertainty"] is not None]
    if not told:
        return []
    names = [f"{what}_{where}" for where in ("all", "hot") for what in ("within_1_sd", "within_2_sd", "correlation")]
    titles = [f"{what}, {where}" for where in ("all", f"hot (≥ {HOT:g} max)")
              for what in ("within 1 sd", "within 2 sd", "correlation with |error|")]
    return _table(("uncertainty", *titles), [
        (f"{row.method}, seed {row.seed}", *(f"{row.figures['uncertainty'][name]:.2f}" for name in names))
        for row in told])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _triple(values: Sequence[float] | None) -> str:
    return "-" if values is None else " ".join(f"{value:+.2f}" for value in values)
