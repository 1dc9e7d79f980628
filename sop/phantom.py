"""A phantom study as DICOM: a PET series, and a CT series on the same frame of reference. It says that it is synthetic.

Everything is a function of its arguments: the same volumes under the same name give the same bytes and the same UIDs,
so that sending a phantom twice is a repeat and not a second study.

IODs: PET Image (PS3.3 A.21, C.8.9), CT Image (A.3, C.8.2).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage

from deconv.volume import Volume
from sop.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, uid_from

__all__ = ["PhantomStudy", "write_phantom"]

WEIGHT_KG = 75.0
HALF_LIFE_S = 6586.2  # F-18, as scanners write it
UPTAKE_S = 3600.0
FRAME_MS = 180_000
SYNTHETIC = "SYNTHETIC"


@dataclass(frozen=True)
class PhantomStudy:
    """A written study: `pet` and `ct` are the files of its series, in increasing position; `ct` may be empty."""

    study_uid: str
    pet_series_uid: str
    ct_series_uid: str | None
    pet: tuple[Path, ...]
    ct: tuple[Path, ...]


def write_phantom(folder: Path, pet: Volume, ct: Volume | None, *, name: str, now: datetime,
                  suv_1_bqml: float, uid_root: str = "2.25") -> PhantomStudy:
    """Write an axial PET (Bq/ml) and its CT (HU) into folder/PET and folder/CT.

    name         of the phantom: in the headers, and what the UIDs are made of, with `now`.
    now          when it is to have been scanned; local time.
    suv_1_bqml   the activity concentration that is to have SUVbw 1: decides the injected dose.

    Raises ValueError for a volume that is not axial, or in another unit.
    """
    _require(pet, "Bq/ml", "PET")
    content = hashlib.sha256(pet.array.tobytes() + (b"" if ct is None else ct.array.tobytes())).hexdigest()
    key = (name, now.isoformat(), f"{suv_1_bqml!r}", content)  # other pixels or headers never under the same UIDs
    study_uid = uid_from(uid_root, "phantom study", *key)
    common = _study(name, now, study_uid, uid_from(uid_root, "phantom frame of reference", *key))
    pet_uid = uid_from(uid_root, "phantom PET", *key)
    pet_slices = [_pet_slice(common, pet, i, now, suv_1_bqml) for i in range(pet.shape[0])]
    pet_files = _write_series(folder / "PET", pet_uid, pet_slices, uid_root)
    if ct is None:
        return PhantomStudy(study_uid, pet_uid, None, pet_files, ())
    _require(ct, "[hnsf'U]", "CT")
    ct_uid = uid_from(uid_root, "phantom CT", *key)
    ct_slices = [_ct_slice(common, ct, i, now) for i in range(ct.shape[0])]
    ct_files = _write_series(folder / "CT", ct_uid, ct_slices, uid_root)
    return PhantomStudy(study_uid, pet_uid, ct_uid, pet_files, ct_files)


def _require(volume: Volume, unit: str, modality: str) -> None:
    if volume.unit != unit:
        raise ValueError(f"the {modality} of a phantom must be in {unit}, got {volume.unit}")
    if not np.allclose(volume.direction, np.eye(3)[:, ::-1]):
        raise ValueError(f"the {modality} of a phantom must be axial, got direction {volume.direction.tolist()}")


def _write_series(folder: Path, series_uid: str, slices: list[Dataset], uid_root: str) -> tuple[Path, ...]:
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index, ds in enumerate(slices):
        ds.SeriesInstanceUID = series_uid
        ds.SOPInstanceUID = UID(uid_from(uid_root, series_uid, str(index)))
        ds.InstanceNumber = index + 1
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
        ds.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
        files.append(folder / f"{ds.Modality}{index + 1:04d}.dcm")
        ds.save_as(files[-1], enforce_file_format=True)
    return tuple(files)


def _study(name: str, now: datetime, study_uid: str, frame_of_reference_uid: str) -> Dataset:
    """What all instances share: Patient, General Study, Patient Study, Frame of Reference, General Equipment."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.PatientName = f"{SYNTHETIC}^Phantom"
    ds.PatientID = f"{SYNTHETIC}-{name.upper().replace(' ', '-')}"[:64]
    ds.PatientBirthDate = ""
    ds.PatientSex = "O"
    ds.PatientWeight = f"{WEIGHT_KG:g}"
    ds.PatientSize = "1.75"
    ds.QualityControlSubject = "YES"
    ds.StudyInstanceUID = study_uid
    ds.StudyDate, ds.StudyTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    ds.StudyID = "1"
    ds.StudyDescription = f"{SYNTHETIC} {name}"[:64]
    ds.AccessionNumber = "PHANTOM"
    ds.ReferringPhysicianName = ""
    ds.FrameOfReferenceUID = frame_of_reference_uid
    ds.PositionReferenceIndicator = ""
    ds.Manufacturer = "dicomnode"
    ds.ManufacturerModelName = "synthetic phantom"
    ds.DeviceSerialNumber = "0"
    ds.SoftwareVersions = "1"
    ds.BodyPartExamined = "HEAD"  # an unpaired part: Laterality is then not asked for
    ds.ImageComments = "Synthetic phantom, no patient"
    ds.QualityControlImage = "YES"
    ds.BurnedInAnnotation = "NO"
    return ds


