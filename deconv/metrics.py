"""Figures of merit for deblurred PET: against known truth, of spheres, of kernels, and of an image alone.

NRMSE here is ||x - t|| / ||t||, both on the fine grid: 0 is perfect, an empty image scores 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from deconv.phantoms import Phantom, Sphere

__all__ = [
    "Recovery", "activity_change", "background_cv", "contrast", "kernel_centroid", "kernel_fwhm_mm",
    "kernel_inner_product", "nrmse", "psnr", "recovery", "recovery_coefficients", "ssim",
]


def nrmse(image: ArrayLike, truth: ArrayLike) -> float:
    """||image - truth|| / ||truth|| (l2). Raises ValueError for unlike shapes or a truth that is zero everywhere."""
    x, t = _pair(image, truth)
    norm = np.linalg.norm(t)
    if norm == 0:
        raise ValueError("NRMSE is not defined for a truth that is zero everywhere")
    return float(np.linalg.norm(x - t) / norm)


@dataclass(frozen=True)
class Recovery:
    """Recovery coefficients of one sphere: mean, median and maximum in its known volume over its true activity."""

    diameter_mm: float
    mean: float
    median: float
    max: float


def recovery(image: ArrayLike, fraction: ArrayLike, activity: float, diameter_mm: float = 0.0) -> Recovery:
    """RC_mean, RC_median, RC_max of the voxels with `fraction` >= 0.5 inside (paper, Phantom Analysis).

    A sphere so small that no voxel is half inside is judged by the voxel that is most inside.
    Raises ValueError where the sphere lies outside the image or its activity is not positive.
    """
    x, part = _pair(image, fraction)
    if activity <= 0:
        raise ValueError(f"the true activity must be positive, got {activity}")
    if part.max() <= 0:
        raise ValueError("the sphere lies outside the image")
    values = x[part >= min(0.5, part.max())]
    return Recovery(diameter_mm, float(values.mean() / activity), float(np.median(values) / activity),
                    float(values.max() / activity))


def recovery_coefficients(image: ArrayLike, phantom: Phantom) -> tuple[Recovery, ...]:
    """Recovery coefficients of every sphere of `phantom`, for an image (2D, 2H, 2W) on its truth's grid."""
    def one(sphere: Sphere) -> Recovery:
        return recovery(image, phantom.sphere_fraction(sphere), sphere.activity, sphere.diameter_mm)
    return tuple(one(sphere) for sphere in phantom.spheres)


def activity_change(image: ArrayLike, source: ArrayLike) -> float:
    """Relative change of total activity from `source` to `image` over the same field of view: means, so any grids.

    >>> activity_change([2.0, 4.0], [2.0, 2.0])
    0.5
    """
    before = float(np.mean(np.asarray(source), dtype=np.float64))
    if before == 0:
        raise ValueError("the source holds no activity")
    return float(np.mean(np.asarray(image), dtype=np.float64)) / before - 1.0


