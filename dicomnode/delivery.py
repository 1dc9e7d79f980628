"""The delivery queue: every built derived series to every peer of its route, until each instance is confirmed.

What lies beside a series (companions.py) goes with it, behind it, and is waited for like it.

One lane per peer, so that a peer that is down or slow delays nobody else. Only instances without a confirming status
are sent; answers are recorded in batches as they come, so a crash repeats at most one batch, and the peer knows the
repeated instances by their UID. Failures are retried with exponential backoff and jitter until `give_up_h`. What a peer
with `confirm` is asked for beyond its answers is `proof`'s.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.uid import UID

from dicomnode import companions, scu
from dicomnode.config import Config, Delivery, Peer
from dicomnode.errors import ConfigError, NotFound, NothingAccepted, PeerUnreachable, TransitionRefused
from dicomnode.lanes import Lanes
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.scu import StoredObject
from dicomnode.spool import Spool

__all__ = ["Deliverer", "Verdict", "backoff_s", "derived_files", "judge", "stored"]

BATCH = 16  # answers recorded in one transaction: what a kill -9 can make us send again
BATCH_S = 0.5
REFUSALS = 5  # attempts after which a peer that refuses the objects themselves is believed

log = get_logger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What all statuses of one delivery amount to: delivered, or how many instances are missing and why."""

    delivered: bool
    reason: str
    refused: bool = False


def judge(statuses: Iterable[int], *, expected: int) -> Verdict:
    """Delivered when all `expected` instances were answered with success or a warning; warnings are counted.

    `refused` where a status says that the objects themselves are not wanted (PS3.4 B.2.3: 0xA9xx, 0xCxxx; PS3.7 C.5:
    0x01xx): waiting does not mend that, as it does 0xA7xx, out of resources.
    """
    answers = list(statuses)
    stored = [status for status in answers if scu.is_success(status) or scu.is_warning(status)]
    warnings = [status for status in stored if scu.is_warning(status)]
    if len(stored) == expected:
        shown = f" with {len(warnings)} warnings ({_codes(warnings)})" if warnings else ""
        return Verdict(True, f"{expected} instances stored{shown}")
    failed = [status for status in answers if status not in stored]
    shown = f"status {_codes(failed)}" if failed else "not answered"
    refused = bool(failed) and all(status >> 8 in (0xA9, 0x01) or status >> 12 == 0xC for status in failed)
    return Verdict(False, f"{expected - len(stored)} of {expected} instances not stored: {shown}", refused)


def backoff_s(attempts: int, delivery: Delivery, rng: random.Random) -> float:
    """Seconds to wait after the `attempts`-th failure: doubling from retry_s to retry_max_s, spread by -25 to +25 %."""
    steady = min(delivery.retry_max_s, delivery.retry_s * 2.0 ** min(attempts - 1, 40))
    return steady * rng.uniform(0.75, 1.25)


def _codes(statuses: list[int]) -> str:
    return ", ".join(f"0x{status:04X}" for status in sorted(set(statuses)))


class _Recorder:
    """Collects answers and writes them to the ledger in batches."""

    def __init__(self, ledger: Ledger, delivery_id: int, clock: Callable[[], float]) -> None:
        self._ledger, self._delivery_id, self._clock = ledger, delivery_id, clock
        self._pending: list[scu.Answer] = []
        self._written_at = clock()

    def __call__(self, answer: scu.Answer) -> None:
        self._pending.append(answer)
        if len(self._pending) >= BATCH or abs(self._clock() - self._written_at) >= BATCH_S:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            self._ledger.put_statuses(
                self._delivery_id, [(a.sop_instance_uid, a.status, a.comment) for a in self._pending],
                now=self._clock())
        self._pending.clear()
        self._written_at = self._clock()


