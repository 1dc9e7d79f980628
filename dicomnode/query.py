"""Query/Retrieve SCU, Study Root (PS3.4 Annex C): ask a peer what it holds, and have it sent.

C-FIND at study, series and image level; C-MOVE to an AE title that the peer knows; C-GET over the same association,
where the caller keeps what comes. Answers are taken as they are: doubled ones count once, those without a valid UID are
skipped and counted, an absent count is None and never 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from dicomnode.config import Config, Peer
from dicomnode.errors import PeerRefused, PeerUnreachable, RefusedInput
from dicomnode.headers import integer, text, values
from dicomnode.logs import get_logger
from dicomnode.scu import leave, named, open_association
from dicomnode.spool import valid_uid

__all__ = ["MAX_ANSWERS", "Asking", "Retrieved", "SeriesFound", "StudyFound", "Times", "date_range", "days_of",
           "retrieve"]

FIND = "1.2.840.10008.5.1.4.1.2.2.1"  # Study Root Query/Retrieve Information Model
MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
GET = "1.2.840.10008.5.1.4.1.2.2.3"

MAX_ANSWERS = 10_000
MOST_INSTANCES = 10**9  # a count beyond is none
RETRIEVE_TIMEOUT_S = 600.0  # between two answers of a retrieval: an archive may fetch from a slow store first
GET_PDU = 131072
PENDING = (0xFF00, 0xFF01)
CANCELLED = 0xFE00

#: What C-GET may bring, each class in plain and in the compressed transfer syntaxes that PET and CT come in.
IMAGES = ("1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.128.1", "1.2.840.10008.5.1.4.1.1.130",
          "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
OTHERS = ("1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.20", "1.2.840.10008.5.1.4.1.1.4",
          "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.30", "1.2.840.10008.5.1.4.1.1.66.4",
          "1.2.840.10008.5.1.4.1.1.88.11", "1.2.840.10008.5.1.4.1.1.88.22", "1.2.840.10008.5.1.4.1.1.88.33",
          "1.2.840.10008.5.1.4.1.1.88.67", "1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.66")
PLAIN = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2")
COMPRESSED = ("1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.80",
              "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99")

#: PS3.4 C.4.1.1.4, C.4.2.1.5, C.4.3.1.4
MEANINGS = {
    0xA700: "out of resources", 0xA701: "out of resources: it cannot count the matches",
    0xA702: "out of resources: it cannot send", 0xA801: "move destination unknown",
    0xA900: "the identifier does not match the SOP class", 0xB000: "some instances could not be sent",
    0x0122: "SOP class not supported", 0x0110: "processing failure", CANCELLED: "cancelled",
}

log = get_logger(__name__)


@dataclass(frozen=True)
class Times:
    """Who asks, and how long it waits; seconds."""

    calling_ae: str
    connect_timeout_s: float = 10.0
    dimse_timeout_s: float = 60.0

    @classmethod
    def of(cls, config: Config) -> Times:
        return cls(config.node.ae_title, config.delivery.connect_timeout_s, config.delivery.dimse_timeout_s)


@dataclass(frozen=True)
class StudyFound:
    """One study that a peer holds. `study_date` as answered, YYYYMMDD; `modalities` () where the peer says none."""

    study_uid: str
    study_date: str
    accession_number: str
    modalities: tuple[str, ...]

    @classmethod
    def of(cls, answer: Dataset) -> StudyFound:
        """What an answer at study level says; nothing in it is trusted to be what its VR promises."""
        return cls(text(answer, "StudyInstanceUID"), _plain(text(answer, "StudyDate"), 26),
                   _plain(text(answer, "AccessionNumber"), 64),
                   tuple(_plain(value, 16) for value in values(answer, "ModalitiesInStudy")))


@dataclass(frozen=True)
class SeriesFound:
    """One series that a peer holds. `instances`: NumberOfSeriesRelatedInstances, None where the peer does not say.

    `header` holds all that the peer answered; an attribute that is absent or empty there is unknown.
    """

    study_uid: str
    series_uid: str
    modality: str
    instances: int | None
    header: Dataset = field(compare=False, repr=False)

    @classmethod
    def of(cls, study_uid: str, answer: Dataset) -> SeriesFound:
        """What an answer at series level says of a series of that study."""
        count = integer(answer, "NumberOfSeriesRelatedInstances")
        return cls(study_uid, text(answer, "SeriesInstanceUID"), _plain(text(answer, "Modality"), 16),
                   count if count is not None and 0 <= count <= MOST_INSTANCES else None, answer)


@dataclass(frozen=True)
class Retrieved:
    """What the peer said at the end of a retrieval: its counts of sub-operations (PS3.7 9.1.3, 9.1.4)."""

    completed: int
    failed: int
    warning: int
    status: int

    @property
    def arrived(self) -> int:
        """How many instances should be here now."""
        return self.completed + self.warning

    def said(self, how: str) -> str:
        """One sentence; `how` is c-move or c-get."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{how.upper()} was answered with status 0x{self.status:04X}: {self.arrived} instances sent{failed}"


