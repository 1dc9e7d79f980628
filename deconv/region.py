"""Which part of a volume is deblurred, and how it is put back into the upsampled source without a seam.

    out = u + f (s x − u)

u the source on the doubled grid (deconv/interpolate.py), x the deblurred crop, f 0 outside the region and 1 inside,
with a smooth fade within the region's border; s, near 1, makes the total activity the source's. Outside the region out
is u bit for bit; a region that is the whole volume gives x itself. Needs numpy and scipy only.

Specifications: "whole"; "body" (see `body_box`); "head-neck" (see `head_neck_box`); "box:d0-d1,h0-h1,w0-w1", voxels of
the PET, half-open like Python's slices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from deconv.interpolate import doubled
from deconv.volume import Volume

__all__ = ["Region", "body_box", "check_spec", "head_neck_box", "region"]

Box = tuple[slice, slice, slice]
Float3 = NDArray[np.float64]

KERNEL_MM = 6.0  # what clinical PET reaches; margins are counted in it
MARGIN_MM = 2 * KERNEL_MM  # of a body box around the body
CONTEXT_MM = 4 * KERNEL_MM  # beyond a region that the solver sees and that is thrown away
FADE_MM = 2 * KERNEL_MM

REACH = 2  # PET voxels of a kernel's reach that matter to what is measured beside the fade

BODY_SHARE = 0.1  # of the activity of tissue: above it a voxel belongs to the body
NOISE_SHARE = 0.02  # of the activity of tissue: below it is scatter and noise
HELD_ABOVE_NOISE = 0.999
HELD_IN_ALL = 0.99
OWN_SHARE = 5e-4  # a component apart from the body counts from this share of the activity on

HEAD_MM = (60.0, 450.0)  # along the patient, of what is narrower than the trunk at the head end
HEAD_WIDTH_MM = 280.0
TRUNK_WIDTH_MM = 250.0  # at least
NARROW = 0.65  # of the trunk's width
BELOW_SHOULDERS_MM = 50.0  # of the trunk that still belongs to the neck: raised arms hide it
AROUND_HEAD_MM = 25.0

_BOX = re.compile(r"box:(\d+)-(\d+),(\d+)-(\d+),(\d+)-(\d+)")


@dataclass(frozen=True, eq=False)
class Region:
    """A box of PET voxels that is deblurred.

    spec    what was asked for;   reason  how it was found, for people.
    shape   of the PET (D, H, W), `spacing` mm.
    inside  the box, PET voxels;   crop  the box and its context of true neighbours: what the solver is given.
    fade    PET voxels within the border of `inside` over which source and deblurred image pass into each other; none
            where the border is the volume's own.
    """

    spec: str
    reason: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    inside: Box
    crop: Box
    fade: tuple[int, int, int]

    @property
    def is_whole(self) -> bool:
        return all(s.start == 0 and s.stop == n for s, n in zip(self.inside, self.shape, strict=True))

    @property
    def share(self) -> float:
        """Of the volume's voxels that lie inside."""
        return float(np.prod([s.stop - s.start for s in self.inside]) / np.prod(self.shape))

    @property
    def text(self) -> str:
        """The box as a specification that gives this region again: "box:d0-d1,h0-h1,w0-w1"."""
        return "box:" + ",".join(f"{s.start}-{s.stop}" for s in self.inside)

    @property
    def core(self) -> Box:
        """The part of `inside` that is deblurred alone and sees nothing else through a kernel: what is measured."""
        limits = []
        for inside, fade, n in zip(self.inside, self.fade, self.shape, strict=True):
            start = inside.start + (0 if inside.start == 0 else fade + REACH)
            stop = inside.stop - (0 if inside.stop == n else fade + REACH)
            limits.append((start, stop) if start < stop else (inside.start, inside.stop))
        return _box(limits)

    def cropped(self, volume: Volume) -> Volume:
        """The part of `volume` that the solver is given, at its place in the patient."""
        self._require(volume.array, self.shape)
        corner = [s.start for s in self.crop]
        return Volume(volume.array[self.crop], volume.spacing, volume.position(corner), volume.direction, volume.unit)

    def weights(self) -> NDArray[np.float32]:
        """f on the doubled grid of the crop: 1 inside, 0 in the context, between them smooth."""
        profiles = []
        for inside, crop, fade, n in zip(self.inside, self.crop, self.fade, self.shape, strict=True):
            at = (np.arange(2 * (crop.stop - crop.start)) + 0.5) / 2 + crop.start
            low = np.inf if inside.start == 0 else (at - inside.start) / fade
            high = np.inf if inside.stop == n else (inside.stop - at) / fade
            ramp = np.clip(np.minimum(low, high), 0.0, 1.0) * np.ones_like(at)
            profiles.append((ramp * ramp * (3.0 - 2.0 * ramp)).astype(np.float32))
        return profiles[0][:, None, None] * profiles[1][:, None] * profiles[2]

    def paste(
        self, deblurred: NDArray[np.float32], source: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float]:
        """out (2D, 2H, 2W) of the module's formula, and s.

        deblurred  (2d, 2h, 2w), the solution for `cropped`;   source  (D, H, W), the PET.
        Raises ValueError for other shapes, or where the region holds too little activity for s to keep the total.
        """
        self._require(source, self.shape)
        self._require(deblurred, tuple(2 * (s.stop - s.start) for s in self.crop))
        if self.is_whole:
            return np.asarray(deblurred, dtype=np.float32), 1.0
        out = doubled(source)
        at: Box = _box([(2 * s.start, 2 * s.stop) for s in self.crop])
        f = self.weights()
        u = out[at]
        new = float(np.sum(f * deblurred, dtype=np.float64))
        missing = 8.0 * float(np.sum(source, dtype=np.float64)) - float(np.sum(out, dtype=np.float64))
        wanted = float(np.sum(f * u, dtype=np.float64)) + missing
        if not (new > 0 and wanted > 0):
            raise ValueError(f"region {self.spec}: it holds no activity that could be deblurred; choose another region")
        scale = wanted / new
        inside = f > 0
        u[inside] += f[inside] * (np.float32(scale) * deblurred[inside] - u[inside])
        return out, scale

    def paste_spread(self, spread: NDArray[np.float32], scale: float = 1.0) -> NDArray[np.float32]:
        """A standard deviation of x, as one of out: f s times it, and zero outside, where nothing was estimated."""
        self._require(spread, tuple(2 * (s.stop - s.start) for s in self.crop))
        if self.is_whole:
            return np.asarray(spread, dtype=np.float32)
        out = np.zeros(tuple(2 * n for n in self.shape), dtype=np.float32)
        out[_box([(2 * s.start, 2 * s.stop) for s in self.crop])] = self.weights() * np.float32(scale) * spread
        return out

    def _require(self, array: NDArray[np.floating], shape: tuple[int, ...]) -> None:
        if tuple(array.shape) != tuple(shape):
            raise ValueError(f"region {self.spec}: expected an array of shape {shape}, got {tuple(array.shape)}")


