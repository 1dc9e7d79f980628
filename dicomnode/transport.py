"""pynetdicom's acceptor, made fit for a receiver that runs for months.

What is changed, each for a measured or provable reason: threads sleep until something happens instead of looking a
thousand times a second; sockets read whole PDUs instead of 4 kB pieces, send without delay and give up on a peer that
stops in the middle of a PDU; a PDU longer than we announced ends the association instead of growing in memory; the
presentation contexts are shared instead of copied for each association; the data set of a C-STORE goes to disk as it
arrives, uncopied; an association that lasts too long is aborted, one whose peer breaks the protocol ends in order. The
ports are in listening.py.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast

from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.transport import AssociationSocket

from dicomnode.command import store_response
from dicomnode.config import Peer
from dicomnode.intake import Intake
from dicomnode.logs import get_logger
from dicomnode.tls import Session

__all__ = ["ASSOCIATE_LIMIT", "Acceptor", "MakeIntake", "Service", "Socket", "peer_address"]

log = get_logger("transport")
_ABORT = bytes([7, 0, 0, 0, 0, 4, 0, 0, 2, 6])  # A-ABORT by the provider: invalid PDU parameter (PS3.8 Table 9-26)
_ABORT_S = 2.0  # seconds that an A-ABORT may take to go out
ASSOCIATE_LIMIT = 2**20  # bytes; 128 contexts with every transfer syntax take a tenth of it
_QUEUED = 32  # primitives that wait to be sent; whoever sends more waits for the peer
MakeIntake = Callable[["Acceptor", "DIMSEMessage"], Intake]
Service = Callable[["Acceptor", Any, PresentationContext], None]


def peer_address(assoc: Association) -> str:
    info = assoc.requestor.address_info
    return "" if info is None else str(info.address)


def decrypted(connection: socket.socket) -> bool:
    """Whether TLS holds bytes that were read already: the kernel knows nothing of them."""
    return isinstance(connection, ssl.SSLSocket) and connection.pending() > 0


class Socket(AssociationSocket):
    """Reads what is asked for in as few calls as the kernel allows."""

    pdu_limit = ASSOCIATE_LIMIT

    @property
    def ready(self) -> bool:
        """Whether a read would not block; unlike select() not limited to 1024 open files."""
        connection = self.socket
        if connection is None or not self._is_connected:
            return False
        if decrypted(connection):
            return True
        poll = select.poll()
        try:
            poll.register(connection, select.POLLIN)
        except ValueError:  # closed by another thread
            self.event_queue.put("Evt17")
            return False
        return bool(poll.poll(0))

    def recv(self, nr_bytes: int) -> bytearray:
        """All `nr_bytes`, or fewer where the peer closed. Raises OSError: PDU beyond the limit, silent peer."""
        if nr_bytes > self.pdu_limit:
            raise OSError(f"the peer announces a PDU of {nr_bytes} bytes, the limit is {self.pdu_limit}")
        received = bytearray(nr_bytes)
        with memoryview(received) as view:
            have = self.recv_into(view)
        del received[have:]
        return received

    def recv_into(self, view: memoryview) -> int:
        """Fill `view`; how many bytes came, fewer only where the peer closed. Raises OSError."""
        connection = cast(socket.socket, self.socket)
        have = 0
        while have < len(view):
            count = connection.recv_into(view[have:])
            if not count:
                break
            have += count
        return have


class _UserQueue(queue.Queue[Any]):
    """Primitives for the association's thread, which is told when there is one."""

    def __init__(self, stir: Callable[[], None]) -> None:
        super().__init__()
        self._stir = stir

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item, block, timeout)
        self._stir()


