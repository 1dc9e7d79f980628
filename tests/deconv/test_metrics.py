"""Figures of merit: each has the value that its definition gives by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deconv import metrics
from deconv.phantoms import psf_kernel, spheres

RNG = np.random.default_rng(0)
TRUTH = RNG.random((6, 7, 8))


def test_nrmse_is_zero_for_the_truth_and_one_for_nothing() -> None:
    """||x - t|| / ||t||; scale does not matter."""
    assert metrics.nrmse(TRUTH, TRUTH) == 0.0
    assert metrics.nrmse(np.zeros_like(TRUTH), TRUTH) == pytest.approx(1.0)
    assert metrics.nrmse(7 * 1.1 * TRUTH, 7 * TRUTH) == pytest.approx(0.1)


def test_cubic_interpolation_scores_what_the_yardstick_says() -> None:
    """Spheres at 24 x 48 x 48 with 6 mm FWHM: 0.331 (design, Figures to reach), reproduced to 0.01."""
    from deconv.interpolate import doubled

    phantom = spheres((24, 48, 48))
    assert metrics.nrmse(doubled(phantom.measured.array), phantom.truth.array) == pytest.approx(0.331, abs=0.01)


def test_unlike_shapes_are_refused() -> None:
    """A comparison of two grids is an error everywhere."""
    for figure in (metrics.nrmse, metrics.psnr, metrics.ssim):
        with pytest.raises(ValueError, match="unlike shapes"):
            figure(TRUTH, TRUTH[1:])
    with pytest.raises(ValueError, match="zero everywhere"):
        metrics.nrmse(TRUTH, np.zeros_like(TRUTH))


def test_recovery_of_the_truth_is_one() -> None:
    """Mean, median and maximum of a sphere's own voxels over its activity."""
    phantom = spheres((16, 32, 32), seed=1)
    found = metrics.recovery_coefficients(phantom.truth.array, phantom)
    assert [rc.diameter_mm for rc in found] == [s.diameter_mm for s in phantom.spheres]
    for rc in found:
        assert rc.max == pytest.approx(1.0, abs=1e-6 if rc.diameter_mm >= 6 else 0.2)
        assert 0.6 < rc.mean <= rc.max + 1e-9
    doubled = metrics.recovery_coefficients(2 * phantom.truth.array, phantom)
    assert doubled[0].mean == pytest.approx(2 * found[0].mean)


def test_recovery_takes_voxels_that_are_half_inside() -> None:
    """RC_mean, RC_median and RC_max over voxels with a fraction of one half or more."""
    image = np.array([[[1.0, 2.0, 4.0, 100.0]]])
    rc = metrics.recovery(image, np.array([[[1.0, 0.5, 0.9, 0.4]]]), activity=4.0, diameter_mm=9.0)
    assert (rc.mean, rc.median, rc.max, rc.diameter_mm) == (pytest.approx(7 / 12), 0.5, 1.0, 9.0)
    tiny = metrics.recovery(image, np.array([[[0.1, 0.3, 0.0, 0.0]]]), activity=4.0)
    assert tiny.max == 0.5
    with pytest.raises(ValueError, match="outside"):
        metrics.recovery(image, np.zeros_like(image), activity=4.0)
    with pytest.raises(ValueError, match="positive"):
        metrics.recovery(image, np.ones_like(image), activity=0.0)


def test_activity_change_compares_means_over_one_field_of_view() -> None:
    """Eight voxels of the same value for one change nothing; 1 % more is 0.01."""
    fine = TRUTH.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    assert metrics.activity_change(fine, TRUTH) == pytest.approx(0.0, abs=1e-12)
    assert metrics.activity_change(1.01 * fine, TRUTH) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="no activity"):
        metrics.activity_change(fine, np.zeros_like(TRUTH))


