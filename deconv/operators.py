"""Linear operators and functionals on volumes, as pure functions of tensors.

Volumes are (..., D, H, W) tensors and kernels (d, h, w) with odd sizes. `blur` is a true convolution (y = x ∗ k: the
kernel is flipped against the image), not the correlation that conv3d computes. Every resampling holds the outer edges
of the field of view (half-pixel convention); corners are never aligned, which would shift by a quarter of a voxel.

All of them are deterministic on CPU and CUDA: padding is by concatenation and resampling by small matrices, because the
library's replicate padding, pooling and trilinear interpolation add gradients in no fixed order on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

__all__ = [
    "Border", "along", "blur", "blur_direct", "crop", "downsample", "gaussian_window", "pad", "resample",
    "total_variation",
]

Border = Literal["replicate", "zeros"]


def pad(x: Tensor, widths: Sequence[int], *, border: Border = "replicate") -> Tensor:
    """x (..., D, H, W) with `widths` voxels more on either side of the three axes."""
    if border not in ("replicate", "zeros"):
        raise ValueError(f"border is 'replicate' or 'zeros', got {border!r}")
    if border == "zeros":
        d, h, w = widths
        return F.pad(x, (w, w, h, h, d, d))
    for axis, width in zip((-3, -2, -1), widths):
        if width:
            shape = list(x.shape)
            shape[axis] = width
            first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([first.expand(shape), x, last.expand(shape)], dim=axis)
    return x


def crop(x: Tensor, widths: Sequence[int]) -> Tensor:
    """x without `widths` voxels on either side of the three axes: undoes `pad`."""
    for axis, width in zip((-3, -2, -1), widths):
        x = x.narrow(axis, width, x.shape[axis] - 2 * width)
    return x


def blur(x: Tensor, k: Tensor, *, border: Border = "replicate") -> Tensor:
    """x ∗ k by Fourier transform; x (..., D, H, W), k (d, h, w) -> shape of x.

    Equal to `blur_direct` but for rounding. With zeros outside, activity near the border is lost; with replicated
    voxels a constant stays constant.
    """
    reach = _reach(k)
    x_padded = pad(x, reach, border=border)
    size = [next_fast_len(n, real=True) for n in x_padded.shape[-3:]]
    spectrum = torch.fft.rfftn(x_padded, s=size, dim=(-3, -2, -1)) * torch.fft.rfftn(k, s=size)
    y = torch.fft.irfftn(spectrum, s=size, dim=(-3, -2, -1))
    for axis, r in zip((-3, -2, -1), reach):
        # the first 2r samples of the cyclic convolution hold what wrapped around
        y = y.narrow(axis, 2 * r, x.shape[axis])
    return y


def blur_direct(x: Tensor, k: Tensor, *, border: Border = "replicate") -> Tensor:
    """x ∗ k by direct summation: the definition, slow. Shapes as in `blur`."""
    x_padded = pad(x, _reach(k), border=border)
    flipped = k.flip((-3, -2, -1))  # conv3d correlates; the model convolves
    y = F.conv3d(x_padded.reshape(-1, 1, *x_padded.shape[-3:]), flipped[None, None])
    return y.reshape(x.shape)


def _reach(k: Tensor) -> list[int]:
    if k.ndim != 3 or any(n % 2 == 0 for n in k.shape):
        raise ValueError(f"a kernel has three odd sizes, got {tuple(k.shape)}")
    return [n // 2 for n in k.shape]


def downsample(x: Tensor) -> Tensor:
    """x↓: (..., 2D, 2H, 2W) -> (..., D, H, W), each voxel the mean of the eight it covers.

    This is linear interpolation at the coarse voxel's centre (half-pixel convention) and keeps activity exactly.
    """
    d, h, w = x.shape[-3:]
    if d % 2 or h % 2 or w % 2:
        raise ValueError(f"sizes must be even to be halved, got {(d, h, w)}")
    for axis in (-3, -2, -1):
        pairs = x.movedim(axis, -1).unflatten(-1, (-1, 2))
        x = ((pairs[..., 0] + pairs[..., 1]) * 0.5).movedim(-1, axis)
    return x


def resample(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (..., D, H, W) -> (..., *size) over the same field of view: linear, half-pixel, edges replicated."""
    for axis, n in zip((-3, -2, -1), size):
        if x.shape[axis] != n:
            x = along(x, _linear(x.shape[axis], int(n)).to(x), axis)
    return x


def along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """The matrix (n_out, n_in) applied along one of the last three axes of x."""
    if axis == -1:
        return x @ matrix.T
    if axis == -2:
        return matrix @ x
    *lead, d, h, w = x.shape
    return (matrix @ x.reshape(*lead, d, h * w)).reshape(*lead, matrix.shape[0], h, w)


@lru_cache(maxsize=64)
def _linear(n_in: int, n_out: int) -> Tensor:
    """(n_out, n_in) weights of linear interpolation with edges, not corners, aligned; rows sum to 1."""
    place = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    low = np.floor(place)
    share = place - low
    weights = np.zeros((n_out, n_in))
    rows = np.arange(n_out)
    np.add.at(weights, (rows, np.clip(low, 0, n_in - 1).astype(int)), 1 - share)
    np.add.at(weights, (rows, np.clip(low + 1, 0, n_in - 1).astype(int)), share)
    return torch.from_numpy(weights)


@lru_cache(maxsize=64)
def gaussian_window(n: int, sigma_voxels: float, size: int) -> Tensor:
    """(n, n) matrix of a Gaussian moving average of at most `size` voxels; rows sum to 1 at the borders too."""
    offset = np.arange(n)[None, :] - np.arange(n)[:, None]
    weights = np.where(np.abs(offset) <= size // 2, np.exp(-0.5 * (offset / sigma_voxels) ** 2), 0.0)
    return torch.from_numpy(weights / weights.sum(axis=1, keepdims=True))


def total_variation(x: Tensor, *, epsilon: float = 1e-6) -> Tensor:
    """TV(x) = mean sqrt(|∇x|² + ε²) − ε, forward differences, none across the border.  x (..., D, H, W) -> scalar."""
    squares = torch.full_like(x, epsilon**2)
    for axis in (-3, -2, -1):
        difference = x.diff(dim=axis)
        edge = torch.zeros_like(x.narrow(axis, 0, 1))
        squares = squares + torch.cat([difference, edge], dim=axis).square()
    return squares.sqrt().mean() - epsilon