class _Dul(DULServiceProvider):
    """The upper layer: its thread waits for the socket or for something to send."""

    _LOOK_S = 0.25  # timers are looked at so often

    def __init__(self, assoc: Acceptor) -> None:
        super().__init__(assoc)
        self._run_loop_delay = 0.0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._buffer = bytearray()
        self.to_user_queue = _UserQueue(assoc.stir)

    def wake(self) -> None:
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def send_pdu(self, primitive: Any) -> None:
        while (self.to_provider_queue.qsize() >= _QUEUED and self.is_alive() and self.to_user_queue.empty()
               and self is not threading.current_thread()):
            time.sleep(0.001)
        super().send_pdu(primitive)
        self.wake()

    def kill_dul(self) -> None:
        super().kill_dul()
        self.wake()

    def stop_dul(self) -> bool:
        if self.state_machine.current_state != "Sta1":
            return False
        self.kill_dul()
        self.join()
        return True

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        except Exception as error:  # bytes of strangers, or our answer when they had broken the protocol meanwhile
            log.warning("A peer broke the protocol; its association is ended.", action="protocol_broken",
                        error=f"{type(error).__name__}: {error}"[:200], address=peer_address(self.assoc))
            cast(Socket, self.socket).send(_ABORT)
            self.assoc.is_aborted, self.assoc.is_established = True, False
            cast("Acceptor", self.assoc).abort_connection()
        finally:
            cast(_Dimse, self.assoc.dimse).no_more()
            with self._wake_lock:
                os.close(self._wake)
                self._wake = -1
            self.to_user_queue.put(cast(Any, None))  # nobody need wait for an A-ASSOCIATE request now

    def _is_transport_event(self) -> bool:
        if self.state_machine.current_state != "Sta13" and self.event_queue.empty():
            self._wait()
        return super()._is_transport_event()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        connection = None if self.socket is None else self.socket.socket
        if connection is not None and decrypted(connection):
            return
        try:
            if connection is not None:
                poll.register(connection, select.POLLIN)
        except ValueError:
            return  # closed meanwhile: the state machine finds out
        if self._wake in [handle for handle, _ in poll.poll(1000 * self._LOOK_S)]:
            os.eventfd_read(self._wake)

    def _read_pdu_data(self) -> None:
        """A P-DATA-TF PDU that only continues a data set goes into it at once; all others take the usual way."""
        wrapped = cast(Socket, self.socket)
        try:
            header = wrapped.recv(6)
            if len(header) < 6:
                self.event_queue.put("Evt17")
                return
            kind, _, length = struct.unpack(">BBL", header)
            if kind not in range(1, 8):
                self.event_queue.put("Evt19")
                return
            if length > wrapped.pdu_limit:
                raise OSError(f"a PDU of {length} bytes")
            if len(self._buffer) < length:
                self._buffer = bytearray(length)
            with memoryview(self._buffer)[:length] as body:
                if wrapped.recv_into(body) < length:
                    self.event_queue.put("Evt17")
                    return
                if kind == 4 and self._continues_data_set(body):
                    return
                pdu, event = self._decode_pdu(header + body)
        except OSError:  # peer gone or silent, or a PDU longer than announced
            self.event_queue.put("Evt17")
            return
        except Exception:  # bytes of strangers: whatever the decoder raises, the PDU is invalid
            self.event_queue.put("Evt19")
            return
        self._recv_pdu.put(pdu)
        self.event_queue.put(event)

    def _continues_data_set(self, body: memoryview) -> bool:
        """Append the one fragment of this PDU (PS3.8 Table 9-23) where it is data and not the last."""
        message = self.assoc.dimse.message
        if message is None or not message.command_set or self.state_machine.current_state != "Sta6" or len(body) < 6:
            return False
        length, context_id, control = struct.unpack_from(">LBB", body)
        if control & 3 or context_id != message.context_id or length + 4 != len(body):
            return False
        cast(Intake, message.data_set).write(body[6:])
        return True


class _Dimse(DIMSEServiceProvider):
    """Receives data sets into an Intake."""

    make_intake: MakeIntake
    _over = False

    def receive_primitive(self, primitive: P_DATA) -> None:
        if self.message is None:
            self.message = DIMSEMessage()
            self.message.data_set = self.make_intake(cast("Acceptor", self.assoc), self.message)
        try:
            self._require_order(primitive)
            super().receive_primitive(primitive)
        except Exception:  # bytes of strangers: whatever the decoder raises, the message is invalid
            self._drop()
            self.dul.event_queue.put("Evt19")
            return
        if self.message is None:
            cast("Acceptor", self.assoc).stir()

    def _require_order(self, primitive: P_DATA) -> None:
        """Raises ValueError for a data set before its command set or a command set after it (PS3.8 Annex E.2)."""
        known = self.message is not None and bool(self.message.command_set)
        for _, fragment in primitive.presentation_data_value_list:
            if bool(fragment[0] & 1) == known:
                raise ValueError("a message is one command set, then one data set")
            known = known or fragment[0] & 3 == 3

    def send_msg(self, primitive: Any, context_id: int) -> None:
        """C-STORE responses are encoded directly; anything else as pynetdicom does."""
        if not isinstance(primitive, C_STORE) or primitive.MessageIDBeingRespondedTo is None:
            super().send_msg(primitive, context_id)
            return
        data = P_DATA()
        data.presentation_data_value_list.append((context_id, b"\x03" + store_response(
            sop_class_uid=str(primitive.AffectedSOPClassUID or ""),
            sop_instance_uid=str(primitive.AffectedSOPInstanceUID or ""),
            message_id=primitive.MessageIDBeingRespondedTo, status=cast(int, primitive.Status),
            comment=primitive.ErrorComment or "")))
        self.dul.send_pdu(data)

    def discard(self) -> None:
        """Forget data sets that no handler will take: the association is over, whatever may still arrive."""
        self._over = True
        self._drop()
        while True:
            _, request = self.get_msg(block=False)
            if request is None:
                break
            _forget(getattr(request, "DataSet", None))

    def no_more(self) -> None:
        """Nothing arrives any more: what is unfinished stays so, and whole messages wait for an association alone."""
        self._drop()
        if self._over:
            self.discard()

    def _drop(self) -> None:
        message, self.message = self.message, None
        _forget(None if message is None else message.data_set)


def _forget(data_set: Any) -> None:
    if isinstance(data_set, Intake):
        data_set.discard()