def test_kernel_inner_product_lays_centres_on_each_other() -> None:
    """A kernel and the same kernel in a wider frame are one; shifted or wider kernels are not."""
    small = psf_kernel(5.0, (2.0,) * 3, size=9)
    wide = np.pad(small, 3)
    assert metrics.kernel_inner_product(small, wide) == pytest.approx(1.0)
    assert metrics.kernel_inner_product(small, 3 * wide) == pytest.approx(1.0)
    assert metrics.kernel_inner_product(small, np.roll(wide, 2, axis=0)) < 0.75
    delta = np.zeros((3, 3, 3))
    delta[1, 1, 1] = 1
    assert metrics.kernel_inner_product(small, delta) == pytest.approx(small.max() / np.linalg.norm(small))
    for bad in (np.zeros((4, 3, 3)), np.zeros((3, 3))):
        with pytest.raises(ValueError, match="odd"):
            metrics.kernel_inner_product(small, bad)
    with pytest.raises(ValueError, match="zero everywhere"):
        metrics.kernel_inner_product(small, np.zeros((3, 3, 3)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.tuples(st.floats(4.0, 10.0), st.floats(4.0, 10.0), st.floats(4.0, 10.0)), st.floats(0.5, 1.5))
def test_kernel_fwhm_is_measured_along_each_axis(fwhm: tuple[float, float, float], spacing: float) -> None:
    """Within 5 % of the Gaussian's width broadened by the voxel, for any three widths."""
    kernel = psf_kernel(fwhm, (spacing,) * 3, size=49)
    expected = np.sqrt(np.square(fwhm) + 8 * np.log(2) / 12 * spacing**2)
    np.testing.assert_allclose(metrics.kernel_fwhm_mm(kernel, (spacing,) * 3), expected, rtol=0.05)


def test_kernel_wider_than_its_frame_is_as_wide_as_the_frame() -> None:
    """A flat kernel never falls to half: its width is the frame's."""
    assert metrics.kernel_fwhm_mm(np.ones((3, 5, 7)), (1.0, 2.0, 3.0)) == pytest.approx((3.0, 10.0, 21.0))
    delta = np.zeros((3, 3, 3))
    delta[1, 1, 1] = 1
    assert metrics.kernel_fwhm_mm(delta, (2.0, 2.0, 2.0)) == pytest.approx((2.0, 2.0, 2.0))


def test_kernel_centroid_is_in_voxels_from_the_middle() -> None:
    """A delta off the middle by (1, 0, -2) has that centroid."""
    kernel = np.zeros((5, 5, 5))
    kernel[3, 2, 0] = 1
    assert metrics.kernel_centroid(kernel) == (1.0, 0.0, -2.0)


def test_psnr_and_ssim_rank_images_as_their_definitions() -> None:
    """PSNR = 20 dB at an error of a tenth of the peak; SSIM = 1 for the truth and falls with noise."""
    assert metrics.psnr(TRUTH + 0.1, TRUTH, peak=1.0) == pytest.approx(20.0)
    assert metrics.psnr(TRUTH, TRUTH) == float("inf")
    assert metrics.ssim(TRUTH, TRUTH) == pytest.approx(1.0)
    little, much = (metrics.ssim(TRUTH + s * RNG.standard_normal(TRUTH.shape), TRUTH) for s in (0.05, 0.5))
    assert 1 > little > much
    with pytest.raises(ValueError, match="data range"):
        metrics.ssim(np.ones((5, 5, 5)), np.ones((5, 5, 5)))


def test_background_cv_and_contrast_are_those_of_the_truth() -> None:
    """The truth: no variation away from the spheres, full contrast in the large ones; noise of 10 % is seen as 10 %."""
    phantom = spheres((24, 48, 48))
    truth = phantom.truth.array.astype(float)
    assert metrics.background_cv(truth, phantom) == 0.0
    noisy = truth * (1 + 0.1 * np.random.default_rng(0).standard_normal(truth.shape))
    assert metrics.background_cv(noisy, phantom) == pytest.approx(0.1, rel=0.02)
    recovered = metrics.contrast(truth, phantom)
    assert recovered[16.0] == pytest.approx(1.0, abs=0.1) and set(recovered) == {16, 14, 10, 8, 7, 6, 5, 3}
    flat = metrics.contrast(np.full_like(truth, 5.0), phantom)
    assert flat[16.0] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="no background"):
        metrics.background_cv(truth, phantom, margin_mm=1e4)
