"""A volume in overlapping tiles: cost grows linearly with the volume, memory is the output and one tile.

Every tile is solved by itself from a view of y that reaches beyond what is kept of it, so that inside a volume the
solver sees true neighbours and never an invented border. Along each axis two neighbours pass into each other by a
smooth ramp in the middle of what both hold; what lies between ramp and cut is thrown away. With weights w_i (products
of one ramp per axis)

    x = sum_i w_i x_i,   sum_i w_i = 1 everywhere

so that equal tiles give that image, and a volume that fits one tile is the solver's own result, bit for bit.

Where memory runs out, the tile is halved along its longest axis and everything begins anew: the result depends on the
one tile shape that is reported (`Tiled.tile`), which belongs among the settings of the derived image.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

from deconv.pooled import smooth_length

__all__ = ["OutOfMemory", "Tile", "Tiled", "axis_faces", "axis_starts", "axis_weights", "is_out_of_memory", "plan",
           "require_memory", "smaller", "solve_in_tiles"]

Triple = tuple[int, int, int]
Box = tuple[slice, slice, slice]
Image = torch.Tensor | NDArray[np.floating]

FADE = 4  # PET voxels over which two tiles pass into each other, at most; no more than half the overlap


class OutOfMemory(MemoryError):
    """Even the smallest tile does not fit into memory; the message names the tile and the remedy."""


@dataclass(frozen=True)
class Tile:
    """The tile that is about to be solved: number of count (from 0), where it lies in y, and at which attempt."""

    number: int
    count: int
    box: Box
    attempt: int


@dataclass(frozen=True, eq=False)
class Tiled:
    """What `solve_in_tiles` made.

    outputs  one (2D, 2H, 2W) float32 for each that the solver gives.
    tile     the shape that was used (D, H, W), PET voxels;   count  tiles of it.
    faces    for each axis the fine voxel indices about which two tiles pass into each other; see deconv/seams.py.
    smaller  the shapes that did not fit into memory, in the order they were tried; () where the first one did.
    """

    outputs: tuple[NDArray[np.float32], ...]
    tile: Triple
    count: int
    faces: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    smaller: tuple[Triple, ...]

    @property
    def image(self) -> NDArray[np.float32]:
        """The first output."""
        return self.outputs[0]


def solve_in_tiles(
    y: Image,
    solve: Callable[[Image], Image | tuple[Image, ...]],
    *,
    tile: Sequence[int],
    overlap: Sequence[int],
    minimum: Sequence[int] | None = None,
    multiple: int = 2,
    on_tile: Callable[[Tile], None] | None = None,
) -> Tiled:
    """`solve` applied to y (D, H, W) tile by tile.

    solve     tile (d, h, w) -> (2d, 2h, 2w), or several of them (a mean and its standard deviation); tensors on any
              device or arrays. It gets a view of y and must not write to it.
    tile      PET voxels of a tile; an axis that is longer than the volume is cut to it.
    overlap   PET voxels that neighbours share at least; `fade` of them are the ramp, half of the rest is thrown away at
              either cut: (overlap - fade) / 2 must exceed the reach of the solver's errors at a cut.
    minimum   a tile that is not halved any further; None: overlap + 2 * fade, the least that can be joined.
    multiple  to which halved tiles are rounded.
    on_tile   called before each tile; what it raises passes.

    Raises ValueError for tiles that cannot be joined or solutions of a wrong shape, OutOfMemory where `minimum` does
    not fit into memory. What else `solve` raises passes.
    """
    if y.ndim != 3:
        raise ValueError(f"y must be (D, H, W), got shape {tuple(y.shape)}")
    shape = _triple(y.shape)
    shared = _triple(overlap)
    least = _triple(_least(shared) if minimum is None else np.maximum(minimum, _least(shared)))
    present = _triple(min(t, n) for t, n in zip(tile, shape, strict=True))
    tried: list[Triple] = []
    while True:
        starts = [axis_starts(n, t, o) for n, t, o in zip(shape, present, shared, strict=True)]
        refusal = None
        try:
            outputs = _solved(y, solve, present, starts, shared, len(tried), on_tile)
            break
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            refusal = str(error)
        # Outside the handler: the traceback would keep the failed tile's tensors alive.
        gc.collect()
        if isinstance(y, torch.Tensor) and y.is_cuda:
            torch.cuda.empty_cache()
        tried.append(present)
        present = _or_give_up(smaller(present, least, multiple=multiple), present, refusal)
    faces = [axis_faces(s, t) for s, t in zip(starts, present, strict=True)]
    return Tiled(outputs, present, prod(map(len, starts)), (faces[0], faces[1], faces[2]), tuple(tried))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, numpy's, CUDA's, or the CPU allocator's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "DefaultCPUAllocator" in text or "CUDA out of memory" in text
    )


def smaller(tile: Triple, minimum: Triple, *, multiple: int = 2) -> Triple | None:
    """`tile` halved along its longest axis that exceeds `minimum`, rounded up to `multiple`; None where none does."""
    for axis in sorted(range(3), key=lambda a: (-tile[a], a)):
        half = max(-(-(tile[axis] // 2) // multiple) * multiple, minimum[axis])
        if half < tile[axis]:
            return _triple(half if a == axis else n for a, n in enumerate(tile))
    return None


def plan(
    shape: Sequence[int],
    memory_bytes: float,
    bytes_per_voxel: float,
    overlap: Sequence[int],
    minimum: Sequence[int] | None = None,
    *,
    fixed_bytes: float = 0.0,
    padding: Sequence[int] = (0, 0, 0),
    multiple: int = 8,
) -> Triple:
    """The tile (D, H, W) with the least total work whose solution fits into `memory_bytes`.

    A tile of t voxels costs bytes_per_voxel x prod(smooth_length(t + padding)): the solver's own padded grid, of
    lengths on which FFTs are fast. Sizes are multiples of `multiple` (a U-Net of three levels needs 8) or the volume's
    own.

    fixed_bytes  what is held besides the tile: the output (32 bytes a PET voxel and output) and the source.
    minimum      the smallest tile worth solving; None: the least that can be joined.
    Raises ValueError, naming what would be needed, where the smallest tile does not fit.
    """
    room = memory_bytes - fixed_bytes
    least = np.maximum(_least(_triple(overlap)), (1, 1, 1) if minimum is None else minimum)
    sizes = [_sizes(n, o, int(m), multiple) for n, o, m in zip(shape, overlap, least, strict=True)]

    def voxels(tile: Sequence[int]) -> int:
        return prod(smooth_length(t + p) for t, p in zip(tile, padding, strict=True))

    def work(tile: Sequence[int]) -> tuple[int, int]:
        count = prod(len(axis_starts(n, t, o)) for n, t, o in zip(shape, tile, overlap, strict=True))
        return count * voxels(tile), count

    fitting = [tile for tile in product(*sizes) if voxels(tile) * bytes_per_voxel <= room]
    if not fitting:
        smallest = tuple(min(column) for column in sizes)
        needed = fixed_bytes + voxels(smallest) * bytes_per_voxel
        raise ValueError(
            f"the smallest tile of {smallest} voxels needs {needed / 1e9:.2f} GB and {memory_bytes / 1e9:.2f} GB are "
            "allowed; allow more memory or choose a smaller region"
        )
    return _triple(min(fitting, key=work))


def require_memory(memory_gb: float) -> None:
    """Raises ValueError for a memory budget that is none."""
    if not 0 < memory_gb < float("inf"):
        raise ValueError(f"memory_gb must be a positive number of gigabytes, got {memory_gb}")


def axis_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First voxels of tiles of one length, spread evenly over an axis, each sharing `overlap` at least with the next.

    Raises ValueError for a tile that is too short to be joined on both sides.
    """
    if tile >= length:
        return [0]
    fade = _fade(overlap)
    if tile < overlap + 2 * fade or overlap < 0:
        raise ValueError(
            f"a tile of {tile} voxels with an overlap of {overlap} cannot be joined on both sides; "
            f"take at least {overlap + 2 * fade}"
        )
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def axis_weights(starts: Sequence[int], tile: int, length: int, overlap: int) -> list[NDArray[np.float32]]:
    """Weight of each tile's fine voxels along one axis (2 * tile each): they add up to 1 at every fine voxel."""
    size = 2 * min(tile, length)
    weights = [np.ones(size, dtype=np.float32) for _ in starts]
    width = 2 * _fade(overlap)
    ramp = (np.arange(width) + 0.5) / max(width, 1)
    ramp = (ramp * ramp * (3.0 - 2.0 * ramp)).astype(np.float32)
    for i, face in enumerate(axis_faces(starts, tile)):
        begin = face - width // 2
        before, after = begin - 2 * starts[i], begin - 2 * starts[i + 1]
        weights[i][before : before + width] *= 1.0 - ramp
        weights[i][before + width :] = 0.0
        weights[i + 1][after : after + width] *= ramp
        weights[i + 1][:after] = 0.0
    return weights


