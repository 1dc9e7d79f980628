"""A series of which only a box was deblurred: which box it states, and whether all else is the upsampled source.

The box stands in DerivationDescription, so that it is known from the files alone. Outside it a derived value is the
cubic B-spline through the source's values, borders replicated, a quarter of a source voxel on either side of each
centre; what that undershoots below zero is zero, as PET cannot store it (C.8.9.4). Computed here by its own formula.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import ndimage

from sop.checks.report import CheckItem, Limits, agreed, at_most
from sop.checks.stored import Instance, numbers, rescaled, text
from sop.errors import Refused
from sop.header import put, without_pixels
from sop.units import pet_scale

__all__ = ["Box", "core", "grid_spacing", "region_items", "stated_box"]

Box = tuple[slice, slice, slice]

_STATED = re.compile(r"deblurred in box:(\d+)-(\d+),(\d+)-(\d+),(\d+)-(\d+)")
_FADE_MM = 12.0  # within the box deblurred and interpolated image pass into each other
_REACH = 2  # source voxels beyond the fade into which the kernel carries what was not deblurred
_BORDER = 12  # replicated voxels: the spline forgets its border by a factor of 3.7 a voxel
#: cubic B-spline at 5/4, 1/4, 3/4 and 7/4: the weights of the coefficients around a place a quarter past a voxel
_QUARTER = tuple(2 / 3 - x * x + x**3 / 2 if x < 1 else (2 - x) ** 3 / 6 for x in (1.25, 0.25, 0.75, 1.75))


def stated_box(derived: Sequence[Instance]) -> Box | None:
    """The box, source voxels (slices, rows, columns), that the first derived slice states; None: the whole volume."""
    return _box_in(derived[0])


def _box_in(item: Instance) -> Box | None:
    ours = text(item.header, "DerivationDescription").partition("; before: ")[0]
    found = _STATED.search(ours)
    if found is None:
        return None
    d0, d1, h0, h1, w0, w1 = map(int, found.groups())
    return slice(d0, d1), slice(h0, h1), slice(w0, w1)


def core(box: Box, shape: Sequence[int], spacing: NDArray[np.float64]) -> Box:
    """The part of the box that was deblurred alone and sees nothing else through the kernel: where that is judged."""
    parts = []
    for side, n, mm in zip(box, shape, spacing, strict=True):
        fade = min(max(1, round(_FADE_MM / float(mm))), max(1, (side.stop - side.start) // 3)) + _REACH
        start = side.start + (fade if side.start > 0 else 0)
        stop = side.stop - (fade if side.stop < n else 0)
        parts.append(slice(start, stop) if start < stop else side)
    d, h, w = parts
    return d, h, w


def grid_spacing(source: Sequence[Instance]) -> NDArray[np.float64]:
    """mm along slices, rows and columns of the source; along one slice alone 0."""
    gaps = max(len(source) - 1, 1)
    depth = float(np.linalg.norm(source[-1].position - source[0].position)) / gaps
    return np.array([depth, *numbers(source[0].header, "PixelSpacing", 2)])


def region_items(source: Sequence[Instance], derived: Sequence[Instance], box: Box, limits: Limits) -> list[CheckItem]:
    """Whether the box is a part of the source and the same in all slices, and whether all outside it is the source."""
    shape = (len(source), *(source[0].plane.shape if source[0].plane is not None else (0, 0)))
    troubles = [f"{item.path.name} states another" for item in derived if _box_in(item) != box]
    if not all(0 <= side.start < side.stop <= n for side, n in zip(box, shape, strict=True)):
        troubles.append(f"it leaves the source's {shape[0]} x {shape[1]} x {shape[2]} voxels or is empty")
    items = [agreed("region", troubles, "all slices state one region, within the source")]
    if troubles:
        return items
    try:
        before, after = _factors(source, derived), _factors(derived, derived)
    except Refused as refusal:
        return [*items, CheckItem("outside-region", False, refusal.code, None, f"not judged: {refusal.reason}")]
    y = np.stack([item.plane * factor for item, factor in zip(source, before) if item.plane is not None])
    worst = 0.0
    for index, expected in enumerate(_upsampled(y)):
        off = np.abs(rescaled(derived[index].path) * after[index] - np.maximum(expected, 0.0))
        if 2 * box[0].start <= index < 2 * box[0].stop:
            off[2 * box[1].start:2 * box[1].stop, 2 * box[2].start:2 * box[2].stop] = 0.0
        worst = max(worst, float(off.max()))
    top = float(y.max())
    items.append(at_most("outside-region", worst / top if top > 0 else np.inf, limits.outside_region,
                         "largest deviation from the upsampled source outside the region, over the source's maximum"))
    return items


def _factors(series: Sequence[Instance], derived: Sequence[Instance]) -> tuple[float, ...]:
    """From stated units to those the image is interpolated in, slice by slice: they may differ between slices."""
    headers: list[Dataset] = [item.header for item in series]
    if not text(headers[0], "Units"):  # a person vouched for the unit, which only the derived series states
        headers = [without_pixels(header) for header in headers]
        for header in headers:
            put(header, Units=text(derived[0].header, "Units"))
    return pet_scale(headers).factors


def _upsampled(y: NDArray[np.floating]) -> Iterator[NDArray[np.float64]]:
    """The planes (2H, 2W) of y (D, H, W) on the doubled grid, one after the other."""
    spline = np.pad(np.asarray(y, dtype=np.float64), _BORDER, mode="edge")
    for axis in range(3):
        spline = ndimage.spline_filter1d(spline, order=3, axis=axis, mode="mirror")
    for index in range(2 * len(y)):
        middle = _BORDER + index // 2
        step = 1 if index % 2 else -1
        plane = sum(weight * spline[middle + step * place] for weight, place in zip(_QUARTER, (-1, 0, 1, 2)))
        yield _doubled_lines(_doubled_lines(np.asarray(plane)).T).T


def _doubled_lines(spline: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients with their border (n, m) -> values (2 (n - 2 border), m) between them."""
    n = len(spline) - 2 * _BORDER
    values = np.empty((2 * n, spline.shape[1]))
    for step, half in ((-1, values[0::2]), (1, values[1::2])):
        half[:] = sum(weight * spline[_BORDER + step * place:_BORDER + step * place + n]
                      for weight, place in zip(_QUARTER, (-1, 0, 1, 2)))
    return values
