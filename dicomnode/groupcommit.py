"""Keeping received objects: each association makes its own file durable, one ledger transaction serves many of them.

Order for one object: fsynced in incoming/ (the caller), moved to its place, folder fsynced, row committed, and only
then the outcome is told. A file that has no row was never acknowledged and may be replaced; a file that has one is
never replaced by other bytes. In a process, objects of one SOP Instance UID wait for each other; another process that
keeps objects in the same data directory has its own mark in the names of its files, and the ledger decides who was
first.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dicomnode.errors import CannotUnderstand, NodeError
from dicomnode.ledger import InstanceRow, Kept, Ledger
from dicomnode.logs import get_logger
from dicomnode.retention import restored
from dicomnode.spool import Spool
from dicomnode.spoolcheck import healed
from dicomnode.stored import sha256_of

__all__ = ["GroupCommitter"]

_BATCH = 64
log = get_logger("groupcommit")


@dataclass(frozen=True)
class _Arrived:
    """A row whose file is in its place."""

    row: InstanceRow
    outcome: Future[Kept] = field(default_factory=Future)


class GroupCommitter:
    """Owns the commit thread. `keep` may be called from many threads.

    mark  of all processes but the receiver: goes into the names of the files they place in objects/.
    """

    def __init__(self, spool: Spool, ledger: Ledger, *, mark: str = "") -> None:
        self._spool, self._ledger, self._mark = spool, ledger, mark
        self._looking = Ledger(ledger.path)  # a connection of its own: looking does not wait for a commit under way
        self._busy: set[str] = set()
        self._turn = threading.Condition()
        self._queue: queue.SimpleQueue[_Arrived | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self.thread.start()

    def keep(self, written: Path, row: InstanceRow, *, timeout_s: float = 120.0) -> Kept:
        """Take a fsynced file from incoming/; `row.path` is decided here. On return the object is safe: what it was.

        Raises NodeError, OSError, sqlite3.Error, TimeoutError: then it may not be safe.
        """
        with self._alone(row.sop_instance_uid):
            known = self._looking.known(row.sop_instance_uid)
            if known is None:
                target, expected = self._spool.object_path(row.study_uid, row.series_uid, row.sop_instance_uid), "new"
                target = target.with_suffix(f".{self._mark}.dcm") if self._mark else target
            elif known["sha256"] == row.sha256:
                self._restore(written, known, row)
                return "repeat"
            else:
                target, expected = self._spool.conflict_path(row.sop_instance_uid, row.sha256), "conflict"
            self._spool.publish(written, target)
            arrived = _Arrived(replace(row, path=self._spool.relative(target)))
            self._queue.put(arrived)
            kept = arrived.outcome.result(timeout_s)
            if kept != expected and not self._was_second(arrived.row, kept):
                raise NodeError(f"instance {row.sop_instance_uid} was entered by another process at the same moment. "
                                "Remedy: let one receiver alone use the data directory.")
            return kept

    def _was_second(self, row: InstanceRow, kept: Kept) -> bool:
        """Whether another process entered the instance at the same moment, under a file of its own: no harm is done.

        The same bytes are there twice, and ours go; other bytes stay where they are, as the conflict row says.
        """
        first = self._looking.known(row.sop_instance_uid)
        if first is None or first["path"] == row.path:
            return False
        if kept == "repeat":
            self._spool.absolute(row.path).unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """Commit what waits, then end the thread."""
        self._queue.put(None)
        self.thread.join()
        self._looking.close()

    @contextmanager
    def _alone(self, sop_instance_uid: str) -> Iterator[None]:
        with self._turn:
            while sop_instance_uid in self._busy:
                self._turn.wait()
            self._busy.add(sop_instance_uid)
        try:
            yield
        finally:
            with self._turn:
                self._busy.discard(sop_instance_uid)
                self._turn.notify_all()

    def _restore(self, written: Path, known: dict[str, object], row: InstanceRow) -> None:
        """A resend of bytes we know heals an object that is missing or damaged, or was removed ([retention])."""
        place = self._spool.absolute(str(known["path"]))
        series = self._looking.query("SELECT purged_at FROM series WHERE series_uid = ?", (known["series_uid"],))
        if _sound(place, known) and series[0]["purged_at"] is None:
            return
        with self._ledger.transaction() as db:  # nobody removes files of the series meanwhile, or any more
            if not _sound(place, known):
                self._spool.publish(written, place)
                healed(self._ledger, str(known["series_uid"]), now=row.received_at)
                # File meta information is of this request: its sender's AE title may be longer than the first one's.
                db.execute("UPDATE instance SET bytes = ?, transfer_syntax_uid = ? WHERE sop_instance_uid = ?",
                           (row.bytes, row.transfer_syntax_uid, row.sop_instance_uid))
            restored(self._ledger, str(known["series_uid"]), now=row.received_at, actor=row.calling_ae)
        log.warning("A stored object was missing or damaged and is restored from a resend.", action="object_restored",
                    sop_instance_uid=known["sop_instance_uid"])

    def _run(self) -> None:
        open_ = True
        while open_:
            batch = [self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            open_ = None not in batch
            self._commit([arrived for arrived in batch if arrived is not None])

    def _commit(self, batch: list[_Arrived]) -> None:
        try:
            outcomes = self._ledger.add_instances([arrived.row for arrived in batch])
        except BaseException as error:
            log.error("The ledger did not take objects: their senders are told to try again.", action="commit_failed",
                      objects=len(batch), error=f"{type(error).__name__}: {error}")
            for arrived in batch:
                arrived.outcome.set_exception(error)
            return
        for arrived, kept in zip(batch, outcomes, strict=True):
            arrived.outcome.set_result(kept)


def _sound(place: Path, known: dict[str, object]) -> bool:
    """Whether the object is there as it came, byte for byte."""
    try:
        return place.stat().st_size == known["bytes"] and sha256_of(place) == known["sha256"]
    except (OSError, CannotUnderstand):
        return False
