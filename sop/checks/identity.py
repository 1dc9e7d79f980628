"""What a derived series is called, what it refers to, and what it must have kept from its source. Rules 16 to 38."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydicom.datadict import keyword_for_tag, tag_for_keyword

from sop.checks.report import CheckItem, agreed
from sop.checks.stored import Instance, text

__all__ = ["identity_items", "kept_items"]

_UID = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
_PET = "1.2.840.10008.5.1.4.1.1.128"


def _tags(*keywords: str) -> frozenset[int]:
    return frozenset(int(tag_for_keyword(keyword) or 0) for keyword in keywords)


def _tag(keyword: str) -> int:
    return int(tag_for_keyword(keyword) or 0)


# What a derived series says for itself. All else is the parent slice's, byte for byte.
_OWN = _tags(
    "SOPClassUID", "SOPInstanceUID", "ImageType", "InstanceCreationDate", "InstanceCreationTime", "ContentDate",
    "ContentTime", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "InstanceNumber", "ImagePositionPatient",
    "ImageOrientationPatient", "SliceLocation", "SliceThickness", "SpacingBetweenSlices", "PixelSpacing", "Rows",
    "Columns", "NumberOfSlices", "ImageIndex", "RescaleSlope", "RescaleIntercept", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "WindowCenter",
    "WindowWidth", "DerivationDescription", "DerivationCodeSequence", "SourceImageSequence",
    "ReferencedSeriesSequence", "ContributingEquipmentSequence", "ImageComments",
)
# What must not survive on the new grid, with the new values (rule 11).
_STALE = _tags(
    "IconImageSequence", "PixelAspectRatio", "SmallestImagePixelValue", "LargestImagePixelValue",
    "SmallestPixelValueInSeries", "LargestPixelValueInSeries", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "ModalityLUTSequence", "VOILUTSequence", "RealWorldValueMappingSequence", "NumberOfFrames",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DigitalSignaturesSequence",
    "MACParametersSequence",
)
# What may be left out: it describes other objects, or is not allowed where it stood.
_MAY_GO = _tags(
    "InstanceCreatorUID", "SOPInstanceStatus", "SOPAuthorizationDateTime", "SOPAuthorizationComment",
    "SeriesDescriptionCodeSequence", "ReferencedImageSequence", "StudiesContainingOtherReferencedInstancesSequence",
    "WindowCenterWidthExplanation", "VOILUTFunction", "NominalScannedPixelSpacing", "PlanarConfiguration",
    "NumberOfTimeSlices", "DataSetTrailingPadding", "SmallestImagePixelValueInPlane", "LargestImagePixelValueInPlane",
)
_STALE_PRIVATE = {
    (0x0009, b"GEMS_PETD_01"): (0x69, 0x6A, 0xA2, 0xA6, 0xD6, 0xD7, 0xDF),
    (0x0029, b"SIEMENS CSA HEADER"): (0x08, 0x09, 0x10, 0x18, 0x19, 0x20),
    (0x0029, b"SIEMENS MEDCOM HEADER"): (0x10, 0x20),
    (0x7053, b"Philips PET Private Group"): (0x03, 0x04),
}
_TIMES = _tags(
    "StudyDate", "StudyTime", "SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime", "AcquisitionDateTime",
    "FrameReferenceTime", "ActualFrameDuration", "DecayFactor", "TimezoneOffsetFromUTC", "ScanProgressionDirection",
)
_PHYSICS = _tags(
    "Units", "SUVType", "DecayCorrection", "CorrectedImage", "SeriesType", "DoseCalibrationFactor",
    "ScatterFractionFactor", "AttenuationCorrectionMethod", "ReconstructionMethod", "ScatterCorrectionMethod",
    "RandomsCorrectionMethod", "DeadTimeFactor", "CountsSource", "SliceSensitivityFactor",
)
_STUDY = _tags("StudyInstanceUID", "StudyID", "AccessionNumber", "Modality", "StudyDescription")
_SERIES_LEVEL = _STUDY | _PHYSICS - _tags("DeadTimeFactor", "ScatterFractionFactor", "DoseCalibrationFactor",
                                         "SliceSensitivityFactor") | _tags(
    "PatientName", "PatientID", "PatientSex", "PatientWeight", "PatientSize", "PatientBirthDate", "SeriesDate",
    "SeriesTime", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "FrameOfReferenceUID", "Rows", "Columns",
    "PixelSpacing", "BitsStored", "PixelRepresentation", "RadiopharmaceuticalInformationSequence", "NumberOfSlices",
    "SpecificCharacterSet", "Manufacturer", "ManufacturerModelName", "TimezoneOffsetFromUTC",
)
_GROUPS: tuple[tuple[str, str, Callable[[int], bool]], ...] = (
    ("study", "study, accession and modality are the source's", lambda tag: tag in _STUDY),
    ("patient", "patient attributes are the source's", lambda tag: tag >> 16 in (0x0010, 0x0012)),
    ("times", "times are the parent slice's, character by character", lambda tag: tag in _TIMES),
    ("radiopharmaceutical", "RadiopharmaceuticalInformationSequence is whole",
     lambda tag: tag == _tag("RadiopharmaceuticalInformationSequence")),
    ("corrections", "units, corrections and factors are the source's", lambda tag: tag in _PHYSICS),
    ("frame-of-reference", "frame of reference is the source's",
     lambda tag: tag in _tags("FrameOfReferenceUID", "PositionReferenceIndicator")),
    ("character-set", "SpecificCharacterSet goes with the copied texts", lambda tag: tag == 0x00080005),
    ("lossy-compression", "earlier lossy compression is still told", lambda tag: tag >> 4 == 0x00282110 >> 4),
    ("private-elements", "private elements stay in their blocks", lambda tag: bool(tag >> 16 & 1)),
    ("copied-attributes", "all other attributes are the parent slice's", lambda tag: True),
)


def kept_items(source: Sequence[Instance], derived: Sequence[Instance]) -> list[CheckItem]:
    """Each derived slice i holds what source slice i // 2 holds, byte for byte, and nothing that has become untrue."""
    troubles: dict[str, list[str]] = {name: [] for name, _, _ in _GROUPS}
    stale: list[str] = []
    for index, item in enumerate(derived):
        parent = source[min(index // 2, len(source) - 1)]
        stale_here = _stale_private(item.elements)
        stale += [f"slice {index + 1} holds {_name(tag)}" for tag in item.elements
                  if tag in _STALE or tag in stale_here or tag >> 24 in (0x50, 0x60)]
        may_go = _MAY_GO | _STALE | _stale_private(parent.elements)
        for tag in parent.elements.keys() | item.elements.keys():
            before, after = parent.elements.get(tag), item.elements.get(tag)
            if before == after or tag in _OWN or tag >> 24 in (0x50, 0x60) or tag in stale_here:
                continue
            if (after is None and tag in may_go) or (before is None and _may_come(tag, after)):
                continue
            name = next(name for name, _, concerns in _GROUPS if concerns(tag))
            what = "is missing" if after is None else "was added" if before is None else "has changed"
            troubles[name].append(f"{_name(tag)} {what} in slice {index + 1}")
    items = [agreed(name, troubles[name], promise) for name, promise, _ in _GROUPS]
    return [*items, agreed("stale-attributes", stale, "nothing describes the old grid or the old values")]


def _may_come(tag: int, value: Any) -> bool:
    return (tag == _tag("PositionReferenceIndicator") and value == b"") or tag == _tag("Units") or tag in _STALE


def _stale_private(elements: dict[int, Any]) -> frozenset[int]:
    found = []
    for (group, creator), numbers in _STALE_PRIVATE.items():
        for block in range(0x10, 0x100):
            if elements.get(group << 16 | block) == creator:
                found += [group << 16 | block << 8 | number for number in numbers]
    return frozenset(found)


def _name(tag: int) -> str:
    return keyword_for_tag(tag) or f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def identity_items(source: Sequence[Instance], derived: Sequence[Instance]) -> list[CheckItem]:
    """A new series that says what it is, from what and by whom it was made, and cannot be taken for its source."""
    first, original = derived[0].header, source[0].header
    return [
        agreed("series-level", _varying(derived), "attributes of the series are the same in all instances"),
        agreed("sop-class", [f"{item.path.name}: SOPClassUID {text(item.header, 'SOPClassUID')}" for item in derived
                             if text(item.header, "SOPClassUID") != _PET], "classic PET images"),
        agreed("instance-uids", _uid_troubles(source, derived), "UIDs are new, valid, unique, the file meta's too"),
        CheckItem("series-uid", text(first, "SeriesInstanceUID") != text(original, "SeriesInstanceUID"),
                  text(first, "SeriesInstanceUID"), None, "a series of its own"),
        agreed("image-type", [text(item.header, "ImageType") for item in derived
                              if not text(item.header, "ImageType").startswith("DERIVED\\PRIMARY")],
               "ImageType is DERIVED\\PRIMARY"),
        CheckItem("series-number", text(first, "SeriesNumber") not in ("", text(original, "SeriesNumber")),
                  text(first, "SeriesNumber"), None, "SeriesNumber differs from the source's"),
        CheckItem("series-description",
                  text(first, "SeriesDescription") not in ("", text(original, "SeriesDescription")),
                  text(first, "SeriesDescription"), None, "SeriesDescription differs from the source's"),
        agreed("derivation", [f"{item.path.name} lacks it" for item in derived
                              if not item.elements.get(_tag("DerivationDescription"))
                              or (b"113085", b"DCM") not in _codes(item.elements.get(_tag("DerivationCodeSequence")))],
               "DerivationDescription and DerivationCodeSequence 113085 DCM tell how it was made"),
        agreed("source-images", _reference_troubles(source, derived),
               "SourceImageSequence 121322 DCM names the parent slice, ReferencedSeriesSequence all references"),
        agreed("contributing-equipment", _equipment_troubles(source, derived),
               "ContributingEquipmentSequence 109102 DCM names who processed it, with version and time"),
        agreed("creation-time", [f"{item.path.name} lacks it" for item in derived
                                 for keyword in ("InstanceCreationDate", "InstanceCreationTime", "ContentDate",
                                                 "ContentTime") if not item.elements.get(_tag(keyword))],
               "creation and content time are given"),
    ]


def _varying(derived: Sequence[Instance]) -> list[str]:
    return [f"{_name(tag)} differs" for tag in sorted(_SERIES_LEVEL)
            if any(item.elements.get(tag) != derived[0].elements.get(tag) for item in derived)]


def _uid_troubles(source: Sequence[Instance], derived: Sequence[Instance]) -> list[str]:
    taken = {item.uid for item in source}
    troubles = []
    for item in derived:
        meta = item.header.file_meta
        for uid in (item.uid, text(item.header, "SeriesInstanceUID")):
            if len(uid) > 64 or not _UID.fullmatch(uid):
                troubles.append(f"{uid!r} is no UID")
        if item.uid in taken:
            troubles.append(f"{item.uid} stands for two instances")
        if text(meta, "MediaStorageSOPInstanceUID") != item.uid or \
                text(meta, "MediaStorageSOPClassUID") != text(item.header, "SOPClassUID"):
            troubles.append(f"{item.path.name}: file meta information names another instance")
        taken.add(item.uid)
    return troubles


def _codes(items: Iterable[dict[int, Any]] | None) -> set[tuple[Any, Any]]:
    return {(item.get(_tag("CodeValue")), item.get(_tag("CodingSchemeDesignator"))) for item in items or ()}


def _reference_troubles(source: Sequence[Instance], derived: Sequence[Instance]) -> list[str]:
    uids = {item.uid.encode() for item in source}
    series_uid = text(source[0].header, "SeriesInstanceUID").encode()
    instance, purpose = _tag("ReferencedSOPInstanceUID"), _tag("PurposeOfReferenceCodeSequence")
    troubles = []
    for index, item in enumerate(derived):
        sources = item.elements.get(_tag("SourceImageSequence")) or ()
        named = {reference.get(instance) for reference in sources}
        parent = source[min(index // 2, len(source) - 1)].uid.encode()
        if parent not in named or not named <= uids:
            troubles.append(f"slice {index + 1} does not name source slice {index // 2 + 1}")
        if any((b"121322", b"DCM") not in _codes(reference.get(purpose)) for reference in sources):
            troubles.append(f"slice {index + 1} names a source without purpose 121322 DCM")
        named |= {reference.get(instance) for reference in item.elements.get(_tag("ReferencedImageSequence")) or ()}
        listed = {
            reference.get(instance)
            for series in item.elements.get(_tag("ReferencedSeriesSequence")) or ()
            if series.get(_tag("SeriesInstanceUID")) == series_uid
            for reference in series.get(_tag("ReferencedInstanceSequence")) or ()
        }
        if not named <= listed:
            troubles.append(f"slice {index + 1} refers to an instance that ReferencedSeriesSequence does not list")
    return troubles


def _equipment_troubles(source: Sequence[Instance], derived: Sequence[Instance]) -> list[str]:
    sequence, needed = _tag("ContributingEquipmentSequence"), _tags(
        "Manufacturer", "ManufacturerModelName", "SoftwareVersions", "ContributionDateTime")
    troubles = []
    for index, item in enumerate(derived):
        equipment = item.elements.get(sequence) or ()
        before = source[min(index // 2, len(source) - 1)].elements.get(sequence) or ()
        ours = [one for one in equipment
                if (b"109102", b"DCM") in _codes(one.get(_tag("PurposeOfReferenceCodeSequence")))]
        if not any(all(one.get(tag) for tag in needed) for one in ours):
            troubles.append(f"slice {index + 1} does not say what processed it")
        if tuple(equipment[:len(before)]) != tuple(before):
            troubles.append(f"slice {index + 1} has lost what the source says of its equipment")
    return troubles
