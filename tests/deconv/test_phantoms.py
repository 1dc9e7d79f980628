"""Digital phantoms: the truth is what the text says, and the measurement is the truth seen by a known scanner."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deconv import metrics
from deconv.phantoms import PHANTOMS, Phantom, average_pool, head_and_neck, measure, psf_kernel, spheres, whole_body
from deconv.phantoms.scanner import radial_blur_and_pool
from deconv.phantoms.shapes import Capsule, Ellipsoid, Waves, box_of, supersampled

SMALL = {"spheres": (16, 32, 32), "head-and-neck": (12, 20, 20), "whole-body": (32, 20, 20)}


def small(name: str, **options: object) -> Phantom:
    if name == "whole-body":
        options = {"spacing": (25.0, 24.0, 24.0), "fwhm_mm": 30.0, **options}
    return PHANTOMS[name](SMALL[name], **options)


@pytest.mark.parametrize("name", PHANTOMS)
def test_same_seed_same_phantom_other_seed_another(name: str) -> None:
    """Everything random comes from the seed."""
    first, again, other = (small(name, seed=s, noise=0.05) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.measured.array, again.measured.array)
    np.testing.assert_array_equal(first.truth.array, again.truth.array)
    assert not np.array_equal(first.truth.array, other.truth.array)


@pytest.mark.parametrize("name", PHANTOMS)
def test_truth_lies_on_the_doubled_grid(name: str) -> None:
    """Truth and measurement cover the same field of view; the name says that no patient was there."""
    phantom = small(name)
    assert phantom.truth.same_grid(phantom.measured.doubled(phantom.truth.array))
    assert phantom.name.startswith("synthetic")
    assert phantom.ct is None or phantom.ct.same_grid(phantom.measured)


@pytest.mark.parametrize("name", PHANTOMS)
def test_measurement_is_blur_on_the_fine_grid_then_mean(name: str) -> None:
    """y = P(x ∗ h) with the kernel the phantom tells, without noise."""
    phantom = small(name)
    y = measure(phantom.truth.array.astype(np.float64), phantom.psf_fine, rng=np.random.default_rng(0),
                spacing=phantom.measured.spacing.tolist())
    np.testing.assert_allclose(phantom.measured.array, y, rtol=1e-5, atol=1e-3)


def test_spheres_hold_the_activity_of_their_volume() -> None:
    """Supersampled rendering: sum of activity above background = (31 - 2) kBq/mL x 4/3 pi r³, within 1 % from 7 mm."""
    phantom = spheres((24, 48, 48), seed=4)
    voxel_mm3 = float(np.prod(phantom.truth.spacing))
    for sphere in phantom.spheres:
        volume = float(phantom.sphere_fraction(sphere).sum()) * voxel_mm3
        tolerance = 0.01 if sphere.diameter_mm >= 7 else 0.05
        assert volume == pytest.approx(np.pi / 6 * sphere.diameter_mm**3, rel=tolerance)
    whole = sum(np.pi / 6 * s.diameter_mm**3 * (s.activity - phantom.background) for s in phantom.spheres)
    excess = float((phantom.truth.array.astype(np.float64) - phantom.background).sum()) * voxel_mm3
    assert excess == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize(("shape", "spacing", "count"), [
    ((24, 48, 48), (2.8, 2.73, 2.73), 8), ((16, 32, 32), (2.8, 2.73, 2.73), 8), ((16, 16, 24), (2.8, 2.73, 2.73), 1),
])
def test_as_many_spheres_as_fit_stand_apart(
    shape: tuple[int, int, int], spacing: tuple[float, ...], count: int
) -> None:
    """Largest first, none outside the field of view, none touching another."""
    phantom = spheres(shape, spacing=spacing, seed=2)
    assert len(phantom.spheres) >= count
    extent = np.array(shape) * spacing
    for i, one in enumerate(phantom.spheres):
        assert np.all(np.array(one.centre_mm) > one.diameter_mm / 2)
        assert np.all(np.array(one.centre_mm) < extent - one.diameter_mm / 2)
        for other in phantom.spheres[:i]:
            assert other.diameter_mm > one.diameter_mm
            gap = np.linalg.norm(np.subtract(one.centre_mm, other.centre_mm))
            assert gap > (one.diameter_mm + other.diameter_mm) / 2


def test_a_field_of_view_without_room_is_refused() -> None:
    """Not a phantom without spheres but ValueError."""
    with pytest.raises(ValueError, match="holds no ring"):
        spheres((4, 8, 8))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(3.5, 10.0), st.floats(-0.8, 0.8), st.integers(0, 2), st.floats(0.15, 0.45))
def test_psf_is_centred_normalised_and_as_wide_as_said(fwhm: float, skew: float, axis: int, voxel: float) -> None:
    """Sum 1, mean at the centre also when skewed, and the width that was asked for along the axes without skew."""
    spacing = voxel * fwhm
    kernel = psf_kernel(fwhm, (spacing,) * 3, size=41, skew=skew, skew_axis=axis)
    assert kernel.sum() == pytest.approx(1.0) and kernel.min() >= 0
    np.testing.assert_allclose(metrics.kernel_centroid(kernel), 0.0, atol=0.02)
    variance = (kernel.sum(axis=((axis + 1) % 3, (axis + 2) % 3)) * (np.arange(41) - 20.0) ** 2).sum() * spacing**2
    sigma = fwhm / (2 * np.sqrt(2 * np.log(2)))
    expected = sigma**2 * (1 + skew**2 * (3 - 8 / np.pi)) + spacing**2 / 12  # split normal; and the voxel
    assert variance == pytest.approx(expected, rel=0.05)


def test_skewed_psf_is_skewed_along_its_axis_only() -> None:
    """Third moment along the skewed axis, none along the others."""
    kernel = psf_kernel(6.0, (1.4,) * 3, size=31, skew=0.5, skew_axis=1)
    offsets = np.arange(31) - 15.0
    moments = [float((kernel.sum(axis=tuple(a for a in range(3) if a != i)) * offsets**3).sum()) for i in range(3)]
    assert moments[1] > 1.0 and abs(moments[0]) < 1e-9 and abs(moments[2]) < 1e-9


@pytest.mark.parametrize("options", [{"size": 4}, {"skew": 1.0}, {"fwhm_mm": 0.0}])
def test_impossible_psf_is_refused(options: dict) -> None:
    """Even sizes, widths of zero and skews of one are errors."""
    with pytest.raises(ValueError):
        psf_kernel(options.pop("fwhm_mm", 6.0), (2.0, 2.0, 2.0), **options)


@pytest.mark.parametrize(("model", "exponent"), [("relative", 1.0), ("poisson", 0.5)])
def test_noise_grows_with_activity_as_its_model_says(model: str, exponent: float) -> None:
    """Standard deviation = level x activity, or level x sqrt(activity x maximum)."""
    truth = np.concatenate([np.full((40, 40, 40), 100.0), np.full((40, 40, 40), 900.0)])
    kernel = psf_kernel(2.0, (1.0,) * 3, size=3)
    y = measure(truth, kernel, rng=np.random.default_rng(0), spacing=(2.0,) * 3, noise=0.1, noise_model=model)
    low, high = y[3:17].std(), y[23:37].std()
    assert high == pytest.approx(0.1 * 900 if model == "relative" else 0.1 * np.sqrt(900 * 900), rel=0.1)
    assert low / high == pytest.approx((100 / 900) ** exponent, rel=0.1)


def test_noise_is_correlated_over_the_width_told() -> None:
    """Neighbours share noise of 6 mm on 2 mm voxels; they share none of white noise."""
    flat = np.full((40, 40, 40), 10.0)
    kernel = psf_kernel(2.0, (1.0,) * 3, size=3)

    def neighbours(width: float) -> float:
        y = measure(flat, kernel, rng=np.random.default_rng(1), spacing=(2.0,) * 3, noise=0.1, noise_fwhm_mm=width)
        grain = y - y.mean()
        return float((grain[1:] * grain[:-1]).mean() / grain.var())

    assert neighbours(6.0) > 0.7 and abs(neighbours(0.0)) < 0.05


def test_unknown_noise_is_refused() -> None:
    """A model that does not exist or a negative level."""
    with pytest.raises(ValueError, match="noise model"):
        spheres((16, 32, 32), noise=0.1, noise_model="salt")
    with pytest.raises(ValueError, match="noise level"):
        spheres((16, 32, 32), noise=-0.1)


def test_glands_are_hot_uneven_and_seen_in_the_ct() -> None:
    """Parotids of 16 kBq/mL vary by tens of per cent; the CT shows air, tissue and bone."""
    phantom = head_and_neck((32, 48, 48))
    assert phantom.ct is not None and not phantom.spheres
    hot = phantom.truth.array[phantom.truth.array > 7_000]
    assert hot.size > 500 and 0.1 < hot.std() / hot.mean() < 0.5
    assert phantom.ct.array.min() < -900 and phantom.ct.array.max() > 400
    assert -20 < np.median(phantom.ct.array[phantom.ct.array > -500]) < 80


def test_whole_body_has_lesions_to_measure() -> None:
    """Eight lesions with known volume, each hotter than its surroundings."""
    phantom = whole_body((64, 40, 40), spacing=(12.5, 12.0, 12.0), fwhm_mm=14.0)
    assert len(phantom.spheres) == 8
    assert all(phantom.sphere_fraction(s).max() > 0 for s in phantom.spheres)


def test_pooling_is_the_mean_of_eight() -> None:
    """(2D, 2H, 2W) -> (D, H, W) keeps the mean and takes the right blocks."""
    fine = np.arange(4 * 6 * 8, dtype=float).reshape(4, 6, 8)
    pooled = average_pool(fine)
    assert pooled.shape == (2, 3, 4)
    assert pooled[1, 2, 3] == fine[2:, 4:, 6:].mean()


def test_whole_body_lesions_are_of_many_shapes_and_contrasts() -> None:
    """Each lesion has a volume and a mean activity of its own, cold ones too; a ring leaves its core cold."""
    phantom = whole_body((64, 28, 38), spacing=(10.0, 10.0, 10.0), fwhm_mm=12.0, seed=2)
    assert len(phantom.lesions) == 12 and len({lesion.name for lesion in phantom.lesions}) == 12
    truth = phantom.truth.array.astype(np.float64)
    for lesion in phantom.lesions:
        part = phantom.lesion_fraction(lesion)
        assert part.sum() > 0 and part.max() <= 1
        if part.max() == 1.0:
            np.testing.assert_allclose(truth[part == 1.0], lesion.activity)
    ring = phantom.lesions[-1]
    inside = np.argwhere(phantom.lesion_fraction(ring) > 0)
    core = truth[tuple(slice(a, b) for a, b in zip(inside.min(0), inside.max(0) + 1, strict=True))]
    assert core.min() < 0.3 * ring.activity


def test_rods_and_ellipsoids_have_the_volume_of_their_formula() -> None:
    """4/3 pi abc for a turned ellipsoid; pi r² l + 4/3 pi r³ for a rod."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))
    middle = np.full(3, 30.0)
    ellipsoid = Ellipsoid(middle, np.array([12.0, 6.0, 8.0]), turn=turn)
    half = np.array([5.0, 6.0, 0.0])
    rod = Capsule(middle - half, middle + half, 4.0)
    length = 2 * np.hypot(5.0, 6.0)
    for shape, volume in ((ellipsoid, 4 / 3 * np.pi * 576), (rod, np.pi * 16 * length + 4 / 3 * np.pi * 64)):
        _, part = supersampled(shape, (30, 30, 30), np.full(3, 2.0))
        assert part.sum() * 8 == pytest.approx(volume, rel=0.01)


