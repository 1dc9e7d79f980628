"""The largest uptakes of a PET, the same physical regions before and after: SUVmax, SUVmean, SUVpeak and volume.

A region is the connected part (voxels that share a face) around a local maximum of the SOURCE that holds at least 41 %
of it [B04]. Where that part holds a hotter voxel, 50, 60 and 70 % are tried in turn; a maximum that cannot be told from
a hotter one even so is a part of that uptake. All but the hottest must stand out: a peak of at least 1.5 times the
typical tissue, which is the median of the voxels above half of the median of those that reach a tenth of the mean.
Regions are ordered by their maximum.

SUVpeak is the highest mean in a sphere of 1 mL whose centre lies in the region [W09]. Voxels that lie partly in the
sphere count by that part, and both images are asked at the same places (the centres of the fine voxels), so that an
image with the same values on finer voxels has the same SUVpeak. (Of a focus not much wider than a voxel, coarse voxels
hold a lower mean than fine ones: at 4 mm voxels and 12 mm FWHM by 9 %. That is of the source, not of this measure.)
"SUV" stands for whatever unit the volume is in.

[B04] Boellaard et al., J Nucl Med 2004;45:1519.  [W09] Wahl et al. (PERCIST), J Nucl Med 2009;50 Suppl 1:122S.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from deconv.volume import Volume

__all__ = ["THRESHOLDS", "Region", "Uptake", "peak_sphere", "regions", "typical_tissue"]

THRESHOLDS = (0.41, 0.50, 0.60, 0.70)
LEAST_ML = 0.25
STANDS_OUT = 1.5
MOST = 8
TRIED = 150  # local maxima looked at, those in a region already found not counted
NEAR_MM = 8.0  # a maximum is the highest value within a box of so much to either side
PEAK_ML = 1.0
FIRST_BOX_MM = 25.0

Box = tuple[slice, slice, slice]
Image = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Uptake:
    """Of one region in one image, in the image's unit."""

    max: float
    mean: float
    peak: float


@dataclass(frozen=True, eq=False)
class Region:
    """One uptake.

    box, mask    its voxels on the source grid: mask (d, h, w) within the box.
    centre_mm    LPS: centre of activity; the hottest voxel where that lies outside the region.
    share        of the maximum, from which voxels belong to it.
    before, after  in the source and in the derived image.
    """

    box: Box
    mask: Mask
    centre_mm: tuple[float, float, float]
    source_slice: int
    volume_ml: float
    share: float
    before: Uptake
    after: Uptake


def regions(source: Volume, image: Volume, *, most: int = MOST) -> list[Region]:
    """The largest uptakes of `source` (D, H, W), measured there and in `image` (2D, 2H, 2W) over the same field."""
    if image.shape != tuple(2 * n for n in source.shape):
        raise ValueError(f"the image {image.shape} is not on the doubled grid of the source {source.shape}")
    found: list[Region] = []
    least = STANDS_OUT * typical_tissue(source.array)
    for box, mask, share in _parts(source):
        region = _measured(source, image, box, mask, share)
        if not found or region.before.peak >= least:
            found.append(region)
        if len(found) == most or region.before.max < least:
            break
    return sorted(found, key=lambda region: -region.before.max)


def typical_tissue(values: Image) -> float:
    """The value of an average voxel of the body, whatever is hot in it; 0 where nothing is positive."""
    bright = values[values > max(0.0, float(values.mean(dtype=np.float64)) / 10)]
    return float(np.median(bright[bright > np.median(bright) / 2])) if bright.size else 0.0


# --- finding


def _parts(source: Volume) -> Iterator[tuple[Box, Mask, float]]:
    """The regions' voxels, hottest first."""
    taken = np.zeros(source.shape, dtype=bool)
    tried = 0
    for seed in _maxima(source):
        if taken[seed]:
            continue
        tried += 1
        if tried > TRIED:
            return
        for share in THRESHOLDS:
            box, mask, apart = _part(source, seed, share)
            if apart:
                break
        alone = mask & ~taken[box]
        taken[box] |= mask
        if apart and np.array_equal(alone, mask) and mask.sum() * source.voxel_ml >= LEAST_ML:
            yield box, mask, share


def _maxima(source: Volume) -> list[tuple[int, int, int]]:
    """Voxels that are the highest of their neighbourhood, hottest first; one of each plateau."""
    reach = np.maximum(1, np.rint(NEAR_MM / source.spacing)).astype(int)
    highest = ndimage.maximum_filter(source.array, size=tuple(2 * reach + 1), mode="nearest")
    plateaus, _ = ndimage.label((source.array == highest) & (source.array > 0), structure=np.ones((3, 3, 3)))
    summits = np.flatnonzero(plateaus)
    places = summits[np.unique(plateaus.ravel()[summits], return_index=True)[1]]
    order = np.argsort(-source.array.ravel()[places], kind="stable")
    return [(int(d), int(h), int(w)) for d, h, w in zip(*np.unravel_index(places[order], source.shape))]