def date_range(first: date, last: date) -> str:
    """A StudyDate range, both ends included (PS3.4 C.2.2.2.5).

    >>> date_range(date(2024, 3, 1), date(2024, 3, 2)), date_range(date(2024, 3, 1), date(2024, 3, 1))
    ('20240301-20240302', '20240301')
    """
    if last < first:
        raise ValueError(f"the range ends on {last}, before it begins on {first}")
    return f"{first:%Y%m%d}" if first == last else f"{first:%Y%m%d}-{last:%Y%m%d}"


def days_of(words: str, *, today: date) -> tuple[date, date]:
    """The first and last day that a person means: "today", "yesterday", "2024-03-01", "2024-03-01..2024-03-05".

    Raises RefusedInput.
    """
    named = {"today": today, "yesterday": today - timedelta(days=1)}
    first, _, last = words.strip().lower().partition("..")
    try:
        days = [named.get(word) or date.fromisoformat(word) for word in (first, last or first)]
    except ValueError:
        raise RefusedInput(f"{words!r} is no day. Remedy: e.g. 2024-03-01, 2024-03-01..2024-03-05, today, "
                           "yesterday.") from None
    if days[1] < days[0]:
        raise RefusedInput(f"{words!r} ends before it begins")
    return days[0], days[1]


