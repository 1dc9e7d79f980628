"""Storage SCU and Verification SCU: send a series to a peer over one association, ask whether it answers.

Presentation contexts are proposed from what is sent (PS3.7 Annex D.3.2, PS3.4 Annex B.5): per SOP class one context for
each transfer syntax that occurs, so that objects go out as they lie whatever the peer would prefer, and one with the
plain syntaxes that do not occur, so that a peer that takes only those gets the objects converted or decompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomnode import tls
from dicomnode.config import Peer
from dicomnode.errors import NothingAccepted, PeerUnreachable
from dicomnode.headers import UNREADABLE
from dicomnode.requesting import keep_answers_for_the_asker, limit_pdu, on_connected, requestor

__all__ = ["Answer", "StoredObject", "echo", "is_success", "is_warning", "leave", "named", "open_association", "send",
           "store"]

# PS3.7 C.5.6 and C.4.2: what we write into the record where the peer left us no way to ask.
SOP_CLASS_NOT_SUPPORTED = 0x0122
CANNOT_ENCODE = 0xC000
MAX_CONTEXTS = 128  # PS3.8 9.3.2.2: odd identifiers 1 to 255
MAX_PDU = 16382  # bytes; what comes back is short, unless objects are fetched
Handler = tuple[Any, Callable[..., Any]] | tuple[Any, Callable[..., Any], list[Any]]
PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)


@dataclass(frozen=True)
class Answer:
    """What the peer said to one instance: C-STORE status (PS3.4 B.2.3) and its error comment, if any."""

    sop_instance_uid: str
    status: int
    comment: str = ""

    @property
    def stored(self) -> bool:
        """Whether the peer keeps the instance: success, or a warning."""
        return is_success(self.status) or is_warning(self.status)


@dataclass(frozen=True)
class StoredObject:
    """One instance on disk."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    path: Path

    @classmethod
    def read(cls, path: Path) -> StoredObject:
        """From the header of a file. Raises what pydicom raises where it cannot be read."""
        header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
        return cls(str(header.SOPClassUID), str(header.SOPInstanceUID), str(header.file_meta.TransferSyntaxUID), path)


def is_success(status: int) -> bool:
    """0x0000 (PS3.7 C.1)."""
    return status == 0x0000


def is_warning(status: int) -> bool:
    """0xBxxx, 0x0001, 0x0107, 0x0116: stored, with a remark (PS3.4 B.2.3, PS3.7 C.3)."""
    return status >> 12 == 0xB or status in (0x0001, 0x0107, 0x0116)


def echo(peer: Peer, *, calling_ae: str, connect_timeout_s: float, dimse_timeout_s: float) -> None:
    """C-ECHO. Raises PeerUnreachable with the reason and the remedy."""
    association = open_association(peer, [build_context(Verification)], calling_ae=calling_ae,
                                   connect_timeout_s=connect_timeout_s, dimse_timeout_s=dimse_timeout_s)
    try:
        if not association.accepted_contexts:
            raise PeerUnreachable(f"{named(peer)} does not accept C-ECHO. Remedy: enable Verification SCP there.")
        status = association.send_c_echo()
        if "Status" not in status:
            raise PeerUnreachable(f"{named(peer)} did not answer C-ECHO within {dimse_timeout_s:g} s")
        if status.Status != 0x0000:
            raise PeerUnreachable(f"{named(peer)} answered C-ECHO with status 0x{status.Status:04X}")
    finally:
        leave(association)


def send(peer: Peer, files: Sequence[Path | StoredObject], *, calling_ae: str, connect_timeout_s: float,
         dimse_timeout_s: float, on_answer: Callable[[Answer], None], stopped: Callable[[], bool] = lambda: False,
         on_open: Callable[[Association], None] = lambda _: None,
         originator: tuple[str, int] | None = None) -> list[Answer]:
    """Send DICOM files over one association; the last answer to each, in the order of `files`.

    Every answer is reported through `on_answer` as it comes. An instance that the peer does not store is sent once
    more by itself after the others. `stopped` is asked between instances: once true, the rest is left unsent. `on_open`
    gets the association, so that another thread can abort it while the peer is silent. `originator`: AE title and
    message ID of the C-MOVE that this is done for (PS3.7 9.1.1.1).

    Raises PeerUnreachable where no association comes about or it breaks half-way (answers so far were reported).
    """
    items = [file if isinstance(file, StoredObject) else StoredObject.read(file) for file in files]
    if not items:
        return []
    association = open_association(peer, _contexts(items), calling_ae=calling_ae, connect_timeout_s=connect_timeout_s,
                                   dimse_timeout_s=dimse_timeout_s)
    on_open(association)
    answers: dict[Path, Answer] = {}

    def send_one(item: StoredObject) -> None:
        try:
            answers[item.path] = store(association, item, originator=originator)
        except ConnectionError as error:
            raise PeerUnreachable(f"{named(peer)} {error}") from error
        on_answer(answers[item.path])

    try:
        for item in items:
            if stopped():
                break
            send_one(item)
        for item in items:
            answer = answers.get(item.path)
            if answer is None or answer.stored or answer.status == SOP_CLASS_NOT_SUPPORTED or stopped():
                continue
            send_one(item)
    finally:
        leave(association)
    return list(answers.values())


def named(peer: Peer) -> str:
    """The peer as messages name it."""
    return f"peer {peer.name} ({peer.ae_title} at {peer.host}:{peer.port})"


