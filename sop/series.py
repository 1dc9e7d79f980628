"""SeriesInfo and Slice: what is known of a series besides its voxels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydicom.dataset import Dataset

__all__ = ["SeriesInfo", "Slice"]


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice of the stack: a classic instance, or one frame of a multi-frame instance.

    header            the data set without pixel data, all else verbatim: private elements in their blocks, number and
                      time strings as they were written. For a frame: a classic-equivalent header made of the shared
                      and per-frame functional groups.
    path              file it was read from, None for a data set given in memory.
    sop_class_uid, sop_instance_uid   of the source object, for references to it.
    frame             frame number from 1 in a multi-frame source, None in a classic one.
    position          ImagePositionPatient, mm, LPS: centre of the first voxel of the slice.
    slope, intercept  rescaled = stored * slope + intercept, in the source's units (RescaleSlope, RescaleIntercept, or
                      the real world value mapping of an enhanced image).
    factor            value in the Volume = rescaled * factor; other than 1 only for Philips counts.
    """

    header: Dataset
    path: Path | None
    sop_class_uid: str
    sop_instance_uid: str
    frame: int | None
    position: tuple[float, float, float]
    slope: float
    intercept: float
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class SeriesInfo:
    """A series that is one regular grid, its slices in increasing position along the normal (row x column).

    unit              UCUM unit of the Volume: "Bq/ml", "g/ml{SUVbw}", "[hnsf'U]", "{counts}".
    source_units      Units (0054,1001) of the source, "BQML", "CNTS", "GML" ...; "HU" for CT, "" where it has none.
    vendor            "GE", "SIEMENS", "PHILIPS", or Manufacturer in capitals.
    pixel_spacing     PixelSpacing as written: row spacing, column spacing.
    orientation       ImageOrientationPatient as written: row direction, then column direction.
    notes             sentences about what was put right or passed over: duplicates, a nonzero intercept.
    """

    modality: str
    sop_class_uid: str
    study_instance_uid: str
    series_instance_uid: str
    frame_of_reference_uid: str
    slices: tuple[Slice, ...]
    unit: str
    source_units: str
    vendor: str
    pixel_spacing: tuple[str, str]
    orientation: tuple[str, str, str, str, str, str]
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Dataset:
        """Header of the first slice."""
        return self.slices[0].header

    @property
    def study(self) -> str:
        """StudyInstanceUID."""
        return self.study_instance_uid

    @property
    def series(self) -> str:
        """SeriesInstanceUID."""
        return self.series_instance_uid

    @property
    def sop_instance_uids(self) -> tuple[str, ...]:
        """SOP Instance UID of each slice, in slice order; one UID repeated for the frames of one instance."""
        return tuple(item.sop_instance_uid for item in self.slices)

    @property
    def to_source_units(self) -> tuple[float, ...]:
        """Per slice: the number a Volume value is multiplied by to be in `source_units` again."""
        return tuple(1.0 / item.factor for item in self.slices)