def check_spec(spec: str) -> str:
    """`spec`, where it is one of those the module names, for settings. Raises ValueError naming them."""
    if spec in ("whole", "body", "head-neck") or _BOX.fullmatch(spec):
        return spec
    raise ValueError(f"region is 'whole', 'body', 'head-neck' or 'box:d0-d1,h0-h1,w0-w1' (PET voxels), got {spec!r}")


def region(
    volume: Volume, spec: str, *, context_mm: float = CONTEXT_MM, fade_mm: float = FADE_MM
) -> Region:
    """The region that `spec` names in `volume` (see the module).

    context_mm  beyond the region that the solver sees;   fade_mm  within its border.
    Raises ValueError for an unknown specification, a box that is empty or leaves the volume, and where "head-neck"
    cannot be found. "body" falls back to the whole volume where it cannot tell, and `reason` says why.
    """
    check_spec(spec)
    if spec == "whole":
        return _made(volume, spec, "the whole volume was asked for", _everything(volume), context_mm, fade_mm)
    if spec == "body":
        box, reason = body_box(volume)
        return _made(volume, spec, reason, box, context_mm, fade_mm)
    if spec == "head-neck":
        box, reason = head_neck_box(volume)
        return _made(volume, spec, reason, box, context_mm, fade_mm)
    return _made(volume, spec, "the box was asked for", _asked_box(volume, spec), context_mm, fade_mm)


