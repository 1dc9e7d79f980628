"""Random scenes of activity with known truth and PSF, on which Gk is taught: no organ, no sphere, no measured image.

Three families of shapes fill a box in random order and number, each with an activity and a texture of its own:
excursion sets of Gaussian random fields, polyhedra (intersections of half spaces), and superquadrics whose exponent is
never 2, so that no ellipsoid is among them. The phantoms that judge the methods (`deconv.phantoms`) are built of
spheres, ellipsoids and rods: the families are disjoint.

    y = P(x ∗ h) + noise,   h a product of split normals, P the mean over 2 x 2 x 2 fine voxels

Lengths are in PET voxels throughout: what a voxel is in mm does not matter to what can be read off the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deconv.kernels import FWHM_PER_SIGMA, split_normal

__all__ = ["Blur", "blurred", "random_blur", "random_truth"]

Array = NDArray[np.float32]

POWERS = (1.2, 1.6, 2.5, 3.0, 4.0, 8.0)  # of superquadrics; 2 would be an ellipsoid


@dataclass(frozen=True)
class Blur:
    """A PSF and the noise that follows it. fwhm (3,) PET voxels; skew (3,) in (-1, 1); noise relative to the activity,
    correlated over noise_fwhm PET voxels; share of it that grows with the square root of the activity only."""

    fwhm: tuple[float, float, float]
    skew: tuple[float, float, float]
    noise: float
    noise_fwhm: float
    poisson: float


def random_blur(rng: np.random.Generator) -> Blur:
    """PSFs of 0.9 to 4.5 PET voxels, unlike along the axes, most of them skewed; one in three without noise."""
    base = np.exp(rng.uniform(np.log(0.95), np.log(4.2)))
    widths = base * np.exp(rng.normal(0, 0.18, 3))
    skew = rng.uniform(-0.6, 0.6, 3) * (rng.random(3) < 0.7)
    noise = 0.0 if rng.random() < 0.33 else float(np.exp(rng.uniform(np.log(0.004), np.log(0.14))))
    w0, w1, w2 = (float(v) for v in np.clip(widths, 0.8, 5.0))
    s0, s1, s2 = (float(v) for v in skew)
    return Blur((w0, w1, w2), (s0, s1, s2), noise, float(rng.uniform(0.0, 0.9) * base), float(rng.random()))


def random_truth(shape: tuple[int, int, int], rng: np.random.Generator) -> Array:
    """(D, H, W) activity on the fine grid."""
    x = np.full(shape, np.exp(rng.uniform(np.log(0.005), np.log(0.3))), dtype=np.float32)
    if rng.random() < 0.5:
        x *= _texture(shape, rng, rng.uniform(0.0, 0.2))
    coordinates = np.meshgrid(*(np.arange(n, dtype=np.float32) + 0.5 for n in shape), indexing="ij", sparse=True)
    for _ in range(1 + int(rng.exponential(4.0))):
        inside = _shape(coordinates, shape, rng)
        level = float(np.exp(rng.uniform(np.log(0.03), 0.0)))
        texture = _texture(shape, rng, rng.uniform(0.02, 0.2)) if rng.random() < 0.5 else np.float32(1.0)
        x = x * (1 - inside) + inside * level * texture
    return np.asarray(x, dtype=np.float32)


def blurred(truth: Array, blur: Blur, margin: int, rng: np.random.Generator) -> Array:
    """y: `truth` blurred, averaged, without `margin` PET voxels at every border, with noise; maximum 1."""
    x = truth
    for axis in range(3):
        profile = split_normal(2.0 * blur.fwhm[axis], blur.skew[axis])
        x = ndimage.convolve1d(x, profile.astype(np.float32), axis=axis, mode="nearest")
    d, h, w = (n // 2 for n in x.shape)
    y = x.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))[(slice(margin, -margin),) * 3]
    if blur.noise:
        grain = rng.standard_normal(y.shape, dtype=np.float32)
        sigma = blur.noise_fwhm / FWHM_PER_SIGMA
        if sigma > 0.2:
            grain = ndimage.gaussian_filter(grain, sigma, mode="wrap")
            grain /= grain.std()
        level = (1 - blur.poisson) * y + blur.poisson * np.sqrt(np.maximum(y, 0) * y.max())
        y = np.maximum(y + blur.noise * level * grain, 0)
    return np.asarray(y / y.max(), dtype=np.float32)


def _texture(shape: tuple[int, ...], rng: np.random.Generator, size: float) -> Array:
    """A positive random field of median 1, smooth over 3 to 14 fine voxels."""
    field = _field(shape, [rng.uniform(3.0, 14.0)] * 3, rng)
    return np.exp(size * field / max(float(field.std()), 1e-6))


def _field(shape: tuple[int, ...], steps: list[float], rng: np.random.Generator) -> Array:
    """(D, H, W): cubic B-splines with random coefficients, knots `steps` fine voxels apart."""
    splines = [_splines(n, step, rng.random()) for n, step in zip(shape, steps, strict=True)]
    field = rng.standard_normal([matrix.shape[1] for matrix in splines]).astype(np.float32)
    for axis, matrix in enumerate(splines):
        field = np.moveaxis(np.tensordot(matrix, field, axes=(1, axis)), 0, axis)
    return field


def _splines(n: int, step: float, phase: float) -> Array:
    """(n, knots) values of cubic B-splines at the voxels."""
    place = np.arange(n) / step + phase
    t = np.abs(place[:, None] - (np.arange(int(place[-1]) + 4) - 1)[None, :])
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.where(t < 2, (2 - t) ** 3 / 6, 0.0)).astype(np.float32)


def _shape(coordinates: Sequence[Array], shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """(D, H, W) share of every voxel inside one random shape, from the signed distance to its surface."""
    kind = rng.random()
    if kind < 0.3:
        return _excursion(shape, rng)
    centre = [rng.uniform(0, n) for n in shape]
    radii = np.exp(rng.uniform(np.log(1.5), np.log(0.35 * max(shape)), 1)) * np.exp(rng.normal(0, 0.35, 3))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0] if rng.random() < 0.7 else np.eye(3)
    offset = [c - m for c, m in zip(coordinates, centre, strict=True)]
    rotated: list[Array] = [np.asarray(sum(float(turn[i, j]) * offset[j] for j in range(3))) for i in range(3)]
    if kind < 0.5:
        return _polyhedron(rotated, radii, rng)
    power = float(rng.choice(POWERS))
    value = sum(np.abs(r / s) ** power for r, s in zip(rotated, radii, strict=True)) ** (1 / power)
    return np.clip((1 - value) * float(radii.min()) + 0.5, 0, 1)


def _polyhedron(rotated: list[Array], radii: NDArray[np.float64], rng: np.random.Generator) -> Array:
    distance: Array | float = np.inf
    for _ in range(int(rng.integers(4, 12))):
        normal = rng.standard_normal(3)
        normal /= np.linalg.norm(normal)
        reach = float(np.abs(normal) @ radii) * rng.uniform(0.5, 1.0)
        distance = np.minimum(distance, reach - sum(float(n) * r for n, r in zip(normal, rotated, strict=True)))
    return np.clip(np.asarray(distance) + 0.5, 0, 1)


def _excursion(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Where a Gaussian random field exceeds a level: organic, any topology."""
    steps = np.exp(rng.uniform(np.log(3.0), np.log(12.0))) * np.exp(rng.normal(0, 0.25, 3))
    field = _field(shape, [float(step) for step in steps], rng)
    slope = np.sqrt(sum(np.gradient(field, axis=a) ** 2 for a in range(3)))
    level = np.quantile(field, rng.uniform(0.5, 0.95))
    return np.clip((field - level) / np.maximum(slope, 1e-3) + 0.5, 0, 1)
