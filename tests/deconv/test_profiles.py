"""Profiles follow the patient's axes, whatever way the array lies."""

from __future__ import annotations

import numpy as np
import pytest

from deconv.profiles import AXES, along
from deconv.volume import Volume

TILT = np.array([[1, 0, 0], [0, 0.96, -0.28], [0, 0.28, 0.96]])


@pytest.mark.parametrize("direction", [np.eye(3)[:, ::-1], -np.eye(3)[:, ::-1], np.eye(3)[:, [1, 0, 2]],
                                       TILT @ np.eye(3)[:, ::-1]], ids=["supine", "reversed", "sagittal", "oblique"])
@pytest.mark.parametrize(("axis", "slope"), [("left-right", 2.0), ("front-back", 3.0), ("head-foot", -5.0)])
def test_a_slope_in_the_patient_is_the_slope_of_the_profile(direction: np.ndarray, axis: str, slope: float) -> None:
    """2 per mm to the left, 3 to the back, 5 to the head: linear interpolation tells it exactly, inside the voxels."""
    grid = Volume(np.zeros((20, 22, 24), dtype=np.float32), np.array([2.0, 1.5, 1.8]), np.array([3, 4, 5]), direction,
                  "Bq/ml")
    index = np.stack(np.meshgrid(*[np.arange(n) for n in grid.shape], indexing="ij"), axis=-1)
    volume = grid.with_array((grid.position(index) @ (2.0, 3.0, 5.0)).astype(np.float32))
    centre = grid.position((9.7, 10.4, 11.2))
    mm, values = along(volume, centre, axis, 6.0)
    assert len(mm) >= 5 and np.all(np.diff(mm) > 0) and np.abs(mm).max() <= 6.0
    assert values == pytest.approx(centre @ (2.0, 3.0, 5.0) + slope * mm, abs=1e-3)


def test_a_profile_takes_the_voxels_as_they_are_and_ends_with_the_volume() -> None:
    """Along an axis of the array through voxel centres: those values, at their places, none beyond."""
    array = np.random.default_rng(1).random((5, 6, 7)).astype(np.float32)
    volume = Volume.axial(array, (3.0, 2.0, 4.0))
    mm, values = along(volume, volume.position((2, 3, 4)), "left-right", 1000.0)
    assert np.array_equal(values, array[2, 3].astype(np.float64))
    assert mm == pytest.approx((np.arange(7) - 4) * 4.0)
    assert np.array_equal(along(volume, volume.position((2, 3, 4)), "head-foot", 1000.0)[1], array[::-1, 3, 4])


def test_half_as_large_voxels_give_twice_as_many_samples() -> None:
    """Over the same millimetres."""
    array = np.ones((10, 10, 10), dtype=np.float32)
    volume = Volume.axial(array, (3.0, 3.0, 3.0))
    doubled = volume.doubled(np.ones((20, 20, 20), dtype=np.float32))
    for axis in AXES:
        coarse, fine = (along(one, volume.position((5, 5, 5)), axis, 10.5)[0] for one in (volume, doubled))
        assert (len(coarse), len(fine)) == (7, 14)