def kernel_inner_product(a: ArrayLike, b: ArrayLike) -> float:
    """<a, b> / (||a|| ||b||), centres laid upon each other and the smaller padded with zeros (paper: k* · k)."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if any(n % 2 == 0 for n in a.shape + b.shape) or a.ndim != 3 or b.ndim != 3:
        raise ValueError(f"kernels must be three-dimensional with odd sizes, got {a.shape} and {b.shape}")
    shape = np.maximum(a.shape, b.shape)
    a, b = _padded(a, shape), _padded(b, shape)
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    if norm == 0:
        raise ValueError("a kernel is zero everywhere")
    return float((a * b).sum() / norm)


def kernel_fwhm_mm(kernel: ArrayLike, spacing: Sequence[float]) -> tuple[float, float, float]:
    """Full width at half maximum along (D, H, W) in mm, on the profiles through the maximum.

    Half maximum is found by linear interpolation between voxels (NEMA NU 2); the maximum is that of a parabola
    through the three highest neighbours, so a width between voxels is not overestimated. A profile that does not
    fall to half within the kernel is as wide as the kernel.

    >>> from deconv.kernels import gaussian
    >>> [round(width, 1) for width in kernel_fwhm_mm(gaussian(6.0, (1.0, 1.0, 1.0)), (1.0, 1.0, 1.0))]
    [6.0, 6.0, 6.0]
    """
    k = np.asarray(kernel, dtype=np.float64)
    peak = np.unravel_index(int(k.argmax()), k.shape)
    widths = []
    for axis in range(3):
        line = k[tuple(slice(None) if a == axis else peak[a] for a in range(3))]
        widths.append(_width(line, int(peak[axis])) * float(spacing[axis]))
    return widths[0], widths[1], widths[2]


def kernel_centroid(kernel: ArrayLike) -> tuple[float, float, float]:
    """Centre of mass relative to the middle voxel, in voxels along (D, H, W)."""
    k = np.asarray(kernel, dtype=np.float64)
    d, h, w = (float(c - (n - 1) / 2) for c, n in zip(ndimage.center_of_mass(k), k.shape, strict=True))
    return d, h, w


def psnr(image: ArrayLike, truth: ArrayLike, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; `peak` is the truth's maximum unless given. Infinite for equal images."""
    x, t = _pair(image, truth)
    error = float(np.mean((x - t) ** 2))
    peak = float(t.max()) if peak is None else peak
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def ssim(image: ArrayLike, truth: ArrayLike, *, data_range: float | None = None, sigma: float = 1.5) -> float:
    """Mean structural similarity (Wang et al. 2004) with a Gaussian window, K1 = 0.01, K2 = 0.03, in 3-D."""
    x, t = _pair(image, truth)
    span = float(t.max() - t.min()) if data_range is None else data_range
    if span <= 0:
        raise ValueError("SSIM needs a positive data range; the truth is constant")
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2

    def smooth(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return ndimage.gaussian_filter(v, sigma, truncate=3.5, mode="reflect")

    mx, mt = smooth(x), smooth(t)
    vx, vt, cov = smooth(x * x) - mx * mx, smooth(t * t) - mt * mt, smooth(x * t) - mx * mt
    return float(np.mean((2 * mx * mt + c1) * (2 * cov + c2) / ((mx**2 + mt**2 + c1) * (vx + vt + c2))))


def background_cv(image: ArrayLike, phantom: Phantom, *, margin_mm: float = 10.0) -> float:
    """Coefficient of variation (std / mean) of an image (2D, 2H, 2W) at least `margin_mm` away from every sphere."""
    values = np.asarray(image, dtype=np.float64)[_far_from_spheres(phantom, margin_mm)]
    if values.size == 0 or values.mean() == 0:
        raise ValueError(f"the phantom has no background {margin_mm} mm away from its spheres")
    return float(values.std() / values.mean())


def contrast(image: ArrayLike, phantom: Phantom, *, margin_mm: float = 10.0) -> Mapping[float, float]:
    """Contrast recovery of every sphere, diameter in mm -> (C_sphere / C_background - 1) over the true one (NU 2)."""
    x = np.asarray(image, dtype=np.float64)
    background = float(x[_far_from_spheres(phantom, margin_mm)].mean())
    found = recovery_coefficients(x, phantom)
    return {
        sphere.diameter_mm: (rc.mean * sphere.activity / background - 1) / (sphere.activity / phantom.background - 1)
        for sphere, rc in zip(phantom.spheres, found, strict=True)
    }


def _far_from_spheres(phantom: Phantom, margin_mm: float) -> NDArray[np.bool_]:
    shape, step = phantom.truth.shape, phantom.truth.spacing
    lines = [(np.arange(n) + 0.5) * s for n, s in zip(shape, step, strict=True)]
    axes = np.meshgrid(*lines, indexing="ij", sparse=True)
    far = np.ones(shape, dtype=bool)
    for sphere in phantom.spheres:
        squared = sum((axis - c) ** 2 for axis, c in zip(axes, sphere.centre_mm, strict=True))
        far &= squared > (sphere.diameter_mm / 2 + margin_mm) ** 2
    return far


def _width(line: NDArray[np.float64], peak: int) -> float:
    top = line[peak]
    if 0 < peak < len(line) - 1:
        left, right = line[peak - 1], line[peak + 1]
        bend = left - 2 * top + right
        top = top - (right - left) ** 2 / (8 * bend) if bend < 0 else top
    half = top / 2
    low = peak
    while low > 0 and line[low] > half:
        low -= 1
    high = peak
    while high < len(line) - 1 and line[high] > half:
        high += 1
    start = low + (half - line[low]) / (line[low + 1] - line[low]) if line[low] <= half else low - 0.5
    end = high - (half - line[high]) / (line[high - 1] - line[high]) if line[high] <= half else high + 0.5
    return float(end - start)


def _padded(kernel: NDArray[np.float64], shape: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.pad(kernel, [((n - k) // 2,) * 2 for n, k in zip(shape, kernel.shape, strict=True)])


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"images of unlike shapes: {first.shape} and {second.shape}")
    return first, second
