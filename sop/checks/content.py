"""Values and content of a derived series against its source: activity, place, maximum, residual, SUV. Rules 12 to 18.

The derived image, averaged over 2 x 2 x 2 voxels, lies on the source's grid. What deblurring did there is symmetric and
so moves nothing; a displacement a + b r (r from -1 to 1 over the field) along each axis is fitted, together with terms
that take up sharpening, by linear least squares:

    P - y = -sum_i (a_i + b_i r_i) dy/di + sum_i c_i d2y/di2 + c_4 sum_i d4y/di4 + g y

Content resampled by aligning corners shows b = 1/4 source voxel, a plain shift by a quarter a = 1/4 (rule 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from scipy import fft, ndimage

from sop.checks.region import Box, core, grid_spacing, region_items
from sop.checks.report import CheckItem, Limits, agreed, at_most
from sop.checks.stored import Instance, numbers, text
from sop.errors import Refused
from sop.header import put, without_pixels
from sop.suv import suv_factors

__all__ = ["content_items", "displacement", "reblurred", "value_items"]

_SMOOTH_VOXELS = 1.2  # sigma; what remains is smooth enough for differences between neighbours
_SAMPLES = 5e5
_CLEAR = 0.03  # standard error, source voxels, beyond which an image cannot tell where its content lies
_AXES = ("slice", "row", "column")


def value_items(derived: Sequence[Instance], limits: Limits) -> list[CheckItem]:
    """Stored values, slopes and windows of the derived slices."""
    wrong_bits = [f"{item.path.name}: {bits}" for item in derived
                  if (bits := "/".join(text(item.header, name) for name in (
                      "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel", "PhotometricInterpretation")))
                  != "16/16/15/1/MONOCHROME2"]
    coarse = max((0.5 / item.largest for item in derived if item.largest > 0), default=0.0)
    return [
        agreed("pixel-data", [item.trouble for item in derived if item.trouble], "pixel data fit their headers"),
        agreed("bits", wrong_bits, "16 bits stored, MONOCHROME2"),
        agreed("rescale-intercept", [f"{item.path.name}: {text(item.header, 'RescaleIntercept')!r}" for item in derived
                                     if numbers(item.header, "RescaleIntercept", 1)[0] != 0],
               "RescaleIntercept is zero"),
        agreed("rescale-slope", [f"{item.path.name}: {text(item.header, 'RescaleSlope')!r}" for item in derived
                                 if not 0 < numbers(item.header, "RescaleSlope", 1)[0] < np.inf],
               "RescaleSlope is positive"),
        agreed("stored-range", [f"{item.path.name}: {item.smallest}..{item.largest}" for item in derived
                                if item.smallest < 0 or item.largest > 32767], "stored values lie in 0..32767"),
        at_most("quantisation", coarse, limits.quantisation, "half a stored step over the slice maximum"),
        agreed("window", _window_troubles(derived), "the window shows something of the values"),
    ]


def _window_troubles(derived: Sequence[Instance]) -> list[str]:
    brightest = max(item.maximum for item in derived)
    troubles = []
    for item in derived:
        center, width = numbers(item.header, "WindowCenter", 1)[0], numbers(item.header, "WindowWidth", 1)[0]
        if not text(item.header, "WindowCenter") and not text(item.header, "WindowWidth"):
            continue
        if not width >= 1 or not center - width / 2 < max(brightest, 1e-30) or not center + width / 2 > 0:
            troubles.append(f"{item.path.name}: center {center} width {width}, values up to {brightest:.4g}")
    return troubles


def content_items(source: Sequence[Instance], derived: Sequence[Instance], kernel: NDArray | None,
                  limits: Limits, box: Box | None = None) -> list[CheckItem]:
    """Items on the image itself; one failing item "content" where the two cannot be laid over one another.

    box   source voxels that alone were deblurred; None: all.
    """
    before = [item.plane for item in source if item.plane is not None]
    after = [item.plane for item in derived if item.plane is not None]
    if len({plane.shape for plane in (*before, *after)}) != 1 or len(before) != len(source) \
            or len(after) != len(derived) or len(derived) != 2 * len(source):
        return [CheckItem("content", False, None, None, "source and derived image cannot be laid over one another")]
    y = np.stack(before)
    halves = [(lower + upper) / 2 for lower, upper in zip(after[0::2], after[1::2])]
    pooled: NDArray[np.float32] = np.stack(halves, dtype=np.float32)
    seen = pooled if kernel is None else reblurred(pooled, kernel)
    region = [] if box is None else region_items(source, derived, box, limits)
    judged: Box = (slice(None),) * 3
    if box is not None and all(item.ok for item in region):  # elsewhere the image is the source, blurred it is not
        judged = core(box, y.shape, grid_spacing(source))
        seen, whole = y.copy(), seen
        seen[judged] = whole[judged]
    items = [*_activity_items(y, pooled, seen, kernel, limits), *region,
             at_most("maximum", _ratio(max(item.maximum for item in derived), float(y.max())), limits.maximum,
                     "derived maximum over source maximum"),
             *_place_items(y[judged], seen[judged], limits),
             *_suv_items(source, derived, limits)]
    if kernel is not None:
        residual = _ratio(float(np.linalg.norm(seen[judged] - y[judged])), float(np.linalg.norm(y[judged])))
        items.append(at_most("residual", residual, limits.residual, "|D(x * k) - y| over |y|"))
    return items


def _ratio(a: float, b: float) -> float:
    return a / b if b else (1.0 if a == 0 else np.inf)


def reblurred(pooled: NDArray[np.float32], kernel: NDArray) -> NDArray[np.float32]:
    """x * k on the source grid, borders continued by their edge voxels. pooled (D, H, W), kernel odd, sum 1."""
    halves = [n // 2 for n in kernel.shape]
    padded = np.pad(pooled, [(h, h) for h in halves], mode="edge")
    shape = [fft.next_fast_len(n, real=True) for n in padded.shape]
    spectrum = fft.rfftn(padded, shape, workers=2)
    spectrum *= fft.rfftn(np.asarray(kernel, dtype=np.float32), shape, workers=2)
    full = fft.irfftn(spectrum, shape, workers=2)
    return full[tuple(slice(2 * h, 2 * h + n) for h, n in zip(halves, pooled.shape))]


def _activity_items(y: NDArray[np.float32], pooled: NDArray[np.float32], seen: NDArray[np.float32],
                    kernel: NDArray | None, limits: Limits) -> list[CheckItem]:
    before, after = (volume.sum(axis=(1, 2), dtype=np.float64) for volume in (y, seen))
    total, kept = float(before.sum()), float(pooled.sum(dtype=np.float64))
    items = [at_most("activity", abs(_ratio(kept, total) - 1), limits.activity, "change of the activity in all")]
    usual = np.maximum(np.abs(before), limits.quiet_slice * np.abs(before).mean())
    if kernel is None:  # deblurring gives back what a slice had lost to its neighbours
        usual = ndimage.maximum_filter1d(usual, 3, mode="nearest")
    change = np.abs(after - before) / np.where(usual > 0, usual, 1)
    if kernel is None:
        return [*items, at_most("slice-activity", float(change.max()), limits.slice_activity_sharp,
                                "change of the activity of a source slice, without re-blurring")]
    # What lies beyond the first and last slice is not known, and what of it blurs in depends on what one assumes.
    reach = min(_fwhm_slices(kernel), (len(change) - 1) // 2)
    inside, ends = change[reach:len(change) - reach], np.concatenate([change[:reach], change[len(change) - reach:]])
    return [
        *items,
        at_most("slice-activity", float(inside.max()), limits.slice_activity,
                "change of the activity of a source slice, on the re-blurred image"),
        at_most("end-slice-activity", float(ends.max(initial=0.0)), limits.end_slice_activity,
                f"the same in the {reach} slices at either end"),
    ]


def _fwhm_slices(kernel: NDArray) -> int:
    """FWHM of the kernel along the slices, in slices, rounded up; that of a Gaussian of the same variance."""
    profile = np.maximum(kernel.sum(axis=(1, 2), dtype=np.float64), 0)
    place = np.arange(len(profile))
    mean = (profile @ place) / profile.sum()
    return math.ceil(2 * math.sqrt(2 * math.log(2) * (profile @ (place - mean) ** 2) / profile.sum()))


def _place_items(y: NDArray[np.float32], seen: NDArray[np.float32], limits: Limits) -> list[CheckItem]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        smooth_y, smooth_seen = pool.map(_smoothed, (y, seen))
    step = math.ceil((y.size / _SAMPLES) ** (1 / 3))  # smooth images need not be compared at each voxel
    sampled = smooth_seen[::step, ::step, ::step]
    likeness = _correlation(smooth_y[::step, ::step, ::step], sampled)
    mirrored = max(_correlation(np.flip(smooth_y, axis)[::step, ::step, ::step], sampled) for axis in range(3))
    items = [
        CheckItem("content-likeness", likeness >= limits.correlation, likeness, limits.correlation,
                  f"likeness of the smoothed contents: {likeness:.4f}, at least {limits.correlation}"),
        CheckItem("content-orientation", likeness >= mirrored - 1e-3, likeness - mirrored, -1e-3,
                  f"likeness to the source {likeness:.4f}, to a mirror image of it {mirrored:.4f}"),
    ]
    shift, stretch, shift_error, stretch_error = displacement(smooth_y, smooth_seen)
    for axis, (name, values, errors) in itertools.product(
        range(3), (("content-shift", shift, shift_error), ("content-stretch", stretch, stretch_error))
    ):
        where = " at the edges (aligned corners give 0.25)" if name == "content-stretch" else ""
        measured = f"displacement along the {_AXES[axis]} axis{where}: {values[axis]:.3f} +- {errors[axis]:.3f} voxels"
        told = errors[axis] <= _CLEAR
        items.append(CheckItem(
            f"{name}-{_AXES[axis]}", not (told and abs(values[axis]) > limits.shift_voxels), float(values[axis]),
            limits.shift_voxels,
            f"{measured}, limit {limits.shift_voxels}{'' if told else '; the image cannot tell, so it is not judged'}",
        ))
    return items


def _smoothed(volume: NDArray[np.float32]) -> NDArray[np.float32]:
    return ndimage.gaussian_filter(volume, _SMOOTH_VOXELS, mode="nearest", truncate=2.5)


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Pearson's; 1 where both are constant."""
    n = float(a.size)
    mean_a, mean_b = (float(v.sum(dtype=np.float64)) / n for v in (a, b))
    spread_a, spread_b = (float(np.einsum("ijk,ijk->", v, v, dtype=np.float64)) - n * mean**2
                          for v, mean in ((a, mean_a), (b, mean_b)))
    tiny_a, tiny_b = (spread <= 1e-9 * n * mean**2 for spread, mean in ((spread_a, mean_a), (spread_b, mean_b)))
    if tiny_a or tiny_b:
        return float(tiny_a and tiny_b)
    together = float(np.einsum("ijk,ijk->", a, b, dtype=np.float64)) - n * mean_a * mean_b
    return together / math.sqrt(spread_a * spread_b)