class Asking:
    """C-FIND over one association, opened at the first question; a context manager.

    limit    more answers to one question are refused: the query is cancelled, PeerRefused says so.
    stopped  asked at every answer; once true the query is cancelled and PeerRefused raised.
    """

    def __init__(self, peer: Peer, times: Times, *, limit: int = MAX_ANSWERS,
                 stopped: Callable[[], bool] = lambda: False) -> None:
        self.peer, self._times, self._limit, self._stopped = peer, times, limit, stopped
        self._association: Association | None = None
        self._message = 0
        self.skipped = 0  # answers without a valid UID, over all questions

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        if self._association is not None:
            leave(self._association)

    def studies(self, *, study_date: str = "", study_uid: str = "", accession_number: str = "",
                modality: str = "") -> list[StudyFound]:
        """The studies that match; empty keys match all. `study_date`: one day or a range (`date_range`).

        A peer need not support matching by ModalitiesInStudy: studies that it says to be without `modality` are left
        out here. Raises PeerUnreachable and PeerRefused.
        """
        keys = _keys("STUDY", StudyInstanceUID=study_uid, StudyDate=study_date, AccessionNumber=accession_number,
                     ModalitiesInStudy=modality)
        found: dict[str, StudyFound] = {}
        for answer in self._answers(keys, "StudyInstanceUID"):
            study = StudyFound.of(answer)
            if not modality or not study.modalities or modality in study.modalities:
                found.setdefault(study.study_uid, study)
        return list(found.values())

    def series(self, study_uid: str, *, series_uid: str = "", also: Sequence[str] = ()) -> list[SeriesFound]:
        """The series of a study, or the one asked for. `also`: keywords asked for besides, as return keys.

        Raises PeerUnreachable and PeerRefused.
        """
        keys = _keys("SERIES", StudyInstanceUID=study_uid, SeriesInstanceUID=series_uid, Modality="", SeriesNumber=None,
                     SeriesDescription="", NumberOfSeriesRelatedInstances=None)
        for keyword in also:
            if keyword not in keys:
                setattr(keys, keyword, None)
        found: dict[str, SeriesFound] = {}
        for answer in self._answers(keys, "SeriesInstanceUID"):
            one = SeriesFound.of(study_uid, answer)
            if series_uid in ("", one.series_uid):
                found.setdefault(one.series_uid, one)
        return list(found.values())

    def instances(self, study_uid: str, series_uid: str) -> list[str]:
        """The SOP Instance UIDs of a series. Raises PeerUnreachable and PeerRefused."""
        keys = _keys("IMAGE", StudyInstanceUID=study_uid, SeriesInstanceUID=series_uid, SOPInstanceUID="")
        answers = self._answers(keys, "SOPInstanceUID")
        return list(dict.fromkeys(text(answer, "SOPInstanceUID") for answer in answers))

    def count(self, study_uid: str, series_uid: str) -> int:
        """How many instances of a series the peer holds; counted one by one where it gives no number. 0: not known.

        Raises PeerUnreachable and PeerRefused.
        """
        found = self.series(study_uid, series_uid=series_uid)
        if not found:
            return 0
        return found[0].instances if found[0].instances is not None else len(self.instances(study_uid, series_uid))

    def _answers(self, keys: Dataset, unique: str) -> Iterator[Dataset]:
        """The pending answers that have a `unique` UID. Ends with the query's end; raises unless that is success."""
        try:
            yield from self._asked(self._open(), keys, unique)
        except PeerUnreachable:
            if self._association is not None:
                self._association.abort()  # it may not have heard yet that the peer left
                self._association = None
            raise

    def _asked(self, association: Association, keys: Dataset, unique: str) -> Iterator[Dataset]:
        self._message = self._message % 0xFFFF + 1
        given = 0
        for status, answer in _talk(association, self.peer, "C-FIND", lambda: association.send_c_find(
                keys, FIND, msg_id=self._message)):
            if status.Status not in PENDING:
                if status.Status == 0x0000:
                    break
                raise PeerRefused(_failure(self.peer, "C-FIND", status, self._times.calling_ae))
            if answer is None or not valid_uid(text(answer, unique)):
                self.skipped += 1
                log.warning("an answer to a query holds no valid UID and is skipped", action="answer_skipped",
                            peer=self.peer.name, missing=unique)
                continue
            given += 1
            if given > self._limit or self._stopped():
                self._cancel(association)
                raise PeerRefused(f"the query of {named(self.peer)} was cancelled: " + (
                    f"more than {self._limit} answers. Remedy: ask for fewer days or one study."
                    if given > self._limit else "we are being stopped."))
            yield answer

    def _cancel(self, association: Association) -> None:
        """C-CANCEL, then the association is given up: what the peer still answers to it is nobody's."""
        association.send_c_cancel(self._message, query_model=FIND)
        association.abort()
        self._association = None

    def _open(self) -> Association:
        if self._association is None or not self._association.is_established:
            self._association = open_association(
                self.peer, [build_context(FIND)], calling_ae=self._times.calling_ae,
                connect_timeout_s=self._times.connect_timeout_s, dimse_timeout_s=self._times.dimse_timeout_s)
        return self._association


