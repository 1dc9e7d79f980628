"""The derived PET series (PS3.3 A.21): twice as many voxels along each axis over the same field of view.

Slice i of the derived series is made from the header of source slice i // 2: every attribute is copied byte for byte,
except those a function of sop.modules sets and those that describe the old grid. Stored value = value / RescaleSlope,
0..32767, the slope already rounded to a DICOM Decimal String; quantisation error below 0.002 % of the slice maximum.

Values below zero: PET allows no offset (C.8.9.4), so they are stored as zero as long as that adds no more than
`NEGATIVE_LIMIT` of the total activity, and refused beyond.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from deconv.volume import Volume
from sop.derivation import Derivation, is_own_output
from sop.series import SeriesInfo
from sop.uids import derived_uids

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

    Raises Refused: "grid", "unit", "negative-values", "series-attributes-differ"; FileExistsError for a folder in use.
    """
    _check(image, source)
    series_uid, sop_uids = derived_uids(source.sop_instance_uids, derivation)
    writer = _Writer(image, source, derivation, now, series_uid, sop_uids)
    names = [f"{uid}.dcm" for uid in sop_uids]
    _require_replaceable(folder, names)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        aside.chmod(0o755)
        with ThreadPoolExecutor(max_workers=2) as pool:
            jobs = [pool.submit(_write_file, aside / name, content) for name, content in zip(names, writer.slices())]
            for job in jobs:
                job.result()
        _flush_folder(aside)
        _put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return DerivedSeries(
        series_uid, writer.series_number, writer.series_description, tuple(folder / name for name in names),
        tuple(sop_uids),
    )
