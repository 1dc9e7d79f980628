"""How well a phantom came back: figures against its known truth, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from deconv.interpolate import doubled
from deconv.metrics import activity_change, kernel_fwhm_mm, kernel_inner_product, nrmse, recovery_coefficients
from deconv.phantoms import Phantom, average_pool, psf_kernel
from deconv.volume import Volume

__all__ = ["before_on_fine_grid", "figures", "true_kernel"]


def before_on_fine_grid(source: Volume) -> NDArray[np.float32]:
    """(2D, 2H, 2W): the source as a viewer would show it on the doubled grid, by cubic interpolation."""
    return doubled(source.array)


def true_kernel(phantom: Phantom) -> NDArray[np.float64]:
    """(d, h, w), sum 1: the Gaussian on the PET grid that makes the measurement from the true image, y = x↓ ∗ k.

    The phantom was blurred on the fine grid and averaged afterwards; a kernel that acts on the averaged image is
    neither the PSF sampled nor the PSF integrated over voxels but in between. Its one width is fitted to the truth.
    """
    pooled, y = average_pool(phantom.truth.array.astype(np.float64)), phantom.measured.array

    def kernel(width_mm: float) -> NDArray[np.float64]:
        return psf_kernel(width_mm, tuple(phantom.measured.spacing), size=phantom.psf.shape[0])

    def misfit(width_mm: float) -> float:
        image, k = pooled, kernel(width_mm)
        for axis in range(3):
            profile = k.sum(axis=tuple(other for other in range(3) if other != axis))
            image = ndimage.convolve1d(image, profile, axis=axis, mode="nearest")
        return float(((image - y) ** 2).sum())

    return kernel(float(optimize.minimize_scalar(misfit, bounds=(1.0, 15.0), method="bounded").x))


def figures(phantom: Phantom, source: Volume, derived: Volume, kernel: NDArray[np.float32] | None, *,
            suv_factor: float) -> dict[str, Any]:
    """Recovery per sphere, NRMSE, activity, SUVmax and kernel, before (interpolated source) and after.

    suv_factor    SUVbw = Bq/ml x suv_factor.
    """
    before = before_on_fine_grid(source)
    rows = zip(recovery_coefficients(before, phantom), recovery_coefficients(derived.array, phantom), strict=True)
    spacing, true = tuple(float(step) for step in source.spacing), true_kernel(phantom)
    return {
        "spheres": [{"diameter_mm": a.diameter_mm, "before": asdict(a), "after": asdict(b)} for a, b in rows],
        "nrmse": {"before": nrmse(before, phantom.truth.array), "after": nrmse(derived.array, phantom.truth.array)},
        "activity_change": activity_change(derived.array, source.array),
        "suv_max": {"before": float(source.array.max()) * suv_factor, "after": float(derived.array.max()) * suv_factor,
                    "truth": float(phantom.truth.array.max()) * suv_factor},
        "kernel_fwhm_mm": None if kernel is None else [round(w, 3) for w in kernel_fwhm_mm(kernel, spacing)],
        "true_fwhm_mm": [round(w, 3) for w in kernel_fwhm_mm(true, spacing)],
        "kernel_inner_product": None if kernel is None else kernel_inner_product(kernel, true),
    }