def body_box(volume: Volume, *, margin_mm: float = MARGIN_MM) -> tuple[Box, str]:
    """The box around the body, and how it was found.

    The activity is smoothed by 8 mm. The threshold between air and body on a logarithmic scale (Otsu, IEEE Trans. Syst.
    Man Cybern. 9, 62, 1979) gives the activity of tissue, the median above it; a tenth of that is the body's edge. The
    box holds the largest component and every other that has 1/2000 of the activity or more, with a margin. It is
    widened until it holds 99.9 % of the positive activity above 1/50 of tissue, and 99 % of all positive activity.
    Where nothing stands out, or nearly everything does, it is the whole volume.
    """
    found = _Silhouette.of(volume)
    if found is None:
        return _everything(volume), "whole: no body stands out from its surroundings"
    activity = np.maximum(volume.array, 0.0)
    labels, count = ndimage.label(found.mask)
    held = ndimage.sum_labels(activity, labels, np.arange(1, count + 1))
    sizes = ndimage.sum_labels(found.mask, labels, np.arange(1, count + 1))
    kept = [s for s, own, size in zip(ndimage.find_objects(labels), held, sizes, strict=True)
            if size == sizes.max() or own >= OWN_SHARE * held.sum()]
    tight = [(min(s[a].start for s in kept), max(s[a].stop for s in kept)) for a in range(3)]
    above = np.where(found.smooth > NOISE_SHARE * found.tissue, activity, 0.0)
    margin = margin_mm
    while True:
        box = _grown(volume, tight, margin)
        shares = [float(v[box].sum(dtype=np.float64) / v.sum(dtype=np.float64)) for v in (above, activity)]
        if shares[0] >= HELD_ABOVE_NOISE and shares[1] >= HELD_IN_ALL:
            break
        margin += float(volume.spacing.min())
    if all(s.start == 0 and s.stop == n for s, n in zip(box, volume.shape, strict=True)):
        return box, "whole: the body reaches every border of the field of view"
    return box, (f"body: {100 * shares[0]:.2f} % of the activity above noise, {100 * shares[1]:.2f} % of all, "
                 f"{margin:.0f} mm around it")


def head_neck_box(volume: Volume) -> tuple[Box, str]:
    """The box around head and neck of a PET that shows the trunk too, and how it was found.

    Going down from the head end, which the volume's direction tells (LPS +z is superior), the middle part of the body's
    silhouette is narrow (head, neck) until it joins the trunk, or the raised arms at their shoulders. The box reaches
    50 mm further down, and 25 mm around the head.

    Raises ValueError where the volume is not axial, no body stands out, or no head of 60 to 450 mm lies above a trunk.
    """
    along, across = _patient_axes(volume)
    found = _Silhouette.of(volume)
    if found is None:
        raise ValueError("region head-neck: no body stands out from its surroundings; name a box instead")
    towards_head = float(volume.direction[2, along]) > 0
    mask = np.moveaxis(found.mask, (along, across), (0, 2))
    mask = mask[::-1] if towards_head else mask  # from the head down
    middle = float(np.median(np.nonzero(mask)[2]))
    parts = [_middle_part(plane, middle) for plane in mask]
    step, pixel = float(volume.spacing[along]), float(volume.spacing[across])
    widths = np.array([0.0 if p is None else (p[1].stop - p[1].start) * pixel for p in parts])
    widths = ndimage.median_filter(widths, size=5, mode="nearest")
    trunk = float(np.percentile(widths[widths > 0], 75)) if np.any(widths > 0) else 0.0
    wide = np.flatnonzero(widths >= NARROW * trunk)
    shoulders = int(wide[0]) if len(wide) else 0
    top = next((i for i, w in enumerate(widths) if w > 0), 0)
    length = (shoulders - top) * step
    head = widths[top:shoulders]
    if trunk < TRUNK_WIDTH_MM or not HEAD_MM[0] <= length <= HEAD_MM[1] or head.max() > HEAD_WIDTH_MM:
        raise ValueError(
            f"region head-neck: no head lies above a trunk (narrow part at the head end: {max(length, 0):.0f} mm long, "
            f"up to {head.max() if len(head) else 0:.0f} mm wide; trunk {trunk:.0f} mm wide); name a box or take 'body'"
        )
    boxes = [p for p in parts[top:shoulders] if p is not None]
    stop = min(shoulders + round(BELOW_SHOULDERS_MM / step), len(parts))
    start = max(top - round(AROUND_HEAD_MM / step), 0)
    limits = {along: (len(parts) - stop, len(parts) - start) if towards_head else (start, stop)}
    for which, axis in enumerate((3 - along - across, across)):
        around = round(AROUND_HEAD_MM / float(volume.spacing[axis]))
        limits[axis] = (max(min(p[which].start for p in boxes) - around, 0),
                        min(max(p[which].stop for p in boxes) + around, volume.shape[axis]))
    return _box([limits[a] for a in range(3)]), (
        f"head and neck: {length:.0f} mm above the shoulders and {(stop - shoulders) * step:.0f} mm below")


