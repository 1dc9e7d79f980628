"""Whole body: a trunk with organs, bones and lesions of many shapes, sizes and contrasts, with its CT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deconv.phantoms.phantom import Lesion, Phantom, Scan, Sphere, add, assemble
from deconv.phantoms.scanner import Float3, triple
from deconv.phantoms.shapes import Capsule, Difference, Ellipsoid, Organ, Waves, render

__all__ = ["whole_body"]

FIELD_MM = (640.0, 260.0, 380.0)  # what the trunk fills
NECROSIS_BQML = 600.0

# Positions from the middle along (D up, H to the back, W to the left); radii likewise.
_ORGANS = (
    Organ((0, 0, 0), (900, 110, 165), 900.0, 40.0, 0.04, 0.10, 20.0, 90.0),
    Organ((190, -5, -75), (120, 80, 60), 350.0, -780.0, 0.05, 0.10, 60.0, 50.0),  # lungs
    Organ((190, -5, 75), (120, 80, 60), 350.0, -780.0, 0.05, 0.10, 60.0, 50.0),
    Organ((0, 70, 0), (420, 24, 22), 1_600.0, 260.0, 0.10, 0.20, 120.0, 25.0),   # spine
    Organ((40, -15, -80), (65, 70, 75), 6_000.0, 60.0, 0.08, 0.12, 15.0, 60.0),  # liver
    Organ((50, 35, 105), (45, 35, 24), 5_000.0, 50.0, 0.08, 0.12, 15.0, 40.0),   # spleen
    Organ((-20, 45, -65), (55, 28, 26), 30_000.0, 35.0, 0.08, 0.25, 15.0, 30.0),  # kidneys
    Organ((-15, 45, 70), (55, 28, 26), 30_000.0, 35.0, 0.08, 0.25, 15.0, 30.0),
    Organ((-260, -30, 0), (38, 36, 42), 25_000.0, 8.0, 0.04, 0.02, 5.0, 60.0),   # bladder
)
# centre, diameter mm, Bq/mL
_BALLS: tuple[tuple[Float3, float, float], ...] = (
    ((-230, 20, -60), 12.0, 40_000.0), ((-200, 10, 65), 8.0, 40_000.0), ((-120, 60, 0), 20.0, 20_000.0),
    ((60, 70, 2), 15.0, 40_000.0), ((-80, -10, 25), 10.0, 12_000.0), ((230, 0, -10), 10.0, 40_000.0),
    ((-300, 20, 90), 24.0, 20_000.0), ((150, 75, -100), 18.0, 40_000.0),
)
# name, centre, radii mm, Bq/mL, size of bumps; turned at random
_ELLIPSOIDS: tuple[tuple[str, Float3, Float3, float, float], ...] = (
    ("lobulated metastasis in the liver", (55, -30, -95), (14, 18, 12), 18_000.0, 0.22),
    ("cold cyst in the liver", (20, 5, -58), (11, 12, 10), 1_500.0, 0.05),
    ("flat lesion in the pelvic bone", (-215, 45, 85), (18, 7, 9), 15_000.0, 0.08),
    ("node beside the bladder", (-255, -25, 54), (4, 5, 4), 20_000.0, 0.0),
    ("node beside the left kidney", (-10, 32, 33), (5, 4, 4), 12_000.0, 0.0),
    ("irregular lesion in a vertebra", (110, 68, 0), (12, 14, 16), 22_000.0, 0.20),
    ("upper node of a pair", (-50, 25, -14), (3.5, 3.5, 3.5), 18_000.0, 0.0),
    ("lower node of a pair", (-62, 25, -14), (3.5, 3.5, 3.5), 18_000.0, 0.0),
    ("faint large mass", (-150, -40, 60), (20, 16, 18), 3_000.0, 0.12),
)
# name, both ends, radius mm, Bq/mL
_RODS: tuple[tuple[str, Float3, Float3, float, float], ...] = (
    ("rod in a rib", (120, -60, -110), (100, -84, -75), 4.0, 25_000.0),
    ("rod in the femur", (-306, 30, -75), (-275, 24, -86), 5.0, 30_000.0),
)
_RING: tuple[str, Float3, Float3, float] = ("necrotic ring in the lung", (205, 0, 85), (16, 14, 15), 20_000.0)


def whole_body(
    shape: tuple[int, int, int] = (128, 56, 76),
    *,
    seed: int = 0,
    spacing: Sequence[float] = (5.0, 5.0, 5.0),
    fwhm_mm: float | Sequence[float] = 7.0,
    skew: float = 0.0,
    skew_axis: int = 2,
    radial: float = 0.0,
    noise: float = 0.0,
    noise_model: str = "relative",
    noise_fwhm_mm: float | Sequence[float] = 6.0,
) -> Phantom:
    """A trunk with liver, kidneys, spleen, bladder, lungs and spine, lesions of many shapes, and its CT.

    `spheres` holds eight round lesions of 8 to 24 mm, `lesions` twelve others: ellipsoids, rods in bone, lobulated and
    irregular ones, a ring around a necrosis, nodes beside bladder, kidney and each other, a cold cyst, a faint mass.
    Organs and lesions other than spheres shrink with a field of view smaller than 640 x 260 x 380 mm. Other arguments
    as in `spheres`.
    """
    scan = Scan(triple(spacing), triple(fwhm_mm), skew, skew_axis, radial, noise, noise_model, noise_fwhm_mm)
    rng = np.random.default_rng(seed)
    extent = np.array(shape) * scan.spacing
    scale = float(min(1.0, np.min(extent / FIELD_MM)))
    truth, hu = render(_ORGANS, shape, scan.spacing, scale, rng)
    step = np.array(scan.spacing) / 2

    def place(at: Float3) -> NDArray[np.float64]:
        return np.asarray(extent / 2 + scale * np.array(at) + rng.uniform(-0.5, 0.5, 3) * scan.spacing)

    balls = tuple(Sphere(triple(place(at)), diameter, activity) for at, diameter, activity in _BALLS)
    lesions = []
    for name, at, radii, activity, bumps in _ELLIPSOIDS:
        lesions.append(Lesion(name, _ellipsoid(place(at), scale * np.array(radii), bumps, rng), activity))
    for name, start, end, radius, activity in _RODS:
        shift = place((0, 0, 0))
        rod = Capsule(shift + scale * np.array(start), shift + scale * np.array(end), scale * radius)
        lesions.append(Lesion(name, rod, activity))
    name, at, radii, activity = _RING
    whole = _ellipsoid(place(at), scale * np.array(radii), 0.08, rng)
    core = Ellipsoid(whole.centre + 0.1 * whole.radii, 0.55 * whole.radii, turn=whole.turn)
    add(truth, step, Lesion("necrosis", core, NECROSIS_BQML))
    lesions.append(Lesion(name, Difference(whole, core), activity))
    everything: list[Sphere | Lesion] = [*balls, *lesions]
    for one in everything:
        add(truth, step, one)
    return assemble(truth, hu, scan, rng, spheres=balls, lesions=tuple(lesions), background=_ORGANS[0].activity,
                    name="whole body")


def _ellipsoid(
    centre: NDArray[np.float64], radii: NDArray[np.float64], bumps: float, rng: np.random.Generator
) -> Ellipsoid:
    """An ellipsoid turned at random, with bumps about as long as it is thick."""
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    return Ellipsoid(centre, radii, Waves.random(rng, max(1.2 * float(radii.min()), 3.0)), bumps, turn)
