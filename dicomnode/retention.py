"""What may go from the disk, and when. Nothing goes before its results are confirmed; rows of the ledger never go.

    inputs    series whose newest job is committed, or delivered where no more proof is asked of a peer: inputs_days
              after that; the CTs of a study with the last of its PETs
    ignored   series that no route wanted or that a person gave up: ignored_days after their last object
    derived   derived series that are confirmed in the same sense, or replaced by a newer one: derived_days after that
    unsent    derived series of jobs that were cancelled or superseded before anything was sent: after UNSENT_S

What is held, waits, runs or is being sent stays, and so does what has other bytes under a known UID that nobody has
looked at; those other bytes always stay. Days of 0 keep that kind for ever, also when the disk fills.

A clock that was set ahead removes nothing by age for a day, so that a person or a time server can put it right.

The ledger says first that files are gone (with the list of them in table memo), then they go: after a crash in between
the next tick goes on. A file that comes again afterwards is kept again (`restored`), and makes no new job.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicomnode.config import Config
from dicomnode.errors import RefusedInput
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.memo import forget, memo, set_memo
from dicomnode.spool import Spool, fsync_dir
from dicomnode.states import JOB_STATES
from dicomnode.views import timestamp

__all__ = ["PURGE_S", "Purger", "missing_files", "require_files", "restored"]

PURGE_S = 60.0       # how often it is ticked
DAY_S = 86400.0
UNSENT_S = 3600.0    # a person who cancelled by mistake has this long to say so
GUIDE_S = DAY_S      # a CT that came again waits for the rest of its study
FULL_S = 3600.0      # between two searches for what is old enough; the disk is looked at at every tick
TICK_S = 10.0        # a tick lasts no longer: it must not hold up the end of the process
BATCH = 100          # files removed under one write lock: the receiver waits for it meanwhile
MIB = 2**20
MEMO = "purge:series:"
CLOCK = "retention:clock"
OVER = ("committed", "delivered", "superseded", "cancelled")
UNFINISHED = tuple(state for state in JOB_STATES if state not in OVER)

log = get_logger(__name__)

_RESTORED = ("coalesce((SELECT max(at) FROM event WHERE event.series_uid = s.series_uid "
             "AND event.code = 'restored'), 0)")
_NEWEST = "j.id = (SELECT max(id) FROM job WHERE job.series_uid = s.series_uid)"
_CONFIRMED = """(j.state = 'committed' OR (j.state = 'delivered' AND NOT EXISTS (
    SELECT 1 FROM delivery d WHERE d.job_id = j.id
       AND NOT (d.state = 'committed' OR (d.state = 'delivered' AND d.confirm = 'store')))))"""
_SENT = "EXISTS (SELECT 1 FROM delivery d JOIN delivery_instance di ON di.delivery_id = d.id WHERE d.job_id = j.id)"
_STILL_THERE = f"""(s.purged_at IS NULL OR s.last_at > s.purged_at)
   AND NOT EXISTS (SELECT 1 FROM job o WHERE o.series_uid = s.series_uid AND o.state IN {UNFINISHED})
   AND NOT EXISTS (SELECT 1 FROM conflict c WHERE c.series_uid = s.series_uid AND NOT c.accepted)"""
_SERIES_RESTS = "(SELECT state FROM series WHERE series.series_uid = j.series_uid) IN ('matched', 'ignored')"
_PET_LEFT = """EXISTS (SELECT 1 FROM series p WHERE p.study_uid = s.study_uid AND p.series_uid != s.series_uid
   AND p.modality = 'PT' AND p.state != 'ignored' AND (p.purged_at IS NULL OR p.last_at > p.purged_at))"""
_JOB_LEFT = f"""EXISTS (SELECT 1 FROM series p JOIN job o ON o.series_uid = p.series_uid
   WHERE p.study_uid = s.study_uid AND o.state IN {UNFINISHED})"""
_PET_CAME = """EXISTS (SELECT 1 FROM series p WHERE p.study_uid = s.study_uid AND p.modality = 'PT'
   AND p.state != 'ignored')"""

SERIES_SQL = {
    "inputs": f"""
