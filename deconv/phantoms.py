"""Digital PET phantoms with known truth: spheres, head and neck, whole body. All synthetic, all seeded.

The truth lives on a grid twice as fine as the PET grid and is rendered from analytic shapes by supersampling. The
measurement follows the physics of the scanner, not the model of any method:

    y = P(x ∗ h) + noise,   h the PSF on the fine grid, P the mean over blocks of 2 x 2 x 2 fine voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import ndtr

from deconv.volume import Volume

__all__ = [
    "NOISE_MODELS", "PAPER_SPACING_MM", "PHANTOMS", "Phantom", "Sphere", "average_pool", "head_and_neck", "measure",
    "psf_kernel", "spheres", "whole_body",
]

Float3 = tuple[float, float, float]

PAPER_SPACING_MM: Float3 = (2.8, 2.73, 2.73)  # Sample et al., Methods: all patients resampled to this grid
Q3P_DIAMETERS_MM = (16.0, 14.0, 10.0, 8.0, 7.0, 6.0, 5.0, 3.0)  # Fedrigo et al. 2022; paper, Phantom Analysis
Q3P_RING_MM = 50.0
Q3P_SPHERE_BQML = 31_000.0
Q3P_BACKGROUND_BQML = 2_000.0
NOISE_MODELS = ("relative", "poisson")
_FWHM = 2.0 * np.sqrt(2.0 * np.log(2.0))


@dataclass(frozen=True)
class Sphere:
    """One hot sphere: centre in mm along (D, H, W) from the outer corner of the field of view; activity in Bq/mL."""

    centre_mm: Float3
    diameter_mm: float
    activity: float


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic measurement together with everything that is known about it.

    measured    Volume (D, H, W), Bq/mL: blurred, pooled, noisy.
    truth       Volume (2D, 2H, 2W) on `measured.doubled`'s grid, Bq/mL.
    ct          Volume (D, H, W), HU, on the PET grid; None where the phantom has no anatomy.
    psf         (n, n, n) float64, odd, sum 1: the PSF integrated over PET voxels; a convolution kernel.
    psf_fine    (m, m, m) float64, odd, sum 1: the same PSF integrated over fine voxels; what made `measured`.
    fwhm_mm     along (D, H, W).
    spheres     for recovery coefficients; empty where there are none.
    background  Bq/mL around the spheres or organs.
    name        says that it is synthetic.
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

    def sphere_fraction(self, sphere: Sphere) -> NDArray[np.float64]:
        """(2D, 2H, 2W): the fraction of every fine voxel that lies inside `sphere`."""
        fraction = np.zeros(self.truth.shape)
        box, part = _sphere_fraction(self.truth.shape, _triple(self.truth.spacing), sphere)
        if box is not None:
            fraction[box] = part
        return fraction


def spheres(
    shape: tuple[int, int, int] = (24, 48, 48),
    *,
    seed: int = 0,
    spacing: Sequence[float] = PAPER_SPACING_MM,
    fwhm_mm: float | Sequence[float] = 6.0,
    skew: float = 0.0,
    skew_axis: int = 2,
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 4.0,
) -> Phantom:
    """The Q3P ring of the paper: 16, 14, 10, 8, 7, 6, 5, 3 mm spheres of 31 kBq/mL in 2 kBq/mL.

    The ring lies in the middle slice plane with a radius of 50 mm, or the largest that fits; on a field of view too
    small for all eight the smallest are left out. The seed turns the ring and shifts every sphere by part of a voxel.
    `skew`, `noise` and the rest: see `psf_kernel` and `measure`. Raises ValueError where not even one sphere fits.
    """
    spacing = _triple(spacing)
    rng = np.random.default_rng(seed)
    extent = np.array(shape) * spacing
    diameters, radius = _ring_that_fits(extent, max(spacing))
    start = rng.uniform(0, 2 * np.pi)
    balls = []
    for i, diameter in enumerate(diameters):
        angle = start + 2 * np.pi * i / len(diameters)
        on_ring = np.array([0.0, -radius * np.cos(angle), radius * np.sin(angle)])
        centre = extent / 2 + on_ring + rng.uniform(-0.5, 0.5, 3) * spacing
        balls.append(Sphere(_triple(centre), diameter, Q3P_SPHERE_BQML))
    truth = np.full([2 * n for n in shape], Q3P_BACKGROUND_BQML)
    for ball in balls:
        _add_sphere(truth, _triple(np.array(spacing) / 2), ball)
    return _phantom(truth, None, spacing, fwhm_mm, (skew, skew_axis), (noise, noise_model, noise_fwhm_mm), rng,
                    tuple(balls), Q3P_BACKGROUND_BQML, "spheres")


def head_and_neck(
    shape: tuple[int, int, int] = (32, 48, 48),
    *,
    seed: int = 0,
    spacing: Sequence[float] = PAPER_SPACING_MM,
    fwhm_mm: float | Sequence[float] = 6.0,
    skew: float = 0.0,
    skew_axis: int = 2,
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 4.0,
) -> Phantom:
    """PSMA uptake in irregular, heterogeneous parotid, submandibular and lacrimal glands, with a matching CT.

    Organs scale with the field of view where it is smaller than 88 x 128 x 128 mm. Arguments as in `spheres`.
    """
    spacing = _triple(spacing)
    rng = np.random.default_rng(seed)
    extent = np.array(shape) * spacing
    scale = float(min(1.0, np.min(extent / (88.0, 128.0, 128.0))))
    truth, hu = _render(_HEAD_AND_NECK, shape, spacing, scale, rng)
    return _phantom(truth, hu, spacing, fwhm_mm, (skew, skew_axis), (noise, noise_model, noise_fwhm_mm), rng, (),
                    _HEAD_AND_NECK[0].activity, "head and neck")


def whole_body(
    shape: tuple[int, int, int] = (160, 96, 96),
    *,
    seed: int = 0,
    spacing: Sequence[float] = (5.0, 5.0, 5.0),
    fwhm_mm: float | Sequence[float] = 7.0,
    skew: float = 0.0,
    skew_axis: int = 2,
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 6.0,
) -> Phantom:
    """A trunk with liver, kidneys, spleen, bladder, lungs, spine and eight round lesions (`spheres`), and its CT.

    Organs scale with the field of view (made for 800 x 480 x 480 mm). Arguments as in `spheres`.
    """
    spacing = _triple(spacing)
    rng = np.random.default_rng(seed)
    extent = np.array(shape) * spacing
    scale = float(np.min(extent / (800.0, 480.0, 480.0)))
    truth, hu = _render(_WHOLE_BODY, shape, spacing, scale, rng)
    lesions = tuple(
        Sphere(_triple(extent / 2 + scale * np.array(at) + rng.uniform(-0.5, 0.5, 3) * spacing), diameter, 40_000.0)
        for at, diameter in _LESIONS
    )
    for lesion in lesions:
        _add_sphere(truth, _triple(np.array(spacing) / 2), lesion)
    return _phantom(truth, hu, spacing, fwhm_mm, (skew, skew_axis), (noise, noise_model, noise_fwhm_mm), rng, lesions,
                    _WHOLE_BODY[0].activity, "whole body")


PHANTOMS: dict[str, Callable[..., Phantom]] = {
    "spheres": spheres, "head-and-neck": head_and_neck, "whole-body": whole_body,
}


# --- the scanner -------------------------------------------------------------------------------------------------

def psf_kernel(
    fwhm_mm: float | Sequence[float],
    spacing: Sequence[float] | NDArray[np.float64],
    *,
    size: int = 15,
    skew: float = 0.0,
    skew_axis: int = 2,
) -> NDArray[np.float64]:
    """(size, size, size) Gaussian PSF integrated over voxels of `spacing` mm; sum 1.

    `skew` in (-1, 1) makes the profile along `skew_axis` a split normal with widths sigma (1 - skew) below and
    sigma (1 + skew) above its mode, placed so that its mean stays at the centre: the patient is not moved.
    Raises ValueError for an even size, a width that is not positive or a skew outside (-1, 1).
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size must be odd and positive, got {size}")
    if not -1 < skew < 1:
        raise ValueError(f"skew must lie between -1 and 1, got {skew}")
    widths = _triple(fwhm_mm)
    if min(widths) <= 0:
        raise ValueError(f"FWHM must be positive, got {widths} mm")
    profiles = []
    for axis, (width, step) in enumerate(zip(widths, _triple(spacing), strict=True)):
        edges: NDArray[np.float64] = (np.arange(size + 1, dtype=np.float64) - size / 2) * step
        mass = np.diff(_split_normal_cdf(edges, float(width / _FWHM), skew if axis == skew_axis else 0.0))
        profiles.append(mass / mass.sum())
    return np.einsum("i,j,k->ijk", *profiles)