def test_fast_rendering_of_organs_equals_point_by_point() -> None:
    """Organs are looked into only where the surface may pass; the result is that of looking everywhere."""
    outline = Ellipsoid(np.array([21.0, 19.0, 20.0]), np.array([14.0, 11.0, 9.0]),
                        Waves.random(np.random.default_rng(3), 15.0), 0.12)
    step = np.array([2.0, 1.5, 1.7])
    box, slow = supersampled(outline, (24, 30, 26), step)
    again, axes = box_of(outline, (24, 30, 26), step)
    assert box == again
    np.testing.assert_allclose(outline.fraction(axes, step), slow, atol=1 / 64 + 1e-9)


@pytest.mark.parametrize("name", PHANTOMS)
@pytest.mark.parametrize("options", [{}, {"skew": 0.4, "skew_axis": 0}])
def test_a_psf_that_hardly_widens_is_the_plain_one(name: str, options: dict) -> None:
    """Blur place by place gives what three passes along the axes give."""
    plain, varying = (small(name, radial=radial, **options) for radial in (0.0, 1e-9))
    scale = plain.measured.array.max()
    np.testing.assert_allclose(varying.measured.array / scale, plain.measured.array / scale, atol=1e-4)


def point_source(at: tuple[int, int], radial: float) -> np.ndarray:
    """(32, 32) what a point at fine pixel `at` of a plane of 64 x 64, 1.5 mm each, becomes under 5 mm FWHM."""
    truth = np.zeros((4, 64, 64))
    truth[:, at[0], at[1]] = 1.0
    return radial_blur_and_pool(truth, (5.0, 5.0, 5.0), (3.0, 3.0, 3.0), radial, np.ones(1))[0]


