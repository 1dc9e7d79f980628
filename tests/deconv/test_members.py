"""One member of "best": TV with its own kernel, and the mean of several."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deconv.kernels import skewed
from deconv.members import Member, applied, mean_and_spread, solved
from deconv.metrics import nrmse
from deconv.phantoms.scanner import blur_and_pool
from deconv.pooled import PooledBlur
from tests.deconv.scene import FWHM, SPACING, TOP, measured, truth

SHAPE = (8, 11, 13)
AXES = (0, 1, 2)
ACTIVITY = truth(SHAPE) / TOP
SKEW = (0.0, 0.0, 0.6)



def member(skew: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Member:
    return Member(skewed(FWHM, skew, np.array(SPACING) / 2), (1.6, 2.0, 2.2))


def image(skew: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> torch.Tensor:
    return torch.from_numpy(measured(ACTIVITY, skew=skew).array.copy())


def minimiser(y: torch.Tensor, of: Member) -> NDArray[np.float32]:
    return solved(y, of, lam=1e-3, iterations=20, spacing=SPACING, on_step=lambda _: None).numpy()


@pytest.fixture(scope="module")
def model() -> PooledBlur:
    return PooledBlur(SHAPE, member().kernel, kernel_grid="fine")


def test_a_flipped_kernel_is_worse_than_none_and_the_right_one_best():
    """The trap of correlation for convolution: a skew of the wrong sign costs more than no skew at all."""
    y = image(SKEW)
    right, none, wrong = (nrmse(minimiser(y, member((0.0, 0.0, s))), ACTIVITY) for s in (0.6, 0.0, -0.6))
    assert right < 0.7 * none and none < wrong


def test_the_right_skew_explains_the_image():
    """And the wrong one leaves more of it unexplained."""
    y = image(SKEW)
    left = {}
    for skew in (0.6, -0.6):
        one = member((0.0, 0.0, skew))
        x = torch.from_numpy(minimiser(y, one))
        left[skew] = float((applied(PooledBlur(SHAPE, one.kernel, kernel_grid="fine"), x) - y).norm())
    assert left[0.6] < 0.7 * left[-0.6]


def test_image_and_kernel_turned_around_give_the_image_turned_around():
    """A point reflection of a skewed problem: exact to rounding."""
    y, one = image(SKEW), member(SKEW)
    turned = Member(one.kernel[::-1, ::-1, ::-1].copy(), one.fwhm_voxels)
    np.testing.assert_allclose(minimiser(y.flip(AXES), turned)[::-1, ::-1, ::-1], minimiser(y, one), atol=1e-5)


def test_a_dark_tile_stays_dark():
    """A tile beside the body holds nothing: zeros, no division by its maximum."""
    assert not minimiser(torch.zeros(SHAPE), member()).any()


def test_the_weight_of_tv_belongs_to_the_whole_image():
    """A tile of half the activity, with lam for the whole image's maximum, is flattened more than one of its own."""
    y = image()
    faint = minimiser(0.5 * y, member()) / 0.5
    assert np.abs(np.diff(faint, axis=1)).sum() < np.abs(np.diff(minimiser(y, member()), axis=1)).sum()


def test_applied_is_the_scanner(model: PooledBlur):
    """P(x ∗ k) by Fourier transforms equals the phantoms' own, away from the borders; a constant stays, all over."""
    ours = applied(model, torch.from_numpy(ACTIVITY.astype(np.float32))).numpy()
    theirs = blur_and_pool(ACTIVITY, member().kernel.astype(np.float64))
    inner = (slice(2, -2), slice(3, -3), slice(3, -3))
    np.testing.assert_allclose(ours[inner], theirs[inner], atol=2e-3)
    np.testing.assert_allclose(applied(model, torch.full(ACTIVITY.shape, 0.3)).numpy(), 0.3, rtol=1e-5)


def test_mean_and_spread_are_those_of_the_members():
    """One member has no spread."""
    images = [torch.full((2, 2, 2), v) for v in (1.0, 4.0)]
    mean, spread = mean_and_spread(images)
    np.testing.assert_allclose(mean, 2.5)
    np.testing.assert_allclose(spread, 1.5, rtol=1e-6)
    assert not mean_and_spread(images[:1])[1].any()
