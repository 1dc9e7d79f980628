"""Data sets in, Volume out: sort, verify one series and one grid, rescale each slice by its own slope.

Order of arrival, duplicates, obliqueness, signedness and transfer syntax do not matter. What cannot be a volume is
refused with the reason and a remedy: a missing slice, a sheared stack, DYNAMIC or GATED frames, REPROJECTION, values
without units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from deconv.volume import Volume
from sop import geometry, kinds, multiframe
from sop.errors import Refused
from sop.header import integer, numbers, strings, text, without_pixels
from sop.isolated import IsolatedDecoder
from sop.pixels import frames_of, load
from sop.series import SeriesInfo, Slice
from sop.units import Scale, pet_scale

__all__ = ["read_series", "Refused", "SeriesInfo", "Slice"]

RESEND = "send the series again from the scanner or the PACS"
# 2^31 voxels are 8 GB of float32; a header that promises more is damaged or hostile.
MAX_VOXELS = 2**31


@dataclass(frozen=True, eq=False)
class _Found:
    """A slice before the grid is known; `source` gives the pixels when their turn comes."""

    slice: Slice
    source: Path | Dataset
    frames: int


def read_series(
    sources: Iterable[Path | str | Dataset], *, assume_units: str | None = None
) -> tuple[Volume, SeriesInfo]:
    """Read one PET, CT or reconstructed NM series, in any order, into a Volume and what is known about it.

    sources        files, or data sets with pixel data, of one series; classic or enhanced.
    assume_units   Units (0054,1001) code to use for a PET that states none ("BQML"); never overrides a stated one. A
                   missing SeriesType is then passed over too. For work offline, where a person vouches for it.

    Raises Refused, naming study and series, with `code` one of
        what it is    "empty", "mixed-series", "not-supported", "concatenation", "localizer", "dynamic", "gated",
                      "reprojection", "series-type", "conflict"
        its grid      "grid", "orientation", "pixel-spacing", "gap", "uneven-spacing", "duplicate-position", "sheared",
                      "slice-count", "single-slice"
        its values    "units-missing", "units-differ", "units-unsupported", "rescale"
        its bytes     "unreadable", "malformed", "truncated", "undecodable", "no-pixels", "pixel-format", "too-large"

    >>> from datetime import datetime; from tempfile import TemporaryDirectory
    >>> from sop.phantom import write_phantom; from sop.suv import suv_factors
    >>> pet = Volume.axial(np.full((2, 4, 4), 5000.0), (3, 4, 4))
    >>> with TemporaryDirectory() as folder:
    ...     study = write_phantom(Path(folder), pet, None, name="DOC", now=datetime(2026, 1, 2), suv_1_bqml=5000.0)
    ...     volume, info = read_series(study.pet)
    >>> volume.shape, volume.unit, info.modality, round(float(volume.array.max()))
    ((2, 4, 4), 'Bq/ml', 'PT', 5000)
    >>> round(float(volume.array.max()) * suv_factors(info).require("bw"), 3)  # SUVbw
    1.0
    >>> read_series([])
    Traceback (most recent call last):
    sop.errors.Refused: study unknown, series unknown: no instance was given. Remedy: name at least one DICOM file.
    """
    study = series = ""
    try:
        found = [item for source in sources for item in _open(source)]
        if not found:
            raise Refused("empty", "no instance was given", "name at least one DICOM file")
        study, series = _one_series(found)
        with IsolatedDecoder() as isolated:
            return _read(found, assume_units, isolated)
    except Refused as refusal:
        raise refusal.of(study, series) from refusal.__cause__


def _open(source: Path | str | Dataset) -> list[_Found]:
    if isinstance(source, Dataset):
        path, header = None, without_pixels(source)
    else:
        path = Path(source)
        header = load(path, pixels=False)
    try:
        return _slices(header, path, source if isinstance(source, Dataset) else Path(source))
    except Refused as refusal:
        named = refusal.of(text(header, "StudyInstanceUID"), text(header, "SeriesInstanceUID"))
        raise named from refusal.__cause__


def _slices(header: Dataset, path: Path | None, origin: Path | Dataset) -> list[_Found]:
    kinds.refuse_unsupported(header)
    if kinds.is_multiframe(header):
        slices = multiframe.slices_of(header, path)
        return [_Found(item, origin, len(slices)) for item in slices]
    position = numbers(header, "ImagePositionPatient", 3)
    slope, intercept = kinds.rescale(header)
    item = Slice(
        header=header,
        path=path,
        sop_class_uid=text(header, "SOPClassUID"),
        sop_instance_uid=text(header, "SOPInstanceUID"),
        frame=None,
        position=(position[0], position[1], position[2]),
        slope=slope,
        intercept=intercept,
    )
    return [_Found(item, origin, 1)]


def _one_series(found: Sequence[_Found]) -> tuple[str, str]:
    uids = {(text(f.slice.header, "StudyInstanceUID"), text(f.slice.header, "SeriesInstanceUID")) for f in found}
    if len(uids) > 1:
        raise Refused("mixed-series", f"instances of {len(uids)} series were given together: "
                      + ", ".join(sorted(series for _, series in uids)), "give one series at a time")
    return uids.pop()


def _read(
    found: Sequence[_Found], assume_units: str | None, isolated: IsolatedDecoder
) -> tuple[Volume, SeriesInfo]:
    notes: list[str] = []
    _scale([found[0].slice.header], assume_units)  # no units is the graver fault: said before a missing SeriesType
    kinds.refuse_not_a_volume([f.slice.header for f in found], lenient=assume_units is not None)
    found = _without_duplicates(found, notes, isolated)
    grid, headers = _grid(found)
    found = [found[i] for i in grid.order]
    headers = [headers[i] for i in grid.order]
    _check_count(headers)
    scale = _scale(headers, assume_units)
    slices = tuple(replace(f.slice, factor=factor) for f, factor in zip(found, scale.factors, strict=True))
    if scale.source_units and not text(headers[0], "Units") and kinds.is_pet(headers[0]):
        notes.append(f"Units missing; {scale.source_units} assumed on request")
    if kinds.is_pet(headers[0]) and any(item.intercept != 0 for item in slices):
        notes.append("RescaleIntercept is not zero, which PET does not allow [PS3.3 C.8.9.4]; it was applied")
    if text(headers[0], "PhotometricInterpretation") == "MONOCHROME1":
        notes.append("MONOCHROME1 concerns display only; values are taken as stored")
    array = _voxels([replace(f, slice=item) for f, item in zip(found, slices, strict=True)], isolated)
    volume = Volume(array, grid.spacing, grid.origin, grid.direction, scale.unit)
    first = headers[0]
    spacing = strings(first, "PixelSpacing", 2)
    cosines = strings(first, "ImageOrientationPatient", 6)
    info = SeriesInfo(
        modality=text(first, "Modality"),
        sop_class_uid=slices[0].sop_class_uid,
        study_instance_uid=text(first, "StudyInstanceUID"),
        series_instance_uid=text(first, "SeriesInstanceUID"),
        frame_of_reference_uid=text(first, "FrameOfReferenceUID"),
        slices=slices,
        unit=scale.unit,
        source_units=scale.source_units,
        vendor=kinds.vendor(first),
        pixel_spacing=(spacing[0], spacing[1]),
        orientation=(cosines[0], cosines[1], cosines[2], cosines[3], cosines[4], cosines[5]),
        notes=tuple(notes),
    )
    return volume, info


def _without_duplicates(found: Sequence[_Found], notes: list[str], isolated: IsolatedDecoder) -> list[_Found]:
    """One slice per SOP instance (and frame), then one per place, chosen without regard to the order given."""
    by_instance: dict[tuple[str, int | None], _Found] = {}
    for item in found:
        key = (item.slice.sop_instance_uid, item.slice.frame)
        known = by_instance.setdefault(key, item)
        # All frames of an instance are compared at its first one, so that it is not decoded once per frame.
        if known is item or item.slice.frame not in (None, 1):
            continue
        if not np.array_equal(_all_frames(known, isolated), _all_frames(item, isolated)):
            raise Refused("conflict", f"SOP Instance UID {key[0]} stands for two different images",
                          "find which of them is right and remove the other")
    unique = sorted(by_instance.values(), key=_rank)
    if len(unique) < len(found):
        notes.append(f"{len(found) - len(unique)} repeated instance(s) passed over")
    normal = geometry.normal_of(np.array(numbers(unique[0].slice.header, "ImageOrientationPatient", 6)))
    along = np.array([item.slice.position for item in unique]) @ normal
    order = np.argsort(along, kind="stable")  # stable: at one place the lowest rank stays first
    places: list[list[_Found]] = []
    last = -np.inf
    for i in order:
        if along[i] - last < geometry.SAME_PLACE_MM:
            places[-1].append(unique[i])
        else:
            places.append([unique[i]])
            last = along[i]
    kinds.refuse_time_slices([[item.slice.header for item in place] for place in places])
    for place in places:
        _require_same_image(sorted(place, key=_rank), isolated)
    if len(places) < len(unique):
        notes.append(f"{len(unique) - len(places)} slice(s) at a place already taken passed over")
    return [min(place, key=_rank) for place in places]


def _require_same_image(place: Sequence[_Found], isolated: IsolatedDecoder) -> None:
    """Slices at one place are repeats only where they show the same: which of two unlike ones is meant is not known."""
    if len(place) == 1:
        return
    first = _rescaled(place[0], isolated)
    for other in place[1:]:
        if not np.array_equal(first, _rescaled(other, isolated)):
            raise Refused(
                "conflict",
                f"instances {place[0].slice.sop_instance_uid} and {other.slice.sop_instance_uid} lie at the same place "
                "and show different images", "send one reconstruction per series",
            )


def _rescaled(item: _Found, isolated: IsolatedDecoder) -> NDArray[np.float64]:
    """Values (rows, columns) of one slice, in the units its header states."""
    stored = _all_frames(item, isolated)[(item.slice.frame or 1) - 1]
    return stored * item.slice.slope + item.slice.intercept


def _rank(item: _Found) -> tuple[int, str, int]:
    number = integer(item.slice.header, "InstanceNumber", default=2**31)
    return number, item.slice.sop_instance_uid, item.slice.frame or 0


def _grid(found: Sequence[_Found]) -> tuple[geometry.Stack, list[Dataset]]:
    headers = [item.slice.header for item in found]
    first = headers[0]
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation", "SOPClassUID",
                    "FrameOfReferenceUID"):
        values = {text(header, keyword) for header in headers}
        if len(values) > 1:
            raise Refused("grid", f"{keyword} differs within the series: {', '.join(sorted(values))}",
                          "send one reconstruction per series")
    for keyword, count, tolerance in (("PixelSpacing", 2, 1e-4), ("ImageOrientationPatient", 6, 1e-4)):
        usual = np.array(numbers(first, keyword, count))
        for header in headers:
            if np.abs(np.array(numbers(header, keyword, count)) - usual).max() > tolerance:
                raise Refused("grid", f"{keyword} differs within the series: {usual.tolist()} and "
                              f"{numbers(header, keyword, count)}", "send one reconstruction per series")
    spacing = numbers(first, "PixelSpacing", 2)
    depth = 0.0
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        if not depth and text(first, keyword):
            depth = abs(numbers(first, keyword, 1)[0])
    positions = np.array([item.slice.position for item in found])
    orientation = np.array(numbers(first, "ImageOrientationPatient", 6))
    return geometry.stack(positions, orientation, (spacing[0], spacing[1]), single_step_mm=depth), headers


def _check_count(headers: Sequence[Dataset]) -> None:
    """NumberOfSlices (0054,0081) [C.8.9.4.1.9] is what the scanner made; positions alone cannot see a missing end."""
    promised = integer(headers[0], "NumberOfSlices", default=0)
    if promised and promised != len(headers):
        raise Refused("slice-count", f"{len(headers)} slices are there, NumberOfSlices says {promised}",
                      "send the whole series, and one series only")


def _scale(headers: Sequence[Dataset], assume_units: str | None) -> Scale:
    if kinds.is_pet(headers[0]):
        return pet_scale(headers, assume_units=assume_units)
    return kinds.other_scale(headers)


def _voxels(found: Sequence[_Found], isolated: IsolatedDecoder) -> NDArray[np.float32]:
    """(D, H, W) float32: one file in memory at a time beside the result."""
    header = found[0].slice.header
    rows, columns = integer(header, "Rows"), integer(header, "Columns")
    if rows <= 0 or columns <= 0 or len(found) * rows * columns > MAX_VOXELS:
        raise Refused("too-large", f"{len(found)} x {rows} x {columns} voxels are none or too many", RESEND)
    for item in found:
        if item.slice.slope < 0 or not np.isfinite([item.slice.slope, item.slice.intercept]).all():
            raise Refused("rescale", f"RescaleSlope {item.slice.slope} of instance {item.slice.sop_instance_uid} is "
                          "negative or not a number", RESEND)
    array = np.empty((len(found), rows, columns), dtype=np.float32)
    scaled = np.empty((rows, columns))
    opened: tuple[object, NDArray] | None = None
    for index, item in enumerate(found):
        if opened is None or opened[0] is not item.source:
            opened = (item.source, _all_frames(item, isolated))
        stored = opened[1][(item.slice.frame or 1) - 1]
        if item.slice.slope == 0 and stored.any():
            raise Refused("rescale", f"RescaleSlope of instance {item.slice.sop_instance_uid} is zero, its stored "
                          "values are not", RESEND)
        # One float64 multiplication, rounded once to float32.
        np.multiply(stored, item.slice.slope * item.slice.factor, out=scaled)
        array[index] = scaled if item.slice.intercept == 0 else scaled + item.slice.intercept * item.slice.factor
    array.setflags(write=False)
    return array


def _all_frames(item: _Found, isolated: IsolatedDecoder) -> NDArray:
    data = item.source if isinstance(item.source, Dataset) else load(item.source, pixels=True)
    header = item.slice.header
    return frames_of(
        data,
        bits_allocated=integer(header, "BitsAllocated"),
        rows=integer(header, "Rows"),
        columns=integer(header, "Columns"),
        frames=item.frames,
        isolated=isolated,
    )
