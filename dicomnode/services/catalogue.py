"""What we hold and may hand out: received series whose files are there, derived series that passed their check.

Answers come from the ledger, over a connection of its own, so that looking never waits for reception; what the ledger
does not know is read from one header per series and remembered.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from dicomnode.companions import ALSO_FOLDER
from dicomnode.headers import UNREADABLE, values
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.scu import StoredObject
from dicomnode.services.findscp import HEADER_KEYS, Entity, Query, matches
from dicomnode.spool import Spool
from sop.bounded import BoundedFile

__all__ = ["HEADERS_KEPT", "Catalogue", "Series"]

HEADERS_KEPT = 10_000  # about 1 kB each
PASSED = ("built", "sending", "delivered", "committed")  # states of a job whose series may be seen
KEPT = tuple(key for level in ("PATIENT", "STUDY", "SERIES") for key in HEADER_KEYS[level])
_COUNTS = tuple(f"NumberOf{level}RelatedInstances" for level in ("Patient", "Study", "Series"))
T = TypeVar("T")
log = get_logger("catalogue")

_SERIES = """
SELECT study_uid, series_uid, modality, accession_number, series_number, series_description, instances,
       first_at AS at, NULL AS folder, '' AS kind, purged_at
  FROM series WHERE (purged_at IS NULL OR last_at > purged_at) {where}
UNION ALL
SELECT study_uid, derived_series_uid, 'PT', '', '', '', derived_instances, built_at, derived_path, '', NULL
  FROM job WHERE state IN {states} AND derived_series_uid IS NOT NULL AND derived_path IS NOT NULL
   AND purged_at IS NULL {derived_where}
"""
# What lies beside derived series is told by the reports of their jobs (companions.py): long, and without an index.
_BESIDE = """
SELECT study_uid, beside.value ->> 'series_uid' AS series_uid, beside.value ->> 'modality' AS modality,
       '' AS accession_number, '' AS series_number, '' AS series_description,
       beside.value ->> 'instances' AS instances, built_at AS at, derived_path AS folder,
       beside.value ->> 'kind' AS kind, NULL AS purged_at
  FROM job, json_each(report, '$.also.series') AS beside
 WHERE state IN {states} AND derived_path IS NOT NULL AND purged_at IS NULL {where}
