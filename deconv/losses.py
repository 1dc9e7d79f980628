"""The terms of the NBD objective, as pure functions. Images are (D, H, W) tensors scaled so that max(y) = 1."""

from __future__ import annotations

import torch
from torch import Tensor

from deconv.operators import along, gaussian_window

__all__ = ["fidelity", "kernel_excess", "relative_squares", "ssim", "ssim_map"]


def fidelity(residual: Tensor) -> Tensor:
    """MSE + MAE of x↓ ∗ k − y (paper, eq. 5): the second so that low uptake counts too. -> scalar"""
    return residual.square().mean() + residual.abs().mean()


def ssim(a: Tensor, b: Tensor, *, data_range: float = 1.0, sigma_voxels: float = 1.5, size: int = 11) -> Tensor:
    """Structural similarity, mean over the volume. -> scalar"""
    return ssim_map(a, b, data_range=data_range, sigma_voxels=sigma_voxels, size=size).mean()


def ssim_map(a: Tensor, b: Tensor, *, data_range: float = 1.0, sigma_voxels: float = 1.5, size: int = 11) -> Tensor:
    """Structural similarity (Wang et al. 2004) of every voxel's Gaussian neighbourhood. -> (D, H, W)

    The window is cut at the borders and its weights rescaled: nothing outside the volume is invented. It runs as one
    small matrix per axis, the five windowed moments together.
    """
    moments = torch.stack([a, b, a * a, b * b, a * b])
    for axis in (-3, -2, -1):
        window = gaussian_window(moments.shape[axis], sigma_voxels, size).to(moments)
        moments = along(moments, window, axis)
    mean_a, mean_b, square_a, square_b, product = moments
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance = product - mean_a * mean_b
    variances = square_a - mean_a.square() + square_b - mean_b.square()
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return similarity / ((mean_a.square() + mean_b.square() + c1) * (variances + c2))


def kernel_excess(k: Tensor, threshold: float) -> Tensor:
    """l2 norm of the kernel voxels above `threshold` (paper, Table 2). -> scalar; 0, with no gradient, if none is."""
    above = k[k > threshold]
    return above.norm() if above.numel() else k.new_zeros(())


def relative_squares(estimate: Tensor, target: Tensor) -> Tensor:
    """|estimate − target|² / |target|²: what the networks learn when they reproduce their inputs. -> scalar"""
    return (estimate - target).square().sum() / target.square().sum()
