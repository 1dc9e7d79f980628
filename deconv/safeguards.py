"""Gates: what a derived image must satisfy before anyone sees it, measured from the result and its source alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deconv import seams
from deconv.finish import residual
from deconv.interpolate import doubled
from deconv.kernels import FWHM_PER_SIGMA, gaussian
from deconv.metrics import kernel_centroid, kernel_fwhm_mm
from deconv.region import Region, region
from deconv.result import Deconvolution
from deconv.volume import Volume

__all__ = ["Gate", "UnsafeResult", "gates", "require"]

CENTROID_VOXELS = 0.25  # a shifted kernel means a shifted patient
KERNEL_MAX = 0.7  # above it the kernel is a delta in all but name (paper, Table 2)
DELTA = 0.995  # one voxel alone, whatever the voxels
FWHM_MM = 10.0  # wider than any clinical PET
ACTIVITY = 0.005
ACTIVITY_SCALE = 0.05  # what the solver's own activity may have been off before it was scaled
SLICE_GAIN = 0.08  # what slices may have been off before the solver gave them their activity back (deconv/slices.py)
SLICE_ACTIVITY = 0.02
END_SLICE_ACTIVITY = 0.1  # what lies beyond the field of view is not known, and it blurs into the slices at its ends
SLICE_SHARE = 0.1  # slices with less than this share of the mean activity of a slice are not judged
RESIDUAL = 0.05
MAXIMUM = 3.0


class UnsafeResult(ValueError):
    """A result that fails a gate; the message names the gate, what was measured and the limit."""


@dataclass(frozen=True)
class Gate:
    """One safeguard: `ok` where `measured` is within `limit`."""

    name: str
    ok: bool
    measured: float
    limit: float

    def __str__(self) -> str:
        return f"{self.name}: {self.measured:.4g} ({'within' if self.ok else 'beyond'} {self.limit:g})"


def gates(volume: Volume, result: Deconvolution) -> tuple[Gate, ...]:
    """Every safeguard of docs/method.md, "Gates", measured for the result of `volume`.

    kernel-centroid voxels from the centre, largest axis; kernel-maximum; kernel-width mm, widest axis; activity,
    relative change of the total; activity-scale, by how far the solver's total was off before it was corrected;
    slice-gain, the same of a single slice;
    slice-activity and end-slice-activity, largest relative change of a slice's activity after blurring again; residual,
    RMS over the source's maximum; maximum, over the source's; seam, where a region passes into its source
    (deconv/seams.py); uncertainty, voxels where it is negative. What a result does not have (kernel, region,
    uncertainty) it is not asked for. Where only a region was deblurred (settings "region_box"), maximum and residual
    are those of the region, blurring again is judged in its core, and what it changes counts against whole slices: all
    else is the source itself.
    Raises ValueError where the result does not lie on the doubled grid of the volume.
    """
    if not result.image.same_grid(volume.doubled(result.image.array)):
        raise ValueError("the result does not lie on the doubled grid of its source")
    where = _deblurred(volume, result)
    top = float(volume.array[where.inside].max())
    highest = float(result.image.array[_fine(where.inside)].max())
    total = float(volume.array.sum(dtype=np.float64))
    after = float(result.image.array.sum(dtype=np.float64)) / 8.0
    found = [
        _gate("activity", abs(_over(after, total) - 1.0), ACTIVITY),
        _gate("activity-scale", abs(result.metrics.get("activity_scale", 1.0) - 1.0), ACTIVITY_SCALE),
        _gate("maximum", _over(highest, top), MAXIMUM),
    ]
    if result.kernel is not None:
        off = residual(volume, result.image, result.kernel)[where.core]
        found += [
            _gate("kernel-centroid", float(np.abs(kernel_centroid(result.kernel)).max()), CENTROID_VOXELS),
            _gate("kernel-maximum", float(result.kernel.max()), _kernel_limit(result)),
            _gate("kernel-width", max(kernel_fwhm_mm(result.kernel, result.kernel_spacing)), _width_limit(result)),
            *_slice_gates(volume.array, off, where, result.kernel),
            _gate("residual", _over(float(np.sqrt(np.mean(off.astype(np.float64) ** 2))), top), RESIDUAL),
        ]
    if "slice_gain" in result.metrics:
        found.append(_gate("slice-gain", result.metrics["slice_gain"], SLICE_GAIN))
    if not where.is_whole:
        found.append(_gate("seam", _seam(volume, result, where), seams.LIMIT))
    if result.uncertainty is not None:
        found.append(_gate("uncertainty", _impossible(result.image, result.uncertainty), 0.0))
    return tuple(found)


def require(volume: Volume, result: Deconvolution) -> tuple[Gate, ...]:
    """The gates, all open. Raises UnsafeResult naming those that are not."""
    found = gates(volume, result)
    shut = [str(gate) for gate in found if not gate.ok]
    if shut:
        raise UnsafeResult("; ".join(shut))
    return found


def _deblurred(volume: Volume, result: Deconvolution) -> Region:
    """What was deblurred; outside it the image is the upsampled source."""
    spec = result.settings.get("region_box")
    return region(volume, str(spec) if spec else "whole")


def _fine(box: tuple[slice, ...]) -> tuple[slice, ...]:
    """A box of PET voxels on the doubled grid."""
    return tuple(slice(2 * s.start, 2 * s.stop) for s in box)


def _seam(volume: Volume, result: Deconvolution, where: Region) -> float:
    """The worst seam at the region's border, in what was added to the source: anatomy that ends there cancels."""
    at = _fine(where.crop)
    image = result.image.array[at]
    border = [[2 * (end - crop.start) for end, edge in ((inside.start, 0), (inside.stop, n)) if end != edge]
              for inside, crop, n in zip(where.inside, where.crop, where.shape, strict=True)]
    return seams.seam(image - doubled(volume.array)[at], border)


