"""Values along straight lines through a volume, in the patient's frame. Needs numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deconv.volume import Volume

__all__ = ["AXES", "along"]

#: what an axis is called, and its direction in LPS
AXES = {"left-right": (1.0, 0.0, 0.0), "front-back": (0.0, 1.0, 0.0), "head-foot": (0.0, 0.0, -1.0)}

Line = NDArray[np.float64]


def along(volume: Volume, centre_mm: ArrayLike, axis: str, half_mm: float) -> tuple[Line, Line]:
    """(mm from the centre, values) on the line through `centre_mm` (LPS) along a patient axis, within `half_mm`.

    mm grow towards the left, the back and the foot. One sample for each voxel that the line passes, at the place
    nearest to its centre; between the lines of voxels it is interpolated linearly. Nothing is told outside the volume.
    """
    way = np.array(AXES[axis])
    voxel_axis = int(np.abs(way @ volume.direction).argmax())
    middle = volume.index(centre_mm)
    per_mm = volume.index(np.asarray(centre_mm, dtype=np.float64) + way) - middle
    numbers = np.arange(volume.shape[voxel_axis])
    mm = (numbers - middle[voxel_axis]) / per_mm[voxel_axis]
    index = middle + mm[:, None] * per_mm
    index[:, voxel_axis] = numbers
    kept = (np.abs(mm) <= half_mm) & np.all((index > -0.5) & (index < np.array(volume.shape) - 0.5), axis=1)
    order = np.argsort(mm[kept])
    return mm[kept][order], _linear(volume.array, index[kept][order])


def _linear(array: NDArray[np.float32], index: Line) -> Line:
    """Trilinear interpolation at fractional indices (n, 3); the outer half voxel has the border's value."""
    top = np.array(array.shape) - 1
    place = np.clip(index, 0, top)
    low = np.minimum(np.floor(place).astype(int), np.maximum(top - 1, 0))
    share = place - low
    values = np.zeros(len(index))
    for corner in np.indices((2, 2, 2)).reshape(3, 8).T:
        weight = np.prod(np.where(corner, share, 1.0 - share), axis=1)
        at = np.minimum(low + corner, top)
        values += weight * array[at[:, 0], at[:, 1], at[:, 2]]
    return values
