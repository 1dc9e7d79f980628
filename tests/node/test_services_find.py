"""C-FIND as a pure matter: what matches, what is answered, what is refused."""

from __future__ import annotations

import random
import time
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.dsutils import encode

from dicomnode.errors import CannotUnderstand, NodeError
from dicomnode.services.catalogue import Catalogue
from dicomnode.services.desk import _decoded, _encoded
from dicomnode.services.findscp import BadQuery, answer, matches, matches_value, read_query
from dicomnode.services.moving import CANCELLED, Courtesy, Tally
from tests.factories import ct_series
from tests.node.line import Line

PATIENT = {"PatientName": ("Müller^Anna",), "PatientID": ("P-1",), "StudyInstanceUID": ("1.2",),
           "StudyDate": ("20240117",), "StudyTime": ("101530.25",), "ModalitiesInStudy": ("CT", "PT"),
           "NumberOfStudyRelatedInstances": ("12",), "AccessionNumber": ("A[1]",)}


def entity(keyword: str) -> tuple[str, ...]:
    return PATIENT.get(keyword, ())


def identifier(level: str = "STUDY", **keys: object) -> Dataset:
    ds = Dataset()
    ds.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(ds, keyword, value)
    return ds


def matched(**keys: object) -> bool:
    return matches(read_query(identifier(**keys), patient_root=False), entity)


@pytest.mark.parametrize(("keyword", "wanted", "found"), [
    ("PatientID", "P-1", True), ("PatientID", "p-1", False), ("PatientID", "", True), ("PatientID", "*", True),
    ("PatientID", "P-*", True), ("PatientID", "P-?", True), ("PatientID", "?", False), ("PatientID", "P*2", False),
    ("PatientName", "müller^anna", True), ("PatientName", "MÜL*", True), ("PatientName", "Müller^Anna^^", True),
    ("PatientName", "Anna", False), ("AccessionNumber", "A[1]", True), ("AccessionNumber", "A[1*", True),
    ("AccessionNumber", "A1", False),
    ("StudyDate", "20240117", True), ("StudyDate", "20240101-20240131", True), ("StudyDate", "20240118-", False),
    ("StudyDate", "-20240117", True), ("StudyDate", "20240117-20240117", True), ("StudyDate", "-20240116", False),
    ("StudyDate", "2024.01.17", True),
    ("StudyTime", "10-11", True), ("StudyTime", "1015-1015", True), ("StudyTime", "101531-", False),
    ("StudyTime", "-10", True), ("StudyTime", "101530.25", True), ("StudyTime", "101530.3-", False),
    ("ModalitiesInStudy", "PT", True), ("ModalitiesInStudy", "MR", False), ("ModalitiesInStudy", ["MR", "CT"], True),
    ("StudyInstanceUID", ["1.9", "1.2"], True), ("StudyInstanceUID", "1.9", False),
])
def test_a_key_matches_by_its_kind(keyword, wanted, found):
    """PS3.4 C.2.2.2: single value, universal, wild card, range, list of UIDs; names whatever their case."""
    assert matched(**{keyword: wanted}) is found


def test_what_has_no_value_matches_universal_keys_alone():
    """An entity without a birth date is found by none."""
    assert matched(PatientBirthDate="") and not matched(PatientBirthDate="19700101") and not matched(StudyID="7")


@given(day=st.integers(1, 28), low=st.integers(1, 28), high=st.integers(1, 28))
def test_a_range_holds_both_its_ends(day, low, high):
    """C.2.2.2.5."""
    assert matches_value("StudyDate", (f"202402{low:02d}-202402{high:02d}",),
                         (f"202402{day:02d}",)) is (low <= day <= high)


@given(value=st.text("ab*?[]!-\\.^", max_size=8))
def test_a_value_without_wild_cards_matches_itself_alone(value):
    """Whatever signs it has, no pattern language but * and ? is seen in it."""
    plain = value.replace("*", "").replace("?", "")
    assert matches_value("StudyID", (plain,), (plain,))
    assert not matches_value("StudyID", (plain or "x",), (plain + "a",))


def test_an_answer_carries_what_was_asked_and_where_to_fetch():
    """C.4.1.1.3.2; what cannot be said in the peer's character set is said in UTF-8."""
    asked = identifier(PatientName="", StudyDate="", NumberOfStudyRelatedInstances="", ModalitiesInStudy="", StudyID="")
    got = answer(read_query(asked, patient_root=False), entity, ae_title="NBDNODE")
    assert (got.QueryRetrieveLevel, got.RetrieveAETitle, got.InstanceAvailability) == ("STUDY", "NBDNODE", "ONLINE")
    assert got.StudyInstanceUID == "1.2" and got.PatientName == "Müller^Anna" and got.StudyID is None
    assert got.NumberOfStudyRelatedInstances == 12 and list(got.ModalitiesInStudy) == ["CT", "PT"]
    assert got.SpecificCharacterSet == "ISO_IR 192" and "AccessionNumber" not in got
    asked.SpecificCharacterSet = "ISO_IR 100"
    assert answer(read_query(asked, patient_root=False), entity, ae_title="X").SpecificCharacterSet == "ISO_IR 100"
    assert "SpecificCharacterSet" not in answer(
        read_query(identifier(PatientID=""), patient_root=False), entity, ae_title="X")


