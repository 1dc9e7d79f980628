"""Asking a peer what it holds, and fetching it: answers as peers really give them, and each failure with its remedy."""

from __future__ import annotations

import copy
import socket
import threading
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom.dimse_primitives import C_STORE

from dicomnode.errors import NodeError, PeerRefused, PeerUnreachable
from dicomnode.fetching import Fetch, fetch
from dicomnode.groupcommit import GroupCommitter
from dicomnode.keeping import Keeper
from dicomnode.query import Asking, SeriesFound, StudyFound, retrieve
from tests.factories import ct_series, pet_series
from tests.node.matching_factories import mutate
from tests.node.source_peer import TIMES, Site, SourcePeer, soon, uids
from tests.peers import encoded, free_port

STUDY = str(pet_series()[0].StudyInstanceUID)
SERIES = str(pet_series()[0].SeriesInstanceUID)


def test_studies_of_a_range_of_days_are_found() -> None:
    """Both ends of the range are included; a study of another day is not answered."""
    other = [copy.deepcopy(ds) for ds in pet_series(seed=1, StudyDate="20200105")]
    with SourcePeer([*pet_series(), *ct_series(), *other]) as source, Asking(source.peer(), TIMES) as asking:
        (found,) = asking.studies(study_date="20200101-20200102", modality="PT")
        assert (found.study_uid, found.study_date, found.modalities) == (STUDY, "20200102", ("CT", "PT"))
        assert asking.studies(study_date="20200103-20200104") == []


def test_series_come_with_their_count_and_what_was_asked_besides() -> None:
    """NumberOfSeriesRelatedInstances as a number; extra return keys in the header."""
    with SourcePeer([*pet_series(), *ct_series()], header=["Units"]) as source, Asking(source.peer(), TIMES) as asking:
        found = {series.modality: series for series in asking.series(STUDY, also=["Units"])}
    assert (found["PT"].instances, found["CT"].instances) == (8, 12)
    assert found["PT"].header.Units == "BQML" and "Units" not in found["CT"].header


def test_a_peer_that_gives_no_count_is_counted_instance_by_instance() -> None:
    """None at series level, never 0; `count` asks at image level then."""
    with SourcePeer(pet_series(), counts=False) as source, Asking(source.peer(), TIMES) as asking:
        assert [series.instances for series in asking.series(STUDY)] == [None]
        assert asking.count(STUDY, SERIES) == 8


def test_a_series_the_peer_does_not_know_counts_nothing() -> None:
    """An empty answer is an answer."""
    with SourcePeer(pet_series()) as source, Asking(source.peer(), TIMES) as asking:
        assert asking.count(STUDY, "1.2.3") == 0 and asking.studies(study_uid="1.2.3") == []


def test_doubled_answers_count_once_and_answers_without_a_uid_are_skipped() -> None:
    """Three answers of which one is a double and one has an empty UID: one study."""
    def spoilt(_: Dataset, found: list[Dataset]) -> list[Any]:
        empty = copy.deepcopy(found[0])
        empty.StudyInstanceUID = ""
        bare = Dataset()
        bare.QueryRetrieveLevel = "STUDY"
        return [found[0], empty, found[0], bare]

    with SourcePeer(pet_series(), answers=spoilt) as source, Asking(source.peer(), TIMES) as asking:
        assert [study.study_uid for study in asking.studies()] == [STUDY]
        assert asking.skipped == 2


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(garbage=st.dictionaries(st.sampled_from([
    "StudyInstanceUID", "SeriesInstanceUID", "StudyDate", "AccessionNumber", "Modality", "ModalitiesInStudy",
    "NumberOfSeriesRelatedInstances", "SpecificCharacterSet"]), st.binary(max_size=40)))
