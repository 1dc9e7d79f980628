"""The physical forward model on the Fourier side: blur on the fine grid, then average to the PET grid.

    y = A x,   A = S B

B is one circular convolution on the padded fine grid: the kernel and the 2 x 2 x 2 mean together. S keeps every second
voxel. In Fourier space B is a product with b and S folds eight fine frequencies into one coarse frequency, so that
A^T A couples only those eight and (A^T A + L) is inverted exactly for every diagonal L (Zhao et al., IEEE Trans. Image
Process. 25, 3683, 2016). All spectra are the half spectra of rfftn.

The model of the paper, y = x↓ ∗ k with the kernel on the PET grid, has the same form: convolution with k commutes with
S when k's spectrum is repeated over the fine grid. Both are offered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["PooledBlur", "fold", "smooth_length", "unfold"]

Triple = tuple[int, int, int]


class PooledBlur:
    """A for a PET volume of `shape` (D, H, W), on a padded periodic domain so that borders neither lose nor gain.

    kernel       odd sizes, sum > 0 (it is scaled to sum 1); a convolution kernel.
    kernel_grid  "fine": voxels of the doubled grid, y = P(x ∗ k). "pet": voxels of the PET grid, y = P(x) ∗ k.
    margin       PET voxels added along each axis at least; unless given twice the kernel's reach, so that one
                 border does not see the opposite one.
    Raises ValueError for an even or empty kernel or another `kernel_grid`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kernel: NDArray[np.floating],
        *,
        kernel_grid: str = "fine",
        margin: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        kernel = np.asarray(kernel, dtype=np.float64)
        if kernel.ndim != 3 or any(n % 2 == 0 for n in kernel.shape) or kernel.sum() <= 0:
            raise ValueError(f"kernel must be three-dimensional with odd sizes and a positive sum, got {kernel.shape}")
        if kernel_grid not in ("fine", "pet"):
            raise ValueError(f"kernel_grid must be 'fine' or 'pet', got {kernel_grid!r}")
        scale = 2 if kernel_grid == "fine" else 1
        self.shape: Triple = (int(shape[0]), int(shape[1]), int(shape[2]))
        reach = [2 * (n // 2 // scale + 1) if margin is None else margin for n in kernel.shape]
        self.coarse: Triple = _triple(smooth_length(n + max(r, 2)) for n, r in zip(self.shape, reach, strict=True))
        self.fine: Triple = _triple(2 * n for n in self.coarse)
        self.device = torch.device(device)
        self.spectrum = self._spectrum(kernel / kernel.sum(), kernel_grid)

    def pad(self, y: torch.Tensor) -> torch.Tensor:
        """(D, H, W) -> the padded PET grid: replicated borders that pass smoothly into the opposite border."""
        for axis, (n, padded) in enumerate(zip(self.shape, self.coarse, strict=True)):
            extra = padded - n
            ramp = torch.linspace(0, 1, extra + 2, device=y.device, dtype=y.dtype)[1:-1]
            ramp = (3 * ramp**2 - 2 * ramp**3).reshape([-1 if a == axis else 1 for a in range(3)])
            first, last = y.narrow(axis, 0, 1), y.narrow(axis, n - 1, 1)
            y = torch.cat([y, last + ramp * (first - last)], dim=axis)
        return y

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        """The padded fine grid -> (2D, 2H, 2W)."""
        d, h, w = self.shape
        return x[: 2 * d, : 2 * h, : 2 * w]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A x: padded fine grid -> padded PET grid."""
        return torch.fft.irfftn(fold(torch.fft.rfftn(x).mul_(self.spectrum), self.coarse).div_(8.0), s=self.coarse)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """A^T y: padded PET grid -> padded fine grid; A^T 1 = 1/8 everywhere."""
        return torch.fft.irfftn(unfold_times(torch.fft.rfftn(y), self.spectrum.conj(), self.coarse), s=self.fine)

    def _spectrum(self, kernel: NDArray[np.float64], kernel_grid: str) -> torch.Tensor:
        """b on the fine half spectrum, complex64. The mean over fine voxels 2n and 2n + 1 is (1 + exp(i w)) / 2."""
        grid = self.fine if kernel_grid == "fine" else self.coarse
        k = torch.fft.rfftn(torch.from_numpy(_wrapped(kernel, grid)).to(self.device)).to(torch.complex64)
        if kernel_grid == "pet":
            ones = torch.ones((1, 1, 1), dtype=torch.complex64, device=self.device)
            k = unfold_times(k, ones.expand(_half(self.fine)), self.coarse)
        for axis, n in enumerate(self.fine):
            count = n // 2 + 1 if axis == 2 else n
            phase = torch.exp(2j * torch.pi * torch.arange(count, device=self.device, dtype=torch.float64) / n)
            pool = ((1 + phase) / 2).to(torch.complex64)
            k.mul_(pool.reshape([-1 if a == axis else 1 for a in range(3)]))
        return k


def fold(fine: torch.Tensor, coarse: Triple) -> torch.Tensor:
    """Half spectrum on the fine grid -> half spectrum on the coarse grid: the sum over the eight that S aliases."""
    n0, n1, n2 = coarse
    partial = fine.view(2, n0, 2, n1, n2 + 1).sum(dim=(0, 2))
    half = n2 // 2 + 1
    mirrored = partial[..., n2 - half + 1 :].flip(-1)
    return partial[..., :half] + (_negated(mirrored).conj() if mirrored.is_complex() else _negated(mirrored))


def unfold(coarse_spectrum: torch.Tensor, coarse: Triple) -> torch.Tensor:
    """(n0, n1, n2 // 2 + 1) -> (n0, n1, n2 + 1): the last axis of the repeated spectrum; the others repeat as is."""
    n2 = coarse[2]
    rest = coarse_spectrum[..., : n2 - n2 // 2].flip(-1)
    rest = _negated(rest).conj() if rest.is_complex() else _negated(rest)
    return torch.cat([coarse_spectrum, rest], dim=-1)


def unfold_times(
    coarse_spectrum: torch.Tensor, factor: torch.Tensor, coarse: Triple, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The coarse spectrum repeated over the fine grid, times `factor` on the fine half spectrum (into `out`)."""
    n0, n1, n2 = coarse
    split = (2, n0, 2, n1, n2 + 1)
    repeated = unfold(coarse_spectrum, coarse)[None, :, None]
    product = torch.mul(factor.reshape(split), repeated, out=None if out is None else out.view(split))
    return product.view(2 * n0, 2 * n1, n2 + 1)


def smooth_length(n: int) -> int:
    """The smallest length >= n with no prime factor above 5, on which FFTs are fast."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _negated(spectrum: torch.Tensor) -> torch.Tensor:
    """Frequencies (-f0, -f1, .) for (f0, f1, .)."""
    return spectrum.flip((0, 1)).roll((1, 1), (0, 1))


def _wrapped(kernel: NDArray[np.float64], shape: Triple) -> NDArray[np.float64]:
    """The kernel with its middle voxel at [0, 0, 0] of a periodic grid; what is wider than the grid wraps around."""
    out = np.zeros(shape)
    index = np.ix_(*[(np.arange(k) - k // 2) % n for k, n in zip(kernel.shape, shape, strict=True)])
    np.add.at(out, index, kernel)
    return out


def _half(shape: Triple) -> Triple:
    return shape[0], shape[1], shape[2] // 2 + 1


def _triple(values: Sequence[int] | object) -> Triple:
    a, b, c = values  # type: ignore[misc, attr-defined]
    return a, b, c
