"""Uptake regions and SUVpeak against what can be calculated by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deconv.uptake import LEAST_ML, Region, peak_sphere, regions, typical_tissue
from deconv.volume import Volume

RADIUS_MM = (3000 / (4 * np.pi)) ** (1 / 3)  # of 1 mL


def fine(volume: Volume) -> Volume:
    """The same values on the doubled grid."""
    return volume.doubled(volume.array.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def field(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
    """mm of every voxel from the middle, along the three axes."""
    lines = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    return tuple(np.meshgrid(*lines, indexing="ij"))


def ball(shape: tuple[int, int, int], spacing: tuple[float, float, float], radius: float,
         at: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    squared = sum((axis - c) ** 2 for axis, c in zip(field(shape, spacing), at, strict=True))
    return np.asarray(squared <= radius**2)


def found(values: np.ndarray, spacing: tuple[float, float, float] = (3.0, 3.0, 3.0), **options: int) -> list[Region]:
    volume = Volume.axial(values.astype(np.float32), spacing)
    return regions(volume, fine(volume), **options)


def test_a_uniform_sphere_has_its_volume_and_one_value_throughout() -> None:
    """30 mm across, 8 in a background of 1: 14.14 mL, and maximum, mean and peak are all 8."""
    shape, spacing = (30, 30, 30), (2.0, 2.0, 2.0)
    (region,) = found(np.where(ball(shape, spacing, 15.0), 8.0, 1.0), spacing)
    assert region.volume_ml == pytest.approx(4 / 3 * np.pi * 1.5**3, rel=0.02)
    assert region.centre_mm == pytest.approx((29.0, 29.0, 29.0), abs=1e-6)
    assert region.source_slice in (14, 15) and region.share == 0.41
    for uptake in (region.before, region.after):
        assert (uptake.max, uptake.mean) == (8.0, 8.0)
        assert uptake.peak == pytest.approx(8.0, rel=1e-9)


def test_the_peak_of_a_small_sphere_is_its_share_of_one_millilitre() -> None:
    """8 mm across (about 0.27 mL) at 10 in a background of 0: the mean over 1 mL is all its activity."""
    shape, spacing = (26, 26, 26), (1.0, 1.0, 1.0)
    inside = ball(shape, spacing, 4.0)
    (region,) = found(np.where(inside, 10.0, 0.0), spacing)
    assert region.before.peak == pytest.approx(10 * inside.sum() / 1000, rel=0.005)


def test_the_peak_on_a_slope_is_the_value_at_the_highest_centre() -> None:
    """A mean over a sphere of a linear ramp is the value at its centre: here that of the last voxel inside."""
    shape, spacing = (20, 20, 40), (3.0, 3.0, 2.0)
    _, _, x = field(shape, spacing)
    ramp = 100.0 + x
    ramp[:, :, -6:] = ramp[:, :, [-7]] - 1e-3  # beyond the summit: level, so that it is a summit
    (region,) = found(ramp, spacing)
    volume = Volume.axial(ramp.astype(np.float32), spacing)
    expected = _peak_by_definition(fine(volume))
    assert region.before.peak == pytest.approx(expected, rel=1e-5)
    inner = 100.0 + x[0, 0, 33] + 0.5 - RADIUS_MM  # a sphere that lies wholly on the slope
    assert inner < region.before.peak < region.before.max


def _peak_by_definition(volume: Volume) -> float:
    """The highest mean over spheres about every voxel centre of one line through the middle, summed directly."""
    d, h, w = volume.shape
    places = volume.position(np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij"), axis=-1))
    step = np.array([(np.arange(8) + 0.5) / 8 - 0.5] * 3).T
    parts = np.stack(np.meshgrid(*step.T, indexing="ij"), axis=-1).reshape(-1, 3)[:, ::-1] * volume.spacing[::-1]
    best = 0.0
    for column in range(w // 2, w):
        centre = places[d // 2, h // 2, column]
        near = np.linalg.norm(places - centre, axis=-1) < RADIUS_MM + 3
        offsets = places[near][:, None] + parts - centre
        share = (np.linalg.norm(offsets, axis=-1) <= RADIUS_MM).mean(axis=1)
        best = max(best, float((volume.array[near] * share).sum() / share.sum()))
    return best


def test_the_same_values_on_finer_voxels_give_the_same_figures() -> None:
    """Doubling the grid changes nothing: what differs between before and after is the image alone."""
    rng = np.random.default_rng(7)
    shape, spacing = (14, 18, 16), (3.27, 4.1, 4.6)
    values = np.where(ball(shape, spacing, 14.0), 10.0, 1.0) * rng.uniform(0.9, 1.1, shape)
    for region in found(values, spacing):
        assert region.after.max == region.before.max
        assert region.after.mean == pytest.approx(region.before.mean, rel=1e-6)
        assert region.after.peak == pytest.approx(region.before.peak, rel=1e-9)


@pytest.mark.parametrize(("spacing", "within"), [((1.0, 1.0, 1.0), 0.01), ((1.5, 1.2, 1.8), 0.02),
                                                  ((3.0, 2.0, 2.5), 0.06), ((4.0, 4.0, 4.0), 0.10)])
def test_the_peak_depends_on_millimetres_and_not_on_voxels(spacing: tuple[float, float, float], within: float) -> None:
    """A Gaussian of 12 mm FWHM, height 10, sampled on four grids: near the true mean over 1 mL about its top, and
    from below, as coarse voxels flatten it."""
    sigma = 12 / 2.3548
    radius = np.linspace(0, RADIUS_MM, 20001)
    weight = np.exp(-0.5 * (radius / sigma) ** 2) * radius**2
    expected = 10 * np.trapezoid(weight, radius) * 3 / RADIUS_MM**3
    shape = (round(60 / spacing[0]), round(60 / spacing[1]), round(60 / spacing[2]))
    squared = sum(axis**2 for axis in field(shape, spacing))
    (region,) = found(10 * np.exp(-0.5 * squared / sigma**2), spacing)
    assert expected * (1 - within) < region.before.peak < expected * 1.001


def test_the_sphere_of_the_peak_holds_one_millilitre() -> None:
    """Voxels count by the part of them that lies inside; those in the middle lie inside wholly."""
    for spacing in ((1.0, 1.2, 0.9), (2.0, 2.0, 2.0), (3.3, 2.7, 2.7)):
        weights = peak_sphere(np.array(spacing))
        assert weights.sum() == pytest.approx(1.0)
        assert np.prod(spacing) / weights.max() / 1000 == pytest.approx(1.0, rel=0.02)
        assert np.array_equal(weights, weights[::-1, ::-1, ::-1])
        assert all(n % 2 for n in weights.shape)


def test_before_and_after_are_measured_in_the_same_millimetres() -> None:
    """What becomes hot beside the region does not count as its maximum or mean."""
    shape, spacing = (20, 20, 20), (3.0, 3.0, 3.0)
    inside = ball(shape, spacing, 12.0)
    source = Volume.axial(np.where(inside, 10.0, 1.0).astype(np.float32), spacing)
    doubled = inside.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    image = source.doubled(np.where(doubled, 12.0, 99.0).astype(np.float32))
    (region,) = regions(source, image)
    assert (region.after.max, region.after.mean) == (12.0, 12.0)


def test_regions_come_by_their_maximum_and_do_not_overlap() -> None:
    """Three spheres of 4, 12 and 8: in the order 12, 8, 4, and at most as many as asked for."""
    shape, spacing = (16, 16, 60), (3.0, 3.0, 3.0)
    values = np.ones(shape)
    for x, activity in ((-60, 4.0), (0, 12.0), (60, 8.0)):
        values[ball(shape, spacing, 10.0, at=(0, 0, x))] = activity
    all_of_them = found(values)
    assert [region.before.max for region in all_of_them] == [12.0, 8.0, 4.0]
    assert [region.before.max for region in found(values, most=2)] == [12.0, 8.0]
    taken = np.zeros(shape, dtype=int)
    for region in all_of_them:
        taken[region.box] += region.mask
    assert taken.max() == 1


def test_a_fainter_uptake_that_touches_a_hotter_one_is_told_apart_above_a_higher_threshold() -> None:
    """Two summits with a saddle between them; the shoulder of a summit alone is no region."""
    shape, spacing = (16, 16, 40), (3.0, 3.0, 3.0)
    d, h, w = field(shape, spacing)

    def bump(height: float, at: float, sigma: float) -> np.ndarray:
        return height * np.exp(-0.5 * (d**2 + h**2 + (w - at) ** 2) / sigma**2)

    two = found(bump(10, -12.5, 7.0) + bump(8, 12.5, 7.0) + 0.2)
    assert [region.share for region in two] == [0.41, 0.5]
    assert two[0].centre_mm[0] < two[1].centre_mm[0]
    assert len(found(bump(10, -4, 7.0) + bump(3, 12, 5.0) + 0.2)) == 1


def test_specks_and_empty_images_give_no_region() -> None:
    """One voxel of 27 mm3 is less than LEAST_ML; nothing at all, less still."""
    values = np.zeros((10, 10, 10))
    assert found(values) == []
    values[5, 5, 5] = 100.0
    assert LEAST_ML > 0.027 and found(values) == []


def test_noise_is_no_uptake() -> None:
    """A body of 1 with noise of a fifth in air of next to nothing, and two lesions: these two alone."""
    rng = np.random.default_rng(2)
    shape, spacing = (24, 40, 40), (3.0, 3.0, 3.0)
    values = np.where(ball(shape, spacing, 50.0), rng.normal(1.0, 0.2, shape), rng.exponential(0.02, shape))
    values[ball(shape, spacing, 9.0, at=(0, -20, 10))] = 6.0
    values[ball(shape, spacing, 8.0, at=(10, 25, -15))] = 3.0
    assert typical_tissue(values) == pytest.approx(1.0, rel=0.05)
    assert [round(region.before.mean) for region in found(values)] == [6, 3]
    uniform = found(np.where(ball(shape, spacing, 50.0), rng.normal(1.0, 0.05, shape), 0.0))
    assert len(uniform) == 1 and uniform[0].before.mean == pytest.approx(1.0, rel=0.01)  # the hottest there is


def test_a_region_at_the_border_is_measured_by_what_is_there() -> None:
    """Half a sphere at the end of the field: nothing beyond it lowers the peak."""
    shape, spacing = (12, 20, 20), (3.0, 3.0, 3.0)
    (region,) = found(np.where(ball(shape, spacing, 14.0, at=(-16.5, 0, 0)), 5.0, 0.0))
    assert region.before.peak == pytest.approx(5.0, rel=1e-6)


def test_another_grid_is_refused() -> None:
    """The image must be the doubled one."""
    volume = Volume.axial(np.ones((4, 4, 4), dtype=np.float32), (1, 1, 1))
    with pytest.raises(ValueError, match="doubled"):
        regions(volume, volume)
