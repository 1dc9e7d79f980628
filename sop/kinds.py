"""Which SOP Classes and series types are volumes, and whose scanner made them."""

from __future__ import annotations

from collections.abc import Sequence

from pydicom import uid
from pydicom.dataset import Dataset

from sop.errors import Refused
from sop.header import numbers, text, texts
from sop.units import Scale

__all__ = [
    "is_multiframe", "is_pet", "other_scale", "refuse_not_a_volume", "refuse_time_slices", "refuse_unsupported",
    "rescale", "vendor",
]

CLASSIC = {uid.PositronEmissionTomographyImageStorage, uid.CTImageStorage}
MULTIFRAME = {uid.NuclearMedicineImageStorage, uid.EnhancedPETImageStorage, uid.EnhancedCTImageStorage}
PET = {uid.PositronEmissionTomographyImageStorage, uid.EnhancedPETImageStorage}

PER_FRAME_REMEDY = "send a STATIC or WHOLE BODY reconstruction of the same acquisition"


def is_multiframe(header: Dataset) -> bool:
    """Whether one instance holds many slices."""
    return text(header, "SOPClassUID") in MULTIFRAME


def is_pet(header: Dataset) -> bool:
    """Whether it is a PET image; by SOP Class, since secondary captures also say Modality PT."""
    return text(header, "SOPClassUID") in PET


def refuse_unsupported(header: Dataset) -> None:
    """Raise Refused "not-supported" for a SOP Class that is no PET, CT or NM image."""
    sop_class = text(header, "SOPClassUID")
    if sop_class not in CLASSIC | MULTIFRAME:
        name = uid.UID(sop_class).name if sop_class else "without SOP Class"
        raise Refused(
            "not-supported", f"{name} is not read as a volume",
            "give a PET, CT or reconstructed NM series",
        )


def rescale(header: Dataset) -> tuple[float, float]:
    """RescaleSlope and RescaleIntercept of a classic PET or CT, both of type 1. Raises Refused "malformed"."""
    return numbers(header, "RescaleSlope", 1)[0], numbers(header, "RescaleIntercept", 1)[0]


def refuse_not_a_volume(headers: Sequence[Dataset], *, lenient: bool) -> None:
    """Raise Refused for frames in time, projections and localizers.

    PET SeriesType (0054,1000) [C.8.9.1.1.4]: value 1 STATIC or WHOLE BODY, value 2 IMAGE. NumberOfTimeSlices means
    nothing there: GE counts bed positions in it.
    lenient   pass over a missing SeriesType.
    """
    if any("LOCALIZER" in text(header, "ImageType").upper() for header in headers):
        raise Refused("localizer", "a localizer is not a volume", "give the CT series itself")
    if not is_pet(headers[0]):
        return
    kinds = {texts(header, "SeriesType") for header in headers}
    for kind in kinds:
        if "REPROJECTION" in kind[1:]:
            raise Refused("reprojection", "SeriesType REPROJECTION is a projection (MIP), not a volume",
                          "give the series of transverse images")
        if "DYNAMIC" in kind[:1]:
            raise Refused("dynamic", "SeriesType DYNAMIC holds several frames in time", PER_FRAME_REMEDY)
        if "GATED" in kind[:1]:
            raise Refused("gated", "SeriesType GATED holds several phases", PER_FRAME_REMEDY)
        if kind[:1] not in (("STATIC",), ("WHOLE BODY",)) and not (lenient and not kind):
            stated = "/".join(kind) or "is missing, which"
            raise Refused("series-type", f"SeriesType {stated} does not say that this is a volume",
                          "send a STATIC or WHOLE BODY series")


def refuse_time_slices(places: Sequence[Sequence[Dataset]]) -> None:
    """Raise Refused "dynamic" where most places hold several slices of different times, whatever SeriesType says."""
    keywords = ("FrameReferenceTime", "TriggerTime", "FrameTime", "AcquisitionTime", "AcquisitionNumber")
    several = 0
    for place in places:
        if len(place) > 1 and len({tuple(text(header, keyword) for keyword in keywords) for header in place}) > 1:
            several += 1
    if several > len(places) / 2:
        raise Refused("dynamic", f"{several} of {len(places)} places hold several slices of different times",
                      PER_FRAME_REMEDY)


def other_scale(headers: Sequence[Dataset]) -> Scale:
    """Unit of CT, Hounsfield [C.8.2.1], and of reconstructed NM, counts."""
    ones = (1.0,) * len(headers)
    if text(headers[0], "Modality") == "CT":
        kind = text(headers[0], "RescaleType").upper()
        if kind not in ("", "HU"):
            raise Refused("units-unsupported", f"RescaleType {kind!r} of the CT is not HU",
                          "send the CT in Hounsfield units")
        return Scale("[hnsf'U]", "HU", ones)
    return Scale("{counts}", "", ones)


def vendor(header: Dataset) -> str:
    """ "GE", "SIEMENS", "PHILIPS", or Manufacturer in capitals; clients choose SUV rules by it."""
    name = text(header, "Manufacturer").upper()
    if name.startswith("GE ") or name == "GE" or name.startswith("GEMS"):
        return "GE"
    for known in ("SIEMENS", "PHILIPS"):
        if known in name:
            return known
    return "SIEMENS" if name.startswith("CPS") else name
