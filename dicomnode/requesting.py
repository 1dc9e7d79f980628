"""pynetdicom's requestor, made fit for peers that stop, stall or answer at the wrong moment.

What is changed, each for a measured reason: a peer that takes no more bytes is given up after the time-out, where
pynetdicom would wait for it without end; an association that is given up ends within seconds whatever the peer does;
what is sent waits for the peer instead of growing in memory; no answer is lost to the association's own thread.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from functools import partial
from typing import Any

from pynetdicom import AE, _config, evt
from pynetdicom.association import Association, ServiceUser
from pynetdicom.pdu_primitives import P_DATA, MaximumLengthNotification

from sop.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

__all__ = ["keep_answers_for_the_asker", "limit_pdu", "on_connected", "requestor", "set_nodelay"]

ABORT_S = 2.0  # seconds that an A-ABORT may take to go out and be heard
QUEUED = 32  # PDUs that wait to be sent; whoever sends more waits for the peer
LARGEST_PDU = 131072  # bytes, to a peer that takes any: a whole object in one PDU would be held in memory
_config.STORE_SEND_CHUNKED_DATASET = True  # an object that is given as a path goes out in pieces, as it lies


def requestor(ae_title: str) -> AE:
    """The AE that opens associations; it says that the software is ours (PS3.7 D.3.3.2), as the acceptor does."""
    ae = AE(ae_title)
    ae.implementation_class_uid, ae.implementation_version_name = IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
    return ae


def set_nodelay(event: evt.Event) -> None:
    """Turn Nagle's algorithm off on a connection just opened: 40 ms for every C-STORE otherwise."""
    transport = event.assoc.dul.socket
    if transport is not None and transport.socket is not None:
        transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def on_connected(event: evt.Event) -> None:
    """Handler of EVT_CONN_OPEN, before anything is sent."""
    set_nodelay(event)
    association, transport = event.assoc, event.assoc.dul.socket
    if transport is None or transport.socket is None:
        return
    transport.socket.settimeout(association.network_timeout)  # pynetdicom leaves it without one
    association.kill = partial(_kill, association, association.kill)  # type: ignore[method-assign]
    upper_layer = association.dul
    upper_layer.send_pdu = partial(_send_pdu, upper_layer, upper_layer.send_pdu)  # type: ignore[method-assign]


def _kill(association: Association, kill: Any) -> None:
    """pynetdicom's waits until the connection is over, and who sends to a peer that does not read never comes to it."""
    dul, until = association.dul, time.monotonic() + ABORT_S
    while dul.is_alive() and dul.state_machine.current_state != "Sta1" and time.monotonic() < until:
        time.sleep(0.01)
    if dul.is_alive() and dul.state_machine.current_state != "Sta1":
        connection = None if dul.socket is None else dul.socket.socket
        if connection is not None:
            with contextlib.suppress(OSError):  # it went by itself meanwhile
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
    kill()


def _send_pdu(dul: Any, send: Any, primitive: Any) -> None:
    """Raises ConnectionError where the peer leaves before it has taken what waits."""
    while isinstance(primitive, P_DATA) and dul.to_provider_queue.qsize() >= QUEUED:
        if not dul.is_alive() or not dul.to_user_queue.empty():
            raise ConnectionError("the peer left, or took nothing for too long")
        time.sleep(0.001)
    send(primitive)


def limit_pdu(peer: ServiceUser) -> None:
    """No longer PDUs than LARGEST_PDU, also to a peer without a limit (PS3.8 Annex D.1: 0)."""
    for item in peer.user_information:
        if isinstance(item, MaximumLengthNotification):
            item.maximum_length_received = min(item.maximum_length_received or LARGEST_PDU, LARGEST_PDU)


class _Checkpoint(threading.Event):
    """pynetdicom's `_reactor_checkpoint`; once `clear` has returned, the association's own thread takes no message."""

    def __init__(self) -> None:
        super().__init__()
        self.set()
        self.lock = threading.Lock()

    def clear(self) -> None:
        with self.lock:
            super().clear()


def keep_answers_for_the_asker(association: Association) -> None:
    """pynetdicom 3.0.4 loses a response now and then on a busy machine, one in some thousand C-STORE, and with it half
    a minute and the association.

    Who sends a request pauses the association's own thread first, and waits until that says that it is paused. But it
    says so a moment before it looks, and where it is held up just then, it takes the response for a request from the
    peer and drops it.
    """
    checkpoint, get_msg = _Checkpoint(), association.dimse.get_msg

    def guarded(block: bool = False) -> Any:
        if block:
            return get_msg(True)
        with checkpoint.lock:
            return get_msg(False) if checkpoint.is_set() else (None, None)

    association._reactor_checkpoint = checkpoint
    association.dimse.get_msg = guarded  # type: ignore[method-assign]
