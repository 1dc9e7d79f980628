"""The Storage SCP as its peers see it: who is let in, what is accepted, what each object is answered."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import _config
from pynetdicom.association import Association

from dicomnode.scp import STORAGE_CLASSES, TRANSFER_SYNTAXES
from tests.factories import ct_series, make_uid
from tests.peers import (
    ReceiveCommand,
    ReceiverProcess,
    associate,
    echoscu,
    encoded,
    store_encoded,
    storescu,
    wait_until,
)

PEERS = """
[[peer]]
name = "scanner"
ae_title = "SCANNER"
host = "localhost"
[[peer]]
name = "elsewhere"
ae_title = "ELSEWHERE"
host = "192.0.2.1"
[[peer]]
name = "ward"
ae_title = "WARD"
host = "192.0.2.1"
addresses = ["127.0.0.2/31"]
[[peer]]
name = "archive"
ae_title = "ARCHIVE"
host = "127.0.0.1"
port = 4242
may_send = false
"""
CT = [(CTImageStorage, [ExplicitVRLittleEndian])]
CALLING_NOT_RECOGNISED = (1, 1, 3)
CALLED_NOT_RECOGNISED = (1, 1, 7)
LOCAL_LIMIT_EXCEEDED = (2, 3, 2)


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    with ReceiverProcess(tmp_path_factory.mktemp("receiver"), peers=PEERS,
                         reception="low_disk_mb = 1\nmax_object_mb = 1\nmax_associations_per_peer = 60") as process:
        yield process


@pytest.fixture
def assoc(receiver: ReceiverProcess) -> Iterator[Association]:
    association = associate(receiver.port, CT)
    assert association.is_established
    yield association
    association.release()


def ct(number: int = 0, **attributes: object) -> Dataset:
    """A CT slice of its own series; attributes set by keyword, None removes."""
    dataset = ct_series(slices=1, seed=number)[0]
    for keyword, value in attributes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    return dataset


def store(assoc: Association, dataset: Dataset, *, instance: str | None = None) -> tuple[int, str]:
    """C-STORE under the data set's own UIDs (or another instance UID): status and comment."""
    response = store_encoded(assoc, CTImageStorage, instance or dataset.SOPInstanceUID, encoded(dataset))
    assert response is not None, "the request was not answered"
    return response.Status, response.ErrorComment or ""


def rejection(assoc: Association) -> tuple[int, int, int]:
    """result, source, reason of the A-ASSOCIATE-RJ."""
    assert assoc.is_rejected, f"established: {assoc.is_established}, aborted: {assoc.is_aborted}"
    primitive = assoc.acceptor.primitive
    return primitive.result, primitive.result_source, primitive.diagnostic


def stored_data_set(receiver: ReceiverProcess, sop_instance_uid: str) -> bytes:
    """The bytes on disk after the file meta information."""
    with receiver.ledger() as ledger:
        row = ledger.known(sop_instance_uid)
    assert row is not None
    path = receiver.data_dir / row["path"]
    data = path.read_bytes()
    assert len(data) == row["bytes"]
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, False)
        pydicom.filereader._read_file_meta_info(file)
        data_set = file.read()
    assert hashlib.sha256(data_set).hexdigest() == row["sha256"]
    return data_set


# --- associations


def test_echo_is_answered(receiver: ReceiverProcess):
    """DCMTK's echoscu."""
    assert echoscu(receiver.port).returncode == 0


def test_unknown_calling_ae_is_refused_and_recorded(receiver: ReceiverProcess):
    """Rejected permanent, service user, calling AE title not recognised; a security event names it."""
    assert rejection(associate(receiver.port, CT, calling="STRANGER")) == CALLING_NOT_RECOGNISED
    assert "Calling AE Title Not Recognized" in echoscu(receiver.port, calling="STRANGER").stderr
    with receiver.ledger() as ledger:
        events = wait_until("the event", lambda: [
            e for e in ledger.events() if e["kind"] == "security" and e["actor"] == "STRANGER"])
    assert [e["code"] for e in events] == ["calling_ae"]
    assert "127.0.0.1" in events[0]["reason"]


