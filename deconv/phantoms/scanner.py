"""The scanner of the phantoms: point spread function, blur, voxels, noise. Physics, not the model of any method.

    y = P(x ∗ h) + noise,   h the PSF on the fine grid, P the mean over blocks of 2 x 2 x 2 fine voxels.

Blur and mean are separable, so that both are one matrix (N, 2N) per axis. A PSF that widens with the distance from the
axis of the scanner is not separable in the plane; there both are one sparse matrix from every place in the plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.special import ndtr

__all__ = ["NOISE_MODELS", "add_noise", "average_pool", "blur_and_pool", "measure", "psf_kernel", "radial_fwhm",
           "radial_blur_and_pool", "triple"]

Float3 = tuple[float, float, float]
Array = NDArray[np.float64]

NOISE_MODELS = ("relative", "poisson")
FWHM_PER_SIGMA = 2.0 * float(np.sqrt(2.0 * np.log(2.0)))
REACH_SIGMA = 4.5  # a Gaussian is cut off there: 7e-6 of its mass lies beyond


def psf_kernel(
    fwhm_mm: float | Sequence[float],
    spacing: Sequence[float] | Array,
    *,
    size: int = 15,
    skew: float = 0.0,
    skew_axis: int = 2,
) -> Array:
    """(size, size, size) Gaussian PSF integrated over voxels of `spacing` mm; sum 1.

    `skew` in (-1, 1) makes the profile along `skew_axis` a split normal with widths sigma (1 - skew) below and
    sigma (1 + skew) above its mode, placed so that its mean stays at the centre: the patient is not moved.
    Raises ValueError for an even size, a width that is not positive or a skew outside (-1, 1).
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size must be odd and positive, got {size}")
    if not -1 < skew < 1:
        raise ValueError(f"skew must lie between -1 and 1, got {skew}")
    widths = triple(fwhm_mm)
    if min(widths) <= 0:
        raise ValueError(f"FWHM must be positive, got {widths} mm")
    profiles = []
    for axis, (width, step) in enumerate(zip(widths, triple(spacing), strict=True)):
        edges: Array = (np.arange(size + 1, dtype=np.float64) - size / 2) * step
        mass = np.diff(_split_normal_cdf(edges, width / FWHM_PER_SIGMA, skew if axis == skew_axis else 0.0))
        profiles.append(mass / mass.sum())
    return np.einsum("i,j,k->ijk", *profiles)


def measure(
    truth: Array,
    psf_fine: Array,
    *,
    rng: np.random.Generator,
    spacing: Sequence[float],
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 4.0,
) -> Array:
    """(D, H, W): the fine `truth` blurred by `psf_fine`, averaged over 2 x 2 x 2, with noise, never negative.

    The noise is that of `add_noise`. Raises ValueError for an unknown noise model or a negative level.
    """
    return add_noise(blur_and_pool(truth, psf_fine), rng=rng, spacing=spacing, noise=noise, noise_model=noise_model,
                     noise_fwhm_mm=noise_fwhm_mm)


def add_noise(
    blurred: Array, *, rng: np.random.Generator, spacing: Sequence[float], noise: float, noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 4.0,
) -> Array:
    """(D, H, W) with noise, never negative.

    The noise is Gaussian, correlated over `noise_fwhm_mm` (0: white) as reconstruction and post-filter leave it. Its
    standard deviation is `noise` times the local activity ("relative": OSEM's noise grows with its mean) or `noise`
    times sqrt(local activity x maximum) ("poisson"). Raises ValueError for another model or a negative level.
    """
    if noise_model not in NOISE_MODELS:
        raise ValueError(f"noise model must be one of {NOISE_MODELS}, got {noise_model!r}")
    if noise < 0:
        raise ValueError(f"noise level must not be negative, got {noise}")
    if noise == 0:
        return blurred
    grain = rng.standard_normal(blurred.shape)
    correlation = np.array(triple(noise_fwhm_mm)) / FWHM_PER_SIGMA / np.array(triple(spacing))
    if np.any(correlation > 0):
        grain = ndimage.gaussian_filter(grain, correlation, mode="wrap")
        grain /= grain.std()
    level = blurred if noise_model == "relative" else np.sqrt(np.maximum(blurred, 0) * blurred.max())
    return np.maximum(blurred + noise * level * grain, 0.0)


