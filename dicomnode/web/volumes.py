"""Source and derived volume of a job, for looking at slices: read once, kept as files mapped into memory.

The files have no name (they vanish with the process) and lie in the data directory, on the same disk as the patients'
data; how many bytes they take together is bounded, the least recently used go first. Only what is looked at is in
memory.

Both volumes are turned so that their axes point, as nearly as they do, to the patient's head, back and left: slices
are then shown as radiology does, the patient's right at the left, the head up. Same places are found by mm: the two
grids share the edges of their field of view, not the centres of their voxels (Volume.doubled).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from deconv.volume import Volume
from dicomnode.ledger import Ledger
from dicomnode.spool import Spool
from sop.errors import Refused
from sop.read import read_series
from sop.suv import shown_unit
from sop.units import pet_scale

__all__ = ["PLANES", "REPAIR", "Gone", "Pair", "Shelf", "open_pair", "oriented", "stamp_of"]

#: Plane -> the axis of an oriented volume (head, back, left) that its slices are stacked along.
PLANES = {"axial": 0, "coronal": 1, "sagittal": 2}
MAX_BYTES = 2 * 2**30
REPAIR = "stop the node, then `dicomnode repair --dry-run` looks what is missing or damaged"
SPARE_BYTES = 2**30  # of the disk that looking leaves alone
PLACE = ["ImagePositionPatient", "RescaleSlope", "Units", "SUVType", "PixelData"]


class Gone(LookupError):
    """The files that an image would be made of are not there (any more); the message says which, and why."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Source and derived volume of a job on oriented grids.

    before, after   None where the files are gone; `missing` then says why.
    unit, factor    display value (sop.suv.shown_unit) = value of the volume x factor.
    """

    before: Volume | None
    after: Volume | None
    unit: str
    factor: float
    missing: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(volume.array.nbytes for volume in (self.before, self.after) if volume is not None)

    def volume(self, when: str) -> Volume:
        """ "before" or "after". Raises Gone."""
        volume = self.before if when == "before" else self.after
        if volume is None:
            raise Gone(self.missing[when])
        return volume

    def shape(self) -> tuple[int, int, int]:
        """Slices of the finer grid along (head, back, left): what the sliders count. Raises Gone where nothing is left.

        A derived grid that is gone has twice as many as its source.
        """
        if self.after is not None:
            return self.after.shape
        d, h, w = self.volume("before").shape
        return 2 * d, 2 * h, 2 * w

    def slice(self, when: str, plane: str, number: int) -> NDArray[np.float32]:
        """The image (rows, columns) in display units that lies at slice `number` of the finer grid.

        Source slice k covers the fine slices 2k and 2k + 1. Raises Gone, IndexError.
        """
        axis = PLANES[plane]
        if not 0 <= number < self.shape()[axis]:
            raise IndexError(f"slice {number} is not one of the {self.shape()[axis]} {plane} slices")
        volume = self.volume(when)
        k = number if when == "after" else number // 2
        image = np.take(volume.array, k, axis=axis)
        head_up = image if plane == "axial" else image[::-1]
        return np.asarray(head_up * np.float32(self.factor))

    def at(self, when: str, place_mm: Sequence[float]) -> tuple[float, tuple[int, int, int]] | None:
        """Display value of the voxel in which a place (LPS mm) lies, and its index; None outside. Raises Gone."""
        volume = self.volume(when)
        index = tuple(int(i) for i in np.floor(volume.index(np.asarray(place_mm, dtype=np.float64)) + 0.5))
        if any(not 0 <= i < n for i, n in zip(index, volume.shape, strict=True)):
            return None
        d, h, w = index
        return float(volume.array[d, h, w]) * self.factor, (d, h, w)


def oriented(volume: Volume) -> Volume:
    """The same voxels with axes that point to the patient's head, back and left, as nearly as they do. A view.

    Raises ValueError where two axes point the same way (a stack turned by 45 degrees about two axes).
    """
    toward = np.eye(3)[[2, 1, 0]] @ volume.direction  # row: head, back, left; column: axis of the array
    order = [int(i) for i in np.abs(toward).argmax(axis=1)]
    if sorted(order) != [0, 1, 2]:
        raise ValueError("the axes of the volume are too oblique to be called axial, coronal and sagittal")
    flip = [toward[row, axis] < 0 for row, axis in enumerate(order)]
    array = volume.array.transpose(order)[tuple(slice(None, None, -1 if f else None) for f in flip)]
    corner = np.zeros(3)
    for axis, f in zip(order, flip, strict=True):
        corner[axis] = volume.shape[axis] - 1 if f else 0
    signs = np.where(flip, -1.0, 1.0)
    return Volume(array, volume.spacing[order], volume.position(corner), volume.direction[:, order] * signs,
                  volume.unit)


class Shelf:
    """The pairs that were looked at last, within a bound. Two requests for one pair read it once."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[object, Pair]] = OrderedDict()
        self._reading: dict[str, threading.Lock] = {}

    def get(self, key: str, stamp: object, make: Callable[[], Pair]) -> Pair:
        """The pair called `key`, made where it is not there or was made of files with another stamp."""
        with self._lock:
            turn = self._reading.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                if key in self._kept and self._kept[key][0] == stamp:
                    self._kept.move_to_end(key)
                    return self._kept[key][1]
                self._kept.pop(key, None)
            pair = make()
            with self._lock:
                self._kept[key] = stamp, pair
                while len(self._kept) > 1 and sum(one.bytes for _, one in self._kept.values()) > self._max_bytes:
                    dropped, _ = self._kept.popitem(last=False)
                    self._reading.pop(dropped, None)
            return pair


