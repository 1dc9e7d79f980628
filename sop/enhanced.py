"""Enhanced multi-frame PET and CT: each frame becomes a slice with a classic-equivalent header.

A classic PET instance says in one place what an Enhanced PET [PS3.3 A.56] says in functional groups, so the groups are
laid flat and translated [C.8.22 to C.8.9]:
    real world value mapping with its UCUM unit   -> Units, RescaleSlope, RescaleIntercept
    DecayCorrectionDateTime                       -> DecayCorrection; ADMIN where it is the injection, else START with
                                                     that moment as Series Date and Time, the reference of START
    FrameAcquisitionDateTime, FrameReferenceDateTime, FrameAcquisitionDuration
                                                  -> Acquisition Date and Time, FrameReferenceTime, ActualFrameDuration
    AttenuationCorrected and its like             -> CorrectedImage
    RadionuclideTotalDose in MBq [C.8.22.4]       -> in Bq [C.8.9.2]
"""

from __future__ import annotations

import copy
from datetime import datetime
from pathlib import Path

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from sop.errors import Refused
from sop.header import decimal_string, integer, items, numbers, put, raw_elements, text, texts, without_pixels
from sop.series import Slice
from sop.times import parse_date, parse_datetime, parse_time

__all__ = ["enhanced_slices"]

RESEND = "send the image again from the scanner"

MULTIFRAME_ONLY = (
    "NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence",
    "DimensionOrganizationSequence", "DimensionOrganizationType", "ContentQualification", "VolumetricProperties",
    "VolumeBasedCalculationTechnique", "ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber",
    "ConcatenationFrameOffsetNumber", "SOPInstanceUIDOfConcatenationSource",
)
# Groups whose attributes have the same keyword in the classic image.
FLAT_GROUPS = ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
               "PixelValueTransformationSequence", "PETFrameCorrectionFactorsSequence")
CORRECTIONS = {
    "DecayCorrected": "DECY", "AttenuationCorrected": "ATTN", "ScatterCorrected": "SCAT", "DeadTimeCorrected": "DTIM",
    "GantryMotionCorrected": "MOTN", "PatientMotionCorrected": "PMOT", "CountLossNormalizationCorrected": "CLN",
    "RandomsCorrected": "RAN", "NonUniformRadialSamplingCorrected": "RADL", "SensitivityCalibrated": "DCAL",
    "DetectorNormalizationCorrection": "NORM",
}
# UCUM code of the mapping, in the order of preference -> Units, SUVType, factor to those Units.
MAPPED_UNITS = {
    "Bq/ml": ("BQML", "", 1.0), "Bq/mL": ("BQML", "", 1.0), "kBq/ml": ("BQML", "", 1e3), "kBq/mL": ("BQML", "", 1e3),
    "g/ml{SUVbw}": ("GML", "BW", 1.0), "{SUVbw}g/ml": ("GML", "BW", 1.0),
    "g/ml{SUVlbm}": ("GML", "LBM", 1.0), "{SUVlbm}g/ml": ("GML", "LBM", 1.0),
    "{SUVlbm(Janma)}g/ml": ("GML", "LBMJANMA", 1.0), "{SUVibw}g/ml": ("GML", "IBW", 1.0),
    "cm2/ml{SUVbsa}": ("CM2ML", "BSA", 1.0), "{SUVbsa}cm2/ml": ("CM2ML", "BSA", 1.0),
    "{counts}": ("CNTS", "", 1.0), "{counts}/s": ("CPS", "", 1.0),
}
# In MBq this would be 100 GBq, in Bq 0.1 MBq: no number in between is either dose, so the unit is told by the size.
LARGEST_DOSE_MBQ = 1e5


