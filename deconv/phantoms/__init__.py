"""Digital PET phantoms with known truth: spheres, head and neck, whole body. All synthetic, all seeded.

The truth lives on a grid twice as fine as the PET grid and is rendered from analytic shapes by supersampling. The
measurement follows the physics of the scanner, not the model of any method (`deconv.phantoms.scanner`):

    y = P(x ∗ h) + noise,   h the PSF on the fine grid, P the mean over blocks of 2 x 2 x 2 fine voxels.
"""

from __future__ import annotations

from collections.abc import Callable

from deconv.phantoms.glands import head_and_neck
from deconv.phantoms.phantom import PAPER_SPACING_MM, Lesion, Phantom, Sphere
from deconv.phantoms.q3p import spheres
from deconv.phantoms.scanner import NOISE_MODELS, average_pool, measure, psf_kernel
from deconv.phantoms.trunk import whole_body

__all__ = [
    "NOISE_MODELS", "PAPER_SPACING_MM", "PHANTOMS", "Lesion", "Phantom", "Sphere", "average_pool", "head_and_neck",
    "measure", "psf_kernel", "spheres", "whole_body",
]

PHANTOMS: dict[str, Callable[..., Phantom]] = {
    "spheres": spheres, "head-and-neck": head_and_neck, "whole-body": whole_body,
}
