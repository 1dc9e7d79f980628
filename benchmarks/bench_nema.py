"""Contrast recovery of the spheres of a NEMA IEC phantom before and after deblurring, after NEMA NU 2-2018, section 7.

    python benchmarks/bench_nema.py FOLDER [--assume-units BQML] [--methods source,cubic,tv,preview,best] [--psf FILE]
                                    [--ratio N] [--json FILE]

An analysis of its own: it shares no code with deconv.calibration or deconv.metrics. Spheres are found by thresholding
the source, the same places are then used in every image.

    Q_j = 100 % (C_j / B_j - 1) / (a - 1)       N_j = 100 % SD_j / B_j
    C_j  mean in a circle of the sphere's inner diameter in the slice through its centre, voxels counted by the part
         of them that lies inside;  B_j, SD_j  mean and standard deviation over 60 such circles in the background, 12 in
         each of five slices, 0, 1 and 2 cm to both sides;  a  the true ratio of activities.

Where a is not known (--ratio), the plateau of the largest sphere in the source takes its place: the mean within 10 mm
of its centre. Q of all spheres is then relative to it, and says nothing about absolute recovery. Sphere columns also
hold the recovery in the whole ball and of the maximum, measured likewise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deconv
from deconv.volume import Volume
from sop.read import read_series

Array = NDArray[np.float64]
DIAMETERS_MM = (10.0, 13.0, 17.0, 22.0, 28.0, 37.0)
PLATEAU_MM = 10.0
BACKGROUND_ROIS = 12
BACKGROUND_SLICES_MM = (-20.0, -10.0, 0.0, 10.0, 20.0)
CLEARANCE_MM = 15.0  # of a background circle from the phantom's edge and from every sphere
HALF_LENGTH_MM = 45.0  # of the part of the phantom that is deblurred
SUBSAMPLES = 8
PRESETS = {"source": None, "cubic": ("cubic", "default"), "tv": ("tv", "default"), "tv-6mm": ("tv", "default"),
           "richardson-lucy": ("richardson-lucy", "default"), "preview": ("nbd", "preview"), "best": ("nbd", "best"),
           "paper": ("nbd", "paper")}
TAKES_PSF = ("tv", "richardson-lucy", "best")  # "tv-6mm": the width that TV takes where nothing is known


@dataclass(frozen=True)
class Row:
    """One image: per sphere Q by circle, by ball and of the maximum (%), N (%), and the background's mean."""

    image: str
    circle: tuple[float, ...]
    ball: tuple[float, ...]
    maximum: tuple[float, ...]
    variability: tuple[float, ...]
    background: float
    voxel_cv: float
    seconds: float


# --- where the spheres lie


def find_balls(image: Array, spacing: Array) -> list[Array]:
    """Centres (mm from the outer corner) of the six largest hot objects near the plane of the hottest, smallest first.

    Half-way between background and the hottest object's level separates all spheres that hold that level; each
    centre is the centre of activity above background within 4 mm of the ball.
    """
    smooth = ndimage.gaussian_filter(image, 3.0 / spacing)
    body = smooth > 0.2 * np.percentile(smooth, 99)
    background = float(np.median(image[body]))
    labels, count = ndimage.label(smooth > background + 0.25 * (smooth.max() - background))
    sizes = ndimage.sum_labels(np.ones_like(image), labels, np.arange(1, count + 1))
    largest = int(np.argmax(sizes)) + 1
    plane = ndimage.center_of_mass(labels == largest)[0] * spacing[0]
    found = []
    for label in np.argsort(sizes)[::-1] + 1:
        centre = (np.array(ndimage.center_of_mass(labels == label)) + 0.5) * spacing
        if abs(centre[0] - spacing[0] / 2 - plane) < 10.0:
            found.append(centre)
        if len(found) == len(DIAMETERS_MM):
            break
    if len(found) < len(DIAMETERS_MM):
        raise SystemExit(f"{len(found)} spheres stand out, {len(DIAMETERS_MM)} are needed")
    return [centred(image - background, spacing, centre, diameter)
            for centre, diameter in zip(found[::-1], DIAMETERS_MM, strict=True)]


