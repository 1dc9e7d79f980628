"""What a volume looks like from the patient's sides: maximum intensity projections (MIPs), still and turning.

All pictures are in the patient's frame, whatever way the array lies in it: rows from head to foot (axial: from front to
back), columns from the patient's right to the left (sagittal: from front to back). So the patient's right is at the
viewer's left, as in radiology. A volume whose axes are not the patient's is resampled first, by nearest neighbour: no
value is made, though a single voxel may be passed over. Needs numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deconv.volume import Volume

__all__ = ["PLANES", "Rotation", "Upright", "largest", "project", "rotating", "strongest", "upright"]

Image = NDArray[np.float32]

#: plane -> the axis of an upright array that it looks along
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
MISPLACED = 0.5  # voxels that a corner may lie off before the volume is resampled onto the patient's axes
ROWS, COLUMNS = 640, 448  # most pixels of a turning projection; what has more is pooled by its maxima
SLAB = 32  # slices copied at a time


@dataclass(frozen=True, eq=False)
class Upright:
    """Voxels on the patient's axes.

    array    (S, P, L): from head to foot, from front to back, from the patient's right to the left.
    spacing  mm along these three.
    first    mm, (S, P, L) coordinates of the centre of voxel [0, 0, 0] as numbers that grow towards the foot, the back
             and the left: minus z, y and x of LPS.
    turned   whether the axes of the volume were so far from the patient's that it was resampled.
    """

    array: Image
    spacing: tuple[float, float, float]
    first: tuple[float, float, float]
    turned: bool = False

    @property
    def first_lps(self) -> list[float]:
        """LPS mm (x, y, z) of the centre of voxel [0, 0, 0]."""
        foot, back, left = self.first
        return [left, back, -foot]

    def plane_mm(self, plane: str) -> tuple[float, float]:
        """mm of a pixel of the projection `plane` along its rows and columns: (from row to row, column to column)."""
        row, column = (step for axis, step in enumerate(self.spacing) if axis != PLANES[plane])
        return row, column


def upright(volume: Volume, like: Upright | None = None) -> Upright:
    """The volume on the patient's axes: a view where its axes are theirs (in any order, either way), else resampled.

    like   what became of a volume on the same grid, or on one whose voxels are a multiple of these (`Volume.doubled`):
           it is then resampled where that one was, over exactly the same field, so that pictures of both agree.
    """
    towards = volume.direction[::-1] * np.array([[-1.0], [1.0], [1.0]])  # rows: foot, back, left
    order, signs = _nearest_axes(towards)
    spacing = volume.spacing[list(order)]
    if like.turned if like else _misplaced(volume, towards, order, signs) > MISPLACED:
        return _resampled(volume, spacing, like)
    array = volume.array.transpose(order)[tuple(slice(None, None, int(sign)) for sign in signs)]
    corner = [0 if signs[order.index(axis)] > 0 else n - 1 for axis, n in enumerate(volume.shape)]
    x, y, z = volume.position(corner)
    return Upright(array, _three(spacing), (float(-z), float(y), float(x)))


def _nearest_axes(towards: NDArray[np.float64]) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Which array axis runs along foot, back and left, and which way: the assignment that agrees best."""
    orders = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    best = max(orders, key=lambda order: sum(abs(towards[row, axis]) for row, axis in enumerate(order)))
    return best, np.sign([towards[row, axis] for row, axis in enumerate(best)])


def _misplaced(volume: Volume, towards: NDArray[np.float64], order: tuple[int, ...],
               signs: NDArray[np.float64]) -> float:
    """How far a corner would lie off if the axes were taken for the patient's, in the smallest voxel size."""
    ideal = np.zeros((3, 3))
    ideal[range(3), order] = signs
    half = (np.array(volume.shape) - 1) / 2 * volume.spacing
    corners = (np.indices((2, 2, 2)).reshape(3, 8).T * 2 - 1) * half
    return float(np.abs(corners @ (towards - ideal).T).max() / volume.spacing.min())


def _resampled(volume: Volume, spacing: NDArray[np.float64], like: Upright | None) -> Upright:
    """By nearest neighbour on a grid that holds the whole volume; 0 (or the minimum, where lower) outside it."""
    corners = volume.position(np.indices((2, 2, 2)).reshape(3, 8).T * (np.array(volume.shape) - 1))
    points = corners[:, ::-1] * (-1.0, 1.0, 1.0)
    low, high = points.min(axis=0), points.max(axis=0)
    shape = [int(n) for n in np.ceil((high - low) / spacing - 1e-6).astype(int) + 1]
    if like is not None:
        shape = [n * round(step / own) for n, step, own in zip(like.array.shape, like.spacing, spacing, strict=True)]
        low = np.array(like.first) + (spacing - np.array(like.spacing)) / 2
    back, left = (low[axis] + np.arange(shape[axis]) * spacing[axis] for axis in (1, 2))
    array = np.full(shape, min(0.0, float(volume.array.min())), dtype=np.float32)
    plane = np.stack([*np.broadcast_arrays(left[None, :], back[:, None]), np.zeros((shape[1], shape[2]))], axis=-1)
    for row in range(shape[0]):
        plane[..., 2] = -(low[0] + row * spacing[0])
        index = np.rint(volume.index(plane)).astype(int)
        inside = np.all((index >= 0) & (index < volume.shape), axis=-1)
        array[row][inside] = volume.array[tuple(index[inside].T)]
    return Upright(array, _three(spacing), _three(low), turned=True)