def test_garbage_in_an_answer_is_read_as_what_can_be_kept(garbage: dict[str, bytes]) -> None:
    """Any bytes: no exception, and text and counts that the ledger and a terminal take."""
    answer = Dataset()
    for keyword, raw in garbage.items():
        mutate(answer, keyword, raw)
    study, series = StudyFound.of(answer), SeriesFound.of("1.2", answer)
    for value in (study.study_date, study.accession_number, *study.modalities, series.modality):
        assert not any(ord(character) < 32 for character in value)
        assert value.encode().decode() == value and len(value) <= 64
    assert series.instances is None or 0 <= series.instances < 2**63


def test_an_accession_number_beyond_ascii_goes_there_and_back() -> None:
    """Asked for as UTF-8, answered in Latin-1: the same text."""
    datasets = pet_series(AccessionNumber="RÖ-17", SpecificCharacterSet="ISO_IR 100")
    with SourcePeer(datasets) as source, Asking(source.peer(), TIMES) as asking:
        (found,) = asking.studies(accession_number="RÖ-17")
        assert found.accession_number == "RÖ-17"
        assert source.asked[0].SpecificCharacterSet == "ISO_IR 192"


def test_too_many_answers_are_cancelled_and_said() -> None:
    """The limit is named; the association is given up, and the next question opens a new one."""
    with SourcePeer(pet_series()) as source, Asking(source.peer(), TIMES, limit=3) as asking:
        with pytest.raises(PeerRefused, match=r"more than 3 answers.*fewer days"):
            asking.instances(STUDY, SERIES)
        assert len(asking.studies()) == 1


def test_a_query_stops_when_we_are_being_stopped() -> None:
    """`stopped` ends it at the next answer."""
    with SourcePeer(pet_series()) as source, Asking(source.peer(), TIMES, stopped=lambda: True) as asking, \
            pytest.raises(PeerRefused, match="being stopped"):
        asking.studies()


@pytest.mark.parametrize(("status", "says"), [(0xA700, "out of resources"), (0xA900, "does not match"),
                                              (0xC001, "unable to process")])
def test_a_refused_query_says_the_status_and_its_meaning(status: int, says: str) -> None:
    """PeerRefused with name, code and meaning; nothing is taken for an empty answer."""
    with SourcePeer(pet_series(), answers=lambda *_: [status]) as source, Asking(source.peer(), TIMES) as asking, \
            pytest.raises(PeerRefused, match=f"PACS .*0x{status:04X}.*{says}"):
        asking.studies()


def test_nobody_there_and_a_silent_peer_are_unreachable() -> None:
    """A closed port; a port that accepts and says nothing."""
    with pytest.raises(PeerUnreachable, match=r"PACS .*does not answer.*Remedy"), \
            Asking(SourcePeer().peer(), TIMES) as asking:
        asking.studies()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        silent = SourcePeer().peer().model_copy(update={"port": listener.getsockname()[1]})
        with pytest.raises(PeerUnreachable), Asking(silent, type(TIMES)("NBDNODE", 1, 1)) as asking:
            asking.studies()


def test_a_peer_that_leaves_in_the_middle_is_unreachable_and_can_be_asked_again() -> None:
    """It aborts after the first answer; the next question opens a new association."""
    left = [True]

    def leaves(_: Dataset, found: list[Dataset]) -> list[Any]:
        if left:
            left.clear()
            for association in source._server.active_associations:
                association.abort()
        return found

    source = SourcePeer(pet_series(), answers=leaves)
    with source, Asking(source.peer(), TIMES) as asking:
        with pytest.raises(PeerUnreachable, match="middle of C-FIND"):
            asking.instances(STUDY, SERIES)
        assert len(asking.instances(STUDY, SERIES)) == 8


def test_300_series_are_asked_for_in_one_association() -> None:
    """All of them, each once."""
    datasets, one = [], pet_series(slices=2)[0]
    for number in range(300):
        ds = Dataset()
        for keyword in ("StudyInstanceUID", "StudyDate", "Modality", "AccessionNumber"):
            ds[keyword] = one[keyword]
        ds.SeriesInstanceUID, ds.SOPInstanceUID = f"2.25.7{number}", f"2.25.8{number}"
        datasets.append(ds)
    with SourcePeer(datasets) as source, Asking(source.peer(), TIMES) as asking:
        assert len({series.series_uid for series in asking.series(STUDY)}) == 300


