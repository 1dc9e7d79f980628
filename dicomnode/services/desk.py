"""The door of the services: which request of which peer is answered how.

Runs in the receiving process, each request in the thread of its association. The ledger is read and written over
connections of the desk's own, so that neither waits for the other nor holds up the objects that come in.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.dimse_primitives import C_FIND, C_GET, C_MOVE, N_ACTION, N_EVENT_REPORT
from pynetdicom.dsutils import decode, encode
from pynetdicom.presentation import PresentationContext, build_context

from dicomnode.config import Config
from dicomnode.errors import CannotUnderstand, NodeError, NotAllowed
from dicomnode.gate import SecurityLog, printable
from dicomnode.headers import UNREADABLE
from dicomnode.intake import Intake
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.scu import StoredObject
from dicomnode.services import commitscp, findscp, moving
from dicomnode.services.catalogue import HEADERS_KEPT, Catalogue
from dicomnode.spool import Spool
from dicomnode.transport import Acceptor, Service, peer_address

__all__ = ["RETRIEVALS", "Desk"]

PATIENT_ROOT, STUDY_ROOT = "1.2.840.10008.5.1.4.1.2.1", "1.2.840.10008.5.1.4.1.2.2"  # PS3.4 C.6; .1 FIND .2 MOVE .3 GET
RETRIEVALS = 3  # C-MOVEs and C-GETs at once: they share the processor with reception
HEADERS_A_QUERY = HEADERS_KEPT  # read from disk for one query, 1.3 ms each; what is remembered costs nothing
RETRIEVAL_WAIT_S = 30.0  # how long another one waits for its turn
MOST_SUBOPERATIONS = 65_535  # their counts are US (PS3.7 E.1)
MATCH, PENDING, PENDING_SOME_KEYS_IGNORED = 0x0000, 0xFF00, 0xFF01  # PS3.4 Table C.4-1
TOO_MANY_MATCHES, CANNOT_COUNT = 0xA700, 0xA701
UNKNOWN_DESTINATION = 0xA801
REQUEST_COMMITMENT = 1  # ActionTypeID, PS3.4 J.3.2
log = get_logger("desk")


class UnknownDestination(NodeError):
    """A C-MOVE to nobody we know."""

    status = UNKNOWN_DESTINATION


class NoSuchAction(NodeError):
    """An N-ACTION other than the request of PS3.4 J.3.2."""

    status = 0x0123  # PS3.7 Annex C: no such action


class NotOffered(NodeError):
    """A request on a presentation context of another service."""

    status = 0x0122  # PS3.7 Annex C: refused, SOP class not supported


class TooMuch(NodeError):
    """A query that would keep the processor from reception."""

    status = TOO_MANY_MATCHES


class Busy(NodeError):
    """Other retrievals are under way, or more is asked for than can be counted."""

    status = moving.UNABLE_TO_PERFORM


class Desk:
    """Answers C-FIND, C-MOVE, C-GET, N-ACTION and N-EVENT-REPORT; `services` is what an Acceptor asks for."""

    def __init__(self, config: Config, spool: Spool, ledger_path: Path, security: SecurityLog, *,
                 clock: Callable[[], float], received: Callable[[], int] = lambda: 0) -> None:
        """`received`: how many objects have come over the associations that are open."""
        self._config, self._spool, self._security, self._clock = config, spool, security, clock
        self._reading, self._writing = Ledger(ledger_path), Ledger(ledger_path)
        self._catalogue = Catalogue(spool, self._reading)
        self._received = received
        self._slots = threading.BoundedSemaphore(RETRIEVALS)

    def reconfigure(self, config: Config) -> None:
        """For requests to come. Which services are offered at all is decided at the start."""
        self._config = config

    def close(self) -> None:
        self._reading.close()
        self._writing.close()

    @property
    def services(self) -> Mapping[type, Service]:
        """Request primitive -> who serves it."""
        served: dict[type, tuple[str, tuple[str, ...], Callable[..., None]]] = {
            C_FIND: ("may_query", _models(1), self._find), C_MOVE: ("may_query", _models(2), self._move),
            C_GET: ("may_query", _models(3), self._get),
            N_ACTION: ("may_send", (commitscp.PUSH_MODEL,), self._commit),
            N_EVENT_REPORT: ("", (commitscp.PUSH_MODEL,), self._hear)}
        return {primitive: partial(self._serve, *how) for primitive, how in served.items()}

    def contexts(self) -> list[PresentationContext]:
        """What is accepted besides storage and verification."""
        services = self._config.services
        found = []
        if services.query_retrieve:
            found += [model for service in (1, 2, 3) for model in _models(service)]
        contexts = [build_context(uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]) for uid in found]
        if services.storage_commitment or any(peer.confirm == "commitment" for peer in self._config.peer):
            contexts.append(build_context(commitscp.PUSH_MODEL, [ExplicitVRLittleEndian, ImplicitVRLittleEndian]))
            contexts[-1].scu_role = contexts[-1].scp_role = True  # they ask us; or they report what we asked them
        return contexts

    @property
    def gets(self) -> bool:
        """Whether somebody may fetch by C-GET: storage contexts are then accepted in both roles (PS3.4 C.5.3.1)."""
        return self._config.services.query_retrieve and any(peer.may_query for peer in self._config.peer)

    # --- serving

    def _serve(self, right: str, models: tuple[str, ...], work: Callable[[Acceptor, Any, PresentationContext], None],
               assoc: Acceptor, request: Any, context: PresentationContext) -> None:
        """Never raises: whatever goes wrong, the peer hears a status."""
        calling, address = printable(assoc.requestor.ae_title.strip()), peer_address(assoc)
        try:
            if right and not any(getattr(peer, right) for peer in assoc.callers):
                raise NotAllowed(f"{calling} has no right to {type(request).__name__.replace('_', '-')} ({right})")
            if context.abstract_syntax not in models:
                raise NotOffered("the presentation context of the request is of another service")
            work(assoc, request, context)
        except NodeError as error:
            if isinstance(error, NotAllowed):
                self._security.record("security", "service", str(error), calling_ae=calling, address=address)
            else:
                log.warning(f"A request was not served: {error}", action="request_refused", calling_ae=calling,
                            address=address, status=f"0x{error.status:04X}")
            _reply(assoc, request, context, _fitting(request, error.status), comment=str(error))
        except Exception as error:  # an association must survive; values of a header stay out of the log
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            log.error("A request could not be served.", action="request_failed", calling_ae=calling, address=address,
                      error=type(error).__name__,
                      where="" if frame is None else f"{frame.tb_frame.f_code.co_name}:{frame.tb_lineno}")
            _reply(assoc, request, context, _fitting(request, 0xC000),
                   comment=f"processing failed: {type(error).__name__}")

    # --- query

    def _find(self, assoc: Acceptor, request: C_FIND, context: PresentationContext) -> None:
        query = _query(request, context)
        status = PENDING_SOME_KEYS_IGNORED if query.unsupported else PENDING
        limit, found = self._config.services.max_matches, 0
        stopped, courtesy = partial(_stopped, assoc, request), moving.Courtesy(self._received, pause_s=0.002)
        reads = itertools.count(1)

        def on_read() -> None:
            if next(reads) > HEADERS_A_QUERY:
                raise TooMuch(f"it would read more than {HEADERS_A_QUERY} headers: name a study or an accession number")
            courtesy()

        for entity in self._catalogue.find(query, stopped=stopped, on_read=on_read):
            if found == limit:
                _reply(assoc, request, context, TOO_MANY_MATCHES, comment=f"more than {limit} matches: ask for less")
                break
            _reply(assoc, request, context, status,
                   identifier=findscp.answer(query, entity, ae_title=self._config.node.ae_title))
            found += 1
        else:
            _reply(assoc, request, context, moving.CANCELLED if _cancelled(assoc, request) else MATCH)
        log.info("A query was answered.", action="query", calling_ae=printable(assoc.requestor.ae_title.strip()),
                 level=query.level, matches=found)

    # --- retrieval

    def _move(self, assoc: Acceptor, request: C_MOVE, context: PresentationContext) -> None:
        query = _query(request, context, retrieve=True)
        name = (request.MoveDestination or "").strip()
        peer = next((peer for peer in self._config.peer if peer.ae_title == name and peer.port is not None), None)
        if peer is None:
            raise UnknownDestination(f"move destination {printable(name)} is no [[peer]] with a port")

        def send(objects: list[StoredObject], tally: moving.Tally, tell: Callable[[], None]) -> str:
            return moving.send_on(self._config, peer, objects, tally, tell=tell,
                                  originator=(assoc.requestor.ae_title.strip(), request.MessageID or 0),
                                  stopped=partial(_stopped, assoc, request), courtesy=moving.Courtesy(self._received))

        self._retrieve(assoc, request, context, query, send)

    def _get(self, assoc: Acceptor, request: C_GET, context: PresentationContext) -> None:
        query = _query(request, context, retrieve=True)

        def send(objects: list[StoredObject], tally: moving.Tally, tell: Callable[[], None]) -> str:
            moving.send_back(assoc, request.MessageID or 0, objects, tally, tell=tell,
                             stopped=partial(_stopped, assoc, request), courtesy=moving.Courtesy(self._received))
            return ""

        self._retrieve(assoc, request, context, query, send)

    def _retrieve(self, assoc: Acceptor, request: C_MOVE | C_GET, context: PresentationContext, query: findscp.Query,
                  send: Callable[[list[StoredObject], moving.Tally, Callable[[], None]], str]) -> None:
        objects = self._catalogue.objects_of(query)
        if len(objects) > MOST_SUBOPERATIONS:
            error = Busy(f"{len(objects)} objects match, a retrieval can count {MOST_SUBOPERATIONS}")
            error.status = CANNOT_COUNT
            raise error
        tally, why = moving.Tally([stored.sop_instance_uid for stored in objects]), ""
        self._wait_for_turn(assoc, request)
        try:
            if objects and not _stopped(assoc, request):
                why = send(objects, tally, partial(_reply, assoc, request, context, PENDING, tally=tally))
        finally:
            self._slots.release()
        cancelled = _cancelled(assoc, request)
        if not cancelled:
            tally.fail_rest()
        _reply(assoc, request, context, tally.verdict(cancelled=cancelled), tally=tally, comment=why,
               identifier=tally.failures())
        log.info("A retrieval has ended.", action="retrieved", calling_ae=printable(assoc.requestor.ae_title.strip()),
                 service=type(request).__name__, level=query.level, study_uid="".join(query.uids("STUDY")[:1]),
                 completed=tally.completed, warning=tally.warning, failed=len(tally.failed_uids), reason=why)

    def _wait_for_turn(self, assoc: Acceptor, request: C_MOVE | C_GET) -> None:
        until = time.monotonic() + RETRIEVAL_WAIT_S
        while not self._slots.acquire(timeout=0.2):
            if time.monotonic() > until or _stopped(assoc, request):
                raise Busy(f"{RETRIEVALS} retrievals are under way; try again")

    # --- storage commitment

    def _commit(self, assoc: Acceptor, request: N_ACTION, context: PresentationContext) -> None:
        if not self._config.services.storage_commitment:
            raise NotAllowed("storage commitment is not offered here (services.storage_commitment)")
        if request.RequestedSOPClassUID != commitscp.PUSH_MODEL or request.ActionTypeID != REQUEST_COMMITMENT:
            raise NoSuchAction("only storage commitment may be requested")
        asked = commitscp.read_request(_decoded(request.ActionInformation, context))
        commitscp.enter(self._writing, asked, calling_ae=assoc.requestor.ae_title.strip(),
                        address=peer_address(assoc), now=self._clock())
        _reply(assoc, request, context, MATCH)
        assoc.when_idle.append(partial(self._report_here, assoc, context, asked))

    def _report_here(self, assoc: Acceptor, context: PresentationContext, asked: commitscp.Request) -> None:
        """The peer kept the association open: it may want the answer here (PS3.4 J.3.3)."""
        calling = assoc.requestor.ae_title.strip()
        if not commitscp.owed(self._reading, asked.transaction_uid, calling):
            return  # it was told meanwhile, on an association of our own
        verdict = commitscp.verify(self._reading, self._spool, asked.items, calling_ae=calling)
        event_type, information = commitscp.event_report(asked.transaction_uid, verdict,
                                                         ae_title=self._config.node.ae_title)
        report = N_EVENT_REPORT()
        report.MessageID, report.EventTypeID = 1, event_type
        report.AffectedSOPClassUID = commitscp.PUSH_MODEL
        report.AffectedSOPInstanceUID = commitscp.PUSH_MODEL_INSTANCE
        report.EventInformation = _encoded(information, context)
        response = assoc.ask(report, context.context_id or 0)
        if isinstance(response, N_EVENT_REPORT) and response.Status == MATCH:
            commitscp.answered(self._writing, asked.transaction_uid, calling, now=self._clock(), verdict=verdict)

    def _hear(self, assoc: Acceptor, request: N_EVENT_REPORT, context: PresentationContext) -> None:
        """A peer reports on what we asked it to commit to."""
        from dicomnode import commitment

        status = commitment.report(
            self._writing, _decoded(request.EventInformation, context), event_type=request.EventTypeID or 0,
            calling_ae=assoc.requestor.ae_title.strip(), now=self._clock())
        _reply(assoc, request, context, status)


def _models(service: int) -> tuple[str, ...]:
    return f"{PATIENT_ROOT}.{service}", f"{STUDY_ROOT}.{service}"


def _fitting(request: Any, status: int) -> int:
    """DIMSE-N knows no 0xCxxx (PS3.7 C.5): processing failure instead."""
    return 0x0110 if isinstance(request, N_ACTION | N_EVENT_REPORT) and status >= 0xC000 else status


def _query(request: C_FIND | C_MOVE | C_GET, context: PresentationContext, *, retrieve: bool = False) -> findscp.Query:
    root = str(context.abstract_syntax).rpartition(".")[0]
    return findscp.read_query(_decoded(request.Identifier, context), patient_root=root == PATIENT_ROOT,
                              retrieve=retrieve)


def _cancelled(assoc: Acceptor, request: Any) -> bool:
    return request.MessageID in assoc.dimse.cancel_req


def _stopped(assoc: Acceptor, request: Any) -> bool:
    return _cancelled(assoc, request) or not assoc.waits


def _decoded(received: BytesIO | None, context: PresentationContext) -> Dataset:
    """Raises CannotUnderstand."""
    if received is None or (isinstance(received, Intake) and received.error is not None):
        raise CannotUnderstand("the request has no data set, or one that is too large")
    syntax = context.transfer_syntax[0]
    try:
        found = decode(received, syntax.is_implicit_VR, syntax.is_little_endian)
        for element in found.iterall():  # whatever cannot be read is found here
            element.value  # noqa: B018
        return found
    except (OSError, *UNREADABLE) as error:  # OSError: pydicom, where the bytes end within an element
        raise CannotUnderstand("the data set of the request cannot be read") from error


def _encoded(dataset: Dataset, context: PresentationContext) -> BytesIO:
    """Raises NodeError."""
    syntax = context.transfer_syntax[0]
    encoded = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian)
    if encoded is None:
        raise NodeError("a response could not be encoded")
    return BytesIO(encoded)


def _reply(assoc: Acceptor, request: Any, context: PresentationContext, status: int, *,
           identifier: Dataset | None = None, comment: str = "", tally: moving.Tally | None = None) -> None:
    """One response; nothing where nobody listens any more."""
    if not assoc.waits:
        return
    response = type(request)()
    response.MessageIDBeingRespondedTo = request.MessageID
    response.AffectedSOPClassUID = context.abstract_syntax
    response.Status = status
    if comment and status not in (MATCH, PENDING):
        response.ErrorComment = printable(comment.encode("ascii", "replace").decode().replace("\\", "/"))
    if identifier is not None:
        response.Identifier = _encoded(identifier, context)
    if isinstance(response, N_ACTION | N_EVENT_REPORT):
        response.AffectedSOPInstanceUID = commitscp.PUSH_MODEL_INSTANCE
    if isinstance(response, N_ACTION):
        response.ActionTypeID = request.ActionTypeID
    if isinstance(response, N_EVENT_REPORT):
        response.EventTypeID = request.EventTypeID
    if tally is not None:
        if status in (PENDING, moving.CANCELLED):
            response.NumberOfRemainingSuboperations = tally.remaining
        response.NumberOfCompletedSuboperations = tally.completed
        response.NumberOfFailedSuboperations = len(tally.failed_uids)
        response.NumberOfWarningSuboperations = tally.warning
    assoc.dimse.send_msg(response, context.context_id or 0)
