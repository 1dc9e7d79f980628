"""Blur kernels as arrays: make and centre. `deconv.metrics` measures them. Needs numpy and scipy only.

A kernel is (d, h, w) with odd sizes, not negative, with sum 1; voxel [d//2, h//2, w//2] is its centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, special

__all__ = ["FWHM_PER_SIGMA", "centroid_voxels", "gaussian", "recentred", "skewed", "split_normal"]

FWHM_PER_SIGMA = 2.0 * float(np.sqrt(2.0 * np.log(2.0)))


def gaussian(
    fwhm_mm: ArrayLike, spacing_mm: ArrayLike, shape: Sequence[int] | None = None, *, at_least: int = 3
) -> NDArray[np.float32]:
    """Gaussian kernel (d, h, w), each voxel holding the integral over its extent; sum 1.

    fwhm_mm     one width, or three along (D, H, W); mm.
    spacing_mm  one voxel size, or three along (D, H, W); mm.
    shape       odd sizes; by default wide enough for 3 sigma on either side, `at_least` voxels.

    Integrating over the voxel and not sampling its centre keeps the shape right where the FWHM is near the voxel size.
    Raises ValueError for a width or spacing that is not positive or a shape that is not odd.
    """
    widths = np.broadcast_to(np.asarray(fwhm_mm, dtype=np.float64), (3,))
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=np.float64), (3,))
    if np.any(widths <= 0) or np.any(spacing <= 0):
        raise ValueError(f"widths and spacing must be positive, got {widths.tolist()} and {spacing.tolist()} mm")
    sigma = widths / FWHM_PER_SIGMA / spacing
    if shape is None:
        shape = [max(at_least, 2 * int(np.ceil(3.0 * s)) + 1) for s in sigma]
    if len(shape) != 3 or any(n % 2 == 0 for n in shape):
        raise ValueError(f"a kernel has three odd sizes, got {tuple(shape)}")
    profiles = []
    for n, s in zip(shape, sigma, strict=True):
        edges = (np.arange(n + 1) - n / 2) / s
        profile = np.diff(special.ndtr(edges))
        profiles.append(profile / profile.sum())
    return np.einsum("d,h,w->dhw", *profiles).astype(np.float32)


def centroid_voxels(kernel: ArrayLike) -> NDArray[np.float64]:
    """Offset (d, h, w) of the centre of mass from the centre voxel, in voxels."""
    k = np.asarray(kernel, dtype=np.float64)
    return np.array(ndimage.center_of_mass(k)) - np.array([n // 2 for n in k.shape])


def recentred(
    kernel: ArrayLike, *, tolerance_voxels: float = 1e-3
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The kernel moved so that its centre of mass is its centre voxel, and by how many voxels (d, h, w) it moved.

    Still not negative, sum 1. Moves by cubic splines; clipping what they undershoot moves the centroid a little, hence
    the repeats. A kernel that fills its box to the edge cannot be moved whole: the best move found is taken.
    """
    original = np.clip(np.asarray(kernel, dtype=np.float64), 0, None)
    best, best_moved = original, np.zeros(3)
    k, moved = original, np.zeros(3)
    for _ in range(20):
        if np.abs(centroid_voxels(k)).max() < np.abs(centroid_voxels(best)).max():
            best, best_moved = k, moved
        if np.abs(centroid_voxels(best)).max() < tolerance_voxels:
            break
        moved = moved - centroid_voxels(k)
        k = np.clip(ndimage.shift(original, moved, order=3, mode="constant"), 0, None)
    return (best / best.sum()).astype(np.float32), best_moved


def split_normal(fwhm_voxels: float, skew: float = 0.0, size: int | None = None) -> NDArray[np.float64]:
    """A profile (n,) of two half Gaussians, integrated over voxels; sum 1, its mean at the middle voxel.

    fwhm_voxels  2.355 sigma, in voxels;  skew  in (-1, 1): sigma (1 - skew) below the mode, sigma (1 + skew) above it.
    size         odd; by default 3 of the wider sigma on either side.
    The mean of a split normal lies sqrt(2/pi) (sigma_above - sigma_below) above its mode (John 1982); it is placed at
    0, so that a skewed kernel does not move the patient. Raises ValueError for a width or skew that makes no sense.
    """
    if fwhm_voxels <= 0 or not -1 < skew < 1:
        raise ValueError(f"width must be positive and skew within (-1, 1), got {fwhm_voxels} and {skew}")
    sigma = fwhm_voxels / FWHM_PER_SIGMA
    low, high = sigma * (1 - skew), sigma * (1 + skew)
    n = size or max(3, 2 * int(np.ceil(3.0 * max(low, high) + abs(high - low))) + 1)
    if n % 2 == 0:
        raise ValueError(f"a kernel has odd sizes, got {n}")
    t = np.arange(n + 1) - n / 2 + np.sqrt(2 / np.pi) * (high - low)
    below = 2 * low / (low + high) * special.ndtr(np.minimum(t, 0) / low)
    above = 2 * high / (low + high) * (special.ndtr(np.maximum(t, 0) / high) - 0.5)
    profile = np.diff(below + above)
    return profile / profile.sum()


def skewed(fwhm_mm: ArrayLike, skew: ArrayLike, spacing_mm: ArrayLike) -> NDArray[np.float32]:
    """The product of a `split_normal` along each axis: (d, h, w), sum 1; widths and spacing in mm along (D, H, W)."""
    widths = np.broadcast_to(np.asarray(fwhm_mm, dtype=np.float64), (3,))
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=np.float64), (3,))
    skews = np.broadcast_to(np.asarray(skew, dtype=np.float64), (3,))
    profiles = [split_normal(float(w / s), float(k)) for w, s, k in zip(widths, spacing, skews, strict=True)]
    return np.einsum("d,h,w->dhw", *profiles).astype(np.float32)