def test_known_ae_from_another_address_is_refused(receiver: ReceiverProcess):
    """The AE title alone opens nothing: the address must be the peer's."""
    assert rejection(associate(receiver.port, CT, calling="ELSEWHERE")) == CALLING_NOT_RECOGNISED
    assert rejection(associate(receiver.port, CT, source="127.0.0.2")) == CALLING_NOT_RECOGNISED
    with receiver.ledger() as ledger:
        wait_until("both events", lambda: {"ELSEWHERE", "SCANNER"} <= {
            e["actor"] for e in ledger.events() if e["code"] == "address"})


def test_listed_networks_are_let_in(receiver: ReceiverProcess):
    """`addresses` holds networks; it takes the place of `host`."""
    for source in ("127.0.0.2", "127.0.0.3"):
        association = associate(receiver.port, CT, calling="WARD", source=source)
        assert association.is_established
        association.release()
    assert rejection(associate(receiver.port, CT, calling="WARD")) == CALLING_NOT_RECOGNISED


def test_destination_only_may_not_send(receiver: ReceiverProcess):
    """may_send = false."""
    assert rejection(associate(receiver.port, CT, calling="ARCHIVE")) == CALLING_NOT_RECOGNISED


def test_wrong_called_ae_is_refused(receiver: ReceiverProcess):
    """Who calls another AE title reached the wrong node."""
    assert rejection(associate(receiver.port, CT, called="OTHER")) == CALLED_NOT_RECOGNISED


def test_called_ae_is_not_asked_for_where_the_site_says_so(tmp_path: Path):
    """require_called_ae_title = false."""
    with ReceiverProcess(tmp_path, reception="low_disk_mb = 1\nrequire_called_ae_title = false") as lenient:
        assert echoscu(lenient.port, called="ANY").returncode == 0


def test_every_storage_class_is_accepted_in_every_transfer_syntax(receiver: ReceiverProcess):
    """PET, CT, MR, NM, enhanced, secondary capture, SR, private: 128 presentation contexts at a time."""
    keywords = {UID(uid).keyword for uid in STORAGE_CLASSES}
    assert {"PositronEmissionTomographyImageStorage", "EnhancedPETImageStorage", "CTImageStorage",
            "EnhancedCTImageStorage",
            "NuclearMedicineImageStorage", "MRImageStorage", "SecondaryCaptureImageStorage", "EnhancedSRStorage",
            "RawDataStorage", "RTDoseStorage", "SegmentationStorage"} <= keywords
    assert len(TRANSFER_SYNTAXES) == len(set(TRANSFER_SYNTAXES)) >= 15
    # Every class in some syntax, and every syntax in one class.
    offers = [(uid, [TRANSFER_SYNTAXES[number % len(TRANSFER_SYNTAXES)]]) for number, uid in enumerate(STORAGE_CLASSES)]
    offers += [(CTImageStorage, [syntax]) for syntax in TRANSFER_SYNTAXES]
    assert len(offers) > 150
    for start in range(0, len(offers), 128):
        association = associate(receiver.port, offers[start:start + 128])
        assert association.is_established
        assert [cx.abstract_syntax for cx in association.rejected_contexts] == []
        association.release()


def test_fifty_associations_at_once_and_the_one_above_the_limit_is_refused(receiver: ReceiverProcess):
    """60 are open together, each stores; the 61st hears `local limit exceeded` and may come when one has left."""
    with ThreadPoolExecutor(20) as pool:
        opened = list(pool.map(lambda _: associate(receiver.port, CT), range(60)))
        assert all(association.is_established for association in opened)
        assert rejection(associate(receiver.port, CT)) == LOCAL_LIMIT_EXCEEDED
        answers = list(pool.map(lambda pair: store(pair[1], ct(1000 + pair[0])), enumerate(opened)))
        assert {status for status, _ in answers} == {0x0000}
        opened.pop().release()
        wait_until("a free place", lambda: (again := associate(receiver.port, CT)).is_established and
                   (opened.append(again) or True))
        list(pool.map(lambda association: association.release(), opened))


def test_one_association_for_each_instance(receiver: ReceiverProcess):
    """As some scanners send."""
    series = ct_series(slices=15, seed=2000)
    for dataset in series:
        association = associate(receiver.port, CT)
        assert store(association, dataset) == (0x0000, "")
        association.release()
    with receiver.ledger() as ledger:
        assert len(ledger.instances(series[0].SeriesInstanceUID)) == 15
        assert ledger.series(series[0].SeriesInstanceUID)["state"] == "receiving"


# --- objects