def centred(above: Array, spacing: Array, centre: Array, diameter: float) -> Array:
    """The centre of activity within the ball and 4 mm around it, repeated until it rests."""
    for _ in range(20):
        near = distance(above.shape, spacing, centre) <= diameter / 2 + 4.0
        weights = np.maximum(above[near], 0.0)
        points = (np.argwhere(near) + 0.5) * spacing
        moved = (points * weights[:, None]).sum(axis=0) / weights.sum()
        if np.linalg.norm(moved - centre) < 0.01:
            return moved
        centre = moved
    return centre


def distance(shape: Sequence[int], spacing: Array, centre: Array) -> Array:
    """(D, H, W) mm from `centre` to each voxel centre."""
    d, h, w = ((np.arange(n) + 0.5) * s - c for n, s, c in zip(shape, spacing, centre, strict=True))
    return np.sqrt(d[:, None, None] ** 2 + h[None, :, None] ** 2 + w[None, None, :] ** 2)


# --- regions of interest with partial voxels


def disc_mean(plane: Array, spacing: Array, centre: Array, diameter: float) -> float:
    """Mean of a slice (H, W) in a circle; centre (H, W) in mm from the outer corner."""
    part = np.ones((1, 1))
    low = np.maximum(np.floor((centre - diameter / 2) / spacing).astype(int), 0)
    high = np.minimum(np.ceil((centre + diameter / 2) / spacing).astype(int), plane.shape)
    h, w = ((np.arange((b - a) * SUBSAMPLES) + 0.5) / SUBSAMPLES * s + a * s - c
            for a, b, s, c in zip(low, high, spacing, centre, strict=True))
    inside = (h[:, None] ** 2 + w[None, :] ** 2 <= (diameter / 2) ** 2).astype(float)
    part = inside.reshape(high[0] - low[0], SUBSAMPLES, high[1] - low[1], SUBSAMPLES).mean(axis=(1, 3))
    return float((plane[low[0]:high[0], low[1]:high[1]] * part).sum() / part.sum())


def ball_values(image: Array, spacing: Array, centre: Array, diameter: float) -> tuple[float, float]:
    """Mean (partial voxels) and maximum (voxels at least half inside) of a ball."""
    low = np.maximum(np.floor((centre - diameter / 2) / spacing).astype(int), 0)
    high = np.minimum(np.ceil((centre + diameter / 2) / spacing).astype(int), image.shape)
    n = 4
    squares = [(((np.arange((b - a) * n) + 0.5) / n + a) * s - c) ** 2
               for a, b, s, c in zip(low, high, spacing, centre, strict=True)]
    inside = squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :] <= (diameter / 2) ** 2
    shape = [x for a, b in zip(low, high, strict=True) for x in (b - a, n)]
    part = inside.reshape(shape).mean(axis=(1, 3, 5))
    values = image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return float((values * part).sum() / part.sum()), float(values[part >= 0.5].max())


def slice_at(image: Array, spacing: Array, at_mm: float) -> Array:
    """The slice (H, W) whose centre lies nearest to `at_mm` from the outer corner."""
    return image[int(np.clip(np.floor(at_mm / spacing[0]), 0, len(image) - 1))]


