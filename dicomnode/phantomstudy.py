"""A digital phantom with its CT, written as a PET+CT study: for the demo, for tests, for trying a route."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

from deconv.phantoms import PHANTOMS, Phantom, average_pool
from deconv.volume import Volume
from dicomnode.errors import ConfigError
from sop.phantom import PhantomStudy, write_phantom

__all__ = ["make", "write"]

SCANNED = datetime(2024, 1, 1, 12, 0, 0)  # a phantom has no date; a fixed one makes it repeatable
WATER_HU, PLASTIC_HU, NOISE_HU = 0.0, 120.0, 12.0


def make(kind: str, *, size: tuple[int, int, int] | None = None, seed: int = 0, fwhm_mm: float = 6.0,
         noise: float = 0.0) -> Phantom:
    """A phantom with a CT. `size` (D, H, W) in PET voxels; None for the kind's own.

    Raises ConfigError for an unknown kind or a size in which it does not fit.
    """
    if kind not in PHANTOMS:
        raise ConfigError(f"no phantom {kind!r}; there are {', '.join(PHANTOMS)}")
    arguments = {"seed": seed, "fwhm_mm": fwhm_mm, "noise": noise}
    try:
        phantom = PHANTOMS[kind](**arguments) if size is None else PHANTOMS[kind](size, **arguments)
    except ValueError as error:
        raise ConfigError(f"phantom {kind}: {error}. Remedy: another --size.") from error
    return phantom if phantom.ct is not None else replace(phantom, ct=_water_with_plastic_spheres(phantom, seed))


def write(phantom: Phantom, folder: Path, *, seed: int) -> PhantomStudy:
    """Write `phantom` as DICOM into folder/PET and folder/CT, and what is known about it into folder/phantom.json."""
    d, h, w = phantom.measured.shape
    fwhm_mm = phantom.fwhm_mm
    name = f"{phantom.name.removeprefix('synthetic ')} {d}x{h}x{w} {fwhm_mm[0]:g} mm seed {seed}"
    study = write_phantom(folder, phantom.measured, phantom.ct, name=name, now=SCANNED, suv_1_bqml=phantom.background)
    (folder / "phantom.json").write_text(json.dumps({
        "synthetic": True,
        "name": phantom.name,
        "seed": seed,
        "psf_fwhm_mm": list(fwhm_mm),
        "background_bqml": phantom.background,
        "spheres": [{"centre_mm": list(s.centre_mm), "diameter_mm": s.diameter_mm, "activity_bqml": s.activity}
                    for s in phantom.spheres],
        "study": study.study_uid,
        "pet_series": study.pet_series_uid,
        "ct_series": study.ct_series_uid,
    }, indent=2) + "\n", encoding="utf-8")
    return study


def _water_with_plastic_spheres(phantom: Phantom, seed: int) -> Volume:
    """The CT of a water tank with solid plastic spheres, on the PET grid."""
    rng = np.random.default_rng(seed + 1)
    plastic = np.zeros(phantom.measured.shape)
    for sphere in phantom.spheres:
        plastic = np.maximum(plastic, average_pool(phantom.sphere_fraction(sphere)))
    hu = WATER_HU + (PLASTIC_HU - WATER_HU) * plastic + rng.normal(0, NOISE_HU, plastic.shape)
    return phantom.measured.with_array(np.round(hu), unit="[hnsf'U]")