def _impossible(image: Volume, uncertainty: Volume) -> float:
    """Voxels that no standard deviation can have; all of them where it lies on another grid. (A Volume is finite.)"""
    return float(np.count_nonzero(uncertainty.array < 0) if uncertainty.same_grid(image) else image.array.size)


def _gate(name: str, measured: float, limit: float) -> Gate:
    return Gate(name, bool(measured <= limit), measured, limit)


def _over(value: float, whole: float) -> float:
    return value / whole if whole > 0 else float("inf")


def _kernel_limit(result: Deconvolution) -> float:
    """On voxels as large as the blur even an honest kernel is nearly a delta.

    3.5 mm are allowed anywhere. A method that says how narrow a PSF it looks for (settings "fwhm_bounds_mm") blurs on
    the fine grid: what it reports is that PSF without the voxel's own part, and may be as narrow as its bound makes it.
    A known PSF is no estimate that could collapse.
    """
    if result.settings.get("psf") == "known":
        return 1.0
    limit = max(KERNEL_MAX, float(gaussian(3.5, result.kernel_spacing).max()) * 1.01)
    bounds = result.settings.get("fwhm_bounds_mm")
    if bounds is None:
        return limit
    spacing = np.asarray(result.kernel_spacing)
    without_voxel = float(bounds[0]) ** 2 - 0.5 * FWHM_PER_SIGMA**2 * spacing**2 / 12.0
    narrowest = gaussian(np.sqrt(np.maximum(without_voxel, (0.5 * float(bounds[0])) ** 2)), spacing)
    return min(max(limit, float(narrowest.max()) * 1.01), DELTA)


def _width_limit(result: Deconvolution) -> float:
    """On coarse voxels the half maximum is read to no better than half a voxel."""
    return FWHM_MM + 0.5 * max(result.kernel_spacing)


def _slice_gates(
    source: NDArray[np.float32], off: NDArray[np.float32], where: Region, kernel: NDArray[np.float32]
) -> list[Gate]:
    """The largest change of a slice, `off` in the core and none elsewhere, over what the whole slice holds.

    Slices that the kernel's half width reaches from beyond the field of view have a limit of their own.
    """
    before = source.sum(axis=(1, 2), dtype=np.float64)
    change = np.zeros_like(before)
    change[where.core[0]] = np.abs(off.sum(axis=(1, 2), dtype=np.float64))
    judged = before > SLICE_SHARE * before.mean()
    share = np.where(judged, change / np.where(judged, before, 1.0), 0.0 if judged.any() else np.inf)
    reach = min(_half_width(kernel), (len(share) - 1) // 2)
    inside, ends = share[reach : len(share) - reach], np.concatenate([share[:reach], share[len(share) - reach :]])
    return [_gate("slice-activity", float(inside.max()), SLICE_ACTIVITY),
            _gate("end-slice-activity", float(ends.max(initial=0.0)), END_SLICE_ACTIVITY)]


def _half_width(kernel: NDArray[np.float32]) -> int:
    """Slices from the kernel's middle to where its profile has fallen below half its maximum; at least one."""
    profile = kernel.sum(axis=(1, 2))
    return max(1, int((profile >= 0.5 * profile.max()).sum()) // 2)
