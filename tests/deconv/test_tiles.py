"""Tiles: the whole solution, whatever the shapes; memory that runs out makes them smaller, and it is said."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from deconv.interpolate import doubled_nearest
from deconv.tiles import (
    OutOfMemory,
    Tile,
    axis_starts,
    axis_weights,
    is_out_of_memory,
    plan,
    smaller,
    solve_in_tiles,
)

LENGTHS = st.integers(1, 90)
OVERLAPS = st.integers(0, 14)
EXTRA = st.integers(1, 30)


def smallest(overlap: int) -> int:
    return overlap + 2 * min(4, overlap // 2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(LENGTHS, OVERLAPS, EXTRA)
def test_weights_are_a_partition_of_unity(length: int, overlap: int, extra: int) -> None:
    """At every fine voxel the weights of all tiles add up to one; each lies between none and all."""
    tile = min(smallest(overlap) + extra, length)
    starts = axis_starts(length, tile, overlap)
    total = np.zeros(2 * length)
    for start, weight in zip(starts, axis_weights(starts, tile, length, overlap), strict=True):
        assert weight.min() >= 0 and weight.max() <= 1
        total[2 * start : 2 * (start + tile)] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(LENGTHS, OVERLAPS, EXTRA)
def test_nothing_near_a_cut_is_kept(length: int, overlap: int, extra: int) -> None:
    """Tiles cover the axis, share what they must, and have no weight within (overlap - fade) / 2 of a cut."""
    tile = min(smallest(overlap) + extra, length)
    starts = axis_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile == length
    assert all(a + tile - b >= overlap for a, b in pairwise(starts))
    margin = overlap - min(4, overlap // 2)  # fine voxels: twice the half
    for i, weight in enumerate(axis_weights(starts, tile, length, overlap)):
        assert i == 0 or not weight[:margin].any()
        assert i == len(starts) - 1 or not weight[len(weight) - margin :].any()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(3, 22)] * 3), st.tuples(*[st.integers(0, 5)] * 3), st.tuples(*[st.integers(1, 9)] * 3))
def test_a_local_solver_gives_the_same_in_tiles(shape: tuple, overlap: tuple, extra: tuple) -> None:
    """Two outputs, any shapes: equal to the solution at once, with true neighbours at every cut."""
    reach = [min((o - min(4, o // 2)) // 2, 2) for o in overlap]

    def solve(y: np.ndarray) -> tuple:
        blurred = ndimage.uniform_filter(y, [2 * r + 1 for r in reach], mode="nearest")
        return torch.from_numpy(doubled_nearest(blurred)), doubled_nearest(y)

    y = np.random.default_rng(0).random(shape).astype(np.float32)
    found = solve_in_tiles(y, solve, tile=[smallest(o) + e for o, e in zip(overlap, extra, strict=True)],
                           overlap=overlap)
    for out, expected in zip(found.outputs, solve(y), strict=True):
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, np.asarray(expected), atol=1e-5)
    assert all(0 < f < 2 * n for faces, n in zip(found.faces, shape, strict=True) for f in faces)


def test_one_tile_is_the_solution_itself() -> None:
    """Bit for bit, without faces."""
    y = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)
    found = solve_in_tiles(y, doubled_nearest, tile=(99, 99, 99), overlap=(4, 4, 4))
    np.testing.assert_array_equal(found.image, doubled_nearest(y))
    assert (found.tile, found.count, found.faces, found.smaller) == ((5, 6, 7), 1, ((), (), ()), ())


# --- memory

def limited(voxels: int, error: Exception):
    """A solver that has memory for so many voxels; and the tiles it was asked for."""
    asked: list[tuple] = []

    def solve(y: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(y.shape))
        if y.numel() > voxels:
            raise error
        return torch.from_numpy(doubled_nearest(y.numpy()))

    return solve, asked


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_out_of_memory_halves_the_tile_and_begins_anew(error: Exception) -> None:
    """Along the longest axis, again and again; the result is that of the small tiles from the start, and it is said."""
    y = torch.rand((40, 24, 16), generator=torch.Generator().manual_seed(0))
    solve, _asked = limited(3000, error)
    seen: list[Tile] = []
    found = solve_in_tiles(y, solve, tile=(40, 24, 16), overlap=(4, 4, 4), on_tile=seen.append)
    assert found.smaller == ((40, 24, 16), (20, 24, 16), (20, 12, 16)) and found.tile == (10, 12, 16)
    assert [t.number for t in seen if t.attempt == 3] == list(range(found.count))
    again = solve_in_tiles(y, solve, tile=found.tile, overlap=(4, 4, 4))
    np.testing.assert_array_equal(found.image, again.image)
    np.testing.assert_allclose(found.image, doubled_nearest(y.numpy()), atol=1e-6)


def test_no_memory_for_the_smallest_tile_is_said_with_a_remedy() -> None:
    """The tile, the reason and what to do; other errors pass as they are."""
    y = torch.ones((24, 24, 24))
    solve, asked = limited(10, MemoryError("no room"))
    with pytest.raises(OutOfMemory, match=r"8 x 8 x 8 voxels.*no room.*larger machine"):
        solve_in_tiles(y, solve, tile=(24, 24, 24), overlap=(4, 4, 4))
    assert asked[-1] == (8, 8, 8)
    broken, _ = limited(10, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        solve_in_tiles(y, broken, tile=(24, 24, 24), overlap=(4, 4, 4))
    assert not is_out_of_memory(RuntimeError("shapes")) and not is_out_of_memory(ValueError("CUDA out of memory"))
    assert smaller((8, 8, 8), (8, 8, 8)) is None and smaller((9, 30, 12), (8, 8, 8), multiple=8) == (9, 16, 12)


def test_real_memory_that_runs_out_is_survived() -> None:
    """A process that may not grow any further solves the volume in smaller tiles."""
    program = """
