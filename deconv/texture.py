"""Long run emphasis of a CT, voxel by voxel: the texture map that guides neural blind deconvolution.

Equal bit by bit to pyradiomics 3.0.1 (voxelBased, GLRLM LongRunEmphasis, 13 angles, no weighting), which counts a run
length matrix for every voxel. Here nothing is counted twice. For one angle a and the kernel box around a voxel, with n
voxels of the mask in it, let T_d be the number of voxels i in the box such that i + d a is in the box too and both and
all voxels between them belong to one run. Then

    sum of squared run lengths = n + 2 (T_1 + T_2 + ...),    number of runs = n - T_1,

and T_d is a sum over a smaller box of [the run from i reaches at least d further]: box sums of integers, exact in any
order. Their quotient is averaged over the angles in the order in which numpy adds them up for pyradiomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from deconv.volume import Volume

__all__ = ["guide_map", "long_run_emphasis", "resampled"]

CLIP = 6.0  # paper, Methods; published code: the map is clipped at 6
BODY_HU = -500.0
MAX_RADIUS = 60  # a row of the box is counted in 8 bits, a plane in 16
_SLAB_BYTES = 256e6

# The order in which pyradiomics walks the 13 angles, (D, H, W); it matters for the last bit of their mean.
_ANGLES = np.array([
    (1, 1, 1), (1, 1, 0), (1, 1, -1), (1, 0, 1), (1, 0, 0), (1, 0, -1), (1, -1, 1), (1, -1, 0), (1, -1, -1),
    (0, 1, 1), (0, 1, 0), (0, 1, -1), (0, 0, 1),
])


def long_run_emphasis(
    ct: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    bin_width: float = 25.0,
    kernel_radius: int = 3,
    masked_kernel: bool = True,
    voxel_batch: int | None = None,
) -> NDArray[np.float64]:
    """(D, H, W) -> (D, H, W) float64: long run emphasis of the (2 kernel_radius + 1)³ box around every voxel.

    ct             HU, integer or float; grey levels are bins of `bin_width` HU counted from zero.
    mask           voxels to compute; 0 elsewhere. None: all.
    masked_kernel  only voxels of the mask count inside a box, and only they set the grey levels (pyradiomics'
                   default); else all do.
    voxel_batch    pyradiomics' voxelBatch: angles that are empty for a whole batch leave the mean before it is summed,
                   which moves its last bit. None: one batch. Without a mask no angle is ever empty.

    A voxel whose box holds no line of two mask voxels along any angle is NaN, as in pyradiomics.
    Raises ValueError where the array is not a volume, not finite, a single voxel, the mask is empty or of another
    shape, or bin width, radius or batch make no sense.
    """
    image = np.asarray(ct)
    if image.ndim != 3 or image.size < 2 or not np.all(np.isfinite(image)):
        raise ValueError(f"ct must be a finite volume (D, H, W) of at least two voxels, got shape {image.shape}")
    if not bin_width > 0 or (voxel_batch is not None and voxel_batch < 1):
        raise ValueError(f"bin_width and voxel_batch must be positive, got {bin_width} and {voxel_batch}")
    if not 1 <= kernel_radius <= MAX_RADIUS:
        raise ValueError(f"kernel_radius must lie between 1 and {MAX_RADIUS}, got {kernel_radius}")
    wanted = np.ones(image.shape, dtype=bool) if mask is None else np.asarray(mask).astype(bool)
    if wanted.shape != image.shape or not wanted.any():
        raise ValueError(f"mask of shape {wanted.shape} with {int(wanted.sum())} voxels does not fit ct {image.shape}")
    counted = wanted if masked_kernel else np.ones_like(wanted)
    levels = _levels(image, counted, bin_width)
    angles = _ANGLES[[all(n > 1 for n, a in zip(image.shape, angle, strict=True) if a) for angle in _ANGLES]]
    return _map(levels, wanted, bool(counted.all()), angles.astype(np.int64), kernel_radius, voxel_batch)


def guide_map(
    ct: Volume, like: Volume, *, bin_width: float = 25.0, kernel_radius: int = 3, body_hu: float = BODY_HU
) -> NDArray[np.float32]:
    """(D, H, W) float32 in [0, 1] on the grid of `like`: long run emphasis of `ct`, clipped at 6, divided by 6.

    The CT is first resampled to the PET grid and its texture taken there, as the published code does: a kernel of
    radius 3 then spans 7 PET voxels whatever the CT's voxels are, and the cost is that of the PET grid. Air around the
    body, whose runs are the longest of all, and what the CT does not cover are 0. Grids may be oblique to each other.
    Raises ValueError where the CT covers nothing of `like` or holds no body.
    """
    hu, covered = resampled(ct, like)
    body = _body(hu, covered, body_hu)
    if not body.any():
        raise ValueError("the CT shows no body on the PET grid: not the same patient position, or not a CT in HU")
    texture = long_run_emphasis(hu, mask=body, bin_width=bin_width, kernel_radius=kernel_radius)
    return (np.clip(np.nan_to_num(texture), 0.0, CLIP) / CLIP).astype(np.float32)


def resampled(
    volume: Volume, like: Volume, *, outside: float = -1000.0
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`volume` on the grid of `like` (linear), and where it covers it; `outside` elsewhere.

    A voxel is covered where its centre lies no more than half a voxel beyond the outermost centres of `volume`.
    """
    step = np.linalg.solve(volume.affine, like.affine)  # index of `like` -> index of `volume`
    hu = ndimage.affine_transform(volume.array, step[:3, :3], step[:3, 3], output_shape=like.shape, order=1,
                                  mode="nearest", output=np.float32)
    grid = np.meshgrid(*[np.arange(n) for n in like.shape], indexing="ij", sparse=True)
    covered = np.ones(like.shape, dtype=bool)
    for axis, n in enumerate(volume.shape):
        at = step[axis, 3] + sum(step[axis, i] * grid[i] for i in range(3))
        covered &= (at >= -0.5 - 1e-6) & (at <= n - 0.5 + 1e-6)
    hu[~covered] = outside
    return hu, covered