def measure(
    truth: NDArray[np.float64],
    psf_fine: NDArray[np.float64],
    *,
    rng: np.random.Generator,
    spacing: Sequence[float],
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 4.0,
) -> NDArray[np.float64]:
    """(D, H, W): the fine `truth` blurred by `psf_fine`, averaged over 2 x 2 x 2, with noise, never negative.

    The noise is Gaussian, correlated over `noise_fwhm_mm` (0: white) as reconstruction and post-filter leave it. Its
    standard deviation is `noise` times the local activity ("relative": OSEM's noise grows with its mean) or `noise`
    times sqrt(local activity x maximum) ("poisson"). Raises ValueError for another model or a negative level.
    """
    if noise_model not in NOISE_MODELS:
        raise ValueError(f"noise model must be one of {NOISE_MODELS}, got {noise_model!r}")
    if noise < 0:
        raise ValueError(f"noise level must not be negative, got {noise}")
    blurred = average_pool(_blur_replicated(truth, psf_fine))
    if noise == 0:
        return blurred
    grain = rng.standard_normal(blurred.shape)
    correlation = np.array(_triple(noise_fwhm_mm)) / _FWHM / np.array(_triple(spacing))
    if np.any(correlation > 0):
        grain = ndimage.gaussian_filter(grain, correlation, mode="wrap")
        grain /= grain.std()
    level = blurred if noise_model == "relative" else np.sqrt(np.maximum(blurred, 0) * blurred.max())
    return np.maximum(blurred + noise * level * grain, 0.0)