def stamp_of(spool: Spool, job: dict[str, Any]) -> tuple[int, int]:
    """Changes when files of the job's source or derived series come or go: when their folders last changed."""
    source = spool.absolute(f"objects/{job['study_uid']}/{job['series_uid']}")
    derived = spool.absolute(job["derived_path"] or f"derived/{job['id']}")
    before, after = (folder.stat().st_mtime_ns if folder.is_dir() else 0 for folder in (source, derived))
    return before, after


def open_pair(ledger: Ledger, spool: Spool, job: dict[str, Any]) -> Pair:
    """Read source and derived files of a job (a row of the ledger). What is gone or unreadable is told in `missing`."""
    missing: dict[str, str] = {}
    unit, factor = "", 0.0
    before = after = None
    try:
        before, unit, factor = _source(ledger, spool, job)
    except Refused as error:  # it was read when the job ran
        missing["before"] = f"a file of the source cannot be read: {error.reason}. Remedy: {REPAIR}"
    except (Gone, OSError, ValueError) as error:
        missing["before"] = str(error)
    try:
        after, headers = _derived(spool, job)
        if before is None:
            unit, factor = _told(job) or shown_unit(headers(), after.unit)[:2]
    except (Gone, Refused, OSError, ValueError) as error:
        missing["after"] = str(error)
    except (InvalidDicomError, AttributeError, KeyError, EOFError) as error:  # what pydicom makes of a damaged file
        missing["after"] = f"a derived file cannot be read ({error}). Remedy: {REPAIR}"
    return Pair(before, after, unit, factor, missing)


def _told(job: dict[str, Any]) -> tuple[str, float] | None:
    """Unit and factor that the job's report and pictures are in; None for a job of a version that told none."""
    measures = (job["report"] or {}).get("looks") or {}
    return (str(measures["unit"]), float(measures["factor"])) if "factor" in measures else None


def _source(ledger: Ledger, spool: Spool, job: dict[str, Any]) -> tuple[Volume, str, float]:
    """What the job was computed from. Raises Gone, Refused, ValueError."""
    wanted = set(job["inputs"])
    files = [spool.absolute(row["path"]) for row in ledger.instances(job["series_uid"])
             if row["sop_instance_uid"] in wanted]
    if not files or not all(path.exists() for path in files):
        at = ledger.series(job["series_uid"])["purged_at"]
        raise Gone("the files of the source were removed after delivery, as [retention] says" if at else
                   f"the files of the source are not in the data directory. Remedy: {REPAIR}")
    volume, info = read_series(files)
    unit, factor, _ = shown_unit(info, volume.unit)
    kept = _mapped(volume.shape, spool, volume, lambda out: np.copyto(out, volume.array))
    return oriented(kept), unit, factor