def background_centres(image: Array, spacing: Array, balls: Sequence[Array]) -> list[Array]:
    """Centres (H, W) in mm of the background circles: far apart, clear of the edge, the lung insert and the spheres."""
    middle = float(np.mean([ball[0] for ball in balls]))
    around = [slice_at(ndimage.gaussian_filter(image, 3.0 / spacing), spacing, middle + off)
              for off in BACKGROUND_SLICES_MM]
    warm = np.min(around, axis=0)
    level = float(np.median(warm[warm > 0.2 * np.percentile(warm, 95)]))
    room = ndimage.distance_transform_edt(warm > 0.5 * level, sampling=spacing[1:])
    h, w = ((np.arange(n) + 0.5) * s for n, s in zip(warm.shape, spacing[1:], strict=True))
    largest = max(DIAMETERS_MM) / 2
    for clearance in np.arange(CLEARANCE_MM, 2.0, -1.0):  # a small phantom has no room for the norm's 15 mm
        allowed = room >= largest + min(clearance, 8.0)
        for ball, diameter in zip(balls, DIAMETERS_MM, strict=True):
            apart = np.hypot(h[:, None] - ball[1], w[None, :] - ball[2])
            allowed &= apart >= diameter / 2 + clearance + largest
        if allowed.sum() >= 40 * BACKGROUND_ROIS:
            break
    points = np.stack([h[np.nonzero(allowed)[0]], w[np.nonzero(allowed)[1]]], axis=1)
    if len(points) < BACKGROUND_ROIS:
        raise SystemExit("the background has no room for twelve circles")
    chosen = [points[0]]
    while len(chosen) < BACKGROUND_ROIS:
        nearest = np.min([np.linalg.norm(points - one, axis=1) for one in chosen], axis=0)
        chosen.append(points[int(np.argmax(nearest))])
    return chosen


# --- figures


def analysed(name: str, image: Array, spacing: Array, balls: Sequence[Array], circles: Sequence[Array], *,
             contrast: float, seconds: float) -> Row:
    """`contrast`: a − 1, that of full recovery, in units of the background."""
    discs: list[float] = []
    spheres: list[float] = []
    maxima: list[float] = []
    variability, means = [], []
    middle = float(np.mean([ball[0] for ball in balls]))
    for ball, diameter in zip(balls, DIAMETERS_MM, strict=True):
        rois = [disc_mean(slice_at(image, spacing, middle + off), spacing[1:], circle, diameter)
                for off in BACKGROUND_SLICES_MM for circle in circles]
        level = float(np.mean(rois))
        mean, top = ball_values(image, spacing, ball, diameter)
        disc = disc_mean(slice_at(image, spacing, ball[0]), spacing[1:], ball[1:], diameter)
        for values, value in ((discs, disc), (spheres, mean), (maxima, top)):
            values.append(100.0 * (value / level - 1.0) / contrast)
        variability.append(100.0 * float(np.std(rois, ddof=1)) / level)
        means.append(level)
    voxels = np.concatenate([voxels_in(slice_at(image, spacing, middle), spacing[1:], circle) for circle in circles])
    return Row(name, tuple(discs), tuple(spheres), tuple(maxima), tuple(variability), float(np.mean(means)),
               100.0 * float(voxels.std() / voxels.mean()), seconds)


def voxels_in(plane: Array, spacing: Array, centre: Array) -> Array:
    h, w = ((np.arange(n) + 0.5) * s - c for n, s, c in zip(plane.shape, spacing, centre, strict=True))
    return plane[np.hypot(h[:, None], w[None, :]) <= max(DIAMETERS_MM) / 2]


def full_contrast(image: Array, spacing: Array, balls: Sequence[Array], circles: Sequence[Array],
                  ratio: float | None) -> float:
    """a − 1 as known, or as the middle of the largest sphere shows it."""
    if ratio is not None:
        return ratio - 1.0
    plateau = float(image[distance(image.shape, spacing, balls[-1]) <= PLATEAU_MM].mean())
    rois = [disc_mean(slice_at(image, spacing, balls[-1][0] + off), spacing[1:], circle, max(DIAMETERS_MM))
            for off in BACKGROUND_SLICES_MM for circle in circles]
    return plateau / float(np.mean(rois)) - 1.0


# --- images


def cropped(volume: Volume, balls: Sequence[Array]) -> tuple[Volume, Array]:
    """The part of the volume around the plane of the spheres, and where it starts (mm from the outer corner)."""
    middle = float(np.mean([ball[0] for ball in balls]))
    image = np.asarray(volume.array)
    body = np.argwhere(image > 0.1 * np.percentile(image, 99.5))
    margin = np.ceil(15.0 / volume.spacing).astype(int)
    low = np.maximum(body.min(axis=0) - margin, 0)
    high = np.minimum(body.max(axis=0) + margin + 1, image.shape)
    low[0] = max(0, int((middle - HALF_LENGTH_MM) / volume.spacing[0]))
    high[0] = min(image.shape[0], int(np.ceil((middle + HALF_LENGTH_MM) / volume.spacing[0])))
    part = image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return Volume(part, volume.spacing, volume.position(low), volume.direction, volume.unit), low * volume.spacing