def axis_faces(starts: Sequence[int], tile: int) -> tuple[int, ...]:
    """Fine voxel index in the middle of what each two neighbours share."""
    return tuple(after + before + tile for before, after in pairwise(starts))


def _solved(
    y: Image, solve: Callable[[Image], Image | tuple[Image, ...]], tile: Triple, starts: Sequence[Sequence[int]],
    overlap: Triple, attempt: int, on_tile: Callable[[Tile], None] | None,
) -> tuple[NDArray[np.float32], ...]:
    shape = _triple(y.shape)
    weights = [axis_weights(s, t, n, o) for s, t, n, o in zip(starts, tile, shape, overlap, strict=True)]
    numbers = list(product(*(range(len(s)) for s in starts)))
    outputs: list[NDArray[np.float32]] = []
    for number, (i, j, k) in enumerate(numbers):
        corner = (starts[0][i], starts[1][j], starts[2][k])
        box: Box = _box(corner, tile)
        if on_tile is not None:
            on_tile(Tile(number, len(numbers), box, attempt))
        solution = solve(y[box])
        parts = solution if isinstance(solution, tuple) else (solution,)
        if not outputs:
            outputs = [np.zeros(tuple(2 * n for n in shape), dtype=np.float32) for _ in parts]
        if len(parts) != len(outputs):
            raise ValueError(f"the solver gave {len(parts)} volumes for a tile and {len(outputs)} for the first")
        for part, out in zip(parts, outputs, strict=True):
            _add(out, _on_cpu(part, tile), corner, (weights[0][i], weights[1][j], weights[2][k]))
        del solution, parts
    return tuple(outputs)


