"""Gates: what a derived image must satisfy before anyone sees it, measured from the result and its source alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deconv.finish import residual
from deconv.kernels import gaussian
from deconv.metrics import kernel_centroid, kernel_fwhm_mm
from deconv.region import region
from deconv.result import Deconvolution
from deconv.volume import Volume

__all__ = ["Gate", "UnsafeResult", "gates", "require"]

CENTROID_VOXELS = 0.25  # a shifted kernel means a shifted patient
KERNEL_MAX = 0.7  # above it the kernel is a delta in all but name (paper, Table 2)
FWHM_MM = 10.0  # wider than any clinical PET
ACTIVITY = 0.005
ACTIVITY_SCALE = 0.05  # what the solver's own activity may have been off before it was scaled
SLICE_ACTIVITY = 0.02
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
    slice-activity, largest relative change of a slice's activity after blurring again; residual, RMS over the source's
    maximum; maximum, over the source's. Methods without a kernel are not asked for one. Where only a region was
    deblurred (settings "region_box"), blurred slices and residual are judged in its core.
    Raises ValueError where the result does not lie on the doubled grid of the volume.
    """
    if not result.image.same_grid(volume.doubled(result.image.array)):
        raise ValueError("the result does not lie on the doubled grid of its source")
    top = float(volume.array.max())
    total = float(volume.array.sum(dtype=np.float64))
    after = float(result.image.array.sum(dtype=np.float64)) / 8.0
    found = [
        _gate("activity", abs(after / total - 1.0) if total else float("inf"), ACTIVITY),
        _gate("activity-scale", abs(result.metrics.get("activity_scale", 1.0) - 1.0), ACTIVITY_SCALE),
        _gate("maximum", float(result.image.array.max()) / top if top > 0 else float("inf"), MAXIMUM),
    ]
    if result.kernel is not None:
        core = _judged(volume, result)
        off = residual(volume, result.image, result.kernel)[core]
        found += [
            _gate("kernel-centroid", float(np.abs(kernel_centroid(result.kernel)).max()), CENTROID_VOXELS),
            _gate("kernel-maximum", float(result.kernel.max()), _kernel_limit(result)),
            _gate("kernel-width", max(kernel_fwhm_mm(result.kernel, result.kernel_spacing)), _width_limit(result)),
            _gate("slice-activity", _slice_change(volume.array[core], off), SLICE_ACTIVITY),
            _gate("residual", float(np.sqrt(np.mean(off.astype(np.float64) ** 2))) / top, RESIDUAL),
        ]
    return tuple(found)


def require(volume: Volume, result: Deconvolution) -> tuple[Gate, ...]:
    """The gates, all open. Raises UnsafeResult naming those that are not."""
    found = gates(volume, result)
    shut = [str(gate) for gate in found if not gate.ok]
    if shut:
        raise UnsafeResult("; ".join(shut))
    return found


def _judged(volume: Volume, result: Deconvolution) -> tuple[slice, slice, slice]:
    """The voxels whose blurred image must be the source: where only a region was deblurred, its core."""
    spec = result.settings.get("region_box")
    return region(volume, str(spec) if spec else "whole").core


def _gate(name: str, measured: float, limit: float) -> Gate:
    return Gate(name, bool(measured <= limit), measured, limit)


def _kernel_limit(result: Deconvolution) -> float:
    """On voxels as large as the blur even an honest kernel is nearly a delta: 3.5 mm are allowed anywhere."""
    return max(KERNEL_MAX, float(gaussian(3.5, result.kernel_spacing).max()) * 1.01)


def _width_limit(result: Deconvolution) -> float:
    """On coarse voxels the half maximum is read to no better than half a voxel."""
    return FWHM_MM + 0.5 * max(result.kernel_spacing)


def _slice_change(source: np.ndarray, off: np.ndarray) -> float:
    before = source.sum(axis=(1, 2), dtype=np.float64)
    change = np.abs(off.sum(axis=(1, 2), dtype=np.float64))
    judged = before > SLICE_SHARE * before.mean()
    return float((change[judged] / before[judged]).max()) if judged.any() else float("inf")
