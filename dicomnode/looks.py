"""What people look at, made once with the derived series: projections, regions, profiles, kernel, residual.

    derived/JOB/looks.npz     pictures (see `Looks.arrays`) and `measures` as JSON
    report.json, "looks"      `measures` alone

All values are in display units: SUVbw where the headers lead to it; else kBq/mL for Bq/ml; else what the series is in
("counts"). Why there is no SUV stands in measures["unit_note"].

The grey scale ("top") is shared by before and after: the 99th percentile of the body in the source's coronal MIP
(pixels above half of the median of those that reach a tenth of the mean). Where the field is longer than 400 mm,
kidneys and bladder may be in it: then at most three times the 90th percentile, and at most SUV 15, so that they
saturate rather than pale all else. At least SUV 5; no more than the highest value of the two; rounded up to 1, 1.2,
1.5, 2, 2.5, 3, 4, 5, 6, 8 or 10 times a power of ten.

Pictures are kept in whole steps of a thousandth of `top` (residuals: of their own range; coarser where a value lies
above 65 times of it), which is below what a screen shows, and take a few MB. Making them loads scipy and, for the
residual of a method with a kernel, torch; keeping and loading needs numpy alone.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from deconv.projections import Upright
    from deconv.result import Deconvolution
    from deconv.uptake import Region
    from deconv.volume import Volume
    from sop.series import SeriesInfo

__all__ = ["LOOKS_FILE", "Looks", "extent", "load", "make", "save", "shared_top"]

LOOKS_FILE = "looks.npz"
VIEWS = 24
STEPS = 1000  # steps of a stored picture up to the top of the grey scale
SUV_TOP = (5.0, 15.0)  # least; most in a long field
LONG_MM = 400.0
NEAT = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
AIR = 0.01  # of the top: what nowhere along the body reaches it is left out of the turning projection
SHOWN = 0.05  # of the top: relative uncertainty is told of pixels above it
PERCENT = 0.01  # step, and least value, of a relative uncertainty
PROFILED = 3  # regions with profiles
PROFILE_MM = (25.0, 60.0)  # least and most to either side of the centre

Image = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Looks:
    """Pictures and figures of one derived series, in display units.

    measures  plain JSON values: unit, unit_note, factor, top, mips, grid, rotation, kernel, regions, profiles,
              activity_change, residual_rms, residual_of, uncertainty. grid: where the pictures lie, see `extent`.
    arrays    name -> float32: "before.axial", "before.coronal", "before.sagittal" and "after." alike (MIPs);
              "before.rotation" and "after.rotation" (views, rows, columns); "residual." of the three planes (the value
              farthest from zero along the ray); where there is one, "uncertainty." of the three planes (percent, of
              the voxel that the MIP shows; 0 in the dark), "kernel.d", "kernel.h", "kernel.w" (sums along that axis).
              Rows run from the head to the foot (axial: from front to back), columns from the patient's right to the
              left (sagittal: from front to back).
    """

    measures: dict[str, Any]
    arrays: Mapping[str, Image]


def make(source: Volume, result: Deconvolution, info: SeriesInfo) -> Looks:
    """All of it from one series and what a method made of it.

    Raises ValueError where the result does not lie on the doubled grid of the source.
    """
    from deconv.metrics import activity_change
    from deconv.projections import project, upright
    from deconv.uptake import regions
    from sop.suv import shown_unit

    unit, factor, note = shown_unit(info, info.unit)
    before = upright(source)
    after = upright(result.image, before)
    mips = {"before": project(before), "after": project(after)}
    scaled = {name: {plane: image * np.float32(factor) for plane, image in planes.items()}
              for name, planes in mips.items()}
    highest = max(float(planes["coronal"].max()) for planes in scaled.values())
    length_mm = before.array.shape[0] * before.spacing[0]
    top = shared_top(scaled["before"]["coronal"], highest, unit=unit, length_mm=length_mm)
    arrays = {f"{name}.{plane}": image for name, planes in scaled.items() for plane, image in planes.items()}
    rotation = _rotation(before, after, factor, top, arrays)
    off, core = _residual(source, result)
    for plane, image in _signed(off, before).items():
        arrays[f"residual.{plane}"] = image * np.float32(factor)
    found = regions(source, result.image)
    measures = {
        "unit": unit, "unit_note": note, "factor": factor, "top": top,
        "mips": {name: {plane: {"mm": list(volume.plane_mm(plane))} for plane in planes}
                 for (name, planes), volume in zip(mips.items(), (before, after), strict=True)},
        "grid": {name: {"first_mm": volume.first_lps, "spacing_mm": list(volume.spacing)}
                 for name, volume in (("before", before), ("after", after))},
        "rotation": rotation, "kernel": _kernel(result, arrays),
        "regions": [_region(number, region, factor) for number, region in enumerate(found, start=1)],
        "profiles": [profile for number, region in enumerate(found[:PROFILED], start=1)
                     for profile in _profiles(str(number), region, source, result.image, factor)],
        "activity_change": activity_change(result.image.array, source.array) if source.array.any() else 0.0,
        "residual_rms": float(np.sqrt(np.mean(off.array[core].astype(np.float64) ** 2))) * factor,
        "residual_of": "image on the source's voxels" if result.kernel is None else "image blurred by the kernel" if
        off.array[core].size == off.array.size else "image blurred by the kernel, inside the deblurred region",
        "uncertainty": _uncertainty(result, after, arrays, top),
    }
    return Looks(measures, arrays)


def shared_top(coronal: Image, highest: float, *, unit: str, length_mm: float) -> float:
    """Upper end of the grey scale by the rule above.

    coronal  the source's MIP;  highest  value of both images;  length_mm  of the field, from head to foot.
    """
    if highest <= 0:
        return 1.0
    bright = coronal[coronal > max(0.0, float(coronal.mean(dtype=np.float64)) / 10)]
    body = bright[bright > np.median(bright) / 2] if bright.size else bright
    wanted = float(np.percentile(body, 99)) if body.size else highest
    if length_mm > LONG_MM and body.size:
        wanted = min(wanted, 3 * float(np.percentile(body, 90)))
        wanted = min(wanted, SUV_TOP[1]) if unit.startswith("SUV") else wanted
    wanted = min(max(wanted, SUV_TOP[0]) if unit.startswith("SUV") else wanted, highest)
    power = 10.0 ** math.floor(math.log10(wanted))
    neat = next(step for step in NEAT if step * power >= wanted * (1 - 1e-6))
    return float(f"{neat * power:.6g}")


def _rotation(before: Upright, after: Upright, factor: float, top: float, arrays: dict[str, Image]) -> dict[str, Any]:
    from deconv.projections import rotating

    turned = rotating(before, after, floor=AIR * top / factor, views=VIEWS)
    for name, rotation in zip(("before", "after"), turned, strict=True):
        arrays[f"{name}.rotation"] = rotation.frames * np.float32(factor)
    return {"mm": list(turned[0].mm), "degrees": 360.0 / VIEWS, "first": "from the front, then from the patient's left"}


def _residual(source: Volume, result: Deconvolution) -> tuple[Volume, tuple[slice, ...]]:
    """Source minus the image seen through the method's forward model; without a kernel, minus its means over voxels.

    Where only a region was deblurred (settings "region_box") it is told in its core, as the gates measure it, and 0
    elsewhere: what is outside is the source itself, and blurring that would show nothing but the blurring.
    """
    if result.kernel is None:
        d, h, w = source.shape
        means = result.image.array.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))
        return source.with_array(source.array - means), (slice(None),) * 3
    from deconv.finish import residual
    from deconv.region import region

    core = region(source, str(result.settings.get("region_box") or "whole")).core
    off = np.zeros(source.shape, dtype=np.float32)
    off[core] = -residual(source, result.image, result.kernel)[core]
    return source.with_array(off), core


def _signed(off: Volume, before: Upright) -> dict[str, Image]:
    from deconv.projections import project, strongest, upright

    return project(upright(off, before), strongest)


def _kernel(result: Deconvolution, arrays: dict[str, Image]) -> dict[str, Any] | None:
    from deconv.metrics import kernel_fwhm_mm

    if result.kernel is None:
        return None
    for axis, name in enumerate("dhw"):
        arrays[f"kernel.{name}"] = result.kernel.sum(axis=axis, dtype=np.float32)
    peak = np.unravel_index(int(result.kernel.argmax()), result.kernel.shape)
    lines = [result.kernel[tuple(slice(None) if a == axis else peak[a] for a in range(3))] for axis in range(3)]
    return {"fwhm_mm": list(kernel_fwhm_mm(result.kernel, result.kernel_spacing)),
            "spacing_mm": [float(step) for step in result.kernel_spacing], "maximum": float(result.kernel.max()),
            "lines": [_rounded(line.astype(np.float64)) for line in lines]}


def _region(number: int, region: Region, factor: float) -> dict[str, Any]:
    def uptake(name: str) -> dict[str, float]:
        found = getattr(region, name)
        return {"max": found.max * factor, "mean": found.mean * factor, "peak": found.peak * factor}

    return {"label": str(number), "centre_mm": list(region.centre_mm), "source_slice": region.source_slice,
            "volume_ml": region.volume_ml, "threshold": region.share, "before": uptake("before"),
            "after": uptake("after")}


def _profiles(label: str, region: Region, source: Volume, image: Volume, factor: float) -> list[dict[str, Any]]:
    """Through the centre along the three patient axes, wide enough to see the background."""
    from deconv.profiles import AXES, along

    radius = (3 * region.volume_ml * 1000 / (4 * math.pi)) ** (1 / 3)
    half = min(max(2.5 * radius, PROFILE_MM[0]), PROFILE_MM[1])
    lines = []
    for axis in AXES:
        one: dict[str, Any] = {"label": f"Region {label}, {axis}", "region": label, "axis": axis}
        for name, volume in (("before", source), ("after", image)):
            mm, values = along(volume, region.centre_mm, axis, half)
            one |= {f"{name}_mm": _rounded(mm), name: _rounded(values * factor)}
        lines.append(one)
    return lines


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _uncertainty(result: Deconvolution, after: Upright, arrays: dict[str, Image],
                 top: float) -> dict[str, float] | None:
    """Standard deviation of the voxel that each MIP shows, in percent of it; told where it is bright enough."""
    from deconv.projections import PLANES, upright

    if result.uncertainty is None:
        return None
    sd = upright(result.uncertainty, after).array
    for plane, axis in PLANES.items():
        place = np.expand_dims(after.array.argmax(axis=axis), axis)
        spread = np.take_along_axis(sd, place, axis).squeeze(axis)
        value = np.take_along_axis(after.array, place, axis).squeeze(axis)
        bright = arrays[f"after.{plane}"] >= SHOWN * top
        percent = np.where(bright, np.maximum(100 * spread / np.where(bright, value, 1), PERCENT), 0)
        arrays[f"uncertainty.{plane}"] = percent.astype(np.float32)
    shown = arrays["uncertainty.coronal"][arrays["after.coronal"] >= SHOWN * top]
    if not shown.size:
        return None
    return {"median_percent": float(np.median(shown)), "p90_percent": float(np.percentile(shown, 90))}


# --- where a picture lies


def extent(measures: Mapping[str, Any], name: str, plane: str,
           shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """LPS mm of the outer edges of a "before" or "after" picture of `shape` (rows, columns): left, right, bottom, top.

    Across lies x (sagittal: y), downwards z (axial: y). A residual lies as "before", an uncertainty as "after".
    """
    grid = measures["grid"][name]
    x, y, z = grid["first_mm"]
    foot, back, left = grid["spacing_mm"]
    across, by = (y, back) if plane == "sagittal" else (x, left)
    down, step = (y, back) if plane == "axial" else (z, -foot)
    return across - by / 2, across + by * (shape[1] - 0.5), down + step * (shape[0] - 0.5), down - step / 2


# --- keeping


def save(path: Path, looks: Looks) -> None:
    """Write it as a compressed .npz; the same looks give the same bytes."""
    step = looks.measures["top"] / STEPS
    held: dict[str, Any] = {"measures": np.array(json.dumps(looks.measures, sort_keys=True, allow_nan=False))}
    for name in sorted(looks.arrays):
        values = looks.arrays[name]
        if name.startswith("kernel."):
            held[name] = values
            continue
        low, high = float(values.min()), float(values.max())
        size = max(_step(name, low, high, step), (high - low) / 65535)
        if name.endswith(".rotation"):
            values = values[:len(values) // 2]  # the other half is its mirror
        held[name] = np.rint((values - np.float32(low)) / np.float32(size)).astype(np.uint16)
        held[f"{name}/scale"] = np.array([size, low])
    with path.open("wb") as file:
        np.savez_compressed(file, **held)


def _step(name: str, low: float, high: float, step: float) -> float:
    """The smallest difference that a stored picture keeps. A residual is shown on a scale of its own, often far below
    that of the images."""
    if name.startswith("uncertainty."):
        return PERCENT
    return min(step, (high - low) / STEPS or step) if name.startswith("residual.") else step


def load(path: Path) -> Looks:
    """Read what `save` wrote.

    Raises FileNotFoundError for a job that was built without, ValueError for other files and damaged ones.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            if "measures" not in held:
                raise ValueError(f"{path.name} does not hold looks")
            arrays = {name: _restored(held, name) for name in held.files if name != "measures" and "/" not in name}
            return Looks(json.loads(str(held["measures"])), arrays)
    except (BadZipFile, EOFError, KeyError, zlib.error) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error


def _restored(held: Any, name: str) -> Image:
    values = held[name]
    if f"{name}/scale" in held:
        size, low = held[f"{name}/scale"]
        values = values * np.float32(size) + np.float32(low)
    if name.endswith(".rotation"):
        values = np.concatenate([values, values[:, :, ::-1]])
    return np.asarray(values, dtype=np.float32)