SELECT s.*, max(coalesce(j.finished_at, 0), s.last_at, {_RESTORED}) AS since
  FROM series s JOIN job j ON {_NEWEST} WHERE s.state = 'matched' AND {_CONFIRMED} AND {_STILL_THERE}""",
    "guides": f"""
SELECT s.*, max(s.last_at, {_RESTORED}) AS since
  FROM series s WHERE s.state = 'ignored' AND s.is_guide AND {_PET_CAME} AND NOT {_PET_LEFT} AND NOT {_JOB_LEFT}
   AND {_STILL_THERE}""",
    "ignored": f"""
SELECT s.*, max(coalesce(j.finished_at, 0), s.last_at, {_RESTORED}) AS since
  FROM series s LEFT JOIN job j ON {_NEWEST}
 WHERE ((s.state = 'ignored' AND NOT (s.is_guide AND {_PET_CAME})) OR (s.state = 'matched' AND j.state = 'cancelled'))
   AND {_STILL_THERE}""",
}
DERIVED_SQL = {
    "derived": f"""
SELECT j.id, j.study_uid, j.series_uid, j.state, j.derived_path, coalesce(j.finished_at, j.built_at) AS since
  FROM job j WHERE j.derived_path IS NOT NULL AND {_SERIES_RESTS}
   AND ({_CONFIRMED} OR (j.state IN ('superseded', 'cancelled') AND {_SENT}))""",
    "unsent": f"""