def _derived(spool: Spool, job: dict[str, Any]) -> tuple[Volume, Callable[[], list[Dataset]]]:
    """The derived series from its files, and what reads all its headers. Raises Gone, OSError, ValueError.

    We wrote them: native, one grid, RescaleIntercept 0. So each file is read once, which sop.read cannot do; the same
    values come out.
    """
    paths = sorted(spool.absolute(job["derived_path"]).glob("*.dcm")) if job["derived_path"] else []
    if not paths or len(paths) != job["derived_instances"]:
        raise Gone("nothing was built" if not job["derived_path"] else
                   "the derived files were removed after delivery, as [retention] says" if job["purged_at"] else
                   f"{len(paths)} of {job['derived_instances']} derived files are in the data directory. "
                   f"Remedy: {REPAIR}")
    first = dcmread(paths[0], stop_before_pixels=True)
    shape = (len(paths), int(first.Rows), int(first.Columns))
    kind = "<i2" if first.PixelRepresentation == 1 else "<u2"
    with _nameless(spool, 2 * int(np.prod(shape))) as file:
        stored: NDArray[np.integer] = np.memmap(file, dtype=kind, mode="r+", shape=shape)
    heads = [_read_into(stored[i], path) for i, path in enumerate(paths)]
    if first.Units == "CNTS":  # the scanner's own factors lie in a private block, at a place of its choice
        heads = [dcmread(path, stop_before_pixels=True) for path in paths]
    scale = pet_scale(heads)
    row, column = np.array(first.ImageOrientationPatient, dtype=np.float64).reshape(2, 3)
    places = np.array([head.ImagePositionPatient for head in heads], dtype=np.float64)
    order = np.argsort(places @ np.cross(row, column))
    step = (places[order[-1]] - places[order[0]]) / max(1, len(order) - 1)
    length = float(np.linalg.norm(step))
    grid = Volume(np.zeros((1, 1, 1), dtype=np.float32), np.array([length, *map(float, first.PixelSpacing)]),
                  places[order[0]], np.stack([step / length, column, row], axis=1), scale.unit)

    def fill(out: NDArray[np.float32]) -> None:
        for k, i in enumerate(order):
            out[k] = stored[i] * (float(heads[i].RescaleSlope) * scale.factors[i])

    return (oriented(_mapped(shape, spool, grid, fill)),
            lambda: [dcmread(path, stop_before_pixels=True) for path in paths])


def _read_into(out: NDArray[np.integer], path: Path) -> Dataset:
    """The stored values of a file; what is known of its place is returned. Raises Gone where it is not whole."""
    read = dcmread(path, specific_tags=PLACE)
    if len(read.PixelData) < out.nbytes:
        raise Gone(f"derived file {path.name} is not whole. Remedy: {REPAIR}")
    out[:] = np.frombuffer(read.PixelData, dtype=out.dtype, count=out.size).reshape(out.shape)
    del read.PixelData
    return read


@contextmanager
def _nameless(spool: Spool, size: int) -> Iterator[IO[bytes]]:
    """A file of that many bytes that really are there: writing to a map of a file with holes on a full disk would end
    the process. Raises Gone where the reception of objects might need the room."""
    if spool.free_bytes() < size + SPARE_BYTES:
        raise Gone("the disk is too full to unpack slices. Remedy: free space, or set [retention]")
    with tempfile.TemporaryFile(dir=spool.data_dir) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        yield file


def _mapped(shape: tuple[int, ...], spool: Spool, grid: Volume, fill: Callable[[NDArray[np.float32]], None]) -> Volume:
    """A volume of `shape` on the grid's place whose voxels lie in a nameless file. Raises Gone, OSError."""
    with _nameless(spool, 4 * int(np.prod(shape))) as file:
        writable: NDArray[np.float32] = np.memmap(file, dtype=np.float32, mode="r+", shape=shape)
        fill(writable)
        values = np.memmap(file, dtype=np.float32, mode="r", shape=shape)
    return Volume(values, grid.spacing, grid.origin, grid.direction, grid.unit)
