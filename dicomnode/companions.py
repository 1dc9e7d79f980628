"""What goes out beside a derived series where its route says so (`also`): report, kernel, pictures.

    derived/JOB/also/KIND-N.dcm     the objects (sop.report, sop.mapping, sop.kernel, sop.picture)
    report.json, "also"             wanted: what the route asked for
                                    series: kind, of (the word in `also`), series_uid, series_number, description,
                                            modality, instances, files (name -> SHA-256)
                                    left_out: kind -> why it could not be made

They are made when the derived series is whole and checked, and are no part of it: neither its identity nor its bytes
depend on them. A kind that cannot be made is left out whole, with the reason; the derived series goes out without it.
What is made is delivered with the series: a job is delivered when peers have confirmed both. Importing this loads
neither highdicom nor matplotlib.
"""

from __future__ import annotations

import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deconv.result import Deconvolution
    from dicomnode.looks import Looks
    from sop.companion import CompanionSeries, Origin
    from sop.derivation import Derivation
    from sop.pet import DerivedSeries
    from sop.series import SeriesInfo

__all__ = ["ALSO_FOLDER", "changed", "instances", "make", "names", "series_uids", "wanted", "whole"]

ALSO_FOLDER = "also"
MODALITIES = {"report": "SR", "mapping": "RWV", "kernel": "OT", "pictures": "OT"}
Json = dict[str, Any]
Made = list[tuple[str, list[bytes]]]  # (kind, its files)


# --- what a job's report tells of them


def wanted(report: Mapping[str, Any] | None, also: Sequence[str] | None) -> list[Json]:
    """The companion series of a job's report that its route still asks for; None: there is no such route, so all."""
    made: list[Json] = ((report or {}).get("also") or {}).get("series", [])
    return [one for one in made if also is None or one["of"] in also]


def instances(series: Sequence[Mapping[str, Any]]) -> int:
    """How many objects these series are."""
    return sum(int(one["instances"]) for one in series)


