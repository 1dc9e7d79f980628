"""A small scene of activity with known truth and PSF, for the tests of the preset "best"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deconv import nbd
from deconv.kernels import skewed
from deconv.phantoms.scanner import blur_and_pool
from deconv.result import Deconvolution, OnStep
from deconv.volume import Volume

SPACING = (4.0, 3.0, 2.5)
FWHM = (6.5, 6.0, 5.5)
TOP = 1e4  # Bq/mL of the hottest organ
KNOWN = {"psf": "known", "psf_fwhm_mm": FWHM}


def truth(shape: Sequence[int], background: float = 0.05) -> NDArray[np.float64]:
    """(2D, 2H, 2W): a box, an octahedron and a small box, no mirror image of themselves together; Bq/mL."""
    depth, height, width = shape
    z, y, x = np.meshgrid(*[(np.arange(2 * n) + 0.5) / 2 for n in shape], indexing="ij")
    activity = np.full(z.shape, background)
    activity[(abs(z - depth * 0.5) < 2) & (abs(y - height * 0.4) < 3) & (abs(x - width * 0.35) < 2)] = 1.0
    activity[abs(z - depth * 0.55) + abs(y - height * 0.65) + abs(x - width * 0.6) < 3.2] = 0.7
    activity[(abs(z - depth * 0.35) < 1.5) & (abs(y - height * 0.5) < 1.2) & (abs(x - width * 0.7) < 1.5)] = 0.5
    return activity * TOP


def measured(
    activity: NDArray[np.float64], fwhm: Sequence[float] = FWHM, skew: Sequence[float] = (0, 0, 0),
    spacing: Sequence[float] = SPACING,
) -> Volume:
    """What a scanner with that PSF measures of `activity`, without noise."""
    kernel = skewed(fwhm, skew, np.array(spacing) / 2).astype(np.float64)
    return Volume.axial(blur_and_pool(activity, kernel), spacing)


def deblurred(volume: Volume, on_step: OnStep | None = None, checkpoints: Any = None, **settings: Any) -> Deconvolution:
    """`volume` by "best", whole, with few iterations and windows."""
    chosen = nbd.settings("best", **{"region": "whole", "iterations": 20, "windows": 1, "skew_iterations": 3,
                                     **settings})
    return nbd.deconvolve(volume, chosen, on_step=on_step, checkpoints=checkpoints)
