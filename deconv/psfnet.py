"""Gk of the preset "best": a small network that reads the PSF off a window of a PET image, with its uncertainty.

It looks along one axis at a time and says ln FWHM (PET voxels) along that axis and its standard deviation. The three
axes, and the mirror images of the window, pass through the same weights: what it says turns with the image.
Taught on `deconv.scenes` by scripts/train_psfnet.py; the weights are those of deconv/weights/psfnet.npz.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["PsfNet", "Reading", "WINDOW", "combined", "load", "read", "windows"]

WINDOW = 24  # PET voxels along each axis of a window
WEIGHTS = Path(__file__).parent / "weights" / "psfnet.npz"
FINEST_MM = 1.9  # finer voxels are averaged by two first: the network knows PSFs of 0.8 to 5 voxels
LEAST_LOG_SD = 0.03  # what windows of one image cannot tell of each other: they share what the network believes wrongly

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Reading:
    """Widths of a PSF along (D, H, W): FWHM in mm, the sd of its logarithm, and the number of windows it rests on."""

    fwhm_mm: Triple
    log_sd: Triple
    windows: int


class PsfNet(nn.Module):
    """(N, 24, 24, 24) -> (N, 2): ln FWHM along the first axis (PET voxels), and the logarithm of its variance."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv3d(2, 24, (5, 3, 3), padding=(2, 1, 1))
        self.c2 = nn.Conv3d(24, 32, (5, 3, 3), stride=(1, 2, 2), padding=(2, 1, 1))
        self.c3 = nn.Conv3d(32, 48, (5, 3, 3), stride=(2, 2, 2), padding=(2, 1, 1))
        self.c4 = nn.Conv3d(48, 64, (5, 3, 3), stride=(2, 1, 1), padding=(2, 1, 1))
        self.c5 = nn.Conv3d(64, 64, 3, padding=1)
        self.attention = nn.Conv3d(64, 4, 1)
        self.h1 = nn.Linear(64 * 4, 64)
        self.h2 = nn.Linear(64, 2)

    def forward(self, y: Tensor) -> Tensor:
        """See the class."""
        y = y / y.amax((1, 2, 3), keepdim=True)
        x = torch.stack([4 * y, torch.log(y + 0.02) + 2], dim=1)
        for layer in (self.c1, self.c2, self.c3, self.c4):
            x = F.leaky_relu(layer(x), 0.1)
        x = x + F.leaky_relu(self.c5(x), 0.1)
        weight = self.attention(x).flatten(2).softmax(-1)
        pooled = torch.einsum("ncv,nav->nac", x.flatten(2), weight).flatten(1)
        mean, spread = self.h2(F.leaky_relu(self.h1(pooled), 0.1)).split(1, dim=1)
        return torch.cat([mean, -4 + 4 * torch.tanh(spread / 4)], dim=1)


@lru_cache(maxsize=1)
def load(path: Path = WEIGHTS) -> PsfNet:
    """The taught network, on the CPU."""
    network = PsfNet()
    with np.load(path) as held:
        network.load_state_dict({name: torch.from_numpy(held[name].astype(np.float32)) for name in held.files})
    return network.eval().requires_grad_(False)