def _part(source: Volume, seed: tuple[int, int, int], share: float) -> tuple[Box, Mask, bool]:
    """The connected part around the seed with at least that share of its value, and whether it is the hottest there.

    Looked for in a box that grows until the part lies within it, or a hotter voxel is met.
    """
    top = float(source.array[seed])
    reach = np.maximum(2, np.rint(FIRST_BOX_MM / source.spacing)).astype(int)
    while True:
        limits = [(max(0, at - r), min(n, at + r + 1)) for at, r, n in zip(seed, reach, source.shape, strict=True)]
        box: Box = (slice(*limits[0]), slice(*limits[1]), slice(*limits[2]))
        within = source.array[box]
        labels, _ = ndimage.label(within >= share * top)
        mask = labels == labels[tuple(at - low for at, (low, _) in zip(seed, limits, strict=True))]
        if (within[mask] > top).any():
            return box, mask, False
        if not _leaves(mask, limits, source.shape):
            return box, mask, True
        reach = reach * 2


def _leaves(mask: Mask, limits: list[tuple[int, int]], shape: tuple[int, int, int]) -> bool:
    """Whether the part touches a face of its box that is not the volume's border."""
    for axis, (low, high) in enumerate(limits):
        faces = np.moveaxis(mask, axis, 0)
        if (low > 0 and faces[0].any()) or (high < shape[axis] and faces[-1].any()):
            return True
    return False


# --- measuring


def _measured(source: Volume, image: Volume, box: Box, mask: Mask, share: float) -> Region:
    box, mask = _tight(box, mask)
    fine = mask.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    margin = np.ceil(_peak_radius_mm() / source.spacing).astype(int) + 1
    wide = [slice(max(0, part.start - m), min(n, part.stop + m))
            for part, m, n in zip(box, margin, source.shape, strict=True)]
    around = source.array[tuple(wide)].repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    doubled = image.array[tuple(slice(2 * part.start, 2 * part.stop) for part in wide)]
    inner = tuple(slice(2 * (part.start - outer.start), 2 * (part.stop - outer.start))
                  for part, outer in zip(box, wide, strict=True))
    centres = np.zeros(around.shape, dtype=bool)
    centres[inner] = fine
    weights = peak_sphere(image.spacing)
    index = _centre(source.array[box], mask) + [part.start for part in box]
    x, y, z = (float(value) for value in source.position(index))
    return Region(box, mask, (x, y, z), round(float(index[0])), float(mask.sum() * source.voxel_ml), share,
                  _uptake(around, centres, weights), _uptake(doubled, centres, weights))


def _tight(box: Box, mask: Mask) -> tuple[Box, Mask]:
    inner = ndimage.find_objects(mask.astype(np.uint8))[0]
    parts = [slice(part.start + cut.start, part.start + cut.stop) for part, cut in zip(box, inner, strict=True)]
    return (parts[0], parts[1], parts[2]), mask[inner]


def _centre(values: Image, mask: Mask) -> NDArray[np.float64]:
    """Centre of activity within the box, voxels; the hottest voxel where that one is not of the region."""
    inside = np.where(mask, values, 0).astype(np.float64)
    centre = np.array(ndimage.center_of_mass(inside))
    if mask[tuple(np.rint(centre).astype(int))]:
        return centre
    return np.array(np.unravel_index(int(inside.argmax()), mask.shape), dtype=np.float64)


def _uptake(values: Image, centres: Mask, weights: NDArray[np.float64]) -> Uptake:
    inside = values[centres]
    return Uptake(float(inside.max()), float(inside.mean(dtype=np.float64)),
                  float(_weighted_means(values, weights)[centres].max()))


def _weighted_means(values: Image, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean under `weights` about each voxel, of what of them lies in the image."""
    size = [fft.next_fast_len(n + k - 1, real=True) for n, k in zip(values.shape, weights.shape, strict=True)]
    spectrum = fft.rfftn(weights, size)
    same = tuple(slice(k // 2, k // 2 + n) for n, k in zip(values.shape, weights.shape, strict=True))
    total, share = (fft.irfftn(fft.rfftn(array.astype(np.float64), size) * spectrum, size)[same]
                    for array in (values, np.ones(values.shape)))
    return np.asarray(total / share, dtype=np.float64)


def _peak_radius_mm() -> float:
    return float((3.0 * PEAK_ML * 1000.0 / (4.0 * np.pi)) ** (1.0 / 3.0))


def peak_sphere(spacing: NDArray[np.float64], *, parts: int = 8) -> NDArray[np.float64]:
    """(d, h, w) odd: how much of each voxel lies in the sphere of 1 mL about the middle one's centre; sum 1.

    spacing  mm.  parts  each voxel is asked at so many points along each axis.
    """
    radius = _peak_radius_mm()
    lines = []
    for step in spacing:
        reach = int(np.ceil(radius / step - 0.5))
        points = (np.arange((2 * reach + 1) * parts) + 0.5) / parts - 0.5 - reach
        lines.append(points * step)
    squared = lines[0][:, None, None] ** 2 + lines[1][:, None] ** 2 + lines[2] ** 2
    d, h, w = (len(line) // parts for line in lines)
    share = (squared <= radius**2).reshape(d, parts, h, parts, w, parts).mean(axis=(1, 3, 5))
    return np.asarray(share / share.sum(), dtype=np.float64)