import resource, numpy as np, torch
from deconv.tiles import solve_in_tiles
torch.set_num_threads(1)
def solve(y):
    work = torch.ones(y.numel() * 1000 // 4)  # 1000 bytes a voxel
    return torch.ones([2 * n for n in y.shape]) * work[0]
y = torch.ones((64, 64, 64))  # 262 MB of work at once
solve(y[:8, :8, :8])
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 120_000_000,) * 2)
found = solve_in_tiles(y, solve, tile=(64, 64, 64), overlap=(4, 4, 4))
print(found.smaller, found.tile, float(np.abs(found.image - 1).max()) < 1e-6)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("((64, 64, 64),") and done.stdout.strip().endswith("True")


# --- planning

@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(8, 200)] * 3), st.floats(2e7, 4e9), st.tuples(*[st.integers(0, 20)] * 3))
def test_a_planned_tile_fits_the_memory_and_can_be_joined(shape: tuple, memory: float, overlap: tuple) -> None:
    """Within the budget, of sizes that suit."""
    least = [min(max(smallest(o), 8), n) for o, n in zip(overlap, shape, strict=True)]
    if np.prod([-(-n // 8) * 8 for n in least], dtype=float) * 600.0 > memory:
        return  # refused: see below
    tile = plan(shape, memory, 600.0, overlap)
    assert np.prod(tile, dtype=float) * 600.0 <= memory
    for t, n, o in zip(tile, shape, overlap, strict=True):
        assert t == n or t % 8 == 0
        axis_starts(n, t, o)


def test_a_memory_too_small_for_any_tile_is_refused() -> None:
    """With what would be needed."""
    with pytest.raises(ValueError, match=r"needs 0\.0\d GB and 0\.00 GB are allowed"):
        plan((99, 99, 99), 1e6, 600.0, (16, 16, 16))


def test_more_memory_never_means_more_tiles() -> None:
    """From a gigabyte to all at once."""
    shape, overlap = (267, 128, 128), (20, 16, 16)
    counts = []
    for gigabytes in (0.5, 1.0, 2.0, 4.0):
        tile = plan(shape, gigabytes * 1e9, 600.0, overlap, padding=(8, 6, 6))
        counts.append(np.prod([len(axis_starts(n, t, o)) for n, t, o in zip(shape, tile, overlap, strict=True)]))
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1 and counts[0] > 4


@pytest.mark.parametrize("wrong", [{"tile": (4, 8, 8)}, {"overlap": (-1, 4, 4)}])
def test_tiles_that_cannot_be_joined_are_refused(wrong: dict) -> None:
    """Too short for the overlap, or an overlap that is none."""
    options = {"tile": (8, 8, 8), "overlap": (4, 4, 4), **wrong}
    with pytest.raises(ValueError, match="joined"):
        solve_in_tiles(np.ones((20, 20, 20), np.float32), doubled_nearest, **options)


def test_a_solution_of_another_shape_is_refused() -> None:
    """A solver that does not double, or that changes what it gives."""
    y = np.ones((20, 8, 8), np.float32)
    with pytest.raises(ValueError, match="shape"):
        solve_in_tiles(y, lambda part: part, tile=(8, 8, 8), overlap=(2, 2, 2))
    count = iter(range(9))
    with pytest.raises(ValueError, match="volumes"):
        solve_in_tiles(y, lambda part: (doubled_nearest(part),) * (1 + next(count)), tile=(8, 8, 8), overlap=(2, 2, 2))
