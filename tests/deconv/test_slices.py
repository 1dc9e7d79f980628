"""The activity of slices is brought back where TV took it for noise, and left alone elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deconv.kernels import gaussian
from deconv.members import applied
from deconv.pooled import PooledBlur
from deconv.safeguards import SLICE_GAIN
from deconv.slices import MOST, slice_gains

KERNEL = gaussian((6.0, 6.0, 6.0), (1.5, 1.5, 1.5))


def _measured(x: np.ndarray) -> np.ndarray:
    """P(x ∗ k), the whole volume blurred in three dimensions."""
    model = PooledBlur([n // 2 for n in x.shape], KERNEL)
    return applied(model, torch.from_numpy(x)).numpy()


def _image(slices: np.ndarray) -> np.ndarray:
    """(2D, 24, 24): a warm body that changes slowly, each fine slice with its own factor."""
    body = np.zeros((len(slices), 24, 24), np.float32)
    body[:, 6:18, 6:18] = 1.0
    return body * slices[:, None, None].astype(np.float32)


def test_slices_that_were_flattened_get_their_activity_back():
    """Bed positions that differ by 8 %, smoothed away in x: two steps halve the largest change of a slice."""
    true = np.ones(40)
    true[20:24] = 0.92
    y = _measured(_image(true))
    flat = _image(np.ones(40))
    before = np.abs(_measured(flat).sum((1, 2)) / y.sum((1, 2)) - 1)[4:-4].max()
    gains = slice_gains(flat, y, KERNEL, 2)
    after = np.abs(_measured(flat * gains[:, None, None].astype(np.float32)).sum((1, 2)) / y.sum((1, 2)) - 1)
    assert before > 0.04
    assert after[4:-4].max() < 0.5 * before


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_an_image_that_explains_its_slices_is_left_alone(seed: int):
    """Whatever the profile along the slices: where P(x ∗ k) has the sums of y, no gain leaves 1."""
    profile = np.random.default_rng(seed).uniform(0.5, 1.5, 12).repeat(4)
    x = _image(profile)
    y = _measured(x)
    gains = slice_gains(x, y, KERNEL, 3)
    assert np.abs(gains[8:-8] - 1).max() < 2e-3  # the ends are continued otherwise in three dimensions


@pytest.mark.parametrize("steps", [0, 2])
def test_empty_slices_keep_their_gain(steps: int):
    """Air has nothing to give back; and no step at all changes nothing."""
    x = np.zeros((24, 16, 16), np.float32)
    x[8:16, 4:12, 4:12] = 1.0
    y = _measured_like(x)
    gains = slice_gains(x, y, KERNEL, steps)
    assert np.isfinite(gains).all()
    assert np.allclose(gains[[0, 1, -2, -1]], 1.0, atol=0.02)
    assert steps or (gains == 1.0).all()


def _measured_like(x: np.ndarray) -> np.ndarray:
    return x.reshape(12, 2, 8, 2, 8, 2).mean(axis=(1, 3, 5))


def test_a_misfit_too_large_is_left_to_the_gates():
    """An image with a third of the activity missing is not mended into passing."""
    x = _image(np.ones(24))
    gains = slice_gains(x, 1.5 * _measured(x), KERNEL, 4)
    assert gains.max() == pytest.approx(1 + MOST)
    assert MOST > SLICE_GAIN, "the gate must be able to see it"