def test_object_is_stored_as_received_with_what_matching_asks_for(receiver: ReceiverProcess, assoc: Association):
    """Data set byte for byte; file meta names syntax and sender; the row holds position, orientation, modality."""
    dataset = ct(1, AccessionNumber="ACC 1", SeriesDescription="Körper", SpecificCharacterSet="ISO_IR 100")
    assert store(assoc, dataset) == (0x0000, "")
    assert stored_data_set(receiver, dataset.SOPInstanceUID) == encoded(dataset)
    with receiver.ledger() as ledger:
        row = ledger.instances(dataset.SeriesInstanceUID)[0]
        series = ledger.series(dataset.SeriesInstanceUID)
    assert row["position"] == tuple(map(float, dataset.ImagePositionPatient))
    assert row["orientation"] == tuple(map(float, dataset.ImageOrientationPatient))
    assert (row["frames"], row["calling_ae"], row["address"]) == (1, "SCANNER", "127.0.0.1")
    assert (series["modality"], series["accession_number"], series["series_description"]) == ("CT", "ACC 1", "Körper")
    read = pydicom.dcmread(receiver.data_dir / row["path"])
    assert read.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert read.file_meta.SourceApplicationEntityTitle == "SCANNER"
    assert read.file_meta.FileMetaInformationGroupLength == len(_meta_after_length(receiver.data_dir / row["path"]))
    assert row["path"] == f"objects/{dataset.StudyInstanceUID}/{dataset.SeriesInstanceUID}/{dataset.SOPInstanceUID}.dcm"


def _meta_after_length(path: Path) -> bytes:
    data = path.read_bytes()
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, False)
        pydicom.filereader._read_file_meta_info(file)
        return data[128 + 4 + 12:file.tell()]


def test_identical_repeat_is_a_success_and_changes_nothing(receiver: ReceiverProcess, assoc: Association):
    """A resend is answered 0x0000; one file, one row, no event."""
    dataset = ct(2)
    assert store(assoc, dataset) == (0x0000, "")
    with receiver.ledger() as ledger:
        before = (ledger.series(dataset.SeriesInstanceUID), ledger.events(study_uid=dataset.StudyInstanceUID))
        assert store(assoc, dataset) == (0x0000, "")
        assert (ledger.series(dataset.SeriesInstanceUID), ledger.events(study_uid=dataset.StudyInstanceUID)) == before


def test_other_bytes_under_a_known_uid_are_kept_and_reported_never_used(receiver: ReceiverProcess, assoc: Association):
    """Warning 0xB000 with a comment; the first object stays, the other lies in conflicts/, a row and an event tell."""
    first, second = ct(3), ct(3, PatientComments="another image")
    assert store(assoc, first) == (0x0000, "")
    for _ in range(2):
        status, comment = store(assoc, second)
        assert (status, comment) == (0xB000, "other bytes known under this UID; kept, not used")
    assert stored_data_set(receiver, first.SOPInstanceUID) == encoded(first)
    with receiver.ledger() as ledger:
        (conflict,) = ledger.conflicts(first.SeriesInstanceUID)
        events = [e for e in ledger.events(study_uid=first.StudyInstanceUID) if e["code"] == "conflict"]
    assert (receiver.data_dir / conflict["path"]).read_bytes().endswith(encoded(second))
    assert conflict["path"].startswith("conflicts/")
    assert len(events) == 1


def test_parallel_associations_with_one_uid_keep_exactly_one(receiver: ReceiverProcess):
    """Eight senders race with different bytes: one success, seven conflicts, nothing mixed."""
    rivals = [ct(4, PatientComments=f"rival {number}") for number in range(8)]
    associations = [associate(receiver.port, CT) for _ in rivals]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(store, associations, rivals))
    for association in associations:
        association.release()
    statuses = [status for status, _ in answers]
    assert sorted(statuses) == [0x0000] + [0xB000] * 7
    assert stored_data_set(receiver, rivals[0].SOPInstanceUID) == encoded(rivals[statuses.index(0x0000)])
    with receiver.ledger() as ledger:
        assert len(ledger.conflicts(rivals[0].SeriesInstanceUID)) == 7


def test_request_that_contradicts_its_data_set_is_refused(receiver: ReceiverProcess, assoc: Association):
    """0xA900 for another SOP Instance UID and for another SOP Class UID."""
    dataset = ct(5)
    assert store(assoc, dataset, instance=make_uid("other"))[0] == 0xA900
    assert store(assoc, ct(5, SOPClassUID="1.2.840.10008.5.1.4.1.1.4"))[0] == 0xA900
    with receiver.ledger() as ledger:
        assert ledger.known(dataset.SOPInstanceUID) is None


