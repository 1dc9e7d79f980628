"""Pictures of a job as PNGs, and the value at a place: maximum projections, kernel, slices.

    /studies/STUDY/jobs/JOB/mip/WHEN/VIEW.png           WHEN before, after, residual, uncertainty
    /studies/STUDY/jobs/JOB/turn/WHEN/NUMBER.png        the rotating projection; WHEN before, after
    /studies/STUDY/jobs/JOB/kernel/AXIS.png             AXIS d, h, w: seen along it
    /studies/STUDY/jobs/JOB/slice/WHEN/PLANE/NUMBER.png NUMBER counts the slices of the derived grid
    /studies/STUDY/jobs/JOB/value?x=&y=&z=              what source and derived series hold at a place, LPS mm

`top` is the upper end of the scale in display units, `palette` one of dicomnode.web.palette. `v` is the version that
the page names: with the right one the answer may be kept for ever, for the files of a job never change under it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, HTTPException, Query, Request, Response

from dicomnode.errors import NotFound
from dicomnode.looks import LOOKS_FILE, Looks
from dicomnode.looks import load as load_looks
from dicomnode.web.access import Viewer
from dicomnode.web.palette import picture
from dicomnode.web.site import Site, SiteNow
from dicomnode.web.volumes import PLANES, REPAIR, Gone, Pair, Shelf, open_pair, stamp_of

__all__ = ["Palette", "Top", "job_of", "looks_of", "looks_or_why", "pair_of", "planes_of", "router", "version_of"]

router = APIRouter(include_in_schema=False)

RENDERING = "1"  # raised when the same values give other pictures
LOOKS_KEPT = 6

Top = Annotated[float | None, Query(gt=0, le=1e12, allow_inf_nan=False)]
Palette = Annotated[Literal["inverse", "grey", "hot", "signed"], Query()]
Version = Annotated[str, Query(max_length=64)]
View = Literal["axial", "coronal", "sagittal"]
When = Literal["before", "after"]
Place = Annotated[float, Query(ge=-1e5, le=1e5, allow_inf_nan=False)]


class LooksKept:
    """The looks that were read last. A file that was replaced is read again."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int, int], Looks] = OrderedDict()

    def get(self, path: Path) -> Looks:
        """Raises FileNotFoundError for a job that was built before there were looks, or whose files are gone."""
        about = path.stat()
        key = str(path), about.st_mtime_ns, about.st_size
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        looks = load_looks(path)
        with self._lock:
            self._kept[key] = looks
            while len(self._kept) > LOOKS_KEPT:
                self._kept.popitem(last=False)
        return looks


_SHELF, _LOOKS = Shelf(), LooksKept()


def job_of(site: Site, study: str, job: int) -> dict[str, Any]:
    """The row of a job, of that study. Raises HTTPException 404."""
    try:
        row = site.ledger.job(job)
    except NotFound as error:
        raise HTTPException(404, str(error)) from error
    if row["study_uid"] != study:
        raise HTTPException(404, f"job {job} is not of study {study}")
    return row


def version_of(job: dict[str, Any]) -> str:
    """Changes whenever the files of a job do: of the digest of its derived files, which the ledger knows."""
    digest = (job["report"] or {}).get("files_sha256") or f"{job['derived_series_uid']} {job['built_at']}"
    return hashlib.sha256(f"{RENDERING} {digest}".encode()).hexdigest()[:16]


def looks_of(site: Site, job: dict[str, Any]) -> Looks | None:
    """None where the job has none, or where they cannot be read."""
    return looks_or_why(site, job)[0]


def looks_or_why(site: Site, job: dict[str, Any]) -> tuple[Looks | None, str]:
    """The looks of a job; without them, why there are none (as in NodeError), "" where nothing was built."""
    if not job["derived_path"]:
        return None, ""
    folder = site.spool.absolute(job["derived_path"])
    try:
        return _LOOKS.get(folder / LOOKS_FILE), ""
    except FileNotFoundError:
        if job["purged_at"]:
            return None, "the derived files were removed after delivery, as [retention] says; the figures are kept"
        if not folder.is_dir():
            return None, f"the derived files are not in the data directory. Remedy: {REPAIR}"
        told = (job["report"] or {}).get("looks") or {}
        return None, told.get("problem", "there are no pictures: this job was built by a version that made none")
    except (ValueError, OSError) as error:
        return None, f"the pictures cannot be read ({error}). Remedy: {REPAIR}"


def pair_of(site: Site, job: dict[str, Any]) -> Pair:
    """Source and derived volume of a job, read at the first call."""
    stamp = version_of(job), *stamp_of(site.spool, job)
    return _SHELF.get(f"{site.spool.data_dir} {job['id']}", stamp, lambda: open_pair(site.ledger, site.spool, job))


def _answer(request: Request, job: dict[str, Any], v: str, make: Any) -> Response:
    """The PNG that `make` gives, or 304 where the browser has it."""
    tag = hashlib.sha256(f"{version_of(job)} {request.url.path} {request.query_params}".encode()).hexdigest()[:32]
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, max-age=31536000, immutable" if v == version_of(job)
               else "private, no-cache"}
    asked = [one.strip().removeprefix("W/") for one in request.headers.get("If-None-Match", "").split(",")]
    if f'"{tag}"' in asked:
        return Response(status_code=304, headers=headers)
    try:
        return Response(make(), media_type="image/png", headers=headers)
    except (Gone, IndexError) as error:
        raise HTTPException(404, str(error)) from error


