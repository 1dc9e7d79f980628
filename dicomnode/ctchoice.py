"""Which CT guides a PET: same study, same frame of reference, best cover of the PET along its axis.

The order of preference (design: the life of a study):

    coverage    share of the PET's axial extent that lies inside the CT's; 1 % less is as good
    thickness   thinner slices; 0.1 mm thicker is as good
    purpose     the attenuation-correction CT
    contrast    without contrast agent
    UID         the smallest, so that the same candidates always give the same choice

Scouts never, and a CT of another study or frame of reference never: its voxels lie elsewhere in the patient.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydicom.dataset import Dataset

from dicomnode.arrival import Arrival, Vector, dot, frame_planes, levels, placed, sideways_mm, stack_flaw, step_of
from dicomnode.headers import items, number, text, values

__all__ = ["GuideChoice", "GuideDecision", "SeriesGeometry", "choose_guide", "geometry_of", "guide_wait"]

COVERAGE_TIE = 0.01
THICKNESS_TIE_MM = 0.1
SHEAR_MM = 0.1  # a slice this far beside the normal through the first: the stack is not right-angled
PARALLEL = 0.999  # cosine between the normals of PET and CT: 2.6 degrees

_CORRECTION_WORDS = re.compile(r"\b(CT[ _-]?AC|AC[ _-]?CT|ACCT|ATTENUATION|ATTN)(?![A-Z])|_?AC_CT", re.IGNORECASE)


@dataclass(frozen=True)
class SeriesGeometry:
    """Where a series lies along one axis, and what the choice of a CT weighs.

    axial_min_mm, axial_max_mm    outer faces of the stack (half a slice beyond the outer centres) along the axis.
    slice_thickness_mm            SliceThickness; the spacing where the header has none; 0 when neither is known.
    slices                        distinct positions.
    is_parallel                   the slices are parallel to the ones the axis belongs to.
    flaw                          why the slices make no regular stack (missing, uneven, sheared); "" if they do.
    axis                          unit vector the extent is measured along; the normal of the slices if none was given.
    attenuation_correction_hint   the header says that this CT was made for attenuation correction.
    attenuation_correction_method of a PET; scanners write the description of the CT they used into it.
    """

    study_uid: str
    series_uid: str
    frame_of_reference_uid: str
    axial_min_mm: float
    axial_max_mm: float
    slice_thickness_mm: float
    slices: int
    is_localizer: bool = False
    is_parallel: bool = True
    flaw: str = ""
    axis: Vector = (0.0, 0.0, 1.0)
    attenuation_correction_hint: bool = False
    contrast: bool = False
    description: str = ""
    attenuation_correction_method: str = ""


@dataclass(frozen=True)
class GuideChoice:
    """The CT chosen, or none. `coverage`: share of the PET's axial extent, 0 to 1.

    considered  every candidate by ascending UID, each with why it was taken or not.
    """

    series_uid: str | None
    code: str
    reason: str
    coverage: float
    considered: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class GuideDecision:
    """What to do now: use the CT, run unguided, wait for a CT until a time (unix seconds), or hold for a person."""

    state: Literal["use", "unguided", "waiting", "held"]
    code: str
    reason: str
    until: float | None = None


def geometry_of(arrivals: Sequence[Arrival], header: Dataset, *, normal: Vector | None = None) -> SeriesGeometry:
    """The geometry of a series along `normal` (of the PET it is to be compared with), or along its own.

    Instances without a place are left out; a series without any has no slices and an extent of zero.
    """
    planes = frame_planes(header) or tuple((one.position, one.orientation) for one in arrivals)
    places = sorted(placed(planes))
    axis = normal or (places[0][1] if places else (0.0, 0.0, 1.0))
    heights = tuple(height for height, _ in levels(dot(position, axis) for position, _ in places))
    step = step_of(heights)
    thickness = abs(number(header, "SliceThickness") or step or 0.0)
    half = (step or thickness) / 2
    return SeriesGeometry(
        study_uid=text(header, "StudyInstanceUID"),
        series_uid=text(header, "SeriesInstanceUID"),
        frame_of_reference_uid=text(header, "FrameOfReferenceUID"),
        axial_min_mm=heights[0] - half if heights else 0.0,
        axial_max_mm=heights[-1] + half if heights else 0.0,
        slice_thickness_mm=thickness,
        slices=len(heights),
        is_localizer="LOCALIZER" in (value.upper() for value in values(header, "ImageType")),
        is_parallel=all(abs(dot(own, axis)) >= PARALLEL for _, own in places),
        flaw=_flaw(places, heights),
        axis=axis,
        attenuation_correction_hint=_made_for_correction(header),
        contrast=_with_contrast(header),
        description=text(header, "SeriesDescription"),
        attenuation_correction_method=", ".join(values(header, "AttenuationCorrectionMethod")),
    )


def _flaw(places: Sequence[tuple[Vector, Vector]], heights: Sequence[float]) -> str:
    """Why these slices make no right-angled regular stack; "" if they do. Only such a stack can be read as a volume."""
    uneven = stack_flaw(heights)
    if uneven is not None:
        return uneven[1]
    aside = sideways_mm(places) if places else 0.0
    return f"slices lie up to {aside:.3g} mm aside, as with a tilted gantry" if aside > SHEAR_MM else ""


def _made_for_correction(header: Dataset) -> bool:
    return any(_CORRECTION_WORDS.search(text(header, keyword)) for keyword in ("SeriesDescription", "ProtocolName"))


def _with_contrast(header: Dataset) -> bool:
    agent = text(header, "ContrastBolusAgent").upper()
    return bool(items(header, "ContrastBolusAgentSequence")) or agent not in ("", "NONE", "NO")


def choose_guide(pet: SeriesGeometry, candidates: Sequence[SeriesGeometry]) -> GuideChoice:
    """The CT that guides `pet`. All geometries along the PET's normal. Independent of the order of the candidates.

    Raises ValueError when two candidates have the same SeriesInstanceUID.
    """
    ordered = sorted(candidates, key=lambda one: one.series_uid)
    if len({one.series_uid for one in ordered}) < len(ordered):
        raise ValueError("two candidates with one SeriesInstanceUID")
    verdicts = {one.series_uid: _unusable(pet, one) for one in ordered}
    usable = [one for one in ordered if not verdicts[one.series_uid]]
    if not usable:
        code, reason = ("no-usable-ct", "no CT of this study lies over the PET") if ordered else ("no-ct", "no CT came")
        return GuideChoice(None, code, reason, 0.0, tuple(verdicts.items()))
    chosen, passed_over = _best(pet, usable)
    coverage = _coverage(pet, chosen)
    reason = f"covers {coverage:.0%} of the PET's axial extent, slices of {chosen.slice_thickness_mm:.4g} mm"
    verdicts |= passed_over | {chosen.series_uid: f"chosen: {reason}"}
    return GuideChoice(chosen.series_uid, "chosen", reason, coverage, tuple(verdicts.items()))


def _unusable(pet: SeriesGeometry, ct: SeriesGeometry) -> str:
    """Why this CT cannot guide the PET at all; "" if it can."""
    if ct.study_uid != pet.study_uid:
        return "belongs to another study"
    if not ct.frame_of_reference_uid or ct.frame_of_reference_uid != pet.frame_of_reference_uid:
        return "has another frame of reference than the PET"
    if ct.is_localizer:
        return "is a scout"
    if ct.slices < 2:
        return f"has {ct.slices} placed slices, no volume"
    if not ct.is_parallel:
        return "its slices are not parallel to the PET's"
    if ct.flaw:
        return f"is no regular volume: {ct.flaw}"
    return "" if _coverage(pet, ct) > 0 else "does not overlap the PET"


def _coverage(pet: SeriesGeometry, ct: SeriesGeometry) -> float:
    """Share of the PET's axial extent inside the CT's, 0 to 1."""
    extent = pet.axial_max_mm - pet.axial_min_mm
    overlap = min(pet.axial_max_mm, ct.axial_max_mm) - max(pet.axial_min_mm, ct.axial_min_mm)
    return max(0.0, overlap) / extent if extent > 0 else 0.0


def _best(pet: SeriesGeometry, usable: Sequence[SeriesGeometry]) -> tuple[SeriesGeometry, dict[str, str]]:
    """The preferred CT, and why each other one was passed over. Each rule keeps what is as good as its best."""
    rules: tuple[tuple[str, float, Callable[[SeriesGeometry], float]], ...] = (
        ("covers less of the PET than the chosen CT", COVERAGE_TIE, lambda ct: -_coverage(pet, ct)),
        ("has thicker slices than the chosen CT", THICKNESS_TIE_MM, lambda ct: ct.slice_thickness_mm or math.inf),
        ("was not made for attenuation correction, the chosen CT was", 0.0, lambda ct: not _corrects(pet, ct)),
        ("shows contrast agent, the chosen CT does not", 0.0, lambda ct: ct.contrast),
    )
    remaining = list(usable)
    passed_over: dict[str, str] = {}
    for shortcoming, tie, cost in rules:
        limit = min(cost(ct) for ct in remaining) + tie
        passed_over |= {ct.series_uid: shortcoming for ct in remaining if cost(ct) > limit}
        remaining = [ct for ct in remaining if cost(ct) <= limit]
    chosen = min(remaining, key=lambda ct: ct.series_uid)
    passed_over |= {ct.series_uid: "as good as the chosen CT; its UID comes later" for ct in remaining if ct != chosen}
    return chosen, passed_over


def _corrects(pet: SeriesGeometry, ct: SeriesGeometry) -> bool:
    """Whether this CT corrected the PET: it says so, or the PET names it in AttenuationCorrectionMethod."""
    named = bool(ct.description) and ct.description.casefold() in pet.attenuation_correction_method.casefold()
    return ct.attenuation_correction_hint or named


def guide_wait(
    choice: GuideChoice, *, completed_at: float, now: float, ct_wait_s: float, allow_unguided: bool
) -> GuideDecision:
    """Use the chosen CT, or wait `ct_wait_s` after the PET was complete, then run unguided or hold.

    completed_at, now   unix seconds.
    allow_unguided      the route lets the method run without a CT (the paper's phantom mode).
    """
    if choice.series_uid is not None:
        return GuideDecision("use", choice.code, choice.reason)
    until = completed_at + ct_wait_s
    if now < until:
        return GuideDecision("waiting", choice.code, f"{choice.reason}; one may still come", until)
    waited = choice.reason + (f" within {ct_wait_s:g} s after the PET was complete" if ct_wait_s else "")
    if allow_unguided:
        return GuideDecision("unguided", choice.code, f"{waited}: deblurred without a guide")
    remedy = "send the CT of the same frame of reference, or allow unguided runs in the route"
    return GuideDecision("held", choice.code, f"{waited}: {remedy}")