def _slice(common: Dataset, volume: Volume, index: int, description: str, number: int, when: datetime) -> Dataset:
    """General Series, General Image, Image Plane, Image Pixel."""
    ds = Dataset()
    ds.update(common)
    ds.SeriesNumber = number
    ds.SeriesDescription = f"{SYNTHETIC} {description}"
    date, time = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
    ds.SeriesDate, ds.SeriesTime = date, time
    ds.AcquisitionDate, ds.AcquisitionTime = date, time
    ds.ContentDate, ds.ContentTime = date, time
    ds.AcquisitionNumber = 1
    position = volume.position((index, 0, 0))
    ds.ImagePositionPatient = [_decimal(value) for value in position]
    ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    ds.PixelSpacing = [_decimal(volume.spacing[1]), _decimal(volume.spacing[2])]
    ds.SliceThickness = _decimal(volume.spacing[0])
    ds.SliceLocation = _decimal(position[2])
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = volume.shape[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    return ds


def _pet_slice(common: Dataset, volume: Volume, index: int, now: datetime, suv_1_bqml: float) -> Dataset:
    """PET Series (C.8.9.1), PET Isotope (C.8.9.2), NM/PET Patient Orientation (C.8.4.6), PET Image (C.8.9.4)."""
    ds = _slice(common, volume, index, "PET", 1, now)
    ds.SOPClassUID = PositronEmissionTomographyImageStorage
    ds.Modality = "PT"
    ds.ImageType = ["ORIGINAL", "PRIMARY"]
    ds.SeriesType = ["STATIC", "IMAGE"]
    supine = _code("102538003", "SCT", "recumbent")
    supine.PatientOrientationModifierCodeSequence = Items([_code("40199007", "SCT", "supine")])
    ds.PatientOrientationCodeSequence = Items([supine])
    ds.PatientGantryRelationshipCodeSequence = Items([_code("102540008", "SCT", "headfirst")])
    ds.Units = "BQML"
    ds.CountsSource = "EMISSION"
    ds.NumberOfSlices = volume.shape[0]
    ds.CorrectedImage = ["ATTN", "DECY", "SCAT", "RAN", "DTIM", "NORM"]
    ds.DecayCorrection = "START"
    ds.AttenuationCorrectionMethod = "synthetic"
    ds.ScatterCorrectionMethod = "synthetic"
    ds.RandomsCorrectionMethod = "NONE"
    ds.ReconstructionMethod = "synthetic"
    ds.CollimatorType = "NONE"
    ds.FrameReferenceTime = "0"
    ds.ActualFrameDuration = FRAME_MS
    ds.DecayFactor = "1"
    ds.ImageIndex = index + 1
    ds.RadiopharmaceuticalInformationSequence = Items([_tracer(now, suv_1_bqml)])
    stored, slope = _scaled(volume.array[index])
    ds.RescaleIntercept, ds.RescaleSlope = "0", slope
    ds.PixelData = stored.tobytes()
    return ds


def _tracer(now: datetime, suv_1_bqml: float) -> Dataset:
    start = now - timedelta(seconds=UPTAKE_S)
    item = Dataset()
    item.Radiopharmaceutical = "Fluorodeoxyglucose"
    item.RadiopharmaceuticalVolume = "1"
    item.RadiopharmaceuticalStartTime = start.strftime("%H%M%S")
    item.RadiopharmaceuticalStartDateTime = start.strftime("%Y%m%d%H%M%S")
    item.RadionuclideTotalDose = _decimal(suv_1_bqml * WEIGHT_KG * 1000 * 2 ** (UPTAKE_S / HALF_LIFE_S))
    item.RadionuclideHalfLife = _decimal(HALF_LIFE_S)
    item.RadionuclidePositronFraction = "0.9673"
    item.RadionuclideCodeSequence = Items([_code("77004003", "SCT", "^18^Fluorine")])
    item.RadiopharmaceuticalCodeSequence = Items([_code("35321007", "SCT", "Fluorodeoxyglucose F^18^")])
    return item


def _ct_slice(common: Dataset, volume: Volume, index: int, now: datetime) -> Dataset:
    """CT Image (C.8.2.1)."""
    ds = _slice(common, volume, index, "CT", 2, now - timedelta(minutes=5))
    ds.SOPClassUID = CTImageStorage
    ds.Modality = "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientPosition = "HFS"
    ds.KVP = "120"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "-1024", "1", "HU"
    stored = np.clip(np.rint(volume.array[index]) + 1024, 0, 32767).astype("<i2")
    ds.PixelData = stored.tobytes()
    return ds


def _scaled(plane: NDArray[np.float32]) -> tuple[NDArray[np.int16], str]:
    """Stored values 0..32767 and the RescaleSlope they were divided by, as it will be read."""
    top = float(plane.max())
    slope = _decimal(top / 32767) if top > 0 else "1"
    if float(slope) * 32767 < top:  # rounded down: the top would not fit
        slope = _decimal(top / 32767 * (1 + 1e-9))
    return np.clip(np.rint(plane / float(slope)), 0, 32767).astype("<i2"), slope


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _decimal(value: float) -> str:
    """A DS of at most 16 characters (PS3.5 6.2).

    >>> _decimal(2.73), _decimal(-1 / 3)
    ('2.73', '-0.3333333333')
    """
    return f"{float(value):.10g}"
