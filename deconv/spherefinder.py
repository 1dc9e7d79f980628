"""Where hot spheres lie in an image and about how large they are: maxima of the Laplacian of Gaussian over scale.

For a ball of radius R the scale-normalised Laplacian −σ² ∇² (G_σ ∗ y) is largest at its centre and at σ = R / √3 where
the image is sharp (Lindeberg, Int. J. Comput. Vis. 30, 79, 1998). The blur of the scanner adds its variance to that of
the sphere, which is taken off again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deconv.kernels import FWHM_PER_SIGMA

__all__ = ["Blob", "find_spheres"]

Array = NDArray[np.float64]
RADII_MM = (2.5, 4.0, 5.5, 7.5, 10.0, 13.5, 18.0, 22.0)
NOISE_SDS = 15.0  # of the response; white noise alone reaches 12


@dataclass(frozen=True)
class Blob:
    """Something round and hot: centre in mm along (D, H, W) from the outer corner, its size and how clear it is."""

    centre_mm: tuple[float, float, float]
    diameter_mm: float
    response: float


def find_spheres(
    image: Array, spacing: Array, *, fwhm_mm: float = 6.0, faintest: float = 0.35, most: int = 20
) -> list[Blob]:
    """Hot blobs, clearest first, none inside another, at most `most`. [] where nothing stands out of the noise.

    fwhm_mm   blur that is reckoned with;  faintest  response that still counts, as a part of the strongest.
    Blobs in the outermost voxels are passed over: the ends of a PET are noisy, and what is cut there is no sphere.
    """
    scales = [np.sqrt(radius**2 / 3.0 + (fwhm_mm / FWHM_PER_SIGMA) ** 2 * 0.5) for radius in RADII_MM]
    best = np.full(image.shape, -np.inf)
    which = np.zeros(image.shape, dtype=np.int8)
    for i, sigma in enumerate(scales):
        response = -(sigma**2) * _laplacian(image, spacing, sigma)
        better = response > best
        best[better], which[better] = response[better], i
    size = [max(3, 2 * int(np.ceil(4.0 / step)) + 1) for step in spacing]
    inner = np.zeros(image.shape, dtype=bool)
    inner[tuple(slice(edge, -edge) for edge in np.ceil(fwhm_mm / spacing).astype(int))] = True
    peaks = inner & (best == ndimage.maximum_filter(best, size=size)) & (best > 0)
    if not peaks.any():
        return []
    quiet = best[best > 0]
    noise = 1.4826 * float(np.median(np.abs(quiet - np.median(quiet))))
    limit = max(faintest * float(best[peaks].max()), NOISE_SDS * noise)
    found = [Blob(_centre(best, at, spacing), 2 * RADII_MM[which[tuple(at)]], float(best[tuple(at)]))
             for at in np.argwhere(peaks & (best > limit))]
    return _apart(sorted(found, key=lambda blob: -blob.response))[:most]


def _laplacian(image: Array, spacing: Array, sigma_mm: float) -> Array:
    """Second derivatives in 1/mm² of the image blurred by `sigma_mm`."""
    total = np.zeros(image.shape)
    for axis, step in enumerate(spacing):
        order = [2 if a == axis else 0 for a in range(3)]
        total += ndimage.gaussian_filter(image, sigma_mm / spacing, order=order, mode="nearest") / step**2
    return total


def _centre(response: Array, at: NDArray[np.int64], spacing: Array) -> tuple[float, float, float]:
    """mm from the outer corner, by the parabola through the peak and its two neighbours along each axis."""
    centre = []
    for axis, (i, step) in enumerate(zip(at, spacing, strict=True)):
        shift = 0.0
        if 0 < i < response.shape[axis] - 1:
            low, mid, high = (response[tuple(at + d * (np.arange(3) == axis))] for d in (-1, 0, 1))
            curve = low - 2 * mid + high
            shift = float(np.clip(0.5 * (low - high) / curve, -0.5, 0.5)) if curve < 0 else 0.0
        centre.append(float((i + 0.5 + shift) * step))
    return centre[0], centre[1], centre[2]


def _apart(blobs: list[Blob]) -> list[Blob]:
    """Of blobs that overlap only the clearest."""
    kept: list[Blob] = []
    for blob in blobs:
        if all(np.linalg.norm(np.subtract(blob.centre_mm, other.centre_mm))
               > (blob.diameter_mm + other.diameter_mm) / 2 for other in kept):
            kept.append(blob)
    return kept
