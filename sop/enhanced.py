"""Enhanced multi-frame PET and CT: each frame becomes a slice with a classic-equivalent header."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import Dataset
from pydicom.tag import Tag

from sop.errors import Refused
from sop.header import integer, numbers, text, without_pixels
from sop.series import Slice

__all__ = ["enhanced_slices"]

MULTIFRAME_ONLY = ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
                   "DimensionIndexSequence", "DimensionOrganizationSequence", "DimensionOrganizationType")


def enhanced_slices(header: Dataset, path: Path | None) -> list[Slice]:
    """One Slice per frame. Raises Refused "malformed"."""
    frames = integer(header, "NumberOfFrames", default=1)
    shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
    each = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(each) != frames:
        raise Refused("malformed", f"PerFrameFunctionalGroupsSequence has {len(each)} items for {frames} frames",
                      "send the image again from the scanner")
    return [_slice(header, path, number, shared[0], groups) for number, groups in enumerate(each, start=1)]


def _slice(header: Dataset, path: Path | None, number: int, shared: Dataset, groups: Dataset) -> Slice:
    single = without_pixels(header)
    for keyword in MULTIFRAME_ONLY:
        single.pop(Tag(keyword), None)
    for group in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
                  "PixelValueTransformationSequence"):
        macro = groups.get(group) or shared.get(group)
        if macro:
            for element in macro[0]:
                single[element.tag] = element
    x, y, z = numbers(single, "ImagePositionPatient", 3)
    single.InstanceNumber = number
    return Slice(single, path, text(header, "SOPClassUID"), text(header, "SOPInstanceUID"), number, (x, y, z),
                 numbers(single, "RescaleSlope", 1)[0], numbers(single, "RescaleIntercept", 1)[0])