def _body(hu: NDArray[np.float32], covered: NDArray[np.bool_], threshold: float) -> NDArray[np.bool_]:
    """The largest connected piece above `threshold`, with air inside it filled slice by slice."""
    pieces, count = ndimage.label((hu > threshold) & covered)
    if count == 0:
        return np.zeros(hu.shape, dtype=bool)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    body = pieces == sizes.argmax()
    return np.stack([ndimage.binary_fill_holes(plane) for plane in body]) & covered


def _levels(image: NDArray, counted: NDArray[np.bool_], bin_width: float) -> NDArray[np.int32]:
    """Grey levels from 1, 0 outside `counted`; edges are computed in the image's own precision as pyradiomics does."""
    values = image[counted]
    width = int(bin_width) if float(bin_width).is_integer() else float(bin_width)
    low, high = values.min(), values.max()
    edges = np.arange(low - (low % width), high + 2 * width, width)
    levels = np.zeros(image.shape, dtype=np.int32)
    levels[counted] = np.digitize(values, edges)
    return levels


def _map(
    levels: NDArray[np.int32], wanted: NDArray[np.bool_], full: bool, angles: NDArray[np.int64], radius: int,
    batch: int | None,
) -> NDArray[np.float64]:
    """The map slab by slab, so that the figures of single angles never fill the memory."""
    depth, height, width = levels.shape
    thick = max(1, int(_SLAB_BYTES / (8 * len(angles) * height * width)))
    order = np.cumsum(wanted.ravel()).reshape(wanted.shape) - 1  # the number of a voxel in pyradiomics' list
    size = int(wanted.sum()) if batch is None else batch
    alive = np.zeros((-(-int(wanted.sum()) // size), len(angles)), dtype=bool)
    out = np.zeros(levels.shape)
    assumed = np.ones_like(alive)  # right unless an angle turns out to be empty: then the slabs are gone through again
    while True:
        for start in range(0, depth, thick):
            stop = min(start + thick, depth)
            low, high = max(0, start - radius), min(depth, stop + radius)
            single = np.empty((len(angles), stop - start, height, width))
            _single_angles(levels[low:high], start - low, angles, radius, full, single)
            inside = wanted[start:stop]
            groups = order[start:stop][inside] // size
            rows = np.ascontiguousarray(single[:, inside].T)
            _note_alive(rows, groups, alive)
            out[start:stop][inside] = _means(rows, groups, assumed)
        if np.array_equal(alive, assumed):
            break
        assumed = alive.copy()
    return out


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code, kept on disk where any of numba's cache folders can be written; a hardened service has none."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:  # "no locator available": compile once in every process instead, some seconds
        return njit(function)


@_compiled
def _single_angles(levels, first, angles, radius, full, out):  # type: ignore[no-untyped-def]
    """Long run emphasis (angle, plane, H, W) of every angle; NaN where no line of the box has two counted voxels."""
    planes = out.shape[1]
    reach = np.empty(levels.shape, np.uint8)
    counted = (levels > 0).astype(np.uint8)
    zero = np.zeros(3, np.int64)
    number = np.zeros(out.shape[1:], np.int32)
    _add_box_sum(counted, 1, zero, 0, radius, first, number)
    joined = np.empty(out.shape[1:], np.int32)
    longer = np.empty(out.shape[1:], np.int32)
    pairs = np.empty(out.shape[1:], np.int32)
    for index in range(len(angles)):
        angle = angles[index]
        _reach_along(levels, angle, 2 * radius, reach)
        joined[:] = 0
        longer[:] = 0
        _add_box_sum(reach, 1, angle, 1, radius, first, joined)
        for distance in range(2, 2 * radius + 1):
            _add_box_sum(reach, distance, angle, distance, radius, first, longer)
        if not full:
            pairs[:] = 0
            for distance in range(1, 2 * radius + 1):
                _pairs_along(counted, angle, distance, reach)
                _add_box_sum(reach, 1, angle, distance, radius, first, pairs)
        for z in range(planes):
            for y in range(out.shape[2]):
                for x in range(out.shape[3]):
                    n, t = number[z, y, x], joined[z, y, x]
                    if full or pairs[z, y, x] > 0:
                        out[index, z, y, x] = np.float64(n + 2 * (t + longer[z, y, x])) / np.float64(n - t)
                    else:
                        out[index, z, y, x] = np.nan


@_compiled
def _reach_along(levels, angle, most, reach):  # type: ignore[no-untyped-def]
    """How many voxels further along `angle` the run of every voxel goes, at most `most`."""
    depth, height, width = levels.shape
    a, b, c = angle
    for z in range(depth - 1, -1, -1):
        for y in range(height - 1, -1, -1) if b >= 0 else range(height):
            for x in range(width - 1, -1, -1):
                reach[z, y, x] = 0
            if not (0 <= z + a < depth and 0 <= y + b < height):
                continue
            # within a row only (0, 0, 1) depends on its own row, and that is walked backwards
            for x in range(width - 1 - max(c, 0), -1 - min(c, 0), -1):
                level = levels[z, y, x]
                if level > 0 and levels[z + a, y + b, x + c] == level:
                    reach[z, y, x] = min(reach[z + a, y + b, x + c] + 1, most)


@_compiled
def _pairs_along(counted, angle, distance, pairs):  # type: ignore[no-untyped-def]
    """1 where a voxel and the one `distance` further along `angle` both count."""
    depth, height, width = counted.shape
    a, b, c = angle[0] * distance, angle[1] * distance, angle[2] * distance
    pairs[:] = 0
    for z in range(max(0, -a), min(depth, depth - a)):
        for y in range(max(0, -b), min(height, height - b)):
            for x in range(max(0, -c), min(width, width - c)):
                pairs[z, y, x] = counted[z, y, x] & counted[z + a, y + b, x + c]


@_compiled
def _add_box_sum(values, least, angle, distance, radius, first, total):  # type: ignore[no-untyped-def]
    """Add to total (planes, H, W) the count of `values` >= `least` in the box and in the box moved by -distance angle.

    total[z] belongs to plane first + z of values. Along each axis the two boxes share offsets low to high.
    """
    depth, height, width = values.shape
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for axis in range(3):
        low[axis] = -radius + (distance if angle[axis] < 0 else 0)
        high[axis] = radius - (distance if angle[axis] > 0 else 0)
        if low[axis] > high[axis]:
            return
    planes = total.shape[0]
    start, stop = max(0, first + low[0]), min(depth, first + planes + high[0])
    flags = np.zeros(width + 2 * radius, np.uint8)
    row = np.empty(width, np.uint8)
    rows = np.empty((height, width), np.uint8)
    plane = np.empty((height, width), np.uint16)
    line = np.empty(width, np.uint16)
    for z in range(start, stop):
        for y in range(height):
            for x in range(width):
                flags[x + radius] = 1 if values[z, y, x] >= least else 0
            row[:] = 0
            for k in range(low[2] + radius, high[2] + radius + 1):
                for x in range(width):
                    row[x] += flags[x + k]
            rows[y] = row
        line[:] = 0
        for y in range(min(high[1], height)):
            for x in range(width):
                line[x] += rows[y, x]
        for y in range(height):
            enters, leaves = y + high[1], y + low[1] - 1
            if 0 <= enters < height:
                for x in range(width):
                    line[x] += rows[enters, x]
            if 0 <= leaves < height:
                for x in range(width):
                    line[x] -= rows[leaves, x]
            plane[y] = line
        for target in range(max(0, z - high[0] - first), min(planes, z - low[0] - first + 1)):
            for y in range(height):
                for x in range(width):
                    total[target, y, x] += plane[y, x]


@_compiled
def _note_alive(rows, groups, alive):  # type: ignore[no-untyped-def]
    for v in range(len(rows)):
        for a in range(rows.shape[1]):
            if not np.isnan(rows[v, a]):
                alive[groups[v], a] = True


@_compiled
def _means(rows, groups, alive):  # type: ignore[no-untyped-def]
    """nanmean over the angles alive in each voxel's batch, in numpy's order: eight partial sums, then the rest."""
    out = np.empty(len(rows))
    kept = np.empty(rows.shape[1])
    for v in range(len(rows)):
        n, valid = 0, 0
        for a in range(rows.shape[1]):
            if alive[groups[v], a]:
                missing = np.isnan(rows[v, a])
                kept[n] = 0.0 if missing else rows[v, a]
                valid += 0 if missing else 1
                n += 1
        rest = 0
        total = 0.0
        if n >= 8:
            total = ((kept[0] + kept[1]) + (kept[2] + kept[3])) + ((kept[4] + kept[5]) + (kept[6] + kept[7]))
            rest = 8
        for i in range(rest, n):
            total += kept[i]
        out[v] = total / valid if valid else np.nan
    return out
