"""One grid or none: from slice positions and orientation to a regular stack. Numbers only.

PS3.3 C.7.6.2.1.1 (Image Plane Module): the voxel at row r, column c of a slice lies at
    position + row_direction * column_spacing * c + column_direction * row_spacing * r
Slices are ordered by position along the normal n = row_direction x column_direction. The step between slices comes
from the positions, never from SliceThickness or SpacingBetweenSlices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sop.errors import Refused

__all__ = ["GRID_TOLERANCE", "STEP_TOLERANCE", "LATERAL_MM", "SAME_PLACE_MM", "Stack", "axes", "normal_of", "stack"]

# Steps between slices may differ from their median by this fraction: a GE Discovery ST whole body measured 3.19 to
# 3.29 mm where beds meet (2.4 % of 3.27 mm); a missing slice is 100 %.
STEP_TOLERANCE = 0.05
# No slice may lie farther from its place on the fitted grid than this fraction of a step; 1.2 % on that scanner.
GRID_TOLERANCE = 0.10
# How far a slice's first voxel may lie beside the line along the normal through the first slice, mm. A gantry tilt of
# one degree moves the slices of a 10 mm stack by 0.17 mm.
LATERAL_MM = 0.1
# Two slices nearer than this along the normal lie at the same place, mm.
SAME_PLACE_MM = 0.01
# Direction cosines are written with as few as four digits.
COSINE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Stack:
    """A regular grid: `order` sorts the slices along the normal; the rest as in Volume."""

    order: tuple[int, ...]
    spacing: NDArray[np.float64]
    origin: NDArray[np.float64]
    direction: NDArray[np.float64]


def axes(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) from the six cosines of ImageOrientationPatient: columns normal, column direction, row direction.

    These are the unit steps of slice, row and column index. Raises Refused "orientation" where the cosines are not two
    unit vectors at a right angle.
    """
    across, down = np.asarray(orientation, dtype=np.float64).reshape(2, 3)
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if not np.all(np.isfinite(orientation)) or max(abs(n - 1) for n in lengths) > COSINE_TOLERANCE \
            or abs(across @ down) > COSINE_TOLERANCE:
        raise Refused(
            "orientation",
            f"ImageOrientationPatient {list(map(float, orientation))} is not two unit vectors at a right angle",
            "send the series again from the scanner or the PACS; an export has damaged the geometry",
        )
    across, down = across / lengths[0], down / lengths[1]
    normal = np.cross(across, down)
    return np.stack([normal / np.linalg.norm(normal), down, across], axis=1)


def normal_of(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit normal row x column of six direction cosines."""
    return axes(orientation)[:, 0]


def stack(
    positions: NDArray[np.float64],
    orientation: NDArray[np.float64],
    pixel_spacing: tuple[float, float],
    *,
    single_step_mm: float | None = None,
) -> Stack:
    """The regular grid of slices at `positions` (n, 3) mm LPS, no two at the same place.

    pixel_spacing    row spacing, column spacing in mm.
    single_step_mm   spacing to use where there is one slice only.

    Raises Refused: "gap" (missing slice, with its position), "uneven-spacing", "sheared", "duplicate-position",
    "single-slice", "pixel-spacing", "orientation".
    """
    positions = np.asarray(positions, dtype=np.float64)
    if min(pixel_spacing) <= 0 or not np.all(np.isfinite(pixel_spacing)):
        raise Refused("pixel-spacing", f"PixelSpacing {pixel_spacing} mm is not positive",
                      "send the series again from the scanner or the PACS")
    direction = axes(orientation)
    along = positions @ direction[:, 0]
    order = np.argsort(along, kind="stable")
    sorted_positions, along = positions[order], along[order]
    if len(positions) == 1:
        if single_step_mm is None or not single_step_mm > 0:
            raise Refused("single-slice", "one slice without SliceThickness or SpacingBetweenSlices has no depth",
                          "send all slices of the series")
        step = direction[:, 0] * single_step_mm
    else:
        _check_steps(along)
        _check_right_angle(sorted_positions, direction[:, 0])
        step = (sorted_positions[-1] - sorted_positions[0]) / (len(positions) - 1)
    depth = float(np.linalg.norm(step))
    direction[:, 0] = step / depth
    return Stack(
        order=tuple(int(i) for i in order),
        spacing=np.array([depth, *pixel_spacing], dtype=np.float64),
        origin=sorted_positions[0],
        direction=direction,
    )


def _check_steps(along: NDArray[np.float64]) -> None:
    steps = np.diff(along)
    usual = float(np.median(steps))
    shortest = int(np.argmin(steps))
    if steps[shortest] < SAME_PLACE_MM:
        raise Refused("duplicate-position", f"two slices lie at {along[shortest]:.3f} mm along the normal",
                      "remove one of them, or send one series only")
    wide = np.flatnonzero(steps > usual * 1.5)
    if wide.size:
        at = int(wide[0])
        missing = sum(round(float(steps[i]) / usual) - 1 for i in wide)
        raise Refused(
            "gap",
            f"about {missing} slice(s) missing: after the slice at {along[at]:.3f} mm along the normal the next lies "
            f"at {along[at + 1]:.3f} mm, where the usual step is {usual:.3f} mm",
            "send the missing slices, or retrieve the whole series from the PACS",
        )
    worst = int(np.argmax(np.abs(steps - usual)))
    if abs(steps[worst] - usual) > STEP_TOLERANCE * usual:
        raise Refused(
            "uneven-spacing",
            f"the step after {along[worst]:.3f} mm along the normal is {steps[worst]:.4f} mm, others {usual:.4f} mm "
            f"(tolerance {100 * STEP_TOLERANCE:.0f} %)",
            "reconstruct the series with one slice spacing",
        )
    off = np.abs(along - np.linspace(along[0], along[-1], len(along)))
    if off.max() > GRID_TOLERANCE * usual:
        raise Refused(
            "uneven-spacing",
            f"the slice at {along[int(off.argmax())]:.3f} mm along the normal lies {off.max():.3f} mm off the even "
            f"grid (tolerance {100 * GRID_TOLERANCE:.0f} % of {usual:.3f} mm)",
            "reconstruct the series with one slice spacing",
        )


def _check_right_angle(positions: NDArray[np.float64], normal: NDArray[np.float64]) -> None:
    offsets = positions - positions[0]
    lateral = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    worst = float(lateral.max())
    if worst > LATERAL_MM:
        height = float(abs(offsets[int(lateral.argmax())] @ normal))
        angle = float(np.degrees(np.arctan2(worst, height)))
        raise Refused(
            "sheared",
            f"the slices do not lie above one another: one is {worst:.3f} mm aside (tolerance {LATERAL_MM} mm, "
            f"about {angle:.2f} degrees), as with a tilted gantry",
            "reconstruct the series without tilt, or resample it to a right-angled grid",
        )