def _add(
    out: NDArray[np.float32], part: NDArray[np.float32], corner: Triple, weights: Sequence[NDArray[np.float32]]
) -> None:
    """out += weights x part where the weights are not zero, one fine slice at a time so that nothing large is made."""
    kept = [np.flatnonzero(w)[[0, -1]] + (0, 1) for w in weights]
    inner = [slice(int(a), int(b)) for a, b in kept]
    target = [slice(2 * c + s.start, 2 * c + s.stop) for c, s in zip(corner, inner, strict=True)]
    plane = weights[1][inner[1], None] * weights[2][None, inner[2]]
    for source, sink in zip(range(inner[0].start, inner[0].stop), range(target[0].start, target[0].stop), strict=True):
        out[sink, target[1], target[2]] += weights[0][source] * plane * part[source, inner[1], inner[2]]


def _on_cpu(part: Image, tile: Triple) -> NDArray[np.float32]:
    expected = tuple(2 * n for n in tile)
    if tuple(part.shape) != expected:
        raise ValueError(f"the solver gave shape {tuple(part.shape)} for a tile of {tile}; expected {expected}")
    if isinstance(part, torch.Tensor):
        part = part.detach().to("cpu", torch.float32).numpy()
    return np.asarray(part, dtype=np.float32)


def _or_give_up(next_tile: Triple | None, tile: Triple, reason: str | None) -> Triple:
    if next_tile is None:
        raise OutOfMemory(
            f"a tile of {tile[0]} x {tile[1]} x {tile[2]} voxels, the smallest that can be solved, does not fit into "
            f"memory ({reason or 'out of memory'}); free memory or use a larger machine"
        )
    return next_tile


def _sizes(length: int, overlap: int, minimum: int, multiple: int) -> list[int]:
    """Tile lengths worth trying along one axis: for each number of tiles the shortest, and the whole axis."""
    best: dict[int, int] = {1: length}
    first = -(-minimum // multiple) * multiple
    for tile in range(first, length, multiple):
        count = len(axis_starts(length, tile, overlap))
        best[count] = min(tile, best.get(count, tile))
    return sorted(set(best.values()))


def _fade(overlap: int) -> int:
    return min(FADE, overlap // 2)


def _least(overlap: Triple) -> Triple:
    return _triple(max(o + 2 * _fade(o), 1) for o in overlap)


def _box(corner: Triple, tile: Triple) -> Box:
    d, h, w = (slice(c, c + t) for c, t in zip(corner, tile, strict=True))
    return d, h, w


def _triple(values: object) -> Triple:
    a, b, c = (int(v) for v in values)  # type: ignore[attr-defined]
    return a, b, c