def windows(y: NDArray[np.float32], count: int) -> list[NDArray[np.float32]]:
    """Up to `count` windows of y (D, H, W) with the most gradient energy over their own maximum.

    A window where nothing stands out (less than a tenth of the best one's energy) is left out.
    """
    energy = np.zeros(y.shape)
    for axis in range(3):
        if y.shape[axis] > 1:
            energy += np.gradient(y.astype(np.float64), axis=axis) ** 2
    size = [min(WINDOW, n) for n in y.shape]
    starts = [sorted({int(s) for s in np.linspace(0, n - k, max(1, -(-(n - k) // (k // 2)) + 1))})
              for n, k in zip(y.shape, size, strict=True)]
    boxes = [tuple(slice(s, s + k) for s, k in zip(corner, size, strict=True)) for corner in product(*starts)]
    tops = np.array([float(y[box].max()) for box in boxes])
    gains = np.array([float(energy[box].sum()) for box in boxes]) / np.maximum(tops, 0.02 * y.max())
    gains[tops <= 0] = 0.0  # nothing lies inside; the slope was of what lies beside it
    order = np.argsort(-gains, kind="stable")[:count]
    return [y[boxes[i]] for i in order if gains[i] > 0.1 * gains[order[0]] and tops[i] > 0]


def read(y: NDArray[np.float32], spacing: Sequence[float], *, count: int = 8, network: PsfNet | None = None) -> Reading:
    """The widths of the PSF of y (D, H, W) >= 0 with voxels of `spacing` mm, from its most telling windows.

    Raises ValueError where y is the same everywhere.
    """
    if y.max() <= y.min():
        raise ValueError("the volume is the same everywhere: it has no edge that could tell how wide its blur is")
    network = network or load()
    y, voxels = _coarser(y, [float(s) for s in spacing])
    rows = np.stack([_looked_at(network, window) for window in windows(y, count)])
    psf = combined(rows)
    widths = [w * v for w, v in zip(psf.fwhm_mm, voxels, strict=True)]
    return replace(psf, fwhm_mm=(widths[0], widths[1], widths[2]))


def combined(rows: NDArray[np.float64]) -> Reading:
    """Widths in voxels from readings (windows, 3, 2): each weighs by its variance and by that between them.

    Random effects: DerSimonian, Laird, Control. Clin. Trials 7, 177, 1986.
    """
    mean, sd = np.empty(3), np.empty(3)
    for axis in range(3):
        values, variances = rows[:, axis, 0], np.exp(rows[:, axis, 1])
        variances = variances + _between(values, variances)
        mean[axis] = np.average(values, weights=1 / variances)
        # windows of one image err alike: no more is believed than two of the best could tell
        sd[axis] = max(LEAST_LOG_SD, np.sqrt(max(1 / (1 / variances).sum(), 0.5 * variances.min())))
    d, h, w = (float(width) for width in np.exp(mean))
    return Reading((d, h, w), (float(sd[0]), float(sd[1]), float(sd[2])), len(rows))


def _between(values: NDArray[np.float64], variances: NDArray[np.float64]) -> float:
    """The variance between readings beyond what they own up to."""
    weight = 1 / variances
    excess = float((weight * (values - np.average(values, weights=weight)) ** 2).sum()) - (len(values) - 1)
    freedom = float(weight.sum() - (weight**2).sum() / weight.sum())
    return max(0.0, excess / freedom) if freedom > 1e-9 else 0.0


def _looked_at(network: PsfNet, window: NDArray[np.float32]) -> NDArray[np.float64]:
    """(3, 2): along each axis, the mean over the window's 16 images in which that axis stays or is turned around."""
    found = np.zeros((3, 2))
    for axis in range(3):
        line = np.moveaxis(window, axis, 0)
        for seen in (line, line.transpose(0, 2, 1)):
            images = [seen[::a, ::b, ::c] for a, b, c in product((1, -1), repeat=3)]
            with torch.no_grad():
                found[axis] += network(torch.from_numpy(np.stack(images))).double().numpy().mean(axis=0) / 2
    return found


def _coarser(y: NDArray[np.float32], spacing: list[float]) -> tuple[NDArray[np.float32], list[float]]:
    """y averaged by two along axes of fine voxels, and its voxels: P(P(x ∗ k)) is the same model on larger voxels."""
    for axis in range(3):
        while spacing[axis] < FINEST_MM and y.shape[axis] >= 2 * WINDOW // 3:
            n = y.shape[axis] // 2
            pairs = np.moveaxis(y, axis, 0)[: 2 * n]
            y = np.moveaxis(0.5 * (pairs[0::2] + pairs[1::2]), 0, axis)
            spacing[axis] *= 2
    return np.ascontiguousarray(y), spacing
