"""Storage commitment as the SCP (PS3.4 Annex J): whether what a peer sent us is safe here, object by object.

The request is entered in the ledger before it is answered, so that no report is lost with a process. The report goes
out on the same association where that stays open, and else on a new one: `Reporter`, in the working process.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, build_role

from dicomnode import scu
from dicomnode.config import Config, Peer
from dicomnode.delivery import backoff_s
from dicomnode.errors import CannotUnderstand, NodeError, PeerUnreachable
from dicomnode.headers import items, text
from dicomnode.lanes import Lanes
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.spool import Spool, valid_uid
from dicomnode.stored import sha256_of

__all__ = ["PUSH_MODEL", "PUSH_MODEL_INSTANCE", "BadRequest", "Reporter", "Request", "Verdict", "answered", "enter",
           "event_report", "owed", "read_request", "verify"]

PUSH_MODEL = UID("1.2.840.10008.1.20.1")
PUSH_MODEL_INSTANCE = UID("1.2.840.10008.1.20.1.1")
ALL_SAFE, SOME_FAILED = 1, 2  # event types, PS3.4 J.3.3
NO_SUCH_OBJECT, CLASS_CONFLICT, PROCESSING_FAILURE = 0x0112, 0x0119, 0x0110  # FailureReason, PS3.3 C.14.1.1
GIVE_UP_S = 86_400.0
DIGEST_BYTES = 64 * 2**20  # of a request: up to here every byte is read again, beyond it sizes are compared
SAME_ASSOCIATION_S = 20.0  # how long the association that asked has the report to itself
log = get_logger("commitscp")
Item = tuple[str, str]  # SOP Class UID, SOP Instance UID


class BadRequest(NodeError):
    """An N-ACTION that is no storage commitment request."""

    status = 0x0115  # PS3.7 Annex C: invalid argument value


@dataclass(frozen=True)
class Request:
    """What a peer asks us to commit to."""

    transaction_uid: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Verdict:
    """What is safe, and what is not with its FailureReason (PS3.3 C.14.1.1)."""

    safe: tuple[Item, ...]
    failed: tuple[tuple[str, str, int], ...]


def read_request(information: Dataset) -> Request:
    """The action information of PS3.4 Table J.3-1. Raises BadRequest."""
    transaction = text(information, "TransactionUID")
    if not valid_uid(transaction):
        raise BadRequest("the request has no TransactionUID")
    asked = tuple((text(item, "ReferencedSOPClassUID"), text(item, "ReferencedSOPInstanceUID"))
                  for item in items(information, "ReferencedSOPSequence"))
    if not asked or not all(valid_uid(uid) for item in asked for uid in item):
        raise BadRequest("ReferencedSOPSequence is empty or has an item without UIDs")
    return Request(transaction, asked)


def enter(ledger: Ledger, request: Request, *, calling_ae: str, address: str, now: float) -> None:
    """Durable on return. The same request again is answered again.

    Raises BadRequest where the transaction is still open for other objects.
    """
    asked = json.dumps(request.items)
    with ledger.transaction() as db:
        old = db.execute("SELECT items FROM commitment_request WHERE transaction_uid = ? AND calling_ae = ? "
                         "AND state = 'waiting'", (request.transaction_uid, calling_ae)).fetchone()
        if old is not None and old["items"] != asked:
            raise BadRequest("this TransactionUID is in use for other objects")
        db.execute(
            "INSERT INTO commitment_request (transaction_uid, calling_ae, address, items, state, asked_at, next_at) "
            "VALUES (?, ?, ?, ?, 'waiting', ?, ?) ON CONFLICT (transaction_uid, calling_ae) DO UPDATE SET "
            "items = excluded.items, address = excluded.address, state = 'waiting', reason = '', attempts = 0, "
            "asked_at = excluded.asked_at, next_at = excluded.next_at, answered_at = NULL",
            (request.transaction_uid, calling_ae, address, asked, now, now + SAME_ASSOCIATION_S))
        ledger.event("reception", now=now, code="commitment", actor=calling_ae, to_state="waiting",
                     reason=f"commitment to {len(request.items)} objects is asked for, transaction "
                            f"{request.transaction_uid}")


def owed(ledger: Ledger, transaction_uid: str, calling_ae: str) -> bool:
    """Whether the peer still waits for the report."""
    return bool(ledger.query("SELECT 1 FROM commitment_request WHERE transaction_uid = ? AND calling_ae = ? "
                             "AND state = 'waiting'", (transaction_uid, calling_ae)))


def answered(ledger: Ledger, transaction_uid: str, calling_ae: str, *, now: float, verdict: Verdict) -> None:
    """The peer took the report."""
    _close(ledger, transaction_uid, calling_ae, "answered", now=now,
           reason=f"{len(verdict.safe)} objects committed, {len(verdict.failed)} not")


def _close(ledger: Ledger, transaction_uid: str, calling_ae: str, state: str, *, now: float, reason: str) -> None:
    with ledger.transaction() as db:
        # The items go: a request may name ten thousand, and those of a year would make much of the ledger.
        changed = db.execute(
            "UPDATE commitment_request SET state = ?, reason = ?, answered_at = ?, items = '[]' "
            "WHERE transaction_uid = ? AND calling_ae = ? AND state = 'waiting'",
            (state, reason, now if state == "answered" else None, transaction_uid, calling_ae)).rowcount
        if changed:
            ledger.event("reception", now=now, code="commitment", actor=calling_ae, from_state="waiting",
                         to_state=state, reason=f"{reason}; transaction {transaction_uid}")


def verify(ledger: Ledger, spool: Spool, asked: Sequence[Item], *, calling_ae: str,
           digest_bytes: int = DIGEST_BYTES) -> Verdict:
    """Each object against the ledger and the file: there, of its size, and, unless the request is large, byte for byte.

    An object whose bytes we did not take, because others were known under its UID, is none that we commit to.
    """
    known = {row["sop_instance_uid"]: row for row in ledger.query(
        "SELECT i.*, s.purged_at FROM instance i LEFT JOIN series s USING (series_uid) "
        "WHERE sop_instance_uid IN (SELECT value FROM json_each(?))", (json.dumps([uid for _, uid in asked]),))}
    aside = {row["sop_instance_uid"] for row in ledger.query(
        "SELECT sop_instance_uid FROM conflict WHERE calling_ae = ? "
        "AND sop_instance_uid IN (SELECT value FROM json_each(?))",
        (calling_ae, json.dumps([uid for _, uid in asked])))}
    read_all = sum(row["bytes"] for row in known.values()) <= digest_bytes
    safe: list[Item] = []
    failed: list[tuple[str, str, int]] = []
    for sop_class, uid in asked:
        row = known.get(uid)
        if row is None or (row["purged_at"] is not None and row["received_at"] <= row["purged_at"]):
            failed.append((sop_class, uid, NO_SUCH_OBJECT))
        elif row["sop_class_uid"] != sop_class:
            failed.append((sop_class, uid, CLASS_CONFLICT))
        elif uid in aside or not _on_disk(spool.absolute(row["path"]), row, read_all):
            failed.append((sop_class, uid, PROCESSING_FAILURE))
        else:
            safe.append((sop_class, uid))
    return Verdict(tuple(safe), tuple(failed))


def _on_disk(path: Path, row: sqlite3.Row, read_all: bool) -> bool:
    try:
        whole = path.stat().st_size == row["bytes"] and (not read_all or sha256_of(path) == row["sha256"])
    except (OSError, CannotUnderstand):
        whole = False
    if not whole:
        log.error("An object that was received is missing or damaged on disk: no commitment.", action="object_damaged",
                  sop_instance_uid=row["sop_instance_uid"])
    return whole


def event_report(transaction_uid: str, verdict: Verdict, *, ae_title: str) -> tuple[int, Dataset]:
    """Event type and event information of PS3.4 Table J.3-2."""
    information = Dataset()
    information.TransactionUID = transaction_uid
    information.RetrieveAETitle = ae_title
    if verdict.safe:
        information.ReferencedSOPSequence = DicomSequence(_references(verdict.safe))
    if verdict.failed:
        information.FailedSOPSequence = DicomSequence(_references(verdict.failed))
    return (SOME_FAILED if verdict.failed else ALL_SAFE), information


def _references(objects: Iterable[Any]) -> list[Dataset]:
    found = []
    for sop_class, uid, *reason in objects:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        if reason:
            item.FailureReason = reason[0]
        found.append(item)
    return found


class Reporter:
    """Sends the reports that no association took; `tick` is called often and returns at once."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], float] = time.time,
                 rng: random.Random | None = None) -> None:
        self._config, self._ledger, self._spool = config, ledger, spool
        self._clock, self._rng = clock, rng or random.Random()
        self.lanes = Lanes("commitment", lambda due: self.report(due["peer"], due["rows"]), self._failed)

    def tick(self) -> None:
        """Start a lane for every peer to which a report is due."""
        due: dict[str, list[dict[str, Any]]] = {}
        now = self._clock()
        far = now + 1.25 * self._config.delivery.retry_max_s + 60  # further ahead lies no wait: the clock was set back
        for row in self._ledger.query("SELECT * FROM commitment_request WHERE state = 'waiting' AND "
                                      "(next_at <= ? OR next_at > ?) ORDER BY next_at", (now, far)):
            due.setdefault(row["calling_ae"], []).append(dict(row))
        self.lanes.start({"id": name, "peer": name, "rows": rows} for name, rows in due.items())

    def close(self, timeout_s: float) -> None:
        """Wait for reports that are on their way; what was not told is told after the next start."""
        self.lanes.close(timeout_s)

    def _failed(self, due: dict[str, Any], error: Exception) -> None:
        for row in due["rows"]:
            self._again(row, f"internal error, see the log: {type(error).__name__}")

    def report(self, calling_ae: str, rows: Sequence[dict[str, Any]]) -> None:
        """One attempt at the reports to one peer, over one association."""
        peer = next((peer for peer in self._config.peer if peer.ae_title == calling_ae and peer.port is not None), None)
        if peer is None:
            for row in rows:
                self._give_up(row, f"no [[peer]] with AE title {calling_ae} has a port. Remedy: set peer.port")
            return
        try:
            self._send(peer, rows)
        except PeerUnreachable as error:
            for row in rows:
                self._again(row, str(error))

    def _send(self, peer: Peer, rows: Sequence[dict[str, Any]]) -> None:
        """Raises PeerUnreachable where there is no association, or it does not take reports."""
        association = scu.open_association(
            peer, [build_context(PUSH_MODEL, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])],
            calling_ae=self._config.node.ae_title, connect_timeout_s=self._config.delivery.connect_timeout_s,
            dimse_timeout_s=self._config.delivery.dimse_timeout_s,
            ext_neg=[build_role(PUSH_MODEL, scp_role=True)])  # we are the SCP: PS3.7 D.3.3.4, PS3.4 J.3.3
        self.lanes.open[rows[0]["calling_ae"]] = association
        try:
            for number, row in enumerate(rows):
                if self.lanes.stop.is_set():
                    return
                self.lanes.moves(row["calling_ae"])
                asked = [(sop_class, uid) for sop_class, uid in json.loads(row["items"])]
                verdict = verify(self._ledger, self._spool, asked, calling_ae=row["calling_ae"])
                event_type, information = event_report(row["transaction_uid"], verdict,
                                                       ae_title=self._config.node.ae_title)
                try:
                    response, _ = association.send_n_event_report(
                        information, event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE, msg_id=number % 65535 + 1)
                except (RuntimeError, ValueError) as error:
                    raise PeerUnreachable(f"{scu.named(peer)} does not take storage commitment reports: {error}. "
                                          "Remedy: let it accept this SOP class with the SCP role.") from error
                if "Status" not in response:
                    raise PeerUnreachable(f"{scu.named(peer)} did not answer a storage commitment report")
                if response.Status != 0x0000:
                    self._again(row, f"the report was answered with status 0x{response.Status:04X}")
                    continue
                answered(self._ledger, row["transaction_uid"], row["calling_ae"], now=self._clock(), verdict=verdict)
        finally:
            scu.leave(association)

    def _again(self, row: dict[str, Any], reason: str) -> None:
        now = self._clock()
        if not owed(self._ledger, row["transaction_uid"], row["calling_ae"]):
            return  # told meanwhile, before a later one of the same association failed
        if now - row["asked_at"] >= GIVE_UP_S:
            self._give_up(row, f"{reason}; given up after {row['attempts'] + 1} attempts")
            return
        wait = backoff_s(row["attempts"] + 1, self._config.delivery, self._rng)
        with self._ledger.transaction() as db:
            db.execute("UPDATE commitment_request SET attempts = attempts + 1, reason = ?, next_at = ? "
                       "WHERE transaction_uid = ? AND calling_ae = ?",
                       (reason, now + wait, row["transaction_uid"], row["calling_ae"]))
        log.warning("A storage commitment report will be sent again.", action="commitment_retry",
                    peer=row["calling_ae"], reason=reason, wait_s=round(wait, 1))

    def _give_up(self, row: dict[str, Any], reason: str) -> None:
        _close(self._ledger, row["transaction_uid"], row["calling_ae"], "given-up", now=self._clock(), reason=reason)
        log.error("A storage commitment report is given up.", action="commitment_given_up", peer=row["calling_ae"],
                  reason=reason)
