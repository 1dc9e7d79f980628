"""The operators obey their laws on any shape, odd and uneven ones too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from deconv.kernels import centroid_voxels, gaussian, recentred
from deconv.losses import fidelity, kernel_excess, ssim, ssim_map
from deconv.metrics import kernel_fwhm_mm
from deconv.operators import blur, blur_direct, crop, downsample, gaussian_window, pad, resample, total_variation

SHAPE = (7, 10, 13)
SHAPES = st.tuples(*[st.integers(3, 12)] * 3)
KERNELS = st.tuples(*[st.sampled_from([1, 3, 5])] * 3)
quick = settings(max_examples=15, deadline=None)


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def point(shape: tuple[int, ...], at: tuple[int, int, int]) -> Tensor:
    x = torch.zeros(shape)
    x[at] = 1.0
    return x


@pytest.mark.parametrize("border", ["replicate", "zeros"])
def test_a_delta_kernel_returns_the_image(border):
    """x ∗ δ = x, borders included."""
    x = noise(SHAPE)
    assert torch.allclose(blur(x, point((3, 5, 7), (1, 2, 3)), border=border), x, atol=1e-6)


@quick
@given(shape=SHAPES, kernel=KERNELS, border=st.sampled_from(["replicate", "zeros"]))
def test_fourier_and_direct_blur_agree(shape, kernel, border):
    """The Fourier form is a rewrite of the definition, for any shape and border."""
    x, k = noise(shape), noise(kernel, 1)
    assert torch.allclose(blur(x, k, border=border), blur_direct(x, k, border=border), atol=2e-5)


def test_blur_is_a_convolution_not_a_correlation():
    """A kernel with its weight at the front moves a point to the front: a missing flip would move it to the back."""
    k = point((3, 3, 3), (0, 1, 1))
    for operator in (blur, blur_direct):
        assert torch.allclose(operator(point(SHAPE, (3, 4, 5)), k), point(SHAPE, (2, 4, 5)), atol=1e-6)


def test_blur_agrees_with_scipy():
    """An independent convolution gives the same image."""
    x, k = noise(SHAPE), noise((3, 5, 3), 1)
    reference = ndimage.convolve(x.double().numpy(), k.double().numpy(), mode="nearest")
    np.testing.assert_allclose(blur(x, k).numpy(), reference, atol=1e-5)


def test_a_shift_by_one_voxel_commutes_with_blur():
    """A point one voxel on gives the same blurred point one voxel on."""
    k = noise((3, 3, 3), 2)
    here, there = blur(point(SHAPE, (3, 4, 5)), k), blur(point(SHAPE, (3, 4, 6)), k)
    assert torch.allclose(here[..., :-1], there[..., 1:], atol=1e-6)


def test_replicated_borders_keep_a_constant_constant():
    """With zeros outside the border would darken; with replicated voxels it does not."""
    x, k = torch.ones(SHAPE), torch.from_numpy(gaussian(6.0, 2.7))
    assert torch.allclose(blur(x, k), x, atol=1e-5)
    assert blur(x, k, border="zeros")[0, 0, 0] < 0.5


def test_blur_keeps_activity_inside():
    """A kernel that sums to one moves activity inside the field of view but neither makes nor loses any."""
    x = point((21, 21, 21), (10, 10, 10))
    assert blur(x, torch.from_numpy(gaussian(5.0, 2.0))).sum() == pytest.approx(1.0, rel=1e-5)


@quick
@given(shape=SHAPES, kernel=KERNELS, border=st.sampled_from(["replicate", "zeros"]))
def test_gradients_are_adjoint(shape, kernel, border):
    """<A x, y> = <x, Aᵀ y>: what back-propagation uses is the operator's transpose."""
    x, y, k = noise(shape).double().requires_grad_(), noise(shape, 1).double(), noise(kernel, 2).double()
    product = (blur(x, k, border=border) * y).sum()
    (adjoint,) = torch.autograd.grad(product, x)
    assert float((adjoint * x).sum().detach()) == pytest.approx(float(product.detach()), rel=1e-9)


@pytest.mark.parametrize("kernel", [(2, 3, 3), (3, 3)])
def test_kernels_without_a_centre_are_refused(kernel):
    """An even size has no centre voxel; the patient would move by half a voxel."""
    with pytest.raises(ValueError, match="odd"):
        blur(noise(SHAPE), torch.ones(kernel))


@quick
@given(shape=SHAPES)
def test_downsampling_is_the_mean_of_eight_and_keeps_activity(shape):
    """x↓ holds the mean of the eight subvoxels, so activity (mean times volume) is the same."""
    x = noise(tuple(2 * n for n in shape))
    d, h, w = shape
    eight = x.reshape(d, 2, h, 2, w, 2).mean(dim=(1, 3, 5))
    assert torch.allclose(downsample(x), eight, atol=1e-6)
    assert torch.allclose(resample(x, shape), eight, atol=1e-6)


def test_odd_sizes_cannot_be_halved():
    """Halving an odd size would leave a slice without a partner."""
    with pytest.raises(ValueError, match="even"):
        downsample(noise((4, 5, 6)))


@quick
@given(shape=SHAPES, size=SHAPES)
def test_resampling_is_the_librarys_half_pixel_interpolation(shape, size):
    """The matrices equal torch's trilinear interpolation with edges, not corners, aligned; it is never shifted."""
    x = noise(shape)
    reference = torch.nn.functional.interpolate(x[None, None], size=size, mode="trilinear", align_corners=False)[0, 0]
    assert torch.allclose(resample(x, size), reference, atol=1e-5)


