"""Synthetic data sets for tests: a PET with a hot sphere, a CT of the same study, and the same as enhanced objects.

Everything is deterministic: `seed` chooses the study (its UIDs and its noise), `series` tells series of one kind in a
study apart. Patients are phantoms. Any attribute is overridden by keyword: pet_series(PatientWeight="80").
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
# Rows run along (0, 0.8, -0.6): an oblique slice.
OBLIQUE = (0.8, 0.36, 0.48, 0.0, 0.8, -0.6)

MANUFACTURERS = {"GE": "GE MEDICAL SYSTEMS", "SIEMENS": "SIEMENS", "PHILIPS": "Philips"}
MODELS = {"GE": "Discovery ST", "SIEMENS": "Biograph 64", "PHILIPS": "Ingenuity TF PET/CT"}


def make_uid(*names: object) -> UID:
    """A UID under 2.25 that depends on the names alone."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:15], 'big')}")


def decimal(value: float) -> str:
    """A number as DS: at most 16 characters."""
    for digits in range(16, 0, -1):
        text = f"{value:.{digits}g}"
        if len(text) <= 16:
            return text
    raise ValueError(f"{value} does not fit in a DS")


def normal(orientation: Sequence[float]) -> NDArray[np.float64]:
    """Unit normal row x column."""
    return np.cross(orientation[:3], orientation[3:])