def deblurred(volume: Volume, name: str, psf: dict[str, Any]) -> Volume:
    preset = PRESETS[name]
    assert preset is not None
    door = deconv.method(preset[0])
    overrides: dict[str, Any] = {}
    if name in TAKES_PSF and psf:
        overrides = {"psf_fwhm_mm": tuple(psf["fwhm_mm"])}
        if name == "best":
            overrides |= {"psf": "known", "psf_log_sd": max(0.04, *psf["log_sd"]), "psf_source": "calibration"}
    return door.deconvolve(volume, door.settings(preset[1], **overrides), device="cpu").image


def measured_psf(volume: Volume) -> dict[str, Any]:
    """As `dicomnode calibrate --diameters 10,13,17,22,28,37 --wall-mm 1` finds it on this very series."""
    from deconv.calibration import measure_psf

    found = measure_psf(volume, diameters_mm=DIAMETERS_MM, wall_mm=1.0)
    return {"fwhm_mm": found.fwhm_mm, "log_sd": found.log_sd}


def markdown(rows: Sequence[Row], psf: dict[str, Any], contrast: float, known: bool) -> str:
    sizes = [f"{diameter:g} mm" for diameter in DIAMETERS_MM]
    lines = [f"Contrast of full recovery (ratio minus 1): {contrast:.2f}, "
             + ("as given." if known else "the plateau of the largest sphere in the source: Q is relative to it.")]
    if psf:
        lines.append(f"Calibrated PSF: {' x '.join(f'{width:.2f}' for width in psf['fwhm_mm'])} mm (D, H, W).")
    for title, values in (("Q %, circle in the central slice", "circle"), ("Q %, whole ball", "ball"),
                          ("Q %, maximum", "maximum"), ("Background variability N %", "variability")):
        lines += ["", f"| {title} | {' | '.join(sizes)} |", "|---" * (len(sizes) + 1) + "|"]
        lines += [f"| {row.image} | {' | '.join(f'{value:.1f}' for value in getattr(row, values))} |" for row in rows]
    lines += ["", "| image | background mean | voxel CV % in the background | seconds |", "|---|---|---|---|"]
    lines += [f"| {row.image} | {row.background:.5g} | {row.voxel_cv:.1f} | {row.seconds:.0f} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--assume-units")
    parser.add_argument("--methods", default="source,cubic,tv,preview,best")
    parser.add_argument("--psf", type=Path, help="file of calibrate --out; left out: measured here")
    parser.add_argument("--ratio", type=float, help="true ratio of sphere to background activity")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    volume, _ = read_series(sorted(path for path in arguments.folder.rglob("*") if path.is_file()),
                            assume_units=arguments.assume_units)
    image = np.asarray(volume.array, dtype=np.float64)
    balls = find_balls(image, volume.spacing)
    circles = background_centres(image, volume.spacing, balls)
    contrast = full_contrast(image, volume.spacing, balls, circles, arguments.ratio)
    part, start = cropped(volume, balls)
    psf = json.loads(arguments.psf.read_text()) if arguments.psf else measured_psf(volume)
    rows = []
    for name in arguments.methods.split(","):
        preset = PRESETS[name]
        if preset and preset[1] not in deconv.PRESET_NAMES[preset[0]]:
            print(f"{name}: no such preset, left out", file=sys.stderr)
            continue
        started = time.perf_counter()
        result = part if preset is None else deblurred(part, name, psf)
        rows.append(analysed(name, np.asarray(result.array, dtype=np.float64), result.spacing,
                             [ball - start for ball in balls], [circle - start[1:] for circle in circles],
                             contrast=contrast, seconds=time.perf_counter() - started))
        print(f"{name}: done", file=sys.stderr)
    print(markdown(rows, psf, contrast, arguments.ratio is not None))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