def displacement(y: NDArray[np.float32], seen: NDArray[np.float32]) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Shift a and stretch b of `seen` against `y` along the three axes, source voxels, and their standard errors.

    Both smoothed, (D, H, W). Where the image cannot tell shift from stretch (one object alone), the shift is fitted
    without stretch. Axes of fewer than 5 voxels, and images without structure, tell nothing: error infinite.
    """
    nothing = np.full(3, np.inf)
    if min(y.shape) < 5 or not y.std() > 0:
        return np.zeros(3), np.zeros(3), nothing, nothing
    step = math.ceil((y.size / _SAMPLES) ** (1 / 3))  # smooth images need not be sampled at each voxel
    terms = _terms(y, step)
    difference = _inner(seen - y, step).ravel().astype(np.float64)
    # Smoothing makes neighbours alike: there are as many free samples as smoothing volumes.
    samples = difference.size * min(step**3 / (2 * math.sqrt(math.pi) * _SMOOTH_VOXELS) ** 3, 1.0)
    both, both_errors = _fit(terms, difference, samples)
    alone, alone_errors = _fit([*terms[:3], *terms[6:]], difference, samples)
    clear = both_errors[:3] <= _CLEAR
    return (-np.where(clear, both[:3], alone[:3]), -both[3:6],
            np.where(clear, both_errors[:3], alone_errors[:3]), both_errors[3:6])


def _fit(terms: list[NDArray[np.float64]], difference: NDArray[np.float64], samples: float) -> tuple[NDArray, NDArray]:
    """Least squares of `difference` by `terms`: coefficients and standard errors, infinite for a term that is zero."""
    gram = np.array([[np.vdot(p, q) for q in terms] for p in terms])
    scale = np.sqrt(np.diag(gram))
    known = np.flatnonzero(scale > 1e-12 * scale.max())
    normal = gram[np.ix_(known, known)] / np.outer(scale[known], scale[known])
    # Terms that cannot be told apart get a large error in place of a large value.
    inverse = np.linalg.inv(normal + 1e-6 * np.eye(len(known)))
    right = np.array([np.vdot(terms[i], difference) for i in known]) / scale[known]
    fitted = inverse @ right
    left = max(float(difference @ difference - fitted @ right), 0.0)
    variance = left / max(samples, len(known) + 1.0) * np.diag(inverse)
    coefficients, errors = np.zeros(len(terms)), np.full(len(terms), np.inf)
    coefficients[known], errors[known] = fitted / scale[known], np.sqrt(variance) / scale[known]
    return coefficients, errors


def _inner(volume: NDArray, step: int, shift: tuple[int, int, int] = (0, 0, 0)) -> NDArray:
    """Every `step`-th voxel at least two from the border, moved by `shift`."""
    return volume[tuple(slice(2 + s, n - 2 + s, step) for s, n in zip(shift, volume.shape))]


def _terms(y: NDArray[np.float32], step: int) -> list[NDArray[np.float64]]:
    middle = _inner(y, step).astype(np.float64)
    firsts, stretched, seconds, fourths = [], [], [], []
    for axis in range(3):
        beside = {}
        for shift in (-2, -1, 1, 2):
            moved = (shift if axis == 0 else 0, shift if axis == 1 else 0, shift if axis == 2 else 0)
            beside[shift] = _inner(y, step, moved).astype(np.float64)
        slope = (beside[1] - beside[-1]) / 2
        place = np.arange(2, y.shape[axis] - 2, step) / ((y.shape[axis] - 1) / 2) - 1
        firsts.append(slope.ravel())
        stretched.append((slope * place.reshape([-1 if i == axis else 1 for i in range(3)])).ravel())
        seconds.append((beside[1] - 2 * middle + beside[-1]).ravel())
        fourths.append((beside[2] + beside[-2] - 4 * (beside[1] + beside[-1]) + 6 * middle).ravel())
    return [*firsts, *stretched, *seconds, sum(fourths), middle.ravel()]


def _with_units(header: Dataset, units: str) -> Dataset:
    stated = without_pixels(header)
    put(stated, Units=units)
    return stated


def _suv_items(source: Sequence[Instance], derived: Sequence[Instance], limits: Limits) -> list[CheckItem]:
    headers = [item.header for item in source]
    if not text(headers[0], "Units"):  # a person vouched for the unit, which only the derived series states
        headers = [_with_units(header, text(derived[0].header, "Units")) for header in headers]
    before, after = suv_factors(headers).bw, suv_factors([item.header for item in derived]).bw
    if isinstance(before, Refused) or isinstance(after, Refused):
        same = isinstance(before, Refused) and isinstance(after, Refused) and before.code == after.code
        told = [one.code if isinstance(one, Refused) else f"{one:.8g}" for one in (before, after)]
        promise = "the SUV factor is the source's, or refused for the same reason"
        return [CheckItem("suv", same, told[1], told[0], promise)]
    off = abs(_ratio(after, before) - 1)
    return [at_most("suv", off, limits.suv, f"SUVbw factor {after:.8g} against {before:.8g}")]
