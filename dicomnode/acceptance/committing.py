"""Storage commitment of the phantom (PS3.4 Annex J), and whether its report finds the way to us.

The report comes on our association or on one that the peer opens to node.port. Where the node does not run, this test
listens there itself; where it does, the node refuses the report of a transaction that it did not start and records
that, which proves the way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)

from dicomnode import scu
from dicomnode.acceptance.finding import Finding
from dicomnode.acceptance.phantom import Phantom
from dicomnode.config import Config, Peer
from dicomnode.errors import PeerUnreachable
from dicomnode.ledger import Ledger

__all__ = ["REPORT_S", "test"]

REPORT_S = 20.0
LOOK_S = 0.5
INVALID_ARGUMENT = 0x0115  # PS3.7 10.1.1.1.8


class _Report:
    """What the peer reports on our transaction."""

    def __init__(self) -> None:
        self.transaction_uid = str(generate_uid())
        self.came = threading.Event()
        self.kept: list[str] = []
        self.way = ""

    def hear(self, event: evt.Event, way: str) -> tuple[int, None]:
        information = event.event_information
        if str(information.get("TransactionUID", "")) != self.transaction_uid:
            return INVALID_ARGUMENT, None
        self.kept = [str(item.get("ReferencedSOPInstanceUID", ""))
                     for item in information.get("ReferencedSOPSequence") or ()]
        self.way = way
        self.came.set()
        return 0x0000, None


def test(peer: Peer, config: Config, made: Phantom) -> Finding | str:
    """Ask for the commitment and wait for the report, at most REPORT_S. Raises PeerUnreachable."""
    report = _Report()
    with _listening(config, report):
        association = scu.open_association(
            peer, [build_context(StorageCommitmentPushModel)], calling_ae=config.node.ae_title,
            connect_timeout_s=config.delivery.connect_timeout_s, dimse_timeout_s=config.delivery.dimse_timeout_s,
            evt_handlers=[(evt.EVT_N_EVENT_REPORT, report.hear, ["our association"])])
        try:
            _ask(association, peer, report.transaction_uid, made)
            until = time.monotonic() + REPORT_S
            while not report.came.wait(LOOK_S) and time.monotonic() < until:
                if _node_heard(config, report.transaction_uid):
                    return "takes the request, and its report finds the way to the node, which runs"
        finally:
            scu.leave(association)
    if not report.came.is_set():
        return Finding("", "warning", f"takes the request and has not reported within {REPORT_S:.0f} s; "
                       f"deliveries wait {config.delivery.commitment_timeout_s:.0f} s",
                       f"our AE title {config.node.ae_title} must be known there with this node's address and port "
                       f"{config.node.port}, or it may commit at certain times only. Where it answers "
                       "over TLS, test it while the node runs")
    if made.sop_instance_uid not in report.kept:
        return Finding("", "problem", "reports that it does not keep the phantom that it stored",
                       "look into the log of the peer")
    return f"commits to the phantom; the report came on {report.way}"


def _ask(association: Any, peer: Peer, transaction_uid: str, made: Phantom) -> None:
    """N-ACTION (PS3.4 J.3.2). Raises PeerUnreachable where it is not taken."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = made.sop_class_uid, made.sop_instance_uid
    information = Dataset()
    information.TransactionUID, information.ReferencedSOPSequence = transaction_uid, [item]
    try:
        status, _ = association.send_n_action(information, 1, StorageCommitmentPushModel,
                                              StorageCommitmentPushModelInstance)
    except (RuntimeError, ValueError) as error:
        raise PeerUnreachable(f"{scu.named(peer)} does not take the request for storage commitment: {error}. Remedy: "
                              "enable its Storage Commitment SCP, or set peer.confirm = \"find\"") from error
    if "Status" not in status or status.Status != 0x0000:
        said = f"status 0x{int(status.Status):04X}" if "Status" in status else "silence"
        raise PeerUnreachable(f"{scu.named(peer)} answers the request for storage commitment with {said}. Remedy: "
                              "enable its Storage Commitment SCP for our AE title, or set peer.confirm = \"find\"")


@contextmanager
def _listening(config: Config, report: _Report) -> Iterator[None]:
    """Listen on node.port, as the node would, unless that is taken: by the node, as `check` has found out."""
    ae = AE(config.node.ae_title)
    ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
    try:
        server = ae.start_server((config.node.host, config.node.port), block=False,
                                 evt_handlers=[(evt.EVT_N_EVENT_REPORT, report.hear, ["an association of its own"])])
    except OSError:
        yield
        return
    try:
        yield
    finally:
        if server is not None:
            server.shutdown()


def _node_heard(config: Config, transaction_uid: str) -> bool:
    """Whether the running node has recorded a report on this transaction; it can only have come from the peer."""
    path = config.node.data_dir / "ledger.sqlite3"
    if not path.is_file():
        return False
    with Ledger(path) as ledger:
        return bool(ledger.query("SELECT 1 FROM (SELECT * FROM event ORDER BY id DESC LIMIT 1000) "
                                 "WHERE kind = 'security' AND code = 'commitment' AND instr(reason, ?)",
                                 (transaction_uid,)))
