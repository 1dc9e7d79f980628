"""Headers and arrivals for the tests of the matching rules; each says only what matters."""

from __future__ import annotations

from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from dicomnode.matching import Arrival

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PET_IMAGE = "1.2.840.10008.5.1.4.1.1.128"
ENHANCED_PET = "1.2.840.10008.5.1.4.1.1.130"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def pet_header(**changes: Any) -> Dataset:
    """An attenuation-corrected static PET in BQML; `changes` set attributes, None removes one."""
    return _header(
        {
            "SOPClassUID": PET_IMAGE,
            "Modality": "PT",
            "ImageType": ["ORIGINAL", "PRIMARY"],
            "SeriesType": ["STATIC", "IMAGE"],
            "CorrectedImage": ["DECY", "ATTN", "SCAT"],
            "Units": "BQML",
            "SliceThickness": "3.0",
        },
        changes,
    )


def ct_header(**changes: Any) -> Dataset:
    """An axial CT slice of the same study and frame of reference as `pet_header`."""
    return _header(
        {
            "SOPClassUID": CT_IMAGE,
            "Modality": "CT",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "SeriesInstanceUID": "1.2.3.2",
            "SliceThickness": "3.0",
        },
        changes,
    )


def enhanced_pet_header(heights: tuple[float, ...] = (0.0, 3.0, 6.0), **changes: Any) -> Dataset:
    """An Enhanced PET with one frame at each height (mm along z)."""
    header = _header(
        {
            "SOPClassUID": ENHANCED_PET,
            "Modality": "PT",
            "ImageType": ["ORIGINAL", "PRIMARY", "WHOLE_BODY", "NONE"],
            "AttenuationCorrected": "YES",
            "NumberOfFrames": len(heights),
            "ImagePositionPatient": None,
            "ImageOrientationPatient": None,
            "PixelSpacing": None,
        },
        {},
    )
    shared, plane, mapping = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = list(AXIAL)
    mapping.RealWorldValueSlope = 1.0
    shared.PlaneOrientationSequence = Sequence([plane])
    shared.RealWorldValueMappingSequence = Sequence([mapping])
    header.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for height in heights:
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [0.0, 0.0, height]
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    header.PerFrameFunctionalGroupsSequence = Sequence(frames)
    return _apply(header, changes)


def _header(base: dict[str, Any], changes: dict[str, Any]) -> Dataset:
    common = {
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": "1.2.3.1",
        "SOPInstanceUID": "1.2.3.1.1",
        "FrameOfReferenceUID": "1.2.3.9",
        "ImagePositionPatient": [0.0, 0.0, 0.0],
        "ImageOrientationPatient": list(AXIAL),
        "PixelSpacing": ["4.0", "4.0"],
    }
    return _apply(Dataset(), {**common, **base, **changes})


def _apply(header: Dataset, values: dict[str, Any]) -> Dataset:
    for keyword, value in values.items():
        if value is not None:
            setattr(header, keyword, value)
        elif keyword in header:
            delattr(header, keyword)
    return header


def arrivals_at(*heights: float, received_at: float = 0.0, orientation: tuple[float, ...] = AXIAL) -> list[Arrival]:
    """One single-frame instance at each height (mm along z), all received at once."""
    return [
        Arrival(f"1.2.3.1.{number}", received_at, (-100.0, -100.0, height), orientation)
        for number, height in enumerate(heights, start=1)
    ]


def stack(slices: int, spacing: float = 3.0, start: float = 0.0) -> list[Arrival]:
    """A uniform stack of instances, received at time 0."""
    return arrivals_at(*(start + spacing * index for index in range(slices)))


def mutate(header: Dataset, keyword: str, raw: bytes) -> None:
    """Put raw bytes into an element as if they had come off the wire; pydicom converts them when asked."""
    tag = Tag(tag_for_keyword(keyword) or 0)
    header._dict[tag] = RawDataElement(tag, dictionary_VR(tag), len(raw), raw, 0, False, True, True)
