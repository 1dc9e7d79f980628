"""The skew of the PSF, by fitting image and kernel together: the objective itself tells it.

    J(s) = min over x >= 0 of 4 ||P(x ∗ k_s) - y||² + lam TV(x)

For the width of a kernel J is no judge (it always prefers less blur), but for its skew it is: a kernel that leans the
wrong way leaves one side of every edge too steep and the other too flat, and both total variation and the residual pay.
Axis by axis J is followed downhill from 0 in steps and its minimum taken from a parabola.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconv.kernels import skewed
from deconv.members import applied
from deconv.pooled import PooledBlur
from deconv.tv import tv_deconvolve

__all__ = ["found_skew", "joint_objective", "lowest"]

STEP = 0.25
LARGEST = 0.75


def found_skew(
    y: Tensor, fwhm_mm: NDArray[np.float64], spacing: NDArray[np.float64], *, lam: float, iterations: int,
    on_try: Callable[[float], None],
) -> NDArray[np.float64]:
    """(3,) skews of y (d, h, w), maximum 1, for a PSF of fwhm_mm along its axes. on_try is told every J."""
    skew = np.zeros(3)

    def cost(axis: int, value: float) -> float:
        tried = skew.copy()
        tried[axis] = value
        found = joint_objective(y, skewed(fwhm_mm, tried, spacing / 2), spacing, lam, iterations)
        on_try(found)
        return found

    for axis in range(3):
        if y.shape[axis] >= 8:  # thinner: no edge has both its sides
            skew[axis] = lowest(lambda value, axis=axis: cost(axis, value))  # type: ignore[misc]
    return skew


def lowest(cost: Callable[[float], float]) -> float:
    """Where `cost` is least between ± LARGEST: downhill from 0 in steps, then the minimum of a parabola."""
    costs = {0.0: cost(0.0), STEP: cost(STEP), -STEP: cost(-STEP)}
    best = min(costs, key=lambda s: costs[s])
    while abs(best) < LARGEST:
        for beside in (best - STEP, best + STEP):
            if beside not in costs:
                costs[beside] = cost(beside)
        lower = min((best - STEP, best + STEP), key=lambda s: costs[s])
        if costs[lower] >= costs[best]:
            left, middle, right = costs[best - STEP], costs[best], costs[best + STEP]
            curvature = left - 2 * middle + right
            return best + 0.5 * STEP * (left - right) / curvature if curvature > 0 else best
        best = lower
    return best


def joint_objective(
    y: Tensor, kernel: NDArray[np.float32], spacing: NDArray[np.float64], lam: float, iterations: int
) -> float:
    """J of the module for y (d, h, w) with maximum 1 and a kernel on the fine grid."""
    x = tv_deconvolve(y, kernel, kernel_grid="fine", lam=lam, iterations=iterations, spacing=spacing.tolist())
    residual = applied(PooledBlur(y.shape, kernel, kernel_grid="fine", device=y.device), x) - y
    squares = torch.zeros_like(x)
    for axis in range(3):
        slope = x.diff(dim=axis) * float(spacing.min() / spacing[axis])
        squares += torch.cat([slope, torch.zeros_like(x.narrow(axis, 0, 1))], dim=axis).square()
    return float(4 * residual.square().sum() + lam * squares.sqrt().sum())
