"""Finding studies: by UID or accession number, day of arrival and state; newest first, page by page.

A study is shown by the one of its series that says most of it: the PET that a person should look at first. Pages are
cut by a cursor, the place of the last row, so that what comes in meanwhile shifts nothing. Every condition is answered
by an index of the ledger; 10,000 studies cost milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from dicomnode.errors import RefusedInput
from dicomnode.ledger import SQL, Ledger
from dicomnode.states import JOB_STATES, SERIES_STATES
from dicomnode.views import progress_of

__all__ = ["FIRST", "LARGEST", "STATES", "Page", "StudyRow", "studies"]

LARGEST = 500  # rows of a page
MANY = 1000  # jobs of a state from which on their studies are found on the way, not all of them beforehand
STATES = tuple(dict.fromkeys((*JOB_STATES, *SERIES_STATES)))
#: Of several PET series the one to look at first: what waits for a person, what goes on, what is over.
FIRST = ("held", "failed", "running", "sending", "built", "queued", "complete", "waiting", "receiving", "matched",
         "cancelled", "delivered", "committed", "superseded", "ignored")
LAST = chr(0x10FFFF)  # sorts after everything that begins alike


@dataclass(frozen=True)
class StudyRow:
    """One study. `series`, `state`, `code`, `reason`, `job` and what follows are of the series that stands for it.

    received_at, last_at   unix seconds: the first instance of the study, and its last.
    series_count, instances   of the whole study;  pets: its PET series.
    """

    study: str
    accession_number: str
    received_at: float
    last_at: float
    series_count: int
    pets: int
    instances: int
    calling_ae: str
    series: str
    modality: str
    description: str
    state: str
    code: str
    reason: str
    until: float | None
    job: int | None
    route: str
    method: str
    preset: str
    progress: dict[str, Any] | None
    derived_series: str
    finished_at: float | None


@dataclass(frozen=True)
class Page:
    """Some studies, and where the next page begins: `before` of the next call; None: there are no more."""

    rows: tuple[StudyRow, ...]
    next: str | None


def studies(ledger: Ledger, *, text: str = "", state: str = "", first: date | None = None, last: date | None = None,
            limit: int = 50, before: str | None = None, timezone: str = "UTC") -> Page:
    """The studies that fit, newest first by the arrival of their first instance.

    text    how a Study, Series or derived Series Instance UID or an accession number begins, or "job:12".
    state   of the series that stands for the study: one of STATES.
    first, last   days of arrival in `timezone`, both included.
    before  Page.next of the page before.
    Raises RefusedInput where `state` or `before` are not such.
    """
    if state and state not in STATES:
        raise RefusedInput(f"there is no state {state!r}. Remedy: one of {', '.join(STATES)}.")
    common = bool(state) and ledger.query(_COUNT, (state, MANY))[0]["n"] == MANY
    where, values = _conditions(text.strip(), state, common, _begin(first, timezone), _begin(_next_day(last), timezone))
    limit = max(1, min(limit, LARGEST))
    at, series_uid = _place(before)
    rows: list[StudyRow] = []
    while True:
        # One more than asked for tells whether there is a next page.
        found = ledger.query(_SELECT.format(where=where), values | {"at": at, "uid": series_uid, "limit": limit + 1})
        shown = {row.study: row for row in _rows(ledger, [one["study_uid"] for one in found])}
        for one in found:
            row = shown[one["study_uid"]]
            if state and row.state != state:
                continue  # another series of it has that state, and this one says more
            if len(rows) == limit:
                return Page(tuple(rows), f"{at!r}~{series_uid}")
            rows.append(row)
            at, series_uid = one["first_at"], one["series_uid"]
        if len(found) <= limit:
            return Page(tuple(rows), None)
        at, series_uid = found[-1]["first_at"], found[-1]["series_uid"]


# The first series of each study stands for its arrival, along the index series_newest.
_SELECT = """
SELECT s.study_uid, s.first_at, s.series_uid FROM series s
 WHERE (s.first_at < :at OR (s.first_at = :at AND s.series_uid > :uid)) {where}
   AND NOT EXISTS (SELECT 1 FROM series o WHERE o.study_uid = s.study_uid
                   AND (o.first_at < s.first_at OR (o.first_at = s.first_at AND o.series_uid > s.series_uid)))
 ORDER BY s.first_at DESC, s.series_uid LIMIT :limit"""
_TEXT = """AND s.study_uid IN (
    SELECT study_uid FROM series WHERE study_uid >= :text AND study_uid < :beyond
    UNION SELECT study_uid FROM series WHERE series_uid >= :text AND series_uid < :beyond
    UNION SELECT study_uid FROM series WHERE accession_number >= :text AND accession_number < :beyond
    UNION SELECT study_uid FROM job WHERE derived_series_uid >= :text AND derived_series_uid < :beyond)"""
# Those of which a series that may stand for them has that state; nearly all are then shown with it.
_STATE = """AND s.study_uid IN (
    SELECT x.study_uid FROM series x WHERE x.state = :state
       AND (x.state = 'held' OR NOT EXISTS (SELECT 1 FROM job WHERE job.series_uid = x.series_uid))
       AND (x.modality = 'PT' OR NOT EXISTS (
            SELECT 1 FROM series p WHERE p.study_uid = x.study_uid AND p.modality = 'PT'))
    UNION
    SELECT j.study_uid FROM job j WHERE j.state = :state
       AND j.id = (SELECT max(id) FROM job WHERE job.series_uid = j.series_uid))"""
# The same for a state of very many jobs (all that was ever delivered): asked of each study on the way along the index
# of arrivals, which ends when the page is full. The plus keeps sqlite from the index of states.
_COMMON_STATE = """AND EXISTS (
    SELECT 1 FROM series x WHERE x.study_uid = s.study_uid AND (
        (+x.state = :state
         AND (+x.state = 'held' OR NOT EXISTS (SELECT 1 FROM job WHERE job.series_uid = x.series_uid))
         AND (x.modality = 'PT' OR NOT EXISTS (
              SELECT 1 FROM series p WHERE p.study_uid = x.study_uid AND p.modality = 'PT')))
        OR :state = (SELECT state FROM job WHERE job.id = (
              SELECT max(id) FROM job WHERE job.series_uid = x.series_uid))))"""
_COUNT = "SELECT count(*) AS n FROM (SELECT 1 FROM job WHERE state = ? LIMIT ?)"


def _conditions(text: str, state: str, common: bool, begin: float | None,
                end: float | None) -> tuple[str, dict[str, Any]]:
    parts, values = [], {"text": text, "beyond": text + LAST, "state": state, "begin": begin, "end": end, "job": 0}
    number = text.removeprefix("job:")
    if text.startswith("job:") and number.isdecimal() and len(number) < 19:
        parts.append("AND s.study_uid IN (SELECT study_uid FROM job WHERE id = :job)")
        values["job"] = int(number)
    elif text:
        parts.append(_TEXT)
    parts += [_COMMON_STATE if common else _STATE] if state else []
    parts += ["AND s.first_at >= :begin"] if begin is not None else []
    parts += ["AND s.first_at < :end"] if end is not None else []
    return " ".join(parts), values


def _rows(ledger: Ledger, study_uids: list[str]) -> Iterator[StudyRow]:
    of = "(SELECT * FROM series WHERE study_uid IN (SELECT value FROM json_each(:studies)))"
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ledger.query(SQL["overview"].format(series=of), {"studies": json.dumps(study_uids), "limit": -1}):
        found.setdefault(row["study_uid"], []).append(dict(row))
    for study_uid, series in found.items():
        yield _row(study_uid, series)


def _row(study_uid: str, series: list[dict[str, Any]]) -> StudyRow:
    shown = min(series, key=_rank)
    own = _source(shown)
    return StudyRow(
        study=study_uid,
        accession_number=next((row["accession_number"] for row in series if row["accession_number"]), ""),
        received_at=min(row["first_at"] for row in series), last_at=max(row["last_at"] for row in series),
        series_count=len(series), pets=sum(row["modality"] == "PT" for row in series),
        instances=sum(row["instances"] for row in series), calling_ae=shown["calling_ae"], series=shown["series_uid"],
        modality=shown["modality"], description=shown["series_description"], state=shown[f"{own}_state"],
        code=shown[f"{own}_code"], reason=shown[f"{own}_reason"],
        until=shown["until"] if shown["series_state"] == "waiting" else None, job=shown["job_id"],
        route=shown["route"] or "", method=shown["method"] or "", preset=shown["preset"] or "",
        progress=progress_of(shown["progress"]),
        derived_series=shown["derived_series_uid"] or "", finished_at=shown["finished_at"])


def _source(row: Mapping[str, Any]) -> str:
    """Whose state counts: the newest job's where there is one, but a series that is held says so (dicomnode.views)."""
    return "series" if row["job_id"] is None or row["series_state"] == "held" else "job"


def _rank(row: Mapping[str, Any]) -> tuple[bool, int, float]:
    return row["modality"] != "PT", FIRST.index(row[f"{_source(row)}_state"]), -row["first_at"]


def _place(before: str | None) -> tuple[float, str]:
    """The arrival and Series Instance UID of the last row; without one, a place before all."""
    if not before:
        return float("inf"), ""
    at, _, series_uid = before.partition("~")
    try:
        return float(at), series_uid
    except ValueError:
        raise RefusedInput(f"{before[:80]!r} is no place in a list. Remedy: take `next` of a page.") from None


def _begin(day: date | None, timezone: str) -> float | None:
    """Unix seconds at which the day begins there."""
    return None if day is None else datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(timezone)).timestamp()


def _next_day(day: date | None) -> date | None:
    return None if day is None or day == date.max else day + timedelta(days=1)
