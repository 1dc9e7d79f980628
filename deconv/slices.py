"""The activity of slices: what TV takes for noise from slice to slice is given back to the slices it came from.

TV smooths along the axis, too, and so moves a few per cent of activity between neighbouring slices of noisy whole
bodies, most where bed positions meet. The sum of a slice of P(x ∗ k) depends on the sums of the slices of x alone:

    q = P1(k1 ∗ s),   s_i the sum of fine slice i of x,   k1 the kernel summed over rows and columns

so that gains g_i for the fine slices are found in one dimension, by the multiplicative steps of expectation
maximisation: g <- g (p / q) between the slices' centres, p the slice sums of y (Richardson, J. Opt. Soc. Am. 62, 55,
1972). A few steps bring q near p; all of them would sharpen the noise of p.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHARE", "slice_gains"]

#: slices with less than this share of the mean activity of a slice keep their gain of 1
SHARE = 0.1
#: no gain leaves 1 by more: larger misfits are for the gates to judge
MOST = 0.1

Floats = NDArray[np.float64]


def slice_gains(x: NDArray[np.float32], y: NDArray[np.float32], kernel: NDArray[np.floating], steps: int) -> Floats:
    """(2D,) gains for the slices of x (2D, 2H, 2W), so that P(x ∗ k) has nearer the slice sums of y (D, H, W).

    kernel  on the fine grid, odd, sum 1.   steps  of expectation maximisation; 0 gives ones.
    """
    before = y.sum(axis=(1, 2), dtype=np.float64)
    fine = x.sum(axis=(1, 2), dtype=np.float64)
    profile = np.asarray(kernel, dtype=np.float64).sum(axis=(1, 2))
    judged = before > SHARE * before.mean()
    centres = (np.arange(len(fine)) - 0.5) / 2.0  # of fine slices, in slices of y
    gains = np.ones(len(fine))
    for _ in range(steps):
        after = _blurred_sums(fine * gains, profile)
        ratio = np.where(judged & (after > 0), before / np.where(after > 0, after, 1.0), 1.0)
        gains = np.clip(gains * np.interp(centres, np.arange(len(before)), ratio), 1 - MOST, 1 + MOST)
    return gains


def _blurred_sums(fine: Floats, profile: Floats) -> Floats:
    """Slice sums of P(x ∗ k) from those of x, the first and last slice continued beyond the ends."""
    reach = len(profile) // 2
    blurred = np.convolve(np.pad(fine, reach, mode="edge"), profile, mode="valid")
    return blurred.reshape(-1, 2).sum(axis=1) / 8.0
