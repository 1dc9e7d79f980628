"""Many slices in one instance: reconstructed NM here, enhanced PET and CT through sop.enhanced.

NM RECON TOMO [PS3.3 C.8.4.8, C.8.4.15]: slice i lies SpacingBetweenSlices (signed) times (SliceVector - 1) along the
normal from the position in DetectorInformationSequence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset

from sop import geometry
from sop.enhanced import enhanced_slices
from sop.errors import Refused
from sop.header import decimal_string, integer, items, numbers, put, strings, text, without_pixels
from sop.series import Slice

__all__ = ["slices_of"]

MAX_FRAMES = 65_536


def slices_of(header: Dataset, path: Path | None) -> list[Slice]:
    """One Slice per frame, in frame order, each with a classic-equivalent header.

    Raises Refused "too-large" where more frames are promised than any object has, before one is made of each.
    """
    frames = integer(header, "NumberOfFrames", default=1)
    if not 0 < frames <= MAX_FRAMES:
        raise Refused("too-large", f"NumberOfFrames is {frames}, and 1 to {MAX_FRAMES} can be handled",
                      "send the instance again from the scanner or the PACS")
    if text(header, "SOPClassUID") == uid.NuclearMedicineImageStorage:
        return _nm_slices(header, path)
    return enhanced_slices(header, path)


def _nm_slices(header: Dataset, path: Path | None) -> list[Slice]:
    image_type = text(header, "ImageType").upper()
    frames = integer(header, "NumberOfFrames", default=1)
    detectors = items(header, "DetectorInformationSequence")
    if "RECON TOMO" not in image_type or "GATED" in image_type:
        raise Refused("not-supported", "an NM image other than RECON TOMO is not a volume",
                      "send the reconstructed transverse slices")
    if len(detectors) != 1 or frames != integer(header, "NumberOfSlices", default=frames):
        raise Refused("dynamic", f"the NM image holds {frames} frames of {text(header, 'NumberOfSlices')} slices, "
                      f"{len(detectors)} detector entries", "send one energy window, one rotation, one time slice")
    detector = detectors[0]
    origin = np.array(numbers(detector, "ImagePositionPatient", 3))
    normal = geometry.normal_of(np.array(numbers(detector, "ImageOrientationPatient", 6)))
    keyword = "SpacingBetweenSlices" if text(header, "SpacingBetweenSlices") else "SliceThickness"
    step = numbers(header, keyword, 1)[0]
    if text(header, "SliceVector"):
        places = [round(value) for value in numbers(header, "SliceVector", frames)]
    else:
        places = list(range(1, frames + 1))
    return [
        _nm_slice(header, path, frame, origin + normal * step * (number - 1), detector)
        for frame, number in enumerate(places, start=1)
    ]


def _nm_slice(header: Dataset, path: Path | None, frame: int, position: np.ndarray, detector: Dataset) -> Slice:
    single = without_pixels(header)
    put(
        single,
        ImageOrientationPatient=strings(detector, "ImageOrientationPatient", 6),
        ImagePositionPatient=[decimal_string(round(float(value), 6)) for value in position],
        InstanceNumber=frame,
    )
    x, y, z = map(float, position)
    return Slice(
        header=single,
        path=path,
        sop_class_uid=text(header, "SOPClassUID"),
        sop_instance_uid=text(header, "SOPInstanceUID"),
        frame=frame,
        position=(x, y, z),
        slope=numbers(header, "RescaleSlope", 1)[0] if text(header, "RescaleSlope") else 1.0,
        intercept=numbers(header, "RescaleIntercept", 1)[0] if text(header, "RescaleIntercept") else 0.0,
    )
