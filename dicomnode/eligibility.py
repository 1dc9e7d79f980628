"""Which series the node deblurs, which may guide, and which it stores and leaves alone.

    pet      attenuation-corrected emission volume: deblurred
    guide    CT volume: may guide the deblurring of a PET of its study
    ignored  comes routinely and is none of our business: stored, with the reason
    refused  looks like a PET somebody wants deblurred, but cannot be: held for a person, with reason and remedy

Sources: PS3.3 C.8.9.1 (PET Series: SeriesType, Units, CorrectedImage), C.8.9.4.1.1 (ImageType), C.8.22.6 (Enhanced
PET Corrections), C.8.16.1 (Enhanced ImageType). Why derived and uncorrected series are ignored and not held:
docs/decisions/0004-derived-and-uncorrected-series.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydicom.dataset import Dataset
from pydicom.uid import UID_dictionary

from dicomnode.headers import items, number, private_number, text, values

__all__ = ["Eligibility", "Kind", "eligible"]

Kind = Literal["pet", "guide", "ignored", "refused"]

PET_IMAGE = "1.2.840.10008.5.1.4.1.1.128"
LEGACY_CONVERTED_PET = "1.2.840.10008.5.1.4.1.1.128.1"
ENHANCED_PET = "1.2.840.10008.5.1.4.1.1.130"
CT_CLASSES = ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")

VOLUME_TYPES = ("STATIC", "WHOLE BODY")
PER_FRAME_TYPES = ("DYNAMIC", "GATED")
QUANTITATIVE_UNITS = ("BQML", "GML", "CM2ML")  # CNTS besides, with the Philips factors
PROJECTION_WORDS = {"MIP", "MAX_IP", "MAX IP", "MIN_IP", "MIN IP", "REPROJECTION", "PROJECTION IMAGE", "PROJECTION"}
PICTURE_WORDS = {"FUSED", "FUSION", "SCREEN SAVE", "SCREENSAVE", "SCREENSHOT", "SCREEN CAPTURE", "DOSE_INFO"}
GEOMETRY = ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")


@dataclass(frozen=True)
class Eligibility:
    """The verdict on one series: `code` is for machines and does not change, `reason` and `remedy` are for people."""

    kind: Kind
    code: str
    reason: str
    remedy: str = ""


def eligible(header: Dataset, *, own_output: bool) -> Eligibility:
    """What to do with the series that `header` (one instance, without pixels) belongs to.

    own_output       the ledger, the UID root or the contributing equipment say that we made it.
    """
    if own_output:
        return Eligibility("ignored", "own-output", "own derived series coming back: it is never processed again")
    sop_class = text(header, "SOPClassUID")
    if sop_class in CT_CLASSES:
        return _judge_ct(header)
    if sop_class == PET_IMAGE:
        return _judge_picture(header) or _judge_pet(header)
    if sop_class == ENHANCED_PET:
        return _judge_picture(header) or _judge_enhanced_pet(header)
    if sop_class == LEGACY_CONVERTED_PET:
        return Eligibility(
            "refused",
            "legacy-converted",
            "Legacy Converted Enhanced PET is a repackaged copy of a single-frame series; the original is what counts",
            "send the original single-frame PET series",
        )
    name = UID_dictionary[sop_class][0] if sop_class in UID_dictionary else f"SOP Class {sop_class or 'not named'}"
    if text(header, "Modality") == "PT":
        return Eligibility("ignored", "pet-picture", f"{name} of modality PT: a picture or report of a PET, no volume")
    return Eligibility("ignored", "other-sop-class", f"{name} is neither PET nor CT: stored and left alone")


def _judge_picture(header: Dataset) -> Eligibility | None:
    """Ignored when the image is a projection, a fused picture, a screen or a scout; None when it may be a volume."""
    image_type = [value.upper() for value in values(header, "ImageType")]
    shown = "\\".join(image_type)
    if "LOCALIZER" in image_type:
        return Eligibility("ignored", "localizer", f"ImageType {shown}: a scout, no volume")
    technique = text(header, "VolumeBasedCalculationTechnique").upper()
    if PROJECTION_WORDS & {*image_type, technique}:
        return Eligibility("ignored", "projection", f"ImageType {shown}: a projection through the volume, no volume")
    if PICTURE_WORDS & set(image_type):
        return Eligibility("ignored", "picture", f"ImageType {shown}: a fused or captured picture, no measured values")
    photometric = text(header, "PhotometricInterpretation").upper()
    if (number(header, "SamplesPerPixel") or 1) > 1 or photometric.startswith(("RGB", "PALETTE", "YBR")):
        return Eligibility("ignored", "picture", f"colour image ({photometric}): a fused or captured picture")
    if text(header, "BurnedInAnnotation").upper() == "YES":
        return Eligibility("ignored", "picture", "BurnedInAnnotation YES: text is drawn into the pixels")
    return None


def _judge_ct(header: Dataset) -> Eligibility:
    """A CT volume guides; scouts, projections, dose pages and images without a place in the patient do not."""
    picture = _judge_picture(header)
    if picture is not None:
        return picture
    if not items(header, "PerFrameFunctionalGroupsSequence"):
        missing = [keyword for keyword in GEOMETRY if not values(header, keyword)]
        if missing:
            return Eligibility("ignored", "no-geometry", f"CT without {' and '.join(missing)}: cannot lie over a PET")
    return Eligibility("guide", "guide", "CT volume: may guide a PET of its study")


def _judge_derived(header: Dataset) -> Eligibility | None:
    if text(header, "ImageType").upper() != "DERIVED":
        return None
    shown = "\\".join(values(header, "ImageType"))
    return Eligibility(
        "ignored",
        "derived",
        f"ImageType {shown}: already derived from another series (resampled, filtered or cut); what the scanner's blur "
        "has become in it is not known",
        "send the original series",
    )


def _uncorrected(what: str) -> Eligibility:
    return Eligibility(
        "ignored", "not-attenuation-corrected", f"{what}: not attenuation corrected, its values are no activity"
    )


def _missing(keywords: list[str]) -> Eligibility:
    return Eligibility(
        "refused",
        "header-incomplete",
        f"PET header without {', '.join(keywords)}: type, correction, unit and place would be guesses",
        "send the series as the scanner wrote it; de-identification must keep these attributes",
    )


def _per_frame(series_type: str) -> Eligibility:
    return Eligibility(
        "refused",
        series_type.lower(),
        f"SeriesType {series_type}: one volume per time or gate, and only static and whole-body volumes are processed",
        "send the static or whole-body reconstruction of the same acquisition",
    )


def _judge_pet(header: Dataset) -> Eligibility:
    """PET Image Storage: what is plainly not ours first, then what is missing, then what we cannot do."""
    series_type = [value.upper().replace("_", " ") for value in values(header, "SeriesType")]
    corrections = {value.upper() for value in values(header, "CorrectedImage")}
    if "REPROJECTION" in series_type[1:]:
        return Eligibility("ignored", "projection", "SeriesType value 2 REPROJECTION: a MIP series, no volume")
    if text(header, "CountsSource").upper() == "TRANSMISSION":
        return Eligibility("ignored", "transmission", "CountsSource TRANSMISSION: an attenuation map, no emission")
    if corrections and "ATTN" not in corrections:
        return _uncorrected(f"CorrectedImage {'/'.join(sorted(corrections))} without ATTN")
    derived = _judge_derived(header)
    if derived is not None:
        return derived
    required = ("CorrectedImage", "Units", "SeriesType", *GEOMETRY)
    missing = [keyword for keyword in required if not values(header, keyword)]
    if missing:
        return _missing(missing)
    if series_type[0] in PER_FRAME_TYPES:
        return _per_frame(series_type[0])
    if series_type[0] not in (*VOLUME_TYPES, *PER_FRAME_TYPES) or series_type[1:2] != ["IMAGE"]:
        return Eligibility(
            "refused",
            "series-type",
            f"SeriesType {'/'.join(series_type)} is none of STATIC/IMAGE, WHOLE BODY/IMAGE, DYNAMIC/IMAGE, GATED/IMAGE",
            "have the SeriesType corrected at its source",
        )
    return _judge_units(header) or Eligibility("pet", "pet", f"attenuation-corrected PET, {series_type[0]}")


def _judge_units(header: Dataset) -> Eligibility | None:
    units = text(header, "Units").upper()
    if units in QUANTITATIVE_UNITS or (units == "CNTS" and _philips_factor(header)):
        return None
    detail = "without a usable Philips factor (7053,xx00) or (7053,xx09)" if units == "CNTS" else "not read"
    return Eligibility(
        "refused",
        "units",
        f"Units {units} {detail}: the values cannot be turned into activity concentration or SUV",
        "reconstruct or export the series in BQML",
    )


def _philips_factor(header: Dataset) -> bool:
    """Whether one of the two Philips factors, SUV or activity concentration, is there and positive."""
    factors = (private_number(header, 0x7053, "Philips PET Private Group", element) for element in (0x00, 0x09))
    return any(factor is not None and factor > 0 for factor in factors)


def _judge_enhanced_pet(header: Dataset) -> Eligibility:
    """Enhanced PET says the same with other attributes: AttenuationCorrected, ImageType value 3, value mapping."""
    corrected = text(header, "AttenuationCorrected").upper()
    if text(header, "CountsSource").upper() == "TRANSMISSION":
        return Eligibility("ignored", "transmission", "CountsSource TRANSMISSION: an attenuation map, no emission")
    if corrected == "NO":
        return _uncorrected("AttenuationCorrected NO")
    derived = _judge_derived(header)
    if derived is not None:
        return derived
    flavour = "".join(values(header, "ImageType")[2:3]).upper()
    frames = items(header, "PerFrameFunctionalGroupsSequence")
    groups = (*items(header, "SharedFunctionalGroupsSequence"), *frames[:1])
    required = {
        "AttenuationCorrected": corrected == "YES",
        "ImageType value 3": bool(flavour),
        "FrameOfReferenceUID": bool(values(header, "FrameOfReferenceUID")),
        "PerFrameFunctionalGroupsSequence": bool(frames),
        "RealWorldValueMappingSequence": any(items(group, "RealWorldValueMappingSequence") for group in groups),
    }
    missing = [name for name, there in required.items() if not there]
    if missing:
        return _missing(missing)
    per_frame = "GATED" if "GATED" in flavour else flavour
    if per_frame in PER_FRAME_TYPES:
        return _per_frame(per_frame)
    return Eligibility("pet", "pet", f"attenuation-corrected Enhanced PET, {flavour.replace('_', ' ')}")
