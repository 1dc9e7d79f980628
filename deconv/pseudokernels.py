"""Does a blind method find the kernel that was there? The paper's two validations of kernels, for any method.

Pseudo-kernels (paper, Patient Analysis): a deblurred image is blurred again by a kernel k* that is known, the method
runs on the result, and its kernel k is compared with k*:

    y* = P(x ∗ k*)        similarity k* · k = <k*, k> / (|k*| |k|)

Four shapes: a Gaussian, and three skewed along one axis each. Paper: above 0.90 for each.

Inter-study similarity: the mean of k_i · k_j over all pairs of studies of one scanner. Paper: 0.73 between patients,
0.93 ± 0.04 between phantom acquisitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import signal

from deconv import metrics
from deconv.phantoms import average_pool, psf_kernel
from deconv.result import Deconvolution
from deconv.volume import Volume

__all__ = ["SHAPES", "Pseudokernel", "Recovered", "Similarity", "blurred_again", "inter_study_similarity",
           "mean_kernel", "pseudokernels", "recover"]

Array = NDArray[np.float64]

#: name -> axis of the skew; None for the regular Gaussian (paper, Figure 6)
SHAPES: dict[str, int | None] = {"gaussian": None, "skewed along D": 0, "skewed along H": 1, "skewed along W": 2}


@dataclass(frozen=True, eq=False)
class Pseudokernel:
    """A kernel to be found again.

    kernel  (n, n, n) float64, odd, sum 1, on the PET grid: what a method should name.
    fine    (m, m, m) float64, odd, sum 1, on the grid twice as fine: the same shape, what blurs.
    """

    name: str
    kernel: Array
    fine: Array


@dataclass(frozen=True, eq=False)
class Recovered:
    """One pseudo-kernel and what the method made of it; inner product 1 is the same shape, 0 nothing in common."""

    applied: Pseudokernel
    predicted: NDArray[np.float32]
    inner_product: float


@dataclass(frozen=True, eq=False)
class Similarity:
    """Inner products of kernels of several studies: (n, n) matrix, mean and standard deviation (ddof 1) over pairs."""

    matrix: Array
    mean: float
    sd: float


def pseudokernels(
    spacing: Sequence[float] | NDArray[np.float64], *, fwhm_mm: float | Sequence[float] = 6.0, skew: float = 0.5,
    size: int = 15,
) -> tuple[Pseudokernel, ...]:
    """The four shapes on a PET grid of `spacing` mm; `skew` as in `psf_kernel`: mean at the centre, nothing moves.

    Raises ValueError for an even size, a width that is not positive or a skew outside (-1, 1).
    """
    step = np.asarray(spacing, dtype=np.float64)
    made = []
    for name, axis in SHAPES.items():
        amount, along = (0.0, 2) if axis is None else (skew, axis)
        made.append(Pseudokernel(name, psf_kernel(fwhm_mm, step, size=size, skew=amount, skew_axis=along),
                                 psf_kernel(fwhm_mm, step / 2, size=2 * size - 1, skew=amount, skew_axis=along)))
    return tuple(made)


def blurred_again(image: Volume, pseudokernel: Pseudokernel, *, on_pet_grid: bool = False) -> Volume:
    """y* (D, H, W): a deblurred image (2D, 2H, 2W) seen through a pseudo-kernel, on the PET grid, borders replicated.

    The blur happens on the fine grid and the mean over 2 x 2 x 2 follows; `on_pet_grid` takes the mean first and
    blurs the PET grid (the paper's model, x↓ ∗ k). Raises ValueError for an image with odd sizes.
    """
    if any(n % 2 for n in image.shape):
        raise ValueError(f"a deblurred image has even sizes, got {image.shape}")
    x = image.array.astype(np.float64)
    y = _blur(average_pool(x), pseudokernel.kernel) if on_pet_grid else average_pool(_blur(x, pseudokernel.fine))
    # the first PET voxel's centre lies half a fine voxel farther in: the outer edges stay where they are
    return Volume(np.maximum(y, 0.0), image.spacing * 2, image.position((0.5, 0.5, 0.5)), image.direction, image.unit)


def recover(
    image: Volume,
    method: Callable[[Volume], Deconvolution],
    *,
    kernels: Sequence[Pseudokernel] | None = None,
    on_pet_grid: bool = False,
) -> tuple[Recovered, ...]:
    """Blur a deblurred `image` (2D, 2H, 2W) by each pseudo-kernel, run `method` on it, compare kernels.

    method   (D, H, W) Volume -> Deconvolution with a kernel; runs once per pseudo-kernel.
    kernels  by default the four shapes of 6 mm on the PET grid.

    Raises ValueError where the method names no kernel.
    """
    found = []
    for one in pseudokernels(image.spacing * 2) if kernels is None else kernels:
        result = method(blurred_again(image, one, on_pet_grid=on_pet_grid))
        if result.kernel is None:
            raise ValueError(f"{result.method} names no kernel: there is nothing to compare with {one.name!r}")
        found.append(Recovered(one, result.kernel, metrics.kernel_inner_product(one.kernel, result.kernel)))
    return tuple(found)


def inter_study_similarity(kernels: Sequence[ArrayLike]) -> Similarity:
    """Inner products k_i · k_j of kernels of two or more studies, all on voxels of the same size.

    Sizes may differ (centres are laid upon each other). Raises ValueError for fewer than two kernels.
    """
    if len(kernels) < 2:
        raise ValueError(f"similarity needs two kernels or more, got {len(kernels)}")
    matrix = np.eye(len(kernels))
    for i, j in combinations(range(len(kernels)), 2):
        matrix[i, j] = matrix[j, i] = metrics.kernel_inner_product(kernels[i], kernels[j])
    pairs = matrix[np.triu_indices(len(kernels), 1)]
    return Similarity(matrix, float(pairs.mean()), float(pairs.std(ddof=1)) if pairs.size > 1 else 0.0)


def mean_kernel(kernels: Sequence[ArrayLike]) -> Array:
    """The mean of kernels of one size, sum 1 (paper, Figure 5). Raises ValueError for none or unlike sizes."""
    arrays = [np.asarray(kernel, dtype=np.float64) for kernel in kernels]
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"a mean needs kernels of one size, got {[a.shape for a in arrays]}")
    mean = np.mean([a / a.sum() for a in arrays], axis=0)
    return np.asarray(mean, dtype=np.float64)


def _blur(image: Array, kernel: Array) -> Array:
    padded = np.pad(image, [(n // 2,) * 2 for n in kernel.shape], mode="edge")
    return np.asarray(signal.fftconvolve(padded, kernel, mode="valid"))
