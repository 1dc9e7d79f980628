"""Objects on disk against their rows, while the node lives: a quick look at each start, and going on after a resend.

At the start the files of every series are counted, and those of series that are not processed yet are measured; what
is missing or short holds the series or its job, with the remedy. Digests are compared where it matters: by a job
before it reads its input (pipeline), by a resend (groupcommit), and all of them by `dicomnode repair --dry-run`.

A resend heals a damaged file. What was held for it goes on by itself (`resume`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicomnode.errors import CannotUnderstand, LedgerCorrupt
from dicomnode.ledger import Ledger
from dicomnode.spool import Spool
from dicomnode.stored import sha256_of

__all__ = ["DAMAGED", "LOST", "Found", "at_start", "flaw", "healed", "require_jobs", "resume",
           "was_purged"]

DAMAGED = "input-damaged"  # code: files are not what was received; a resend heals them
LOST = "input-lost"  # code: objects whose rows are gone too (repair); a resend is taken as new
FEW = 100  # files without a row that a crash may leave: in place, not yet in the ledger, never acknowledged
UNDECIDED = ("receiving", "waiting", "complete")
_OPEN = """SELECT series_uid FROM series WHERE state IN ('receiving', 'waiting', 'complete')
 UNION SELECT g.series_uid FROM series s JOIN series g ON g.study_uid = s.study_uid
        WHERE s.state IN ('receiving', 'waiting', 'complete') AND g.is_guide
 UNION SELECT series_uid FROM job WHERE state IN ('queued', 'failed')
 UNION SELECT guide_series_uid FROM job WHERE state IN ('queued', 'failed') AND guide_series_uid IS NOT NULL"""


@dataclass(frozen=True)
class Found:
    """What a start found. missing: objects whose file is gone; unknown: files without a row; held: series and jobs."""

    missing: int
    unknown: int
    held: tuple[str, ...]

    @property
    def alarming(self) -> bool:
        return bool(self.missing or self.held or self.unknown > FEW)

    def __str__(self) -> str:
        return (f"{self.missing} objects have no file, {self.unknown} files have no row; held: "
                f"{', '.join(self.held) or 'nothing'}. Remedy: stop the node; `dicomnode repair --dry-run` says which, "
                "`dicomnode repair` mends what it can")


def require_jobs(ledger: Ledger, spool: Spool) -> None:
    """Raises LedgerCorrupt where a derived series lies on disk of whose job the ledger knows nothing.

    Such a ledger is new, or older than the disk. Its next job would get the number, and the place, of that one.
    """
    strange = sorted(name for name in _names(spool.data_dir / "derived") if name.isdecimal()
                     and not ledger.query("SELECT 1 FROM job WHERE id = ?", (int(name),)))
    if strange:
        raise LedgerCorrupt(f"ledger {ledger.path} does not know the jobs of {len(strange)} derived series on disk "
                            f"(derived/{strange[0]}): it is new, or older than they are. Remedy: stop the node, "
                            "then `dicomnode repair`, which brings the jobs back; or restore the ledger.")


def flaw(path: Path, row: Mapping[str, Any]) -> str:
    """What is wrong with the file of an instance row; "": nothing. Reads it for its digest."""
    try:
        return _short(path, row) or (
            "" if sha256_of(path) == row["sha256"] else "its bytes are not those that were received")
    except (OSError, CannotUnderstand) as error:
        return f"it cannot be read: {error}"


def _short(path: Path, row: Mapping[str, Any]) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "its file is gone"
    return "" if size == row["bytes"] else f"{size} of {row['bytes']} bytes are there"


def at_start(ledger: Ledger, spool: Spool, *, now: float) -> Found:
    """Look, hold what must not be used, write one event where something was found. Raises OSError, sqlite3.Error."""
    open_ = {row["series_uid"] for row in ledger.query(_OPEN)}
    missing = unknown = 0
    held: list[str] = []
    folders = _counts(spool)
    for row in ledger.query("SELECT s.series_uid, s.study_uid, s.purged_at, CASE WHEN s.purged_at IS NULL THEN "
                            "(SELECT count(*) FROM instance i WHERE i.series_uid = s.series_uid) END AS n "
                            "FROM series s"):  # a year's purged series have millions of rows
        here = folders.pop((row["study_uid"], row["series_uid"]), 0)
        if row["purged_at"] is not None:
            continue
        unknown += max(0, here - row["n"])
        if here < row["n"] and not was_purged(ledger, row["series_uid"]):
            missing += sum(not spool.absolute(one["path"]).is_file() for one in ledger.instances(row["series_uid"]))
        if row["series_uid"] in open_:
            held += _hold(ledger, spool, row["series_uid"], now)
    unknown += sum(folders.values())
    found = Found(missing, unknown, tuple(held))
    if found.alarming:
        ledger.event("node", now=now, code="spool", reason=str(found))
    return found


def was_purged(ledger: Ledger, series_uid: str) -> bool:
    """Whether files of the series were ever removed on purpose ([retention]), though some may have come again."""
    return bool(ledger.query("SELECT 1 FROM series WHERE series_uid = ? AND purged_at IS NOT NULL UNION ALL "
                             "SELECT 1 FROM event WHERE series_uid = ? AND kind = 'series' AND code = 'purged' LIMIT 1",
                             (series_uid, series_uid)))


def _counts(spool: Spool) -> dict[tuple[str, str], int]:
    """(study, series) -> how many objects lie there."""
    found = {}
    for study in (spool.data_dir / "objects").iterdir():
        for series in _names(study):
            found[study.name, series] = sum(name.endswith(".dcm") for name in _names(study / series))
    return found


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):  # removed meanwhile ([retention]), or nothing of ours
        return []


def _hold(ledger: Ledger, spool: Spool, series_uid: str, now: float) -> list[str]:
    """Hold the series or its waiting jobs where files of it are missing or short; what was held."""
    if not _flawed(spool, ledger.instances(series_uid)):
        return []
    held = []
    with ledger.transaction():  # a worker may be at work: nobody removes files or decides meanwhile
        flawed, row = _flawed(spool, ledger.instances(series_uid)), ledger.series(series_uid)
        if not flawed or row["purged_at"] is not None:
            return []
        uid, why = flawed[0]
        reason = (f"{len(flawed)} of {row['instances']} objects of series {series_uid} are not on disk as they were "
                  f"received: {uid}: {why}. Remedy: send the series again; it goes on by itself")
        if row["state"] in UNDECIDED or (row["is_guide"] and row["state"] == "ignored"):
            ledger.set_series(series_uid, "held", now=now, code=DAMAGED, reason=reason)
            held.append(f"series {series_uid}")
        for job in ledger.query("SELECT id FROM job WHERE (series_uid = ? OR guide_series_uid = ?) "
                                "AND state IN ('queued', 'failed')", (series_uid, series_uid)):
            ledger.set_job(job["id"], "held", now=now, code=DAMAGED, reason=reason)
            held.append(f"job {job['id']}")
    return held


def _flawed(spool: Spool, rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(row["sop_instance_uid"], why) for row in rows if (why := _short(spool.absolute(row["path"]), row))]


# --- a resend


def healed(ledger: Ledger, series_uid: str, *, now: float) -> None:
    """A file of the series was damaged and was put back from a resend."""
    with ledger.transaction() as db:
        db.execute("INSERT OR REPLACE INTO memo VALUES (?, ?)", (f"healed:{series_uid}", repr(now)))


def resume(ledger: Ledger, spool: Spool, *, now: float) -> int:
    """Let go on what was held for its input and has it again; how many series and jobs.

    A job only where something has come since it was held: its digests are compared anew when it runs.
    """
    count = 0
    for row in ledger.query("SELECT id FROM job WHERE state = 'held' AND code = ?", (DAMAGED,)):
        with ledger.transaction():
            job = ledger.job(row["id"])
            parts = [uid for uid in (job["series_uid"], job["guide_series_uid"]) if uid]
            wanted = set(job["inputs"])
            rows = [one for uid in parts for one in ledger.instances(uid) if one["sop_instance_uid"] in wanted]
            came = max([*(one["received_at"] for one in rows), *(_healed_at(ledger, uid) for uid in parts)], default=0)
            if job["state"] != "held" or came < (job["finished_at"] or 0.0) or len(rows) < len(wanted) or _flawed(
                    spool, rows):
                continue
            ledger.set_job(job["id"], "queued", now=now, code="input-restored", reason="its input came again",
                           attempts=0, run_after=now, progress=None, finished_at=None)
            count += 1
    for row in ledger.query("SELECT series_uid FROM series WHERE state = 'held' AND code = ?", (DAMAGED,)):
        with ledger.transaction():
            if ledger.series(row["series_uid"])["state"] == "held" and not _flawed(
                    spool, ledger.instances(row["series_uid"])):
                ledger.set_series(row["series_uid"], "receiving", now=now, code="input-restored",
                                  reason="what was damaged came again")
                count += 1
    return count


def _healed_at(ledger: Ledger, series_uid: str) -> float:
    rows = ledger.query("SELECT value FROM memo WHERE key = ?", (f"healed:{series_uid}",))
    return float(rows[0]["value"]) if rows else 0.0
