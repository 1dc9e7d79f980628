"""DICOM folder to DICOM folder without a node: the PET and its CT are chosen by the same rules as in the node."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from dicomnode import __version__
from dicomnode.config import Derived
from dicomnode.errors import ConfigError, NotFound, RefusedInput
from dicomnode.matching import (
    Arrival,
    Eligibility,
    arrival_of,
    choose_guide,
    completeness,
    eligible,
    geometry_of,
    normal_of,
)
from sop.pet import is_own_output

if TYPE_CHECKING:
    from deconv import OnStep
    from dicomnode.pipeline import Outcome

__all__ = ["Choice", "Found", "choose", "deblur", "find_series", "require_empty", "series_files", "source_files"]

CANNOT_READ = (InvalidDicomError, EOFError, ValueError, KeyError, NotImplementedError)


@dataclass(frozen=True, eq=False)
class Found:
    """One series that lies in a folder; `header` is that of its middle file, without pixels."""

    uid: str
    study_uid: str
    header: Dataset
    files: tuple[Path, ...]
    arrivals: tuple[Arrival, ...]
    verdict: Eligibility


@dataclass(frozen=True, eq=False)
class Choice:
    """What will be deblurred, guided by which CT (or none), and why."""

    pet: Found
    guide: Found | None
    reason: str


def find_series(folder: Path) -> list[Found]:
    """Every DICOM series at or below `folder`, by UID; other files are passed over. Raises NotFound for none."""
    if not folder.exists():
        raise NotFound(f"{folder} does not exist")
    by_series: dict[str, list[tuple[Path, Dataset]]] = {}
    for path, header in _headers(folder):
        by_series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    if not by_series:
        raise NotFound(f"no DICOM object lies in {folder}")
    return [_found(uid, members) for uid, members in sorted(by_series.items())]


def series_files(folder: Path, series_uid: str | None = None) -> list[Path]:
    """The files of the one series in `folder`. Raises RefusedInput where several are there and none is named."""
    found = find_series(folder)
    if series_uid is None and len(found) == 1:
        return list(found[0].files)
    for one in found:
        if one.uid == series_uid:
            return list(one.files)
    raise RefusedInput(f"{folder} holds {len(found)} series: {'; '.join(map(_label, found))}. Remedy: give a folder "
                       "that holds one.")


def source_files(folder: Path, derived: Path) -> list[Path]:
    """The files in `folder` of the series that the derived one says it comes from. Raises RefusedInput."""
    header = dcmread(series_files(derived)[0], stop_before_pixels=True)
    referenced = [str(item.get("SeriesInstanceUID", "")) for item in header.get("ReferencedSeriesSequence") or ()]
    found = find_series(folder)
    for one in found:
        if one.uid in referenced:
            return list(one.files)
    raise RefusedInput(f"{derived} is derived from series {', '.join(referenced) or '(it does not say)'}; {folder} "
                       f"holds {'; '.join(map(_label, found))}. Remedy: name the folder of its source.")


def choose(found: Sequence[Found], *, series_uid: str | None = None, assume_units: bool = False) -> Choice:
    """The eligible PET and the CT that guides it. Raises RefusedInput with every series and the reason against it."""
    pet = _the_pet(found, series_uid, assume_units)
    if not assume_units:  # what a person vouches for is judged by the reader alone
        whole = completeness(pet.arrivals, pet.header, now=0.0, quiet_s=0.0, give_up_h=0.0)
        if whole.state != "complete":
            reason = whole.reason.partition("; nothing new for")[0]  # on disk nothing is waited for
            raise RefusedInput(f"{_label(pet)}: {reason}. Remedy: put the whole series into the folder.")
    axis = next((normal_of(arrival.orientation) for arrival in pet.arrivals if arrival.orientation), None)
    guides = {one.uid: one for one in found if one.verdict.kind == "guide"}
    choice = choose_guide(geometry_of(pet.arrivals, pet.header),
                          [geometry_of(one.arrivals, one.header, normal=axis) for one in guides.values()])
    return Choice(pet, guides[choice.series_uid] if choice.series_uid else None, choice.reason)


def require_empty(folder: Path) -> None:
    """Raises ConfigError where `folder` is neither new nor empty: a derived series lies alone in its folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder. Remedy: name a new one.")