def average_pool(fine: Array) -> Array:
    """(2D, 2H, 2W) -> (D, H, W): the mean over blocks of 2 x 2 x 2."""
    d, h, w = (n // 2 for n in fine.shape)
    return fine.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))


def blur_and_pool(truth: Array, psf_fine: Array) -> Array:
    """(2D, 2H, 2W) -> (D, H, W): convolution with the separable `psf_fine`, borders replicated, then `average_pool`."""
    profiles = [psf_fine.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    image = truth
    for axis, profile in enumerate(profiles):
        image = _along(_blur_matrix(profile, truth.shape[axis]), image, axis)
    return image


def radial_fwhm(fwhm_mm: float, radial: float, fraction: Array | float) -> Array:
    """FWHM along the radius at `fraction` of the way from the axis to the edge: fwhm (1 + radial fraction²), mm.

    Beyond the edge (the corners of the field of view) it stays what it is there.
    """
    return np.asarray(fwhm_mm * (1 + radial * np.minimum(fraction, 1.0) ** 2), dtype=np.float64)


def radial_blur_and_pool(truth: Array, fwhm_mm: Float3, spacing: Float3, radial: float, axial_profile: Array) -> Array:
    """(2D, 2H, 2W) -> (D, H, W): blurred by a PSF that widens along the radius, then `average_pool`.

    truth          Bq/mL on the fine grid; spacing is that of the PET grid, mm along (D, H, W).
    fwhm_mm        of the centre, along (D, H, W).
    radial         FWHM grows along the radial direction as `radial_fwhm` says; the edge is half the shorter side of
                   the field of view. Across the radius and along D it stays that of the centre.
    axial_profile  (n,) the PSF along D on the fine grid, sum 1.

    The activity of every fine voxel is spread by the PSF of its own place, so that total activity is kept; image
    borders are replicated as in `blur_and_pool`. Raises ValueError where `radial` is negative.
    """
    if radial < 0:
        raise ValueError(f"the PSF widens outwards: radial must not be negative, got {radial}")
    matrix, pad = _radial_matrix((truth.shape[1], truth.shape[2]), fwhm_mm, spacing, radial)
    slices = _along(_blur_matrix(axial_profile, len(truth)), truth, 0)
    padded = np.pad(slices, ((0, 0), (pad[0],) * 2, (pad[1],) * 2), mode="edge")
    pooled = matrix @ padded.reshape(len(slices), -1).T
    return np.ascontiguousarray(pooled.T).reshape(len(slices), truth.shape[1] // 2, truth.shape[2] // 2)


@lru_cache(maxsize=2)  # seeds and noise levels of one scanner share it; it takes seconds and tens of MB
def _radial_matrix(
    shape: tuple[int, int], fwhm_mm: Float3, spacing: Float3, radial: float
) -> tuple[sparse.csr_matrix, tuple[int, int]]:
    """(H W, padded 2H 2W) in-plane blur and mean, and by how many fine voxels the plane must be padded."""
    step = np.array(spacing[1:]) / 2
    sigma = np.array(fwhm_mm[1:]) / FWHM_PER_SIGMA
    reach = REACH_SIGMA * sigma.max() * (1 + radial)
    pad = np.ceil(reach / step / 2).astype(int) * 2
    size = np.array(shape) + 2 * pad
    middle = np.array(shape) * step / 2
    # where the fine pixels lie, mm from the axis, and how wide the PSF is there
    lines = [(np.arange(n) - p + 0.5) * s - m for n, p, s, m in zip(size, pad, step, middle, strict=True)]
    at = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)
    distance = np.linalg.norm(at, axis=1)
    outward = at / np.maximum(distance, 1e-9)[:, None]
    widening = radial_fwhm(1.0, radial, distance / middle.min())
    along = np.sum((outward * sigma) ** 2, axis=1)  # variance of the centre's PSF along the radius
    covariance = np.diag(sigma**2) + (along * (widening**2 - 1))[:, None, None] * outward[:, :, None] * outward[:, None]
    precision = np.linalg.inv(covariance)

    window = 2 * (pad // 2) + 2  # PET pixels along each axis that a PSF may reach
    first = np.stack(np.unravel_index(np.arange(len(at)), size), axis=-1) // 2 - pad // 2
    count = 3 if 2 * step.max() < 1.2 * sigma.min() else 5  # relative error of the integral below 1e-4
    pixels, nodes, weights = _window_nodes(window, step, count)
    rows, columns, values = [], [], []
    coarse = size // 2
    for start in range(0, len(at), 2000):  # a few thousand sources at a time bound the memory
        some = slice(start, start + 2000)
        origin = first[some] * 2 * step - pad * step - middle
        u, v = (origin[:, i, None] + nodes[:, i] - at[some, i, None] for i in range(2))
        p = precision[some]
        exponent = u * (p[:, 0, 0, None] * u + 2 * p[:, 0, 1, None] * v) + p[:, 1, 1, None] * v * v
        mass = np.exp(-0.5 * exponent).reshape(len(u), len(pixels), -1) @ weights
        mass /= mass.sum(axis=1, keepdims=True)
        target = first[some, None] + pixels - pad // 2
        inside = np.all((target >= 0) & (target < coarse - pad), axis=-1) & (mass > 1e-9)
        source = np.broadcast_to(np.arange(len(at))[some, None], inside.shape)
        rows.append((target[..., 0] * (coarse - pad)[1] + target[..., 1])[inside])
        columns.append(source[inside])
        values.append(mass[inside] / 4)  # a PET pixel is the mean of four fine ones
    where = (np.concatenate(rows), np.concatenate(columns))
    matrix = sparse.csr_matrix((np.concatenate(values), where), shape=(int(np.prod(coarse - pad)), len(at)))
    return matrix, (int(pad[0]), int(pad[1]))


def _window_nodes(window: NDArray[np.int64], step: Array, count: int) -> tuple[NDArray[np.int64], Array, Array]:
    """PET pixels (n, 2) of a window, their Gauss-Legendre nodes (n m, 2) in mm from its corner, weights (m,).

    `count` nodes along each axis of a pixel: m = count².
    """
    points, weights = np.polynomial.legendre.leggauss(count)
    pixels = np.stack(np.meshgrid(*[np.arange(n) for n in window], indexing="ij"), axis=-1).reshape(-1, 2)
    inner = np.stack(np.meshgrid(points + 1, points + 1, indexing="ij"), axis=-1).reshape(-1, 2)  # 0 .. 2 fine pixels
    nodes = ((2 * pixels[:, None] + inner) * step).reshape(-1, 2)
    return pixels, nodes, np.outer(weights, weights).ravel()


def _blur_matrix(profile: Array, size: int) -> Array:
    """(size / 2, size): convolution with `profile`, borders replicated, then the mean of pairs."""
    half = len(profile) // 2
    places = np.arange(size)[:, None] - (np.arange(len(profile)) - half)  # y[i] = sum_j profile[j] x[i - j]
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], np.clip(places, 0, size - 1)), profile)
    return matrix.reshape(size // 2, 2, size).mean(axis=1)


def _along(matrix: Array, image: Array, axis: int) -> Array:
    return np.moveaxis(np.tensordot(matrix, image, axes=(1, axis)), 0, axis)


def _split_normal_cdf(x: Array, sigma: float, skew: float) -> Array:
    low, high = sigma * (1 - skew), sigma * (1 + skew)
    t = x + np.sqrt(2 / np.pi) * (high - low)  # the mean of a split normal lies that far from its mode
    below = 2 * low / (low + high) * ndtr(np.minimum(t, 0) / low)
    above = 2 * high / (low + high) * (ndtr(np.maximum(t, 0) / high) - 0.5)
    return below + above


def triple(values: float | Sequence[float] | Array) -> Float3:
    """One number for all axes, or three along (D, H, W)."""
    a, b, c = np.broadcast_to(np.asarray(values, dtype=np.float64), 3).tolist()
    return a, b, c