# --- retrieval


def test_c_move_brings_a_series_to_our_receiver(tmp_path: Path) -> None:
    """Through the receiver into the ledger; the CT of the study is not asked for."""
    pet = pet_series()
    with SourcePeer([*pet, *ct_series()]) as source, Site(tmp_path, source.port) as site:
        source.destination = ("127.0.0.1", site.port)
        done = fetch(site.config, site.ledger, site.spool, Fetch(site.peer, STUDY, SERIES))
        assert site.here() == uids(pet) and "8 instances sent" in done.said("c-move")


def test_a_peer_that_does_not_know_our_ae_title_is_told_with_the_remedy() -> None:
    """Status 0xA801."""
    with SourcePeer(pet_series()) as source, \
            pytest.raises(PeerRefused, match=r"0xA801, move destination unknown.*NBDNODE.*c-get"):
        retrieve(source.peer(), TIMES, study_uid=STUDY)


def test_a_peer_that_cannot_reach_us_is_told_with_the_remedy() -> None:
    """It knows a port where nobody listens."""
    with SourcePeer(pet_series(), destination=("127.0.0.1", free_port())) as source, \
            pytest.raises(PeerRefused, match=r"C-MOVE.*Remedy.*address"):
        retrieve(source.peer(), TIMES, study_uid=STUDY)


def test_c_get_keeps_on_the_path_of_the_receiver(tmp_path: Path) -> None:
    """On disk and in the ledger, byte for byte, before the peer hears success; nothing is left in incoming/."""
    pet = pet_series()
    with SourcePeer(pet) as source, Site(tmp_path, source.port, retrieve="c-get") as site:
        fetch(site.config, site.ledger, site.spool, Fetch(site.peer, STUDY, SERIES))
        assert site.here() == uids(pet) and not list(site.spool.incoming.iterdir())
        for row in site.ledger.instances(SERIES):
            path = site.spool.absolute(row["path"])
            assert path.stat().st_size == row["bytes"] and row["calling_ae"] == "PACS"
        assert site.ledger.series(SERIES)["state"] == "receiving"


def test_c_get_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    """Six of eight are here: two are named at image level."""
    pet = pet_series()
    with SourcePeer(pet[:6]) as source, Site(tmp_path, source.port, retrieve="c-get") as site:
        fetch(site.config, site.ledger, site.spool, Fetch(site.peer, STUDY, SERIES))
        source.datasets = pet
        fetch(site.config, site.ledger, site.spool, Fetch(site.peer, STUDY, SERIES))
        assert site.here() == uids(pet)
        assert set(source.moved[-1].SOPInstanceUID) == uids(pet[6:])


def test_c_get_never_says_success_for_what_is_not_safe(tmp_path: Path) -> None:
    """A disk that is full: refused, with the reason in the history, and nothing half-made is left."""
    pet = pet_series(slices=2)
    with SourcePeer(pet) as source, Site(tmp_path, source.port, retrieve="c-get") as site:
        full = site.config.model_copy(update={"reception": site.config.reception.model_copy(
            update={"low_disk_mb": 10**9})})
        with pytest.raises(NodeError, match=r"2 of 2 instances .* could not be kept: .*low_disk_mb"):
            fetch(full, site.ledger, site.spool, Fetch(site.peer, STUDY, SERIES))
        assert site.here() == set() and not list(site.spool.incoming.iterdir())
        (reason,) = [event["reason"] for event in site.ledger.events() if event["kind"] == "reception"]
        assert "0xA700" in reason and "low_disk_mb" in reason


