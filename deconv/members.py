"""The image of "best" for one tile: members solved with kernels and directions that differ; mean and spread.

A member is the TV minimiser (deconv/tv.py) for one kernel width. Total variation of forward differences prefers edges
that face one way; solving the image and its point reflection and taking the mean removes the first order of that.
Then Gx (deconv/restorer.py) mends what TV does wrong on shapes it was taught on, and one proximal step brings the
result back to the data:

    x <- argmin 4 ||A x - y||² + mu ||x - Gx(x_TV, y)||²

in closed form on the Fourier side (deconv/pooled.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconv.pooled import PooledBlur, fold, unfold_times
from deconv.restorer import Restorer
from deconv.tv import tv_deconvolve

__all__ = ["Member", "mean_and_spread", "solved", "to_data"]


@dataclass(frozen=True, eq=False)
class Member:
    """One kernel k (d, h, w) on the fine grid, its FWHM along (D, H, W) in PET voxels, and its weight in the mean."""

    kernel: NDArray[np.float32]
    fwhm_voxels: tuple[float, float, float]
    weight: float


def solved(
    y: Tensor, member: Member, *, lam: float, iterations: int, spacing: Sequence[float], restorer: Restorer | None,
    consistency: float, on_step: Callable[[float], None],
) -> Tensor:
    """x (2D, 2H, 2W) of one member for y (D, H, W), in units in which the whole image's maximum is 1."""
    peak = float(y.max())
    if peak <= 0:
        return torch.zeros([2 * n for n in y.shape], device=y.device)

    def minimiser(image: Tensor) -> Tensor:
        return tv_deconvolve(
            image, member.kernel, kernel_grid="fine", lam=lam / peak, iterations=iterations, spacing=tuple(spacing),
            on_step=lambda p: on_step(p.loss),
        )

    axes = (0, 1, 2)
    x = (minimiser(y) + minimiser(y.flip(axes)).flip(axes)) / 2
    if restorer is None:
        return x
    model = PooledBlur(y.shape, member.kernel, kernel_grid="fine", device=y.device)
    residual = y - applied(model, x)
    with torch.no_grad():
        mended = restorer.restored(x, y, residual, lam / peak, member.fwhm_voxels)
    return to_data(model, y, mended, consistency)


def mean_and_spread(images: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Weighted mean of the members and their standard deviation."""
    total = sum(weights)
    mean = torch.zeros_like(images[0])
    for weight, x in zip(weights, images, strict=True):
        mean += weight / total * x
    variance = torch.zeros_like(mean)
    for weight, x in zip(weights, images, strict=True):
        variance += weight / total * (x - mean).square()
    return mean, variance.sqrt()


def applied(model: PooledBlur, x: Tensor) -> Tensor:
    """P(x ∗ k) on the PET grid, borders as `PooledBlur.pad` continues them."""
    return _cropped(model, model.forward(_padded(model, x)))


def to_data(model: PooledBlur, y: Tensor, x: Tensor, mu: float) -> Tensor:
    """argmin over x' of 4 ||A x' - y||² + mu ||x' - x||², then x' >= 0. (2D, 2H, 2W)"""
    padded = _padded(model, x)
    missing = torch.fft.rfftn(model.pad(y) - model.forward(padded))
    power = model.spectrum.real**2 + model.spectrum.imag**2
    # (8 A^T A / 2 + mu) d = 4 A^T r, with A A^T = fold(|b|²) / 8 on the coarse spectrum
    missing.mul_(4.0).div_(fold(power, model.coarse).mul_(0.5).add_(mu))
    step = torch.fft.irfftn(unfold_times(missing, model.spectrum.conj(), model.coarse), s=model.fine)
    return model.crop(padded + step).clamp_min(0.0)


def _padded(model: PooledBlur, x: Tensor) -> Tensor:
    """(2D, 2H, 2W) -> the padded fine grid, continued as `PooledBlur.pad` continues y."""
    for axis in range(3):
        extra = model.fine[axis] - x.shape[axis]
        ramp = torch.linspace(0, 1, extra + 2, device=x.device, dtype=x.dtype)[1:-1]
        ramp = (3 * ramp**2 - 2 * ramp**3).reshape([-1 if a == axis else 1 for a in range(3)])
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([x, last + ramp * (first - last)], dim=axis)
    return x


def _cropped(model: PooledBlur, y: Tensor) -> Tensor:
    d, h, w = model.shape
    return y[:d, :h, :w]
