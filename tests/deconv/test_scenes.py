"""The scenes on which Gk is taught: blurred like the phantoms are, of other shapes than theirs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deconv.kernels import split_normal
from deconv.phantoms.scanner import blur_and_pool
from deconv.scenes import POWERS, Blur, blurred, random_blur, random_truth


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_scene_is_activity(seed: int):
    """Positive and finite everywhere, something in it, and the same for the same seed."""
    one, again = (random_truth((16, 20, 12), np.random.default_rng(seed)) for _ in range(2))
    assert one.shape == (16, 20, 12) and one.dtype == np.float32
    assert np.isfinite(one).all() and one.min() > 0
    np.testing.assert_array_equal(one, again)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_psf_is_one_that_a_scanner_may_have(seed: int):
    """0.8 to 5 voxels, skew below 0.6, noise up to 14 %."""
    blur = random_blur(np.random.default_rng(seed))
    assert all(0.8 <= width <= 5.0 for width in blur.fwhm) and all(abs(skew) <= 0.6 for skew in blur.skew)
    assert 0 <= blur.noise <= 0.14 and 0 <= blur.poisson <= 1


def test_some_have_noise_and_some_not_some_are_skewed_and_some_not():
    """The network has to meet them all."""
    blurs = [random_blur(np.random.default_rng(seed)) for seed in range(60)]
    assert 5 < sum(blur.noise == 0 for blur in blurs) < 40
    assert 10 < sum(max(map(abs, blur.skew)) > 0.2 for blur in blurs) < 55


def test_no_shape_is_an_ellipsoid():
    """The phantoms that judge are built of ellipsoids and rods; superquadrics of exponent 2 would be such."""
    assert min(abs(power - 2) for power in POWERS) > 0.3


@pytest.mark.parametrize("skew", [0.0, 0.5, -0.5])
def test_scenes_are_blurred_as_phantoms_are(skew: float):
    """Convolution and not correlation, the mean over 2 x 2 x 2, the margin cut off, the maximum 1."""
    truth = random_truth((32, 36, 40), np.random.default_rng(7))
    fwhm, skews = (1.5, 2.0, 2.5), (skew, 0.0, -skew)
    found = blurred(truth, Blur(fwhm, skews, 0.0, 0.0, 0.0), 4, np.random.default_rng(0))
    profiles = [split_normal(2 * width, s) for width, s in zip(fwhm, skews, strict=True)]
    expected = blur_and_pool(truth.astype(np.float64), np.einsum("d,h,w->dhw", *profiles))[4:-4, 4:-4, 4:-4]
    assert found.shape == (8, 10, 12) and found.max() == 1.0
    np.testing.assert_allclose(found, expected / expected.max(), rtol=1e-4)


def test_noise_is_as_large_as_it_says():
    """Relative to the activity; never below zero."""
    flat = np.ones((64, 64, 64), dtype=np.float32)
    noisy = blurred(flat, Blur((2.0,) * 3, (0.0,) * 3, 0.1, 1.5, 0.0), 2, np.random.default_rng(1))
    assert noisy.std() / noisy.mean() == pytest.approx(0.1, rel=0.05) and noisy.min() >= 0
    hollow = blurred(flat, Blur((2.0,) * 3, (0.0,) * 3, 1.5, 0.0, 0.0), 2, np.random.default_rng(1))
    assert hollow.min() == 0.0