SELECT j.id, j.study_uid, j.series_uid, j.state, j.derived_path, coalesce(j.finished_at, j.built_at) AS since
  FROM job j WHERE j.derived_path IS NOT NULL AND {_SERIES_RESTS}
   AND j.state IN ('superseded', 'cancelled') AND NOT {_SENT}""",
}


@dataclass(frozen=True)
class _Candidate:
    """Something that may go: a series' files (`uid`) or a job's derived folder (`job`)."""

    kind: str
    since: float
    uid: str = ""
    job: int = 0


class Purger:
    """Removes what may go. `tick` is called every minute or so; `free_bytes` tells the free disk space."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], float] = time.time,
                 free_bytes: Callable[[], int] | None = None) -> None:
        self._limits, self._ledger, self._spool, self._clock = config.retention, ledger, spool, clock
        self._free = free_bytes or spool.free_bytes
        self._full_at = self._said_at = float("-inf")

    def tick(self) -> int:
        """Finish what was begun, remove what is old enough, then what must go for space; how many things went."""
        now, until = self._clock(), time.monotonic() + TICK_S
        self._finish()
        gone = 0
        if abs(now - self._full_at) >= FULL_S and self._trusts_the_clock(now):
            for one in self._candidates():
                if time.monotonic() > until:
                    return gone  # the rest at the next tick
                if one.since <= now - self._keep_s(one.kind):
                    gone += self._purge(one, now) is not None
            self._sweep_derived()
            self._full_at = now
        return gone + self._make_room(now, until)

    def _trusts_the_clock(self, now: float) -> bool:
        """A clock that leaps ahead would make everything old at once: after a leap or a long stop a day goes by."""
        with self._ledger.transaction():
            seen, not_before = json.loads(memo(self._ledger, CLOCK) or json.dumps([now, now]))
            if not seen - FULL_S <= now <= seen + DAY_S:
                not_before = now + DAY_S
                log.warning("nothing is removed by age for a day: the node was stopped for long, or its clock was set",
                            action="retention_waits", hours=round((now - seen) / 3600, 1))
            set_memo(self._ledger, CLOCK, json.dumps([now, not_before]))
        self._full_at = now if now < not_before else self._full_at
        return bool(now >= not_before)

    # --- what may go

    def _keep_s(self, kind: str) -> float:
        """How long a kind is kept; for ever: infinite."""
        days = {"inputs": self._limits.inputs_days, "derived": self._limits.derived_days,
                "ignored": self._limits.ignored_days}
        if kind == "unsent":
            return UNSENT_S
        if kind == "guides":
            return GUIDE_S if self._limits.inputs_days else float("inf")
        return days[kind] * DAY_S or float("inf")

    def _candidates(self) -> list[_Candidate]:
        """All that is confirmed or unwanted, of kinds that are not kept for ever; oldest first."""
        found = [_Candidate(kind, row["since"], uid=row["series_uid"])
                 for kind, sql in SERIES_SQL.items() if self._keep_s(kind) < float("inf")
                 for row in self._ledger.query(sql)]
        found += [_Candidate(kind, row["since"], job=row["id"])
                  for kind, sql in DERIVED_SQL.items() if self._keep_s(kind) < float("inf")
                  for row in self._ledger.query(sql)]
        return sorted(found, key=lambda one: (one.since, one.uid, one.job))

    def _size(self, folder: str) -> int:
        """Bytes of all files below a folder; 0 where it is gone."""
        try:
            return sum(path.stat().st_size for path in self._spool.absolute(folder).rglob("*") if path.is_file())
        except FileNotFoundError:  # gone while it was looked at
            return 0

    def _make_room(self, now: float, until: float) -> int:
        """Below retention.free_mb: what may go goes whatever its age, until as many bytes have gone as were lacking."""
        lacking = self._limits.free_mb * MIB - self._free()
        if lacking <= 0:
            return 0
        gone = 0
        for one in self._candidates():
            if lacking <= 0 or time.monotonic() > until:
                return gone
            if one.kind == "guides" and one.since > now - GUIDE_S:
                continue
            freed = self._purge(one, now)
            if freed is not None:
                gone, lacking = gone + 1, lacking - freed
        if lacking > 0:
            self._stuck(now)
        return gone

    def _stuck(self, now: float) -> None:
        if abs(now - self._said_at) < FULL_S:
            return
        self._said_at = now
        days = {"inputs_days": self._limits.inputs_days, "derived_days": self._limits.derived_days,
                "ignored_days": self._limits.ignored_days}
        forever = [name for name, value in days.items() if not value]
        kept = f"; {', '.join(forever)} = 0 keep for ever" if forever else ""
        log.error(f"{self._free() // MIB} MiB free, below retention.free_mb = {self._limits.free_mb}, and nothing more "
                  f"may go: what is left is not confirmed, held, or kept by the configuration{kept}. Remedy: decide "
                  "over what is held (`dicomnode status`), mend the peers, or add disk space", action="retention_stuck",
                  free_mb=self._free() // MIB)

    # --- what goes

    def _purge(self, one: _Candidate, now: float) -> int | None:
        """How many bytes went; None where it may not go any more."""
        return self._purge_derived(one, now) if one.job else self._purge_series(one, now)

    def _purge_series(self, one: _Candidate, now: float) -> int | None:
        with self._ledger.transaction() as db:
            rows = self._ledger.query(f"{SERIES_SQL[one.kind]} AND s.series_uid = ?", (one.uid,))
            if not rows:
                return None  # something has changed since: a new object, a person, a job
            row = rows[0]
            objects = self._ledger.query("SELECT path, bytes FROM instance WHERE series_uid = ?", (one.uid,))
            paths, size = [each["path"] for each in objects], sum(each["bytes"] for each in objects)
            db.execute("UPDATE series SET purged_at = ? WHERE series_uid = ?", (now, one.uid))
            set_memo(self._ledger, MEMO + one.uid, json.dumps(paths))
            self._ledger.event("series", now=now, study_uid=row["study_uid"], series_uid=one.uid, code="purged",
                               from_state=row["state"], to_state=row["state"],
                               reason=f"{len(paths)} objects removed, {size / MIB:.1f} MiB ({one.kind})")
        self._remove(MEMO + one.uid)
        log.info("received objects removed", action="purged", series=one.uid, objects=len(paths), why=one.kind)
        return size

    def _finish(self) -> None:
        for row in self._ledger.query("SELECT key FROM memo WHERE key >= ? AND key < ?", (MEMO, MEMO + "~")):
            self._remove(row["key"])

    def _remove(self, key: str) -> None:
        """Remove the files that a memo lists, BATCH at a time under the lock that `restored` needs too."""
        while True:
            with self._ledger.transaction():
                left = memo(self._ledger, key)
                if not left:
                    return
                paths = json.loads(left)
                _unlink(self._spool, paths[:BATCH])
                if len(paths) > BATCH:
                    set_memo(self._ledger, key, json.dumps(paths[BATCH:]))
                else:
                    forget(self._ledger, key)

    def _purge_derived(self, one: _Candidate, now: float) -> int | None:
        with self._ledger.transaction() as db:
            rows = self._ledger.query(f"{DERIVED_SQL[one.kind]} AND j.id = ?", (one.job,))
            if not rows:
                return None
            row, size = rows[0], self._size(rows[0]["derived_path"])
            db.execute("UPDATE job SET derived_path = NULL, purged_at = ? WHERE id = ?", (now, one.job))
            # Lists of what was never answered, and was proven otherwise: those of years would fill the ledger.
            db.execute("UPDATE commitment SET items = '[]' WHERE delivery_id IN (SELECT id FROM delivery "
                       "WHERE job_id = ?)", (one.job,))
            self._ledger.event("job", now=now, study_uid=row["study_uid"], series_uid=row["series_uid"],
                               job_id=one.job, from_state=row["state"], to_state=row["state"], code="purged",
                               reason=f"derived series removed, {size / MIB:.1f} MiB ({one.kind})")
        self._remove_derived([str(one.job)])
        log.info("derived series removed", action="purged", job=one.job, why=one.kind)
        return size

    def _sweep_derived(self) -> None:
        """Folders of which the ledger says that they are gone, or that a job left which was stopped as it ended."""
        there = {path.name for path in (self._spool.data_dir / "derived").iterdir()}
        over = {str(row["id"]) for row in self._ledger.query(
            f"SELECT id FROM job WHERE derived_path IS NULL AND state IN {OVER}")}
        self._remove_derived(sorted(there & over))

    def _remove_derived(self, names: Iterable[str]) -> None:
        for name in names:
            folder, gone = self._spool.data_dir / "derived" / name, self._spool.data_dir / "work" / f"purged-{name}"
            shutil.rmtree(gone, ignore_errors=True)
            with self._ledger.transaction():  # nobody takes the job up again meanwhile
                job = self._ledger.job(int(name))
                if job["derived_path"] is None and job["state"] in OVER and folder.is_dir():
                    os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)  # takes long; after a crash schedule.sweep_work does it