def retrieve(peer: Peer, times: Times, *, study_uid: str, series_uid: str = "", instances: Sequence[str] = (),
             keep: Callable[[evt.Event], Any] | None = None, on_open: Callable[[Association], None] = lambda _: None,
             on_progress: Callable[[int], None] = lambda _: None,
             timeout_s: float = RETRIEVE_TIMEOUT_S) -> Retrieved:
    """Have a study, one series or some instances of it sent, by C-MOVE to ourselves or, with `keep`, by C-GET.

    keep         C-GET: handler of each C-STORE that comes (its status is the answer); None: C-MOVE.
    on_open      gets the association, so that another thread can abort it.
    on_progress  called with the number of instances completed so far.
    timeout_s    the longest silence of the peer.

    Raises PeerUnreachable, and PeerRefused where the peer sends nothing at all of it; what failed in part is in the
    value returned.
    """
    keys = _keys("IMAGE" if instances else "SERIES" if series_uid else "STUDY", StudyInstanceUID=study_uid)
    if series_uid:
        keys.SeriesInstanceUID = series_uid
    if instances:
        keys.SOPInstanceUID = list(instances)
    association = open_association(
        peer, _get_contexts() if keep else [build_context(MOVE)], calling_ae=times.calling_ae,
        connect_timeout_s=times.connect_timeout_s, dimse_timeout_s=max(times.dimse_timeout_s, timeout_s),
        evt_handlers=[(evt.EVT_C_STORE, keep)] if keep else [], max_pdu=GET_PDU,
        ext_neg=[build_role(uid, scp_role=True) for uid in (*IMAGES, *OTHERS)] if keep else [])
    what = "C-GET" if keep else "C-MOVE"
    done = Retrieved(0, 0, 0, 0)
    try:
        on_open(association)
        for status, _ in _talk(association, peer, what, lambda: (
                association.send_c_get(keys, GET) if keep else association.send_c_move(keys, times.calling_ae, MOVE))):
            completed, failed, warning = (int(status.get(f"NumberOf{kind}Suboperations") or 0)
                                          for kind in ("Completed", "Failed", "Warning"))
            done = Retrieved(completed, failed, warning, int(status.Status))
            if done.status in PENDING:
                on_progress(done.arrived)
            elif done.status != 0x0000 and not done.arrived:
                raise PeerRefused(_failure(peer, what, status, times.calling_ae))
    finally:
        leave(association)
    return done


def _talk(association: Association, peer: Peer, what: str,
          start: Callable[[], Iterator[tuple[Dataset, Dataset | None]]]) -> Iterator[tuple[Dataset, Dataset | None]]:
    """The responses to a request. Raises PeerUnreachable where the peer falls silent or leaves in the middle."""
    try:
        for status, answer in start():
            if "Status" not in status:
                raise PeerUnreachable(f"{named(peer)} dropped the association, or was silent for too long, in the "
                                      f"middle of {what}. Remedy: is it running, and does it allow {what} to our AE "
                                      f"title {association.requestor.ae_title.strip()}?")
            yield status, answer
    except ValueError as error:
        raise PeerUnreachable(f"{named(peer)} does not accept {what}: {error}. Remedy: let it answer "
                              f"{what}, Study Root, for our AE title.") from error
    except (RuntimeError, OSError) as error:
        raise PeerUnreachable(f"{named(peer)} closed the association in the middle of {what}: {error}") from error


def _keys(level: str, **keys: Any) -> Dataset:
    """An identifier. Text beyond ASCII goes as UTF-8 (PS3.3 C.12.1.1.2)."""
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    if not all(value is None or str(value).isascii() for value in keys.values()):
        identifier.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    return identifier


def _plain(value: str, length: int) -> str:
    """Text that any file, log or terminal takes: no control characters, no half characters, not endless."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "", value).strip()[:length]


def _get_contexts() -> list[PresentationContext]:
    contexts = [build_context(GET)]
    for uid in (*IMAGES, *OTHERS):
        contexts.append(build_context(uid, list(PLAIN)))
        contexts += [build_context(uid, [syntax]) for syntax in (COMPRESSED if uid in IMAGES else ())]
    return contexts


def _failure(peer: Peer, what: str, status: Dataset, our_ae: str) -> str:
    code = int(status.Status)
    meaning = MEANINGS.get(code) or ("unable to process" if code >> 12 == 0xC else "failure")
    comment = text(status, "ErrorComment")
    sentence = f"{named(peer)} answered {what} with status 0x{code:04X}, {meaning}"
    sentence += f" ({comment})" if comment else ""
    if code == 0xA801:
        return (f"{sentence}. Remedy: enter our AE title {our_ae} with the address and port of this node there, "
                "or set peer.retrieve = \"c-get\".")
    failed = int(status.get("NumberOfFailedSuboperations") or 0)
    if failed:
        return (f"{sentence}; {failed} instances failed, none was sent. Remedy: can it reach our address and port, and "
                "is this peer allowed to send (peer.may_send, peer.addresses)?")
    if what == "C-MOVE":
        return (f"{sentence}. Remedy: does it know our AE title {our_ae} with the address and port of this node, and "
                "can it reach them? Its log says more.")
    return f"{sentence}. Remedy: look into the log of the peer."
