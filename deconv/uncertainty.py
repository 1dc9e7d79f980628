"""The standard deviation of x: what the kernel's width leaves open, and what the image leaves unexplained.

    sd² = (WIDTH s)² + (MISFIT r)²

s is the spread of the members for one standard deviation of the kernel's width; r the root mean square of x↓ ∗ k − y
about each voxel (Gaussian, REACH PET voxels): noise, and whatever the model cannot explain. The two factors take in
what neither knows, such as the shape of what is smaller than the PSF: with them 68 % of hot voxels lie within one
standard deviation, in the mean over the phantoms of `evaluate --suite full`, to which they were fitted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["combined"]

WIDTH = 3.0
MISFIT = 6.0
REACH = 1.5

Array = NDArray[np.float32]


def combined(spread: Array, off: Array) -> Array:
    """(2D, 2H, 2W) standard deviation from the members' spread (2D, 2H, 2W) and x↓ ∗ k − y (D, H, W), of one unit."""
    local = np.sqrt(ndimage.gaussian_filter(np.square(off, dtype=np.float64), REACH, mode="nearest"))
    fine = local.astype(np.float32).repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    return np.hypot(np.float32(WIDTH) * spread, np.float32(MISFIT) * fine)