"""
_TELLS = """ AND EXISTS (SELECT 1 FROM json_each(:series) AS wanted WHERE instr(report, wanted.value))
 AND beside.value ->> 'series_uid' IN (SELECT value FROM json_each(:series))"""


@dataclass(frozen=True)
class Series:
    """One series that we hold.

    folder   relative, where it is a derived one.
    kind     of what lies beside a derived series (companions.py); "" for all else.
    """

    study_uid: str
    series_uid: str
    modality: str
    accession_number: str
    series_number: str
    series_description: str
    instances: int
    folder: str | None
    kind: str = ""


class Catalogue:
    """Used by many threads at once. `ledger`: one that nobody writes to, so that looking waits for no commit."""

    def __init__(self, spool: Spool, ledger: Ledger) -> None:
        self._spool, self._ledger = spool, ledger
        self._headers: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, query: Query, *, stopped: Callable[[], bool] = lambda: False,
             on_read: Callable[[], None] = lambda: None) -> Iterator[Entity]:
        """The entities of the query's level that match, newest first; `stopped` is asked before each one looked at.

        `on_read` is called before each header that is not remembered: what it raises ends the query.
        """
        series = self.series(study_uids=query.uids("STUDY"), series_uids=query.uids("SERIES"),
                             accession_numbers=query.exact("AccessionNumber"))
        for entity in self._entities(query.level, series, on_read):
            if stopped():
                return
            if matches(query, entity):
                yield entity

    def objects_of(self, query: Query) -> list[StoredObject]:
        """What a C-MOVE or C-GET asks for, each instance once."""
        series = self.series(study_uids=query.uids("STUDY"), series_uids=query.uids("SERIES"))
        patients, wanted = frozenset(query.uids("PATIENT")), frozenset(query.uids("IMAGE"))
        found: dict[str, StoredObject] = {}
        for study in _grouped(series, lambda one: one.study_uid):
            if patients and not patients & set(self.entity(study)("PatientID")):
                continue
            for stored in (stored for one in study for stored in self.objects(one)):
                if not wanted or stored.sop_instance_uid in wanted:
                    found.setdefault(stored.sop_instance_uid, stored)
        return list(found.values())

    def series(self, *, study_uids: Sequence[str] = (), series_uids: Sequence[str] = (),
               accession_numbers: Sequence[str] = ()) -> list[Series]:
        """All series, or those of the given studies and UIDs; newest first, no UID twice (ours before a copy of it).

        accession_numbers   of studies of which we received a series with one of them.
        """
        where = derived_where = beside_where = ""
        parameters: dict[str, str] = {}
        for name, column, derived, beside, uids in (
                ("studies", "study_uid", "study_uid", " AND study_uid IN (SELECT value FROM json_each(:studies))",
                 study_uids), ("series", "series_uid", "derived_series_uid", _TELLS, series_uids)):
            if uids:
                where += f" AND {column} IN (SELECT value FROM json_each(:{name}))"
                derived_where += f" AND {derived} IN (SELECT value FROM json_each(:{name}))"
                beside_where += beside
                parameters[name] = json.dumps(list(uids))
        if accession_numbers:
            of_studies = (" AND study_uid IN (SELECT study_uid FROM series WHERE accession_number IN "
                          "(SELECT value FROM json_each(:accessions)))")
            where, derived_where = where + of_studies, derived_where + of_studies
            beside_where += of_studies
            parameters["accessions"] = json.dumps(list(accession_numbers))
        rows = self._ledger.query(_SERIES.format(where=where, derived_where=derived_where, states=PASSED), parameters)
        known = {row["series_uid"] for row in rows if row["purged_at"] is None}
        if not series_uids or not known.issuperset(series_uids):
            rows += self._ledger.query(_BESIDE.format(where=beside_where, states=PASSED), parameters)
        rows.sort(key=lambda row: (-(row["at"] or 0.0), row["series_uid"]))
        found: dict[str, Series] = {}
        for row in rows:
            one = Series(**{field.name: row[field.name] for field in fields(Series)})
            if row["purged_at"] is not None and not self.objects(one):
                continue  # some came after its files were removed, or so says a clock that was set back
            if one.series_uid not in found or one.folder is not None:
                found[one.series_uid] = one
        return list(found.values())

    def objects(self, series: Series) -> list[StoredObject]:
        """The instances of a series, in the order in which they came or lie."""
        if series.folder is not None:
            return [stored for path in sorted(self._paths(series)) if (stored := _stored(path)) is not None]
        rows = self._ledger.query("SELECT sop_class_uid, sop_instance_uid, transfer_syntax_uid, path FROM instance "
                                  "WHERE series_uid = ? ORDER BY received_at, sop_instance_uid", (series.series_uid,))
        found = [StoredObject(row["sop_class_uid"], row["sop_instance_uid"], row["transfer_syntax_uid"],
                              self._spool.absolute(row["path"])) for row in rows]
        return [stored for stored in found if stored.path.is_file()] if self._was_purged(series) else found

    def _paths(self, series: Series) -> Iterator[Path]:
        folder = self._spool.absolute(series.folder or "")
        return folder.glob(f"{ALSO_FOLDER}/{series.kind}-*.dcm" if series.kind else "*.dcm")

    def _was_purged(self, series: Series) -> bool:
        """Its files were removed once ([retention]): only those that came since are there."""
        return bool(self._ledger.query("SELECT 1 FROM event WHERE series_uid = ? AND kind = 'series' "
                                       "AND code = 'purged' LIMIT 1", (series.series_uid,)))

    def _count(self, series: Series) -> int:
        return len(self.objects(series)) if series.folder is None and self._was_purged(series) else series.instances

    # --- entities

    def _entities(self, level: str, series: list[Series], on_read: Callable[[], None]) -> Iterator[Entity]:
        if level == "SERIES":
            yield from (self.entity((one,), on_read=on_read) for one in series)
        elif level == "IMAGE":
            yield from (self.entity((one,), stored, on_read=on_read) for one in series for stored in self.objects(one))
        else:
            studies = _grouped(series, lambda one: one.study_uid)
            if level == "PATIENT":
                patients = _grouped(studies, lambda study: "".join(self.entity(study, on_read=on_read)("PatientID")))
                studies = [tuple(one for study in patient for one in study) for patient in patients]
            yield from (self.entity(study, on_read=on_read) for study in studies)

    def entity(self, series: tuple[Series, ...], stored: StoredObject | None = None, *,
               on_read: Callable[[], None] = lambda: None) -> Entity:
        """A patient, study or series (of these series) or an instance, as a function from keyword to values."""
        first = next((one for one in series if one.folder is None), series[0])
        known: dict[str, tuple[str, ...]] = {
            "StudyInstanceUID": (first.study_uid,), "SeriesInstanceUID": (first.series_uid,),
            "ModalitiesInStudy": tuple(sorted({one.modality for one in series if one.modality})),
            "NumberOfPatientRelatedStudies": (str(len({one.study_uid for one in series})),),
        }
        for level in ("Patient", "Study"):
            known[f"NumberOf{level}RelatedSeries"] = (str(len(series)),)
        if first.folder is None:
            known |= {"Modality": _one(first.modality), "AccessionNumber": _one(first.accession_number),
                      "SeriesNumber": _one(first.series_number), "SeriesDescription": _one(first.series_description)}
        if stored is not None:
            known |= {"SOPInstanceUID": (stored.sop_instance_uid,), "SOPClassUID": (stored.sop_class_uid,),
                      "AvailableTransferSyntaxUID": (stored.transfer_syntax_uid,)}

        def value(keyword: str) -> tuple[str, ...]:
            have = known.get(keyword)
            if have is not None:
                return have
            if keyword in _COUNTS:
                known[keyword] = (str(sum(map(self._count, series))),)
            elif keyword in HEADER_KEYS["IMAGE"]:
                on_read()
                known.update(_read(None if stored is None else stored.path, HEADER_KEYS["IMAGE"]))
            else:
                known.update({key: have for key, have in self._header(first, on_read).items()
                              if key not in known})
            return known.setdefault(keyword, ())

        return value

    def _header(self, series: Series, on_read: Callable[[], None]) -> dict[str, tuple[str, ...]]:
        with self._lock:
            kept = self._headers.get(series.series_uid)
            if kept is not None:
                self._headers.move_to_end(series.series_uid)
        if kept is not None:
            return {key: tuple(have) for key, have in json.loads(kept).items()}
        on_read()
        read = _read(self._any_file(series), KEPT)
        if read:
            with self._lock:
                self._headers[series.series_uid] = json.dumps({key: have for key, have in read.items() if have},
                                                              ensure_ascii=False).encode()
                while len(self._headers) > HEADERS_KEPT:
                    self._headers.popitem(last=False)
        return read

    def _any_file(self, series: Series) -> Path | None:
        if series.folder is not None:
            return next(self._paths(series), None)
        rows = self._ledger.query("SELECT path FROM instance WHERE series_uid = ? LIMIT 1", (series.series_uid,))
        return self._spool.absolute(rows[0]["path"]) if rows else None


def _grouped(things: Iterable[T], name: Callable[[T], str]) -> list[tuple[T, ...]]:
    """In order of the first of each group."""
    groups: dict[str, list[T]] = {}
    for thing in things:
        groups.setdefault(name(thing), []).append(thing)
    return [tuple(group) for group in groups.values()]


def _one(text: str) -> tuple[str, ...]:
    return (text,) if text else ()


def _read(path: Path | None, keywords: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The values of `keywords` in a file's header; {} where it cannot be read (it is then asked for again)."""
    if path is None:
        return {}
    wanted = [*keywords]
    try:
        with BoundedFile(path) as file:
            header = dcmread(file, stop_before_pixels=True, specific_tags=[*wanted, "SpecificCharacterSet"])
    except (OSError, InvalidDicomError, RecursionError, *UNREADABLE) as error:
        log.warning("A stored object cannot be read for a query.", action="header_unreadable", file=path.name,
                    error=type(error).__name__)
        return {}
    return {keyword: values(header, keyword) for keyword in wanted}


def _stored(path: Path) -> StoredObject | None:
    try:
        return StoredObject.read(path)
    except (OSError, InvalidDicomError, RecursionError, *UNREADABLE):
        return None  # it vanished: purged or cancelled meanwhile