def names(series: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Names of their files below `ALSO_FOLDER`."""
    return frozenset(name for one in series for name in one["files"])


def series_uids(report: Mapping[str, Any] | None) -> list[str]:
    """SeriesInstanceUID of every companion series that was made."""
    return [str(one["series_uid"]) for one in wanted(report, None)]


def whole(folder: Path, report: Mapping[str, Any]) -> bool:
    """Whether the companions lie in a derived folder as they were made, none fewer and none else.

    False too for a report.json that the disk has damaged, so that what it tells cannot be understood.
    """
    try:
        files = {name: digest for one in wanted(report, None) for name, digest in one["files"].items()}
    except (AttributeError, KeyError, TypeError):
        return False
    there = {path.name: path for path in (folder / ALSO_FOLDER).glob("*.dcm")}
    return files.keys() == there.keys() and all(_digest(there[name]) == digest for name, digest in files.items())


def changed(old: Mapping[str, Any] | None, new: Mapping[str, Any]) -> bool:
    """Whether a companion series of both reports has other bytes in the new one, under the same UIDs."""
    before = {one["series_uid"]: one["files"] for one in wanted(old, None)}
    return any(one["files"] != before.get(one["series_uid"], one["files"]) for one in wanted(new, None))


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


# --- making them


def make(also: Sequence[str], folder: Path, *, source: SeriesInfo, derived: DerivedSeries, derivation: Derivation,
         result: Deconvolution, report: Mapping[str, Any], now: datetime) -> Json:
    """Write what `also` names into `folder`/also, and tell what was made: report["also"].

    folder   holds the derived series, whole and checked, and looks.npz where pictures of it could be made.
    report   the job's report so far: method, preset, settings, device, gates, looks.

    Raises nothing: what cannot be made is left out with the reason, its traceback on standard error.
    """
    from sop.companion import Origin

    aside = folder / f"{ALSO_FOLDER}.tmp"
    series: list[Json] = []
    left_out: dict[str, str] = {}
    for of in also:
        made: list[Json] = []
        try:
            origin = Origin.of(source, derived, derivation, now=now)
            for kind, objects in MAKERS[of](origin, result, folder, report):
                made.append(_written(of, kind, objects, origin, aside))
            series += made
        except _NotThere as reason:
            left_out[of] = str(reason)
        except Exception as error:  # whatever it is: the derived series is whole and must not wait for this
            traceback.print_exc()
            left_out[of] = f"{type(error).__name__}: {error}"[:300]
    _put_in_place(aside, folder / ALSO_FOLDER, series, left_out)
    return {"wanted": list(also), "series": series, "left_out": left_out}


class _NotThere(Exception):
    """What a companion would show does not exist; nothing is wrong."""


def _written(of: str, kind: str, objects: Sequence[bytes], origin: Origin, aside: Path) -> Json:
    aside.mkdir(exist_ok=True)
    described = origin.series(kind)
    files = {}
    for number, content in enumerate(objects, start=1):
        name = f"{kind}-{number}.dcm"
        (aside / name).write_bytes(content)
        files[name] = sha256(content).hexdigest()
    return {"kind": kind, "of": of, "series_uid": described.series_instance_uid,
            "series_number": described.series_number, "description": described.series_description,
            "modality": MODALITIES[kind], "instances": len(files), "files": files}


def _put_in_place(aside: Path, target: Path, series: list[Json], left_out: dict[str, str]) -> None:
    """All that was made whole, at once; where that fails there is none. Files of what was left out half-way go."""
    keep = names(series)
    try:
        for path in aside.glob("*.dcm"):
            if path.name not in keep:
                path.unlink()
        if series:
            os.replace(aside, target)
    except OSError as error:
        left_out.update({one["of"]: f"cannot be kept: {error}" for one in series})
        series.clear()
    shutil.rmtree(aside, ignore_errors=True)


def _looks(folder: Path) -> Looks:
    from dicomnode.looks import LOOKS_FILE, load

    try:
        return load(folder / LOOKS_FILE)
    except FileNotFoundError as error:
        raise _NotThere("the figures and pictures of the result could not be made") from error


def _report(origin: Origin, result: Deconvolution, folder: Path, report: Mapping[str, Any]) -> Made:
    """The measurement report, and the mapping to SUV where the headers lead to one."""
    from sop.errors import Refused
    from sop.mapping import mapping_object
    from sop.report import report_object

    told = {**report, "looks": _looks(folder).measures}
    made: Made = []
    mapping: CompanionSeries | None = origin.series("mapping")
    try:
        made.append(("mapping", [mapping_object(origin, origin.series("mapping"))]))
    except Refused:
        mapping = None  # there is no SUV: the report says it by its unit
    return [*made, ("report", [report_object(told, origin, origin.series("report"), mapping=mapping)])]


def _kernel(origin: Origin, result: Deconvolution, folder: Path, report: Mapping[str, Any]) -> Made:
    from sop.kernel import kernel_object

    if result.kernel is None:
        raise _NotThere(f"{result.method} has no kernel")
    d, h, w = (float(width) for width in result.kernel_spacing)
    return [("kernel", [kernel_object(result.kernel, (d, h, w), origin, origin.series("kernel"))])]


def _pictures(origin: Origin, result: Deconvolution, folder: Path, report: Mapping[str, Any]) -> Made:
    from dicomnode.qcpictures import FOOTER, draw
    from sop.picture import picture_objects

    derived = origin.derived
    heading = (f"{derived.series_description}, series {derived.series_number}: {report['method']}, preset "
               f"{report['preset']}, dicomnode {origin.derivation.software_version}")
    drawn = [(one.title, one.rgb) for one in draw(
        _looks(folder), heading, footer=FOOTER if origin.derivation.research_use else "")]
    return [("pictures", picture_objects(drawn, origin, origin.series("pictures")))]


MAKERS = {"report": _report, "kernel": _kernel, "pictures": _pictures}