class Deliverer:
    """Sends what is due. `tick` is called often and returns at once; threads do the sending."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, *, clock: Callable[[], float] = time.time,
                 rng: random.Random | None = None) -> None:
        self._config, self._ledger, self._spool = config, ledger, spool
        self._clock, self._rng = clock, rng or random.Random()
        self._lanes = Lanes("deliver", self.send, self._failed)
        self._threads, self._open, self._stop = self._lanes.threads, self._lanes.open, self._lanes.stop

    def tick(self) -> None:
        """Start a thread for every peer that has something due and none running."""
        self._lanes.start(self._ledger.due_deliveries(now=self._clock()))

    def close(self, timeout_s: float) -> None:
        """Stop after the instance that is on its way; a peer that does not answer in time is aborted."""
        self._lanes.close(timeout_s)

    def _failed(self, row: dict[str, Any], error: Exception) -> None:
        self._again(row, f"internal error, see the log: {type(error).__name__}: {error}")

    def send(self, row: dict[str, Any]) -> None:
        """One attempt at one delivery (a row of `Ledger.due_deliveries`), its outcome entered in the ledger."""
        job_id = row["job_id"]
        try:
            self._begin(row)
            peer = self._config.named_peer(row["peer"])
        except ConfigError as error:
            self._again(row, str(error))
            return
        except (TransitionRefused, NotFound):
            return  # cancelled, held or committed between the query and now
        job = self._ledger.job(job_id)
        files, expected = self._files(job)
        if len(files) != expected:
            self._lost(job, len(files), expected)
            return
        answered = self._answered(row["id"], files)
        left = [file for uid, file in files.items() if not stored(answered.get(uid))]
        recorder = _Recorder(self._ledger, row["id"], self._clock)
        problem = ""
        try:
            self._send(peer, left, recorder, self._stopped(row))
        except NothingAccepted as error:
            known = all(answered.get(file.sop_instance_uid) == scu.SOP_CLASS_NOT_SUPPORTED for file in left)
            problem = "" if known else str(error)  # it says again what it has answered to each of them before
        except (PeerUnreachable, ConfigError) as error:
            problem = str(error)
        finally:
            recorder.flush()
        self._conclude(row, peer, files, problem)

    def _files(self, job: dict[str, Any]) -> tuple[dict[str, StoredObject], int]:
        """What is to be sent of a job, and how many that should be: the derived series and, behind it, what its route
        wants beside it as of now: a peer that does not take a report must not hold up the series for ever."""
        route = self._config.named_route(job["route"])
        also = companions.wanted(job["report"], route.also if route else None)
        files = derived_files(self._spool.absolute(job["derived_path"]), names=companions.names(also))
        return files, job["derived_instances"] + companions.instances(also)

    def _answered(self, delivery_id: int, files: Collection[str]) -> dict[str, int]:
        """The answers so far. Those to what is no longer to be sent go: nothing waits for them, or for their proof."""
        answered = self._ledger.statuses(delivery_id)
        if gone := sorted(answered.keys() - set(files)):
            with self._ledger.transaction() as db:
                db.executemany("DELETE FROM delivery_instance WHERE delivery_id = ? AND sop_instance_uid = ?",
                               [(delivery_id, uid) for uid in gone])
        return {uid: status for uid, status in answered.items() if uid in files}

    def _send(self, peer: Peer, files: list[StoredObject], recorder: _Recorder, stopped: Callable[[], bool]) -> None:
        """By STOW-RS where the peer has an address for it, else by C-STORE."""
        delivery = self._config.delivery
        if peer.stow_url is not None:
            from dicomnode.stow import send as stow

            stow(peer, [file.path for file in files], tls=self._config.tls, on_answer=recorder, stopped=stopped,
                 connect_timeout_s=delivery.connect_timeout_s, timeout_s=delivery.dimse_timeout_s)
        else:
            scu.send(peer, files, calling_ae=self._config.node.ae_title, on_answer=recorder, stopped=stopped,
                     dimse_timeout_s=delivery.dimse_timeout_s, connect_timeout_s=delivery.connect_timeout_s,
                     on_open=lambda association: self._open.update({peer.name: association}))

    def _begin(self, row: dict[str, Any]) -> None:
        job_id = row["job_id"]
        with self._ledger.transaction():
            if self._state(row) != "waiting":
                raise TransitionRefused(f"delivery {row['id']} is done meanwhile")
            state = self._ledger.job(job_id)["state"]
            if state == "built":
                self._ledger.set_job(job_id, "sending", now=self._clock())
            elif state != "sending":
                raise TransitionRefused(f"job {job_id} is {state}: not to be sent")

    def _stopped(self, row: dict[str, Any]) -> Callable[[], bool]:
        """Whether to stop between two instances: we are ending, or a person stopped the job (asked once a second)."""
        asked_at, wanted = time.monotonic(), True

        def stopped() -> bool:
            nonlocal asked_at, wanted
            self._lanes.moves(row["peer"])
            if time.monotonic() - asked_at > 1.0:
                asked_at, wanted = time.monotonic(), self._ledger.job(row["job_id"])["state"] == "sending"
            return self._stop.is_set() or not wanted

        return stopped

    def _state(self, row: dict[str, Any]) -> str:
        return str(self._ledger.query("SELECT state FROM delivery WHERE id = ?", (row["id"],))[0]["state"])

    def _conclude(self, row: dict[str, Any], peer: Peer, files: Mapping[str, StoredObject], problem: str) -> None:
        statuses = self._ledger.statuses(row["id"])
        verdict = judge((status for uid, status in statuses.items() if uid in files), expected=len(files))
        if verdict.delivered:
            with self._ledger.transaction():
                if self._state(row) != "waiting":
                    return  # a late answer of the peer has committed it meanwhile
                now = self._clock()
                self._ledger.set_delivery(row["id"], "delivered", now=now, reason=verdict.reason, confirm=peer.confirm,
                                          attempts=row["attempts"] + 1,
                                          prove_at=None if peer.confirm == "store" else now)
            log.info("derived series delivered", action="delivered", job=row["job_id"], peer=row["peer"])
        elif not self._stop.is_set() and self._ledger.job(row["job_id"])["state"] == "sending":
            believed = verdict.refused and not problem and row["attempts"] + 1 >= REFUSALS
            reason = verdict.reason + _not_accepted(files, statuses)
            self._again(row, f"{problem} ({reason})" if problem else reason, dead=believed)

    def _lost(self, job: dict[str, Any], found: int, expected: int) -> None:
        """Somebody removed files: never send a part. Forgetting the folder makes `retry` compute it again."""
        reason = (f"{found} of {expected} derived instances are left in {job['derived_path']}. "
                  f"Remedy: `dicomnode retry job:{job['id']}` computes the series again.")
        self._ledger.set_job(job["id"], "held", now=self._clock(), code="derived-lost", reason=reason,
                             derived_path=None)
        log.error("derived series incomplete on disk", action="derived_lost", job=job["id"])

    def _again(self, row: dict[str, Any], reason: str, *, dead: bool = False) -> None:
        """After a failure: wait and try again, or give the delivery up when it is too old."""
        now, attempts = self._clock(), row["attempts"] + 1
        age_h = (now - row["created_at"]) / 3600
        if dead or age_h >= self._config.delivery.give_up_h:
            text = f"{reason}; given up after {attempts} attempts in {age_h:.1f} h. Remedy: mend the peer, then `retry`"
            self._ledger.set_delivery(row["id"], "dead", now=now, reason=text, attempts=attempts)
            log.error("delivery given up", action="delivery_dead", job=row["job_id"], peer=row["peer"], reason=reason)
            return
        wait = backoff_s(attempts, self._config.delivery, self._rng)
        self._ledger.set_delivery(row["id"], "waiting", now=now, reason=reason, next_at=now + wait, attempts=attempts)
        log.warning("delivery will be tried again", action="delivery_retry", job=row["job_id"], peer=row["peer"],
                    reason=reason, wait_s=round(wait, 1))


def derived_files(folder: Path, *, names: Collection[str] | None = None) -> dict[str, StoredObject]:
    """SOP Instance UID -> the instance, in the order of the file names: the derived series, then what is beside it.

    names   of the files below "also" that count; None: all.
    """
    beside = [path for path in sorted((folder / companions.ALSO_FOLDER).glob("*.dcm"))
              if names is None or path.name in names]
    found = [StoredObject.read(path) for path in (*sorted(folder.glob("*.dcm")), *beside)]
    return {each.sop_instance_uid: each for each in found}


def _not_accepted(files: Mapping[str, StoredObject], statuses: Mapping[str, int]) -> str:
    """Which SOP classes the peer does not take; "" where it takes all. The rest has its answers all the same."""
    names = sorted({UID(files[uid].sop_class_uid).name for uid, status in statuses.items()
                    if uid in files and status == scu.SOP_CLASS_NOT_SUPPORTED})
    if not names:
        return ""
    beside = any(uid in files and files[uid].path.parent.name == companions.ALSO_FOLDER
                 and status == scu.SOP_CLASS_NOT_SUPPORTED for uid, status in statuses.items())
    remedy = "; let it accept them, or take them out of `also` of the route" if beside else ""
    return f"; not accepted there: {', '.join(names)}{remedy}"


def stored(status: int | None) -> bool:
    """Whether the last answer to an instance says that the peer has it."""
    return status is not None and (scu.is_success(status) or scu.is_warning(status))
