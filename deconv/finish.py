"""From a solver's estimate to a Deconvolution: centred kernel, kept activity, measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from deconv.kernels import centroid_voxels, recentred
from deconv.metrics import kernel_fwhm_mm
from deconv.operators import blur
from deconv.region import Region
from deconv.result import Deconvolution
from deconv.volume import Volume

__all__ = ["centred_pair", "finished", "normalised", "plain", "residual"]


def normalised(volume: Volume) -> tuple[NDArray[np.float32], float]:
    """The volume's values (D, H, W), none negative, divided by their maximum; and that maximum.

    Raises ValueError where nothing is positive: there is nothing to deblur.
    """
    y = np.maximum(volume.array, 0.0)
    top = float(y.max())
    if top <= 0:
        raise ValueError("the volume holds no positive value: there is no activity to deblur")
    return (y / np.float32(top)).astype(np.float32), top


def plain(settings: Any) -> dict[str, Any]:
    """A frozen settings dataclass as plain JSON values."""
    return _plain(asdict(settings))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def centred_pair(
    x: NDArray[np.float32], k: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """x (2D, 2H, 2W) and k moved against each other so that k's centroid is its centre; with k's offset before.

    x ∗ k stays the same but for interpolation: k moves by −c voxels of the PET grid, x by +c, 2c of its own.
    """
    offset = centroid_voxels(k)
    if np.abs(offset).max() < 1e-3:
        return x, k, offset
    centred, moved = recentred(k)
    shifted = ndimage.shift(x, -2.0 * moved, order=3, mode="nearest")
    return np.maximum(shifted, 0.0).astype(np.float32), centred, offset


def finished(
    volume: Volume, x: NDArray[np.float32], k: NDArray[np.float32], top: float, *, preset: str,
    settings: Mapping[str, Any], losses: Mapping[str, NDArray[np.float32]], seconds: float,
    metrics: Mapping[str, float] | None = None, region: Region | None = None,
) -> Deconvolution:
    """The result for x (2D, 2H, 2W, in units of `top`) and a kernel on the PET grid.

    x is scaled by one factor so that its total activity is the source's; the factor is in the metrics
    ("activity_scale") and a gate watches it, so that the scaling cannot hide a bad solution.

    region  x is the solution for its crop and is pasted into the upsampled source; None: x is the whole image.
    """
    before = float(volume.array.sum(dtype=np.float64))
    if region is None or region.is_whole:
        after = float(x.sum(dtype=np.float64)) * top / 8.0
        scale = before / after if before > 0 and after > 0 else 1.0
        image = volume.doubled((x.astype(np.float64) * (scale * top)).astype(np.float32))
    else:
        pasted, scale = region.paste(x * np.float32(top), volume.array)
        image = volume.doubled(pasted)
    widths = kernel_fwhm_mm(k, tuple(float(s) for s in volume.spacing))
    core = (slice(None),) * 3 if region is None else region.core
    measured = {
        "activity_scale": scale,
        "activity_change": float(image.array.sum(dtype=np.float64)) / 8.0 / before - 1.0 if before > 0 else 0.0,
        "residual": float(np.sqrt(np.mean(residual(volume, image, k)[core] ** 2)) / top),
        "kernel_max": float(k.max()),
        "kernel_fwhm_d_mm": widths[0], "kernel_fwhm_h_mm": widths[1], "kernel_fwhm_w_mm": widths[2],
        "seconds": seconds,
        **(metrics or {}),
    }
    spacing = (float(volume.spacing[0]), float(volume.spacing[1]), float(volume.spacing[2]))
    return Deconvolution(image, k, spacing, "nbd", preset, settings, losses, measured)


def residual(volume: Volume, image: Volume, k: NDArray[np.float32]) -> NDArray[np.float32]:
    """image↓ ∗ k − source (D, H, W), in the source's unit, borders replicated."""
    d, h, w = volume.shape
    down = image.array.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5), dtype=np.float32)
    return blur(torch.from_numpy(down), torch.from_numpy(np.array(k))).numpy() - volume.array