def enhanced_slices(header: Dataset, path: Path | None) -> list[Slice]:
    """One Slice per frame, in frame order. Raises Refused "malformed", "concatenation",
    "units-unsupported"."""
    frames = integer(header, "NumberOfFrames", default=1)
    shared = items(header, "SharedFunctionalGroupsSequence") or [Dataset()]
    each = items(header, "PerFrameFunctionalGroupsSequence")
    if len(each) != frames:
        reason = f"PerFrameFunctionalGroupsSequence has {len(each)} items for {frames} frames"
        raise Refused("malformed", reason, RESEND)
    if integer(header, "InConcatenationTotalNumber", default=1) > 1:
        raise Refused("concatenation", "the image comes in parts (concatenation)", "send it as one instance")
    common = without_pixels(header)
    for keyword in (*MULTIFRAME_ONLY, *CORRECTIONS, "DecayCorrectionDateTime"):
        common.pop(Tag(keyword), None)
    pet = text(header, "SOPClassUID") == uid.EnhancedPETImageStorage
    if pet:
        _classic_pet(common, header, frames)
    else:
        put(common, SOPClassUID=uid.CTImageStorage)
    return [_slice(common, header, path, number, shared[0], groups, pet) for number, groups in enumerate(each, start=1)]


def _slice(common: Dataset, header: Dataset, path: Path | None, number: int, shared: Dataset, groups: Dataset,
           pet: bool) -> Slice:
    single = without_pixels(common)
    put(single, InstanceNumber=number)
    for name in FLAT_GROUPS:
        single.update(raw_elements(_group(name, shared, groups)))
    _frame_times(single, _group("FrameContentSequence", shared, groups))
    if pet:
        put(single, ImageIndex=number)
        kind = text(_group("PETFrameTypeSequence", shared, groups), "FrameType")
        if kind and "SeriesType" not in single:
            put(single, SeriesType=_series_type(kind))
        mappings = "RealWorldValueMappingSequence"
        mapping = _mapping(items(groups, mappings) or items(shared, mappings))
    else:
        mapping = None
    slope, intercept = mapping[:2] if mapping else (numbers(single, "RescaleSlope", 1)[0],
                                                    numbers(single, "RescaleIntercept", 1)[0])
    if mapping:
        put(single, RescaleSlope=decimal_string(slope), RescaleIntercept=decimal_string(intercept))
        single.pop(Tag("RescaleType"), None)
        put(single, Units=mapping[2])
        if mapping[3]:
            put(single, SUVType=mapping[3])
    x, y, z = numbers(single, "ImagePositionPatient", 3)
    return Slice(single, path, text(header, "SOPClassUID"), text(header, "SOPInstanceUID"), number, (x, y, z),
                 slope, intercept)


def _group(name: str, shared: Dataset, groups: Dataset) -> Dataset:
    """The item of a functional group of this frame, or of all frames; empty where there is none."""
    found = items(groups, name) or items(shared, name)
    return found[0] if found else Dataset()


def _mapping(mappings: list[Dataset]) -> tuple[float, float, str, str] | None:
    """Slope, intercept, Units, SUVType of the most useful linear mapping; None where there are no mappings."""
    if not mappings:
        return None
    found: dict[str, Dataset] = {}
    for item in mappings:
        unit = items(item, "MeasurementUnitsCodeSequence")
        code = text(unit[0], "CodeValue") if unit else ""
        if code in MAPPED_UNITS and text(item, "RealWorldValueSlope"):
            found.setdefault(code, item)
    for code, (units, suv_type, factor) in MAPPED_UNITS.items():
        if code in found:
            slope = numbers(found[code], "RealWorldValueSlope", 1)[0]
            intercept = numbers(found[code], "RealWorldValueIntercept", 1)[0]
            return slope * factor, intercept * factor, units, suv_type
    raise Refused("units-unsupported", "no real world value mapping gives Bq/ml, an SUV or counts",
                  "send the series with Bq/ml")


