"""C-MOVE and C-GET: handing out what we hold, and counting it right (PS3.4 C.4.2, C.4.3).

A C-MOVE opens an association to the peer that it names and sends as deliveries do (`scu.send`), a C-GET sends on the
association it came on. Both send from the file as it lies where the peer accepts its transfer syntax, a piece at a
time, and decompressed to a peer that takes nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pydicom.dataset import Dataset
from pynetdicom.association import Association

from dicomnode import scu
from dicomnode.config import Config, Peer
from dicomnode.errors import PeerUnreachable
from dicomnode.logs import get_logger
from dicomnode.scu import StoredObject

__all__ = ["CANCELLED", "Courtesy", "Tally", "send_back", "send_on"]

CANCELLED = 0xFE00  # PS3.4 Table C.4-2: sub-operations terminated by cancel
COMPLETE_WITH_FAILURES = 0xB000
UNABLE_TO_PERFORM = 0xA702
LIST_BYTES = 65_534  # of FailedSOPInstanceUIDList: what an explicit VR UI can hold (PS3.5 7.1.2)
PENDING_S = 0.1  # responses between are left out: a peer need not be told of every single instance
log = get_logger("moving")


class Tally:
    """What became of each sub-operation: SOP Instance UID -> C-STORE status; the last one counts."""

    def __init__(self, uids: Sequence[str]) -> None:
        self._statuses: dict[str, int | None] = dict.fromkeys(uids)

    def note(self, uid: str, status: int) -> None:
        self._statuses[uid] = status

    def fail_rest(self) -> None:
        """Whatever was not answered has failed."""
        for uid, status in self._statuses.items():
            if status is None:
                self._statuses[uid] = scu.CANNOT_ENCODE

    @property
    def remaining(self) -> int:
        return sum(status is None for status in self._statuses.values())

    @property
    def completed(self) -> int:
        return sum(status is not None and scu.is_success(status) for status in self._statuses.values())

    @property
    def warning(self) -> int:
        return sum(status is not None and scu.is_warning(status) for status in self._statuses.values())

    @property
    def failed_uids(self) -> list[str]:
        return [uid for uid, status in self._statuses.items()
                if status is not None and not scu.is_success(status) and not scu.is_warning(status)]

    def verdict(self, *, cancelled: bool) -> int:
        """Status of the last response: PS3.4 Tables C.4-2 and C.4-3."""
        if cancelled and self.remaining:
            return CANCELLED
        if not self.failed_uids and not self.warning:
            return 0x0000
        return COMPLETE_WITH_FAILURES if self.completed or self.warning else UNABLE_TO_PERFORM

    def failures(self) -> Dataset | None:
        """The identifier of the last response (C.4.2.1.4.2); None where nothing failed.

        As many UIDs as the element can hold: the number of failures is told all the same.
        """
        uids, size = [], 0
        for uid in self.failed_uids:
            size += len(uid) + 1
            if size > LIST_BYTES:
                break
            uids.append(uid)
        if not uids:
            return None
        identifier = Dataset()
        identifier.FailedSOPInstanceUIDList = uids
        return identifier


class Courtesy:
    """Called after each object that was handed out: waits a moment while objects come in. Reception goes first.

    received  how many objects have come over the associations that are open.
    """

    def __init__(self, received: Callable[[], int], *, pause_s: float = 0.05, look_s: float = 0.25) -> None:
        self._received, self._pause_s, self._look_s = received, pause_s, look_s
        self._count, self._looked_at, self._busy = received(), time.monotonic(), False

    def __call__(self) -> None:
        if time.monotonic() - self._looked_at >= self._look_s:
            count = self._received()
            self._busy, self._count, self._looked_at = count != self._count, count, time.monotonic()
        if self._busy:
            time.sleep(self._pause_s)


class _Teller:
    """Says how far it is, not too often."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell, self._told_at = tell, 0.0

    def __call__(self) -> None:
        if time.monotonic() - self._told_at >= PENDING_S:
            self._told_at = time.monotonic()
            self._tell()


def send_on(config: Config, peer: Peer, objects: Sequence[StoredObject], tally: Tally, *, originator: tuple[str, int],
            tell: Callable[[], None], stopped: Callable[[], bool],
            courtesy: Callable[[], None] = lambda: None) -> str:
    """The C-STOREs of a C-MOVE: all objects to `peer` over one association; why some were not sent, "" where all were.

    A failure is noted when the second attempt has failed too, so that no number in a response ever falls.
    """
    say = _Teller(tell)

    def on_answer(answer: scu.Answer) -> None:
        if answer.stored:
            tally.note(answer.sop_instance_uid, answer.status)
        say()
        courtesy()

    try:
        answers = scu.send(peer, _present(objects, tally), calling_ae=config.node.ae_title, on_answer=on_answer,
                           stopped=stopped, connect_timeout_s=config.delivery.connect_timeout_s,
                           dimse_timeout_s=config.delivery.dimse_timeout_s, originator=originator)
    except PeerUnreachable as error:
        tally.fail_rest()
        return str(error)
    for answer in answers:
        tally.note(answer.sop_instance_uid, answer.status)
    return ""


def send_back(assoc: Association, message_id: int, objects: Sequence[StoredObject], tally: Tally, *,
              tell: Callable[[], None], stopped: Callable[[], bool],
              courtesy: Callable[[], None] = lambda: None) -> None:
    """The C-STOREs of a C-GET, on its own association; needs pynetdicom to be paused."""
    say = _Teller(tell)
    for number, stored in enumerate(_present(objects, tally)):
        if stopped():
            return
        try:
            answer = scu.store(assoc, stored, message_id=(message_id + number) % 65535 + 1)
        except ConnectionError as error:
            log.warning("A C-GET ends early.", action="get_failed", error=str(error),
                        sop_instance_uid=stored.sop_instance_uid)
            return
        tally.note(stored.sop_instance_uid, answer.status)
        say()
        courtesy()


def _present(objects: Sequence[StoredObject], tally: Tally) -> list[StoredObject]:
    """Those whose files are there; the others have failed."""
    there = []
    for stored in objects:
        if stored.path.is_file():
            there.append(stored)
        else:
            tally.note(stored.sop_instance_uid, scu.CANNOT_ENCODE)
            log.error("An object to be handed out is not on disk.", action="object_missing",
                      sop_instance_uid=stored.sop_instance_uid)
    return there
