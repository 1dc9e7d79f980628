"""Phantom: a synthetic measurement with everything that is known about it; and how one is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deconv.phantoms.scanner import (
    FWHM_PER_SIGMA,
    REACH_SIGMA,
    Float3,
    add_noise,
    blur_and_pool,
    psf_kernel,
    radial_blur_and_pool,
    radial_fwhm,
    triple,
)
from deconv.phantoms.shapes import Ellipsoid, Shape, supersampled
from deconv.volume import Volume

__all__ = ["Lesion", "Phantom", "Scan", "Sphere", "add", "assemble"]

PAPER_SPACING_MM: Float3 = (2.8, 2.73, 2.73)  # Sample et al., Methods: all patients resampled to this grid


@dataclass(frozen=True)
class Sphere:
    """One hot sphere: centre in mm along (D, H, W) from the outer corner of the field of view; activity in Bq/mL."""

    centre_mm: Float3
    diameter_mm: float
    activity: float


@dataclass(frozen=True, eq=False)
class Lesion:
    """A lesion that is not a sphere: what it is, its shape (mm from the outer corner) and its activity in Bq/mL."""

    name: str
    shape: Shape
    activity: float


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic measurement together with everything that is known about it.

    measured    Volume (D, H, W), Bq/mL: blurred, pooled, noisy.
    truth       Volume (2D, 2H, 2W) on `measured.doubled`'s grid, Bq/mL.
    ct          Volume (D, H, W), HU, on the PET grid; None where the phantom has no anatomy.
    psf         (n, n, n) float64, odd, sum 1: the PSF integrated over PET voxels; a convolution kernel. Where the PSF
                varies (`radial`), that of the centre.
    psf_fine    (m, m, m) float64, odd, sum 1: the same PSF integrated over fine voxels; what made `measured`.
    fwhm_mm     along (D, H, W), of the centre.
    spheres     for recovery coefficients; empty where there are none.
    background  Bq/mL around the spheres or organs.
    name        says that it is synthetic.
    lesions     those of other shapes than spheres; empty where there are none.
    radial      how much the PSF widens along the radius from the centre to the edge of the plane: 0.5 is half as wide
                again. 0 where the PSF is the same everywhere. See `fwhm_range_mm`.
    """

    measured: Volume
    truth: Volume
    ct: Volume | None
    psf: NDArray[np.float64]
    psf_fine: NDArray[np.float64]
    fwhm_mm: Float3
    spheres: tuple[Sphere, ...]
    background: float
    name: str
    lesions: tuple[Lesion, ...] = ()
    radial: float = 0.0

    @property
    def fwhm_range_mm(self) -> tuple[Float3, Float3]:
        """FWHM along (D, H, W) at the centre, and at the edge for a place whose radius runs along that axis."""
        d, h, w = self.fwhm_mm
        return self.fwhm_mm, (d, float(radial_fwhm(h, self.radial, 1.0)), float(radial_fwhm(w, self.radial, 1.0)))

    def sphere_fraction(self, sphere: Sphere) -> NDArray[np.float64]:
        """(2D, 2H, 2W): the fraction of every fine voxel that lies inside `sphere`."""
        fraction = np.zeros(self.truth.shape)
        box, part = _sphere_part(self.truth.shape, self.truth.spacing, sphere)
        if box is not None:
            fraction[box] = part
        return fraction

    def lesion_fraction(self, lesion: Lesion) -> NDArray[np.float64]:
        """(2D, 2H, 2W): the fraction of every fine voxel that lies inside `lesion`; for `metrics.recovery`."""
        fraction = np.zeros(self.truth.shape)
        box, part = supersampled(lesion.shape, self.truth.shape, self.truth.spacing)
        if box is not None:
            fraction[box] = part
        return fraction


@dataclass(frozen=True)
class Scan:
    """How a phantom is scanned: voxel size (mm), PSF and noise; `psf_kernel`, `measure` and `Phantom` say what each is.

    Raises ValueError where `radial` is negative, or is given with a PSF that is skewed in the plane: a width along the
    radius is defined for a Gaussian only. Skew along D goes with it.
    """

    spacing: Float3
    fwhm_mm: Float3
    skew: float = 0.0
    skew_axis: int = 2
    radial: float = 0.0
    noise: float = 0.0
    noise_model: str = "relative"
    noise_fwhm_mm: float | Sequence[float] = 4.0

    def __post_init__(self) -> None:
        if self.radial < 0:
            raise ValueError(f"the PSF widens outwards: radial must not be negative, got {self.radial}")
        if self.radial and self.skew and self.skew_axis != 0:
            raise ValueError("a PSF that widens along the radius can be skewed along axis 0 (D) only, "
                             f"not along axis {self.skew_axis}")


def assemble(
    truth: NDArray[np.float64], hu: NDArray[np.float64] | None, scan: Scan, rng: np.random.Generator, *,
    spheres: tuple[Sphere, ...] = (), lesions: tuple[Lesion, ...] = (), background: float, name: str,
) -> Phantom:
    """Scan a `truth` (2D, 2H, 2W, Bq/mL) with CT numbers `hu` (D, H, W) and put down what is known."""
    spacing, fwhm_mm = scan.spacing, scan.fwhm_mm
    reach = max(w / s for w, s in zip(fwhm_mm, spacing, strict=True)) / FWHM_PER_SIGMA * REACH_SIGMA
    size = max(15, 2 * int(np.ceil(reach * (1 + abs(scan.skew)))) + 1)
    psf = psf_kernel(fwhm_mm, spacing, size=size, skew=scan.skew, skew_axis=scan.skew_axis)
    psf_fine = psf_kernel(fwhm_mm, np.array(spacing) / 2, size=2 * size - 1, skew=scan.skew, skew_axis=scan.skew_axis)
    if scan.radial:
        blurred = radial_blur_and_pool(truth, fwhm_mm, spacing, scan.radial, psf_fine.sum(axis=(1, 2)))
    else:
        blurred = blur_and_pool(truth, psf_fine)
    y = add_noise(blurred, rng=rng, spacing=spacing, noise=scan.noise, noise_model=scan.noise_model,
                  noise_fwhm_mm=scan.noise_fwhm_mm)
    measured = Volume.axial(y, spacing)
    ct = None if hu is None else Volume.axial(np.round(hu), spacing, unit="[hnsf'U]")
    return Phantom(measured, measured.doubled(truth), ct, psf, psf_fine, fwhm_mm, spheres, background,
                   f"synthetic {name} phantom", lesions, scan.radial)


def add(image: NDArray[np.float64], step: NDArray[np.float64], what: Sphere | Lesion) -> None:
    """Lay a sphere or lesion over `image`, whose voxels are `step` mm; voxels partly inside are mixed."""
    if isinstance(what, Sphere):
        box, part = _sphere_part(image.shape, step, what)
    else:
        box, part = supersampled(what.shape, image.shape, step)
    if box is not None:
        image[box] += part * (what.activity - image[box])


def _sphere_part(
    grid: Sequence[int], step: NDArray[np.float64], sphere: Sphere
) -> tuple[tuple[slice, ...] | None, NDArray[np.float64]]:
    return supersampled(Ellipsoid.ball(sphere.centre_mm, sphere.diameter_mm), grid, np.array(triple(step)))
