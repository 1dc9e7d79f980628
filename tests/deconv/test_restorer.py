"""Gx of "best" multiplies a TV image by factors: bounded, finite, and one before it was taught."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deconv import restorer
from deconv.restorer import FLOOR, LARGEST, Restorer, features, mended, shuffled, unshuffled

SHAPE = (4, 6, 5)
WIDTHS = (1.5, 2.0, 2.5)


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and the residual; x with zeros in it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand([2 * n for n in SHAPE], generator=generator) - 0.3
    return x.clamp_min(0), torch.rand(SHAPE, generator=generator), 0.01 * torch.randn(SHAPE, generator=generator)


def loud(seed: int) -> Restorer:
    """A network with large random weights: whatever it says."""
    network = Restorer()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return network.eval().requires_grad_(False)


@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 5), h=st.integers(1, 5), w=st.integers(1, 5))
def test_shuffling_loses_nothing(d: int, h: int, w: int):
    """Eight planes of the PET grid are the doubled grid, each voxel's eight together."""
    x = torch.arange(8.0 * d * h * w).reshape(2 * d, 2 * h, 2 * w)
    planes = unshuffled(x)
    assert planes.shape == (8, d, h, w) and torch.equal(shuffled(planes), x)
    np.testing.assert_allclose(planes.mean(0), x.reshape(d, 2, h, 2, w, 2).mean(dim=(1, 3, 5)))


def test_an_untaught_network_changes_nothing():
    """It begins at what TV found."""
    x, y, residual = problem(0)
    np.testing.assert_allclose(Restorer().requires_grad_(False).restored(x, y, residual, 1e-3, WIDTHS), x, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_it_says_stays_within_bounds(seed: int):
    """Factors between 1/e and e, nothing negative, nothing that is not finite."""
    x, y, residual = problem(seed)
    out = loud(seed).restored(x, y, residual, 1e-3, WIDTHS)
    assert torch.isfinite(out).all() and out.min() >= 0
    top = y.max()
    assert torch.all(out <= (x + FLOOR * top) * np.exp(LARGEST) - FLOOR * top + 1e-5)
    assert torch.all(out >= (x + FLOOR * top) * np.exp(-LARGEST) - FLOOR * top - 1e-5)
    assert not torch.allclose(out, x)


def test_the_unit_does_not_matter():
    """A power of two changes no digit."""
    x, y, residual = problem(3)
    network = loud(3)
    one = network.restored(x, y, residual, 1e-3, WIDTHS)
    assert torch.equal(network.restored(1024 * x, 1024 * y, 1024 * residual, 1e-3, WIDTHS), 1024 * one)


def test_features_are_finite_where_nothing_is():
    """An image of zeros but for one voxel, all of it explained."""
    x, y = torch.zeros([2 * n for n in SHAPE]), torch.zeros(SHAPE)
    y[0, 0, 0] = 1.0
    seen = features(x, y, torch.zeros(SHAPE), 5e-4, WIDTHS)
    assert seen.shape == (14, *SHAPE) and torch.isfinite(seen).all()


def test_a_factor_of_one_is_no_change():
    """And of the largest, the largest."""
    x = torch.rand(3, 3, 3)
    np.testing.assert_allclose(mended(x, torch.zeros(3, 3, 3)), x, atol=1e-6)
    np.testing.assert_allclose(mended(x, torch.ones(3, 3, 3)), (x + FLOOR) * np.e - FLOOR, rtol=1e-5)


def test_weights_pass_through_their_file(tmp_path: Path):
    """As half precision, as they are shipped: the same network to that precision, frozen."""
    network = loud(4)
    path = tmp_path / "restorer.npz"
    np.savez_compressed(path, **{name: value.half().numpy() for name, value in network.state_dict().items()})
    taken = restorer.load.__wrapped__(path)
    for name, value in taken.state_dict().items():
        np.testing.assert_allclose(value, network.state_dict()[name], rtol=1e-3, atol=1e-4)
    assert not any(weight.requires_grad for weight in taken.parameters())
