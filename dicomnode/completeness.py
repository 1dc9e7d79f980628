"""Is a series whole? Association release is never the trigger: time, positions and counts are.

A series is complete when all of this holds (design: the life of a study):

    quiet      nothing new for `quiet_s`
    count      as many instances as the source peer holds, where it was asked
    positions  uniform along the normal of the slices: neighbouring gaps within 5 % of their median
    slices     as many positions as NumberOfSlices (0054,0081) says, where present

Uniform gaps alone prove little: a series of which every second slice is missing is uniform too. Without a count from
the header or the peer, the spacing must therefore agree with SpacingBetweenSlices or SliceThickness. What no header
can show is a missing end; the reason then says so. docs/decisions/0003-what-counts-as-complete.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydicom.dataset import Dataset

from dicomnode.arrival import MISSING_SLICE, Arrival, dot, frame_planes, levels, placed, stack_flaw, step_of
from dicomnode.headers import integer, items, number, text

__all__ = ["Completeness", "completeness"]

PARALLEL = 0.9999  # cosine between slice normals: 0.8 degrees

SEND_MISSING = "send what is missing, or the whole series again"
RECONSTRUCT = "reconstruct or export the volume as one series with one slice spacing"
RESEND = "send the series again as the scanner wrote it"
STATIC_ONLY = "send the static or whole-body reconstruction as a series of its own"


@dataclass(frozen=True)
class Completeness:
    """The verdict. `until`, unix seconds: when to look again if nothing comes; only set while waiting.

    `remedy`: what a person can do about it; only set when held.
    """

    state: Literal["complete", "waiting", "held"]
    code: str
    reason: str
    until: float | None = None
    remedy: str = ""


@dataclass(frozen=True)
class _Finding:
    """One thing that keeps a series from being complete; `curable` if more instances can mend it."""

    code: str
    reason: str
    curable: bool
    remedy: str = SEND_MISSING


@dataclass(frozen=True)
class _Stack:
    """Distinct slice heights (mm, ascending), and how many images lie at each."""

    heights: tuple[float, ...]
    repeats: tuple[int, ...]

    @property
    def images(self) -> int:
        return sum(self.repeats)


def completeness(
    arrivals: Sequence[Arrival],
    header: Dataset,
    *,
    now: float,
    quiet_s: float,
    give_up_h: float,
    expected_instances: int | None = None,
) -> Completeness:
    """Whether the series is complete, waits for more until a time, or is held for a person.

    header              one instance of the series, without pixels.
    now                 unix seconds, of the clock that stamped the arrivals; an arrival stamped later than `now` (the
                        clock was set back) has only just come.
    expected_instances  NumberOfSeriesRelatedInstances at the source peer, where it was asked.

    The order of `arrivals` does not matter, and a repeated SOP Instance UID counts once. What more instances cannot
    mend is held as soon as it is quiet; the rest waits until `give_up_h` after the last arrival.
    Raises ValueError when there are no arrivals.
    """
    if not arrivals:
        raise ValueError("no arrivals: there is no series to judge")
    last = max(arrival.received_at for arrival in arrivals)
    instances = _once_each(arrivals)
    if now < last + quiet_s:
        return Completeness("waiting", "quiet", f"{len(instances)} instances so far, still arriving", last + quiet_s)
    verdict = _judge(instances, header, expected_instances)
    if isinstance(verdict, str):
        return Completeness("complete", "complete", f"{verdict}; nothing new for {quiet_s:g} s")
    give_up = last + give_up_h * 3600
    if not verdict.curable:
        return Completeness("held", verdict.code, verdict.reason, remedy=verdict.remedy)
    if now < give_up:
        return Completeness("waiting", verdict.code, verdict.reason, give_up)
    given_up = f"{verdict.reason}; nothing new for {give_up_h:g} h"
    return Completeness("held", verdict.code, given_up, remedy=verdict.remedy)


def _once_each(arrivals: Sequence[Arrival]) -> tuple[Arrival, ...]:
    """One arrival per SOP Instance UID, the first that came, in the order of the UIDs."""
    first: dict[str, Arrival] = {}
    for arrival in sorted(arrivals, key=lambda one: (one.sop_instance_uid, one.received_at, repr(one))):
        first.setdefault(arrival.sop_instance_uid, arrival)
    return tuple(first.values())


def _judge(instances: tuple[Arrival, ...], header: Dataset, expected: int | None) -> _Finding | str:
    """What keeps the series from being complete, or the proof that it is."""
    if expected is not None and len(instances) != expected:
        return _Finding("peer-count", f"{len(instances)} instances here, {expected} at the source peer", True)
    multi_frame = bool(items(header, "PerFrameFunctionalGroupsSequence")) or any(one.frames > 1 for one in instances)
    stack = _frames_of(instances, header) if multi_frame else _slices_of(instances)
    if isinstance(stack, _Finding):
        return stack
    finding = _too_few(stack, header, expected) or _gaps(stack) or _repeats(stack, header) or _count(stack, header)
    if finding is not None:
        return finding
    step = step_of(stack.heights)
    shown = f"{len(stack.heights)} slices {step:.4g} mm apart"
    if integer(header, "NumberOfSlices") is not None:
        return f"{shown}, as many as NumberOfSlices says"
    if expected is not None:
        return f"{shown}, {expected} instances as at the source peer"
    if multi_frame:
        return f"{shown}, all in one multi-frame object"
    return _spacing_evidence(stack, header, shown)


def _slices_of(instances: tuple[Arrival, ...]) -> _Stack | _Finding:
    """The stack of a single-frame series."""
    return _stack_of([(one.position, one.orientation) for one in instances], "instances")


def _frames_of(instances: tuple[Arrival, ...], header: Dataset) -> _Stack | _Finding:
    """The stack inside a multi-frame object: one instance, or all parts of a concatenation (PS3.3 C.7.6.16.2.2.4)."""
    parts = integer(header, "InConcatenationTotalNumber") or 1
    if parts > 1:
        reason = f"multi-frame object in {parts} parts: concatenations are not read"
        return _Finding("concatenation", reason, False, RECONSTRUCT)
    if len(instances) > 1:
        reason = f"{len(instances)} multi-frame objects: which is the volume?"
        return _Finding("several-multi-frame", reason, False, RECONSTRUCT)
    stated = integer(header, "NumberOfFrames") or 1
    planes = frame_planes(header)
    if not stated == len(planes) == instances[0].frames:
        counts = f"NumberOfFrames {stated}, {len(planes)} described, {instances[0].frames} received"
        return _Finding("frames", f"the frames of the multi-frame object do not agree: {counts}", False, RESEND)
    return _stack_of(planes, "frames")


def _stack_of(planes: Sequence[tuple[Sequence[float] | None, Sequence[float] | None]], what: str) -> _Stack | _Finding:
    places = placed(planes)
    if len(places) < len(planes):
        lost = len(planes) - len(places)
        reason = f"{lost} of {len(planes)} {what} without a usable ImagePositionPatient or ImageOrientationPatient"
        return _Finding("no-position", reason, False, RESEND)
    axis = places[0][1]
    askew = sum(1 for _, normal in places if dot(axis, normal) < PARALLEL)
    if askew:
        reason = f"{askew} of {len(planes)} {what} are not parallel to the first"
        return _Finding("mixed-orientation", reason, False, RECONSTRUCT)
    found = levels(dot(position, axis) for position, _ in places)
    return _Stack(tuple(height for height, _ in found), tuple(count for _, count in found))


def _too_few(stack: _Stack, header: Dataset, expected: int | None) -> _Finding | None:
    """One slice proves no spacing: a volume has at least two."""
    if len(stack.heights) > 1:
        return None
    stated = integer(header, "NumberOfSlices")
    if 1 in (stated, expected):
        return _Finding("single-slice", "the series is one slice: no volume to deblur", False, RECONSTRUCT)
    of = f" of {stated}" if stated is not None else ""
    return _Finding("single-slice", f"1{of} slices: one slice proves no spacing", True)


def _gaps(stack: _Stack) -> _Finding | None:
    """The gap test on the distances of neighbouring slices along the normal."""
    flaw = stack_flaw(stack.heights)
    if flaw is None:
        return None
    code, reason = flaw
    return _Finding(code, reason, code == "gap", RECONSTRUCT if code == "irregular" else SEND_MISSING)


def _images_per_position(header: Dataset) -> tuple[bool, int | None]:
    """Whether the series repeats positions over time or gates, and how often it says so (PS3.3 C.8.9.4.1.9).

    NumberOfTimeSlices counts for DYNAMIC alone: a real STATIC series numbers its bed positions with it.
    """
    series_type = text(header, "SeriesType").upper()
    if series_type == "DYNAMIC":
        return True, integer(header, "NumberOfTimeSlices")
    if series_type == "GATED":
        slots, intervals = integer(header, "NumberOfTimeSlots"), integer(header, "NumberOfRRIntervals")
        return True, slots * (intervals or 1) if slots else None
    return False, 1


def _repeats(stack: _Stack, header: Dataset) -> _Finding | None:
    """Every position equally often in a DYNAMIC or GATED series; not each of them twice in any other."""
    repeating, stated = _images_per_position(header)
    least, most = min(stack.repeats), max(stack.repeats)
    if not repeating:
        if least == 1:  # strays that lie on another slice: the reader takes one of them
            return None
        reason = f"each position {least} times or more: frames of a series that does not call itself DYNAMIC or GATED"
        return _Finding("repeated-positions", reason, False, STATIC_ONLY)
    if least != most or (stated is not None and most < stated):
        times = f", {stated} said" if stated is not None else ""
        return _Finding("frames-missing", f"{least} to {most} images per position{times}", True)
    if stated is not None and most > stated:
        return _Finding("frames-surplus", f"{most} images per position, {stated} said", False, RESEND)
    return None


def _count(stack: _Stack, header: Dataset) -> _Finding | None:
    """As many positions as NumberOfSlices says."""
    stated, found = integer(header, "NumberOfSlices"), len(stack.heights)
    if stated is None or found == stated:
        return None
    reason = f"{found} of {stated} slices (NumberOfSlices)"
    return _Finding("slice-count", reason, found < stated, SEND_MISSING if found < stated else RECONSTRUCT)


def _spacing_evidence(stack: _Stack, header: Dataset, shown: str) -> _Finding | str:
    """Without any count: the spacing must be the one the header states, else slices may be missing regularly."""
    step = step_of(stack.heights) or 0.0
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        stated = abs(number(header, keyword) or 0.0)
        if not stated:
            continue
        if step >= MISSING_SLICE * stated:
            reason = f"{shown}, but {keyword} is {stated:g} mm: every second slice may be missing"
            return _Finding("sparse", reason, True)
        return f"{shown}, which agrees with {keyword} {stated:g} mm; no count is stated, a missing end would not show"
    reason = f"{shown}, but neither NumberOfSlices nor SpacingBetweenSlices nor SliceThickness to prove it by"
    return _Finding("unproven", reason, True)
