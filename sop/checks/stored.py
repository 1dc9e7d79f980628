"""Series as they lie on disk, for checking: headers with untouched bytes, positions, values.

Classic instances are read here. The frames of a multi-frame source come from sop.read, which makes a header for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element

from sop.errors import Refused
from sop.read import read_series

__all__ = ["Instance", "canonical", "numbers", "open_derived", "open_source", "rescaled", "source_series_uid",
           "text"]

_PIXEL_DATA = 0x7FE00010
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # little endian, implicit and explicit
_THREADS = 2


@dataclass(eq=False)
class Instance:
    """One slice as stored.

    elements     tag -> value in one form whatever the transfer syntax; see `canonical`.
    along        mm along the normal, row x column direction.
    plane        (rows, columns) float32, rescaled; of a derived slice averaged over 2 x 2 pixels, (rows/2, columns/2).
                 None where the pixel data do not fit the header; `trouble` then says why.
    smallest, largest   stored values.
    maximum, total      of the rescaled values, in the units the header states.
    """

    path: Path
    header: Dataset
    elements: dict[int, Any]
    position: NDArray[np.float64]
    along: float
    plane: NDArray[np.float32] | None = None
    smallest: int = 0
    largest: int = 0
    maximum: float = 0.0
    total: float = 0.0
    trouble: str = ""

    @property
    def uid(self) -> str:
        """SOPInstanceUID."""
        return text(self.header, "SOPInstanceUID")


def text(header: Dataset, keyword: str) -> str:
    """The value as one text, "" where absent or empty; several values joined by a backslash."""
    value = header.get(keyword)
    if value is None:
        return ""
    return "\\".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)


def numbers(header: Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    """`count` numbers, NaN where the header does not hold just so many."""
    parts = text(header, keyword).split("\\")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    return np.array(values if len(values) == count else [np.nan] * count)


def canonical(ds: Dataset, parsed: dict[tuple, Any] | None = None) -> dict[int, Any]:
    """Tag -> bytes without padding, for a sequence a tuple of mappings: comparable between transfer syntaxes.

    parsed   sequences met before, by their bytes: most are the same in all instances of a series.
    """
    elements: dict[int, Any] = {}
    parsed = {} if parsed is None else parsed
    for tag in sorted(ds.keys()):
        if tag.element == 0 or tag == _PIXEL_DATA:
            continue
        raw = ds.get_item(tag)
        if isinstance(raw, RawDataElement) and raw.is_little_endian and not _may_be_sequence(int(tag), raw.VR):
            elements[int(tag)] = (raw.value or b"").rstrip(b" \0")
            continue
        key = (int(tag), raw.value, raw.is_implicit_VR) if isinstance(raw, RawDataElement) else None
        if key is None or key not in parsed:
            value = _decoded(cast(DataElement, ds[tag]))
            if key is not None:
                parsed[key] = value
            elements[int(tag)] = value
        else:
            elements[int(tag)] = parsed[key]
    return elements


@lru_cache(maxsize=4096)
def _may_be_sequence(tag: int, vr: str | None) -> bool:
    if vr is not None and vr != "UN":
        return vr == "SQ"
    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:
        return False


def _decoded(element: DataElement) -> Any:
    if element.VR == "SQ":
        return tuple(canonical(item) for item in element.value)
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, True
    write_data_element(buffer, element)
    return buffer.getvalue()[8:].rstrip(b" \0")


def _normal(header: Dataset) -> NDArray[np.float64]:
    cosines = numbers(header, "ImageOrientationPatient", 6)
    return np.cross(cosines[:3], cosines[3:])


def _stored(data: FileDataset) -> NDArray:
    rows, columns = int(data.Rows), int(data.Columns)
    if int(data.BitsAllocated) == int(data.BitsStored) == 16 and str(data.file_meta.TransferSyntaxUID) in _NATIVE:
        kind = "<i2" if int(data.PixelRepresentation) else "<u2"
        raw = cast(RawDataElement, data.get_item(_PIXEL_DATA))
        return np.frombuffer(cast(bytes, raw.value), dtype=kind).reshape(rows, columns)
    return np.asarray(data.pixel_array).reshape(rows, columns)


def rescaled(path: Path) -> NDArray[np.float64]:
    """Rescaled values (rows, columns) of a classic instance, in the units its header states."""
    data = dcmread(path)
    slope, intercept = (float(numbers(data, keyword, 1)[0]) for keyword in ("RescaleSlope", "RescaleIntercept"))
    return _stored(data) * slope + intercept


def _open_classic(path: Path, parsed: dict[tuple, Any], *, pooled: bool) -> Instance:
    data = dcmread(path)
    position = numbers(data, "ImagePositionPatient", 3)
    found = Instance(path, data, canonical(data, parsed), position, float(position @ _normal(data)))
    try:
        stored = _stored(data)
        slope = float(numbers(data, "RescaleSlope", 1)[0])
        intercept = float(numbers(data, "RescaleIntercept", 1)[0])
        found.smallest, found.largest = int(stored.min()), int(stored.max())
        found.maximum = found.largest * slope + intercept
        found.total = float(stored.sum(dtype=np.int64)) * slope + intercept * stored.size
        if pooled:
            across = stored[0::2].astype(np.int32) + stored[1::2]
            found.plane = (across[:, 0::2] + across[:, 1::2]) * np.float32(slope / 4) + np.float32(intercept)
        else:
            found.plane = stored * np.float32(slope) + np.float32(intercept)
    except Exception as error:  # damaged pixel data raise nearly anything; it is told as a finding
        found.trouble = f"{path.name}: pixel data do not fit the header ({type(error).__name__}: {error})"
    data.pop(_PIXEL_DATA, None)
    return found


def _open_all(paths: Sequence[Path], *, pooled: bool) -> list[Instance]:
    parsed: dict[tuple, Any] = {}
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(lambda path: _open_classic(Path(path), parsed, pooled=pooled), paths))


def open_derived(paths: Sequence[Path]) -> list[Instance]:
    """All instances in increasing position along the normal; where there is none (NaN), last."""
    return sorted(_open_all(paths, pooled=True), key=lambda item: (np.isnan(item.along), item.along))


def open_source(paths: Sequence[Path], series_uid: str) -> list[Instance]:
    """The instances of the series `series_uid` among `paths`, one per place, in increasing position along the normal.

    series_uid   "" for the only PET series that there is.

    Raises Refused "empty" where none of the files is of that series, or it is not told and there are several.
    """
    kinds = {Path(path): _kind_of(Path(path)) for path in paths}
    pets = {series for series, modality in kinds.values() if modality == "PT"}
    wanted = series_uid or (pets.pop() if len(pets) == 1 else "")
    kept = [path for path, (series, _) in kinds.items() if wanted and series == wanted]
    if not kept:
        raise Refused("empty", "none of the files given as source belongs to the series that the derived one refers to",
                      "name the folder of the source series", series=series_uid)
    if "NumberOfFrames" in dcmread(kept[0], stop_before_pixels=True):
        return _open_multiframe(kept)
    return _one_per_place(_open_all(kept, pooled=False))


def _kind_of(path: Path) -> tuple[str, str]:
    header = dcmread(path, specific_tags=["SeriesInstanceUID", "Modality"], stop_before_pixels=True)
    return text(header, "SeriesInstanceUID"), text(header, "Modality")


def _one_per_place(found: list[Instance]) -> list[Instance]:
    """Of instances at one place (rule 9) the one with the lowest InstanceNumber, then UID."""
    found = sorted(found, key=lambda item: (item.along, numbers(item.header, "InstanceNumber", 1)[0], item.uid))
    return [item for before, item in zip([None, *found], found) if before is None or item.along - before.along > 0.01]


def _open_multiframe(paths: Sequence[Path]) -> list[Instance]:
    volume, info = read_series(paths)
    instances = []
    for item, values, back in zip(info.slices, volume.array, info.to_source_units):
        plane = values * np.float32(back)
        position = np.array(item.position)
        instances.append(Instance(
            item.path or Path(), item.header, canonical(item.header), position,
            float(position @ _normal(item.header)), plane, maximum=float(plane.max()),
            total=float(plane.sum(dtype=np.float64)),
        ))
    return instances


def source_series_uid(derived: Sequence[Instance]) -> str:
    """SeriesInstanceUID that most of the derived instances refer to in ReferencedSeriesSequence, "" where none does."""
    counted = Counter(
        text(item, "SeriesInstanceUID")
        for instance in derived for item in instance.header.get("ReferencedSeriesSequence") or ()
    )
    return counted.most_common(1)[0][0] if counted else ""
