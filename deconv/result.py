"""Deconvolution: what every method returns; Progress and Cancelled: how a running method talks and stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deconv.volume import Volume

__all__ = ["Cancelled", "Deconvolution", "OnStep", "Progress"]


class Cancelled(Exception):
    """Raise it from `on_step` to stop a running method; the method lets it pass and returns nothing."""


@dataclass(frozen=True)
class Progress:
    """Where a running method stands: step `step` of `steps` overall, now in `stage`, at `loss`."""

    stage: str
    step: int
    steps: int
    loss: float


OnStep = Callable[[Progress], None]


@dataclass(frozen=True, eq=False)
class Deconvolution:
    """The result of one method on one volume.

    image     Volume (2D, 2H, 2W) on the doubled grid of the source, in the source's unit.
    kernel    (d, h, w) float32, odd sizes, sum 1, on the SOURCE grid's spacing (`kernel_spacing`, mm); a convolution
              kernel (not a correlation one): y = x↓ ∗ k. None where the method has none (interpolation).
    losses    stage name -> (steps,) float32.
    metrics   what the method measured of itself: "activity_change", "residual", "kernel_fwhm_d_mm", "seconds", ...
    method    "nbd", "richardson-lucy", "tv", ...
    preset    "paper", "preview", ... or "" for hand-made settings.
    settings  every setting that had an influence, as plain JSON values: with the source and the software version
              it determines the image.
    uncertainty  Volume on the image's grid, in its unit: the standard deviation of x by what the method cannot know
              (kernel, start, noise); None where the method does not tell.
    """

    image: Volume
    kernel: NDArray[np.float32] | None
    kernel_spacing: tuple[float, float, float]
    method: str
    preset: str
    settings: Mapping[str, Any]
    losses: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    uncertainty: Volume | None = None