def deblur(
    choice: Choice, out_dir: Path, *, found: Sequence[Found], method: str, preset: str, overrides: Mapping[str, Any],
    device: str, threads: int, now: datetime, assume_units: str | None = None, on_step: OnStep | None = None,
    checkpoints: Path | None = None,
) -> Outcome:
    """Derive, check and put the series into `out_dir`, whole or not at all.

    found        all series of the study: their numbers are taken.
    checkpoints  folder from which the same command goes on after a crash; emptied once the series lies in `out_dir`.

    Raises ConfigError for settings the method does not have, sop.Refused for an input or a result that must not leave.
    """
    import deconv
    from dicomnode.pipeline import process

    require_empty(out_dir)
    try:
        deconv.method(method).settings(preset, **overrides)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {method}, preset {preset}: {error}") from error
    defaults = Derived()
    naming = {
        "software_version": __version__, "series_description": defaults.series_description,
        "series_number_offset": defaults.series_number_offset, "research_use": defaults.research_use,
        "taken_series_numbers": [number for one in found if one.study_uid == choice.pet.study_uid
                                 for number in _series_number(one)],
    }
    aside = out_dir.with_name(f".{out_dir.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        outcome = process(choice.pet.files, choice.guide.files if choice.guide else (), aside, method=method,
                          preset=preset, overrides=overrides, device=device, threads=threads, naming=naming, now=now,
                          on_step=on_step, assume_units=assume_units, checkpoints=checkpoints)
        os.replace(aside, out_dir)
        if checkpoints is not None:
            _forget(checkpoints)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return outcome


def _forget(checkpoints: Path) -> None:
    from deconv.checkpoint import Checkpoints

    Checkpoints(checkpoints).clear()


def _headers(folder: Path) -> Iterator[tuple[Path, Dataset]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    for path in paths:
        try:
            header = dcmread(path, stop_before_pixels=True)
        except CANNOT_READ:
            continue  # not DICOM, or damaged: a missing slice shows in the geometry
        if "SOPInstanceUID" in header:
            yield path, header


def _found(uid: str, members: list[tuple[Path, Dataset]]) -> Found:
    header = members[len(members) // 2][1]
    return Found(
        uid=uid, study_uid=str(header.get("StudyInstanceUID", "")), header=header,
        files=tuple(path for path, _ in members),
        arrivals=tuple(arrival_of(one, received_at=0.0) for _, one in members),
        verdict=eligible(header, own_output=is_own_output(header)),
    )


def _the_pet(found: Sequence[Found], series_uid: str | None, assume_units: bool) -> Found:
    pets = [one for one in found if one.verdict.kind == "pet"]
    if assume_units and not pets:
        pets = [one for one in found if str(one.header.get("Modality", "")) == "PT" and one.verdict.kind == "refused"]
    if series_uid is not None:
        named = [one for one in found if one.uid == series_uid]
        if not named:
            raise NotFound(f"no series {series_uid} lies there; there are {'; '.join(map(_label, found))}")
        pets = [one for one in pets if one.uid == series_uid]
        found = named
    if len(pets) == 1:
        return pets[0]
    if pets:
        raise RefusedInput(f"{len(pets)} PET series could be deblurred: {'; '.join(map(_label, pets))}. "
                           "Remedy: choose one with --series.")
    reasons = "; ".join(f"{_label(one)}: {one.verdict.reason}"
                        + (f" (remedy: {one.verdict.remedy})" if one.verdict.remedy else "") for one in found)
    raise RefusedInput(f"no PET series that can be deblurred: {reasons}")


def _series_number(one: Found) -> list[int]:
    text = str(one.header.get("SeriesNumber", "") or "").strip()
    return [int(text)] if text.isdecimal() else []


def _label(one: Found) -> str:
    return f"{one.header.get('Modality', '')} series {one.uid} ({len(one.files)} files)"
