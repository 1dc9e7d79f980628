"""The uncertainty of a result as a file beside it: standard deviations on the derived grid, compressed.

    uncertainty.npz    share (2D, 2H, 2W) float16, times maximum: the standard deviation in `unit`
                       maximum, unit, spacing_mm (D, H, W), origin_mm, direction: as of deconv.volume.Volume (LPS)

Half precision holds a standard deviation to 0.05 %, far below what it is known to.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deconv.volume import Volume

__all__ = ["UNCERTAINTY_FILE", "load", "save"]

UNCERTAINTY_FILE = "uncertainty.npz"


def save(path: Path, uncertainty: Volume) -> None:
    """Write it. Raises ValueError for values below zero."""
    values = uncertainty.array
    if values.min() < 0:
        raise ValueError("a standard deviation is not negative")
    maximum = float(values.max())
    share = (values / np.float32(maximum or 1.0)).astype(np.float16)
    with path.open("wb") as file:
        np.savez_compressed(file, share=share, maximum=maximum, unit=uncertainty.unit, spacing_mm=uncertainty.spacing,
                            origin_mm=uncertainty.origin, direction=uncertainty.direction)


def load(path: Path) -> Volume:
    """The standard deviations as a Volume of the derived image's grid and unit."""
    with np.load(path) as held:
        values = held["share"].astype(np.float32) * np.float32(held["maximum"])
        return Volume(values, held["spacing_mm"], held["origin_mm"], held["direction"], str(held["unit"]))
