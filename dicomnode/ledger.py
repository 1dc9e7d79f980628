"""The ledger: what came, what was decided and why, what was done, what was sent. One sqlite3 file for all processes.

Write-ahead log and synchronous=FULL: a commit that returned is on disk (sqlite.org/pragma.html#pragma_synchronous).
Every change of state is one transaction together with its event row. Two processes may hold a Ledger on the same file;
threads of one process may share one Ledger.
"""

from __future__ import annotations

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dicomnode.errors import LedgerCorrupt, NodeError, NotFound, TransitionRefused
from dicomnode.migrations import SCHEMA_VERSION, migrate, require_no_repair
from dicomnode.states import after_deliveries, may_follow

__all__ = ["SCHEMA_VERSION", "InstanceRow", "Kept", "Ledger", "NewJob"]

Kept = Literal["new", "repeat", "conflict"]


def _statements() -> dict[str, str]:
    text = files("dicomnode").joinpath("ledger.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


SQL = _statements()
#: What is wrong then is not in the file (sqlite.org/rescode.html): the disk, the rights, or who keeps it locked.
_PASSING = frozenset({sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM,
                      sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN})
_REMEDY = "Remedy: stop the node, then `dicomnode repair`, which keeps the file; or restore a backup."


@dataclass(frozen=True)
class InstanceRow:
    """One received object, already safe on disk under `path` (relative to the data directory)."""

    sop_instance_uid: str
    sop_class_uid: str
    study_uid: str
    series_uid: str
    transfer_syntax_uid: str
    path: str
    bytes: int
    sha256: str
    calling_ae: str
    address: str
    received_at: float
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    frames: int = 1
    modality: str = ""
    accession_number: str = ""
    series_number: str = ""
    series_description: str = ""


@dataclass(frozen=True)
class NewJob:
    """One derived series to make: `identity` digests inputs, method, full settings and software version."""

    identity: str
    series_uid: str
    study_uid: str
    guide_series_uid: str | None
    route: str
    method: str
    preset: str
    settings: Mapping[str, Any]
    send_to: tuple[str, ...]
    inputs: tuple[str, ...]
    priority: int = 0
    urgent: bool = False


class Ledger:
    """Opens (and at first use creates) the ledger at `path`.

    Raises LedgerCorrupt where the file is damaged, in repair, or written by a newer version, NodeError where the disk
    is full, it is locked for long, or may not be written.
    """

    def __init__(self, path: Path, *, timeout_s: float = 30.0) -> None:
        self.path = Path(path)
        require_no_repair(self.path)
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(self.path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            migrate(self._db, self.path, SQL["schema"])
        except sqlite3.DatabaseError as error:
            raise self._wrong(f"cannot be opened: {error}", error) from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Read every page of the file. Raises LedgerCorrupt with what sqlite found, NodeError where it cannot look."""
        try:
            found = [row[0] for row in self.query("PRAGMA quick_check")]
        except sqlite3.DatabaseError as error:
            raise self._wrong(f"is damaged: {error}", error) from error
        if found != ["ok"]:
            raise self._wrong(f"is damaged: {found[0]}")

    def _wrong(self, what: str, error: sqlite3.Error | None = None) -> NodeError:
        if error is not None and getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING:
            return NodeError(f"ledger {self.path} cannot be used now: {error}. Remedy: look at disk space and rights "
                             "of the data directory, and at what else has the ledger open; it needs no repair")
        return LedgerCorrupt(f"ledger {self.path} {what}. {_REMEDY}")

    # --- basics

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction, visible to others whole or not at all; durable when the block is left. Nests."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # Also after a COMMIT that failed: left open, it would take in what comes next and never make it
                # durable. Some errors (disk full) have rolled back already.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def query(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a SELECT."""
        with self._lock:
            return self._db.execute(sql, parameters).fetchall()

    def _one(self, sql: str, parameters: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any] | None:
        return next((dict(row) for row in self.query(sql, parameters)), None)

    def event(self, kind: str, *, now: float, study_uid: str = "", series_uid: str = "", job_id: int | None = None,
              from_state: str = "", to_state: str = "", code: str = "", reason: str = "", actor: str = "node") -> None:
        """Write one line of history: kind is series, job, delivery, psf, reception, security, source or node."""
        with self.transaction() as db:
            db.execute(SQL["add_event"], {
                "at": now, "study_uid": study_uid, "series_uid": series_uid, "job_id": job_id, "kind": kind,
                "from_state": from_state, "to_state": to_state, "code": code, "reason": reason, "actor": actor,
            })

    # --- reception

    def known(self, sop_instance_uid: str) -> dict[str, Any] | None:
        """The instance row of that UID."""
        return self._one("SELECT * FROM instance WHERE sop_instance_uid = ?", (sop_instance_uid,))

    def add_instances(self, rows: Iterable[InstanceRow]) -> list[Kept]:
        """Enter received objects, all in one transaction; on return they are durable.

        "new": entered, its series is receiving (again). "repeat": the same bytes were known; nothing changes, and the
        caller may drop its copy. "conflict": other bytes under a known UID; a conflict row keeps them, the first
        object stays in use.
        """
        with self.transaction() as db:
            return [self._add_instance(db, row) for row in rows]

    def _add_instance(self, db: sqlite3.Connection, row: InstanceRow) -> Kept:
        values = dict(vars(row))
        values["position"] = json.dumps(row.position) if row.position else None
        values["orientation"] = json.dumps(row.orientation) if row.orientation else None
        old = db.execute("SELECT sha256, study_uid, series_uid FROM instance WHERE sop_instance_uid = ?",
                         (row.sop_instance_uid,)).fetchone()
        if old and old["sha256"] == row.sha256:
            return "repeat"
        if old:
            # Whatever series the other bytes claim to be of: it is the series in use that is in doubt.
            values |= {"study_uid": old["study_uid"], "series_uid": old["series_uid"]}
            added = db.execute(SQL["add_conflict"], values).rowcount
            if added:
                self.event("reception", now=row.received_at, study_uid=old["study_uid"], series_uid=old["series_uid"],
                           code="conflict", actor=row.calling_ae,
                           reason=f"other bytes under SOP Instance UID {row.sop_instance_uid}; kept aside, not used")
            return "conflict"
        db.execute(SQL["add_instance"], values)
        series = db.execute("SELECT state, code FROM series WHERE series_uid = ?", (row.series_uid,)).fetchone()
        db.execute(SQL["touch_series"], values)
        if series is None:
            self.event("series", now=row.received_at, study_uid=row.study_uid, series_uid=row.series_uid,
                       to_state="receiving", actor=row.calling_ae)
        elif series["state"] in ("waiting", "matched") or (series["state"] == "held" and series["code"] != "operator"):
            self.set_series(row.series_uid, "receiving", now=row.received_at, code="late", actor=row.calling_ae,
                            reason=f"another instance arrived while the series was {series['state']}")
        return "new"

    def instances(self, series_uid: str) -> list[dict[str, Any]]:
        """The instances of a series in order of arrival; position and orientation as tuples or None."""
        rows = [dict(row) for row in self.query(
            "SELECT * FROM instance WHERE series_uid = ? ORDER BY received_at, sop_instance_uid", (series_uid,))]
        for row in rows:
            for key in ("position", "orientation"):
                row[key] = tuple(json.loads(row[key])) if row[key] else None
        return rows

    def conflicts(self, series_uid: str, *, accepted: bool = False) -> list[dict[str, Any]]:
        """The conflict rows of a series that a person has not yet accepted (or has)."""
        return [dict(row) for row in self.query(
            "SELECT * FROM conflict WHERE series_uid = ? AND accepted = ?", (series_uid, int(accepted)))]

    # --- series

    def series(self, series_uid: str) -> dict[str, Any]:
        """Raises NotFound."""
        row = self._one("SELECT * FROM series WHERE series_uid = ?", (series_uid,))
        if row is None:
            raise NotFound(f"no series {series_uid} in the ledger")
        return row

    def series_of_study(self, study_uid: str) -> list[dict[str, Any]]:
        return [dict(row) for row in self.query(
            "SELECT * FROM series WHERE study_uid = ? ORDER BY series_uid", (study_uid,))]

    def due_series(self, *, now: float, quiet_s: float) -> list[dict[str, Any]]:
        """Series to look at now: receiving and quiet for `quiet_s`, or waiting until a time that has come."""
        return [dict(row) for row in self.query(SQL["due_series"], {"now": now, "quiet_before": now - quiet_s})]

    def set_series(self, series_uid: str, state: str, *, now: float, code: str = "", reason: str = "",
                   until: float | None = None, is_guide: bool | None = None, released: bool | None = None,
                   actor: str = "node") -> None:
        """Change a series' state, with its event row; staying in the same state for the same reason writes no event.

        Raises NotFound, and TransitionRefused where the states do not allow the change.
        """
        with self.transaction() as db:
            old = self.series(series_uid)
            if state != old["state"] and not may_follow("series", old["state"], state):
                raise TransitionRefused(f"series {series_uid} is {old['state']} and cannot become {state}")
            db.execute(
                "UPDATE series SET state = ?, code = ?, reason = ?, until = ?, is_guide = coalesce(?, is_guide), "
                "released = coalesce(?, released) WHERE series_uid = ?",
                (state, code, reason, until, is_guide, released, series_uid),
            )
            if (state, code, reason) != (old["state"], old["code"], old["reason"]):
                self.event("series", now=now, study_uid=old["study_uid"], series_uid=series_uid,
                           from_state=old["state"], to_state=state, code=code, reason=reason, actor=actor)

    # --- jobs

    def add_job(self, new: NewJob, *, now: float) -> int:
        """Queue a job and set its series `matched`; the id of the job. The same identity never makes a second one."""
        with self.transaction() as db:
            added = db.execute(SQL["add_job"], asdict(new) | {
                "settings": json.dumps(dict(new.settings), sort_keys=True), "send_to": json.dumps(new.send_to),
                "inputs": json.dumps(new.inputs), "now": now}).rowcount
            job_id = db.execute("SELECT id FROM job WHERE identity = ?", (new.identity,)).fetchone()["id"]
            self.set_series(new.series_uid, "matched", now=now)
            if added:
                self.event("job", now=now, study_uid=new.study_uid, series_uid=new.series_uid, job_id=job_id,
                           to_state="queued", reason=f"route {new.route}: {new.method}, preset {new.preset}")
            return job_id

    def job(self, job_id: int) -> dict[str, Any]:
        """The job row; settings, send_to, inputs, progress and report decoded. Raises NotFound."""
        row = self._one("SELECT * FROM job WHERE id = ?", (job_id,))
        if row is None:
            raise NotFound(f"no job {job_id} in the ledger")
        return _decoded(row)

    def jobs_of_series(self, series_uid: str) -> list[dict[str, Any]]:
        """Oldest first."""
        return [_decoded(dict(row)) for row in self.query(
            "SELECT * FROM job WHERE series_uid = ? ORDER BY id", (series_uid,))]

    def job_of_derived(self, derived_series_uid: str) -> dict[str, Any] | None:
        """The job whose derived series has that UID: our own output is known by it."""
        row = self._one("SELECT * FROM job WHERE derived_series_uid = ?", (derived_series_uid,))
        return None if row is None else _decoded(row)

    def claim(self, owner: str, *, now: float, lease_s: float,
              may_start: Callable[[str], bool] | None = None) -> dict[str, Any] | None:
        """Take the next job: queued, failed and due again, or running under a lease that ran out. None: no job.

        `may_start` says whether jobs of the route with that name may start now; urgent ones start anyway.
        """
        # `may_start` may ask a cluster: never under the write lock. Nor does a worker take that to ask in vain.
        while row := self._claimable(now, closed := self._closed(now, may_start)):
            goes_on = row["urgent"] or may_start is None or may_start(row["route"])
            if not goes_on and row["state"] != "running":
                continue  # it was queued since the routes were looked at
            with self.transaction():
                if self._claimable(now, closed) != row:
                    continue  # another worker was faster, or something better came
                reason = ""
                if row["state"] == "running":
                    reason = f"the lease of {row['lease_owner']} ran out"
                    self.set_job(row["id"], "failed", now=now, code="lease", reason=reason, run_after=now)
                    if not goes_on:
                        continue  # it goes on when its window opens
                self.set_job(row["id"], "running", now=now, reason=reason, lease_owner=owner, lease_until=now + lease_s,
                             attempts=row["attempts"] + 1, started_at=now, progress=None)
                return self.job(row["id"])
        return None

    def _closed(self, now: float, may_start: Callable[[str], bool] | None) -> list[str]:
        """The routes whose waiting jobs may not start now."""
        return [] if may_start is None else [
            row["route"] for row in self.query(SQL["waiting_routes"], {"now": now}) if not may_start(row["route"])]

    def _claimable(self, now: float, closed: list[str]) -> dict[str, Any] | None:
        return self._one(SQL["claimable"], {"now": now, "closed": json.dumps(closed)})

    def running_jobs(self) -> list[dict[str, Any]]:
        """Jobs in state running, whoever has their lease."""
        return [_decoded(dict(row)) for row in self.query("SELECT * FROM job WHERE state = 'running' ORDER BY id")]

    def count_events(self, job_id: int, *, code: str) -> int:
        """How often the history of a job shows that code."""
        return int(self.query("SELECT count(*) AS n FROM event WHERE job_id = ? AND code = ?", (job_id, code))[0]["n"])

    def renew(self, job_id: int, owner: str, *, now: float, lease_s: float,
              progress: Mapping[str, Any] | None = None) -> bool:
        """Heartbeat of a running job. False where the job is no longer `owner`'s: stop working on it."""
        with self.transaction() as db:
            return db.execute(
                "UPDATE job SET lease_until = ?, progress = coalesce(?, progress) "
                "WHERE id = ? AND state = 'running' AND lease_owner = ?",
                (now + lease_s, None if progress is None else json.dumps(dict(progress)), job_id, owner),
            ).rowcount == 1

    def set_job(self, job_id: int, state: str, *, now: float, code: str = "", reason: str = "", actor: str = "node",
                **columns: Any) -> None:
        """Change a job's state (and other columns) with its event row, one transaction.

        Raises NotFound, and TransitionRefused where the states do not allow the change.
        """
        with self.transaction() as db:
            old = self.job(job_id)
            if state != old["state"] and not may_follow("job", old["state"], state):
                raise TransitionRefused(f"job {job_id} is {old['state']} and cannot become {state}")
            columns = {key: json.dumps(value) if key in _JSON and value is not None else value
                       for key, value in columns.items()}
            columns |= {"state": state, "code": code, "reason": reason}
            if state != "running":
                columns |= {"lease_owner": None, "lease_until": None}
            if state in ("delivered", "cancelled", "superseded", "held"):
                columns.setdefault("finished_at", now)
            assignments = ", ".join(f"{name} = :{name}" for name in columns)
            db.execute(f"UPDATE job SET {assignments} WHERE id = :job_id", {**columns, "job_id": job_id})
            if (state, code, reason) != (old["state"], old["code"], old["reason"]):
                self.event("job", now=now, study_uid=old["study_uid"], series_uid=old["series_uid"], job_id=job_id,
                           from_state=old["state"], to_state=state, code=code, reason=reason, actor=actor)

    def built(self, job_id: int, owner: str, *, now: float, derived_series_uid: str, derived_path: str,
              derived_instances: int, report: Mapping[str, Any]) -> bool:
        """The derived series lies whole and checked in `derived_path`: job `built` and its deliveries, one transaction.

        False (and nothing changes) where the job is no longer `owner`'s.
        """
        with self.transaction() as db:
            job = self.job(job_id)
            if job["state"] != "running" or job["lease_owner"] != owner:
                return False
            self.set_job(job_id, "built", now=now, built_at=now, derived_series_uid=derived_series_uid, purged_at=None,
                         derived_path=derived_path, derived_instances=derived_instances, report=dict(report))
            for peer in job["send_to"]:
                db.execute("INSERT OR IGNORE INTO delivery (job_id, peer, state, next_at, created_at) "
                           "VALUES (?, ?, 'waiting', ?, ?)", (job_id, peer, now, now))
            self.settle(job_id, now=now)
            return True

    def settle(self, job_id: int, *, now: float) -> None:
        """Take the job to the state that follows from its deliveries (states.after_deliveries), if one does."""
        with self.transaction():
            while step := after_deliveries(self.job(job_id)["state"], self.deliveries(job_id)):
                state, code, reason = step
                self.set_job(job_id, state, now=now, code=code, reason=reason)

    # --- deliveries

    def due_deliveries(self, *, now: float) -> list[dict[str, Any]]:
        return [dict(row) for row in self.query(SQL["due_deliveries"], {"now": now})]

    def deliveries(self, job_id: int) -> list[dict[str, Any]]:
        return [dict(row) for row in self.query("SELECT * FROM delivery WHERE job_id = ? ORDER BY id", (job_id,))]

    def statuses(self, delivery_id: int) -> dict[str, int]:
        """SOP Instance UID -> C-STORE status of the last attempt."""
        return {row["sop_instance_uid"]: row["status"] for row in self.query(
            "SELECT sop_instance_uid, status FROM delivery_instance WHERE delivery_id = ?", (delivery_id,))}

    def put_statuses(self, delivery_id: int, statuses: Iterable[tuple[str, int, str]], *, now: float) -> None:
        """Record (SOP Instance UID, C-STORE status, comment) answers of the peer."""
        with self.transaction() as db:
            db.executemany(SQL["put_status"], [
                {"delivery_id": delivery_id, "sop_instance_uid": uid, "status": status, "comment": comment, "at": now}
                for uid, status, comment in statuses])

    def set_delivery(self, delivery_id: int, state: str, *, now: float, reason: str = "", **columns: Any) -> None:
        """Change a delivery (waiting, delivered, committed, dead; other columns) with its event row, then its job.

        The last one delivered makes the job delivered. A dead delivery holds the job: a person decides.
        """
        columns |= {"state": state, "reason": reason, "done_at": now if state != "waiting" else None}
        with self.transaction() as db:
            old = self._one("SELECT * FROM delivery WHERE id = ?", (delivery_id,))
            if old is None:
                raise NotFound(f"no delivery {delivery_id} in the ledger")
            db.execute(f"UPDATE delivery SET {', '.join(f'{name} = :{name}' for name in columns)} WHERE id = :id",
                       {**columns, "id": delivery_id})
            job = self.job(old["job_id"])
            self.event("delivery", now=now, study_uid=job["study_uid"], series_uid=job["series_uid"], job_id=job["id"],
                       from_state=old["state"], to_state=state, code=old["peer"], reason=reason)
            self.settle(job["id"], now=now)

    # --- the PSF library

    def put_psf(self, *, now: float, **columns: Any) -> None:
        """Enter a PSF (all columns of the table but id and times), with an event row; the same source replaces.

        A found one that a person has forgotten stays forgotten; a phantom measured again is taken again.
        """
        with self.transaction() as db:
            db.execute(SQL["put_psf"], {"at": now, **{
                key: json.dumps(value, sort_keys=True) if key in _JSON else value for key, value in columns.items()}})
            self.event("psf", now=now, study_uid=columns["study_uid"], series_uid=columns["series_uid"],
                       job_id=columns["job_id"], to_state=columns["kind"],
                       reason=f"FWHM {' x '.join(f'{width:.2f}' for width in columns['fwhm_mm'])} mm")

    def psfs(self, scanner_key: Mapping[str, str] | None = None, *, forgotten: bool = False) -> list[dict[str, Any]]:
        """The PSF rows, oldest first, JSON decoded; of one scanner key, or all. `forgotten`: also those taken out."""
        key = None if scanner_key is None else json.dumps(dict(scanner_key), sort_keys=True)
        return [_decoded(dict(row)) for row in self.query(
            "SELECT * FROM psf WHERE (? IS NULL OR scanner_key = ?) AND (? OR forgotten_at IS NULL) ORDER BY at, id",
            (key, key, forgotten))]

    def forget_psf(self, psf_id: int, *, now: float, actor: str = "node") -> None:
        """Take a PSF out of use; its row stays. Raises NotFound."""
        with self.transaction() as db:
            row = self._one("SELECT * FROM psf WHERE id = ? AND forgotten_at IS NULL", (psf_id,))
            if row is None:
                raise NotFound(f"no PSF {psf_id} in the library. Remedy: `dicomnode psf` lists what is there.")
            db.execute("UPDATE psf SET forgotten_at = ? WHERE id = ?", (now, psf_id))
            self.event("psf", now=now, study_uid=row["study_uid"], series_uid=row["series_uid"], job_id=row["job_id"],
                       from_state=row["kind"], to_state="forgotten", actor=actor)

    # --- looking

    def overview(self, study: str | None = None, *, active: bool = False,
                 limit: int | None = None) -> list[dict[str, Any]]:
        """One row per series, newest first; `study`: only that study, series, derived series or accession number.

        active  only what is held or runs, or a job of it is or does.   limit  so many; None: all.
        """
        only = "active_series" if active else "named_series" if study is not None else ""
        sql = SQL["overview"].format(series=f"({SQL[only]})" if only else "series")
        return [dict(row) for row in self.query(sql, {"study": study, "limit": -1 if limit is None else limit})]

    def events(self, *, study_uid: str | None = None, limit: int = 10_000) -> list[dict[str, Any]]:
        """History, oldest first."""
        which = "" if study_uid is None else "WHERE study_uid = :study"
        return [dict(row) for row in self.query(
            f"SELECT * FROM (SELECT * FROM event {which} ORDER BY id DESC LIMIT :limit) ORDER BY id",
            {"study": study_uid, "limit": limit})]

    def counts(self) -> dict[str, dict[str, int]]:
        """Rows by state: {"series": {...}, "job": {...}, "delivery": {...}, "instance": {"all": n}}."""
        found = {table: {row["state"]: row["n"] for row in self.query(
            f"SELECT state, count(*) AS n FROM {table} GROUP BY state")} for table in ("series", "job", "delivery")}
        # Not a count of the table instance: a year's has millions of rows.
        return found | {"instance": {"all": self.query("SELECT coalesce(sum(instances), 0) AS n FROM series")[0]["n"]}}


_JSON = frozenset({"settings", "send_to", "inputs", "progress", "report",
                   "scanner_key", "fwhm_mm", "log_sd", "skew", "skew_sd", "detail"})


def _decoded(job: dict[str, Any]) -> dict[str, Any]:
    return {key: json.loads(value) if key in _JSON and value is not None else value for key, value in job.items()}