def test_radial_psf_widens_along_the_radius_only() -> None:
    """A point on a diagonal near the edge: variance along the radius (1 + radial r²)² times, across it unchanged."""
    wide, plain = point_source((48, 48), 0.8), point_source((48, 48), 0.0)
    i, j = np.indices(wide.shape)

    def variances(image: np.ndarray) -> tuple[float, float]:
        p = image / image.sum()
        along, across = (i + j) / np.sqrt(2), (i - j) / np.sqrt(2)
        return tuple(float((p * u**2).sum() - (p * u).sum() ** 2) for u in (along, across))

    (along, across), (plain_along, plain_across) = variances(wide), variances(plain)
    fraction = np.hypot(16.5, 16.5) / 32
    sigma2 = (5.0 / 2.3548 / 3.0) ** 2
    assert across == pytest.approx(plain_across, rel=0.01)
    assert along - plain_along == pytest.approx(sigma2 * ((1 + 0.8 * fraction**2) ** 2 - 1), rel=0.02)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from((0.3, 0.8)), st.integers(17, 46), st.integers(17, 46))
def test_radial_psf_keeps_activity_and_place(radial: float, row: int, column: int) -> None:
    """Sum and centre of mass of a point source stay, wherever it lies."""
    image = point_source((row, column), radial)
    assert 4 * image.sum() == pytest.approx(1.0, rel=1e-6)
    i, j = np.indices(image.shape)
    assert 2 * (image * i).sum() / image.sum() + 0.5 == pytest.approx(row, abs=0.02)
    assert 2 * (image * j).sum() / image.sum() + 0.5 == pytest.approx(column, abs=0.02)


