"""Group commit: objects that many associations finish at the same time share one ledger transaction.

One thread decides in the order of arrival, inside the ledger's transaction: new objects are moved to their place and
their folders fsynced, then the rows are committed, then each waiting association hears the outcome. A file that has no
row was never acknowledged and may be replaced; a file that has one is never replaced by other bytes.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from dicomnode.errors import NodeError
from dicomnode.ledger import InstanceRow, Kept, Ledger
from dicomnode.logs import get_logger
from dicomnode.spool import Spool, fsync_dir

__all__ = ["Arrived", "GroupCommitter"]

_BATCH = 64
log = get_logger("groupcommit")


@dataclass(frozen=True)
class Arrived:
    """A fsynced file in incoming/ and its row; `row.path` is decided at commit."""

    written: Path
    row: InstanceRow
    outcome: Future[Kept] = field(default_factory=Future)


class GroupCommitter:
    """Owns the commit thread. `keep` may be called from many threads."""

    def __init__(self, spool: Spool, ledger: Ledger) -> None:
        self._spool, self._ledger = spool, ledger
        self._queue: queue.SimpleQueue[Arrived | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
        self._thread.start()

    def keep(self, written: Path, row: InstanceRow, *, timeout_s: float = 120.0) -> Kept:
        """Returns once the object is safe: what it was. Raises NodeError, OSError, TimeoutError: then it is not."""
        arrived = Arrived(written, row)
        self._queue.put(arrived)
        return arrived.outcome.result(timeout_s)

    def close(self) -> None:
        """Commit what waits, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        open_ = True
        while open_:
            batch = [self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            open_ = None not in batch
            waiting = [arrived for arrived in batch if arrived is not None]
            while waiting:
                waiting = self._commit_each_uid_once(waiting)

    def _commit_each_uid_once(self, batch: list[Arrived]) -> list[Arrived]:
        """Commit the first object of each SOP Instance UID; those left must see its row first."""
        first: dict[str, Arrived] = {}
        left = [arrived for arrived in batch if first.setdefault(arrived.row.sop_instance_uid, arrived) is not arrived]
        try:
            outcomes = self._commit(list(first.values()))
        except BaseException as error:
            log.error("The ledger did not take objects: their senders were told to try again.", action="commit_failed",
                      objects=len(first), error=f"{type(error).__name__}: {error}")
            outcomes = dict.fromkeys(first, error)
        for uid, arrived in first.items():
            outcome = outcomes[uid]
            if isinstance(outcome, BaseException):
                arrived.outcome.set_exception(outcome)
            else:
                arrived.outcome.set_result(outcome)
        return left

    def _commit(self, batch: list[Arrived]) -> dict[str, Kept | BaseException]:
        outcomes: dict[str, Kept | BaseException] = {}
        rows: list[InstanceRow] = []
        folders: set[Path] = set()
        with self._ledger.transaction():
            for arrived in batch:
                try:
                    target = self._target(arrived.row)
                    if target is not None:
                        self._spool.place(arrived.written, target)
                        folders.add(target.parent)
                    path = "" if target is None else self._spool.relative(target)
                    rows.append(replace(arrived.row, path=path))
                except (NodeError, OSError) as error:
                    outcomes[arrived.row.sop_instance_uid] = error
            for folder in folders:
                fsync_dir(folder)
            for row, kept in zip(rows, self._ledger.add_instances(rows), strict=True):
                outcomes[row.sop_instance_uid] = kept
        return outcomes

    def _target(self, row: InstanceRow) -> Path | None:
        """Where the object goes: its place, beside (conflict), or nowhere (the same bytes are there already)."""
        known = self._ledger.known(row.sop_instance_uid)
        if known is None:
            return self._spool.object_path(row.study_uid, row.series_uid, row.sop_instance_uid)
        if known["sha256"] != row.sha256:
            return self._spool.conflict_path(row.sop_instance_uid, row.sha256)
        place = self._spool.absolute(known["path"])
        if place.is_file() and place.stat().st_size == known["bytes"]:
            return None
        log.warning("A stored object was missing or short and is restored from a resend.", action="object_restored",
                    sop_instance_uid=row.sop_instance_uid)
        return place