def _contexts(items: Sequence[StoredObject]) -> list[PresentationContext]:
    """Per SOP class: one for each syntax that occurs, one for the plain ones that do not."""
    contexts = []
    for sop_class in sorted({item.sop_class_uid for item in items}):
        stored = sorted({UID(item.transfer_syntax_uid) for item in items if item.sop_class_uid == sop_class})
        contexts += [build_context(sop_class, syntax) for syntax in stored]
        if others := [syntax for syntax in PLAIN if syntax not in stored]:
            contexts.append(build_context(sop_class, list(others)))
    if len(contexts) > MAX_CONTEXTS:
        raise PeerUnreachable(f"{len(contexts)} presentation contexts are needed, an association has {MAX_CONTEXTS}")
    return contexts


def open_association(
    peer: Peer, contexts: list[PresentationContext], *, calling_ae: str, connect_timeout_s: float,
    dimse_timeout_s: float, evt_handlers: Sequence[Handler] = (), ext_neg: Sequence[Any] = (), max_pdu: int = MAX_PDU,
) -> Association:
    """An established association with `peer`; the one door through which the node associates as a requestor.

    evt_handlers  (event, callable) or (event, callable, arguments), as pynetdicom takes them.
    ext_neg       extended negotiation items: roles, user identity (PS3.7 Annex D.3.3).
    max_pdu       bytes of the largest PDU that we take.

    With peer.tls over TLS, and never without. Raises PeerUnreachable with the reason and the remedy, ConfigError where
    our own certificate cannot be used; give the association back to `leave`.
    """
    if peer.port is None:
        raise PeerUnreachable(f"peer {peer.name} has no port. Remedy: set peer.port in the configuration.")
    secure = tls.client_context(peer.node_tls, peer) if peer.tls else None
    ae = requestor(calling_ae)
    ae.connection_timeout = connect_timeout_s
    ae.acse_timeout = max(connect_timeout_s, 1)
    ae.dimse_timeout = dimse_timeout_s
    ae.network_timeout = dimse_timeout_s
    association = ae.associate(
        peer.host, peer.port, contexts=contexts, ae_title=peer.ae_title, max_pdu=max_pdu, ext_neg=list(ext_neg) or None,
        evt_handlers=[(evt.EVT_CONN_OPEN, on_connected), *evt_handlers],
        tls_args=None if secure is None else (secure, peer.host))
    if association.is_established:
        keep_answers_for_the_asker(association)
        limit_pdu(association.acceptor)
        return association
    if secure is not None and secure.failure:
        raise PeerUnreachable(f"{named(peer)}: no TLS connection comes about: {secure.failure}. Remedy: check tls.ca, "
                              "peer.tls_ca, peer.certificate_sha256, and that it listens for TLS on this port.")
    if association.is_rejected and association.acceptor.primitive is not None:
        answer = association.acceptor.primitive
        raise PeerUnreachable(f"{named(peer)} rejects the association: {answer.reason_str} ({answer.result_str}). "
                              f"Remedy: make our AE title {calling_ae} and address known there.")
    if association.acceptor.primitive is not None:
        shown = ", ".join(sorted({UID(str(context.abstract_syntax)).name for context in contexts}))
        raise NothingAccepted(f"{named(peer)} accepts no presentation context for {shown}. "
                              "Remedy: let it accept this SOP class of us.")
    asked = "" if secure is None else ", or does not accept our certificate (tls.certificate)"
    raise PeerUnreachable(f"{named(peer)} does not answer{asked}. "
                          "Remedy: check host, port and firewall; is it running?")


def leave(association: Association) -> None:
    """Release what is still established."""
    if association.is_established:
        association.release()


def store(association: Association, item: StoredObject, *, message_id: int = 1,
          originator: tuple[str, int] | None = None) -> Answer:
    """One C-STORE, from the file as it lies where the peer accepts its transfer syntax.

    What cannot be read or decompressed here is answered by ourselves: one bad object keeps no other from the peer.
    Raises ConnectionError where the association is over.
    """
    syntaxes = {context.transfer_syntax[0] for context in association.accepted_contexts
                if context.abstract_syntax == item.sop_class_uid and context.as_scu}
    if not syntaxes:
        return Answer(item.sop_instance_uid, SOP_CLASS_NOT_SUPPORTED, "no presentation context accepted")
    try:
        what = _readable_by_peer(item, syntaxes)
    except (OSError, InvalidDicomError, RuntimeError, *UNREADABLE) as error:
        return Answer(item.sop_instance_uid, CANNOT_ENCODE, f"cannot be read or decompressed here: {error}"[:200])
    ae_title, number = originator or (None, None)
    try:
        response = association.send_c_store(what, msg_id=message_id, originator_aet=ae_title, originator_id=number)
    except (RuntimeError, OSError) as error:
        association.abort()  # a data set that ends half-way must not be followed by anything
        raise ConnectionError(f"closed the association: {error}") from error
    except (InvalidDicomError, *UNREADABLE) as error:
        return Answer(item.sop_instance_uid, CANNOT_ENCODE, str(error)[:200])
    if "Status" not in response:
        raise ConnectionError("dropped the association, or was silent for too long, in the middle")
    return Answer(item.sop_instance_uid, int(response.Status), str(response.get("ErrorComment", "")))


def _readable_by_peer(item: StoredObject, syntaxes: set[UID]) -> Path | Dataset:
    """The file as it is, or the data set decompressed where the peer does not take its transfer syntax."""
    syntax = UID(item.transfer_syntax_uid)
    if syntax in syntaxes:
        item.path.open("rb").close()  # raises where it is gone
        return item.path
    dataset = dcmread(item.path)
    if syntax == DeflatedExplicitVRLittleEndian:  # only the stream is compressed, not the pixels
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    elif syntax not in PLAIN:
        dataset.decompress(generate_instance_uid=False)
    return dataset
