"""What a peer is asked for beyond its C-STORE answers: storage commitment (PS3.4 Annex J), or a count of what it holds.

A delivery whose peer has `confirm` is "delivered" first and "committed" once it is proven. Storage commitment is asked
for by N-ACTION; the answer comes on the same association, for which we stay a little while, or on one that the peer
opens to the receiving process (`commitment.answered` takes both). What it does not commit to is sent again, and only
that. After `commitment_attempts` in vain a peer that may be queried is asked what it holds; a person is told otherwise.
"""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import build_context, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    Verification,
)

from dicomnode import commitment, companions, query, scu
from dicomnode.config import Config, Peer
from dicomnode.delivery import backoff_s, derived_files, stored
from dicomnode.errors import ConfigError, PeerRefused, PeerUnreachable
from dicomnode.lanes import Lanes
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.spool import Spool

__all__ = ["Prover"]

#: Instances in one N-ACTION: two UIDs each, so that the request stays below 100 kB, and what is asked again after a
#: lost answer is bounded. A whole body at twice the slices needs two or three.
MOST = 500
STAY_S = 5.0  # how long we keep the association open for an answer: many peers answer at once, others on a new one
NOT_HELD = 0x0112

log = get_logger(__name__)
Row = dict[str, Any]


class Prover:
    """Asks for what deliveries still owe. `tick` is called often and returns at once; a lane for each peer asks."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], float] = time.time,
                 rng: random.Random | None = None, new_uid: Callable[[], str] | None = None,
                 stay_s: float = STAY_S) -> None:
        self._config, self._ledger, self._spool = config, ledger, spool
        self._clock, self._rng, self._stay_s = clock, rng or random.Random(), stay_s
        self._new_uid = new_uid or functools.partial(_uid_below, config.node.uid_root)
        self._misses: dict[int, int] = {}  # by delivery: how often in a row its peer could not be asked
        self.lanes = Lanes("prove", self.prove, self._failed)

    def tick(self) -> None:
        """Start a lane for every peer of which something is due."""
        self.lanes.start(dict(row) for row in self._ledger.query(
            "SELECT delivery.* FROM delivery JOIN job ON job.id = delivery.job_id WHERE delivery.prove_at <= ? "
            "AND delivery.state = 'delivered' AND job.state IN ('sending', 'delivered', 'held') "
            "ORDER BY delivery.prove_at, delivery.id", (self._clock(),)))

    def close(self, timeout_s: float) -> None:
        """Stop; a peer that does not answer in time is aborted."""
        self.lanes.close(timeout_s)

    def _failed(self, row: Row, error: Exception) -> None:
        self._later(row, f"internal error, see the log: {type(error).__name__}: {error}")

    def prove(self, row: Row) -> None:
        """One step of the proof of a delivery (a row of the table), its outcome entered in the ledger."""
        try:
            peer = self._config.named_peer(row["peer"])
            job = self._ledger.job(row["job_id"])
            if peer.confirm == "store":  # the configuration was changed: the answers are enough
                self._set(row, "delivered", reason=row["reason"], confirm="store", prove_at=None)
            elif peer.confirm == "find":
                self._find(row, job, peer)
            else:
                self._commitment(row, job, peer)
        except (PeerUnreachable, ConfigError) as error:
            self._later(row, str(error))

    # --- storage commitment

    def _commitment(self, row: Row, job: Row, peer: Peer) -> None:
        limit = self._config.delivery.commitment_attempts
        with self._ledger.transaction():  # no answer slips in between what is read and when is looked again
            open_uids, due = self._open(row)
            statuses = self._ledger.statuses(row["id"])
            left = [uid for uid in commitment.uncommitted(self._ledger, row["id"]) if uid not in open_uids]
            if due and (row["proofs"] >= limit or not left):
                self._look_again(row, min(due))
                return
        failed = [uid for uid in left if not stored(statuses.get(uid))]
        if failed and row["proofs"] < limit:
            self._resend(row, len(failed), f"not committed: {_reasons(statuses, failed)}")
        elif failed:
            self._give_up(row, f"{peer.name} does not commit to {len(failed)} of {len(statuses)} instances, "
                               f"though they were sent again: {_reasons(statuses, failed)}",
                          "look into the log of the peer")
        elif row["proofs"] < limit:
            self._ask(row, job, peer, left)
        elif peer.query:
            self._find(row, job, peer, instead="storage commitment was not given; ")
        else:
            self._give_up(row, f"{peer.name} gave no storage commitment in {row['proofs']} attempts{self._said(row)}",
                          f"it must offer storage commitment, and know our AE title {self._config.node.ae_title} with "
                          "address and port, to answer on an association of its own; or set peer.confirm = \"find\" "
                          "or \"store\"")

    def _open(self, row: Row) -> tuple[set[str], list[float]]:
        """The instances in transactions that may still be answered, and when those are due; overdue ones are late."""
        uids: set[str] = set()
        due: list[float] = []
        for asked in self._ledger.query("SELECT transaction_uid, items, due_at FROM commitment WHERE delivery_id = ? "
                                        "AND state = 'asked'", (row["id"],)):
            if asked["due_at"] > self._clock():
                due.append(asked["due_at"])
                uids.update(json.loads(asked["items"]))
            else:
                commitment.unanswered(self._ledger, asked["transaction_uid"], "late", "no answer in time")
                log.warning("storage commitment was not answered in time", action="commitment_late",
                            job=row["job_id"], peer=row["peer"], transaction=asked["transaction_uid"])
        return uids, due

    def _said(self, row: Row) -> str:
        """What became of the last request, for a person."""
        rows = self._ledger.query("SELECT reason FROM commitment WHERE delivery_id = ? ORDER BY asked_at DESC LIMIT 1",
                                  (row["id"],))
        return f" ({rows[0]['reason']})" if rows and rows[0]["reason"] else ""

    def _ask(self, row: Row, job: Row, peer: Peer, uids: Sequence[str]) -> None:
        """One attempt: a transaction on an association of its own for every MOST instances."""
        files = derived_files(self._spool.absolute(job["derived_path"]))
        missing = [uid for uid in uids if uid not in files]
        if missing:
            self._give_up(row, f"{len(missing)} derived instances are no longer on disk and not committed", "look "
                               "whether the peer has them; `dicomnode cancel` ends the job")
            return
        for start in range(0, len(uids), MOST):
            if self.lanes.stop.is_set() or not self._transact(row, peer, uids[start:start + MOST], files,
                                                              first=start == 0):
                return

    def _transact(self, row: Row, peer: Peer, uids: Sequence[str], files: Mapping[str, scu.StoredObject], *,
                  first: bool) -> bool:
        """N-ACTION, then stay a while for the answer. False where the peer did not take the request.

        Raises PeerUnreachable where there is no association.
        """
        now, transaction_uid = self._clock(), self._new_uid()
        association = scu.open_association(
            peer, [build_context(StorageCommitmentPushModel), build_context(Verification)],
            calling_ae=self._config.node.ae_title, connect_timeout_s=self._config.delivery.connect_timeout_s,
            dimse_timeout_s=self._config.delivery.dimse_timeout_s,
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._on_report, [peer.ae_title])])
        self.lanes.open[peer.name] = association
        try:
            commitment.enter(self._ledger, row["id"], transaction_uid=transaction_uid, ae_title=peer.ae_title,
                             uids=uids, now=now, due_at=now + self._config.delivery.commitment_timeout_s,
                             attempt=first)
            problem = _request(association, transaction_uid, [(files[uid].sop_class_uid, uid) for uid in uids],
                               self._config.delivery.dimse_timeout_s)
            if problem:
                commitment.unanswered(self._ledger, transaction_uid, "failed", problem)
                self._later(row, f"{scu.named(peer)} {problem}")
                return False
            self._misses.pop(row["id"], None)
            until = time.monotonic() + self._stay_s
            while association.is_established and time.monotonic() < until and not self.lanes.stop.is_set():
                if not self._open_still(transaction_uid):
                    break
                time.sleep(0.05)
            return True
        finally:
            scu.leave(association)

    def _open_still(self, transaction_uid: str) -> bool:
        return bool(self._ledger.query("SELECT 1 FROM commitment WHERE transaction_uid = ? AND answered_at IS NULL",
                                       (transaction_uid,)))

    def _on_report(self, event: evt.Event, ae_title: str) -> tuple[int, None]:
        """N-EVENT-REPORT on the association that we asked on."""
        return commitment.report(self._ledger, event.event_information, event_type=int(event.event_type or 0),
                                 calling_ae=ae_title, now=self._clock()), None

    # --- the count

    def _find(self, row: Row, job: Row, peer: Peer, *, instead: str = "") -> None:
        """Committed where the peer lists every instance of the derived series; what it lacks is sent again.

        `instead`: what was tried before in vain; this is then the last attempt.
        """
        uids = self._ledger.statuses(row["id"]).keys()
        how = "C-FIND" if peer.stow_url is None else "QIDO-RS"
        last = bool(instead) or row["proofs"] + 1 >= self._config.delivery.commitment_attempts
        proofs = row["proofs"] + 1
        try:
            held = self._c_find(job, peer) if peer.stow_url is None else self._qido(job, peer)
        except PeerRefused as error:
            if last:
                self._give_up(row, f"{instead}{error}", f"let {peer.name} answer {how} for our AE title", proofs)
            else:
                self._later(row, str(error), proofs=proofs)
            return
        missing = [uid for uid in uids if uid not in held]
        text = f"{instead}{how} finds {len(uids) - len(missing)} of {len(uids)} instances at {peer.name}"
        if not missing:
            self._set(row, "committed", reason=text, prove_at=None, proofs=proofs)
            log.info("derived series found at the peer", action="committed", job=job["id"], peer=peer.name)
        elif last:
            self._give_up(row, text, "look whether the peer has the series, and lists it for our AE title", proofs)
        elif proofs == 1:  # a peer may need a moment until what it stored can be found
            self._later(row, text, proofs=proofs)
        else:
            with self._ledger.transaction():
                self._ledger.put_statuses(row["id"], [(uid, NOT_HELD, f"{how} does not find it") for uid in missing],
                                          now=self._clock())
                self._resend(row | {"proofs": proofs}, len(missing), text)

    def _c_find(self, job: Row, peer: Peer) -> set[str]:
        with query.Asking(peer, query.Times.of(self._config)) as asking:
            return {uid for series in _series(job) for uid in asking.instances(job["study_uid"], series)}

    def _qido(self, job: Row, peer: Peer) -> set[str]:
        from dicomnode.stow import instances

        delivery = self._config.delivery
        return {uid for series in _series(job)
                for uid in instances(peer, job["study_uid"], series, tls=self._config.tls,
                                     connect_timeout_s=delivery.connect_timeout_s, timeout_s=delivery.dimse_timeout_s)}

    # --- outcomes

    def _set(self, row: Row, state: str, **columns: Any) -> None:
        """Change the delivery unless an answer that came meanwhile already did."""
        self._misses.pop(row["id"], None)
        with self._ledger.transaction():
            rows = self._ledger.query("SELECT state FROM delivery WHERE id = ?", (row["id"],))
            if rows[0]["state"] == "delivered":
                self._ledger.set_delivery(row["id"], state, now=self._clock(), **columns)

    def _look_again(self, row: Row, at: float, **columns: Any) -> None:
        """No change of state, no event: only when to look next."""
        columns["prove_at"] = at
        with self._ledger.transaction() as db:
            db.execute(f"UPDATE delivery SET {', '.join(f'{name} = :{name}' for name in columns)} "
                       "WHERE id = :id AND state = 'delivered'", {**columns, "id": row["id"]})

    def _resend(self, row: Row, count: int, why: str) -> None:
        now = self._clock()  # from which the delivery's age counts anew: it was delivered once
        self._set(row, "waiting", next_at=now, created_at=now, attempts=0, prove_at=None, proofs=row["proofs"],
                  reason=f"{count} instances are sent again: {why}")

    def _later(self, row: Row, reason: str, *, proofs: int | None = None) -> None:
        """The peer could not be asked, or needs time: once more later, until give_up_h after the delivery."""
        now = self._clock()
        age_h = (now - (row["done_at"] or now)) / 3600
        misses = self._misses[row["id"]] = self._misses.get(row["id"], 0) + 1
        if age_h >= self._config.delivery.give_up_h:
            self._give_up(row, f"{reason}; not proven in {age_h:.1f} h", "mend the peer")
            return
        wait = backoff_s(misses, self._config.delivery, self._rng)
        self._look_again(row, now + wait, **({"reason": reason} if proofs is None else
                                             {"reason": reason, "proofs": proofs}))
        log.warning("the proof of a delivery is asked for again later", action="proof_retry", job=row["job_id"],
                    peer=row["peer"], reason=reason, wait_s=round(wait, 1))

    def _give_up(self, row: Row, reason: str, remedy: str, proofs: int | None = None) -> None:
        count = max(row["proofs"] if proofs is None else proofs, 1)
        self._set(row, "dead", prove_at=None, proofs=count,
                  reason=f"{reason}. Remedy: {remedy}; then `dicomnode retry job:{row['job_id']}`.")
        log.error("a delivery could not be proven", action="proof_dead", job=row["job_id"], peer=row["peer"],
                  reason=reason)


def _series(job: Row) -> list[str]:
    """The derived series and what went out beside it."""
    return [job["derived_series_uid"], *companions.series_uids(job["report"])]


def _uid_below(root: str) -> str:
    """A new UID; below 2.25 it is made of a UUID (PS3.5 B.2)."""
    return str(generate_uid(prefix=None if root == "2.25" else f"{root}."))


def _request(association: Any, transaction_uid: str, items: Sequence[tuple[str, str]], timeout_s: float) -> str:
    """N-ACTION of a storage commitment request (PS3.4 J.3.2); what the peer has against it, "" where it took it."""
    if not any(context.abstract_syntax == StorageCommitmentPushModel for context in association.accepted_contexts):
        return "does not offer storage commitment"
    information = Dataset()
    information.TransactionUID = transaction_uid
    information.ReferencedSOPSequence = []
    for sop_class_uid, sop_instance_uid in items:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
        information.ReferencedSOPSequence.append(item)
    try:
        status, _ = association.send_n_action(information, 1, StorageCommitmentPushModel,
                                              StorageCommitmentPushModelInstance)
    except (RuntimeError, ValueError) as error:
        return f"closed the association: {error}"
    if "Status" not in status:
        return f"did not answer the request for storage commitment within {timeout_s:g} s"
    if status.Status != 0x0000:
        return f"refused the request for storage commitment: {commitment.in_words(int(status.Status))}"
    return ""


def _reasons(statuses: Mapping[str, int], uids: Sequence[str]) -> str:
    return "; ".join(commitment.in_words(code) for code in sorted({statuses[uid] for uid in uids}))