def _three(values: NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c


def largest(array: Image, axis: int) -> Image:
    """The largest value along the axis."""
    return np.asarray(array.max(axis=axis), dtype=np.float32)


def strongest(array: Image, axis: int) -> Image:
    """The value farthest from zero along the axis, with its sign."""
    high, low = array.max(axis=axis), array.min(axis=axis)
    return np.where(high >= -low, high, low).astype(np.float32)


def project(volume: Upright, how: Callable[[Image, int], Image] = largest) -> dict[str, Image]:
    """axial (P, L), coronal (S, L) and sagittal (S, P) projections of the whole volume."""
    return {plane: how(volume.array, axis) for plane, axis in PLANES.items()}


# --- turning


@dataclass(frozen=True, eq=False)
class Rotation:
    """Projections while the patient turns about the head-foot axis.

    frames   (views, rows, columns); view 0 is from the front, a quarter turn later from the patient's left.
    mm       of a pixel, (row to row, column to column).
    """

    frames: Image
    mm: tuple[float, float]


def rotating(before: Upright, after: Upright, *, floor: float, views: int = 24) -> tuple[Rotation, Rotation]:
    """Both volumes turning, in the same pixels over the same field: the finer one's, or coarser where it is very large.

    floor   columns of voxels that nowhere reach it are left out: they are shown as 0.
    views   even; over the whole turn. The second half is the first one mirrored, as it is for every MIP.

    The volumes must cover the same field of view, `after` with a whole multiple of the voxels of `before` along each
    axis. Raises ValueError where they do not, or `views` is odd.
    """
    if views % 2 or any(b % a for a, b in zip(before.array.shape, after.array.shape)):
        raise ValueError(f"{views} views of {before.array.shape} and {after.array.shape} voxels cannot be paired")
    sticks = [_Sticks.of(volume, floor) for volume in (before, after)]
    reach = max(stick.reach for stick in sticks)
    step = max(stick.step for stick in sticks)
    half = max(1, int(np.ceil(reach / step)))
    rows = max(stick.values.shape[1] for stick in sticks)
    columns = 2 * half * max(round(step / stick.step) for stick in sticks)
    mm = (before.array.shape[0] * before.spacing[0] / rows, 2 * half * step / columns)
    turns = [np.stack([_stretched(stick.seen(np.pi * 2 * view / views, half * step), rows, columns)
                       for view in range(views // 2)]) for stick in sticks]
    first, second = (Rotation(np.concatenate([turn, turn[:, :, ::-1]]), mm) for turn in turns)
    return first, second


@dataclass(frozen=True, eq=False)
class _Sticks:
    """A volume as columns of voxels along the head-foot axis, those in the air left out.

    values  (sticks, rows);  back, left  mm of each stick from the axis of rotation;  step  mm, pixel of a projection.
    """

    values: Image
    back: NDArray[np.float64]
    left: NDArray[np.float64]
    step: float

    @property
    def reach(self) -> float:
        return float(np.hypot(self.back, self.left).max(initial=self.step))

    @classmethod
    def of(cls, volume: Upright, floor: float) -> _Sticks:
        pool = [_pooling(n, most) for n, most in zip(volume.array.shape, (ROWS, COLUMNS, COLUMNS), strict=True)]
        spacing = [step * by for step, by in zip(volume.spacing, pool, strict=True)]
        body = _pooled(volume.array.max(axis=0)[None], (1, pool[1], pool[2]))[0] >= floor
        parts = []
        for start in range(0, volume.array.shape[0], SLAB * pool[0]):
            parts.append(_pooled(volume.array[start:start + SLAB * pool[0]], (pool[0], pool[1], pool[2]))[:, body].T)
        back, left = ((np.arange(n) + 0.5 - n / 2) * step for n, step in zip(body.shape, spacing[1:], strict=True))
        rows, columns = np.nonzero(body)
        return cls(np.concatenate(parts, axis=1), back[rows], left[columns], max(spacing[1:]))

    def seen(self, angle: float, half_mm: float) -> Image:
        """(rows, columns) at this angle, columns of `step` mm from minus to plus `half_mm`."""
        n = 2 * round(half_mm / self.step)
        place = np.floor((self.left * np.cos(angle) + self.back * np.sin(angle)) / self.step + n / 2 + 1e-9)
        column = np.clip(place.astype(int), 0, n - 1)
        order = np.argsort(column, kind="stable")
        found, starts = np.unique(column[order], return_index=True)
        frame = np.zeros((n, self.values.shape[1]), dtype=np.float32)
        if len(found):
            frame[found] = np.maximum.reduceat(self.values[order], starts, axis=0)
        return frame.T


def _pooling(n: int, most: int) -> int:
    """The smallest power of two that brings n to at most `most`."""
    by = 1
    while n / by > most:
        by *= 2
    return by


def _pooled(array: Image, by: tuple[int, int, int]) -> Image:
    """Largest of each block, its sizes powers of two; what is left over at the far ends is a smaller block."""
    for axis, size in enumerate(by):
        for _ in range(size.bit_length() - 1):
            along = np.moveaxis(array, axis, 0)
            pairs = along[::2].copy()
            np.maximum(pairs[:len(along) // 2], along[1::2], out=pairs[:len(along) // 2])
            array = np.moveaxis(pairs, 0, axis)
    return array


def _stretched(frame: Image, rows: int, columns: int) -> Image:
    """Each pixel repeated, so that it has so many."""
    down, across = (np.arange(n) * size // n for n, size in ((rows, frame.shape[0]), (columns, frame.shape[1])))
    return frame[np.ix_(down, across)]
