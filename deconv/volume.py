"""Volume: the one value that travels between DICOM, the methods and the node. Needs numpy only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Volume"]


def _locked(values: ArrayLike, dtype: type, shape: tuple[int, ...], name: str) -> NDArray:
    array: NDArray = np.array(values, dtype=dtype)
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} holds values that are not finite")
    array.setflags(write=False)
    return array


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels on a regular grid in the patient's LPS frame (PS3.3 C.7.6.2.1.1).

    array      (D, H, W) float32, read-only; the axes are slice, row, column.
    spacing    mm between voxel centres along (D, H, W), all positive.
    origin     mm, LPS, centre of voxel [0, 0, 0].
    direction  (3, 3); column i is the LPS unit step of array axis i.
    unit       UCUM code: "Bq/ml", "g/ml{SUVbw}", "[hnsf'U]"; "1" for a pure number.

    Raises ValueError where the array is not three-dimensional, empty or not finite, or the grid is not a grid.

    >>> volume = Volume.axial(np.ones((4, 6, 6)), (3.0, 2.0, 2.0))
    >>> volume.shape, volume.voxel_ml, volume.unit
    ((4, 6, 6), 0.012, 'Bq/ml')
    >>> volume.position((1, 0, 0)).tolist()
    [0.0, 0.0, 3.0]
    >>> volume.array[0, 0, 0] = 2
    Traceback (most recent call last):
    ValueError: assignment destination is read-only
    """

    array: NDArray[np.float32]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]
    unit: str

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.ndim != 3 or array.size == 0:
            raise ValueError(f"array must be (D, H, W) and not empty, got shape {array.shape}")
        if array.dtype != np.float32 or array.flags.writeable:
            array = np.array(array, dtype=np.float32)
            array.setflags(write=False)
        if not np.isfinite(array.sum(dtype=np.float64)):
            raise ValueError("array holds values that are not finite")
        spacing = _locked(self.spacing, np.float64, (3,), "spacing")
        if np.any(spacing <= 0):
            raise ValueError(f"spacing must be positive, got {spacing.tolist()} mm")
        direction = _locked(self.direction, np.float64, (3, 3), "direction")
        if not np.allclose(np.linalg.norm(direction, axis=0), 1.0, atol=1e-3):
            raise ValueError(f"the columns of direction must be unit vectors, got {direction.tolist()}")
        if abs(np.linalg.det(direction)) < 0.5:
            raise ValueError(f"the columns of direction do not span space: {direction.tolist()}")
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "spacing", spacing)
        object.__setattr__(self, "origin", _locked(self.origin, np.float64, (3,), "origin"))
        object.__setattr__(self, "direction", direction)

    @classmethod
    def axial(
        cls, array: ArrayLike, spacing: ArrayLike, *, origin: ArrayLike = (0, 0, 0), unit: str = "Bq/ml"
    ) -> Volume:
        """A supine head-first axial volume: slices step along +z (S), rows along +y (P), columns along +x (L)."""
        return cls(np.asarray(array), np.asarray(spacing), np.asarray(origin), np.eye(3)[:, ::-1], unit)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        d, h, w = self.array.shape
        return d, h, w

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in mL."""
        return float(np.prod(self.spacing) * abs(np.linalg.det(self.direction)) / 1000.0)

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4): index (d, h, w, 1) -> LPS mm."""
        affine = np.eye(4)
        affine[:3, :3] = self.direction * self.spacing
        affine[:3, 3] = self.origin
        return affine

    def position(self, index: ArrayLike) -> NDArray[np.float64]:
        """LPS mm of voxel index (..., 3) given as (d, h, w); fractions are allowed."""
        return np.asarray(index, dtype=np.float64) @ (self.direction * self.spacing).T + self.origin

    def index(self, position: ArrayLike) -> NDArray[np.float64]:
        """Fractional index (..., 3) as (d, h, w) of LPS mm positions (..., 3)."""
        offset = np.asarray(position, dtype=np.float64) - self.origin
        return np.asarray(np.linalg.solve(self.direction * self.spacing, offset[..., None])[..., 0], dtype=np.float64)

    def same_grid(self, other: Volume, *, atol_mm: float = 1e-3) -> bool:
        """Whether the eight corner voxels of both volumes lie at the same places."""
        if self.shape != other.shape:
            return False
        corners = np.indices((2, 2, 2)).reshape(3, 8).T * self.shape
        return bool(np.allclose(self.position(corners), other.position(corners), atol=atol_mm))

    def with_array(self, array: ArrayLike, *, unit: str | None = None) -> Volume:
        """The same grid with other values."""
        array = np.asarray(array)
        if array.shape != self.shape:
            raise ValueError(f"array of shape {array.shape} does not lie on a grid of shape {self.shape}")
        return replace(self, array=array, unit=self.unit if unit is None else unit)

    def doubled(self, array: ArrayLike) -> Volume:
        """Values (2D, 2H, 2W) on the grid twice as fine over exactly the same physical field of view.

        The first voxel centre moves by minus a quarter of this grid's voxel along each axis, so that the outer
        edges stay where they are (derived-PET rule 1: resampling that aligns corners is wrong by that quarter).

        >>> fine = Volume.axial(np.ones((1, 2, 2)), (4, 4, 4)).doubled(np.ones((2, 4, 4)))
        >>> fine.spacing.tolist(), fine.origin.tolist()
        ([2.0, 2.0, 2.0], [-1.0, -1.0, -1.0])
        """
        array = np.asarray(array)
        if array.shape != tuple(2 * n for n in self.shape):
            raise ValueError(f"array of shape {array.shape} is not the double of {self.shape}")
        return Volume(array, self.spacing / 2, self.position((-0.25, -0.25, -0.25)), self.direction, self.unit)
