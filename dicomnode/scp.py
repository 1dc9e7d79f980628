"""Storage SCP and Verification SCP: thin handlers. Received means safe: 0x0000 goes out after the ledger's commit."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from typing import cast

from pydicom._uid_dict import UID_dictionary
from pydicom.dataset import Dataset
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    MPEG2MPHL,
    MPEG2MPML,
    MPEG4HP41,
    MPEG4HP41BD,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from pynetdicom import AE, _config, evt
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.pdu_primitives import A_ASSOCIATE
from pynetdicom.presentation import build_context
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import register_uid, uid_to_service_class

from dicomnode.config import Config
from dicomnode.errors import CannotUnderstand, DiskFull, NodeError, NotAllowed
from dicomnode.gate import Gate, SecurityLog, printable
from dicomnode.groupcommit import GroupCommitter
from dicomnode.intake import Intake, Limits, Request
from dicomnode.keeping import CONFLICT, keep, status_of
from dicomnode.ledger import Kept, Ledger
from dicomnode.listening import Server
from dicomnode.logs import get_logger
from dicomnode.objectindex import ObjectIndex
from dicomnode.requesting import limit_pdu
from dicomnode.services.desk import Desk
from dicomnode.spool import Spool
from dicomnode.tls import ServerTls
from dicomnode.transport import Acceptor, peer_address
from sop.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

__all__ = ["CONFLICT", "Receiver", "STORAGE_CLASSES", "TRANSFER_SYNTAXES"]

log = get_logger("scp")
SUCCESS = 0x0000
VERIFICATION = "1.2.840.10008.1.1"
STOP_S = 4.0  # how long the associations that are open may take to end, all together

#: In order of preference, where a peer offers several in one presentation context.
TRANSFER_SYNTAXES = (
    ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, JPEGLosslessSV1, JPEGLossless,
    JPEGLSLossless, JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL, RLELossless, JPEGBaseline8Bit,
    JPEGExtended12Bit, JPEGLSNearLossless, JPEG2000, HTJ2K, MPEG2MPML, MPEG2MPHL, MPEG4HP41, MPEG4HP41BD,
    ExplicitVRBigEndian)

#: Private classes that scanners send in one association with their images.
PRIVATE_STORAGE_CLASSES = {
    "1.3.12.2.1107.5.9.1": "SiemensCSANonImageStorage",
    "1.2.840.113619.4.26": "GE3DModelStorage",
    "1.2.840.113619.4.27": "GENuclearMedicineStorage",
    "1.2.840.113619.4.30": "GEAdvanceRawStorage",
    "1.3.46.670589.2.3.1.1": "PhilipsSpecialisedXAStorage",
    "1.3.46.670589.2.4.1.1": "PhilipsCXImageStorage",
    "1.3.46.670589.2.5.1.1": "Philips3DVolumeStorage",
    "1.3.46.670589.5.0.1": "Philips3DObjectStorage",
    "1.3.46.670589.5.0.10": "PhilipsMRSyntheticImageStorage",
    "1.3.46.670589.11.0.0.12.1": "PhilipsPrivateMRSpectrumStorage",
    "1.3.46.670589.11.0.0.12.2": "PhilipsPrivateMRSeriesDataStorage",
    "1.3.46.670589.11.0.0.12.4": "PhilipsPrivateMRExamcardStorage",
}


def _storage_classes() -> tuple[str, ...]:
    """Every SOP Class of PS3.6 Table A-1, retired ones included, that is stored by C-STORE."""
    public = [uid for uid, (name, kind, _, _, keyword) in UID_dictionary.items()
              if kind == "SOP Class" and "Storage" in keyword and "Commitment" not in keyword
              and keyword not in ("MediaStorageDirectoryStorage",)]
    return tuple(sorted({*public, *PRIVATE_STORAGE_CLASSES}))


STORAGE_CLASSES = _storage_classes()


def _register_storage_classes() -> None:
    """pynetdicom must serve retired and private classes as storage too."""
    for uid in STORAGE_CLASSES:
        if uid_to_service_class(uid) is not StorageServiceClass:
            keyword = PRIVATE_STORAGE_CLASSES.get(uid) or UID_dictionary[uid][4]
            register_uid(uid, keyword, StorageServiceClass)


def _limits(config: Config) -> Limits:
    return Limits.of(config.reception)


class Receiver:
    """The Storage SCP of one configuration; `start()`, then `stop()`."""

    def __init__(self, config: Config, spool: Spool, ledger: Ledger, *, clock: Callable[[], float]) -> None:
        self._config, self._spool, self._clock = config, spool, clock
        self._gate = Gate(config, clock=clock)
        self._security = SecurityLog(ledger, clock=clock)
        self._committer = GroupCommitter(spool, ledger)
        self._desk = Desk(config, spool, ledger.path, self._security, clock=clock, received=self._received)
        self._limits = _limits(config)
        self._tls = None if config.tls.port is None else ServerTls(config.tls, config.peer)
        self._servers: list[tuple[Server, threading.Thread]] = []

    def start(self) -> None:
        """Listen. Raises OSError where the address is taken or not ours."""
        _config.LOG_HANDLER_LEVEL = "none"
        _config.VALIDATORS["UI"] = lambda value: (True, "")  # a bad UID is answered by us, not by an abort
        _register_storage_classes()
        node, reception = self._config.node, self._config.reception
        ae = AE(node.ae_title)
        ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.maximum_pdu_size = reception.max_pdu
        ae.maximum_associations = 100_000  # the gate counts, and only associations it let in
        ae.acse_timeout = reception.acse_timeout_s
        ae.dimse_timeout = reception.dimse_timeout_s
        ae.network_timeout = reception.network_timeout_s
        contexts = [build_context(uid, list(TRANSFER_SYNTAXES)) for uid in STORAGE_CLASSES]
        if self._desk.gets:
            for context in contexts:
                context.scu_role = context.scp_role = True
        contexts.append(build_context(VERIFICATION, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]))
        contexts += self._desk.contexts()
        ports: list[tuple[int, ServerTls | None]] = [(node.port, None)] if self._config.tls.plain else []
        if self._config.tls.port is not None:
            ports.append((self._config.tls.port, self._tls))
        for port, tls in ports:
            server = Server(
                ae, (node.host, port), node.ae_title, contexts,
                evt_handlers=[(evt.EVT_REQUESTED, self._on_requested), (evt.EVT_C_STORE, self._on_c_store),
                              (evt.EVT_C_ECHO, self._on_c_echo)],
                make_intake=self._intake, on_end=self._on_end, connection_limit=4 * reception.max_associations,
                association_limit_s=reception.max_association_s, tls=tls, on_tls_failure=self._on_tls_failure,
                services=self._desk.services)
            self._servers.append((server, threading.Thread(target=server.serve_forever, name="listener", daemon=True)))
        for _, thread in self._servers:
            thread.start()

    def reconfigure(self, config: Config) -> None:
        """For associations to come: who may open one, limits, time-outs. What was bound at the start stays (reload.py).

        Raises ConfigError where a peer's certificates cannot be used; then nothing has changed.
        """
        if self._tls is not None:
            self._tls.use(config.peer)
        self._config, self._limits = config, _limits(config)
        self._gate.reconfigure(config)
        self._desk.reconfigure(config)
        reception = config.reception
        for server, _ in self._servers:
            server.ae.acse_timeout = reception.acse_timeout_s
            server.ae.dimse_timeout = reception.dimse_timeout_s
            server.ae.network_timeout = reception.network_timeout_s
            server.association_limit_s = reception.max_association_s
            server.connection_limit = 4 * reception.max_associations

    def dead(self) -> str:
        """The name of a thread without which nothing is received and that has ended; "": all live."""
        threads = [*(thread for _, thread in self._servers), self._committer.thread]
        return next((thread.name for thread in threads if not thread.is_alive()), "")

    def stop(self) -> None:
        """No new associations; those open are aborted; what is on its way to the ledger is committed."""
        for server, thread in self._servers:
            server.shutdown()
            thread.join()
        left = [assoc for server, _ in self._servers for assoc in server.associations()]
        for assoc in left:
            assoc.abort(block=False)
        until = time.monotonic() + STOP_S
        for assoc in left:
            assoc.join(max(0.0, until - time.monotonic()))
        self._committer.close()
        self._desk.close()
        self._security.close()

    # --- associations

    def _on_requested(self, event: Event) -> None:
        assoc = cast(Acceptor, event.assoc)
        request = cast(A_ASSOCIATE, assoc.requestor.primitive)
        calling, address = request.calling_ae_title.strip(), peer_address(assoc)
        refusal = self._gate.enter(id(assoc), calling_ae=calling, called_ae=request.called_ae_title, address=address,
                                   tls=assoc.tls,
                                   authorities=self._tls.authorities if self._tls else None)
        if refusal is None:
            limit_pdu(assoc.requestor)
            assoc.callers = self._gate.callers(id(assoc))
            assoc.may_store = any(peer.may_send for peer in assoc.callers)
            return
        assoc.acse.send_reject(refusal.result, refusal.source, refusal.reason)
        assoc.is_rejected = True
        self._security.record("security", refusal.code, refusal.why, calling_ae=calling, address=address)
        assoc.kill()

    def _on_tls_failure(self, address: str, reason: str) -> None:
        self._security.record("security", "tls", f"no TLS connection came about: {reason}", calling_ae="",
                              address=address)

    def _received(self) -> int:
        """Objects that came over the associations that are open."""
        return sum(assoc.stored for server, _ in self._servers for assoc in server.associations())

    def _on_end(self, assoc: Acceptor) -> None:
        self._gate.leave(id(assoc))
        address = peer_address(assoc)
        if assoc.overdue:
            limit = self._config.reception.max_association_s
            self._security.record("security", "association_time", f"an association lasted longer than {limit:g} s "
                                  "(reception.max_association_s) and was aborted",
                                  calling_ae=assoc.requestor.ae_title.strip(), address=address)
        if assoc.requestor.primitive is None:
            self._security.record("security", "no_association", "a connection brought no A-ASSOCIATE request",
                                  calling_ae="", address=address)
        elif not assoc.is_rejected:
            calling = printable(assoc.requestor.ae_title)
            how = "aborted" if assoc.is_aborted else "released" if assoc.is_released else "lost"
            log.info(f"{calling} at {address} sent {assoc.stored} instances; the association was {how}.",
                     action="association_ended", calling_ae=calling, address=address, instances=assoc.stored, end=how)

    def _on_c_echo(self, event: Event) -> int:
        return SUCCESS

    # --- C-STORE

    def _intake(self, assoc: Acceptor, message: DIMSEMessage) -> Intake:
        def request() -> Request | None:
            context = assoc._accepted_cx.get(message.context_id or -1)
            command = message.command_set
            if context is None or command.get("CommandField") != 0x0001 or not assoc.may_store:
                return None
            return Request(
                sop_class_uid=str(command.get("AffectedSOPClassUID", "")),
                sop_instance_uid=str(command.get("AffectedSOPInstanceUID", "")),
                transfer_syntax_uid=str(context.transfer_syntax[0]), calling_ae=assoc.requestor.ae_title.strip())

        return Intake(self._spool, self._limits, request)

    def _on_c_store(self, event: Event) -> int | Dataset:
        """Never raises, never answers 0x0000 for what is not safe."""
        intake = cast(C_STORE, event.request).DataSet
        index: ObjectIndex | None = None
        try:
            if not cast(Acceptor, event.assoc).may_store:
                raise NotAllowed("this peer may not send (may_send)")
            if not isinstance(intake, Intake):
                raise CannotUnderstand("the request came without a data set")
            index = intake.index()
            kept = self._keep(event, intake, index)
            cast(Acceptor, event.assoc).stored += 1
        except NodeError as error:
            return self._refused(event, index, error)
        except TimeoutError:
            return self._refused(event, index, DiskFull("the disk did not answer in time; the sender may try again"))
        except sqlite3.OperationalError as error:  # disk full, or locked for long: it passes, so the sender may retry
            return self._refused(event, index, DiskFull(f"the ledger cannot be written: {error}; try again"))
        except Exception as error:  # an association must survive, and its peer hear that the object is not safe
            log.exception("An object could not be kept.", action="store_failed")
            return self._refused(event, index, NodeError(f"the object could not be kept: {type(error).__name__}"))
        finally:
            if isinstance(intake, Intake):
                intake.discard()
        if kept == "conflict":
            return self._conflict(event, index)
        return SUCCESS

    def _keep(self, event: Event, intake: Intake, index: ObjectIndex) -> Kept:
        return keep(intake, index, spool=self._spool, committer=self._committer, address=peer_address(event.assoc),
                    now=self._clock())

    def _refused(self, event: Event, index: ObjectIndex | None, error: NodeError) -> Dataset:
        study, series = (index.study_uid, index.series_uid) if index else ("", "")
        self._security.record(
            "reception", type(error).__name__, f"C-STORE answered 0x{error.status:04X}: {error}",
            calling_ae=event.assoc.requestor.ae_title, address=peer_address(event.assoc),
            study_uid=printable(study), series_uid=printable(series))
        return status_of(error.status, str(error))

    def _conflict(self, event: Event, index: ObjectIndex) -> Dataset:
        log.warning(f"Other bytes came under SOP Instance UID {index.sop_instance_uid}: kept aside, not used.",
                    action="conflict", sop_instance_uid=index.sop_instance_uid, series_uid=index.series_uid,
                    calling_ae=printable(event.assoc.requestor.ae_title))
        return status_of(CONFLICT, "other bytes known under this UID; kept, not used")
