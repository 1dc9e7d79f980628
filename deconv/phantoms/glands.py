"""Head and neck: PSMA uptake in salivary and lacrimal glands, with a matching CT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deconv.phantoms.phantom import PAPER_SPACING_MM, Phantom, Scan, assemble
from deconv.phantoms.scanner import triple
from deconv.phantoms.shapes import Organ, render

__all__ = ["head_and_neck"]

# Positions from the middle along (D up, H to the back, W to the left); radii likewise. Uptake as in PSMA PET: salivary
# and lacrimal glands hot and uneven (paper: SUVmax of parotids 16), the rest faint.
_ORGANS = (
    Organ((0, 0, 0), (140, 80, 66), 900.0, 45.0, 0.03, 0.12, 12.0, 40.0),
    Organ((30, 5, 0), (34, 52, 44), 500.0, 35.0, 0.04, 0.05, 6.0, 30.0),        # brain
    Organ((-5, -30, 0), (30, 20, 16), 350.0, -900.0, 0.10, 0.0, 10.0),          # airway, mouth
    Organ((-10, 45, 0), (90, 14, 14), 1_100.0, 320.0, 0.15, 0.15, 120.0, 12.0),  # cervical spine
    Organ((-12, -12, -40), (12, 26, 6), 700.0, 700.0, 0.08, 0.05, 150.0, 14.0),  # mandible, right
    Organ((-12, -12, 40), (12, 26, 6), 700.0, 700.0, 0.08, 0.05, 150.0, 14.0),   # mandible, left
    Organ((-2, 14, -48), (24, 16, 10), 16_000.0, 10.0, 0.15, 0.25, 25.0),       # parotids
    Organ((-2, 14, 48), (24, 16, 10), 15_000.0, 10.0, 0.15, 0.25, 25.0),
    Organ((-30, -14, -27), (12, 13, 8), 15_000.0, 40.0, 0.12, 0.22, 20.0),      # submandibular glands
    Organ((-30, -14, 27), (12, 13, 8), 16_000.0, 40.0, 0.12, 0.22, 20.0),
    Organ((36, -46, -32), (5.5, 7, 4), 9_000.0, 30.0, 0.10, 0.15, 15.0, 10.0),  # lacrimal glands
    Organ((36, -46, 32), (5.5, 7, 4), 8_500.0, 30.0, 0.10, 0.15, 15.0, 10.0),
)


def head_and_neck(
    shape: tuple[int, int, int] = (32, 48, 48),
    *,
    seed: int = 0,
    spacing: Sequence[float] = PAPER_SPACING_MM,
    fwhm_mm: float | Sequence[float] = 6.0,
    skew: float = 0.0,
    skew_axis: int = 2,
    radial: float = 0.0,
    heterogeneity: float = 1.0,
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 4.0,
) -> Phantom:
    """PSMA uptake in irregular, heterogeneous parotid, submandibular and lacrimal glands, with a matching CT.

    Outlines are bumpy by 10 to 15 % of the radius, uptake in the glands varies by about 25 % x `heterogeneity` over
    some 20 mm; 0 makes every organ uniform. Organs scale with the field of view where it is smaller than
    88 x 128 x 128 mm. Other arguments as in `spheres`. Raises ValueError for a negative heterogeneity.
    """
    if heterogeneity < 0:
        raise ValueError(f"heterogeneity must not be negative, got {heterogeneity}")
    scan = Scan(triple(spacing), triple(fwhm_mm), skew, skew_axis, radial, noise, noise_model, noise_fwhm_mm)
    rng = np.random.default_rng(seed)
    extent = np.array(shape) * scan.spacing
    scale = float(min(1.0, np.min(extent / (88.0, 128.0, 128.0))))
    organs = [replace(organ, uptake_variation=heterogeneity * organ.uptake_variation) for organ in _ORGANS]
    truth, hu = render(organs, shape, scan.spacing, scale, rng)
    return assemble(truth, hu, scan, rng, background=_ORGANS[0].activity, name="head and neck")
