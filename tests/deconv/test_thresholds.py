"""Spheres contoured by thresholds: known volumes come back, and Table 6 has the paper's rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from deconv.phantoms import Phantom, spheres
from deconv.thresholds import CLINICAL, PAPER_TABLE6, THRESHOLDS, at_threshold, region, table6, table6_of_many

VOXEL_ML = 0.001  # 1 mm cubes


def ball(radius: float = 6.0, size: int = 31) -> np.ndarray:
    """1 in a ball in the middle, 0 outside."""
    i, j, k = np.indices((size,) * 3) - size // 2
    return (i * i + j * j + k * k <= radius**2).astype(float)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return spheres((16, 40, 40), seed=2)


def test_region_of_a_sharp_ball_is_the_ball_at_every_threshold() -> None:
    """Volume, mean, median and maximum."""
    inside = ball()
    for threshold in (0.2, 0.5, 0.8):
        found = region(8.0 * inside, inside, threshold, voxel_ml=VOXEL_ML)
        assert found.volume_ml == pytest.approx(inside.sum() * VOXEL_ML)
        assert (found.mean, found.median, found.max) == (8.0, 8.0, 8.0)


def test_background_moves_the_threshold() -> None:
    """Above 10 of background, half of the way from it to 30 is 20, not 15: what has 18 is inside for one only."""
    inside = ball()
    image = np.where(inside > 0, 30.0, np.where(ball(9.0) > 0, 18.0, 10.0))
    plain = region(image, inside, 0.5, voxel_ml=VOXEL_ML)
    corrected = region(image, inside, 0.5, voxel_ml=VOXEL_ML, background=10.0)
    assert plain.volume_ml == pytest.approx(ball(9.0).sum() * VOXEL_ML)
    assert corrected.volume_ml == pytest.approx(inside.sum() * VOXEL_ML)


def test_only_what_is_connected_to_the_maximum_counts() -> None:
    """A hotter neighbour is another lesion: neither its voxels nor its maximum."""
    image = ball(4.0)
    image[1:4, 1:4, 1:4] = 5.0
    found = region(image, ball(4.0), 0.5, voxel_ml=VOXEL_ML)
    assert found.volume_ml == pytest.approx(ball(4.0).sum() * VOXEL_ML) and found.max == 1.0


def test_table_has_the_rows_of_the_paper(phantom: Phantom) -> None:
    """Seven diameters from 16 to 5 mm, fixed then variable; one threshold for all the fixed ones; none of 3 mm."""
    rows = table6(phantom.measured.array, phantom)
    assert [(r.kind, r.diameter_mm) for r in rows] == [(p.kind, p.diameter_mm) for p in PAPER_TABLE6]
    assert len({r.threshold_percent for r in rows[:7]}) == 1
    assert len({r.threshold_percent for r in rows[7:]}) > 1


def test_truth_recovers_everything(phantom: Phantom) -> None:
    """The table of the truth itself: volumes within voxels' reach of V0, recovery near 1."""
    rows = table6(phantom.truth.array, phantom)
    for row in rows[7:]:
        assert row.volume_ratio == pytest.approx(1.0, abs=0.03 if row.diameter_mm >= 10 else 0.25)
    for row in rows[:3]:
        assert row.rc_median == pytest.approx(1.0, abs=0.01) and row.rc_max == pytest.approx(1.0, abs=0.01)
        assert row.rc_mean > 0.9


def test_blur_lowers_recovery_and_swells_small_spheres(phantom: Phantom) -> None:
    """On the measured image as in the paper: recovery falls with the diameter, the smallest are contoured too large."""
    rows = table6(phantom.measured.array, phantom)[:7]
    assert all(a.rc_max > b.rc_max for a, b in pairwise(rows))
    assert rows[0].volume_ratio < 1.2 < rows[-1].volume_ratio


def test_variable_thresholds_are_the_best_there_are(phantom: Phantom) -> None:
    """No threshold comes nearer to the volume of a sphere than the variable one."""
    image = phantom.measured.array
    fixed, variable = table6(image, phantom)[:7], table6(image, phantom)[7:]
    for one, best in zip(fixed, variable, strict=True):
        assert abs(best.volume_ratio - 1) <= abs(one.volume_ratio - 1) + 1e-12
        assert best.threshold_percent / 100 in THRESHOLDS


def test_clinical_thresholds_contour_less_the_higher_they_are(phantom: Phantom) -> None:
    """40, 41, 50 %: smaller regions with higher means; the row of the fixed threshold when that one is given."""
    tables = [at_threshold(phantom.measured.array, phantom, t) for t in CLINICAL]
    for rows in zip(*tables, strict=True):
        assert all(a.volume_ratio >= b.volume_ratio and a.rc_mean <= b.rc_mean for a, b in pairwise(rows))
    fixed = table6(phantom.measured.array, phantom)[0]
    same = at_threshold(phantom.measured.array, phantom, fixed.threshold_percent / 100)[0]
    assert (same.volume_ratio, same.rc_mean, same.kind) == (fixed.volume_ratio, fixed.rc_mean, "given")


def test_several_images_share_their_thresholds() -> None:
    """Noise realisations: one fixed threshold, means between those of the single images, a spread above 0."""
    phantoms = [spheres((16, 40, 40), seed=s, noise=0.05) for s in (1, 2, 3)]
    rows = table6_of_many([p.measured.array for p in phantoms], phantoms)
    singles = [table6(p.measured.array, p) for p in phantoms]
    for i, row in enumerate(rows):
        maxima = [one[i].rc_max for one in singles]
        assert row.rc_max == pytest.approx(np.mean(maxima)) and row.rc_max_sd == pytest.approx(np.std(maxima, ddof=1))


def test_what_cannot_be_contoured_is_refused(phantom: Phantom) -> None:
    """Another grid, unlike numbers, thresholds that are no fraction, spheres not above the background."""
    with pytest.raises(ValueError, match="neither on the PET grid"):
        table6(np.zeros((3, 3, 3)), phantom)
    with pytest.raises(ValueError, match="needs its phantom"):
        table6_of_many([phantom.measured.array], [])
    with pytest.raises(ValueError, match="between 0 and 1"):
        region(ball(), ball(), 41.0, voxel_ml=VOXEL_ML)
    with pytest.raises(ValueError, match="background"):
        region(ball(), ball(), 0.4, voxel_ml=VOXEL_ML, background=2.0)