def average_pool(fine: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2D, 2H, 2W) -> (D, H, W): the mean over blocks of 2 x 2 x 2."""
    d, h, w = (n // 2 for n in fine.shape)
    return fine.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))


def _blur_replicated(image: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convolution with replicated borders, by one 1-D pass per axis: every PSF here is separable."""
    marginals = [kernel.sum(axis=tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    for axis, profile in enumerate(marginals):
        image = ndimage.convolve1d(image, profile, axis=axis, mode="nearest")
    return image


def _split_normal_cdf(x: NDArray[np.float64], sigma: float, skew: float) -> NDArray[np.float64]:
    low, high = sigma * (1 - skew), sigma * (1 + skew)
    t = x + np.sqrt(2 / np.pi) * (high - low)  # the mean of a split normal lies that far from its mode
    below = 2 * low / (low + high) * ndtr(np.minimum(t, 0) / low)
    above = 2 * high / (low + high) * (ndtr(np.maximum(t, 0) / high) - 0.5)
    return below + above


def _phantom(
    truth: NDArray[np.float64], hu: NDArray[np.float64] | None, spacing: Float3, fwhm_mm: float | Sequence[float],
    skew: tuple[float, int], noise: tuple[float, str, float | Sequence[float]], rng: np.random.Generator,
    balls: tuple[Sphere, ...], background: float, name: str,
) -> Phantom:
    fine_spacing = np.array(spacing) / 2
    reach = max(w / s for w, s in zip(_triple(fwhm_mm), spacing, strict=True)) / _FWHM * 4.5 * (1 + abs(skew[0]))
    size = max(15, 2 * int(np.ceil(reach)) + 1)
    psf = psf_kernel(fwhm_mm, spacing, size=size, skew=skew[0], skew_axis=skew[1])
    psf_fine = psf_kernel(fwhm_mm, fine_spacing, size=2 * size - 1, skew=skew[0], skew_axis=skew[1])
    y = measure(truth, psf_fine, rng=rng, spacing=spacing, noise=noise[0], noise_model=noise[1],
                noise_fwhm_mm=noise[2])
    measured = Volume.axial(y, spacing)
    ct = None if hu is None else Volume.axial(np.round(hu), spacing, unit="[hnsf'U]")
    return Phantom(measured, measured.doubled(truth), ct, psf, psf_fine, _triple(fwhm_mm), balls, background,
                   f"synthetic {name} phantom")


def _ring_that_fits(extent: NDArray[np.float64], voxel_mm: float) -> tuple[tuple[float, ...], float]:
    """The spheres, largest first, that stand apart on the widest ring (at most 50 mm) inside the field of view."""
    biggest = Q3P_DIAMETERS_MM[0]
    radius = min(Q3P_RING_MM, min(extent[1], extent[2]) / 2 - biggest / 2 - 1.5 * voxel_mm)
    for count in range(len(Q3P_DIAMETERS_MM), 0, -1):
        chord = 2 * radius * np.sin(np.pi / count) if count > 1 else np.inf
        if radius > 0 and chord > biggest + 6.0 and extent[0] > biggest:
            return Q3P_DIAMETERS_MM[:count], radius
    raise ValueError(f"a field of view of {extent.round().tolist()} mm holds no ring with a {biggest} mm sphere")


# --- shapes ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class _Waves:
    """A smooth random function of position, mean 0, standard deviation about 1: plane waves, so it knows no grid."""

    wave_vectors: NDArray[np.float64]  # (n, 3), 1/mm
    phases: NDArray[np.float64]  # (n,)

    @classmethod
    def random(cls, rng: np.random.Generator, wavelength_mm: float, count: int = 12) -> _Waves:
        directions = rng.standard_normal((count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = 2 * np.pi / wavelength_mm * rng.uniform(0.5, 1.5, (count, 1))
        return cls(lengths * directions, rng.uniform(0, 2 * np.pi, count))

    def at(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n,) values at points (n, 3), mm along (D, H, W)."""
        return np.sqrt(2 / len(self.phases)) * np.cos(points @ self.wave_vectors.T + self.phases).sum(axis=-1)

    def on_grid(self, axes: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        """(D, H, W) values on the grid of three coordinate axes: a wave is a product of one factor per axis."""
        d, h, w = (np.outer(axis, self.wave_vectors[:, i]) for i, axis in enumerate(axes))
        plane = (h[:, None, :] + w[None, :, :]).reshape(-1, len(self.phases))
        values = np.cos(d + self.phases) @ np.cos(plane).T - np.sin(d + self.phases) @ np.sin(plane).T
        return np.sqrt(2 / len(self.phases)) * values.reshape(len(d), len(h), len(w))


_SMOOTH = _Waves(np.zeros((1, 3)), np.full(1, np.pi / 2))  # zero everywhere


@dataclass(frozen=True, eq=False)
class _Shape:
    """An ellipsoid with a bumpy surface: inside where |(p - centre) / radii| <= 1 + bump_size x bumps(p)."""

    centre: NDArray[np.float64]
    radii: NDArray[np.float64]
    bumps: _Waves = _SMOOTH
    bump_size: float = 0.0

    @classmethod
    def ball(cls, sphere: Sphere) -> _Shape:
        return cls(np.array(sphere.centre_mm), np.full(3, sphere.diameter_mm / 2))

    def fraction(self, axes: Sequence[NDArray[np.float64]], step: NDArray[np.float64], samples: int = 4
                 ) -> NDArray[np.float64]:
        """(D, H, W): the part of every voxel inside; `samples`³ points in voxels that the surface may cross."""
        scaled = [((axis - c) / r) ** 2 for axis, c, r in zip(axes, self.centre, self.radii, strict=True)]
        distance = np.sqrt(scaled[0][:, None, None] + scaled[1][None, :, None] + scaled[2][None, None, :])
        edge = 1.0 + self.bump_size * self.bumps.on_grid(axes)
        part = (distance <= edge).astype(np.float64)
        crossed = np.nonzero(np.abs(distance - edge) <= np.linalg.norm(step / self.radii))
        centres = np.stack([axis[i] for axis, i in zip(axes, crossed, strict=True)], axis=-1)
        inside = np.zeros(len(centres))
        offsets = (np.arange(samples) + 0.5) / samples - 0.5
        for offset in np.stack(np.meshgrid(offsets, offsets, offsets), axis=-1).reshape(-1, 3):
            points = centres + offset * step
            radius = np.sqrt((((points - self.centre) / self.radii) ** 2).sum(axis=-1))
            inside += radius <= 1.0 + self.bump_size * self.bumps.at(points)
        part[crossed] = inside / samples**3
        return part


@dataclass(frozen=True, eq=False)
class _Organ:
    """Where an organ lies (mm from the middle of the field of view), its size, uptake, texture and CT number."""

    centre: Float3
    radii: Float3
    activity: float
    hu: float
    bump_size: float = 0.12
    uptake_variation: float = 0.0
    hu_variation: float = 15.0
    grain_mm: float = 18.0


def _render(
    organs: Sequence[_Organ], shape: tuple[int, int, int], spacing: Float3, scale: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Activity (2D, 2H, 2W) in Bq/mL and CT numbers (D, H, W) in HU; later organs lie over earlier ones."""
    fine = np.array(spacing) / 2
    middle = np.array(shape) * spacing / 2
    truth = np.zeros([2 * n for n in shape])
    hu = np.full(truth.shape, -1000.0)
    for organ in organs:
        grain = max(organ.grain_mm * scale, 6.0)
        outline = _Shape(middle + scale * np.array(organ.centre), scale * np.array(organ.radii),
                         _Waves.random(rng, grain), organ.bump_size)
        texture = _Waves.random(rng, 1.2 * grain)
        box, axes = _box_of(outline, truth.shape, fine)
        if box is None:
            continue
        part, grains = outline.fraction(axes, fine), texture.on_grid(axes)
        uptake = organ.activity * np.clip(1 + organ.uptake_variation * grains, 0.2, 2.0)
        truth[box] += part * (uptake - truth[box])
        hu[box] += part * (organ.hu + organ.hu_variation * grains - hu[box])
    return truth, average_pool(hu) + rng.normal(0.0, 8.0, shape)


def _add_sphere(image: NDArray[np.float64], spacing: Float3, sphere: Sphere) -> None:
    box, part = _sphere_fraction(image.shape, spacing, sphere)
    if box is not None:
        image[box] += part * (sphere.activity - image[box])


def _sphere_fraction(
    shape: Sequence[int], spacing: Float3, sphere: Sphere
) -> tuple[tuple[slice, ...] | None, NDArray[np.float64]]:
    outline = _Shape.ball(sphere)
    box, axes = _box_of(outline, shape, np.array(spacing))
    return box, np.zeros(0) if box is None else outline.fraction(axes, np.array(spacing))


def _box_of(
    outline: _Shape, shape: Sequence[int], step: NDArray[np.float64]
) -> tuple[tuple[slice, ...] | None, list[NDArray[np.float64]]]:
    """The voxels an outline may touch, with their centres in mm along each axis; None where it misses the grid."""
    reach = outline.radii * (1 + 3.5 * outline.bump_size)
    low = np.clip(np.floor((outline.centre - reach) / step).astype(int) - 1, 0, shape)
    high = np.clip(np.ceil((outline.centre + reach) / step).astype(int) + 1, 0, shape)
    axes = [(np.arange(a, b) + 0.5) * s for a, b, s in zip(low, high, step, strict=True)]
    if np.any(high <= low):
        return None, axes
    return tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)), axes


def _triple(values: float | Sequence[float] | NDArray[np.float64]) -> Float3:
    a, b, c = np.broadcast_to(np.asarray(values, dtype=np.float64), 3).tolist()
    return a, b, c


# Positions from the middle along (D up, H to the back, W to the left); radii likewise. Uptake as in PSMA PET: salivary
# and lacrimal glands hot and uneven (paper: SUVmax of parotids 16), the rest faint.
_HEAD_AND_NECK = (
    _Organ((0, 0, 0), (140, 80, 66), 900.0, 45.0, 0.03, 0.12, 12.0, 40.0),
    _Organ((30, 5, 0), (34, 52, 44), 500.0, 35.0, 0.04, 0.05, 6.0, 30.0),        # brain
    _Organ((-5, -30, 0), (30, 20, 16), 350.0, -900.0, 0.10, 0.0, 10.0),          # airway, mouth
    _Organ((-10, 45, 0), (90, 14, 14), 1_100.0, 320.0, 0.15, 0.15, 120.0, 12.0),  # cervical spine
    _Organ((-12, -12, -40), (12, 26, 6), 700.0, 700.0, 0.08, 0.05, 150.0, 14.0),  # mandible, right
    _Organ((-12, -12, 40), (12, 26, 6), 700.0, 700.0, 0.08, 0.05, 150.0, 14.0),   # mandible, left
    _Organ((-2, 14, -48), (24, 16, 10), 16_000.0, 10.0, 0.15, 0.25, 25.0),       # parotids
    _Organ((-2, 14, 48), (24, 16, 10), 15_000.0, 10.0, 0.15, 0.25, 25.0),
    _Organ((-30, -14, -27), (12, 13, 8), 15_000.0, 40.0, 0.12, 0.22, 20.0),      # submandibular glands
    _Organ((-30, -14, 27), (12, 13, 8), 16_000.0, 40.0, 0.12, 0.22, 20.0),
    _Organ((36, -46, -32), (5.5, 7, 4), 9_000.0, 30.0, 0.10, 0.15, 15.0, 10.0),  # lacrimal glands
    _Organ((36, -46, 32), (5.5, 7, 4), 8_500.0, 30.0, 0.10, 0.15, 15.0, 10.0),
)
_WHOLE_BODY = (
    _Organ((0, 0, 0), (900, 110, 165), 900.0, 40.0, 0.04, 0.10, 20.0, 90.0),
    _Organ((190, -5, -75), (120, 80, 60), 350.0, -780.0, 0.05, 0.10, 60.0, 50.0),  # lungs
    _Organ((190, -5, 75), (120, 80, 60), 350.0, -780.0, 0.05, 0.10, 60.0, 50.0),
    _Organ((0, 70, 0), (420, 24, 22), 1_600.0, 260.0, 0.10, 0.20, 120.0, 25.0),   # spine
    _Organ((40, -15, -80), (65, 70, 75), 6_000.0, 60.0, 0.08, 0.12, 15.0, 60.0),  # liver
    _Organ((50, 35, 105), (45, 35, 24), 5_000.0, 50.0, 0.08, 0.12, 15.0, 40.0),   # spleen
    _Organ((-20, 45, -65), (55, 28, 26), 30_000.0, 35.0, 0.08, 0.25, 15.0, 30.0),  # kidneys
    _Organ((-15, 45, 70), (55, 28, 26), 30_000.0, 35.0, 0.08, 0.25, 15.0, 30.0),
    _Organ((-260, -30, 0), (38, 36, 42), 25_000.0, 8.0, 0.04, 0.02, 5.0, 60.0),   # bladder
)
_LESIONS = (
    ((-230, 20, -60), 12.0), ((-200, 10, 65), 8.0), ((-120, 60, 0), 20.0), ((60, 70, 2), 15.0),
    ((-80, -10, 25), 10.0), ((230, 0, -10), 10.0), ((-300, 20, 90), 24.0), ((150, 75, -100), 18.0),
)