def test_resampling_keeps_a_ramp_in_place():
    """A linear ramp in mm stays the same ramp: corner alignment would shift and stretch it."""
    ramp = (torch.arange(12.0) + 0.5).reshape(12, 1, 1).expand(12, 4, 4)
    doubled = resample(ramp, (24, 8, 8))[:, 0, 0]
    assert torch.allclose(doubled[1:-1], (torch.arange(24.0)[1:-1] + 0.5) / 2, atol=1e-5)


@quick
@given(shape=SHAPES, widths=st.tuples(*[st.integers(0, 4)] * 3), border=st.sampled_from(["replicate", "zeros"]))
def test_cropping_undoes_padding(shape, widths, border):
    """crop(pad(x)) is x; the padding is what was asked for."""
    x = noise(shape)
    padded = pad(x, widths, border=border)
    mode = {"replicate": "edge", "zeros": "constant"}[border]
    np.testing.assert_array_equal(padded.numpy(), np.pad(x.numpy(), [(n, n) for n in widths], mode=mode))
    assert torch.equal(crop(padded, widths), x)


def test_an_unknown_border_is_refused():
    """A misspelt border must not quietly become another."""
    with pytest.raises(ValueError, match="border"):
        pad(noise(SHAPE), (1, 1, 1), border="mirror")


def test_total_variation_measures_edges():
    """A constant has none; a step of height 1 across one axis has one unit per voxel of its face."""
    assert float(total_variation(torch.ones(4, 5, 6))) == pytest.approx(0.0, abs=1e-7)
    step = torch.zeros(4, 5, 6)
    step[2:] = 1.0
    assert float(total_variation(step)) == pytest.approx(5 * 6 / (4 * 5 * 6), rel=1e-4)


def test_total_variation_has_a_finite_gradient_where_flat():
    """sqrt has none at 0; the epsilon must keep the descent alive on a flat background."""
    x = torch.ones(3, 4, 5, requires_grad=True)
    total_variation(x).backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("fwhm", [(6.0, 6.0, 6.0), (5.0, 6.5, 8.0)])
def test_a_gaussian_has_the_width_it_was_given(fwhm):
    """FWHM in mm survives an anisotropic voxel: swapped axes or forgotten spacing would not."""
    spacing = (1.5, 1.0, 0.8)
    k = gaussian(fwhm, spacing)
    assert k.sum() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(kernel_fwhm_mm(k, spacing), fwhm, rtol=0.03)


def test_blurring_a_gaussian_adds_the_squares_of_widths():
    """6 mm after 8 mm is 10 mm."""
    x = torch.from_numpy(gaussian(6.0, 1.0, (41, 41, 41)))
    y = blur(x, torch.from_numpy(gaussian(8.0, 1.0, (41, 41, 41))))
    np.testing.assert_allclose(kernel_fwhm_mm(y.numpy(), (1.0, 1.0, 1.0)), 10.0, rtol=0.02)


@quick
@given(offset=st.tuples(*[st.floats(-1.5, 1.5)] * 3))
def test_recentring_centres_any_kernel(offset):
    """Whatever its shift, the kernel ends centred, not negative, with sum 1; and the move is told."""
    grid = np.indices((15, 15, 15)) - 7.0 - np.array(offset).reshape(3, 1, 1, 1)
    k, moved = recentred(np.exp(-(grid**2).sum(axis=0) / (2 * 1.3**2)))
    assert np.abs(centroid_voxels(k)).max() < 0.01
    assert k.min() >= 0 and k.sum() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(moved, -np.array(offset), atol=0.03)


def test_gaussians_that_cannot_be_are_refused():
    """No width, no spacing, even sizes."""
    for arguments in [(0.0, 1.0, None), (5.0, -1.0, None), (5.0, 1.0, (4, 5, 5))]:
        with pytest.raises(ValueError):
            gaussian(*arguments)


def test_window_rows_sum_to_one_at_borders_too():
    """A moving average that pads with zeros would see structure at every border."""
    assert torch.allclose(gaussian_window(9, 1.5, 11).sum(dim=1), torch.ones(9, dtype=torch.float64))


def test_ssim_is_one_for_equal_images_and_less_for_others():
    """SSIM(x, x) = 1, it is symmetric, and noise lowers it."""
    x, y = noise(SHAPE), noise(SHAPE, 1)
    assert float(ssim(x, x)) == pytest.approx(1.0, abs=1e-5)
    assert float(ssim(x, y)) == pytest.approx(float(ssim(y, x)), abs=1e-6)
    assert float(ssim(x, y)) < float(ssim(x, x + 0.05 * (y - 0.5))) < 1.0


def test_ssim_equals_its_definition_away_from_borders():
    """One voxel, by hand: the window's moments in the formula of Wang et al. 2004."""
    x, y = noise((11, 11, 11)).double(), noise((11, 11, 11), 1).double()
    line = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.einsum("i,j,k->ijk", line, line, line) / line.sum() ** 3
    a, b = x.numpy(), y.numpy()
    ma, mb = (window * a).sum(), (window * b).sum()
    va, vb, c = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2, (window * a * b).sum() - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * c + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert float(ssim_map(x, y)[5, 5, 5]) == pytest.approx(expected, rel=1e-9)


def test_fidelity_is_mse_plus_mae():
    """Paper, equation 5."""
    assert float(fidelity(torch.tensor([1.0, -3.0]))) == pytest.approx(5.0 + 2.0)


def test_kernel_term_acts_above_the_threshold_only():
    """Small and middle kernel voxels are free (paper, Table 2)."""
    assert float(kernel_excess(torch.tensor([0.5, 0.2, 0.3]), 0.7)) == 0.0
    assert float(kernel_excess(torch.tensor([0.8, 0.2]), 0.7)) == pytest.approx(0.8)
