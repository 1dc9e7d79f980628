"""The ports: connections accepted, limited, given their TLS, and made associations (transport.py).

A TLS handshake has a thread of its own, so that the next connection is accepted meanwhile; connections beyond a limit
are closed at once.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.transport import AssociationServer, RequestHandler

from dicomnode.tls import ServerTls, reason_of, session_of
from dicomnode.transport import ASSOCIATE_LIMIT, Acceptor, MakeIntake, Service, Socket

__all__ = ["Server"]


class _Handler(RequestHandler):
    """Makes the association of an accepted connection."""

    server: Server

    def handle(self) -> None:
        if self.server.full() and not self.server.drop_oldest_without_request():
            self.server.shutdown_request(self.request)
            return
        super().handle()

    def _create_association(self) -> Acceptor:
        server, ae = self.server, self.ae
        connection = cast(socket.socket, self.request)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.settimeout(ae.network_timeout)
        assoc = Acceptor(ae, server.make_intake, server.on_end, monotonic=server.monotonic,
                         ends_at=server.monotonic() + server.association_limit_s)
        assoc.tls = session_of(connection)
        assoc.services = server.services
        assoc._server = server
        wrapped = Socket(assoc, client_socket=connection)
        wrapped.pdu_limit = max(ASSOCIATE_LIMIT, ae.maximum_pdu_size)
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
    """Listens; `serve_forever()` until `shutdown()`.

    tls                  None: a plain port.
    on_tls_failure       told the address and the reason of a handshake that came to nothing.
    association_limit_s  an association that lasts longer is aborted.
    """

    request_queue_size = 256

    def __init__(self, ae: ApplicationEntity, *args: Any, make_intake: MakeIntake, on_end: Callable[[Acceptor], None],
                 connection_limit: int, association_limit_s: float, tls: ServerTls | None = None,
                 services: Mapping[type, Service] | None = None,
                 on_tls_failure: Callable[[str, str], None] = lambda *_: None,
                 monotonic: Callable[[], float] = time.monotonic, **kwargs: Any) -> None:
        self.make_intake = make_intake
        self.connection_limit = connection_limit
        self.association_limit_s = association_limit_s
        self.monotonic = monotonic
        self.services = services or {}
        self._tls, self._on_tls_failure = tls, on_tls_failure
        self._shaking: dict[ssl.SSLSocket, None] = {}  # in order of arrival
        self._on_end = on_end
        self._open: dict[Acceptor, None] = {}  # in order of arrival
        kwargs["request_handler"] = _Handler
        super().__init__(ae, *args, **kwargs)
        ae._servers.append(cast(Any, self))

    def process_request(self, request: Any, client_address: Any) -> None:
        """One accepted connection; the TLS handshake must not keep the next one waiting."""
        if self._tls is None:
            super().process_request(request, client_address)
            return
        if len(self._shaking) >= self.connection_limit:  # the one that has owed its handshake longest goes
            with contextlib.suppress(OSError, StopIteration):
                socket.socket.shutdown(next(iter(list(self._shaking))), socket.SHUT_RDWR)
        request.settimeout(self.ae.acse_timeout)  # for the whole of the handshake
        connection = self._tls.context().wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        self._shaking[connection] = None
        threading.Thread(target=self._shake_hands, args=(connection, client_address), name="handshake",
                         daemon=True).start()

    def _shake_hands(self, connection: ssl.SSLSocket, client_address: Any) -> None:
        try:
            connection.do_handshake()
        except OSError as error:
            self._on_tls_failure(str(client_address[0]), reason_of(error))
            self.shutdown_request(connection)
            return
        finally:
            self._shaking.pop(connection, None)
        try:
            self.finish_request(connection, client_address)
        except Exception:
            self.handle_error(connection, client_address)
            self.shutdown_request(connection)

    def opened(self, assoc: Acceptor) -> None:
        self._open[assoc] = None

    def on_end(self, assoc: Acceptor) -> None:
        self._open.pop(assoc, None)
        self._on_end(assoc)

    def full(self) -> bool:
        return len(self._open) >= self.connection_limit

    def drop_oldest_without_request(self) -> bool:
        """Close the connection that has owed its A-ASSOCIATE request longest; False where all have sent theirs."""
        for assoc in self.associations():
            wrapped = assoc.dul.socket
            if assoc.requestor.primitive is None and wrapped is not None and wrapped.socket is not None:
                self._open.pop(assoc, None)
                assoc.abort_connection()
                return True
        return False

    def associations(self) -> list[Acceptor]:
        return list(self._open)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke before it became an association; nothing is owed to it."""
