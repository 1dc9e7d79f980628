"""Storage SCU and Verification SCU: send a series to a peer over one association, ask whether it answers.

Presentation contexts are proposed from what is sent (PS3.7 Annex D.3.2, PS3.4 Annex B.5): per SOP class one context for
each compressed or deflated transfer syntax that occurs, and one plain context, so that a peer that takes only
uncompressed objects gets them decompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from dicomnode import tls
from dicomnode.config import Peer
from dicomnode.errors import PeerUnreachable
from dicomnode.requesting import keep_answers_for_the_asker, limit_pdu, on_connected

__all__ = ["Answer", "echo", "is_success", "is_warning", "leave", "named", "open_association", "send"]

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
class _Item:
    path: Path
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax: UID


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


def send(peer: Peer, files: Sequence[Path], *, calling_ae: str, connect_timeout_s: float, dimse_timeout_s: float,
         on_answer: Callable[[Answer], None], stopped: Callable[[], bool] = lambda: False,
         on_open: Callable[[Association], None] = lambda _: None) -> list[Answer]:
    """Send DICOM files over one association; the last answer to each, in the order of `files`.

    Every answer is reported through `on_answer` as it comes. An instance that the peer does not store is sent once
    more by itself after the others. `stopped` is asked between instances: once true, the rest is left unsent. `on_open`
    gets the association, so that another thread can abort it while the peer is silent.

    Raises PeerUnreachable where no association comes about or it breaks half-way (answers so far were reported).
    """
    items = [_item(path) for path in files]
    if not items:
        return []
    association = open_association(peer, _contexts(items), calling_ae=calling_ae, connect_timeout_s=connect_timeout_s,
                                   dimse_timeout_s=dimse_timeout_s)
    on_open(association)
    answers: dict[Path, Answer] = {}
    try:
        for item in items:
            if stopped():
                break
            answers[item.path] = _store(association, item, peer)
            on_answer(answers[item.path])
        for item in items:
            answer = answers.get(item.path)
            if answer is None or answer.stored or answer.status == SOP_CLASS_NOT_SUPPORTED or stopped():
                continue
            answers[item.path] = _store(association, item, peer)
            on_answer(answers[item.path])
    finally:
        leave(association)
    return list(answers.values())


def named(peer: Peer) -> str:
    """The peer as messages name it."""
    return f"peer {peer.name} ({peer.ae_title} at {peer.host}:{peer.port})"


def _item(path: Path) -> _Item:
    header = dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID", "SOPInstanceUID"])
    return _Item(path, str(header.SOPClassUID), str(header.SOPInstanceUID), UID(header.file_meta.TransferSyntaxUID))


def _contexts(items: Sequence[_Item]) -> list[PresentationContext]:
    """Per SOP class: one plain context (the stored syntax first), one for each other syntax that occurs."""
    contexts = []
    for sop_class in sorted({item.sop_class_uid for item in items}):
        stored = sorted({item.transfer_syntax for item in items if item.sop_class_uid == sop_class})
        contexts += [build_context(sop_class, [syntax]) for syntax in stored if syntax not in PLAIN]
        contexts.append(build_context(sop_class, sorted(PLAIN, key=lambda syntax: syntax not in stored)))
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
    ae = AE(ae_title=calling_ae)
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
        limit_pdu(association)
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
        raise PeerUnreachable(f"{named(peer)} accepts no presentation context for {shown}. "
                              "Remedy: let it accept this SOP class of us.")
    asked = "" if secure is None else ", or does not accept our certificate (tls.certificate)"
    raise PeerUnreachable(f"{named(peer)} does not answer{asked}. "
                          "Remedy: check host, port and firewall; is it running?")


def leave(association: Association) -> None:
    """Release what is still established."""
    if association.is_established:
        association.release()


def _store(association: Association, item: _Item, peer: Peer) -> Answer:
    """One C-STORE. Raises PeerUnreachable where the association is gone."""
    syntaxes = {context.transfer_syntax[0] for context in association.accepted_contexts
                if context.abstract_syntax == item.sop_class_uid}
    if not syntaxes:
        return Answer(item.sop_instance_uid, SOP_CLASS_NOT_SUPPORTED, "no presentation context accepted")
    try:
        dataset = _readable_by_peer(dcmread(item.path), item, syntaxes)
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        return Answer(item.sop_instance_uid, CANNOT_ENCODE, f"cannot be decompressed here: {error}"[:200])
    try:
        response = association.send_c_store(dataset)
    except (RuntimeError, OSError) as error:
        raise PeerUnreachable(f"{named(peer)} closed the association: {error}") from error
    except (ValueError, AttributeError) as error:
        return Answer(item.sop_instance_uid, CANNOT_ENCODE, str(error)[:200])
    if "Status" not in response:
        raise PeerUnreachable(f"{named(peer)} dropped the association, or was silent for too long, in the middle")
    return Answer(item.sop_instance_uid, int(response.Status), str(response.get("ErrorComment", "")))


def _readable_by_peer(dataset: Dataset, item: _Item, syntaxes: set[UID]) -> Dataset:
    """The data set as it is, or decompressed where the peer does not take its transfer syntax."""
    if item.transfer_syntax not in PLAIN and item.transfer_syntax not in syntaxes:
        if item.transfer_syntax == DeflatedExplicitVRLittleEndian:  # only the stream is compressed, not the pixels
            dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        else:
            dataset.decompress(generate_instance_uid=False)
    return dataset
