"""pynetdicom's acceptor, made fit for a receiver that runs for months.

What is changed, each for a measured or provable reason: sockets read whole PDUs instead of 4 kB pieces, send without
delay and give up on a peer that stops in the middle of a PDU; a PDU longer than we announced ends the association
instead of growing in memory; the presentation contexts are shared instead of copied for each association; the data
set of a C-STORE goes to disk as it arrives; connections beyond a limit are closed at once.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, cast

from pynetdicom import evt
from pynetdicom._globals import MODE_ACCEPTOR
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import C_STORE_RQ, DIMSEMessage
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.transport import AssociationServer, AssociationSocket, RequestHandler

from dicomnode.intake import Intake

__all__ = ["Acceptor", "Server", "peer_address"]

_ASSOCIATE_LIMIT = 2**20  # bytes; 128 contexts with every transfer syntax take a tenth of it
MakeIntake = Callable[["Acceptor", "DIMSEMessage"], Intake]


def peer_address(assoc: Association) -> str:
    info = assoc.requestor.address_info
    return "" if info is None else str(info.address)


class _Socket(AssociationSocket):
    """Reads what is asked for in as few calls as the kernel allows."""

    pdu_limit = _ASSOCIATE_LIMIT

    def recv(self, nr_bytes: int) -> bytearray:
        """All `nr_bytes`, or fewer where the peer closed. Raises OSError: PDU beyond the limit, silent peer."""
        if nr_bytes > self.pdu_limit:
            raise OSError(f"the peer announces a PDU of {nr_bytes} bytes, the limit is {self.pdu_limit}")
        connection = cast(socket.socket, self.socket)
        received = bytearray(nr_bytes)
        with memoryview(received) as view:
            have = 0
            while have < nr_bytes:
                count = connection.recv_into(view[have:])
                if not count:
                    break
                have += count
        del received[have:]
        return received


class _Dimse(DIMSEServiceProvider):
    """Receives data sets into an Intake."""

    make_intake: MakeIntake

    def receive_primitive(self, primitive: P_DATA) -> None:
        if self.message is None:
            self.message = DIMSEMessage()
            self.message.data_set = self.make_intake(cast("Acceptor", self.assoc), self.message)
        message = self.message
        super().receive_primitive(primitive)
        if self.message is None and not isinstance(message, C_STORE_RQ):
            message.data_set = None

    def discard(self) -> None:
        """Forget data sets that no handler will take: the association is over."""
        left = [] if self.message is None else [self.message.data_set]
        self.message = None
        while True:
            _, request = self.get_msg(block=False)
            if request is None:
                break
            left.append(getattr(request, "DataSet", None))
        for data_set in left:
            if isinstance(data_set, Intake):
                data_set.discard()


class Acceptor(Association):
    """One association we accept; `on_end` is called exactly once when its thread ends."""

    on_end: Callable[[Acceptor], None]

    def __init__(self, ae: ApplicationEntity, make_intake: MakeIntake, on_end: Callable[[Acceptor], None]) -> None:
        super().__init__(ae, MODE_ACCEPTOR)
        self.on_end = on_end
        self.stored = 0
        provider = _Dimse(self)
        provider.make_intake = make_intake
        self.dimse = provider

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        finally:
            cast(_Dimse, self.dimse).discard()
            self.on_end(self)


class _Handler(RequestHandler):
    """Makes the association of an accepted connection."""

    server: Server

    def handle(self) -> None:
        if self.server.connections_open() >= self.server.connection_limit:
            self.server.shutdown_request(self.request)
            return
        super().handle()

    def _create_association(self) -> Acceptor:
        server, ae = self.server, self.ae
        connection = cast(socket.socket, self.request)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.settimeout(ae.network_timeout)
        assoc = Acceptor(ae, server.make_intake, server.on_end)
        assoc._server = server
        wrapped = _Socket(assoc, client_socket=connection)
        wrapped.pdu_limit = max(_ASSOCIATE_LIMIT, ae.maximum_pdu_size)
        assoc.set_socket(wrapped)
        assoc.acceptor.maximum_length = ae.maximum_pdu_size
        assoc.acceptor.ae_title = server.ae_title
        assoc.acceptor.address_info = self.local
        assoc.acceptor.implementation_class_uid = ae.implementation_class_uid
        assoc.acceptor.implementation_version_name = ae.implementation_version_name
        assoc.acceptor.supported_contexts = server.contexts
        assoc.requestor.address_info = self.remote
        for event, handlers in server._handlers.items():
            if event.is_intervention and handlers:
                assoc.bind(event, *cast(tuple[Any, ...], handlers))
            elif isinstance(event, evt.NotificationEvent):
                for handler in cast(list[tuple[Any, Any]], handlers):
                    assoc.bind(event, *handler)
        server.opened(assoc)
        return assoc


class Server(AssociationServer):
    """Listens; `serve_forever()` until `shutdown()`."""

    request_queue_size = 256

    def __init__(self, ae: ApplicationEntity, *args: Any, make_intake: MakeIntake, on_end: Callable[[Acceptor], None],
                 connection_limit: int, **kwargs: Any) -> None:
        self.make_intake = make_intake
        self.connection_limit = connection_limit
        self._on_end = on_end
        self._open: set[Acceptor] = set()
        kwargs["request_handler"] = _Handler
        super().__init__(ae, *args, **kwargs)
        ae._servers.append(cast(Any, self))

    def opened(self, assoc: Acceptor) -> None:
        self._open.add(assoc)

    def on_end(self, assoc: Acceptor) -> None:
        self._open.discard(assoc)
        self._on_end(assoc)

    def connections_open(self) -> int:
        return len(self._open)

    def associations(self) -> list[Acceptor]:
        return list(self._open)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke before it became an association; nothing is owed to it."""