def test_an_object_sent_as_if_it_were_an_echo_is_not_answered_with_success(receiver: ReceiverProcess):
    """C-STORE of the Verification SOP Class: nobody keeps it, so nobody may say 0x0000."""
    verification = "1.2.840.10008.1.1"
    assoc = associate(receiver.port, [(verification, ["1.2.840.10008.1.2.1"])])
    assert store_encoded(assoc, verification, "1.2.3", encoded(ct_series(slices=1)[0])) is None
    wait_until("the association to be aborted", lambda: not assoc.is_established)


@pytest.mark.parametrize("missing", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"])
def test_object_without_identity_is_refused(assoc: Association, missing: str):
    """0xC000, the comment names the attribute."""
    dataset = ct(6)
    instance = dataset.SOPInstanceUID
    del dataset[missing]
    status, comment = store(assoc, dataset, instance=instance)
    assert status == 0xC000
    assert missing in comment


@pytest.mark.parametrize("data", [b"\0", b"garbage that is no data set at all", b"\xff" * 4000,
                                  b"\x08\0\x18\0UI\xff\xff1.2"])
def test_unreadable_data_set_is_refused_and_the_association_lives(assoc: Association, data: bytes):
    """0xC000; the next object on the same association is kept."""
    response = store_encoded(assoc, CTImageStorage, make_uid("unreadable"), data)
    assert response.Status == 0xC000
    assert store(assoc, ct(7))[0] == 0x0000


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"])
@pytest.mark.parametrize("uid", ["../../../../tmp/evil", "/etc/passwd", "..", "1.2/../../3", "1.2\\3", "1.2 3", "1..2",
                                 "1.02", "1." * 40 + "1", "1.2\n3"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_uid_that_is_none_is_refused_and_no_path_is_made_of_it(
        receiver: ReceiverProcess, assoc: Association, monkeypatch: pytest.MonkeyPatch, keyword: str, uid: str):
    """Path traversal, over-long and malformed UIDs: 0xC000, and nothing is written outside the spool."""
    monkeypatch.setitem(_config.VALIDATORS, "UI", lambda value: (True, ""))  # this sender does not care
    before = {path for path in receiver.folder.rglob("*") if path.is_dir()}
    dataset = ct(8)
    dataset[keyword]._value = uid
    instance = uid if keyword == "SOPInstanceUID" else dataset.SOPInstanceUID
    assert store(assoc, dataset, instance=instance)[0] in (0xC000, 0xA900)
    assert {path for path in receiver.folder.rglob("*") if path.is_dir()} == before
    assert not Path("/tmp/evil").exists()


def test_garbage_in_optional_attributes_does_not_refuse_the_object(receiver: ReceiverProcess, assoc: Association):
    """Position None where it cannot be read; the object is kept all the same."""
    dataset = ct(9)
    data = encoded(dataset)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "SeriesNumber", "Modality"):
        tag = dataset[keyword].tag
        at = data.index(struct.pack("<HH", tag.group, tag.element) + dataset[keyword].VR.encode()) + 8
        length = struct.unpack_from("<H", data, at - 2)[0]
        data = data[:at] + (b"\xfe\x01nan\\inf\\" * 9)[:length] + data[at + length:]
    assert store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, data).Status == 0x0000
    assert stored_data_set(receiver, dataset.SOPInstanceUID) == data
    with receiver.ledger() as ledger:
        row = ledger.instances(dataset.SeriesInstanceUID)[0]
    assert (row["position"], row["orientation"], row["frames"]) == (None, None, 1)


def test_object_beyond_the_limit_is_refused_out_of_resources(receiver: ReceiverProcess, assoc: Association):
    """max_object_mb = 1: 0xA701, nothing is left in incoming/."""
    dataset = ct(10)
    dataset.PixelData = bytes(2**20)
    assert store(assoc, dataset)[0] == 0xA701
    assert list((receiver.data_dir / "incoming").iterdir()) == []


def test_header_longer_than_what_is_kept_in_memory_is_read_from_disk(receiver: ReceiverProcess, assoc: Association):
    """A private element of 400 kB before the attributes that are looked for."""
    dataset = ct(11)
    dataset.add_new(0x00090010, "LO", "OURS")
    dataset.add_new(0x00091001, "OB", bytes(400_000))
    assert store(assoc, dataset) == (0x0000, "")
    with receiver.ledger() as ledger:
        assert ledger.instances(dataset.SeriesInstanceUID)[0]["position"] is not None


def test_low_disk_is_refused_out_of_resources(tmp_path: Path):
    """A watermark above what is free: 0xA700 with a remedy in the events; the association lives; nothing is kept."""
    with ReceiverProcess(tmp_path, reception="low_disk_mb = 1000000000") as full:
        association = associate(full.port, CT)
        for _ in range(2):
            assert store(association, ct(12))[0] == 0xA700
        association.release()
        with full.ledger() as ledger:
            (event,) = [e for e in ledger.events() if e["kind"] == "reception"]
            assert ledger.known(ct(12).SOPInstanceUID) is None
    assert event["code"] == "DiskFull"
    assert "low_disk_mb" in event["reason"]


# --- transfer syntaxes


@pytest.mark.parametrize("syntax", TRANSFER_SYNTAXES, ids=lambda syntax: syntax.keyword)
def test_every_transfer_syntax_is_kept_byte_for_byte(receiver: ReceiverProcess, syntax: UID):
    """What is sent lies on disk bit for bit, and its index is read whatever the encoding."""
    dataset = ct(3000 + TRANSFER_SYNTAXES.index(syntax), NumberOfFrames="1")
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax.is_compressed and not syntax.is_deflated:
        dataset.PixelData = encapsulate([random.Random(syntax).randbytes(1001)])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    data = encoded(dataset)
    if syntax.is_deflated:
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        data = deflate.compress(data) + deflate.flush()
        data += b"\0" * (len(data) % 2)
    association = associate(receiver.port, [(CTImageStorage, [syntax])])
    assert store_encoded(association, CTImageStorage, dataset.SOPInstanceUID, data).Status == 0x0000
    association.release()
    assert stored_data_set(receiver, dataset.SOPInstanceUID) == data
    with receiver.ledger() as ledger:
        row = ledger.instances(dataset.SeriesInstanceUID)[0]
    assert row["transfer_syntax_uid"] == syntax
    assert row["position"] == tuple(map(float, dataset.ImagePositionPatient))


@pytest.mark.parametrize(("encoder", "proposal"), [
    ("dcmconv +ti", "-xi"), ("dcmconv +tb", "-xb"), ("dcmconv +td", "-xd"), ("dcmcrle", "-xr"), ("dcmcjpeg +e1", "-xs"),
    ("dcmcjpeg +ee", "-xx"), ("dcmcjpls +el", "-xt"),
])
def test_what_dcmtk_encodes_and_sends_is_kept(receiver: ReceiverProcess, tmp_path: Path, encoder: str, proposal: str):
    """Real encoders, a real sender: same syntax, same pixel data, same attributes."""
    plain, file = tmp_path / "plain.dcm", tmp_path / "encoded.dcm"
    ct(sum(encoder.encode()) + 4000).save_as(plain, enforce_file_format=True)
    program, *options = encoder.split()
    subprocess.run([f"/usr/bin/{program}", *options, str(plain), str(file)], check=True, capture_output=True)
    sent = pydicom.dcmread(file)
    done = storescu(receiver.port, [file], options=["-R", proposal])
    assert done.returncode == 0, done.stderr
    with receiver.ledger() as ledger:
        row = ledger.known(sent.SOPInstanceUID)
    assert row is not None
    assert row["transfer_syntax_uid"] == sent.file_meta.TransferSyntaxUID
    assert pydicom.dcmread(receiver.data_dir / row["path"]) == sent


def test_receive_command_loads_no_heavy_library(tmp_path: Path):
    """`dicomnode receive` as systemd starts it: no torch, scipy, SimpleITK, numba; below 150 MB."""
    with ReceiveCommand(tmp_path) as command:
        assert command.process is not None
        assert echoscu(command.port).returncode == 0
        mapped = Path(f"/proc/{command.process.pid}/maps").read_text()
        assert not [name for name in ("torch", "/scipy/", "SimpleITK", "llvmlite", "highdicom") if name in mapped]
        assert command.memory_mb() < 150
        assert command.stop() == 0
        command.start()


def test_memory_of_the_receiver_stays_small(receiver: ReceiverProcess):
    """Below 150 MB after all of the above."""
    assert receiver.memory_mb() < 150