@pytest.mark.parametrize(("spoil", "status"), [
    (lambda request: setattr(request, "AffectedSOPInstanceUID", "1.2.3"), 0xA900),
    (lambda request: setattr(request, "DataSet", BytesIO(b"no data set")), 0xC000),
    (lambda request: setattr(request, "DataSet", None), 0xC000)])
def test_c_get_refuses_what_the_receiver_would_refuse(tmp_path: Path, spoil: Any, status: int) -> None:
    """A data set that is another than the request says, that cannot be read, or that is not there."""
    ds = pet_series(slices=2)[0]
    request = C_STORE()
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    request.DataSet = BytesIO(encoded(ds))
    context = SimpleNamespace(transfer_syntax=ds.file_meta.TransferSyntaxUID)
    with Site(tmp_path, 1) as site, \
            Keeper(site.config, site.spool, site.ledger, calling_ae="PACS", address="h", clock=site.clock) as keeper:
        assert keeper.on_c_store(SimpleNamespace(request=request, context=context)) == 0x0000  # type: ignore[arg-type]
        spoil(request)
        answer = keeper.on_c_store(SimpleNamespace(request=request, context=context))  # type: ignore[arg-type]
        assert isinstance(answer, Dataset) and answer.Status == status
        assert len(site.here()) == 1 and not list(site.spool.incoming.iterdir()) and len(keeper.refused) == 1


def test_what_came_by_both_ways_at_once_is_there_once(tmp_path: Path) -> None:
    """The receiver and C-GET keep one instance at the same moment: one row, whose file has its bytes, both safe."""
    with Site(tmp_path, 1) as site, \
            Keeper(site.config, site.spool, site.ledger, calling_ae="PACS", address="h", clock=site.clock) as keeper:
        committer = GroupCommitter(site.spool, site.ledger)
        try:
            for number in range(20):
                first, second = pair(site, number)
                outcomes: list[str] = []
                threads = [threading.Thread(target=lambda one=one, by=by, to=outcomes: to.append(by.keep(*one)))
                           for one, by in ((first, committer), (second, keeper._committer))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert sorted(outcomes) == ["new", "repeat"]
                known = site.ledger.known(first[1].sop_instance_uid)
                assert known is not None and site.spool.absolute(known["path"]).read_bytes() == b"same"
                assert len(list(site.spool.absolute(known["path"]).parent.iterdir())) == 1
        finally:
            committer.close()


def pair(site: Site, number: int) -> tuple[Any, Any]:
    """The same object twice in incoming/, with its row."""
    from dicomnode.ledger import InstanceRow

    uid, made = str(generate_uid()), []
    for _ in range(2):
        handle, path = site.spool.create_incoming()
        with open(handle, "wb") as file:
            file.write(b"same")
        made.append((path, InstanceRow(
            sop_instance_uid=uid, sop_class_uid="1.2", study_uid="1.2.3", series_uid=f"1.2.3.{number}", path="",
            transfer_syntax_uid="1.2", bytes=4, sha256="s", calling_ae="A", address="h", received_at=1.0)))
    return made[0], made[1]


def test_a_broken_retrieval_is_unreachable_and_what_came_stays(tmp_path: Path) -> None:
    """The peer is shut down half-way through a C-GET."""
    pet = pet_series()

    def dies(_: Dataset, found: list[Dataset]) -> Any:
        class Dying(list[Dataset]):
            def __iter__(self) -> Any:
                for number, ds in enumerate(found):
                    if number == 3:
                        for association in source._server.active_associations:
                            association.abort()
                    yield ds
        return Dying(found)

    source = SourcePeer(pet, on_retrieve=dies)
    with source, Site(tmp_path, source.port, retrieve="c-get") as site:
        with pytest.raises(PeerUnreachable, match="middle of C-GET"):
            fetch(site.config, site.ledger, site.spool, Fetch(site.peer, STUDY, SERIES))
        assert soon(lambda: 0 < len(site.here()) < 8)