class Acceptor(Association):
    """One association we accept; `on_end` is called exactly once when its thread ends."""

    on_end: Callable[[Acceptor], None]

    def __init__(self, ae: ApplicationEntity, make_intake: MakeIntake, on_end: Callable[[Acceptor], None], *,
                 ends_at: float, monotonic: Callable[[], float]) -> None:
        super().__init__(ae, MODE_ACCEPTOR)
        self.on_end = on_end
        self.stored = 0
        self.tls: Session | None = None
        self.overdue = False  # aborted for its age
        self.callers: tuple[Peer, ...] = ()  # as whom the gate let it in
        self.may_store = True
        self.services: Mapping[type, Service] = {}  # by request primitive; others are served as pynetdicom does
        self.when_idle: deque[Callable[[], None]] = deque()  # called one by one when the peer asks nothing for a second
        self._ends_at, self._monotonic = ends_at, monotonic
        self._stirred = threading.Event()
        provider = _Dimse(self)
        provider.make_intake = make_intake
        self.dimse = provider
        self.dul = _Dul(self)
        self.network_timeout, self.acse_timeout = ae.network_timeout, ae.acse_timeout  # again: they set its timers

    def stir(self) -> None:
        """Something happened that the association's thread should look at."""
        self._stirred.set()

    def kill(self) -> None:
        self._kill = True
        self.stir()
        super().kill()

    def abort_connection(self) -> None:
        """End the connection without a word; whoever reads from it or writes to it is woken."""
        wrapped = self.dul.socket
        connection = None if wrapped is None else wrapped.socket
        if connection is not None:
            with contextlib.suppress(OSError):  # it went by itself meanwhile
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def _serve_request(self, msg: Any, context_id: int) -> None:
        try:
            self._serve(msg, context_id)
        finally:
            _forget(getattr(msg, "DataSet", None))  # also of a request that no handler got to see

    def _serve(self, msg: Any, context_id: int) -> None:
        # pynetdicom would say nothing to the first and let the peer wait; and to the second, whose object nobody would
        # have kept, it would say 0x0000.
        echo = getattr(msg, "AffectedSOPClassUID", None) == Verification
        if not msg.is_valid_request or echo != isinstance(msg, C_ECHO):
            self.abort()
            return
        service, context = self.services.get(type(msg)), self._accepted_cx.get(context_id)
        if service is None or context is None:
            super()._serve_request(msg, context_id)
            return
        self.dimse.cancel_req.clear()
        self._is_paused = True  # for a service that sends
        service(self, msg, context)
        self.dul._idle_timer.restart()

    @property
    def waits(self) -> bool:
        """Whether the peer still waits for what a service does: no release, abort, end of the connection or of time."""
        return (self.is_established and not self._kill and self.dul.is_alive() and self.dul.peek_next_pdu() is None
                and self._monotonic() <= self._ends_at)

    def ask(self, request: Any, context_id: int) -> Any | None:
        """Send a request of our own and serve what the peer asks meanwhile; its response, None where none came."""
        self.dimse.send_msg(request, context_id)
        until = self._monotonic() + (self.dimse_timeout or 0)
        while self.waits and self._monotonic() < until:
            context, message = self.dimse.get_msg(block=False)
            if message is None:
                self._stirred.wait(0.25)
                self._stirred.clear()
            elif getattr(message, "MessageIDBeingRespondedTo", None) is not None:
                return message
            else:
                self._serve_request(message, cast(int, context))
        return None

    def _run_reactor(self) -> None:
        """Serve requests until release, abort, end of the connection or a peer silent for too long."""
        while not self._kill:
            context_id, message = self.dimse.get_msg(block=False)
            if message is not None:
                self._serve_request(message, cast(int, context_id))
            elif self.is_established and self.acse.is_release_requested():
                self.acse.send_release(is_response=True)
                self.is_released = True
                self.kill()
            elif self.acse.is_aborted():
                self.dul.receive_pdu(wait=False)
                self.is_aborted = True
                self.kill()
            elif not self.dul.is_alive():
                self.kill()
            elif self.dul.idle_timer_expired():
                self.abort()
            elif self._monotonic() > self._ends_at:
                self.overdue = True
                self._break_off()
            else:
                stirred = self._stirred.wait(1.0)
                self._stirred.clear()
                if self.when_idle and not stirred:
                    self.when_idle.popleft()()

    def _break_off(self) -> None:
        """Abort, and end the connection whether or not the peer reads."""
        self.is_aborted = True
        self.abort(block=False)
        until = self._monotonic() + _ABORT_S  # not longer: it may be reading from a peer that sends a byte a minute
        while self.dul.is_alive() and self.dul.state_machine.current_state != "Sta1" and self._monotonic() < until:
            self._stirred.wait(0.02)
            self._stirred.clear()
        self.abort_connection()
        self.kill()

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        except Exception as error:  # bytes of strangers, where only the negotiation finds that they make no sense
            log.warning("An association cannot be served and is ended.", action="association_broken",
                        error=f"{type(error).__name__}: {error}"[:200], address=peer_address(self))
            self._break_off()
        finally:
            cast(_Dimse, self.dimse).discard()
            self.on_end(self)
