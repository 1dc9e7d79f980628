"""Projections lie in the patient's frame, whatever way the array does."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from deconv import projections
from deconv.projections import PLANES, Upright, largest, project, rotating, strongest, upright
from deconv.volume import Volume
from dicomnode.looks import extent

SHAPE, SPACING = (5, 7, 6), (4.0, 2.0, 3.0)  # from head to foot, front to back, right to left
TOWARDS = np.array([[0, 0, -1], [0, 1, 0], [1, 0, 0]], dtype=float).T  # columns: foot, back, left in LPS


def noise() -> np.ndarray:
    return np.random.default_rng(3).random(SHAPE).astype(np.float32)


def as_stored(array: np.ndarray, order: tuple[int, ...], signs: tuple[int, ...]) -> Volume:
    """The upright array (its first voxel at LPS 10, 20, 30) stored with other axes in another sense."""
    stored = array.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    spacing = np.array(SPACING)[list(order)]
    direction = TOWARDS[:, order] * signs
    start = np.array([0 if sign > 0 else n - 1 for sign, n in zip(signs, stored.shape, strict=True)])
    origin = np.array([10.0, 20.0, 30.0]) - direction * spacing @ (np.array(signs) * start * -1)
    return Volume(stored, spacing, origin, direction, "Bq/ml")


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_way_of_storing_a_volume_shows_the_same_patient(order: tuple[int, ...]) -> None:
    """All 48 orders and senses of the axes: the same voxels, sizes and place, without a copy."""
    array = noise()
    for signs in product((1, -1), repeat=3):
        volume = as_stored(array, order, signs)
        shown = upright(volume)
        assert np.array_equal(shown.array, array)
        assert shown.spacing == SPACING
        assert shown.first_lps == pytest.approx([10, 20, 30])
        assert np.shares_memory(shown.array, volume.array)


def test_the_head_is_up_and_the_patients_right_at_the_left() -> None:
    """One hot voxel of a supine head-first volume: where it lies in the three projections, in mm of the patient."""
    array = np.zeros((8, 9, 10), dtype=np.float32)
    array[6, 2, 7] = 5.0  # towards the head, the front and the patient's left
    volume = Volume.axial(array, (3.0, 2.0, 2.5), origin=(-10, -9, 100))
    shown = upright(volume)
    x, y, z = volume.position((6, 2, 7))
    measures = {"grid": {"before": {"first_mm": shown.first_lps, "spacing_mm": shown.spacing}}}
    assert (x, y, z) == (7.5, -5.0, 118.0)
    for plane, across, down in (("axial", x, y), ("coronal", x, z), ("sagittal", y, z)):
        image = project(shown)[plane]
        row, column = np.unravel_index(image.argmax(), image.shape)
        left, right, bottom, top = extent(measures, "before", plane, image.shape)
        assert left + (column + 0.5) * (right - left) / image.shape[1] == pytest.approx(across)
        assert top + (row + 0.5) * (bottom - top) / image.shape[0] == pytest.approx(down)
        assert image.max() == 5.0
    assert project(shown)["coronal"][1, 7] == 5.0  # second row from the head, right half: the patient's left


@pytest.mark.parametrize("degrees", [7.0, 30.0, 52.0])
def test_an_oblique_volume_is_turned_onto_the_patients_axes(degrees: float) -> None:
    """A hot spot appears where it lies in the patient, as hot as it is; what was not measured is zero."""
    angle = np.radians(degrees)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    array = np.full((20, 22, 24), 1.0, dtype=np.float32)
    array[4:6, 15:17, 6:8] = 9.0
    volume = Volume(array, np.full(3, 2.0), np.array([5, 6, 7]), tilt @ np.eye(3)[:, ::-1], "Bq/ml")
    shown = upright(volume)
    x, y, z = volume.position((4.5, 15.5, 6.5))
    for plane, across, down in (("axial", x, y), ("coronal", x, z), ("sagittal", y, z)):
        image = project(shown)[plane]
        rows, columns = np.nonzero(image == 9.0)
        measures = {"grid": {"before": {"first_mm": shown.first_lps, "spacing_mm": shown.spacing}}}
        left, right, bottom, top = extent(measures, "before", plane, image.shape)
        assert left + (columns.mean() + 0.5) * (right - left) / image.shape[1] == pytest.approx(across, abs=2.0)
        assert top + (rows.mean() + 0.5) * (bottom - top) / image.shape[0] == pytest.approx(down, abs=2.0)
    assert set(np.unique(shown.array)) == {0.0, 1.0, 9.0}
    assert (shown.array == 1.0).sum() == pytest.approx(array.size, rel=0.05)


@pytest.mark.parametrize("degrees", [1.5, 7.0, 30.0])
def test_pictures_of_an_oblique_volume_and_of_its_double_cover_the_same_field(degrees: float) -> None:
    """Each pixel of one is two by two of the other, whether or not the coarse one is just straight enough to be taken
    as it is: what is the same before and after looks the same, and both turn together."""
    angle = np.radians(degrees)
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    array = np.full((15, 21, 17), 1.0, dtype=np.float32)
    array[4:7, 14:17, 6:9] = 9.0
    coarse = Volume(array, np.array([2.0, 2.5, 2.2]), np.array([5, 6, 7]), tilt @ np.eye(3)[:, ::-1], "Bq/ml")
    before = upright(coarse)
    after = upright(coarse.doubled(array.repeat(2, 0).repeat(2, 1).repeat(2, 2)), before)
    assert after.array.shape == tuple(2 * n for n in before.array.shape)
    for plane in PLANES:
        edges = [extent({"grid": {"before": {"first_mm": one.first_lps, "spacing_mm": one.spacing}}}, "before", plane,
                        project(one)[plane].shape) for one in (before, after)]
        assert edges[0] == pytest.approx(edges[1], abs=0.05)
        middles = [np.argwhere(project(one)[plane] == 9.0).mean(axis=0) + 0.5 for one in (before, after)]
        assert middles[1] / 2 == pytest.approx(middles[0], abs=0.6)
    first, second = rotating(before, after, floor=0.5, views=4)
    assert first.frames.shape == second.frames.shape


def test_a_signed_projection_keeps_what_is_farthest_from_zero() -> None:
    """With its sign."""
    array = np.zeros((2, 3, 4), dtype=np.float32)
    array[0, 1, 2], array[1, 1, 2], array[1, 0, 0] = 2.0, -3.0, 1.0
    image = strongest(array, 0)
    assert image[1, 2] == -3.0 and image[0, 0] == 1.0 and image[2, 3] == 0.0
    assert largest(array, 0)[1, 2] == 2.0


def both(before: np.ndarray, spacing: tuple[float, float, float] = (4.0, 3.0, 3.0)) -> tuple[Upright, Upright]:
    coarse = Volume.axial(before, spacing)
    return upright(coarse), upright(coarse.doubled(before.repeat(2, 0).repeat(2, 1).repeat(2, 2)))


def test_the_first_views_are_those_from_the_front_and_from_the_left() -> None:
    """A quarter turn leads from the coronal to the sagittal projection; half a turn mirrors."""
    array = np.random.default_rng(5).random((6, 8, 8)).astype(np.float32) + 0.1
    coarse, fine = both(array)
    first, second = rotating(coarse, fine, floor=0.0, views=8)
    assert first.frames.shape == second.frames.shape and first.mm == second.mm
    edge = (second.frames.shape[2] - 16) // 2
    for frames in (first.frames, second.frames):
        assert np.array_equal(frames[0][:, edge:-edge], project(fine)["coronal"])
        assert np.array_equal(frames[2][:, edge:-edge], project(fine)["sagittal"])
        assert np.array_equal(frames[4:], frames[:4, :, ::-1])


def test_a_spot_turns_about_the_middle_of_the_field() -> None:
    """At each angle it appears at x cos + y sin, at its height, as hot as it is."""
    array = np.zeros((10, 20, 20), dtype=np.float32)
    array[2, 4, 15] = 7.0
    coarse, fine = both(array)
    x, y = (15.5 - 10) * 3.0, (4.5 - 10) * 3.0
    for rotation in rotating(coarse, fine, floor=1.0, views=24):
        for view, frame in enumerate(rotation.frames):
            rows, columns = np.nonzero(frame)
            angle = 2 * np.pi * view / 24
            across = (columns.mean() + 0.5 - frame.shape[1] / 2) * rotation.mm[1]
            assert across == pytest.approx(x * np.cos(angle) + y * np.sin(angle), abs=3.0)
            assert rows.mean() * rotation.mm[0] == pytest.approx((10 - 2 - 0.5) * 4.0 - 1.0, abs=2.1)
            assert frame.max() == 7.0


def test_a_very_large_volume_turns_in_fewer_pixels_and_keeps_its_maxima(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures stay small, whatever comes; both volumes still in the same pixels."""
    monkeypatch.setattr(projections, "ROWS", 13)
    monkeypatch.setattr(projections, "COLUMNS", 12)
    array = np.random.default_rng(6).random((11, 15, 15)).astype(np.float32)
    first, second = rotating(*both(array), floor=0.0, views=4)
    assert first.frames.shape == second.frames.shape
    assert first.frames.shape[1] <= 13 and first.frames.shape[2] <= 2 * 12
    assert second.frames[0].max() == first.frames[0].max() == array.max()


def test_what_does_not_belong_together_is_refused() -> None:
    """Volumes that are not multiples of each other, an odd number of views."""
    coarse, fine = both(np.ones((4, 4, 4), dtype=np.float32))
    with pytest.raises(ValueError, match="paired"):
        rotating(coarse, fine, floor=0.0, views=5)
    with pytest.raises(ValueError, match="paired"):
        rotating(fine, coarse, floor=0.0)


def test_planes_name_the_axis_they_look_along() -> None:
    """The table that others draw by."""
    assert PLANES == {"axial": 0, "coronal": 1, "sagittal": 2}