def _series_type(image_type: str) -> list[str]:
    """SeriesType from ImageType of an enhanced image, whose value 3 says how the frames belong together."""
    for word, kind in (("DYNAMIC", "DYNAMIC"), ("GATED", "GATED"), ("WHOLE_BODY", "WHOLE BODY"), ("STATIC", "STATIC")):
        if word in image_type.upper():
            return [kind, "IMAGE"]
    return ["STATIC", "IMAGE"]


def _classic_pet(common: Dataset, header: Dataset, frames: int) -> None:
    """Series-level attributes of a classic PET, in place of those of the enhanced one."""
    image_type = texts(header, "ImageType")
    put(common, SOPClassUID=uid.PositronEmissionTomographyImageStorage)
    put(common, ImageType=["DERIVED" if image_type[:1] == ("DERIVED",) else "ORIGINAL", "PRIMARY"])
    if "MIXED" not in text(header, "ImageType").upper():
        put(common, SeriesType=_series_type(text(header, "ImageType")))
    put(common, NumberOfSlices=frames)
    if not text(common, "CountsSource"):
        put(common, CountsSource="EMISSION")
    done = [code for keyword, code in CORRECTIONS.items() if text(header, keyword).upper() == "YES"]
    put(common, CorrectedImage=done)
    tracers = [_classic_tracer(item) for item in items(header, "RadiopharmaceuticalInformationSequence")]
    put(common, RadiopharmaceuticalInformationSequence=tracers)
    injected = {_moment(item, "RadiopharmaceuticalStartDateTime") for item in tracers}
    corrected_to = _moment(header, "DecayCorrectionDateTime")
    if text(header, "DecayCorrected").upper() != "YES":
        put(common, DecayCorrection="NONE")
    elif corrected_to is None:
        put(common, DecayCorrection="")
    elif corrected_to in injected:
        put(common, DecayCorrection="ADMIN")
    else:
        put(common, DecayCorrection="START")
        put(common, SeriesDate=_da(corrected_to), SeriesTime=_tm(corrected_to))


def _classic_tracer(item: Dataset) -> Dataset:
    tracer = copy.deepcopy(item)
    if text(tracer, "RadionuclideTotalDose"):
        dose = numbers(tracer, "RadionuclideTotalDose", 1)[0]
        if dose < LARGEST_DOSE_MBQ:
            put(tracer, RadionuclideTotalDose=decimal_string(dose * 1e6))
    start = _moment(tracer, "RadiopharmaceuticalStartDateTime")
    if start is not None:
        put(tracer, RadiopharmaceuticalStartTime=_tm(start))
    return tracer


def _frame_times(single: Dataset, content: Dataset) -> None:
    acquired = _moment(content, "FrameAcquisitionDateTime")
    reference = _moment(content, "FrameReferenceDateTime")
    if acquired is not None:
        put(single, AcquisitionDate=_da(acquired), AcquisitionTime=_tm(acquired))
    if reference is not None and text(single, "SeriesDate") and text(single, "SeriesTime"):
        try:
            series = parse_date(text(single, "SeriesDate")) + parse_time(text(single, "SeriesTime"))
        except ValueError as error:
            raise Refused("malformed", "SeriesDate and SeriesTime are not a date and time", RESEND) from error
        put(single, FrameReferenceTime=decimal_string((reference - series).total_seconds() * 1000))
    if text(content, "FrameAcquisitionDuration"):
        put(single, ActualFrameDuration=str(round(numbers(content, "FrameAcquisitionDuration", 1)[0])))


def _moment(dataset: Dataset, keyword: str) -> datetime | None:
    value = text(dataset, keyword)
    if not value:
        return None
    try:
        return parse_datetime(value)
    except ValueError as error:
        raise Refused("malformed", f"{keyword} is not a date and time", RESEND) from error


def _da(moment: datetime) -> str:
    return moment.strftime("%Y%m%d")


def _tm(moment: datetime) -> str:
    return moment.strftime("%H%M%S.%f" if moment.microsecond else "%H%M%S")