def test_radial_psf_leaves_a_flat_image_flat() -> None:
    """Activity comes in over the borders as it goes out, and places of unlike width hardly differ within one PSF."""
    flat = radial_blur_and_pool(np.full((4, 64, 64), 5.0), (6.0,) * 3, (2.8, 2.73, 2.73), 0.4, np.ones(1))
    np.testing.assert_allclose(flat, 5.0, rtol=0.1)
    assert flat.mean() == pytest.approx(5.0, rel=0.02)


def test_phantom_tells_the_range_of_its_psf() -> None:
    """`fwhm_mm` and `psf` are of the centre; the range says how wide it is at the edge."""
    phantom = spheres((16, 32, 32), fwhm_mm=(5.0, 6.0, 7.0), radial=0.5)
    assert phantom.fwhm_range_mm == ((5.0, 6.0, 7.0), (5.0, 9.0, 10.5))
    np.testing.assert_array_equal(phantom.psf, spheres((16, 32, 32), fwhm_mm=(5.0, 6.0, 7.0)).psf)


@pytest.mark.parametrize("options", [{"radial": -0.1}, {"radial": 0.3, "skew": 0.4, "skew_axis": 2}])
def test_a_radial_psf_that_means_nothing_is_refused(options: dict) -> None:
    """Narrowing outwards, or skewed in the plane in which it widens."""
    with pytest.raises(ValueError, match="radi"):
        spheres((16, 32, 32), **options)


@pytest.mark.parametrize("name", PHANTOMS)
def test_phantoms_stand_on_any_voxels(name: str) -> None:
    """Flat voxels of a whole-body scanner: same field of view, same spheres, same kinds of activity."""
    spacing = (3.27, 5.47, 5.47)
    phantom = PHANTOMS[name]((40, 24, 24), spacing=spacing, noise=0.1, seed=5)
    np.testing.assert_allclose(phantom.truth.spacing, np.array(spacing) / 2)
    assert phantom.truth.array.max() > 5 * phantom.background
    assert phantom.measured.array.mean() == pytest.approx(phantom.truth.array.mean(), rel=0.05)


def test_glands_without_heterogeneity_are_uniform() -> None:
    """The knob does what it says: none, as made, and more."""
    spread = []
    for heterogeneity in (0.0, 1.0, 1.6):
        truth = head_and_neck((24, 40, 40), heterogeneity=heterogeneity).truth.array
        hot = truth[truth > 7_000]
        spread.append(hot.std() / hot.mean())
    assert spread[0] < spread[1] < spread[2]
    with pytest.raises(ValueError, match="heterogeneity"):
        head_and_neck((24, 40, 40), heterogeneity=-1.0)
