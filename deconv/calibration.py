"""The PSF of a scanner and its reconstruction, measured on a phantom of hot spheres or of point sources.

Each sphere is fitted as `deconv.spheremodel` shows it, all together by weighted least squares:

    y = b + g·r + A s(c, D; w, k) − b t      s, t: the blurred sphere, and what it displaces of the background
    shared: ln w (FWHM along D, H, W), skew k along D, H, W, and the activity A unless it is free
    for each sphere: centre c, background b and its gradient g; the diameter D and the activity A where they are free

The weights follow the noise that the residual shows, s² = a + b m². Standard errors add two parts in
quadrature, as each alone covered the truth too seldom on phantoms:

    noise    H⁻¹ (Jᵀ R J) H⁻¹, R the autocorrelation of the residual: the noise of reconstructed PET is not white
    scatter  H⁻¹ (Σ u uᵀ) H⁻¹ n / (n − 1), u the score of each of the n spheres: how much the spheres disagree;
             times Student's t for n spheres over that of many

The FWHM is that of the blur on the doubled grid before the mean over the PET voxel (y = P(x ∗ k), deconv/pooled.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deconv.spherefinder import Blob, find_spheres
from deconv.spherefit import Fit, Start, diameters_shown, fit_spheres
from deconv.volume import Volume

__all__ = ["MeasuredPsf", "MeasuredSphere", "measure_psf"]

Array = NDArray[np.float64]
Float3 = tuple[float, float, float]
NARROWEST_MM, WIDEST_MM = 2.0, 15.0
LEAST_SD_MM, LEAST_SKEW_SD = 0.03, 0.01  # what the model itself is good for
FAINTEST_KNOWN = 0.08  # response of a sphere whose diameter is given, as a part of the strongest
WORST_RESIDUAL = 0.35
SHOWS_SIZE, WRONG_SIZE = 1.5, 0.15  # FWHM; part of the diameter
LARGEST_OFFSET_MM = 6.0


@dataclass(frozen=True)
class MeasuredSphere:
    """One sphere as it was fitted.

    diameter_mm     inner diameter; `known` where it was given and not fitted; 0 for a point source.
    centre_mm       along (D, H, W) from the outer corner of the field of view.
    activity        in the unit of the volume; of a point source its total, unit times mL.
    background      around it, in the unit of the volume.
    residual        RMS of measured minus fitted in the fitted voxels, as a part of (activity − background).
    """

    diameter_mm: float
    known: bool
    centre_mm: Float3
    activity: float
    background: float
    residual: float


@dataclass(frozen=True)
class MeasuredPsf:
    """The PSF of a scanner and reconstruction, with its standard errors.

    fwhm_mm, fwhm_sd_mm   along (D, H, W), mm.
    skew, skew_sd         along (D, H, W), in (-1, 1), as `kernels.split_normal` takes it.
    residual              RMS of measured minus fitted over all spheres, as a part of the contrast.
    spacing_mm            PET voxel, mm;  unit  of the activities;  notes  sentences for the report.
    """

    fwhm_mm: Float3
    fwhm_sd_mm: Float3
    skew: Float3
    skew_sd: Float3
    residual: float
    spheres: tuple[MeasuredSphere, ...]
    spacing_mm: Float3
    unit: str
    notes: tuple[str, ...] = ()

    @property
    def log_sd(self) -> Float3:
        """Standard errors of ln FWHM."""
        d, h, w = (sd / width for sd, width in zip(self.fwhm_sd_mm, self.fwhm_mm, strict=True))
        return d, h, w


def measure_psf(
    volume: Volume,
    *,
    diameters_mm: Sequence[float] | None = None,
    activity: Literal["shared", "free"] = "shared",
    wall_mm: float = 0.0,
    fit_skew: bool = True,
) -> MeasuredPsf:
    """Measure the PSF on a PET volume of hot spheres (or point sources) on a uniform warm or cold background.

    diameters_mm  inner diameters of the spheres, in any order; None: as many spheres as stand out, diameters fitted.
                  All 0: that many point sources, or small sources far below the resolution.
    activity      "shared": all spheres were filled from one solution. Point sources are always free.
    wall_mm       thickness of the sphere's wall, which holds no activity.
    fit_skew      False: the kernel is symmetric.

    Raises ValueError, with the reason, where no or too few spheres are found, one is cut by the edge of the field of
    view or overlaps another, values are saturated, or the model does not describe the image.
    """
    image, spacing = np.asarray(volume.array, dtype=np.float64), volume.spacing
    _require_sensible(image, diameters_mm, wall_mm)
    starts = _starts(image, spacing, diameters_mm)
    _refuse_saturated(image, spacing, starts)
    shared = activity == "shared" and any(start.diameter_mm > 0 for start in starts)
    fit = fit_spheres(image, spacing, starts, shared_activity=shared, wall_mm=wall_mm, fit_skew=fit_skew)
    psf = _measured(fit, volume)
    _require_credible(psf, starts)
    if shared and diameters_mm is not None:
        _require_diameters(psf, diameters_shown(image, spacing, fit, shared_activity=shared, wall_mm=wall_mm))
    return psf


def _require_sensible(image: Array, diameters: Sequence[float] | None, wall_mm: float) -> None:
    if image.max() <= 0:
        raise ValueError("the volume holds no activity")
    if diameters is not None:
        if not diameters or min(diameters) < 0 or (min(diameters) == 0) != (max(diameters) == 0):
            raise ValueError(f"diameters must be positive, or all 0 for point sources, got {list(diameters)}")
        if max(diameters) > 100:
            raise ValueError(f"a sphere of {max(diameters):g} mm is too large; diameters are in mm")
    if not 0 <= wall_mm < 5:
        raise ValueError(f"the wall of a sphere is 0 to 5 mm thick, got {wall_mm}")


def _starts(image: Array, spacing: Array, diameters: Sequence[float] | None) -> list[Start]:
    """Where the fit begins: a sphere for each diameter, the largest blob for the largest."""
    if diameters is None:
        blobs = find_spheres(image, spacing)
        if not blobs:
            raise ValueError("no hot sphere stands out of the background")
        return [Start(np.array(blob.centre_mm), max(blob.diameter_mm, 6.0), False) for blob in blobs]
    wanted = sorted(diameters, reverse=True)
    found = find_spheres(image, spacing, faintest=FAINTEST_KNOWN, most=len(wanted))
    if len(found) < len(wanted):
        raise ValueError(f"{len(wanted)} spheres were named and {len(found)} stand out of the background; "
                         "name only those that can be seen")
    ordered = sorted(found, key=_volume_shown, reverse=True)
    return [Start(np.array(blob.centre_mm), float(diameter), True)
            for blob, diameter in zip(ordered, wanted, strict=True)]


def _volume_shown(blob: Blob) -> tuple[float, float]:
    """Order of size: by the scale of the blob; the response tells those apart that the blur makes alike."""
    return blob.diameter_mm, blob.response


def _refuse_saturated(image: Array, spacing: Array, starts: Sequence[Start]) -> None:
    """Values cut off at one maximum: many voxels that tie, in an image that has noise."""
    top = image.max()
    ties = int(np.count_nonzero(image == top))
    if ties < 10:
        return
    shell = ndimage.binary_dilation(image == top, iterations=1) & (image < top)
    beside = image[shell]
    # Without noise a large sphere is flat: the voxels beside its plateau come close to it. Cut values end abruptly.
    if beside.size and np.mean(beside > 0.995 * top) < 0.5:
        raise ValueError(f"{ties} voxels all hold the maximum {top:g}: the values are cut off (saturated)")


def _measured(fit: Fit, volume: Volume) -> MeasuredPsf:
    spheres = tuple(
        MeasuredSphere(float(one.diameter_mm), one.known, _three(one.centre_mm),
                       float(one.activity) / (1000.0 if one.diameter_mm == 0 else 1.0), float(one.background),
                       float(one.residual))
        for one in fit.spheres)
    sd_ln = fit.sd[:3]
    sd_skew = np.where(fit.sd[3:] > 0, np.maximum(fit.sd[3:], LEAST_SKEW_SD), 0.0)  # 0: the skew was not fitted
    width = np.exp(fit.log_fwhm)
    return MeasuredPsf(
        fwhm_mm=_three(width), fwhm_sd_mm=_three(np.maximum(width * sd_ln, LEAST_SD_MM)), skew=_three(fit.skew),
        skew_sd=_three(sd_skew), residual=float(fit.residual), spheres=spheres, spacing_mm=_three(volume.spacing),
        unit=volume.unit, notes=fit.notes,
    )


def _require_credible(psf: MeasuredPsf, starts: Sequence[Start]) -> None:
    if psf.residual > WORST_RESIDUAL:
        raise ValueError(f"spheres do not describe the image: {100 * psf.residual:.0f} % of the contrast is left over")
    if min(psf.fwhm_mm) < 1.02 * NARROWEST_MM or max(psf.fwhm_mm) > 0.98 * WIDEST_MM:
        text = " x ".join(f"{width:.1f}" for width in psf.fwhm_mm)
        raise ValueError(f"the width found, {text} mm, lies at the end of the range: the diameters may be wrong")
    for sphere, start in zip(psf.spheres, starts, strict=False):
        if len(starts) == len(psf.spheres) and start.known:
            moved = float(np.linalg.norm(np.subtract(sphere.centre_mm, start.centre_mm)))
            if moved > LARGEST_OFFSET_MM + sphere.diameter_mm / 4:
                raise ValueError(f"no sphere of {sphere.diameter_mm:g} mm lies at its place: the fit left by "
                                 f"{moved:.0f} mm")


def _require_diameters(psf: MeasuredPsf, shown: Sequence[float]) -> None:
    """The spheres that are large enough to show their size must show the one that was given."""
    wrong = [(sphere.diameter_mm, size) for sphere, size in zip(psf.spheres, shown, strict=True)
             if sphere.diameter_mm > SHOWS_SIZE * max(psf.fwhm_mm) and abs(size / sphere.diameter_mm - 1) > WRONG_SIZE]
    if wrong:
        text = ", ".join(f"{size:.0f} mm for {given:g} mm" for given, size in wrong)
        raise ValueError(f"the diameters given do not describe the image, which shows {text}")


def _three(values: Sequence[float] | Array) -> Float3:
    d, h, w = (float(value) for value in values)
    return d, h, w
