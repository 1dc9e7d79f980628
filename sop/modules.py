"""The modules of a derived PET image (PS3.3 A.21.3), one function each: what is set anew. All else is copied.

Each function returns the elements it sets as a small Dataset; `copied` is the source header without what describes the
old grid or the old stored values. Rule numbers are those of docs/derived-series.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import PositronEmissionTomographyImageStorage
from pydicom.valuerep import format_number_as_ds

from sop.derivation import EQUIPMENT_NAME, Derivation
from sop.series import SeriesInfo, Slice

__all__ = [
    "Clock", "common_instance_reference", "contributing_equipment", "copied", "ds", "frame_of_reference",
    "general_image", "general_series", "image_pixel", "image_plane", "pet_image", "pet_series",
    "plane_size", "sop_common", "voi_lut",
]

RESEARCH_USE = "Research use, not for diagnosis"
_TEXT_LO, _TEXT_ST = 64, 1024  # PS3.5 6.2, characters

# What describes the old grid, the old stored values, or other objects than ours.
_STALE = (
    # stored values and their range
    "PixelData", "FloatPixelData", "DoubleFloatPixelData", "PixelDataProviderURL", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries",
    "LargestPixelValueInSeries", "SmallestImagePixelValueInPlane", "LargestImagePixelValueInPlane",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RealWorldValueMappingSequence",
    "WindowCenter", "WindowWidth", "WindowCenterWidthExplanation", "VOILUTFunction", "VOILUTSequence",
    # grid
    "PixelAspectRatio", "IconImageSequence", "SliceLocation", "PlanarConfiguration", "NominalScannedPixelSpacing",
    "NumberOfFrames", "FrameIncrementPointer", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "DimensionOrganizationSequence", "DimensionIndexSequence", "DimensionOrganizationType", "ConcatenationUID",
    "InConcatenationNumber", "InConcatenationTotalNumber", "ConcatenationFrameOffsetNumber",
    # who made the instance, what it refers to, what seals it
    "InstanceCreatorUID", "SOPInstanceStatus", "SOPAuthorizationDateTime", "SOPAuthorizationComment",
    "SeriesDescriptionCodeSequence", "ReferencedImageSequence", "SourceImageSequence", "ReferencedSeriesSequence",
    "StudiesContainingOtherReferencedInstancesSequence", "DerivationCodeSequence", "MACParametersSequence",
    "DigitalSignaturesSequence", "DataSetTrailingPadding",
)
# Private elements that describe the old grid: (group, creator, elements).
_STALE_PRIVATE = (
    (0x0009, "GEMS_PETD_01", frozenset((0x69, 0x6A, 0xA2, 0xA6, 0xD6, 0xD7, 0xDF))),
    (0x0029, "SIEMENS CSA HEADER", frozenset((0x08, 0x09, 0x10, 0x18, 0x19, 0x20))),
    (0x0029, "SIEMENS MEDCOM HEADER", frozenset((0x10, 0x20))),
    (0x7053, "Philips PET Private Group", frozenset((0x03, 0x04))),
)


@dataclass(frozen=True)
class Clock:
    """The time of processing as DICOM writes it, in the time zone the source's times are in (rule 28)."""

    date: str
    time: str
    date_time: str

    @classmethod
    def at(cls, now: datetime, offset_from_utc: str = "") -> Clock:
        """`now` in the zone of TimezoneOffsetFromUTC ("+0100") where both are known, else as it stands."""
        if now.tzinfo is not None and len(offset_from_utc.strip()) == 5:
            text = offset_from_utc.strip()
            minutes = int(text[1:3]) * 60 + int(text[3:5])
            now = now.astimezone(timezone(timedelta(minutes=-minutes if text[0] == "-" else minutes)))
        date, time = now.strftime("%Y%m%d"), now.strftime("%H%M%S.%f")
        return cls(date, time, date + time + now.strftime("%z")[:5])


