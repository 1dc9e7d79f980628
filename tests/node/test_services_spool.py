"""Query and retrieve on the spool, over real associations: who may, what is found, handed out, counted."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    PositronEmissionTomographyImageStorage,
    RLELossless,
)
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.dimse_primitives import C_FIND, C_GET
from pynetdicom.dsutils import encode

from dicomnode.requesting import LARGEST_PDU
from dicomnode.services.desk import RETRIEVALS
from tests.factories import ct_series, pet_series
from tests.node.spoolpeers import (
    PATIENT_FIND,
    STUDY_FIND,
    STUDY_GET,
    add_derived,
    associated,
    counts,
    find,
    get,
    identifier,
    move,
    peers,
    send,
)
from tests.peers import ReceiverProcess, StoragePeer, associate, encoded, free_port, store_encoded

PET, CT = PositronEmissionTomographyImageStorage, CTImageStorage
PATIENT = {"PatientName": "Müller^Anna", "SpecificCharacterSet": "ISO_IR 100", "PatientID": "P-1",
           "StudyDate": "20240117"}
SOURCE, GUIDE = pet_series(slices=6, seed=1, **PATIENT), ct_series(slices=4, seed=1, **PATIENT)
OTHER = ct_series(slices=2, seed=2, PatientID="P-2", PatientName="Other^One", StudyDate="20240220")
STUDY, SERIES = str(SOURCE[0].StudyInstanceUID), str(SOURCE[0].SeriesInstanceUID)


class Spool:
    """The receiver, its storage peer PACS, and the UIDs of the series beside what was sent."""

    def __init__(self, receiver: ReceiverProcess, pacs: StoragePeer) -> None:
        self.receiver, self.pacs, self.port = receiver, pacs, receiver.port
        self.derived = self.held = ""


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    port = free_port()
    with StoragePeer("PACS", port=port) as pacs, ReceiverProcess(
            tmp_path_factory.mktemp("spool"), peers=peers(store_port=port)) as receiver:
        send(receiver, [*SOURCE, *GUIDE, *OTHER])
        spool = Spool(receiver, pacs)
        with receiver.ledger() as ledger:
            spool.derived = add_derived(ledger, receiver.data_dir, derived(1), state="built")
            spool.held = add_derived(ledger, receiver.data_dir, derived(2), state="held")
        yield spool


def derived(number: int) -> list:
    return pet_series(slices=3, seed=1, series=10 + number, SeriesDescription="NBD deblurred", **PATIENT)


# --- who may


def test_a_peer_without_the_right_is_refused_and_recorded(spool):
    """may_query: 0x0124, and a security event; the association goes on."""
    status, answers = find(spool.port, identifier("STUDY", StudyInstanceUID=""), calling="MUTE")
    assert (status, answers) == (0x0124, [])
    assert move(spool.port, identifier("STUDY", StudyInstanceUID=STUDY), "PACS", calling="MUTE")[-1][0].Status == 0x0124
    with spool.receiver.ledger() as ledger:
        events = [row for row in ledger.events() if row["kind"] == "security" and row["code"] == "service"]
    assert events and "MUTE" in events[0]["reason"]


def test_a_peer_that_may_only_ask_cannot_send(spool):
    """may_send = false, may_query = true: its objects are refused with 0x0124 and leave nothing behind."""
    stranger = ct_series(slices=1, seed=77)[0]
    assoc = associated(spool.port, CT, calling="VIEWER")
    assert store_encoded(assoc, CT, stranger.SOPInstanceUID, encoded(stranger)).Status == 0x0124
    assoc.release()
    with spool.receiver.ledger() as ledger:
        assert ledger.known(stranger.SOPInstanceUID) is None
    assert not list((spool.receiver.data_dir / "incoming").iterdir())


# --- query


def test_studies_are_found_by_what_they_hold(spool):
    """Received and derived series of a study are one study; counts and modalities are of both."""
    status, answers = find(spool.port, identifier(
        "STUDY", StudyInstanceUID="", PatientName="mü*", PatientID="", StudyDate="20240101-20240131",
        ModalitiesInStudy="", NumberOfStudyRelatedSeries="", NumberOfStudyRelatedInstances="",
        SpecificCharacterSet="ISO_IR 100"))
    assert status == 0x0000
    (study,) = answers
    assert (study.StudyInstanceUID, study.PatientID, str(study.PatientName)) == (STUDY, "P-1", "Müller^Anna")
    assert study.NumberOfStudyRelatedSeries == 3 and study.NumberOfStudyRelatedInstances == 6 + 4 + 3
    assert list(study.ModalitiesInStudy) == ["CT", "PT"] and study.SpecificCharacterSet == "ISO_IR 100"


def test_series_of_jobs_that_failed_their_check_are_not_shown(spool):
    """Derived: built and later; never held or cancelled."""
    _, answers = find(spool.port, identifier("SERIES", StudyInstanceUID=STUDY, SeriesInstanceUID="", Modality="PT",
                                             SeriesDescription="", NumberOfSeriesRelatedInstances=""))
    shown = {str(got.SeriesInstanceUID): got for got in answers}
    assert set(shown) == {SERIES, spool.derived}
    assert shown[spool.derived].SeriesDescription == "NBD deblurred"
    assert shown[spool.derived].NumberOfSeriesRelatedInstances == 3


def test_instances_are_found_one_by_one(spool):
    """IMAGE level: of received and of derived series."""
    for series, expected in ((SERIES, {ds.SOPInstanceUID for ds in SOURCE}),
                             (spool.derived, {ds.SOPInstanceUID for ds in derived(1)})):
        _, answers = find(spool.port, identifier("IMAGE", StudyInstanceUID=STUDY, SeriesInstanceUID=series,
                                                 SOPInstanceUID="", InstanceNumber="", Rows="", SOPClassUID=PET))
        assert {got.SOPInstanceUID for got in answers} == expected
        assert all(got.Rows == 16 for got in answers) and len({got.InstanceNumber for got in answers}) == len(expected)


def test_patients_are_found_and_their_studies_below_them(spool):
    """Patient Root."""
    _, answers = find(spool.port, identifier("PATIENT", PatientID="P*", NumberOfPatientRelatedStudies=""),
                      model=PATIENT_FIND)
    assert {got.PatientID for got in answers} == {"P-1", "P-2"}
    _, answers = find(spool.port, identifier("STUDY", PatientID="P-2", StudyInstanceUID=""), model=PATIENT_FIND)
    assert [got.StudyInstanceUID for got in answers] == [OTHER[0].StudyInstanceUID]


def test_a_query_that_does_not_fit_is_answered_not_aborted(spool):
    """0xA900; the same association then serves what does fit."""
    assoc = associated(spool.port, STUDY_FIND, calling="VIEWER")
    for asked, status in ((identifier("SERIES", SeriesInstanceUID=""), 0xA900),
                          (identifier("STUDY", StudyInstanceUID=STUDY), 0x0000)):
        assert list(assoc.send_c_find(asked, STUDY_FIND))[-1][0].Status == status
    assoc.release()


def test_a_query_on_a_context_of_another_service_is_refused(spool):
    """What is not offered (services.query_retrieve) is not had through the door of storage either: 0x0122."""
    assoc = associated(spool.port, CT, calling="VIEWER")
    request = C_FIND()
    request.MessageID, request.Priority, request.AffectedSOPClassUID = 1, 2, STUDY_FIND
    request.Identifier = BytesIO(encode(identifier("STUDY", StudyInstanceUID=""), False, True))
    assoc._reactor_checkpoint.clear()
    assoc.dimse.send_msg(request, assoc.accepted_contexts[0].context_id)
    _, response = assoc.dimse.get_msg(block=True)
    assoc._reactor_checkpoint.set()
    assert response.Status == 0x0122
    assoc.release()


def test_keys_that_are_not_known_are_ignored_and_said_so(spool):
    """0xFF01."""
    assoc = associated(spool.port, STUDY_FIND, calling="VIEWER")
    responses = list(assoc.send_c_find(identifier("STUDY", StudyInstanceUID=STUDY, ImplantName="x"), STUDY_FIND))
    assert [response.Status for response, _ in responses] == [0xFF01, 0x0000]
    assoc.release()


def test_names_of_patients_stay_out_of_the_log(spool):
    """They are in answers, which is DICOM, and nowhere else."""
    find(spool.port, identifier("STUDY", PatientName="Müller^Anna"))
    log = spool.receiver.log()
    assert "ller" not in log and "P-1" not in log and "query" in log


def test_storing_and_asking_take_turns_on_one_association(spool):
    """An object that came is found at once by the query that follows it."""
    more = ct_series(slices=2, seed=5)
    assoc = associated(spool.port, CT, STUDY_FIND)
    for count, ds in enumerate(more, start=1):
        assert store_encoded(assoc, CT, ds.SOPInstanceUID, encoded(ds)).Status == 0x0000
        answers = [got for _, got in assoc.send_c_find(
            identifier("STUDY", StudyInstanceUID=ds.StudyInstanceUID, NumberOfStudyRelatedInstances=""), STUDY_FIND)
            if got is not None]
        assert [got.NumberOfStudyRelatedInstances for got in answers] == [count]
    assoc.release()


def test_twenty_queries_at_once_are_all_answered(spool):
    """Each with all its answers."""
    asked = identifier("SERIES", StudyInstanceUID=STUDY, SeriesInstanceUID="")
    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(lambda _: find(spool.port, asked), range(20)))
    assert all(status == 0x0000 and len(answers) == 3 for status, answers in results)


# --- C-MOVE


@pytest.mark.parametrize("level", ["STUDY", "SERIES", "IMAGE"])
def test_a_move_hands_out_what_was_asked(spool, level):
    """To the named peer, counted; a derived series goes with its study."""
    keys = {"StudyInstanceUID": STUDY} | ({"SeriesInstanceUID": spool.derived} if level != "STUDY" else {})
    if level == "IMAGE":
        keys["SOPInstanceUID"] = [derived(1)[0].SOPInstanceUID, derived(1)[2].SOPInstanceUID]
    expected = {"STUDY": {ds.SOPInstanceUID for ds in (*SOURCE, *GUIDE, *derived(1))},
                "SERIES": {ds.SOPInstanceUID for ds in derived(1)}, "IMAGE": set(keys.get("SOPInstanceUID", ()))}[level]
    spool.pacs.datasets.clear()
    responses = move(spool.port, identifier(level, **keys), "PACS")
    final = responses[-1][0]
    assert final.Status == 0x0000 and counts(final) == (len(expected), 0, 0)
    assert "NumberOfRemainingSuboperations" not in final
    assert {ds.SOPInstanceUID for ds in spool.pacs.datasets} == expected
    for response, _ in responses[:-1]:
        assert response.Status == 0xFF00
        assert response.NumberOfRemainingSuboperations + sum(counts(response)) == len(expected)


def test_a_move_to_nobody_we_know_is_refused(spool):
    """0xA801: also to a peer that has no port."""
    for destination in ("NOBODY", "SCANNER"):
        assert move(spool.port, identifier("STUDY", StudyInstanceUID=STUDY), destination)[-1][0].Status == 0xA801


def test_a_move_of_what_we_do_not_have_is_done_at_once(spool):
    """No match is no failure; a series that failed its check is no match."""
    for keys in ({"StudyInstanceUID": "1.2.3"}, {"StudyInstanceUID": STUDY, "SeriesInstanceUID": spool.held}):
        final = move(spool.port, identifier("SERIES" if len(keys) == 2 else "STUDY", **keys), "PACS")[-1][0]
        assert final.Status == 0x0000 and counts(final) == (0, 0, 0)


def test_what_the_destination_does_not_take_is_counted_and_named(tmp_path):
    """0xB000 with FailedSOPInstanceUIDList; warnings are counted by themselves; an object that is gone has failed."""
    refused, warned, gone = (SOURCE[n].SOPInstanceUID for n in (0, 1, 2))
    answers = {refused: 0xA700, warned: 0xB007}
    port = free_port()
    with StoragePeer("PACS", port=port, status=lambda ds: answers.get(ds.SOPInstanceUID, 0x0000)) as pacs, \
            ReceiverProcess(tmp_path, peers=peers(store_port=port)) as receiver:
        send(receiver, SOURCE)
        (receiver.data_dir / "objects" / STUDY / SERIES / f"{gone}.dcm").unlink()
        final, failed = move(receiver.port, identifier("SERIES", StudyInstanceUID=STUDY, SeriesInstanceUID=SERIES),
                             "PACS")[-1]
        assert final.Status == 0xB000 and counts(final) == (3, 2, 1)
        assert failed is not None and set(failed.FailedSOPInstanceUIDList) == {refused, gone}
        pacs.stop()
        final, failed = move(receiver.port, identifier("STUDY", StudyInstanceUID=STUDY), "PACS")[-1]
        assert final.Status == 0xA702 and counts(final) == (0, 6, 0) and "does not answer" in final.ErrorComment
        assert failed is not None and len(failed.FailedSOPInstanceUIDList) == 6


def test_a_damaged_object_keeps_no_other_from_the_destination(tmp_path):
    """What lies on disk is no DICOM file any more: it has failed, the others are handed out."""
    port = free_port()
    with StoragePeer("PACS", port=port) as pacs, ReceiverProcess(tmp_path, peers=peers(store_port=port)) as receiver:
        send(receiver, SOURCE)
        bad = SOURCE[3].SOPInstanceUID
        (receiver.data_dir / "objects" / STUDY / SERIES / f"{bad}.dcm").write_bytes(b"rubbish" * 100)
        final, failed = move(receiver.port, identifier("STUDY", StudyInstanceUID=STUDY), "PACS")[-1]
        assert final.Status == 0xB000 and counts(final) == (5, 1, 0)
        assert failed is not None and failed.FailedSOPInstanceUIDList == bad
        assert len(pacs.datasets) == 5


def test_of_a_series_that_was_purged_and_came_again_in_part_that_part_is_held(tmp_path):
    """Counted, listed and handed out is what is on disk, not what once came."""
    port = free_port()
    with StoragePeer("PACS", port=port), ReceiverProcess(tmp_path, peers=peers(store_port=port)) as receiver:
        send(receiver, SOURCE[:5])
        with receiver.ledger() as ledger, ledger.transaction() as db:
            db.execute("UPDATE series SET purged_at = ?", (time.time(),))
            ledger.event("series", now=time.time(), series_uid=SERIES, study_uid=STUDY, code="purged")
        for path in (receiver.data_dir / "objects" / STUDY / SERIES).iterdir():
            path.unlink()
        for came in (SOURCE[5:], SOURCE[1:2]):  # one that never came before, then one that was removed
            send(receiver, came)
            held = 1 if came == SOURCE[5:] else 2
            _, (answer,) = find(receiver.port, identifier("SERIES", StudyInstanceUID=STUDY, SeriesInstanceUID="",
                                                          NumberOfSeriesRelatedInstances=""))
            assert answer.NumberOfSeriesRelatedInstances == held
            final, _ = move(receiver.port, identifier("STUDY", StudyInstanceUID=STUDY), "PACS")[-1]
            assert final.Status == 0x0000 and counts(final) == (held, 0, 0)


def test_a_move_tells_the_destination_who_asked_for_it(tmp_path):
    """Move Originator Application Entity Title and Message ID (PS3.7 9.1.1.1) with every object."""
    class Asked(StoragePeer):
        def _store(self, event: evt.Event) -> int:
            asked.append((event.request.MoveOriginatorApplicationEntityTitle, event.request.MoveOriginatorMessageID))
            return super()._store(event)

    port, asked = free_port(), []
    with Asked("PACS", port=port), ReceiverProcess(tmp_path, peers=peers(store_port=port)) as receiver:
        send(receiver, SOURCE[:2])
        move(receiver.port, identifier("STUDY", StudyInstanceUID=STUDY), "PACS")
    assert asked == [("VIEWER", 1)] * 2


def test_a_slow_move_can_be_cancelled_and_holds_up_no_reception(tmp_path):
    """C-CANCEL: 0xFE00 with what remains; meanwhile objects come in."""
    port, slow = free_port(), threading.Event()

    def status(_: object) -> int:
        slow.wait(0.2)
        return 0x0000

    with StoragePeer("PACS", port=port, status=status), ReceiverProcess(tmp_path, peers=peers(store_port=port)) as node:
        send(node, ct_series(slices=30, rows=16, columns=16, seed=3))
        asked = identifier("STUDY", StudyInstanceUID=ct_series(slices=1, seed=3)[0].StudyInstanceUID)
        assoc = associated(node.port, "1.2.840.10008.5.1.4.1.2.2.2", calling="VIEWER")
        responses = assoc.send_c_move(asked, "PACS", "1.2.840.10008.5.1.4.1.2.2.2", msg_id=7)
        first, _ = next(responses)
        assert first.Status == 0xFF00
        began = time.monotonic()
        send(node, ct_series(slices=5, seed=4))
        assert time.monotonic() - began < 5.0
        assoc.send_c_cancel(7, query_model="1.2.840.10008.5.1.4.1.2.2.2")
        final = list(responses)[-1][0]
        slow.set()
        assert final.Status == 0xFE00
        assert 0 < final.NumberOfRemainingSuboperations < 30
        assert final.NumberOfRemainingSuboperations + sum(counts(final)) == 30
        assoc.release()


# --- C-GET


def test_a_get_brings_the_objects_on_its_own_association(spool):
    """Byte for byte the same values, received and derived; the peer takes the SCP role for storage."""
    responses, came = get(spool.port, identifier("STUDY", StudyInstanceUID=STUDY),
                          [(PET, ExplicitVRLittleEndian), (CT, ImplicitVRLittleEndian)])
    assert responses[-1][0].Status == 0x0000 and counts(responses[-1][0]) == (13, 0, 0)
    sent = {ds.SOPInstanceUID: ds for ds in (*SOURCE, *GUIDE, *derived(1))}
    assert {ds.SOPInstanceUID for ds in came} == set(sent)
    assert all(ds.PixelData == sent[ds.SOPInstanceUID].PixelData for ds in came)


def test_a_get_to_a_peer_without_a_limit_comes_in_pdus_that_need_no_memory(tmp_path):
    """Maximum length 0 (PS3.8 Annex D.1): not one PDU with the whole object, which the receiver would have to hold."""
    lengths: list[int] = []
    large = ct_series(slices=1, rows=1024, columns=1024)[0]
    ae = AE("VIEWER")
    ae.dimse_timeout = ae.acse_timeout = 20
    with ReceiverProcess(tmp_path, peers=peers()) as receiver:
        send(receiver, [large])
        assoc = ae.associate(
            "127.0.0.1", receiver.port, [build_context(STUDY_GET), build_context(CT, ExplicitVRLittleEndian)],
            ae_title="NBDNODE", max_pdu=0, ext_neg=[build_role(CT, scp_role=True)],
            evt_handlers=[(evt.EVT_C_STORE, lambda _: 0), (evt.EVT_PDU_RECV, lambda event: lengths.append(
                len(event.pdu)))])
        final = list(assoc.send_c_get(identifier("STUDY", StudyInstanceUID=large.StudyInstanceUID), STUDY_GET))[-1][0]
        assoc.release()
    assert final.Status == 0x0000 and counts(final) == (1, 0, 0)
    assert sum(lengths) > 2 * 1024 * 1024 and max(lengths) <= LARGEST_PDU + 6


def test_compressed_objects_are_unpacked_for_a_peer_that_takes_none(spool):
    """By C-GET and by C-MOVE; as they lie for a peer that takes their transfer syntax."""
    (plain,) = ct_series(slices=1, seed=30)
    (packed,) = ct_series(slices=1, seed=30)
    packed.compress(RLELossless, generate_instance_uid=False)
    send(spool.receiver, [packed])
    asked = identifier("STUDY", StudyInstanceUID=plain.StudyInstanceUID)
    for syntax, pixels in ((ExplicitVRLittleEndian, plain.PixelData), (RLELossless, packed.PixelData)):
        responses, (got,) = get(spool.port, asked, [(CT, syntax)])
        assert counts(responses[-1][0]) == (1, 0, 0)
        assert got.PixelData == pixels and got.SOPInstanceUID == plain.SOPInstanceUID
    spool.pacs.datasets.clear()
    assert counts(move(spool.port, asked, "PACS")[-1][0]) == (1, 0, 0)
    (got,) = spool.pacs.datasets
    assert (got.pixel_array == plain.pixel_array).all()


def test_a_get_counts_what_the_peer_cannot_take(spool):
    """No context for CT: those have failed, the others came."""
    responses, came = get(spool.port, identifier("STUDY", StudyInstanceUID=STUDY), [(PET, ExplicitVRLittleEndian)])
    final, failed = responses[-1]
    assert final.Status == 0xB000 and counts(final) == (9, 4, 0) and len(came) == 9
    assert failed is not None and set(failed.FailedSOPInstanceUIDList) == {ds.SOPInstanceUID for ds in GUIDE}


def test_a_peer_that_stops_reading_holds_nothing_for_long(tmp_path):
    """A C-GET to peers that take no bytes ends with network_timeout_s, in little memory; others get their turn."""
    with ReceiverProcess(tmp_path, peers=peers(), reception="low_disk_mb = 1\nnetwork_timeout_s = 1\n"
                         "dimse_timeout_s = 3") as node:
        slices = ct_series(slices=2, rows=1024, columns=2048, seed=6)
        send(node, slices)
        asked = identifier("STUDY", StudyInstanceUID=slices[0].StudyInstanceUID)
        before = node.memory_mb()
        deaf = [unread_get(node.port, asked) for _ in range(RETRIEVALS)]
        responses, came = get(node.port, asked, [(CT, ExplicitVRLittleEndian)])
        assert responses[-1][0].Status == 0x0000 and len(came) == 2
        assert node.memory_mb() - before < 40
        for connection in deaf:
            connection.close()


def unread_get(port: int, asked: Dataset) -> socket.socket:
    """A C-GET whose answers nobody reads; keep the connection."""
    ae = AE("VIEWER")
    assoc = ae.associate("127.0.0.1", port, [build_context(STUDY_GET), build_context(CT, ExplicitVRLittleEndian)],
                         ae_title="NBDNODE", ext_neg=[build_role(CT, scp_role=True)])
    assert assoc.is_established and assoc.dul.socket is not None and assoc.dul.socket.socket is not None
    connection = assoc.dul.socket.socket.dup()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    request = C_GET()
    request.MessageID, request.Priority, request.AffectedSOPClassUID = 1, 2, UID(STUDY_GET)
    request.Identifier = BytesIO(encode(asked, True, True) or b"")
    assoc.dimse.send_msg(request, assoc.accepted_contexts[0].context_id or 0)
    time.sleep(0.1)
    assoc.dul.kill_dul()
    assoc.kill()
    return connection


def test_a_sender_that_offers_no_roles_is_answered_without_them(spool):
    """Reception is what it was: role selection is answered only where it is asked for (PS3.7 D.3.3.4)."""
    assoc = associate(spool.port, [(CT, [ExplicitVRLittleEndian])])
    assert assoc.is_established and not assoc.acceptor.role_selection
    assoc.release()


def test_the_receiver_stays_small(spool):
    """Under 150 MB after all of the above."""
    assert spool.receiver.memory_mb() < 150


def test_more_matches_than_allowed_end_in_a_status_and_what_was_purged_is_no_match(tmp_path):
    """services.max_matches: the first ones, then 0xA700; series.purged_at: the files are gone."""
    with ReceiverProcess(tmp_path, peers=peers(extra="[services]\nmax_matches = 2\n")) as node:
        send(node, [ct_series(slices=1, seed=seed)[0] for seed in range(4)])
        status, answers = find(node.port, identifier("STUDY", StudyInstanceUID=""))
        assert (status, len(answers)) == (0xA700, 2)
        with node.ledger() as ledger, ledger.transaction() as db:
            db.execute("UPDATE series SET purged_at = ?", (time.time() + 60,))
        assert find(node.port, identifier("STUDY", StudyInstanceUID="")) == (0x0000, [])
