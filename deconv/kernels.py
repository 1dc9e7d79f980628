"""Blur kernels as arrays: make and centre. `deconv.metrics` measures them. Needs numpy and scipy only.

A kernel is (d, h, w) with odd sizes, not negative, with sum 1; voxel [d//2, h//2, w//2] is its centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, special

__all__ = ["FWHM_PER_SIGMA", "centroid_voxels", "gaussian", "recentred"]

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