def _array(site: Site, job: dict[str, Any], name: str) -> tuple[np.ndarray, dict[str, Any]]:
    looks = looks_of(site, job)
    if looks is None or name not in looks.arrays:
        raise Gone(f"job {job['id']} has no picture {name}")
    return looks.arrays[name], looks.measures


@router.get("/studies/{study}/jobs/{job}/mip/{when}/{view}.png")
def mip(request: Request, site: SiteNow, user: Viewer, study: str, job: int,
        when: Literal["before", "after", "residual", "uncertainty"], view: View, top: Top = None,
        palette: Palette = "inverse", v: Version = "") -> Response:
    row = job_of(site, study, job)

    def make() -> bytes:
        values, measures = _array(site, row, f"{when}.{view}")
        return picture(values, top=top or _usual_top(values, measures, when), palette=palette)

    return _answer(request, row, v, make)


def _usual_top(values: np.ndarray, measures: dict[str, Any], when: str) -> float:
    """Of the images the scale that before and after share; of the others their own."""
    return float(measures["top"]) if when in ("before", "after") else float(np.abs(values).max()) or 1.0


@router.get("/studies/{study}/jobs/{job}/turn/{when}/{number}.png")
def turn(request: Request, site: SiteNow, user: Viewer, study: str, job: int, when: When, number: int,
         top: Top = None, palette: Palette = "inverse", v: Version = "") -> Response:
    row = job_of(site, study, job)

    def make() -> bytes:
        values, measures = _array(site, row, f"{when}.rotation")
        if not 0 <= number < len(values):
            raise IndexError(f"there are {len(values)} directions, not {number}")
        return picture(values[number], top=top or float(measures["top"]), palette=palette)

    return _answer(request, row, v, make)


@router.get("/studies/{study}/jobs/{job}/kernel/{axis}.png")
def kernel(request: Request, site: SiteNow, user: Viewer, study: str, job: int, axis: Literal["d", "h", "w"],
           palette: Palette = "inverse", v: Version = "") -> Response:
    row = job_of(site, study, job)

    def make() -> bytes:
        values, _ = _array(site, row, f"kernel.{axis}")
        return picture(values, top=float(values.max()) or 1.0, palette=palette)

    return _answer(request, row, v, make)


@router.get("/studies/{study}/jobs/{job}/slice/{when}/{plane}/{number}.png")
def slice_(request: Request, site: SiteNow, user: Viewer, study: str, job: int, when: When, plane: View, number: int,
           top: Top = None, palette: Palette = "inverse", v: Version = "") -> Response:
    row = job_of(site, study, job)

    def make() -> bytes:
        values = pair_of(site, row).slice(when, plane, number)
        looks = looks_of(site, row)
        usual = float(looks.measures["top"]) if looks else max(float(values.max()), 0.0) or 1.0
        return picture(values, top=top or usual, palette=palette)

    return _answer(request, row, v, make)


@router.get("/studies/{study}/jobs/{job}/value")
def value(site: SiteNow, user: Viewer, study: str, job: int, x: Place, y: Place, z: Place) -> dict[str, Any]:
    """Display values of the voxels in which a place lies; null outside, or where the files are gone."""
    pair = pair_of(site, job_of(site, study, job))
    found: dict[str, Any] = {"mm": [x, y, z], "unit": pair.unit}
    for when in ("before", "after"):
        at = None if when in pair.missing else pair.at(when, (x, y, z))
        found[when] = None if at is None else {"value": at[0], "index": list(at[1])}
    return found


def planes_of(pair: Pair) -> list[dict[str, Any]]:
    """What the viewer must know of each plane: number of fine slices, the size of its images and their place in mm.

    corner, right, down, step   LPS mm: the outer corner at the image's top left; along one mm of the image to the right
                                and down; from slice 0 to slice 1. `first` is the middle of slice 0 beside the corner.
    """
    which = pair.after if pair.after is not None else pair.volume("before")
    fine = np.array(pair.shape())
    spacing = np.array(which.shape) * which.spacing / fine
    edge = which.position((-0.5, -0.5, -0.5))
    axes = which.direction
    found = []
    for plane, axis in PLANES.items():
        rows, columns = (index for index in range(3) if index != axis)
        extent = fine * spacing
        up = plane != "axial"
        corner = edge + (axes[:, rows] * extent[rows] if up else 0.0) + axes[:, axis] * spacing[axis] / 2
        found.append({"plane": plane, "slices": int(fine[axis]), "step_mm": float(spacing[axis]),
                      "width": float(extent[columns]), "height": float(extent[rows]), "corner": corner.tolist(),
                      "right": axes[:, columns].tolist(), "down": (axes[:, rows] * (-1.0 if up else 1.0)).tolist(),
                      "step": (axes[:, axis] * spacing[axis]).tolist()})
    return found
