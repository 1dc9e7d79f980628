"""What sources (PACS) say they hold, series by series: the table source_series, and how much of it is here.

States: `seen` (to be fetched at next_at, or nothing to do where next_at is empty), `retrieving` (asked for; its
instances are awaited until next_at), `arrived` (as many here as the source says), `failed` (given up until it is seen
again). Every change of state is one transaction with its event row, of kind `source`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dicomnode.ledger import Ledger

__all__ = ["SourceSeries", "Sources"]

LONGEST_WAIT_S = 7200.0  # what is due later was stamped by a wrong clock


@dataclass(frozen=True)
class SourceSeries:
    """One series as a source describes it. `instances`: None where the source does not say."""

    source: str
    study_uid: str
    series_uid: str
    study_date: str
    modality: str
    accession_number: str
    instances: int | None
    wanted: bool
    reason: str


class Sources:
    """The table source_series of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def saw(self, series: SourceSeries, *, now: float, next_at: float | None) -> str:
        """Enter what a source said now; the state: `arrived` where all of it is here, else `seen`.

        next_at  when to fetch what is missing; None: not to be fetched. A retrieval under way, or the pause before the
                 next attempt, goes on.
        """
        with self._ledger.transaction() as db:
            old = self.row(series.source, series.series_uid)
            here = self.here(series.series_uid)
            whole = here >= max(1, series.instances or 1)
            state = "arrived" if whole else "seen"
            reason = series.reason
            if old is not None and not whole and next_at is not None and old["next_at"] is not None:
                # Under way, or a pause after a failure: both go on, with what was said of them.
                state, next_at, reason = old["state"], old["next_at"], old["reason"] if old["attempts"] else reason
            values = asdict(series) | {"state": state, "next_at": None if whole else next_at, "now": now,
                                       "reason": reason}
            db.execute(
                "INSERT INTO source_series (source, series_uid, study_uid, study_date, modality, accession_number, "
                "instances, wanted, reason, state, next_at, first_seen_at, last_seen_at) VALUES (:source, :series_uid, "
                ":study_uid, :study_date, :modality, :accession_number, :instances, :wanted, :reason, :state, "
                ":next_at, :now, :now) ON CONFLICT (source, series_uid) DO UPDATE SET study_date = coalesce(nullif("
                "excluded.study_date, ''), study_date), accession_number = coalesce(nullif(excluded.accession_number, "
                "''), accession_number), instances = excluded.instances, wanted = excluded.wanted, reason = "
                "excluded.reason, attempts = CASE WHEN state = 'failed' THEN 0 ELSE attempts END, state = "
                "excluded.state, next_at = excluded.next_at, last_seen_at = excluded.last_seen_at", values)
            before = "" if old is None else old["state"]
            if before != state:
                self._event(series.source, series.study_uid, series.series_uid, before, state, reason, now)
            return state

    def set(self, source: str, series_uid: str, state: str, *, now: float, reason: str, next_at: float | None = None,
            attempts: int | None = None) -> None:
        """Change the state of a row that is there."""
        with self._ledger.transaction() as db:
            old = self.row(source, series_uid)
            if old is None:
                return
            db.execute("UPDATE source_series SET state = ?, reason = ?, next_at = ?, attempts = coalesce(?, attempts) "
                       "WHERE source = ? AND series_uid = ?", (state, reason, next_at, attempts, source, series_uid))
            if (state, reason) != (old["state"], old["reason"]):
                self._event(source, old["study_uid"], series_uid, old["state"], state, reason, now)

    def row(self, source: str, series_uid: str) -> dict[str, Any] | None:
        rows = self._ledger.query("SELECT * FROM source_series WHERE source = ? AND series_uid = ?",
                                  (source, series_uid))
        return dict(rows[0]) if rows else None

    def due(self, source: str, *, now: float) -> list[dict[str, Any]]:
        """Wanted rows to fetch or to look after, study by study; the CT of a study before its PET."""
        return [dict(row) for row in self._ledger.query(
            "SELECT * FROM source_series WHERE source = ? AND wanted = 1 AND state IN ('seen', 'retrieving') "
            "AND (next_at <= ? OR next_at > ?) ORDER BY study_date, study_uid, modality <> 'CT', series_uid",
            (source, now, now + LONGEST_WAIT_S))]

    def here(self, series_uid: str) -> int:
        """How many instances of a series were received, purged ones included."""
        rows = self._ledger.query("SELECT instances FROM series WHERE series_uid = ?", (series_uid,))
        return int(rows[0]["instances"]) if rows else 0

    def _event(self, source: str, study_uid: str, series_uid: str, before: str, after: str, reason: str,
               now: float) -> None:
        self._ledger.event("source", now=now, study_uid=study_uid, series_uid=series_uid, from_state=before,
                           to_state=after, code=source, reason=reason)
