"""How a result is judged: the figures of one image and kernel against the known truth. docs/evaluation.md defines them.

All images are compared on the fine grid (2D, 2H, 2W). A hot voxel is one whose true activity is at least a fifth of the
truth's maximum; the background is what lies at least 10 mm away from every hot voxel and holds activity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize, stats

from deconv.evaluation.cases import Case
from deconv.metrics import (
    activity_change,
    kernel_centroid,
    kernel_fwhm_mm,
    kernel_inner_product,
    nrmse,
    recovery,
    recovery_coefficients,
)
from deconv.phantoms import Lesion, Phantom, average_pool, psf_kernel
from deconv.quality.brisque import brisque_volume
from deconv.thresholds import table6

__all__ = ["Truth", "calibration", "figures", "overshoot", "reference_kernel", "skewness", "spread"]

HOT = 0.2
MARGIN_MM = 10.0
_FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))


@dataclass(frozen=True, eq=False)
class Truth:
    """A case with everything that is computed from it once.

    kernel      k* (d, h, w) on the PET grid, `reference_kernel`;  fwhm_mm  its widths, read as any kernel's are.
    hot         (2D, 2H, 2W) bool.        background  (2D, 2H, 2W) bool; empty where there is none.
    """

    case: Case
    phantom: Phantom
    kernel: NDArray[np.float64]
    fwhm_mm: tuple[float, float, float]
    hot: NDArray[np.bool_]
    background: NDArray[np.bool_]

    @classmethod
    def of(cls, case: Case) -> Truth:
        """The case measured and its regions laid out. Raises ValueError for a case that makes no sense."""
        phantom = case.build()
        truth = phantom.truth.array
        hot = truth >= HOT * truth.max()
        away = ndimage.distance_transform_edt(~hot, sampling=phantom.truth.spacing)
        kernel = reference_kernel(case, phantom)
        return cls(case, phantom, kernel, kernel_fwhm_mm(kernel, phantom.measured.spacing.tolist()), hot,
                   (away >= MARGIN_MM) & (truth > 0))


def figures(
    truth: Truth, image: NDArray[np.float32], kernel: NDArray[np.float32] | None,
    uncertainty: NDArray[np.float32] | None, own: Mapping[str, float],
) -> dict[str, Any]:
    """Every figure of one result as JSON values; None where there is nothing to measure.

    image, uncertainty  (2D, 2H, 2W) in the truth's unit.      kernel  (d, h, w) on the PET grid.
    own                 what the method measured of itself; its psf_fwhm_{d,h,w}_mm, the FWHM of the PSF on the fine
                        grid, are preferred to widths read from the kernel's voxels.
    """
    phantom, true = truth.phantom, truth.phantom.truth.array
    found: dict[str, Any] = {
        "nrmse": nrmse(image, true),
        "recovery": [asdict(one) for one in recovery_coefficients(image, phantom)],
        "lesions": [{"name": one.name, **_recovered(image, phantom, one)} for one in phantom.lesions],
        "activity_change": activity_change(image, phantom.measured.array),
        "background_cv": _background_cv(truth, image),
        **overshoot(image, true, truth.hot),
        "brisque": brisque_volume(phantom.truth.with_array(image), window=(0.0, float(true.max()))),
        "table6": [asdict(line) for line in table6(image, phantom)] if truth.case.phantom == "spheres" else [],
        "uncertainty": None if uncertainty is None else calibration(image, true, uncertainty, truth.hot),
    }
    return found | _kernel_figures(truth, kernel, own)


def _recovered(image: NDArray[np.float32], phantom: Phantom, lesion: Lesion) -> dict[str, float]:
    found = recovery(image, phantom.lesion_fraction(lesion), lesion.activity)
    return {"mean": found.mean, "median": found.median, "max": found.max}


def _kernel_figures(truth: Truth, kernel: NDArray[np.float32] | None, own: Mapping[str, float]) -> dict[str, Any]:
    names = [f"psf_fwhm_{axis}_mm" for axis in "dhw"]
    if kernel is None:
        return dict.fromkeys(
            ("kernel_inner_product", "kernel_fwhm_mm", "fwhm_error_mm", "skewness_error", "centroid_voxels"))
    if all(name in own for name in names):
        widths, true = tuple(own[name] for name in names), truth.case.fwhm3_mm
    else:
        widths, true = kernel_fwhm_mm(kernel, truth.phantom.measured.spacing.tolist()), truth.fwhm_mm
    return {
        "kernel_inner_product": kernel_inner_product(kernel, truth.kernel),
        "kernel_fwhm_mm": list(widths),
        "fwhm_error_mm": [float(a - b) for a, b in zip(widths, true, strict=True)],
        "skewness_error": [a - b for a, b in zip(skewness(kernel), skewness(truth.kernel), strict=True)],
        "centroid_voxels": float(np.abs(kernel_centroid(kernel)).max()),
    }


def skewness(kernel: NDArray[Any]) -> list[float]:
    """Third standardised moment of the kernel's mass along D, H, W: 0 for a symmetric one, positive for a tail upward.

    An inner product hardly sees it: a Gaussian of the right width scores 0.98 against one skewed by 0.4.
    """
    found = []
    for axis in range(3):
        mass = kernel.sum(axis=tuple(other for other in range(3) if other != axis), dtype=np.float64)
        at = np.arange(len(mass)) - np.average(np.arange(len(mass)), weights=mass)
        variance = np.average(at**2, weights=mass)
        found.append(float(np.average(at**3, weights=mass) / variance**1.5) if variance > 0 else 0.0)
    return found


def reference_kernel(case: Case, phantom: Phantom) -> NDArray[np.float64]:
    """k* (d, h, w), sum 1: the kernel on the PET grid with which x↓ ∗ k* comes closest to the measurement, x the truth.

    The scanner blurs first and averages then, P(x ∗ h); a kernel that acts on the averaged image is neither h sampled
    at the voxels nor h integrated over them, but in between: k* is h with a part a of the voxel's variance s²/12 taken
    off, integrated over voxels. The one number a is fitted, without noise. For a radially varying PSF h is its mean.
    """
    spacing = phantom.measured.spacing
    truth = phantom.truth.array.astype(np.float64)
    y = replace(case, noise=0.0).build().measured.array if case.noise else phantom.measured.array
    pooled, widths = average_pool(truth), np.array(case.fwhm3_mm)

    def kernel(part: float) -> NDArray[np.float64]:
        left = np.maximum(widths**2 - part * _FWHM**2 * spacing**2 / 12.0, (0.3 * widths) ** 2)
        return psf_kernel(np.sqrt(left).tolist(), spacing, size=phantom.psf.shape[0], skew=case.skew,
                          skew_axis=case.skew_axis)

    def misfit(part: float) -> float:
        image, k = pooled, kernel(part)
        for axis in range(3):
            profile = k.sum(axis=tuple(other for other in range(3) if other != axis))
            image = ndimage.convolve1d(image, profile, axis=axis, mode="nearest")
        return float(((image - y) ** 2).sum())

    return kernel(float(optimize.minimize_scalar(misfit, bounds=(-0.5, 1.5), method="bounded").x))


def overshoot(
    image: NDArray[np.float32], truth: NDArray[np.float32], hot: NDArray[np.bool_]
) -> dict[str, float]:
    """By how much hot voxels exceed what is true: 0 is none, 0.1 is 10 % too much.

    overshoot        the largest value over the truth's maximum, minus 1; negative where the maximum is not reached.
    overshoot_local  the largest ratio of a value to the largest truth of its 27 neighbours, minus 1: a small or faint
                     structure that comes out hotter than it is counts here although the image's maximum lies elsewhere.
    """
    around = ndimage.maximum_filter(truth, size=3, mode="nearest")
    return {"overshoot": float(image[hot].max() / truth.max() - 1.0),
            "overshoot_local": float((image[hot] / around[hot]).max() - 1.0)}


def calibration(
    image: NDArray[np.float32], truth: NDArray[np.float32], uncertainty: NDArray[np.float32], hot: NDArray[np.bool_]
) -> dict[str, float]:
    """Whether the stated standard deviation tells the error: shares of voxels within 1 and 2 of it, rank correlation.

    All voxels, and those of the hot regions with their rims (two fine voxels), where a reader would look; a normal
    error of the stated size gives 0.68 and 0.95. The correlation is Spearman's, of |error| with the uncertainty.
    """
    found = {}
    error = np.abs(image.astype(np.float64) - truth)
    for name, where in (("all", np.ones_like(hot)), ("hot", ndimage.binary_dilation(hot, iterations=2))):
        off, sd = error[where], uncertainty[where].astype(np.float64)
        found[f"within_1_sd_{name}"] = float(np.mean(off <= sd))
        found[f"within_2_sd_{name}"] = float(np.mean(off <= 2 * sd))
        constant = np.ptp(sd) == 0 or np.ptp(off) == 0
        found[f"correlation_{name}"] = 0.0 if constant else float(stats.spearmanr(off, sd).statistic)
    return found


def spread(first: NDArray[np.float32], second: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    """||first - second|| / ||truth||: how far two results of the same measurement lie apart."""
    difference = first.astype(np.float64) - second
    return float(np.linalg.norm(difference) / np.linalg.norm(truth.astype(np.float64)))


def _background_cv(truth: Truth, image: NDArray[np.float32]) -> float | None:
    """Standard deviation of image - truth over the mean truth in the background; None where there is no background."""
    where = truth.background
    if not where.any():
        return None
    true = truth.phantom.truth.array[where].astype(np.float64)
    return float((image[where] - true).std() / true.mean())
