"""A source in this process: a Query/Retrieve SCP over given data sets, whose manners a test can spoil; and a node."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, build_context, evt

from dicomnode.config import Config, Peer, parse
from dicomnode.ledger import Ledger
from dicomnode.nightly import Nightly
from dicomnode.query import FIND, GET, MOVE, Times
from dicomnode.scp import Receiver
from dicomnode.spool import Spool
from tests.peers import free_port

STORAGE = ("1.2.840.10008.5.1.4.1.1.128", "1.2.840.10008.5.1.4.1.1.2")
UNIQUE = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
TIMES = Times("NBDNODE", connect_timeout_s=3, dimse_timeout_s=3)

PET_ROUTE = """
[[route]]
name = "all-pet"
when = { Modality = "PT" }
method = "nearest"
preset = "default"
send_to = ["PACS"]
"""


class SourcePeer:
    """Answers Study Root C-FIND, C-MOVE and C-GET.

    datasets       what it holds.         header   attributes of the objects told at series level.
    counts         whether it gives NumberOfSeriesRelatedInstances.
    destination    (host, port) of AE title NBDNODE, or None: it does not know it.
    answers        rewrites the C-FIND answers of a query before they go out.
    on_retrieve    called before a retrieval with its identifier; returns what is sent of it.
    asked, moved   identifiers of the queries and retrievals, as they came.
    """

    def __init__(self, datasets: Sequence[Dataset] = (), *, ae_title: str = "PACS", counts: bool = True,
                 header: Sequence[str] = (), destination: tuple[str, int] | None = None,
                 answers: Callable[[Dataset, list[Dataset]], list[Any]] = lambda _, found: found,
                 on_retrieve: Callable[[Dataset, list[Dataset]], list[Dataset]] = lambda _, found: found) -> None:
        self.datasets, self.ae_title, self.counts, self.header = list(datasets), ae_title, counts, tuple(header)
        self.destination, self.answers, self.on_retrieve = destination, answers, on_retrieve
        self.port = free_port()
        self.asked: list[Dataset] = []
        self.moved: list[Dataset] = []
        self.cancelled = threading.Event()
        self._server: Any = None

    def peer(self, **options: Any) -> Peer:
        return Peer(name="PACS", ae_title=self.ae_title, host="127.0.0.1", port=self.port, query=True, **options)

    def __enter__(self) -> SourcePeer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        threading.Thread(target=self.stop).start()  # its loop looks up twice a second only

    def start(self) -> None:
        ae = AE(self.ae_title)
        ae.supported_contexts = [build_context(uid) for uid in (FIND, MOVE, GET)]
        for uid in STORAGE:
            ae.add_supported_context(uid, scu_role=True, scp_role=True)
            ae.add_requested_context(uid)
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[
            (evt.EVT_C_FIND, self._find), (evt.EVT_C_MOVE, self._move), (evt.EVT_C_GET, self._get)])

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    def _matching(self, keys: Dataset) -> list[Dataset]:
        found = []
        for ds in self.datasets:
            uids = all(not keys.get(keyword) or str(ds[keyword].value) in _many(keys[keyword].value)
                       for keyword in UNIQUE.values())
            day = str(keys.get("StudyDate", ""))
            first, _, last = day.partition("-")
            dated = not day or first <= str(ds.StudyDate) <= (last or first)
            named = str(keys.get("AccessionNumber", "")) in ("", str(ds.AccessionNumber))
            if uids and dated and named:
                found.append(ds)
        return found

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        keys = event.identifier
        self.asked.append(keys)
        unique = UNIQUE[keys.QueryRetrieveLevel]
        matching = self._matching(keys)
        first = {str(ds[unique].value): ds for ds in reversed(matching)}
        for answer in self.answers(keys, [self._answer(keys, ds, matching) for ds in reversed(first.values())]):
            if event.is_cancelled:
                self.cancelled.set()
                yield 0xFE00, None
                return
            if isinstance(answer, int):
                yield answer, None
                return
            yield 0xFF00, answer

    def _answer(self, keys: Dataset, ds: Dataset, matching: list[Dataset]) -> Dataset:
        answer = Dataset()
        level = keys.QueryRetrieveLevel
        answer.QueryRetrieveLevel = level
        answer.SpecificCharacterSet = ds.get("SpecificCharacterSet", "ISO_IR 100")
        for element in keys:
            given = element.keyword in (*UNIQUE.values(), "StudyDate", "AccessionNumber", "Modality", *self.header)
            if given and element.keyword in ds:
                answer[element.keyword] = ds[element.keyword]
        of_study = [one for one in self.datasets if one.StudyInstanceUID == ds.StudyInstanceUID]
        if level == "STUDY" and "ModalitiesInStudy" in keys:
            answer.ModalitiesInStudy = sorted({one.Modality for one in of_study})
        if level == "SERIES" and self.counts:
            answer.NumberOfSeriesRelatedInstances = sum(
                one.SeriesInstanceUID == ds.SeriesInstanceUID for one in of_study)
        return answer

    def _move(self, event: evt.Event) -> Iterator[Any]:
        if self.destination is None:
            yield None, None
            return
        self.moved.append(event.identifier)
        found = self.on_retrieve(event.identifier, self._matching(event.identifier))
        yield (*self.destination, {"ae_title": "NBDNODE"})
        yield len(found)
        for ds in found:
            yield 0xFF00, ds

    def _get(self, event: evt.Event) -> Iterator[Any]:
        self.moved.append(event.identifier)
        found = self.on_retrieve(event.identifier, self._matching(event.identifier))
        yield len(found)
        for ds in found:
            yield 0xFF00, ds


def _many(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(one) for one in value]


class Site:
    """A node with its receiver on a port of its own, and one source PACS; `now` is what the clock says."""

    #: 2020-01-02 22:30 UTC: the day of the studies that tests/factories.py makes
    NIGHT = 1578004200.0

    def __init__(self, folder: Path, source_port: int, *, retrieve: str = "c-move", schedule: str = "",
                 route: str = PET_ROUTE, completeness: str = "quiet_s = 30") -> None:
        self.port, self.now = free_port(), self.NIGHT
        self.config: Config = parse(
            f'[node]\ndata_dir = "{folder / "data"}"\nport = {self.port}\n[reception]\nlow_disk_mb = 1\n'
            f'[completeness]\n{completeness}\n[delivery]\nconnect_timeout_s = 3\ndimse_timeout_s = 3\n'
            f'[schedule]\nretrieve_at = "22:00"\n{schedule}\n[[peer]]\nname = "PACS"\nae_title = "PACS"\n'
            f'host = "127.0.0.1"\nport = {source_port}\nquery = true\nretrieve = "{retrieve}"\n{route}')
        self.spool = Spool(self.config.node.data_dir)
        self.ledger = Ledger(self.spool.ledger_path)
        self.receiver = Receiver(self.config, self.spool, self.ledger, clock=self.clock)

    def __enter__(self) -> Site:
        self.receiver.start()
        return self

    def __exit__(self, *_: object) -> None:
        threading.Thread(target=self._end).start()  # not waited for: its loop looks up twice a second only

    def _end(self) -> None:
        self.receiver.stop()
        self.ledger.close()

    def clock(self) -> float:
        return self.now

    @property
    def peer(self) -> Peer:
        return self.config.peer[0]

    def nightly(self) -> Nightly:
        return Nightly(self.config, self.ledger, self.spool, clock=self.clock)

    def rows(self) -> dict[str, dict[str, Any]]:
        """source_series by series UID."""
        return {row["series_uid"]: dict(row) for row in self.ledger.query("SELECT * FROM source_series")}

    def here(self) -> set[str]:
        """SOP Instance UIDs of all that was received."""
        return {row["sop_instance_uid"] for row in self.ledger.query("SELECT sop_instance_uid FROM instance")}


def uids(datasets: Sequence[Dataset]) -> set[str]:
    return {str(ds.SOPInstanceUID) for ds in datasets}


def soon(condition: Callable[[], Any], *, timeout_s: float = 5.0) -> Any:
    """The first true value of `condition`, or what it gave at last."""
    until = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < until:
        time.sleep(0.01)
    return value
