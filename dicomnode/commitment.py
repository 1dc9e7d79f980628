"""Storage commitment as its SCU (PS3.4 Annex J): what we asked a peer to keep, and what it answered.

A transaction is entered in the ledger before it is asked for: the answer may come on a new association, to the
receiving process, before the N-ACTION has returned. Answers count whenever they come, and each counts once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from pydicom.dataset import Dataset

from dicomnode.headers import integer, items, text
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger

__all__ = ["PROVEN", "REASONS", "answered", "enter", "in_words", "proven", "report", "unanswered",
           "uncommitted"]

#: FailureReason (0008,1197): PS3.3 C.14.1.1
REASONS: Mapping[int, str] = {
    0x0110: "processing failure",
    0x0112: "no such object instance",
    0x0119: "SOP Class and SOP Instance do not belong together",
    0x0122: "SOP Class not supported",
    0x0131: "duplicate transaction UID",
    0x0213: "resource limitation",
}
UNKNOWN_REASON = 0x0110  # an item of FailedSOPSequence without a reason has failed all the same
DUPLICATE_TRANSACTION = 0x0131  # nothing is wrong with the instance: it is asked for again, not sent again
PROVEN = "storage commitment"

SUCCESS, NO_SUCH_EVENT_TYPE, INVALID_ARGUMENT = 0x0000, 0x0113, 0x0115  # PS3.7 10.1.1.1.8
EVENT_TYPES = (1, 2)  # PS3.4 J.3.3: all committed; failures exist

log = get_logger(__name__)


def in_words(reason: int) -> str:
    """
    >>> in_words(0x0112)
    'no such object instance (0x0112)'
    """
    return f"{REASONS.get(reason, 'unknown reason')} (0x{reason:04X})"


def uncommitted(ledger: Ledger, delivery_id: int) -> list[str]:
    """SOP Instance UIDs that the peer has answered to and not yet committed to."""
    return [row["sop_instance_uid"] for row in ledger.query(
        "SELECT sop_instance_uid FROM delivery_instance WHERE delivery_id = ? AND committed_at IS NULL "
        "ORDER BY sop_instance_uid", (delivery_id,))]


def proven(ledger: Ledger, job_id: int) -> bool:
    """Whether every peer has the derived series of a job, by the proof that it is configured to give."""
    rows = ledger.deliveries(job_id)
    return bool(rows) and all(row["state"] == "committed" or (row["state"], row["confirm"]) == ("delivered", "store")
                              for row in rows)


def enter(ledger: Ledger, delivery_id: int, *, transaction_uid: str, ae_title: str, uids: Sequence[str], now: float,
          due_at: float, attempt: bool = True) -> None:
    """Enter a transaction that is about to be asked of the peer with that AE title.

    The delivery is looked at again at `due_at`, or as soon as an answer leaves something open. `attempt`: it counts as
    one; a second transaction for the rest of the same series does not.
    """
    with ledger.transaction() as db:
        db.execute("INSERT INTO commitment (transaction_uid, delivery_id, ae_title, items, state, asked_at, due_at) "
                   "VALUES (?, ?, ?, ?, 'asked', ?, ?)",
                   (transaction_uid, delivery_id, ae_title, json.dumps(list(uids)), now, due_at))
        db.execute("UPDATE delivery SET proofs = proofs + ?, prove_at = ? WHERE id = ?",
                   (int(attempt), due_at, delivery_id))


def unanswered(ledger: Ledger, transaction_uid: str, state: str, reason: str) -> None:
    """The peer did not take the request ("failed"), or did not answer it in time ("late"). A report still counts."""
    with ledger.transaction() as db:
        db.execute("UPDATE commitment SET state = ?, reason = ? WHERE transaction_uid = ? AND state = 'asked'",
                   (state, reason, transaction_uid))


def report(ledger: Ledger, information: Dataset, *, event_type: int, calling_ae: str, now: float) -> int:
    """The status to answer an N-EVENT-REPORT with whose Event Information (PS3.4 Table J.3-2) is this data set."""
    transaction_uid = text(information, "TransactionUID")
    succeeded = [_named(item) for item in items(information, "ReferencedSOPSequence")]
    failed = [(*_named(item), integer(item, "FailureReason") or UNKNOWN_REASON)
              for item in items(information, "FailedSOPSequence")]
    if not transaction_uid or not all(uid for _, uid, *_ in (*succeeded, *failed)):
        log.warning("a storage commitment report cannot be read", action="commitment_unreadable",
                    calling_ae=calling_ae)
        return INVALID_ARGUMENT
    return answered(ledger, transaction_uid=transaction_uid, calling_ae=calling_ae, event_type=event_type,
                    succeeded=succeeded, failed=failed, now=now)


def _named(item: Dataset) -> tuple[str, str]:
    return text(item, "ReferencedSOPClassUID"), text(item, "ReferencedSOPInstanceUID")


def answered(ledger: Ledger, *, transaction_uid: str, calling_ae: str, event_type: int,
             succeeded: Iterable[tuple[str, str]], failed: Iterable[tuple[str, str, int]], now: float) -> int:
    """An N-EVENT-REPORT of storage commitment; the status to answer it with (PS3.7 10.1.1.1.8).

    calling_ae  AE title of the peer at the other end, whoever opened the association
    succeeded   (SOP Class UID, SOP Instance UID) of ReferencedSOPSequence
    failed      (SOP Class UID, SOP Instance UID, FailureReason) of FailedSOPSequence

    One transaction of the ledger. The same report again changes nothing. What it names beyond what was asked is
    ignored; what it fails to name stays unproven. A transaction that we do not know, or that somebody else was asked
    for, is answered 0x0115 and recorded.
    """
    with ledger.transaction() as db:
        rows = ledger.query("SELECT * FROM commitment WHERE transaction_uid = ?", (transaction_uid,))
        if not rows or rows[0]["ae_title"].strip() != calling_ae.strip():
            whose = f"was asked of {rows[0]['ae_title']}" if rows else "is not known here"
            shown = f"{transaction_uid[:64]!r} {whose}"
            ledger.event("security", now=now, code="commitment", actor=calling_ae.strip()[:16],
                         reason=f"storage commitment report refused: transaction {shown}")
            log.warning("storage commitment report refused", action="commitment_refused", calling_ae=calling_ae,
                        reason=shown)
            return INVALID_ARGUMENT
        if event_type not in EVENT_TYPES:
            return NO_SUCH_EVENT_TYPE
        asked = dict(rows[0])
        if asked["answered_at"] is not None:
            return SUCCESS
        items = set(json.loads(asked["items"]))
        reasons = {uid: reason for _, uid, reason in failed if uid in items}
        kept = {uid for _, uid in succeeded} & items - reasons.keys()
        delivery_id = asked["delivery_id"]
        db.executemany("UPDATE delivery_instance SET committed_at = ? WHERE delivery_id = ? AND sop_instance_uid = ? "
                       "AND committed_at IS NULL", [(now, delivery_id, uid) for uid in sorted(kept)])
        # A status that does not confirm makes the delivery send exactly these again.
        db.executemany("UPDATE delivery_instance SET status = ?, comment = ? WHERE delivery_id = ? "
                       "AND sop_instance_uid = ? AND committed_at IS NULL",
                       [(reason, f"not committed: {in_words(reason)}", delivery_id, uid)
                        for uid, reason in sorted(reasons.items()) if reason != DUPLICATE_TRANSACTION])
        text = _summary(len(items), len(kept), list(reasons.values()))
        # The items go: those of a year would make most of the ledger.
        db.execute("UPDATE commitment SET state = ?, reason = ?, items = '[]', answered_at = ? "
                   "WHERE transaction_uid = ?",
                   ("confirmed" if len(kept) == len(items) else "failed", text, now, transaction_uid))
        _conclude(ledger, delivery_id, text, late=asked["state"] == "late", now=now)
        return SUCCESS


def _summary(asked: int, kept: int, reasons: list[int]) -> str:
    """
    >>> _summary(4, 2, [0x0112])
    '2 of 4 instances committed, 1 not: no such object instance (0x0112), 1 not named in the report'
    """
    text = f"{kept} of {asked} instances committed"
    if reasons:
        text += f", {len(reasons)} not: {'; '.join(in_words(reason) for reason in sorted(set(reasons)))}"
    unnamed = asked - kept - len(reasons)
    return text + (f", {unnamed} not named in the report" if unnamed else "")


def _conclude(ledger: Ledger, delivery_id: int, text: str, *, late: bool, now: float) -> None:
    """All instances committed: so is the delivery, whatever became of it meanwhile. If not, the worker looks at it."""
    row = dict(ledger.query("SELECT * FROM delivery WHERE id = ?", (delivery_id,))[0])
    job = ledger.job(row["job_id"])
    answers = ledger.query("SELECT count(*) AS n, count(committed_at) AS committed FROM delivery_instance "
                           "WHERE delivery_id = ?", (delivery_id,))[0]
    count = answers["committed"]
    if row["state"] == "committed":
        return
    if count >= max(job["derived_instances"], answers["n"]):  # what is sent beside the series has its answers too
        ledger.set_delivery(delivery_id, "committed", now=now, prove_at=None,
                            reason=f"{PROVEN} of {count} instances" + (", answered late" if late else ""))
        log.info("derived series committed", action="committed", job=job["id"], peer=row["peer"], late=late)
        dead = any(other["state"] == "dead" for other in ledger.deliveries(job["id"]))
        if job["state"] == "held" and job["code"] == "commitment" and not dead:
            ledger.set_job(job["id"], "built", now=now, reason=f"{row['peer']} has committed after all")
            ledger.settle(job["id"], now=now)
        return
    ledger.event("delivery", now=now, study_uid=job["study_uid"], series_uid=job["series_uid"], job_id=job["id"],
                 from_state=row["state"], to_state=row["state"], code=row["peer"], reason=f"{PROVEN}: {text}")
    if row["state"] == "delivered":
        with ledger.transaction() as db:
            db.execute("UPDATE delivery SET prove_at = ? WHERE id = ?", (now, delivery_id))
