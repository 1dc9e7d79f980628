"""The PSF that "best" reads off a real image, blind, against one measured on the same image with known spheres."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deconv import psfnet
from sop.read import read_series

CALIBRATED_MM = (4.41, 3.15, 3.13)  # docs/calibration.md, NEMA IEC phantom, by its six spheres


def test_a_real_scanner_is_read_blind_as_the_spheres_measure_it(shared_data: Path):
    """Taught on random shapes only, it comes within a fifth of the calibration along every axis of a real scanner."""
    files = sorted((shared_data / "nema_iec_minimal_pet").rglob("*.dcm"))
    volume, _ = read_series(files, assume_units="BQML")
    activity = np.maximum(volume.array, 0)
    found = psfnet.read(activity / activity.max(), volume.spacing.tolist())
    assert np.all(np.abs(np.log(np.array(found.fwhm_mm) / CALIBRATED_MM)) < np.log(1.25)), found