@dataclass(frozen=True, eq=False)
class _Silhouette:
    """smooth (D, H, W): activity smoothed by 8 mm;   tissue: its median in the body;   mask: the body."""

    smooth: NDArray[np.float32]
    tissue: float
    mask: NDArray[np.bool_]

    @classmethod
    def of(cls, volume: Volume) -> _Silhouette | None:
        """None where nothing stands out."""
        smooth = ndimage.gaussian_filter(np.maximum(volume.array, 0.0), 8.0 / 2.355 / volume.spacing, mode="nearest")
        top = float(np.percentile(smooth, 99.5))
        if top <= 0:
            return None
        logs = np.log(np.maximum(smooth, 1e-4 * top))
        body = logs > _otsu(logs)
        if body.all() or not body.any() or np.median(logs[body]) - np.median(logs[~body]) < np.log(10.0):
            return None
        tissue = float(np.median(smooth[body]))
        mask = smooth > BODY_SHARE * tissue
        return cls(smooth, tissue, mask) if mask.mean() < 0.95 else None


def _otsu(values: NDArray[np.floating]) -> float:
    """The threshold that parts values into two classes of least variance; a histogram of 256 bins."""
    counts, edges = np.histogram(values, 256)
    share = counts / counts.sum()
    below, moment = np.cumsum(share), np.cumsum(share * (edges[:-1] + edges[1:]) / 2)
    valid = (below > 0) & (below < 1)
    between = np.zeros(256)
    between[valid] = (moment[-1] * below[valid] - moment[valid]) ** 2 / (below[valid] * (1 - below[valid]))
    return float(edges[int(np.argmax(between)) + 1])


def _middle_part(plane: NDArray[np.bool_], middle: float) -> tuple[slice, slice] | None:
    """Rows and columns of the component of a filled slice whose columns come nearest to `middle`."""
    labels, count = ndimage.label(ndimage.binary_fill_holes(plane))
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    parts = [s for s, size in zip(ndimage.find_objects(labels), sizes, strict=True) if size >= 0.1 * sizes.max()]
    distance = [max(s[1].start - middle, middle - (s[1].stop - 1), 0.0) for s in parts]
    found: tuple[slice, slice] = parts[int(np.argmin(distance))]
    return found


def _patient_axes(volume: Volume) -> tuple[int, int]:
    """The array axes along the patient and from right to left. Raises ValueError where they lie oblique."""
    direction = np.abs(volume.direction)
    along, across = int(np.argmax(direction[2])), int(np.argmax(direction[0]))
    if direction[2, along] < 0.9 or direction[0, across] < 0.9 or along == across:
        raise ValueError("region head-neck: the volume lies oblique in the patient; name a box instead")
    return along, across


def _asked_box(volume: Volume, spec: str) -> Box:
    match = _BOX.fullmatch(spec)
    assert match is not None  # check_spec has seen it
    numbers = [int(text) for text in match.groups()]
    limits = list(zip(numbers[::2], numbers[1::2], strict=True))
    for (start, stop), n, name in zip(limits, volume.shape, "dhw", strict=True):
        if not start < stop <= n:
            raise ValueError(f"region {spec}: {name} {start}-{stop} is empty or leaves the volume's {n} voxels")
    return _box(limits)


def _everything(volume: Volume) -> Box:
    return _box([(0, n) for n in volume.shape])


def _grown(volume: Volume, limits: list[tuple[int, int]], margin_mm: float) -> Box:
    more = [int(np.ceil(margin_mm / float(s))) for s in volume.spacing]
    return _box([(max(a - m, 0), min(b + m, n)) for (a, b), m, n in zip(limits, more, volume.shape, strict=True)])


def _made(volume: Volume, spec: str, reason: str, inside: Box, context_mm: float, fade_mm: float) -> Region:
    spacing = (float(volume.spacing[0]), float(volume.spacing[1]), float(volume.spacing[2]))
    crop = _grown(volume, [(s.start, s.stop) for s in inside], context_mm)
    fade = [min(max(1, round(fade_mm / mm)), max(1, (s.stop - s.start) // 3))
            for mm, s in zip(spacing, inside, strict=True)]
    return Region(spec, reason, volume.shape, spacing, inside, crop, (fade[0], fade[1], fade[2]))


def _box(limits: list[tuple[int, int]]) -> Box:
    d, h, w = (slice(int(a), int(b)) for a, b in limits)
    return d, h, w
