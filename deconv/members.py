"""The image of "best" for one tile: members solved with kernels and directions that differ; mean and spread.

A member is the TV minimiser (deconv/tv.py) for one kernel width. Total variation of forward differences prefers edges
that face one way; solving the image and its point reflection and taking the mean removes the first order of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconv.pooled import PooledBlur
from deconv.tv import tv_deconvolve

__all__ = ["Member", "applied", "mean_and_spread", "solved"]


@dataclass(frozen=True, eq=False)
class Member:
    """One kernel k (d, h, w) on the fine grid, its FWHM along (D, H, W) in PET voxels."""

    kernel: NDArray[np.float32]
    fwhm_voxels: tuple[float, float, float]


def solved(
    y: Tensor, member: Member, *, lam: float, iterations: int, spacing: Sequence[float],
    on_step: Callable[[float], None],
) -> Tensor:
    """x (2D, 2H, 2W) of one member for y (D, H, W), in units in which the whole image's maximum is 1.

    on_step is told the change of every one of the 2 x iterations steps.
    """
    peak = float(y.max())
    if peak <= 0:
        return torch.zeros([2 * n for n in y.shape], device=y.device)

    def minimiser(image: Tensor, kernel: NDArray[np.float32]) -> Tensor:
        return tv_deconvolve(
            image, kernel, kernel_grid="fine", lam=lam / peak, iterations=iterations, spacing=tuple(spacing),
            on_step=lambda p: on_step(p.loss),
        )

    axes = (0, 1, 2)
    turned = np.ascontiguousarray(member.kernel[::-1, ::-1, ::-1])
    return (minimiser(y, member.kernel) + minimiser(y.flip(axes), turned).flip(axes)) / 2


def mean_and_spread(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean of the members and their standard deviation."""
    mean, variance = torch.zeros_like(images[0]), torch.zeros_like(images[0])
    for x in images:
        mean += x / len(images)
    for x in images:
        variance += (x - mean).square() / len(images)
    return mean, variance.sqrt()


def applied(model: PooledBlur, x: Tensor) -> Tensor:
    """P(x ∗ k) on the PET grid, borders as `PooledBlur.pad` continues them."""
    return _cropped(model, model.forward(_padded(model, x)))


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