def ds(value: float) -> str:
    """A Decimal String of at most 16 characters (PS3.5 6.2), as near to `value` as those allow.

    >>> ds(-4.6875), ds(1 / 3)
    ('-4.6875', '0.33333333333333')
    """
    return format_number_as_ds(float(value) + 0.0)


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """One item of a code sequence (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def copied(header: Dataset) -> Dataset:
    """The source header, element by element as it came, without what is stale on the new grid (rule 11)."""
    kept = Dataset()
    kept.update({tag: header.get_item(tag) for tag in sorted(header.keys())})
    for keyword in _STALE:
        if keyword in kept:
            del kept[keyword]
    if "DYNAMIC" not in str(kept.get("SeriesType", "")):
        kept.pop("NumberOfTimeSlices", None)  # C.8.9.1: only where DYNAMIC; scanners write a count per bed into it
    for tag in [tag for tag in sorted(kept.keys()) if tag.group & 0xFF00 in (0x5000, 0x6000)]:  # curves, overlay planes
        del kept[tag]
    for group, creator, elements in _STALE_PRIVATE:
        _remove_private(kept, group, creator, elements)
    return kept


def _remove_private(kept: Dataset, group: int, creator: str, elements: frozenset[int]) -> None:
    blocks = {
        tag.element for tag in sorted(kept.keys())
        if tag.group == group and tag.is_private_creator and str(kept[tag].value).strip() == creator
    }
    for tag in sorted(kept.keys()):
        if tag.group == group and tag.element >> 8 in blocks and tag.element & 0xFF in elements:
            del kept[tag]


def general_series(source: SeriesInfo, derivation: Derivation, series_uid: str) -> Dataset:
    """C.7.3.1: a new series of the same study; SeriesDate, SeriesTime and the performed step stay (rules 19, 33)."""
    module = Dataset()
    module.SeriesInstanceUID = series_uid
    number = int(source.first.get("SeriesNumber") or 0) + derivation.series_number_offset
    while number in derivation.taken_series_numbers:
        number += 1
    module.SeriesNumber = str(number)
    module.SeriesDescription = _series_description(str(source.first.get("SeriesDescription") or ""), derivation)
    return module


def _series_description(source_text: str, derivation: Derivation) -> str:
    template = derivation.series_description
    if derivation.method != "nbd":  # the name of this method stands on no other's result
        template = template.replace("NBD", derivation.method)
    if derivation.is_preview and "preview" not in template.lower():
        template += " (preview)"
    room = _TEXT_LO - len(template.format(source=""))
    return template.format(source=source_text[:max(room, 0)].strip()).strip()[:_TEXT_LO]


def pet_series(source: SeriesInfo) -> Dataset:
    """C.8.9.1: twice the slices; SeriesType, Units, CorrectedImage, DecayCorrection and the rest stay (rules 5, 25).

    Units is set only where the source has none and the reader was told to assume one.
    """
    module = Dataset()
    module.NumberOfSlices = 2 * len(source.slices)
    if not source.first.get("Units"):
        module.Units = source.source_units
    return module


def frame_of_reference(header: Dataset) -> Dataset:
    """C.7.4.1: the same frame; PositionReferenceIndicator is type 2, present even if empty (rule 6)."""
    module = Dataset()
    if "PositionReferenceIndicator" not in header:
        module.PositionReferenceIndicator = ""
    return module


def contributing_equipment(header: Dataset, derivation: Derivation, clock: Clock) -> Dataset:
    """C.12.1.1.5: our name and version beside the scanner's, whose Manufacturer stays (rule 32)."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = Items([code("109102", "DCM", "Processing Equipment")])
    item.Manufacturer = EQUIPMENT_NAME
    if derivation.institution:
        item.InstitutionName = derivation.institution
    if derivation.station:
        item.StationName = derivation.station
    item.ManufacturerModelName = EQUIPMENT_NAME
    item.SoftwareVersions = derivation.software_version
    item.ContributionDateTime = clock.date_time
    item.ContributionDescription = f"Deconvolution by {derivation.method}, resampled to half the voxel size"
    module = Dataset()
    module.ContributingEquipmentSequence = Items([*(header.get("ContributingEquipmentSequence") or ()), item])
    return module


def general_image(header: Dataset, source: SeriesInfo, derivation: Derivation, clock: Clock) -> Dataset:
    """C.7.6.1 and C.7.6.1.1.3: a derived image, how it was derived, and when (rules 19, 30, 31)."""
    module = Dataset()
    module.ImageType = ["DERIVED", "PRIMARY"]  # value 2 is PRIMARY for PET, C.8.9.4.1.1
    module.InstanceCreationDate, module.InstanceCreationTime = clock.date, clock.time
    module.ContentDate, module.ContentTime = clock.date, clock.time
    module.DerivationDescription = _derivation_description(header, source, derivation)
    # CID 7203 has no term for deconvolution: the code says the grid, the description says the rest.
    module.DerivationCodeSequence = Items([code("113085", "DCM", "Spatial resampling")])
    if derivation.research_use:
        comments = str(header.get("ImageComments") or "").strip()
        module.ImageComments = f"{RESEARCH_USE}; {comments}" if comments else RESEARCH_USE
    return module


def _derivation_description(header: Dataset, source: SeriesInfo, derivation: Derivation) -> str:
    parts = [f"Deconvolution by {derivation.method}"]
    if derivation.preset:
        parts.append(f"preset {derivation.preset}")
    parts.append(f"{EQUIPMENT_NAME} {derivation.software_version}")
    if derivation.kernel_fwhm_mm is not None:
        parts.append("kernel FWHM " + " x ".join(f"{width:.2f}" for width in derivation.kernel_fwhm_mm)
                     + " mm (slice x row x column direction)")
    if derivation.region_box:  # sop.checks.region reads it
        parts.append(f"deblurred in {derivation.region_box} (source slices, rows, columns), interpolated elsewhere")
    if derivation.guide_series_uid:
        parts.append(f"guided by series {derivation.guide_series_uid}")
    parts.append("grid twice as fine over the same field of view")
    if not header.get("Units"):
        parts.append(f"Units {source.source_units} assumed, the source states none")
    text = "; ".join(parts)
    earlier = str(header.get("DerivationDescription") or "").strip()
    return (f"{text}; before: {earlier}" if earlier else text)[:_TEXT_ST]


