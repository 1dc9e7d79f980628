"""The paper's two validations of kernels, for every blind method of a benchmark.

    pseudo-kernels  the method's own deblurred image of a head and neck is blurred again by each of four known kernels,
                    and the method is run on the result: does it find the kernel that was there? Paper: above 0.90.
    studies         inner products between the kernels that the method found on different measurements through the same
                    PSF. Paper: 0.73 between patients, 0.93 ± 0.04 between phantom acquisitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

import deconv
from deconv.evaluation.methods import VARIANTS
from deconv.evaluation.rows import Row, key_of
from deconv.evaluation.running import Evaluation, threads
from deconv.metrics import kernel_inner_product
from deconv.pseudokernels import Pseudokernel, blurred_again, inter_study_similarity, pseudokernels
from deconv.result import OnStep

__all__ = ["KernelChecks", "Recovered", "Studies", "kernel_checks"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recovered:
    """One pseudo-kernel found again: its name, and the inner product of what was found with it."""

    method: str
    kernel: str
    inner_product: float


@dataclass(frozen=True)
class Studies:
    """Similarity of a method's kernels over `count` measurements through one PSF: mean and standard deviation."""

    method: str
    psf: str
    count: int
    mean: float
    sd: float


@dataclass(frozen=True)
class KernelChecks:
    """Both validations."""

    recovered: tuple[Recovered, ...] = ()
    studies: tuple[Studies, ...] = ()


def kernel_checks(
    evaluation: Evaluation, *, pseudo: bool, say: Say = lambda line: None, on_step: OnStep | None = None
) -> KernelChecks:
    """Both validations for the blind methods of `evaluation`; what is run is kept in its store as all else is.

    pseudo  whether to find pseudo-kernels, which takes four runs a method; they need a head-and-neck case whose image
            was kept. The comparison of studies takes none; it needs two cases with the same PSF.
    """
    rows = [row for row in evaluation.rows if not row.failed and VARIANTS[row.variant].blind]
    first = {row.method: row for row in reversed(rows) if row.case["phantom"] == "head-and-neck"}
    recovered = [_recovered(evaluation, row, applied, say, on_step) for row in first.values() if pseudo
                 for applied in pseudokernels(row.case["spacing"])]
    return KernelChecks(tuple(one for one in recovered if one is not None), _studies(evaluation, rows))


def _recovered(
    evaluation: Evaluation, row: Row, applied: Pseudokernel, say: Say, on_step: OnStep | None
) -> Recovered | None:
    plan, arrays = evaluation.plan, evaluation.store.arrays(row.key)
    if arrays is None:
        say(f"{row.method}: no pseudo-kernel {applied.name}: its image of {row.case_label} was not kept")
        return None
    case = next(case for case in plan.cases if case.label == row.case_label)
    variant = VARIANTS[row.variant]
    settings = variant.settings(case, row.seed, plan.paper_fraction)
    y = blurred_again(case.build().measured.doubled(arrays.image), applied)
    told = {"pseudo-kernel": applied.name, "of": row.case}
    key = key_of(told, y.array, variant.method, variant.preset, asdict(settings), plan.device)
    kept = None if plan.fresh else evaluation.store.get(key)
    if kept is None:
        cpu = time.process_time()
        with threads(plan.threads):
            found = deconv.method(variant.method).deconvolve(y, settings, device=plan.device, on_step=on_step)
        cpu = time.process_time() - cpu
        if found.kernel is None:
            raise ValueError(f"{row.method} names no kernel: there is nothing to compare with {applied.name!r}")
        kept = Row(key, told, f"pseudo-kernel {applied.name}", row.method, row.variant, row.seed, asdict(settings),
                   plan.device, plan.threads, cpu,
                   figures={"kernel_inner_product": kernel_inner_product(found.kernel, applied.kernel)})
        evaluation.store.add(kept)
    product = float(kept.figures["kernel_inner_product"])
    say(f"{row.method}: pseudo-kernel {applied.name}, inner product {product:.3f}")
    return Recovered(row.method, applied.name, product)


def _studies(evaluation: Evaluation, rows: Sequence[Row]) -> tuple[Studies, ...]:
    """For every method and every PSF that it met in at least two cases on the same voxels, one seed each."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        case = row.case
        widths = "x".join(f"{width:g}" for width in np.atleast_1d(case["fwhm_mm"]))
        skew = f", skew {case['skew']:g} along {'DHW'[case['skew_axis']]}" if case["skew"] else ""
        radial = f", radial {case['radial']:g}" if case["radial"] else ""
        voxels = "x".join(f"{step:g}" for step in case["spacing"])
        groups.setdefault((row.method, f"{widths} mm{skew}{radial}; voxels {voxels} mm"), {}).setdefault(
            row.case_label, row)
    found = []
    for (method, psf), by_case in groups.items():
        arrays = [evaluation.store.arrays(row.key) for row in by_case.values()]
        kernels = [one.kernel for one in arrays if one is not None and one.kernel is not None]
        if len(kernels) > 1:
            similarity = inter_study_similarity(kernels)
            found.append(Studies(method, psf, len(kernels), similarity.mean, similarity.sd))
    return tuple(found)