def sphere_image(shape: tuple[int, int, int], *, seed: int = 0, hot: float = 40000.0) -> NDArray[np.float64]:
    """Background 2000 with 5 % noise and a hot sphere off the centre, so that no axis can be flipped unseen."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    centre = np.array(shape) * (0.4, 0.55, 0.35)
    inside = np.linalg.norm(grid - centre, axis=-1) < max(1.5, 0.2 * min(shape))
    return np.where(inside, hot, 2000.0) * rng.normal(1.0, 0.05, shape).clip(0.5, 1.5)


def pet_series(
    *,
    slices: int = 8,
    rows: int = 16,
    columns: int = 14,
    spacing: tuple[float, float, float] = (3.27, 4.6875, 4.6875),
    origin: tuple[float, float, float] = (-30.0, -40.0, -100.0),
    orientation: Sequence[float] = AXIAL,
    vendor: str = "GE",
    units: str | None = "BQML",
    values: ArrayLike | None = None,
    per_slice_slopes: bool = True,
    intercept: float = 0.0,
    signed: bool = True,
    missing: Sequence[int] = (),
    duplicates: Sequence[int] = (),
    lateral_mm: float = 0.0,
    time_slices: int = 1,
    gated: bool = False,
    attenuation_corrected: bool = True,
    seed: int = 0,
    series: int = 0,
    **attributes: Any,
) -> list[Dataset]:
    """A PET series, slices in increasing position along the normal; each data set has file meta and can be saved.

    spacing        mm along slice, row, column index; origin is the centre of the first voxel of the first slice.
    vendor         "GE" (with the scan date-time in its private block), "SIEMENS" or "PHILIPS" (with CNTS: the private
                   factors for Bq/ml and SUV).
    values         (slices, rows, columns) in `units`; by default a sphere.
    missing        slice indices left out; NumberOfSlices still counts them.
    duplicates     slice indices that come a second time under another SOP Instance UID at the same place.
    lateral_mm     each slice moved aside by this much more along the row direction: a sheared stack.
    time_slices    more than one makes a DYNAMIC series of that many frames.
    attributes     set on every data set last; None removes the attribute.
    """
    shape = (slices, rows, columns)
    image = np.asarray(sphere_image(shape, seed=seed) if values is None else values, dtype=np.float64)
    if image.shape != shape:
        raise ValueError(f"values have shape {image.shape}, not {shape}")
    result = []
    for frame in range(time_slices):
        for index in range(slices):
            ds = _pet_header(seed, series, vendor, units, attenuation_corrected)
            _plane(ds, index, spacing, origin, orientation, lateral_mm)
            number = frame * slices + index + 1
            ds.SOPInstanceUID = make_uid("pet", seed, series, number)
            ds.InstanceNumber, ds.ImageIndex = number, number
            ds.NumberOfSlices = slices
            _times(ds, index, slices, frame)
            if time_slices > 1:
                ds.SeriesType, ds.NumberOfTimeSlices = ["DYNAMIC", "IMAGE"], time_slices
            if gated:
                ds.SeriesType = ["GATED", "IMAGE"]
            top = image[index] if per_slice_slopes else image
            _pixels(ds, image[index], intercept, signed, top=float(np.abs(top - intercept).max()))
            _finish(ds, attributes)
            result.append(ds)
    copies = [copy.deepcopy(result[index]) for index in duplicates]
    for ds in copies:
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = make_uid("again", ds.SOPInstanceUID)
    return [ds for index, ds in enumerate(result) if index % slices not in missing] + copies


def ct_series(
    *,
    slices: int = 12,
    rows: int = 24,
    columns: int = 24,
    spacing: tuple[float, float, float] = (3.27, 4.0, 4.0),
    origin: tuple[float, float, float] = (-35.0, -45.0, -105.0),
    orientation: Sequence[float] = AXIAL,
    values: ArrayLike | None = None,
    bits_stored: int = 12,
    seed: int = 0,
    series: int = 0,
    **attributes: Any,
) -> list[Dataset]:
    """A CT series of the same study and frame of reference as `pet_series(seed=seed)`, covering it; values in HU."""
    shape = (slices, rows, columns)
    image = np.asarray(_water_cylinder(shape) if values is None else values, dtype=np.float64)
    result = []
    for index in range(slices):
        ds = _study(seed)
        ds.SOPClassUID, ds.Modality = uid.CTImageStorage, "CT"
        ds.SOPInstanceUID = make_uid("ct", seed, series, index)
        ds.SeriesInstanceUID, ds.SeriesNumber = make_uid("ct series", seed, series), 2 + series
        ds.SeriesDescription, ds.ImageType = "CT AC", ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Manufacturer = MANUFACTURERS["GE"]
        ds.KVP, ds.AcquisitionNumber, ds.RescaleType = "120", 1, "HU"
        ds.AcquisitionDate, ds.AcquisitionTime = "20200102", "110900"
        _plane(ds, index, spacing, origin, orientation, 0.0)
        ds.InstanceNumber = index + 1
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits_stored, bits_stored - 1, 0
        ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
        stored = np.clip(np.round(image[index] + 1024), 0, 2**bits_stored - 1).astype("<u2")
        ds.Rows, ds.Columns, ds.PixelData = rows, columns, stored.tobytes()
        _finish(ds, attributes)
        result.append(ds)
    return result


def nm_tomo(*, slices: int = 6, rows: int = 8, columns: int = 10, step_mm: float = -4.0, seed: int = 0,
            **attributes: Any) -> Dataset:
    """A reconstructed Tc-99m SPECT in one multi-frame instance; a negative step stacks against the normal."""
    ds = _study(seed)
    ds.SOPClassUID, ds.Modality = uid.NuclearMedicineImageStorage, "NM"
    ds.SOPInstanceUID, ds.SeriesInstanceUID = make_uid("nm", seed), make_uid("nm series", seed)
    ds.ImageType = ["DERIVED", "PRIMARY", "RECON TOMO", "EMISSION"]
    ds.NumberOfFrames = ds.NumberOfSlices = slices
    ds.SliceVector = list(range(1, slices + 1))
    ds.FrameIncrementPointer = 0x00540080
    ds.PixelSpacing, ds.SliceThickness, ds.SpacingBetweenSlices = ["4", "4"], "4", decimal(step_mm)
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = ["-20", "-16", "50"], list(map(decimal, AXIAL))
    ds.DetectorInformationSequence = [detector]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    stored = np.round(sphere_image((slices, rows, columns), seed=seed) / 100).astype("<u2")
    ds.PixelData = stored.tobytes()
    _finish(ds, attributes)
    return ds


def enhanced_pet(*, units: str = "BQML", **options: Any) -> Dataset:
    """The series `pet_series(**options)` as one Enhanced PET instance, its unit as a real world value mapping.

    Times follow the enhanced rules: decay is corrected to DecayCorrectionDateTime, the dose is in MBq.
    """
    classic = pet_series(units=units, **options)
    ds = _packed(classic, uid.EnhancedPETImageStorage)
    first = classic[0]
    kind = str(first.SeriesType[0])
    ds.ImageType = ["ORIGINAL", "PRIMARY", kind.replace(" ", "_"), "NONE"]
    for keyword in ("SeriesType", "Units", "CountsSource", "CorrectedImage", "DecayCorrection", "NumberOfSlices",
                    "ImageIndex", "FrameReferenceTime", "ActualFrameDuration", "AcquisitionTime", "AcquisitionDate",
                    "NumberOfTimeSlices"):
        if keyword in ds:
            del ds[keyword]
    ds.AcquisitionDateTime = f"{first.SeriesDate}{first.SeriesTime}"
    ds.DecayCorrected, ds.DecayCorrectionDateTime = "YES", f"{first.SeriesDate}{first.SeriesTime}"
    ds.AttenuationCorrected = "YES" if "ATTN" in first.CorrectedImage else "NO"
    ds.ScatterCorrected = ds.RandomsCorrected = ds.DeadTimeCorrected = "YES"
    tracer = ds.RadiopharmaceuticalInformationSequence[0]
    tracer.RadionuclideTotalDose = decimal(float(tracer.RadionuclideTotalDose) / 1e6)
    del tracer.RadiopharmaceuticalStartTime
    code = {"BQML": "Bq/ml", "GML": "g/ml{SUVbw}", "CNTS": "{counts}"}[units]
    start = int(first.SeriesTime[:2]) * 3600 + int(first.SeriesTime[2:4]) * 60 + int(first.SeriesTime[4:6])
    for item, groups in zip(classic, ds.PerFrameFunctionalGroupsSequence):
        groups.RealWorldValueMappingSequence = [_mapping(item, code)]
        groups.PixelValueTransformationSequence[0].RescaleSlope = "1"
        groups.PixelValueTransformationSequence[0].RescaleIntercept = "0"
        content = Dataset()
        content.FrameAcquisitionDateTime = f"{item.AcquisitionDate}{item.AcquisitionTime}"
        second = start + round(float(item.FrameReferenceTime) / 1000)
        clock = f"{second // 3600:02d}{second // 60 % 60:02d}{second % 60:02d}"
        content.FrameReferenceDateTime = item.SeriesDate + clock
        content.FrameAcquisitionDuration = float(item.ActualFrameDuration)
        groups.FrameContentSequence = [content]
    return ds


def enhanced_ct(**options: Any) -> Dataset:
    """The series `ct_series(**options)` as one Enhanced CT instance."""
    ds = _packed(ct_series(**options), uid.EnhancedCTImageStorage)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    return ds


def _packed(classic: Sequence[Dataset], sop_class: UID) -> Dataset:
    ds = copy.deepcopy(classic[0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.SOPInstanceUID = make_uid("enhanced", classic[0].SOPInstanceUID)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    shared = Dataset()
    shared.PlaneOrientationSequence = [_moved(ds, ["ImageOrientationPatient"])]
    shared.PixelMeasuresSequence = [_moved(ds, ["PixelSpacing", "SliceThickness"])]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for item in classic:
        groups = Dataset()
        groups.PlanePositionSequence = [_copied(item, ["ImagePositionPatient"])]
        groups.PixelValueTransformationSequence = [_copied(item, ["RescaleSlope", "RescaleIntercept"])]
        groups.PixelValueTransformationSequence[0].RescaleType = "HU" if ds.Modality == "CT" else "US"
        ds.PerFrameFunctionalGroupsSequence.append(groups)
    for keyword in ("ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "RescaleType", "SliceLocation"):
        if keyword in ds:
            del ds[keyword]
    ds.NumberOfFrames = len(classic)
    ds.PixelData = b"".join(item.PixelData for item in classic)
    return ds


def _copied(source: Dataset, keywords: Sequence[str]) -> Dataset:
    item = Dataset()
    for keyword in keywords:
        if keyword in source:
            item[keyword] = source[keyword]
    return item


def _moved(source: Dataset, keywords: Sequence[str]) -> Dataset:
    item = _copied(source, keywords)
    for keyword in keywords:
        if keyword in source:
            del source[keyword]
    return item


def _mapping(item: Dataset, code: str) -> Dataset:
    unit = Dataset()
    unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = code, "UCUM", code
    mapping = Dataset()
    mapping.LUTLabel, mapping.LUTExplanation = "QUANTITY", "quantity"
    mapping.RealWorldValueSlope = float(item.RescaleSlope)
    mapping.RealWorldValueIntercept = float(item.RescaleIntercept)
    mapping.MeasurementUnitsCodeSequence = [unit]
    return mapping


def _study(seed: int) -> Dataset:
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.StudyInstanceUID, ds.FrameOfReferenceUID = make_uid("study", seed), make_uid("frame", seed)
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20200102"
    ds.StudyTime, ds.SeriesTime, ds.ContentTime = "110000", "111000", "112500"
    ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "1", "", ""
    ds.StudyDescription, ds.PositionReferenceIndicator = "Synthetic phantom", ""
    ds.PatientName, ds.PatientID = "Phantom^Synthetic", f"PHANTOM-{seed}"
    ds.PatientBirthDate, ds.PatientSex, ds.PatientPosition = "", "M", "HFS"
    ds.PatientWeight, ds.PatientSize = "71.0", "1.63"
    ds.BodyPartExamined = "CHEST"
    return ds


def _pet_header(seed: int, series: int, vendor: str, units: str | None, attenuation_corrected: bool) -> Dataset:
    ds = _study(seed)
    ds.SOPClassUID, ds.Modality = uid.PositronEmissionTomographyImageStorage, "PT"
    ds.SeriesInstanceUID, ds.SeriesNumber = make_uid("pet series", seed, series), 5 + series
    ds.SeriesDescription = "PET AC" if attenuation_corrected else "PET NAC"
    ds.ImageType, ds.SeriesType = ["ORIGINAL", "PRIMARY"], ["WHOLE BODY", "IMAGE"]
    ds.Manufacturer, ds.ManufacturerModelName = MANUFACTURERS[vendor], MODELS[vendor]
    del ds.PatientPosition  # excluded by PatientOrientationCodeSequence [PS3.3 C.7.3.1.1.2]
    if units is not None:
        ds.Units = units
    ds.CountsSource, ds.DecayCorrection, ds.CollimatorType = "EMISSION", "START", "NONE"
    ds.CorrectedImage = ["DECY", "ATTN", "SCAT", "RAN"] if attenuation_corrected else ["DECY", "RAN"]
    ds.PatientOrientationCodeSequence, ds.PatientGantryRelationshipCodeSequence = [], []
    ds.RandomsCorrectionMethod, ds.ReconstructionMethod = "DLYD", "OSEM"
    ds.DecayFactor, ds.DeadTimeFactor, ds.ScatterFractionFactor = "1.01", "1.1", "0.3"
    ds.DoseCalibrationFactor, ds.ReconstructionDiameter = "1", "600"
    tracer = Dataset()
    tracer.Radiopharmaceutical = "FDG -- fluorodeoxyglucose"
    tracer.RadiopharmaceuticalStartTime = "101000"
    tracer.RadiopharmaceuticalStartDateTime = "20200102101000"
    tracer.RadionuclideTotalDose, tracer.RadionuclideHalfLife = "370000000", "6586.2"
    tracer.RadionuclidePositronFraction = "0.97"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "C-111A1", "SRT", "^18^Fluorine"
    tracer.RadionuclideCodeSequence = [code]
    ds.RadiopharmaceuticalInformationSequence = [tracer]
    if vendor == "GE":
        block = ds.private_block(0x0009, "GEMS_PETD_01", create=True)
        block.add_new(0x0D, "DT", "20200102111000.00")
    if vendor == "PHILIPS":
        block = ds.private_block(0x7053, "Philips PET Private Group", create=True)
        block.add_new(0x00, "DS", "0.0002683712")
        block.add_new(0x09, "DS", "2.134638")
    return ds


def _plane(ds: Dataset, index: int, spacing: Sequence[float], origin: Sequence[float], orientation: Sequence[float],
           lateral_mm: float) -> None:
    along = normal(orientation)
    position = np.array(origin) + index * (spacing[0] * along + lateral_mm * np.array(orientation[:3]))
    ds.ImagePositionPatient = [decimal(value) for value in position]
    ds.ImageOrientationPatient = [decimal(value) for value in orientation]
    ds.PixelSpacing = [decimal(spacing[1]), decimal(spacing[2])]
    ds.SliceThickness, ds.SliceLocation = decimal(spacing[0]), decimal(float(position @ along))


def _times(ds: Dataset, index: int, slices: int, frame: int) -> None:
    """Two bed positions of two minutes each, one after the other; frames in time follow."""
    bed = 2 * index // slices + 2 * frame
    minute = 10 + 2 * bed
    ds.AcquisitionDate = "20200102"
    ds.AcquisitionTime = f"{11 + minute // 60:02d}{minute % 60:02d}00"
    ds.FrameReferenceTime, ds.ActualFrameDuration = str(120000 * bed + 60000), "120000"


def _pixels(ds: Dataset, image: NDArray[np.float64], intercept: float, signed: bool, *, top: float) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = image.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, int(signed)
    ds.RescaleSlope, ds.RescaleIntercept = decimal(top / 32767 or 1.0), decimal(intercept)
    stored = np.round((image - intercept) / float(ds.RescaleSlope))
    limits = (-32768, 32767) if signed else (0, 65535)
    ds.PixelData = np.clip(stored, *limits).astype("<i2" if signed else "<u2").tobytes()


def _water_cylinder(shape: tuple[int, int, int]) -> NDArray[np.float64]:
    row = np.arange(shape[1])[:, None] - shape[1] / 2
    column = np.arange(shape[2])[None, :] - shape[2] / 2
    water = row**2 + column**2 < (0.4 * min(shape[1:])) ** 2
    return np.broadcast_to(np.where(water, 30.0, -1000.0), shape).copy()


def _finish(ds: Dataset, attributes: dict[str, Any]) -> None:
    for keyword, value in attributes.items():
        if value is None:
            if keyword in ds:
                del ds[keyword]
        else:
            setattr(ds, keyword, value)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta.ImplementationClassUID = UID("2.25.1")
