"""The instance that the acceptance test stores: one synthetic PET slice that says so in every name it has.

It is DERIVED, so that no node that gets it back by auto-routing takes it for a patient's series, and the same bytes
under the same UIDs at every test: a destination holds one such instance of a node, however often it is tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from pydicom import dcmread

from deconv.volume import Volume
from dicomnode.config import Config
from sop.phantom import write_phantom

__all__ = ["PATIENT_NAME", "Phantom", "write"]

PATIENT_NAME = "ACCEPTANCE^PHANTOM"
MADE = datetime(2024, 1, 1, 12, 0, 0)
SHAPE, SPACING_MM = (2, 16, 16), (4.0, 4.0, 4.0)


@dataclass(frozen=True)
class Phantom:
    """The file and what identifies it."""

    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str


def write(folder: Path, config: Config) -> Phantom:
    """Write the instance of this node into `folder`."""
    array = np.zeros(SHAPE, np.float32)
    array[:, 6:10, 6:10] = 10_000.0
    volume = Volume.axial(array, spacing=SPACING_MM, origin=(0.0, 0.0, 0.0), unit="Bq/ml")
    study = write_phantom(folder, volume, None, name=f"acceptance {config.node.ae_title}", now=MADE,
                          suv_1_bqml=5000.0, uid_root=config.node.uid_root)
    ds = dcmread(study.pet[0])
    ds.PatientName, ds.PatientID, ds.AccessionNumber = PATIENT_NAME, "ACCEPTANCE", "ACCEPTANCE"
    ds.StudyDescription = ds.SeriesDescription = "ACCEPTANCE TEST, synthetic"
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.NumberOfSlices = 1
    path = folder / "acceptance.dcm"
    ds.save_as(path, enforce_file_format=True)
    return Phantom(path, str(ds.SOPClassUID), str(ds.SOPInstanceUID), study.study_uid, study.pet_series_uid)
