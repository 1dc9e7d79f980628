"""A new ledger from what could be read of the old one and from what lies on disk; inside one transaction.

Rows come first from the old ledger. Then the disk decides: an object that has a row and other bytes, or that is cut
short, is put aside; one that has no row is entered as if it had just come; a row whose file is gone goes, so that a
resend is taken as new. A derived series whose job is unknown brings its job back (its report tells what the job was):
the same input never makes a second derived series.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from dicomnode import __version__, companions
from dicomnode.errors import CannotUnderstand
from dicomnode.executor import RECIPE, REPORT_FILE, report_in
from dicomnode.ledger import InstanceRow, Ledger
from dicomnode.psflibrary import keep_found
from dicomnode.retention import MEMO
from dicomnode.salvage import TABLES, Salvaged, sound_row
from dicomnode.spool import Spool, valid_uid
from dicomnode.spoolcheck import LOST, flaw, was_purged
from dicomnode.stored import Stored, read_stored

__all__ = ["Lost", "Rebuilt", "rebuild"]

UNKNOWN_JOB = "repaired"  # code of a series of which a derived one was made, by a job that nobody knows any more
STOPPED = ("held", "cancelled", "superseded")
OUT = ("sending", "delivered", "committed")
SEND_AGAIN = "send it to this node again"
_JSON_COLUMNS = ("settings", "send_to", "inputs")


@dataclass(frozen=True)
class Lost:
    """Something that is not there any more, and what to do. sop: "" where it is not one object."""

    study: str
    series: str
    sop: str
    reason: str
    remedy: str


@dataclass
class Rebuilt:
    """What came of it.

    salvaged   table -> rows taken from the old ledger.   refused  table -> rows read there that cannot be right.
    unread     tables of which pages could not be read.   entered  what was entered from the disk, by kind.
    restarted  jobs queued again, deliveries asked for again.
    moves      files to move, (from, to), once the new ledger is complete.
    studies    Study Instance UID -> counts of instances, rebuilt, lost.
    """

    salvaged: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    entered: Counter[str] = field(default_factory=Counter)
    restarted: Counter[str] = field(default_factory=Counter)
    lost: list[Lost] = field(default_factory=list)
    moves: list[tuple[Path, Path]] = field(default_factory=list)
    studies: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.refused or self.unread or self.entered or self.restarted or self.lost or self.moves)


def rebuild(ledger: Ledger, spool: Spool, tables: Mapping[str, Salvaged], *, sound: bool,
            now: float) -> Rebuilt:
    """Fill the empty `ledger`; rows of a `sound` one are believed. Nothing on disk is touched.

    Raises OSError, sqlite3.Error.
    """
    work = _Rebuild(ledger, spool, sound, now)
    work.done.unread = [name for name in TABLES if tables[name].damaged]
    with ledger.transaction():
        first = ("instance", "conflict", "series", "job", "event")
        work.enter(tables, first)
        work.jobs_of_reports()
        work.enter(tables, [name for name in TABLES if name not in first])
        work.objects()
        work.conflicts()
        work.jobs()
        work.series({row["series_uid"]: row["instances"] for row in tables["series"].rows})
        work.numbers()
        work.summary()
    return work.done


class _Rebuild:
    def __init__(self, ledger: Ledger, spool: Spool, sound: bool, now: float) -> None:
        self._ledger, self._spool, self._sound, self._now = ledger, spool, sound, now
        self._reports: dict[int, dict[str, Any]] = {}  # of jobs that were entered from them
        self._orphans: set[str] = set()  # series whose derived one nobody knows how it was made
        self._entered_of: Counter[str] = Counter()
        self._grown: set[str] = set()  # series of which objects were entered
        self.done = Rebuilt()

    # --- rows of the old ledger

    def enter(self, tables: Mapping[str, Salvaged], names: Iterable[str]) -> None:
        with self._ledger.transaction() as db:
            for name in names:
                columns = [dict(row) for row in self._ledger.query(f"PRAGMA table_info({name})")]
                known = {column["name"] for column in columns}
                taken = refused = 0
                for whole in tables[name].rows:
                    row = {key: value for key, value in whole.items() if key in known}
                    try:
                        if name == "job":
                            self._mend_texts(row)
                        if not self._sound and not sound_row(name, row, columns):
                            raise ValueError
                        db.execute(f"INSERT INTO {name} ({', '.join(row)}) VALUES "
                                   f"({', '.join(f':{key}' for key in row)})", row)
                        taken += 1
                    except (ValueError, OverflowError, sqlite3.IntegrityError):  # ValueError: also no UTF-8
                        refused += 1
                self.done.salvaged[name] = taken
                if refused:
                    self.done.refused[name] = refused

    # --- jobs

    def _mend_texts(self, row: dict[str, Any]) -> None:
        """A report that is no JSON any more is that of its folder, or made anew; progress is over in any case.

        Raises ValueError where what was asked for is no JSON: the row is refused, its folder may tell it.
        """
        if not all(_is_json(row.get(key)) for key in _JSON_COLUMNS):
            raise ValueError
        for key in ("report", "progress"):
            if row.get(key) is None or _is_json(row[key]):
                continue
            told = report_in(self._spool.data_dir / "derived" / str(row["id"])) if key == "report" else None
            if told is not None and told["identity"] == row["identity"]:
                told.pop("job", None)
                row[key] = json.dumps(told)
            else:
                row[key] = None
            self.done.entered["texts"] += 1

    def jobs_of_reports(self) -> None:
        """Enter the job of each derived folder whose job is unknown, the newest first; it counts as sent: perhaps it
        was. One that a person held or cancelled stays so, if the history still tells, and one that was replaced."""
        for folder in sorted(self._numbered("derived"), key=lambda folder: -int(folder.name)):
            report = report_in(folder)
            if report is None or self._ledger.query(
                    "SELECT 1 FROM job WHERE id = ? OR identity = ?", (int(folder.name), report["identity"])):
                continue
            recipe = report.pop("job", None)
            if _usable(recipe):
                self._enter_job(int(folder.name), folder, report, recipe)
            else:
                self._orphans.add(str(report.get("source", {}).get("series_uid", "")))
        for folder in self._numbered("derived"):
            if not self._ledger.query("SELECT 1 FROM job WHERE id = ?", (int(folder.name),)):
                self._strange(folder)

    def _strange(self, folder: Path) -> None:
        """A derived folder that tells too little to bring its job back must not lie where another job would build."""
        source = (report_in(folder) or {}).get("source", {})
        target = self._spool.data_dir / "damaged" / f"derived-{folder.name}.{int(self._now)}"
        self.done.moves.append((folder, target))
        self.done.lost.append(Lost(str(source.get("study_uid", "")), str(source.get("series_uid", "")), "",
                                   f"the job of derived/{folder.name} is not known and its report does not tell it; "
                                   f"put aside as {self._spool.relative(target)}", "look whether its peers have it"))

    def _enter_job(self, job_id: int, folder: Path, report: dict[str, Any], recipe: dict[str, Any]) -> None:
        row = {key: json.dumps(recipe[key], sort_keys=True) if key in _JSON_COLUMNS else recipe[key] for key in RECIPE}
        whole = _is_whole(folder, report["derived_instances"], report)
        before = self._ledger.query("SELECT to_state FROM event WHERE job_id = ? AND kind = 'job' AND to_state != '' "
                                    "ORDER BY id DESC LIMIT 1", (job_id,))
        state = before[0]["to_state"] if before and before[0]["to_state"] in STOPPED else "sending"
        if self._ledger.query("SELECT 1 FROM job WHERE series_uid = ? AND id > ?", (row["series_uid"], job_id)):
            state = "superseded"
        row |= {"id": job_id, "identity": report["identity"], "run_after": self._now, "attempts": 0,
                "state": "queued" if state == "sending" and not whole else state, "code": "repaired",
                "reason": "entered again from its report: the ledger had lost it"}
        if whole:
            row |= {"built_at": (folder / REPORT_FILE).stat().st_mtime, "report": json.dumps(report),
                    "derived_series_uid": report["derived_series_uid"], "derived_path": self._spool.relative(folder),
                    "derived_instances": report["derived_instances"]}
        with self._ledger.transaction() as db:
            db.execute(f"INSERT INTO job ({', '.join(row)}) VALUES ({', '.join(f':{key}' for key in row)})", row)
            self._ledger.event("job", now=self._now, study_uid=row["study_uid"], series_uid=row["series_uid"],
                               job_id=job_id, to_state=row["state"], code="repaired", reason=row["reason"])
        self._reports[job_id] = report
        self.done.entered["jobs"] += 1

    def jobs(self) -> None:
        """No job runs; what is to be sent is there and has its deliveries; the PSFs that reports tell are known."""
        with self._ledger.transaction() as db:
            for row in self._ledger.query("SELECT id FROM job ORDER BY id"):
                job = self._ledger.job(row["id"])
                path = job["derived_path"]
                whole = path is not None and _is_whole(
                    self._spool.absolute(path), job["derived_instances"], job["report"] or {})
                if job["state"] == "running" or (job["state"] in ("built", "sending") and not whole):
                    why = "it ran when the ledger was damaged" if job["state"] == "running" else (
                        "its derived series is not whole on disk any more: it is made again, under the same UIDs")
                    db.execute("UPDATE job SET state = 'queued', code = 'repaired', reason = ?, run_after = ?, "
                               "lease_owner = NULL, lease_until = NULL, progress = NULL, derived_path = NULL, "
                               "attempts = max(0, attempts - 1) WHERE id = ?", (why, self._now, job["id"]))
                    self._told(job, "queued", why)
                    self.done.restarted["jobs"] += 1
                elif job["state"] in ("built", "sending", "delivered") and whole:
                    self._deliveries(db, job)
                if job["id"] in self._reports:
                    self._psf(job)

    def _deliveries(self, db: sqlite3.Connection, job: dict[str, Any]) -> None:
        """A delivery that nobody knows of waits: to send the same instances again is harmless."""
        missing = set(job["send_to"]) - {row["peer"] for row in self._ledger.deliveries(job["id"])}
        for peer in sorted(missing):
            db.execute("INSERT INTO delivery (job_id, peer, state, reason, next_at, created_at) "
                       "VALUES (?, ?, 'waiting', 'the ledger had lost it', ?, ?)",
                       (job["id"], peer, self._now, self._now))
            self.done.restarted["deliveries"] += 1
        if missing and job["state"] == "delivered":
            db.execute("UPDATE job SET state = 'sending', finished_at = NULL WHERE id = ?", (job["id"],))
            self._told(job, "sending", "a delivery of it was lost from the ledger: it is sent again")

    def _told(self, job: dict[str, Any], state: str, why: str) -> None:
        self._ledger.event("job", now=self._now, study_uid=job["study_uid"], series_uid=job["series_uid"],
                           job_id=job["id"], from_state=job["state"], to_state=state, code="repaired", reason=why)

    def _psf(self, job: dict[str, Any]) -> None:
        report = self._reports[job["id"]]
        if "scanner" in report and not self._ledger.query(
                "SELECT 1 FROM psf WHERE kind = 'found' AND source = ?", (report["derived_series_uid"],)):
            keep_found(self._ledger, job, report, software_version=__version__, now=self._now)

    # --- objects

    def objects(self) -> None:
        """Every file with its digest against its row, every row against the disk."""
        rows = {row["path"]: dict(row) for row in self._ledger.query("SELECT * FROM instance")}
        unknown = []
        for path in sorted((self._spool.data_dir / "objects").glob("*/*/*.dcm")):
            row = rows.pop(self._spool.relative(path), None)
            if row is None:
                unknown.append(path)
            elif why := flaw(path, row):
                self._put_aside(path, row["study_uid"], row["series_uid"], row["sop_instance_uid"], why)
                self._forget(row)
        for row in rows.values():
            if not self._purged(row["series_uid"]):
                self._lose(row["study_uid"], row["series_uid"], row["sop_instance_uid"], "its file is gone")
                self._forget(row)
        for path in unknown:
            self._unknown(path)

    def _unknown(self, path: Path) -> None:
        study, series, name = path.parent.parent.name, path.parent.name, path.stem
        try:
            stored = read_stored(path)
            index = stored.index
            if (study, series) != (index.study_uid, index.series_uid) or not (
                    name == index.sop_instance_uid or name.startswith(f"{index.sop_instance_uid}.got")):
                raise CannotUnderstand("its UIDs are not those of its place")
            if not all(map(valid_uid, (study, series, index.sop_instance_uid))):
                raise CannotUnderstand("its UIDs are none")
        except (OSError, CannotUnderstand) as error:
            self._put_aside(path, study, series, name, str(error))
            return
        known = self._ledger.known(index.sop_instance_uid)
        if known is None:
            self._ledger.add_instances([self._row(stored, path, path)])
            self.done.entered["instances"] += 1
            self._entered_of[study] += 1
            self._grown.add(series)
        elif known["sha256"] == stored.sha256:  # a second copy: two processes kept it at the same moment
            self.done.moves.append((path, self._aside(path)))
        else:
            target = self._spool.conflict_path(index.sop_instance_uid, stored.sha256)
            self._ledger.add_instances([self._row(stored, path, target)])
            self.done.moves.append((path, target))
            self.done.entered["conflicts"] += 1

    def conflicts(self) -> None:
        """Other bytes under a known UID, kept aside, whose row is lost."""
        rows = {row["path"] for row in self._ledger.query("SELECT path FROM conflict")}
        for path in sorted((self._spool.data_dir / "conflicts").glob("*.dcm")):
            if self._spool.relative(path) in rows:
                continue
            try:
                stored = read_stored(path)
            except (OSError, CannotUnderstand):
                continue  # it was never in use, and stays where it is
            known = self._ledger.known(stored.index.sop_instance_uid)
            if known is not None and known["sha256"] != stored.sha256:
                self._ledger.add_instances([self._row(stored, path, path)])
                self.done.entered["conflicts"] += 1

    def _row(self, stored: Stored, path: Path, target: Path) -> InstanceRow:
        index = stored.index
        return InstanceRow(
            sop_instance_uid=index.sop_instance_uid, sop_class_uid=index.sop_class_uid, study_uid=index.study_uid,
            series_uid=index.series_uid, transfer_syntax_uid=stored.transfer_syntax_uid,
            path=self._spool.relative(target), bytes=stored.bytes, sha256=stored.sha256, calling_ae=stored.calling_ae,
            address="", received_at=min(path.stat().st_mtime, self._now), position=index.position,
            orientation=index.orientation, frames=index.frames, modality=index.modality,
            accession_number=index.accession_number, series_number=index.series_number,
            series_description=index.series_description)

    def _put_aside(self, path: Path, study: str, series: str, sop: str, why: str) -> None:
        target = self._aside(path)
        self.done.moves.append((path, target))
        self._lose(study, series, sop, f"{why}; put aside as {self._spool.relative(target)}")

    def _aside(self, path: Path) -> Path:
        return self._spool.data_dir / "damaged" / f"{path.name}.{int(self._now)}"

    def _lose(self, study: str, series: str, sop: str, why: str) -> None:
        self.done.lost.append(Lost(study, series, sop, why, SEND_AGAIN))

    def _forget(self, row: Mapping[str, Any]) -> None:
        with self._ledger.transaction() as db:
            db.execute("DELETE FROM instance WHERE sop_instance_uid = ?", (row["sop_instance_uid"],))

    def _purged(self, series_uid: str) -> bool:
        """Whether the files of the series were removed on purpose ([retention])."""
        return was_purged(self._ledger, series_uid) or bool(
            self._ledger.query("SELECT 1 FROM memo WHERE key = ?", (MEMO + series_uid,)))

    # --- series

    def series(self, counts_before: Mapping[str, int]) -> None:
        """Their counts, and the state from which each goes on."""
        self._without_row()
        told = Counter(lost.series for lost in self.done.lost if lost.sop)
        for uid, before in counts_before.items():
            known = self._ledger.query("SELECT study_uid FROM series WHERE series_uid = ?", (uid,))
            missing = before - len(self._ledger.instances(uid)) - told[uid]
            if known and missing > 0 and not self._purged(uid):
                self._lose(known[0]["study_uid"], uid, "", f"{missing} of its objects are unknown and not on disk")
        with self._ledger.transaction() as db:
            lost = {one.series for one in self.done.lost}
            for row in self._ledger.query("SELECT * FROM series"):
                here = self._ledger.instances(row["series_uid"])
                # Its sender may have been in the middle of it: the wait for quiet begins anew.
                last_at = self._now if row["series_uid"] in self._grown else min(row["last_at"], self._now)
                db.execute("UPDATE series SET instances = ?, last_at = ? WHERE series_uid = ?",
                           (len(here), last_at, row["series_uid"]))
                self._go_on(dict(row), {one["sop_instance_uid"] for one in here}, row["series_uid"] in lost)

    def _without_row(self) -> None:
        """Series of which the instances are known and the files were removed on purpose: nothing is left to read."""
        with self._ledger.transaction() as db:
            for row in self._ledger.query(
                    "SELECT series_uid, study_uid, calling_ae, count(*) AS n, min(received_at) AS first, "
                    "max(received_at) AS last FROM instance WHERE series_uid NOT IN (SELECT series_uid FROM series) "
                    "GROUP BY series_uid"):
                path = self._first_file(row["series_uid"])
                index = read_stored(path).index if path else None
                db.execute(
                    "INSERT INTO series (series_uid, study_uid, modality, accession_number, series_number, "
                    "series_description, calling_ae, state, first_at, last_at, instances, purged_at) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
                        row["series_uid"], row["study_uid"], index.modality if index else "",
                        index.accession_number if index else "", index.series_number if index else "",
                        index.series_description if index else "", row["calling_ae"],
                        "receiving" if index else "ignored", row["first"], row["last"], row["n"],
                        None if index else self._now))
                self.done.entered["series"] += 1

    def _first_file(self, series_uid: str) -> Path | None:
        for one in self._ledger.instances(series_uid):
            if (path := self._spool.absolute(one["path"])).is_file():
                return path
        return None

    def _go_on(self, row: dict[str, Any], here: set[str], lost: bool) -> None:
        jobs = self._ledger.jobs_of_series(row["series_uid"])
        state, code, reason = row["state"], row["code"], row["reason"]
        made = any(here <= set(job["inputs"]) for job in jobs)
        sent = any(job["state"] in OUT for job in jobs)
        if not jobs and (row["series_uid"] in self._orphans or (state in ("matched", "receiving")
                                                               and self._was_sent(row["series_uid"]))):
            state, code = "held", UNKNOWN_JOB
            reason = ("a derived series was made of it, and the ledger has lost how. Remedy: nothing, if the peers "
                      f"have it; `dicomnode release {row['series_uid']}` makes another one")
        elif lost and not sent and (state != "ignored" or row["is_guide"]):
            state, code = "held", LOST
            reason = ("objects of it were lost with the damage of the ledger or the disk. Remedy: send the whole "
                      f"series again, or `dicomnode release {row['series_uid']}` to go on without them")
        elif made and (state in ("receiving", "waiting", "complete") or (state == "ignored" and not row["modality"])):
            state, code, reason = "matched", "", ""
        elif (state == "matched" and not jobs) or state == "complete":
            state, code, reason = "receiving", "repaired", "its job was lost from the ledger: it is looked at again"
        if (state, code) == (row["state"], row["code"]):
            return
        with self._ledger.transaction() as db:
            db.execute("UPDATE series SET state = ?, code = ?, reason = ?, until = NULL WHERE series_uid = ?",
                       (state, code, reason, row["series_uid"]))
            self._ledger.event("series", now=self._now, study_uid=row["study_uid"], series_uid=row["series_uid"],
                               from_state=row["state"], to_state=state, code=code or "repaired", reason=reason)

    def _was_sent(self, series_uid: str) -> bool:
        return bool(self._ledger.query("SELECT 1 FROM event WHERE series_uid = ? AND kind IN ('job', 'delivery') AND "
                                       f"to_state IN {OUT} LIMIT 1", (series_uid,)))

    # --- the end

    def numbers(self) -> None:
        """No job gets the number of one that has left something on disk or in the history."""
        highest = [row[0] or 0 for sql in ("SELECT max(job_id) FROM event", "SELECT max(id) FROM job",
                                           "SELECT seq FROM sqlite_sequence WHERE name = 'job'")
                   for row in self._ledger.query(sql)]
        highest += [int(folder.name) for name in ("derived", "checkpoints") for folder in self._numbered(name)]
        with self._ledger.transaction() as db:
            db.execute("DELETE FROM sqlite_sequence WHERE name = 'job'")
            db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('job', ?)", (max([0, *highest]),))

    def summary(self) -> None:
        for row in self._ledger.query("SELECT study_uid, count(*) AS n FROM instance GROUP BY study_uid"):
            self.done.studies[row["study_uid"]] = {"instances": row["n"], "entered": 0, "lost": 0}
        for study, count in self._entered_of.items():
            self.done.studies[study]["entered"] = count
        for lost in self.done.lost:
            self.done.studies.setdefault(lost.study, {"instances": 0, "entered": 0, "lost": 0})["lost"] += 1
        done = self.done
        self._ledger.event("node", now=self._now, code="repaired", reason=(
            f"{sum(done.salvaged.values())} rows salvaged, {sum(done.refused.values())} refused; from the disk "
            f"{_counted(done.entered)}; again {_counted(done.restarted)}; {len(done.lost)} lost"))

    def _numbered(self, name: str) -> Iterator[Path]:
        folder = self._spool.data_dir / name
        return (path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.isdecimal()
                and len(path.name) < 12)


def _counted(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())) or "nothing"


def _is_json(text: Any) -> bool:
    try:
        json.loads(text)
    except (ValueError, TypeError):
        return False
    return True


def _usable(recipe: Any) -> bool:
    return isinstance(recipe, dict) and set(RECIPE) <= set(recipe)


def _is_whole(folder: Path, instances: int | None, report: Mapping[str, Any]) -> bool:
    """Whether the derived files are there as they were built."""
    files = sorted(folder.glob("*.dcm"))
    if len(files) != instances:
        return False
    digest = sha256()
    for path in files:
        digest.update(path.read_bytes())
    return report.get("files_sha256", "") in ("", digest.hexdigest()) and companions.whole(folder, report)
