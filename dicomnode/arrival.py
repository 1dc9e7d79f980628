"""What the rules need to know of each instance that came, and the geometry of a stack of slices.

Positions are LPS mm (PS3.3 C.7.6.2.1.1). A stack is described along one axis: the normal of its slices, the cross
product of the row and the column direction of ImageOrientationPatient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from pydicom.dataset import Dataset

from dicomnode.headers import integer, items, numbers, text

__all__ = [
    "SAME_POSITION_MM",
    "Arrival",
    "Vector",
    "arrival_of",
    "dot",
    "frame_planes",
    "levels",
    "normal_of",
    "placed",
    "sideways_mm",
    "stack_flaw",
    "step_of",
]

Vector = tuple[float, float, float]

SAME_POSITION_MM = 0.01  # two slices nearer than this along the normal are one position written twice
# A real whole-body PET steps by 3.19 to 3.29 mm where bed positions meet (2.4 %); a missing slice doubles a gap.
GAP_TOLERANCE = 0.05
MISSING_SLICE = 1.5


@dataclass(frozen=True)
class Arrival:
    """One instance of a series, as it was received.

    received_at  unix seconds.
    position     ImagePositionPatient, LPS mm; None where the header has none.
    orientation  ImageOrientationPatient, six direction cosines; None where the header has none.
    frames       NumberOfFrames of this instance; 1 for a single slice.
    """

    sop_instance_uid: str
    received_at: float
    position: Vector | None
    orientation: tuple[float, ...] | None
    frames: int = 1


def arrival_of(header: Dataset, *, received_at: float) -> Arrival:
    """The arrival of one instance. Values that cannot be read become None; frames is at least 1."""
    position, orientation = numbers(header, "ImagePositionPatient"), numbers(header, "ImageOrientationPatient")
    return Arrival(
        sop_instance_uid=text(header, "SOPInstanceUID"),
        received_at=received_at,
        position=(position[0], position[1], position[2]) if len(position) == 3 else None,
        orientation=orientation if len(orientation) == 6 else None,
        frames=max(1, integer(header, "NumberOfFrames") or 1),
    )


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Scalar product of two vectors of three."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def normal_of(orientation: Sequence[float] | None) -> Vector | None:
    """Unit normal of a slice: row direction x column direction. None when the six cosines span no plane.

    >>> normal_of((1, 0, 0, 0, 1, 0))
    (0.0, 0.0, 1.0)
    """
    if orientation is None or len(orientation) != 6 or not all(math.isfinite(value) for value in orientation):
        return None
    (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
    cross = (b * f - c * e, c * d - a * f, a * e - b * d)
    length = math.sqrt(dot(cross, cross))
    if not 0.5 < length < 1.5:  # row and column directions are unit vectors at right angles
        return None
    return (cross[0] / length, cross[1] / length, cross[2] / length)


def placed(planes: Iterable[tuple[Sequence[float] | None, Sequence[float] | None]]) -> list[tuple[Vector, Vector]]:
    """(position, unit normal) of each plane that has both, in finite numbers; planes without a place are left out."""
    found = []
    for position, orientation in planes:
        normal = normal_of(orientation)
        if normal is not None and position is not None and len(position) == 3 and all(map(math.isfinite, position)):
            found.append(((position[0], position[1], position[2]), normal))
    return found


def levels(heights: Iterable[float]) -> tuple[tuple[float, int], ...]:
    """The distinct positions along the normal, in mm and ascending, each with how many slices lie there.

    >>> levels([3.0, 0.0, 3.001])
    ((0.0, 1), (3.0, 2))
    """
    found: list[tuple[float, int]] = []
    for height in sorted(heights):
        if found and height - found[-1][0] < SAME_POSITION_MM:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((height, 1))
    return tuple(found)


def step_of(heights: Sequence[float]) -> float | None:
    """Slice spacing in mm: the median distance of neighbours in ascending `heights`; None for fewer than two."""
    return median(after - before for before, after in pairwise(heights)) if len(heights) > 1 else None


def stack_flaw(heights: Sequence[float]) -> tuple[str, str] | None:
    """Why slices at these ascending heights (mm) make no regular stack, as (code, sentence); None if they do.

    "gap": a distance of neighbours is half as large again as another, so slices are missing. "irregular": none is,
    but not all distances lie within 5 % of their median.

    >>> stack_flaw([0.0, 3.0, 6.0, 12.0])
    ('gap', 'slices missing between 6.00 and 12.00 mm: 4 slices, 3 mm apart')
    """
    step = step_of(heights)
    if step is None:
        return None
    gaps = list(pairwise(heights))
    widths = [after - before for before, after in gaps]
    narrow, wide = min(widths), max(widths)
    if wide >= MISSING_SLICE * narrow:
        holes = [(before, after) for before, after in gaps if after - before >= MISSING_SLICE * narrow]
        before, after = holes[0]
        where = f"between {before:.2f} and {after:.2f} mm"
        more = f" and at {len(holes) - 1} other places" if len(holes) > 1 else ""
        return "gap", f"slices missing {where}{more}: {len(heights)} slices, {narrow:.4g} mm apart"
    if max(wide - step, step - narrow) > GAP_TOLERANCE * step:
        return "irregular", f"slices {narrow:.4g} to {wide:.4g} mm apart: not one grid"
    return None


def sideways_mm(places: Sequence[tuple[Vector, Vector]]) -> float:
    """How far a slice lies beside the line through the first slice along its normal, in mm; 0 for a right-angled stack.

    places   as from `placed`, not empty.
    """
    first, normal = places[0]
    farthest = 0.0
    for position, _ in places:
        offset = tuple(position[axis] - first[axis] for axis in range(3))
        along = dot(offset, normal)
        farthest = max(farthest, math.dist(offset, tuple(along * component for component in normal)))
    return farthest


def frame_planes(header: Dataset) -> tuple[tuple[Vector | None, tuple[float, ...] | None], ...]:
    """Position and orientation of every frame of a multi-frame object (PS3.3 C.7.6.16.2.3 and .4).

    The per-frame functional groups come first, the shared ones stand in for what they lack. () without them.
    """
    shared = next(iter(items(header, "SharedFunctionalGroupsSequence")), Dataset())
    planes = []
    for frame in items(header, "PerFrameFunctionalGroupsSequence"):
        position = _functional(frame, shared, "PlanePositionSequence", "ImagePositionPatient")
        orientation = _functional(frame, shared, "PlaneOrientationSequence", "ImageOrientationPatient")
        planes.append(
            (
                (position[0], position[1], position[2]) if len(position) == 3 else None,
                orientation if len(orientation) == 6 else None,
            )
        )
    return tuple(planes)


def _functional(frame: Dataset, shared: Dataset, group: str, keyword: str) -> tuple[float, ...]:
    for holder in (frame, shared):
        for item in items(holder, group):
            return numbers(item, keyword)
    return ()
