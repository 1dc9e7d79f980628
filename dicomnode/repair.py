"""`dicomnode repair`: a damaged ledger is replaced by one made of what can be read of it and of what lies on disk.

    repair.tmp/                   the work: a copy of the old ledger, the new one in the making
    ledger.repaired.sqlite3       the new one, complete; while it is there no process opens the ledger
    ledger.damaged-DATE.sqlite3   the old one, with -wal where it had one; nothing here ever deletes it
    damaged/                      files of objects that are not what was received

Until the new ledger is complete nothing of the old one is touched; from then on only steps are left that can be taken
twice. So a repair that was interrupted is simply run again. Node stopped: the locks of receiver and worker are held.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dicomnode.errors import LedgerCorrupt, NodeError
from dicomnode.ledger import SCHEMA_VERSION, Ledger
from dicomnode.migrations import repaired_path
from dicomnode.rebuild import Rebuilt, rebuild
from dicomnode.salvage import quick_check, read_tables
from dicomnode.spool import Spool, fsync_dir

__all__ = ["Report", "repair"]

LOCKS = ("receiver.lock", "work.lock")
SIDES = ("-wal", "-shm")
_MAGIC = b"SQLite format 3\0"


@dataclass
class Report:
    """What was found and done. dry_run: nothing was changed. completed: an interrupted repair was brought to its end.

    damage     what sqlite found wrong with the old ledger; nothing: it is sound.
    set_aside  the name of the old ledger; "" where it stays.   rebuilt  None: nothing was looked at.
    """

    dry_run: bool
    completed: bool = False
    damage: list[str] = field(default_factory=list)
    set_aside: str = ""
    rebuilt: Rebuilt = field(default_factory=Rebuilt)

    @property
    def needed(self) -> bool:
        """Whether there was anything to repair."""
        return bool(self.damage) or self.rebuilt.changed

    def as_json(self) -> dict[str, Any]:
        done = self.rebuilt
        return {
            "dry_run": self.dry_run, "completed": self.completed, "needed": self.needed, "damage": self.damage,
            "set_aside": self.set_aside, "salvaged": done.salvaged, "refused": done.refused, "unread": done.unread,
            "entered": dict(done.entered), "restarted": dict(done.restarted),
            "lost": [asdict(lost) for lost in done.lost], "studies": done.studies,
        }

    def text(self) -> str:
        done = self.rebuilt
        lines = ["An interrupted repair was brought to its end."] if self.completed else []
        if not self.needed:
            return "\n".join([*lines, "Ledger and objects are sound: nothing to repair."]) + "\n"
        lines += [f"The ledger is damaged: {self.damage[0]}" if self.damage else "The ledger file is sound.",
                  f"salvaged from it   {_listed(done.salvaged)}"]
        lines += [f"not believed       {_listed(done.refused)}"] if done.refused else []
        lines += [f"pages unreadable   {', '.join(done.unread)}"] if done.unread else []
        lines += [f"from the disk      {_listed(done.entered)}", f"done again         {_listed(done.restarted)}",
                  f"lost               {len(done.lost)}"]
        for study, counts in sorted(done.studies.items()):
            if counts["entered"] or counts["lost"]:
                lines.append(f"study {study}: {counts['instances']} objects, {counts['entered']} of them entered from "
                             f"the disk, {counts['lost']} lost")
                lines += [f"    series {lost.series}{f' object {lost.sop}' if lost.sop else ''}: {lost.reason}. "
                          f"Remedy: {lost.remedy}." for lost in done.lost if lost.study == study]
        if "psf" in done.unread:
            lines.append("Calibrated PSFs may be lost: `dicomnode psf` lists what is known; calibrate what is missing.")
        if self.dry_run:
            lines.append("Nothing was changed. `dicomnode repair` does it.")
        elif self.set_aside:
            lines.append(f"The old ledger is kept as {self.set_aside}.")
        return "\n".join(lines) + "\n"


def repair(data_dir: Path, *, now: float, dry_run: bool = False) -> Report:
    """Look at the ledger and every object (with its digest); mend what is not sound, unless `dry_run`.

    Raises NodeError where the node runs, LedgerCorrupt for a ledger of a newer version, OSError (disk full): then
    nothing is changed, or it is to be run again.
    """
    if not data_dir.is_dir():
        raise NodeError(f"there is no data directory {data_dir}. Remedy: look at node.data_dir.")
    spool = Spool(data_dir)
    with _stopped(data_dir):
        report = Report(dry_run)
        if _new(spool).is_file() and not dry_run:
            report.set_aside, report.completed = _swap(spool, now), True
        work = data_dir / "repair.tmp"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(mode=0o700)
        try:
            _make(spool, work, report, now)
            if report.needed and not dry_run:
                _put_in_place(spool, work, report, now)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return report


def _make(spool: Spool, work: Path, report: Report, now: float) -> None:
    """The new ledger in `work`, from a copy of the old one: reading changes a file that has a write-ahead log."""
    old = work / "old.sqlite3"
    for side in ("", *SIDES[:1]):
        with suppress(FileNotFoundError):
            shutil.copyfile(f"{spool.ledger_path}{side}", f"{old}{side}")
    _require_known(old)
    report.damage = quick_check(old) if old.is_file() else ["there is none"]
    objects = list((spool.data_dir / "objects").glob("*/*/*.dcm"))
    hints = {"instance": [(path.stem,) for path in objects], "series": [(path.parent.name,) for path in objects]}
    tables = read_tables(old, hints)
    with Ledger(work / "ledger.sqlite3") as ledger:
        report.rebuilt = rebuild(ledger, spool, tables, sound=not report.damage, now=now)
        ledger.check()
    # The last connection has taken the write-ahead log in and removed it: the file is all there is.


def _require_known(path: Path) -> None:
    with suppress(FileNotFoundError), path.open("rb") as file:
        head = file.read(100)
        version = int.from_bytes(head[60:64], "big")  # user_version: sqlite.org/fileformat.html section 1.3
        if head.startswith(_MAGIC) and SCHEMA_VERSION < version < 1000:
            raise LedgerCorrupt(f"the ledger has schema version {version}, this software knows {SCHEMA_VERSION}. "
                                "Remedy: repair it with the software version that wrote it.")


def _put_in_place(spool: Spool, work: Path, report: Report, now: float) -> None:
    # Objects first: an interrupted repair must find them aside, not take them for whole ones without a row.
    folders = set()
    for source, target in report.rebuilt.moves:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        _give(target.parent, spool.data_dir)
        os.replace(source, target)
        folders |= {source.parent, target.parent, spool.data_dir}
    for folder in folders:
        fsync_dir(folder)
    made = work / "ledger.sqlite3"
    _give(made, spool.data_dir)
    with made.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(made, _new(spool))
    fsync_dir(spool.data_dir)
    report.set_aside = _swap(spool, now)


def _swap(spool: Spool, now: float) -> str:
    """The complete new ledger to its place, the old one aside under its date: that name, "" where there was none.

    Each step may be repeated.

    The old write-ahead log goes before the new file comes: sqlite would play it into that.
    """
    path = spool.ledger_path
    date = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    name, number = f"ledger.damaged-{date}.sqlite3", 1
    while (path.parent / name).exists():
        name, number = f"ledger.damaged-{date}-{number}.sqlite3", number + 1
    for side in ("", *SIDES):
        with suppress(FileNotFoundError):
            os.link(f"{path}{side}", path.parent / f"{name}{side}")
    fsync_dir(path.parent)
    for side in SIDES:
        Path(f"{path}{side}").unlink(missing_ok=True)
    fsync_dir(path.parent)
    os.replace(_new(spool), path)
    fsync_dir(path.parent)
    return name if (path.parent / name).exists() else ""


def _give(path: Path, data_dir: Path) -> None:
    """To whom the data directory belongs: repaired by root, the ledger must still be the node's."""
    if os.geteuid() == 0:
        owner = data_dir.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def _new(spool: Spool) -> Path:
    return repaired_path(spool.ledger_path)


@contextmanager
def _stopped(data_dir: Path) -> Iterator[None]:
    with ExitStack() as held:
        for name in LOCKS:
            lock = held.enter_context((data_dir / name).open("a"))
            _give(data_dir / name, data_dir)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise NodeError(f"the node runs in {data_dir} ({name} is taken). Remedy: stop it, then repair; it "
                                "must not write meanwhile.") from error
        yield


def _listed(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items() if count) or "nothing"
