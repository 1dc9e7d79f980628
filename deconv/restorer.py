"""Gx of the preset "best": a convolutional network that mends a TV deconvolution, taught on random shapes only.

It sees, on the PET grid, the eight fine voxels of the TV image, y, what of y the image does not explain, and numbers
that tell the kernel and the noise; it answers with a factor for every fine voxel. Its last layer works on the doubled
grid (sub-voxel convolution: Shi et al. 2016). Taught by scripts/train_restorer.py on `deconv.scenes`; the weights are
those of deconv/weights/restorer.npz.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Restorer", "load", "shuffled", "unshuffled"]

WEIGHTS = Path(__file__).parent / "weights" / "restorer.npz"
CHANNELS = 32
FLOOR = 0.01  # of the maximum: below it a factor means little, and the correction becomes a summand
LARGEST = 1.0  # the logarithm of the factor stays within ± this


class Restorer(nn.Module):
    """(N, 14, D, H, W) -> (N, 8, D, H, W): logarithms of the factors of the fine voxels of each PET voxel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(14, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv3d(CHANNELS, CHANNELS, 3, padding=d, dilation=d) for d in (1, 2, 1, 2, 1))
        self.last = nn.Conv3d(CHANNELS, 8, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, seen: Tensor) -> Tensor:
        """See the class."""
        h = F.leaky_relu(self.first(seen), 0.1)
        for block in self.blocks:
            h = h + F.leaky_relu(block(h), 0.1)
        return LARGEST * torch.tanh(self.last(h) / LARGEST)

    def restored(self, x: Tensor, y: Tensor, residual: Tensor, lam: float, fwhm_voxels: Sequence[float]) -> Tensor:
        """x (2D, 2H, 2W) mended. y, residual (D, H, W) in the unit of x; lam of the TV; FWHM in PET voxels."""
        peak = y.max()
        seen = features(x / peak, y / peak, residual / peak, lam, fwhm_voxels)
        return mended(x / peak, shuffled(self(seen[None])[0])) * peak


def features(x: Tensor, y: Tensor, residual: Tensor, lam: float, fwhm_voxels: Sequence[float]) -> Tensor:
    """(14, D, H, W): what the network sees, all of the order of one."""
    told = torch.tensor([np.log(lam / 3e-3) / 2, *(np.log(w / 2) for w in fwhm_voxels)], dtype=x.dtype, device=x.device)
    planes = told[:, None, None, None].expand(4, *y.shape)
    size = float(residual.square().mean().sqrt().clamp_min(1e-6))
    return torch.cat([torch.log(unshuffled(x) + FLOOR) / 2 + 1, torch.log(y + FLOOR)[None] / 2 + 1,
                      residual.clamp(-4 * size, 4 * size)[None] / size, planes])


def mended(x: Tensor, log_factor: Tensor) -> Tensor:
    """(x + floor) exp(log_factor) - floor, not negative."""
    return ((x + FLOOR) * torch.exp(log_factor) - FLOOR).clamp_min(0.0)


def unshuffled(x: Tensor) -> Tensor:
    """(2D, 2H, 2W) -> (8, D, H, W)."""
    d, h, w = (n // 2 for n in x.shape)
    return x.reshape(d, 2, h, 2, w, 2).permute(1, 3, 5, 0, 2, 4).reshape(8, d, h, w)


def shuffled(planes: Tensor) -> Tensor:
    """(8, D, H, W) -> (2D, 2H, 2W): undoes `unshuffled`."""
    d, h, w = planes.shape[-3:]
    return planes.reshape(2, 2, 2, d, h, w).permute(3, 0, 4, 1, 5, 2).reshape(2 * d, 2 * h, 2 * w)


@lru_cache(maxsize=1)
def load(path: Path = WEIGHTS) -> Restorer:
    """The taught network, on the CPU."""
    network = Restorer()
    with np.load(path) as held:
        network.load_state_dict({name: torch.from_numpy(held[name].astype(np.float32)) for name in held.files})
    return network.eval().requires_grad_(False)