@pytest.mark.parametrize(("asked", "patient_root", "retrieve"), [
    (identifier("PATIENT", PatientID="P"), False, False),
    (identifier("WORKLIST"), False, False),
    (Dataset(), True, False),
    (identifier("SERIES"), False, False),
    (identifier("SERIES", StudyInstanceUID=["1.2", "1.3"]), False, False),
    (identifier("IMAGE", StudyInstanceUID="1.2"), False, False),
    (identifier("STUDY", StudyInstanceUID="1.2"), True, False),
    (identifier("STUDY"), False, True),
    (identifier("STUDY", PatientID="P*"), True, False),
])
def test_an_identifier_that_does_not_fit_the_model_is_refused(asked, patient_root, retrieve):
    """Hierarchical: one unique key of each level above; a retrieval without one would hand out everything."""
    with pytest.raises(BadQuery):
        read_query(asked, patient_root=patient_root, retrieve=retrieve)


def test_keys_that_are_not_known_are_told_of():
    """They are ignored, and the pending status says so (0xFF01)."""
    query = read_query(identifier(StudyID="1", ImplantName="x", NumberOfSeriesRelatedInstances=""), patient_root=False)
    assert set(query.unsupported) == {"ImplantName", "NumberOfSeriesRelatedInstances"} and "StudyID" in query.keys


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_identifiers_are_refused_or_answered():
    """Any bytes: an answer or an error with a status, never another exception."""
    context = build_context("1.2.840.10008.5.1.4.1.2.2.1", ExplicitVRLittleEndian)
    asked = identifier("SERIES", StudyInstanceUID="1.2.3", SeriesInstanceUID="", Modality="PT", SeriesNumber="3",
                       SeriesDate="2024-", PatientWeight="70.5", RequestAttributesSequence=[identifier("X")])
    whole, rng, outcomes = encode(asked, False, True) or b"", random.Random(1), set()
    for _ in range(1500):
        mutated = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place, length = rng.randrange(len(mutated)), rng.randint(0, 6)
            mutated[place:place + rng.choice((0, 1, length))] = rng.randbytes(rng.choice((0, 1, length)))
        try:
            query = read_query(_decoded(BytesIO(bytes(mutated)), context), patient_root=False)
            matches(query, entity)
            assert _encoded(answer(query, lambda keyword: ("ä",), ae_title="X"), context).getvalue()
            outcomes.add(0x0000)
        except NodeError as error:
            outcomes.add(error.status)
    assert outcomes == {0x0000, BadQuery.status, CannotUnderstand.status}


def test_retrievals_step_back_while_objects_come_in():
    """Reception goes first: a pause after each object handed out, and none when nothing comes."""
    received = iter([0, 5, 9, 9])
    courtesy = Courtesy(lambda: next(received), pause_s=0.02, look_s=0.0)
    waits = []
    for _ in range(3):
        began = time.monotonic()
        courtesy()
        waits.append(time.monotonic() - began >= 0.02)
    assert waits == [True, True, False]


def test_numbers_of_a_retrieval_add_up():
    """Completed, failed, warning and remaining are always all of them; the verdict follows (PS3.4 Table C.4-2)."""
    tally = Tally(["1.1", "1.2", "1.3", "1.4"])
    assert tally.remaining == 4 and tally.verdict(cancelled=True) == CANCELLED
    for uid, status in (("1.1", 0x0000), ("1.2", 0xB007), ("1.3", 0xA700)):
        tally.note(uid, status)
    assert (tally.remaining, tally.completed, tally.warning, tally.failed_uids) == (1, 1, 1, ["1.3"])
    tally.fail_rest()
    assert tally.remaining == 0 and tally.verdict(cancelled=False) == 0xB000
    many = Tally([f"1.2.{number:060d}" for number in range(3000)])
    many.fail_rest()
    failures = many.failures()
    assert many.verdict(cancelled=False) == 0xA702 and failures is not None
    assert len("\\".join(failures.FailedSOPInstanceUIDList)) < 65_536 and len(many.failed_uids) == 3000


def test_a_query_reads_no_more_headers_than_it_may_and_none_twice(tmp_path):
    """What the ledger knows costs no header; the rest is read once, newest first, until the asker says stop."""
    def asked(on_read, **keys) -> int:
        query = read_query(identifier("STUDY", StudyInstanceUID="", **keys), patient_root=False)
        return len(list(catalogue.find(query, on_read=on_read)))

    def enough() -> None:
        reads.append(1)
        if len(reads) > 2:
            raise NodeError("enough")

    reads: list[int] = []
    with Line(tmp_path) as line:
        for seed in range(4):
            (ct,) = ct_series(slices=1, seed=seed, StudyDate="20240117", AccessionNumber=f"A{seed}")
            line.receive([ct])
            with line.ledger.transaction() as db:  # as the receiver enters it
                db.execute("UPDATE series SET accession_number = ? WHERE series_uid = ?",
                           (ct.AccessionNumber, ct.SeriesInstanceUID))
        catalogue = Catalogue(line.spool, line.ledger)
        assert asked(enough, AccessionNumber="A3") == 1 and not reads
        with pytest.raises(NodeError, match="enough"):
            asked(enough, StudyDate="20240117")
        assert len(reads) == 3
        reads.clear()
        assert asked(enough, StudyDate="20240117") == 4 and len(reads) == 2
        reads.clear()
        assert asked(enough, StudyDate="20240117", AccessionNumber="A?") == 4 and not reads