def restored(ledger: Ledger, series_uid: str, *, now: float, actor: str) -> None:
    """A file of the series came again after it was removed: the series is there again, what is left of it is kept."""
    with ledger.transaction() as db:
        back = db.execute("UPDATE series SET purged_at = NULL WHERE series_uid = ? AND purged_at IS NOT NULL",
                          (series_uid,)).rowcount
        if back:
            forget(ledger, MEMO + series_uid)
            row = ledger.series(series_uid)
            ledger.event("series", now=now, study_uid=row["study_uid"], series_uid=series_uid, code="restored",
                         from_state=row["state"], to_state=row["state"], actor=actor,
                         reason="objects that had been removed came again and are kept again")


def missing_files(rows: Iterable[dict[str, Any]], data_dir: Path) -> list[str]:
    """SOP Instance UIDs of those instance rows whose file is not there."""
    return [row["sop_instance_uid"] for row in rows if not (data_dir / row["path"]).is_file()]


def require_files(ledger: Ledger, series_uids: Iterable[str]) -> None:
    """Raises RefusedInput where objects of one of the series have been removed and did not come again since."""
    for uid in series_uids:
        events = ledger.query("SELECT at FROM event WHERE series_uid = ? AND kind = 'series' AND code = 'purged' "
                              "ORDER BY id", (uid,))
        rows = ledger.instances(uid)
        missing = missing_files(rows, ledger.path.parent) if events else []
        if missing:
            raise RefusedInput(
                f"{len(missing)} of {len(rows)} objects of series {uid} are gone: they were removed on "
                f"{timestamp(events[-1]['at'])} ([retention]). Remedy: have the whole series sent again, then repeat "
                "the command.")


def _unlink(spool: Spool, paths: Sequence[str]) -> None:
    """Durably; folders that are empty then go too."""
    folders = {spool.absolute(path).parent for path in paths}
    for path in paths:
        spool.absolute(path).unlink(missing_ok=True)
    for folder in folders:
        for one in (folder, folder.parent):
            if one.is_dir() and one.is_relative_to(spool.data_dir / "objects") and one != spool.data_dir / "objects":
                fsync_dir(one)
                try:
                    one.rmdir()
                except OSError:  # not empty: something else lies there
                    break
