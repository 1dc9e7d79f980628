"""Geometry of a derived series against its source: the same field of view, twice as fine, nothing shifted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sop.checks.report import CheckItem, Limits, agreed, at_most
from sop.checks.stored import Instance, numbers, text

__all__ = ["geometry_items"]

_DECIMAL_STRINGS = ("ImagePositionPatient", "PixelSpacing", "SliceLocation", "RescaleSlope", "SpacingBetweenSlices",
                    "SliceThickness")
_CORNERS = np.array([[d, h, w] for d in (-0.5, 0.5) for h in (-0.5, 0.5) for w in (-0.5, 0.5)])


def _outer_corners(series: Sequence[Instance], step: NDArray[np.float64]) -> NDArray[np.float64]:
    """(8, 3) mm: where the outermost voxels end, of slices `step` apart."""
    header = series[0].header
    cosines = numbers(header, "ImageOrientationPatient", 6)
    row_spacing, column_spacing = numbers(header, "PixelSpacing", 2)
    edges = np.stack([step, cosines[3:] * row_spacing, cosines[:3] * column_spacing], axis=1)
    counts = np.array([len(series), float(header.Rows), float(header.Columns)])
    middle = series[0].position + edges @ ((counts - 1) / 2)
    return middle + (_CORNERS * counts) @ edges.T


def _mean_step(series: Sequence[Instance]) -> NDArray[np.float64]:
    if len(series) > 1:
        return (series[-1].position - series[0].position) / (len(series) - 1)
    header = series[0].header
    cosines = numbers(header, "ImageOrientationPatient", 6)
    return np.cross(cosines[:3], cosines[3:]) * numbers(header, "SliceThickness", 1)[0]


def geometry_items(source: Sequence[Instance], derived: Sequence[Instance], limits: Limits) -> list[CheckItem]:
    """Items on number, order, place and size of the slices. Rules 1 to 9."""
    first, original = derived[0].header, source[0].header
    n, step_source, step = len(derived), _mean_step(source), _mean_step(derived)
    if len(source) == 1:
        step_source = 2 * step  # a single slice has no step of its own
    expected = derived[0].position + np.arange(n)[:, None] * step
    drift = np.linalg.norm(np.array([item.position for item in derived]) - expected, axis=1)
    cosines = numbers(original, "ImageOrientationPatient", 6)
    spacing = numbers(original, "PixelSpacing", 2)
    quarter = source[0].position - (step_source + cosines[3:] * spacing[0] + cosines[:3] * spacing[1]) / 4
    corners = _outer_corners(source, step_source) - _outer_corners(derived, step)
    halves = 2 * numbers(first, "PixelSpacing", 2) / spacing - 1
    doubled = [float(first.get(keyword, 0)) / float(original.get(keyword, 1)) for keyword in ("Rows", "Columns")]
    return [
        CheckItem("slice-count", n == 2 * len(source), n, 2 * len(source), "twice as many slices as the source"),
        CheckItem("rows-columns", doubled == [2, 2], str(doubled), "[2.0, 2.0]", "Rows and Columns are doubled"),
        agreed("number-of-slices", [f"NumberOfSlices is {text(item.header, 'NumberOfSlices')!r}" for item in derived
                                    if text(item.header, "NumberOfSlices") != str(n)], f"NumberOfSlices is {n}"),
        agreed("image-index", [f"slice {i} along the normal has ImageIndex {text(item.header, 'ImageIndex')!r}"
                               for i, item in enumerate(derived, 1) if text(item.header, "ImageIndex") != str(i)],
               "ImageIndex is 1..2M in increasing position along the normal"),
        agreed("orientation", [f"{text(item.header, 'ImageOrientationPatient')} in place of "
                               f"{text(original, 'ImageOrientationPatient')}" for item in derived
                               if item.elements.get(0x00200037) != source[0].elements.get(0x00200037)],
               "ImageOrientationPatient is the source's, character by character"),
        at_most("pixel-spacing", float(np.abs(halves).max()), 1e-6, "PixelSpacing halves (relative)"),
        at_most("uniform-positions", float(drift.max()), limits.position_mm, "slices lie evenly (mm)"),
        at_most("slice-step", float(np.abs(2 * step - step_source).max()), limits.position_mm,
                "the vector between slices halves (mm)"),
        at_most("first-voxel", float(np.linalg.norm(derived[0].position - quarter)), limits.position_mm,
                "first voxel a quarter source voxel before the source's, on all axes (mm)"),
        at_most("outer-corners", float(np.linalg.norm(corners, axis=1).max()), limits.position_mm,
                "outer corners of the field of view stay (mm)"),
        *_slice_attributes(source, derived, step, limits),
        agreed("position-strings", [f"{name} {value!r} is no Decimal String" for item in derived
                                    for name in _DECIMAL_STRINGS
                                    for value in text(item.header, name).split("\\") if len(value) > 16],
               "Decimal Strings hold at most 16 characters"),
    ]


def _slice_attributes(source: Sequence[Instance], derived: Sequence[Instance], step: NDArray[np.float64],
                      limits: Limits) -> list[CheckItem]:
    original = source[0].header
    thickness = numbers(original, "SliceThickness", 1)[0]
    thick = [text(item.header, "SliceThickness") for item in derived
             if not (np.isnan(thickness) or abs(2 * numbers(item.header, "SliceThickness", 1)[0] - thickness) < 1e-6)]
    has_spacing = text(original, "SpacingBetweenSlices") != ""
    length = float(np.linalg.norm(step))
    spacing = []
    for item in derived:
        value = text(item.header, "SpacingBetweenSlices")
        right = abs(numbers(item.header, "SpacingBetweenSlices", 1)[0] - length) <= limits.position_mm
        if bool(value) != has_spacing or (value and not right):
            spacing.append(f"{value!r} where slices are {length:.6g} mm apart and the source has "
                           f"{text(original, 'SpacingBetweenSlices')!r}")
    return [
        agreed("slice-thickness", [f"{value!r} where the source has {thickness}" for value in thick],
               "SliceThickness halves"),
        agreed("spacing-between-slices", spacing, "SpacingBetweenSlices is right, or absent as in the source"),
        agreed("slice-location", _locations(source, derived, limits), "SliceLocation follows the position"),
    ]


def _locations(source: Sequence[Instance], derived: Sequence[Instance], limits: Limits) -> list[str]:
    """SliceLocation may count either way and from anywhere, but must count as the source's does."""
    given = [text(item.header, "SliceLocation") for item in derived]
    if not any(given):
        return []
    old = np.array([numbers(item.header, "SliceLocation", 1)[0] for item in source])
    new = np.array([numbers(item.header, "SliceLocation", 1)[0] for item in derived])
    if np.isnan(old).any() or len(source) < 2:
        return ["SliceLocation is there, but the source has none to follow"]
    rate = (old[-1] - old[0]) / (source[-1].along - source[0].along)
    expected = old[0] + rate * (np.array([item.along for item in derived]) - source[0].along)
    wrong = np.flatnonzero(~(np.abs(new - expected) <= max(limits.position_mm, 1e-6)))
    return [f"{given[i]!r} in place of {expected[i]:.4f}" for i in wrong]
