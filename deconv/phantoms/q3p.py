"""The spheres of the paper: the Quantitative PET Prostate Phantom (Q3P)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deconv.phantoms.phantom import PAPER_SPACING_MM, Phantom, Scan, Sphere, add, assemble
from deconv.phantoms.scanner import triple

__all__ = ["spheres"]

DIAMETERS_MM = (16.0, 14.0, 10.0, 8.0, 7.0, 6.0, 5.0, 3.0)  # Fedrigo et al. 2022; paper, Phantom Analysis
RING_MM = 50.0
SPHERE_BQML = 31_000.0
BACKGROUND_BQML = 2_000.0


def spheres(
    shape: tuple[int, int, int] = (24, 48, 48),
    *,
    seed: int = 0,
    spacing: Sequence[float] = PAPER_SPACING_MM,
    fwhm_mm: float | Sequence[float] = 6.0,
    skew: float = 0.0,
    skew_axis: int = 2,
    radial: float = 0.0,
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 4.0,
) -> Phantom:
    """The Q3P ring of the paper: 16, 14, 10, 8, 7, 6, 5, 3 mm spheres of 31 kBq/mL in 2 kBq/mL.

    The ring lies in the middle slice plane with a radius of 50 mm, or the largest that fits; on a field of view too
    small for all eight the smallest are left out. The seed turns the ring and shifts every sphere by part of a voxel.
    `skew`, `noise` and the rest: see `psf_kernel` and `measure`; `radial`: see `Phantom` and `radial_blur_and_pool`.
    Raises ValueError where not even one sphere fits, or for a scan that `Scan` refuses.
    """
    scan = Scan(triple(spacing), triple(fwhm_mm), skew, skew_axis, radial, noise, noise_model, noise_fwhm_mm)
    rng = np.random.default_rng(seed)
    extent = np.array(shape) * scan.spacing
    diameters, radius = _ring_that_fits(extent, max(scan.spacing))
    start = rng.uniform(0, 2 * np.pi)
    balls = []
    for i, diameter in enumerate(diameters):
        angle = start + 2 * np.pi * i / len(diameters)
        on_ring = np.array([0.0, -radius * np.cos(angle), radius * np.sin(angle)])
        centre = extent / 2 + on_ring + rng.uniform(-0.5, 0.5, 3) * scan.spacing
        balls.append(Sphere(triple(centre), diameter, SPHERE_BQML))
    truth = np.full([2 * n for n in shape], BACKGROUND_BQML)
    for ball in balls:
        add(truth, np.array(scan.spacing) / 2, ball)
    return assemble(truth, None, scan, rng, spheres=tuple(balls), background=BACKGROUND_BQML, name="spheres")


def _ring_that_fits(extent: NDArray[np.float64], voxel_mm: float) -> tuple[tuple[float, ...], float]:
    """The spheres, largest first, that stand apart on the widest ring (at most 50 mm) inside the field of view."""
    biggest = DIAMETERS_MM[0]
    radius = min(RING_MM, min(extent[1], extent[2]) / 2 - biggest / 2 - 1.5 * voxel_mm)
    for count in range(len(DIAMETERS_MM), 0, -1):
        chord = 2 * radius * np.sin(np.pi / count) if count > 1 else np.inf
        if radius > 0 and chord > biggest + 6.0 and extent[0] > biggest:
            return DIAMETERS_MM[:count], radius
    raise ValueError(f"a field of view of {extent.round().tolist()} mm holds no ring with a {biggest} mm sphere")
