"""The derived PET series (PS3.3 A.21): twice as many voxels along each axis over the same field of view.

Slice i of the derived series is made from the header of source slice i // 2: every attribute is copied byte for byte,
except those a function of sop.modules sets and those that describe the old grid. Stored value = value / RescaleSlope,
0..32767, the slope already rounded to a DICOM Decimal String; quantisation error below 0.002 % of the slice maximum.

Values below zero: PET allows no offset (C.8.9.4), so they are stored as zero as long as that adds no more than
`NEGATIVE_LIMIT` of the total activity, and refused beyond.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.charset import convert_encodings
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage

from deconv.volume import Volume
from sop import modules
from sop.derivation import Derivation, is_own_output
from sop.encoding import PIXEL_DATA, encoded, encoded_file_meta, pixel_data_header
from sop.errors import Refused
from sop.modules import Clock
from sop.series import SeriesInfo
from sop.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, derived_uids

__all__ = ["Derivation", "DerivedSeries", "derived_uids", "is_own_output", "write_derived"]

TOP_CODE = 32767  # the largest stored value that reads alike as signed and unsigned
NEGATIVE_LIMIT = 5e-4  # of the total activity
_SAME_PLACE_MM = 1e-3
_SMALLEST_MAXIMUM = 1e-30  # below it a slice is zero: readers in single precision would lose the slope
# C.8.9.1: what readers take from any one instance must be the same in all (rule 24).
_SERIES_LEVEL = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "PatientSize", "PatientWeight", "StudyInstanceUID",
    "StudyDate", "StudyTime", "SeriesDate", "SeriesTime", "Units", "SUVType", "SeriesType", "DecayCorrection",
    "CorrectedImage", "RadiopharmaceuticalInformationSequence", "FrameOfReferenceUID", "SpecificCharacterSet",
    "TimezoneOffsetFromUTC", "Manufacturer", "ManufacturerModelName",
)
_SERIES_LEVEL_TAGS = {keyword: int(tag_for_keyword(keyword) or 0) for keyword in _SERIES_LEVEL}
_THREADS = 2  # one writes to disk while the other encodes


@dataclass(frozen=True)
class DerivedSeries:
    """A written series: `files` and `sop_instance_uids` in increasing position along the normal."""

    series_instance_uid: str
    series_number: int
    series_description: str
    files: tuple[Path, ...]
    sop_instance_uids: tuple[str, ...]


def write_derived(
    image: Volume, source: SeriesInfo, derivation: Derivation, folder: Path, *, now: datetime
) -> DerivedSeries:
    """Write `image` (2D, 2H, 2W), in the source's unit on its doubled grid, as a PET series into `folder`.

    now     time of processing; aware or in local time.
    folder  made here; may exist if empty, or if it holds nothing but an earlier writing of this same series, which is
            replaced. The series is written beside it, every file flushed to disk, and the folder renamed: whole or
            not at all.

    Raises Refused: "not-pet", "grid", "unit", "negative-values", "series-attributes-differ"; FileExistsError for a
    folder in use.
    """
    levels = _Levels.of(image, source)
    _require_doubled_grid(image, source)
    _require_positive(levels, source)
    series_uid, sop_uids = derived_uids(source.sop_instance_uids, derivation)
    folder = Path(folder)
    names = [f"{uid}.dcm" for uid in sop_uids]
    _require_replaceable(folder, names)
    build = _Builder(image, source, derivation, Clock.at(now, str(source.first.get("TimezoneOffsetFromUTC") or "")),
                     levels, series_uid, sop_uids)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by a writer that was killed
    aside.mkdir(parents=True)
    try:
        with ThreadPoolExecutor(max_workers=_THREADS) as pool:
            for _ in pool.map(lambda parent: build.write(parent, aside, names), range(len(source.slices))):
                pass
        _flush(aside)
        _put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return DerivedSeries(
        series_uid, int(build.series.SeriesNumber), str(build.series.SeriesDescription),
        tuple(folder / name for name in names), tuple(sop_uids),
    )


@dataclass(frozen=True, eq=False)
class _Levels:
    """What the image's values span, in the source's units: maximum per slice; total, and the part below zero."""

    maxima: NDArray[np.float64]
    total: float
    negative: float

    @classmethod
    def of(cls, image: Volume, source: SeriesInfo) -> _Levels:
        if source.modality != "PT":
            raise Refused("not-pet", f"the source is {source.modality or 'of unknown modality'}, not PET",
                          "derive from a PET series", study=source.study, series=source.series)
        if image.unit != source.unit:
            raise Refused("unit", f"the image is in {image.unit!r}, its source in {source.unit!r}",
                          "hand over the deconvolved image in the unit it was read in",
                          study=source.study, series=source.series)
        if image.shape[0] != 2 * len(source.slices):
            raise Refused("grid", f"{image.shape[0]} derived slices are not twice {len(source.slices)} source slices",
                          "hand over the image on the doubled grid of its source",
                          study=source.study, series=source.series)
        factors = np.repeat(source.to_source_units, 2)
        rows = np.array([(plane.max(), plane.sum(dtype=np.float64), np.minimum(plane, 0).sum(dtype=np.float64))
                         for plane in image.array], dtype=np.float64)
        maxima, totals, negatives = (rows * factors[:, None]).T
        return cls(maxima, float(totals.sum()), float(-negatives.sum()))


def _require_positive(levels: _Levels, source: SeriesInfo) -> None:
    if levels.negative > NEGATIVE_LIMIT * max(levels.total + levels.negative, 0.0):
        raise Refused(
            "negative-values",
            f"values below zero hold {levels.negative:.4g} of {levels.total:.4g} {source.source_units} in all; storing "
            f"them as zero would add more than {100 * NEGATIVE_LIMIT:.2f} % of activity, and PET allows no offset",
            "use a method that keeps the image positive", study=source.study, series=source.series,
        )


def _require_doubled_grid(image: Volume, source: SeriesInfo) -> None:
    """The image lies where the headers of the source say the doubled grid lies, to a thousandth of a millimetre."""
    rows, columns = int(source.first.Rows), int(source.first.Columns)
    spacing = np.array([float(text) for text in source.pixel_spacing])
    across, down = np.array([float(text) for text in source.orientation]).reshape(2, 3)
    across, down = across / np.linalg.norm(across), down / np.linalg.norm(down)
    first, last = np.array(source.slices[0].position), np.array(source.slices[-1].position)
    gaps = len(source.slices) - 1
    # One slice alone has no step of its own: the image's own depth is taken.
    step = (last - first) / gaps if gaps else 2 * image.spacing[0] * image.direction[:, 0]
    here = image.position([[0, 0, 0], [2 * gaps + 1, 0, 0], [0, 2 * rows - 1, 0], [0, 0, 2 * columns - 1]])
    corner = first - 0.25 * (step + spacing[0] * down + spacing[1] * across)
    there = corner + np.array([0 * step, (gaps + 0.5) * step, (rows - 0.5) * spacing[0] * down,
                               (columns - 0.5) * spacing[1] * across])
    apart = float(np.linalg.norm(here - there, axis=1).max())
    if image.shape != (2 * gaps + 2, 2 * rows, 2 * columns) or not apart <= _SAME_PLACE_MM:
        raise Refused(
            "grid",
            f"the image of shape {image.shape} does not lie on the doubled grid of its source {gaps + 1} x {rows} x "
            f"{columns}: corners up to {apart:.4f} mm apart",
            "hand over the image on the doubled grid of its source", study=source.study, series=source.series,
        )


class _Builder:
    """Bytes of the derived instances: what the whole series shares is encoded once, a parent's copy is used twice."""

    def __init__(self, image: Volume, source: SeriesInfo, derivation: Derivation, clock: Clock, levels: _Levels,
                 series_uid: str, sop_uids: list[str]) -> None:
        self.image, self.source, self.derivation, self.clock = image, source, derivation, clock
        self.levels, self.sop_uids = levels, sop_uids
        self.factors = source.to_source_units
        self.locations = _slice_locations(source)
        first = source.first
        self.encodings = convert_encodings(first.get("SpecificCharacterSet"))
        self.series = modules.general_series(source, derivation, series_uid)
        _, rows, columns = image.shape
        bright = float(np.maximum(levels.maxima, 0).mean())
        self.common: dict[int, bytes] = {}
        for module in (
            self.series,
            modules.pet_series(source),
            modules.plane_size(first, tuple(image.spacing[1:]), float(image.spacing[0])),
            modules.image_pixel(first, rows, columns),
            modules.voi_lut(source, bright),
        ):
            self.common |= encoded(module, self.encodings)
        self.series_level = self._series_level(encoded(modules.copied(first)))

    @staticmethod
    def _series_level(elements: dict[int, bytes]) -> dict[str, bytes | None]:
        return {keyword: elements.get(tag) for keyword, tag in _SERIES_LEVEL_TAGS.items()}

    def write(self, parent: int, folder: Path, names: list[str]) -> None:
        """Both derived slices of source slice `parent`, each a file of its own in `folder`, flushed to disk."""
        header = self.source.slices[parent].header
        elements = encoded(modules.copied(header))
        self._require_same_series(elements)
        for module in (
            modules.frame_of_reference(header),
            modules.contributing_equipment(header, self.derivation, self.clock),
            modules.general_image(header, self.source, self.derivation, self.clock),
        ):
            elements |= encoded(module, self.encodings)
        elements |= self.common
        for index in (2 * parent, 2 * parent + 1):
            pixels, slope = self._stored(index)
            own = dict(elements)
            for module in self._own_modules(index, slope):
                own |= encoded(module, self.encodings)
            own[PIXEL_DATA] = pixel_data_header(pixels.nbytes) + pixels.tobytes()
            _write_flushed(folder / names[index], self._file_meta(index),
                           *(value for _, value in sorted(own.items())))

    def _require_same_series(self, elements: dict[int, bytes]) -> None:
        here = self._series_level(elements)
        differing = [keyword for keyword, value in here.items() if value != self.series_level[keyword]]
        if differing:
            raise Refused(
                "series-attributes-differ",
                f"slices of one series disagree on {', '.join(differing)}, so its SUV and identity are in doubt",
                "send the series again as the scanner wrote it", study=self.source.study, series=self.source.series,
            )

    def _own_modules(self, index: int, slope: str) -> tuple[Dataset, ...]:
        slices = self.source.slices
        parent, neighbour = index // 2, index // 2 + (1 if index % 2 else -1)
        either_side = [slices[parent]] + ([slices[neighbour]] if 0 <= neighbour < len(slices) else [])
        return (
            modules.sop_common(self.sop_uids[index]),
            modules.image_plane(self.image.position((index, 0, 0)),
                                None if self.locations is None else float(self.locations[index])),
            modules.pet_image(index + 1, slope),
            modules.common_instance_reference(self.source, either_side),
        )

    def _stored(self, index: int) -> tuple[NDArray[np.uint16], str]:
        """Stored values 0..32767 of one slice, and the Decimal String of the slope that they were divided by."""
        maximum = float(self.levels.maxima[index])
        plane = self.image.array[index]
        if maximum < _SMALLEST_MAXIMUM:
            return np.zeros(plane.shape, dtype="<u2"), "1"
        slope = modules.ds(maximum / TOP_CODE)
        scaled = plane * np.float32(self.factors[index // 2] / float(slope))
        np.rint(scaled, out=scaled)
        np.clip(scaled, 0, TOP_CODE, out=scaled)
        return scaled.astype("<u2"), slope

    def _file_meta(self, index: int) -> bytes:
        meta = Dataset()
        meta.FileMetaInformationVersion = b"\x00\x01"
        meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
        meta.MediaStorageSOPInstanceUID = self.sop_uids[index]
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
        meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
        return encoded_file_meta(meta)


def _slice_locations(source: SeriesInfo) -> NDArray[np.float64] | None:
    """SliceLocation of each derived slice, in the source's own counting; None where the source has no steady one."""
    try:
        given = np.array([float(item.header.SliceLocation) for item in source.slices])
    except (AttributeError, TypeError, ValueError):
        return None
    if len(given) < 2:
        return None
    step = (given[-1] - given[0]) / (len(given) - 1)
    if step == 0 or np.abs(given - given[0] - step * np.arange(len(given))).max() > abs(step) / 4:
        return None
    return given[0] + step * (np.arange(2 * len(given)) / 2 - 0.25)


def _require_replaceable(folder: Path, names: list[str]) -> None:
    if folder.exists():
        strangers = sorted({entry.name for entry in folder.iterdir()} - set(names))
        if strangers:
            raise FileExistsError(f"{folder} is in use: it holds {strangers[0]!r}, which is not of this derived series")


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename; an earlier writing of the same series makes way first."""
    earlier = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    aside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def _write_flushed(path: Path, *parts: bytes) -> None:
    with open(path, "xb") as file:
        file.write(b"".join(parts))
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