def image_plane(position: NDArray[np.float64], location: float | None) -> Dataset:
    """C.7.6.2, per slice: position of the first voxel, mm LPS, SliceLocation where the source has one (rules 1, 4, 8).

    The position comes from the origin each time: adding up a rounded step would drift.
    """
    module = Dataset()
    module.ImagePositionPatient = [ds(value) for value in position]
    if location is not None:
        module.SliceLocation = ds(location)
    return module


def plane_size(header: Dataset, pixel_spacing: Sequence[float], slice_step_mm: float) -> Dataset:
    """C.7.6.2, per series: PixelSpacing (row spacing first), SliceThickness, SpacingBetweenSlices (rules 2, 4).

    pixel_spacing   mm of the derived grid;  slice_step_mm   between derived slices, from positions.
    SpacingBetweenSlices is written only where the source has it: some readers prefer it to the positions.
    """
    module = Dataset()
    module.PixelSpacing = [ds(value) for value in pixel_spacing]
    thickness = header.get("SliceThickness")
    module.SliceThickness = "" if thickness in (None, "") else ds(float(thickness) / 2)
    if header.get("SpacingBetweenSlices") not in (None, ""):
        module.SpacingBetweenSlices = ds(slice_step_mm)
    return module


def image_pixel(header: Dataset, rows: int, columns: int) -> Dataset:
    """C.7.6.3 as narrowed by C.8.9.4: 16 bits, MONOCHROME2, the same in every slice (rules 7, 14).

    Stored values are 0..32767, which reads alike as signed and unsigned: PixelRepresentation stays the source's.
    """
    module = Dataset()
    module.SamplesPerPixel, module.PhotometricInterpretation = 1, "MONOCHROME2"
    module.Rows, module.Columns = rows, columns
    module.BitsAllocated, module.BitsStored, module.HighBit = 16, 16, 15
    module.PixelRepresentation = int(header.get("PixelRepresentation") or 0)
    return module


def voi_lut(source: SeriesInfo, bright: float) -> Dataset:
    """C.11.2, one window for the whole series, in rescaled units (rule 18).

    The source's own where all its slices agree on one; else 0 to `bright`.
    """
    windows = {
        (str(item.header.get("WindowCenter", "")), str(item.header.get("WindowWidth", ""))) for item in source.slices
    }
    center, width = windows.pop() if len(windows) == 1 else ("", "")
    module = Dataset()
    try:
        module.WindowCenter, module.WindowWidth = ds(float(center)), ds(float(width))
        usable = float(width) >= 1
    except ValueError:  # none, or several pairs
        usable = False
    if not usable:
        width_of_range = max(bright, 1.0)  # C.11.2.1.2: never below 1
        module.WindowCenter, module.WindowWidth = ds(width_of_range / 2), ds(width_of_range)
    return module


def pet_image(index: int, slope: str) -> Dataset:
    """C.8.9.4: RescaleIntercept is always zero, each slice has its own slope; ImageIndex runs with the position."""
    module = Dataset()
    module.RescaleIntercept, module.RescaleSlope = "0", slope
    module.InstanceNumber, module.ImageIndex = str(index), index
    return module


def sop_common(sop_uid: str) -> Dataset:
    """C.12.1: a classic PET image, also for an enhanced source (rule 29)."""
    module = Dataset()
    module.SOPClassUID, module.SOPInstanceUID = PositronEmissionTomographyImageStorage, sop_uid
    return module


def common_instance_reference(source: SeriesInfo, parents: Iterable[Slice]) -> Dataset:
    """C.12.2, C.7.6.1.1.4: the source slices on either side of the derived one, and their series (rule 31)."""
    sources, instances = [], {}
    for parent in parents:
        item, instance = Dataset(), Dataset()
        for reference in (item, instance):
            reference.ReferencedSOPClassUID = parent.sop_class_uid
            reference.ReferencedSOPInstanceUID = parent.sop_instance_uid
        if parent.frame is not None:
            item.ReferencedFrameNumber = parent.frame
        item.PurposeOfReferenceCodeSequence = Items(
            [code("121322", "DCM", "Source image for image processing operation")]
        )
        sources.append(item)
        instances[parent.sop_instance_uid] = instance
    series = Dataset()
    series.SeriesInstanceUID = source.series_instance_uid
    series.ReferencedInstanceSequence = Items(instances.values())
    module = Dataset()
    module.SourceImageSequence = Items(sources)
    module.ReferencedSeriesSequence = Items([series])
    return module
