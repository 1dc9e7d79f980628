"""Keeping one object that came, by whatever service: checked, durable, in the ledger. Only then is 0x0000 the answer.

The receiver keeps what peers send it; `Keeper` keeps in another process what that one fetches by C-GET, on the same
path: incoming/, fsync, rename, one ledger transaction for many objects.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom.events import Event

from dicomnode.config import Config
from dicomnode.errors import CannotUnderstand, DataSetMismatch, DiskFull, NodeError
from dicomnode.gate import printable
from dicomnode.groupcommit import GroupCommitter
from dicomnode.intake import Intake, Limits, Request
from dicomnode.ledger import InstanceRow, Kept, Ledger
from dicomnode.logs import get_logger
from dicomnode.objectindex import ObjectIndex
from dicomnode.spool import Spool

__all__ = ["CONFLICT", "Keeper", "keep", "status_of"]

SUCCESS = 0x0000
CONFLICT = 0xB000  # PS3.4 B.2.3 knows no nearer warning; docs/decisions/0005-conflicting-bytes.md

log = get_logger(__name__)


def keep(intake: Intake, index: ObjectIndex, *, spool: Spool, committer: GroupCommitter, address: str,
         now: float) -> Kept:
    """Make an object safe whose data set has come whole; `index` is what `intake.index()` read of it.

    On return it is on disk and in the ledger: what it was. Raises NodeError, OSError, sqlite3.Error, TimeoutError:
    then it may not be safe.
    """
    request = intake.request
    assert request is not None and intake.path is not None  # intake.index() has seen to it
    for ours, theirs, what in ((index.sop_class_uid, request.sop_class_uid, "SOP Class"),
                               (index.sop_instance_uid, request.sop_instance_uid, "SOP Instance")):
        if ours != theirs:
            raise DataSetMismatch(f"{what} UID: request {printable(theirs)}, data set {printable(ours)}")
    spool.object_path(index.study_uid, index.series_uid, index.sop_instance_uid)  # refuses what is not a UID
    intake.sync()
    return committer.keep(intake.path, InstanceRow(
        sop_instance_uid=index.sop_instance_uid, sop_class_uid=index.sop_class_uid, study_uid=index.study_uid,
        series_uid=index.series_uid, transfer_syntax_uid=request.transfer_syntax_uid, path="",
        bytes=intake.file_size, sha256=intake.sha256, calling_ae=request.calling_ae, address=address, received_at=now,
        position=index.position, orientation=index.orientation, frames=index.frames, modality=index.modality,
        accession_number=index.accession_number, series_number=index.series_number,
        series_description=index.series_description))


def status_of(code: int, comment: str) -> Dataset:
    """A response with ErrorComment (0000,0902), VR LO: at most 64 characters."""
    status = Dataset()
    status.Status = code
    status.ErrorComment = printable(comment.encode("ascii", "replace").decode().replace("\\", "/"))
    return status


class Keeper:
    """Keeps what comes by C-GET; `on_c_store` handles EVT_C_STORE of one association with the peer. Close it.

    kept, refused  how many objects were made safe, and why the others were not.
    """

    def __init__(self, config: Config, spool: Spool, ledger: Ledger, *, calling_ae: str, address: str,
                 clock: Callable[[], float]) -> None:
        self._spool, self._ledger, self._clock = spool, ledger, clock
        self._calling_ae, self._address = calling_ae, address
        self._limits = Limits.of(config.reception)
        # The receiver keeps objects at the same time: the two never write the same file.
        self._committer = GroupCommitter(spool, ledger, mark=f"got{os.getpid()}")
        self.kept = 0
        self.refused: list[str] = []

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._committer.close()

    def on_c_store(self, event: Event) -> int | Dataset:
        """Never raises, never answers 0x0000 for what is not safe."""
        request: Any = event.request
        intake = Intake(self._spool, self._limits, lambda: Request(
            sop_class_uid=str(request.AffectedSOPClassUID or ""), calling_ae=self._calling_ae,
            sop_instance_uid=str(request.AffectedSOPInstanceUID or ""),
            transfer_syntax_uid=str(event.context.transfer_syntax)))
        try:
            if request.DataSet is None:
                raise CannotUnderstand("the request came without a data set")
            intake.write(request.DataSet.getbuffer())
            kept = keep(intake, intake.index(), spool=self._spool, committer=self._committer, address=self._address,
                        now=self._clock())
        except NodeError as error:
            return self._refusal(error)
        except (TimeoutError, sqlite3.OperationalError) as error:
            return self._refusal(DiskFull(f"the object cannot be made safe now: {error}"))
        except Exception as error:  # the association must survive, and its peer hear that the object is not safe
            log.exception("An object that was fetched could not be kept.", action="store_failed")
            return self._refusal(NodeError(f"the object could not be kept: {type(error).__name__}"))
        finally:
            intake.discard()
        self.kept += 1
        if kept == "conflict":
            log.warning("Other bytes came under a known SOP Instance UID: kept aside, not used.", action="conflict",
                        sop_instance_uid=str(request.AffectedSOPInstanceUID), calling_ae=self._calling_ae)
            return status_of(CONFLICT, "other bytes known under this UID; kept, not used")
        return SUCCESS

    def _refusal(self, error: NodeError) -> Dataset:
        if not self.refused:  # one line of history for them all: a full disk refuses every one
            reason = f"an object fetched by C-GET answered 0x{error.status:04X}: {error}"
            try:
                self._ledger.event("reception", now=self._clock(), code=type(error).__name__, actor=self._calling_ae,
                                   reason=reason)
            except sqlite3.Error as why:  # the answer to the peer must not depend on it
                log.error(reason, action="store_refused", ledger=str(why))
        self.refused.append(str(error))
        return status_of(error.status, str(error))
