"""A data set on its way in: the same file and index however it is cut, and every failure kept as a status."""

from __future__ import annotations

import errno
import io
import os
import random
import sqlite3
import time
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from dicomnode.config import Config
from dicomnode.errors import CannotUnderstand, DiskFull, NodeError, TooLarge
from dicomnode.intake import Intake, Limits, Request, file_meta
from dicomnode.ledger import Ledger
from dicomnode.objectindex import Incomplete, read_index
from dicomnode.scp import Receiver
from dicomnode.spool import Spool
from tests.factories import ct_series, enhanced_ct
from tests.peers import encoded

LIMITS = Limits(object_bytes=2**20, free_bytes=0)
DATASET = ct_series(slices=1)[0]
DATA = encoded(DATASET)
REQUEST = Request(CTImageStorage, DATASET.SOPInstanceUID, ExplicitVRLittleEndian, "SCANNER")


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Spool:
    return Spool(tmp_path_factory.mktemp("spool"))


def intake(spool: Spool, request: Request | None = REQUEST, limits: Limits = LIMITS) -> Intake:
    return Intake(spool, limits, lambda: request)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, len(DATA) - 1), max_size=8))
def test_fragments_make_the_same_file_however_cut(spool: Spool, cuts: list[int]):
    """File, sha256 and index do not depend on the sender's PDU size."""
    one = intake(spool)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(DATA)]):
        one.write(memoryview(DATA)[start:end])
    index = one.index()
    one.sync()
    assert one.path is not None
    assert one.path.read_bytes() == file_meta(REQUEST) + DATA
    assert one.path.stat().st_size == one.file_size
    assert index.sop_instance_uid == DATASET.SOPInstanceUID
    assert index.position == tuple(map(float, DATASET.ImagePositionPatient))
    one.discard()
    assert not one.path.exists()


def test_file_meta_is_conformant(spool: Spool):
    """pydicom reads it, lengths are even, group length is right (PS3.10 section 7.1)."""
    for instance in ("1.2.3", "1.2.34"):
        meta = file_meta(Request("1.2", instance, ExplicitVRLittleEndian, "ODD"))
        assert len(meta) % 2 == 0
        read = pydicom.dcmread(io.BytesIO(meta)).file_meta
        assert read.FileMetaInformationGroupLength == len(meta) - 144
        assert (read.MediaStorageSOPInstanceUID, read.SourceApplicationEntityTitle) == (instance, "ODD")
        assert read.FileMetaInformationVersion == b"\0\1"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_index_needs_more_than_the_first_bytes_and_says_so(syntax: str):
    """Incomplete while attributes may still come; read when they are there."""
    dataset = ct_series(slices=1)[0]
    dataset.file_meta.TransferSyntaxUID = syntax
    data = encoded(dataset)
    if syntax == DeflatedExplicitVRLittleEndian:
        deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        data = deflate.compress(data) + deflate.flush()
    with pytest.raises(Incomplete):
        read_index(io.BytesIO(data[:150]), syntax, whole=False)
    assert read_index(io.BytesIO(data), syntax, whole=True).modality == "CT"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_deflated_bomb_is_read_no_further_than_allowed():
    """128 MB of zeros in half a megabyte: no identity, little time."""
    deflate = zlib.compressobj(1, wbits=-zlib.MAX_WBITS)
    bomb = b"".join(deflate.compress(bytes(2**24)) for _ in range(8)) + deflate.flush()
    start = time.process_time()
    with pytest.raises(CannotUnderstand):
        read_index(io.BytesIO(bomb), DeflatedExplicitVRLittleEndian, whole=True)
    assert time.process_time() - start < 2.0


def test_multi_frame_object_tells_its_frames(spool: Spool):
    """NumberOfFrames; positions lie in sequences and are left to the reader."""
    dataset = enhanced_ct(slices=5)
    index = read_index(io.BytesIO(encoded(dataset)), ExplicitVRLittleEndian, whole=True)
    assert (index.frames, index.position) == (5, None)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_bytes_make_the_index_raise_anything_else(data: bytes):
    """Whatever the reader of DICOM raises inside."""
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian):
        with pytest.raises((CannotUnderstand, Incomplete)):
            read_index(io.BytesIO(data), syntax, whole=len(data) % 2 == 0)


def test_value_too_long_to_be_true_is_not_read():
    """A Modality of 1 GB: stopped at, not read into memory."""
    data = DATA.replace(b"\x08\0\x60\0CS\2\0CT", b"\x08\0\x60\0UN\0\0" + (2**30).to_bytes(4, "little"))
    assert data != DATA
    with pytest.raises(CannotUnderstand, match="has no StudyInstanceUID"):
        read_index(io.BytesIO(data), ExplicitVRLittleEndian, whole=True)


def test_deep_nesting_is_refused_not_crashed_on():
    """Ten thousand sequences inside each other."""
    deep = (b"\x08\0\x06\0SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 10_000
    with pytest.raises(CannotUnderstand):
        read_index(io.BytesIO(deep), ExplicitVRLittleEndian, whole=True)


# --- failures


def refused(one: Intake, error: type[NodeError]) -> None:
    """The rest is swallowed, the file is gone, index and sync raise the error."""
    one.write(b"and more")
    for ask in (one.index, one.sync):
        with pytest.raises(error):
            ask()
    assert one.path is None or not one.path.exists()


def test_object_beyond_the_limit_is_given_up_early(spool: Spool):
    """Its file is removed as soon as the limit is passed."""
    one = intake(spool, limits=Limits(object_bytes=1000, free_bytes=0))
    for _ in range(20):
        one.write(bytes(100))
    refused(one, TooLarge)
    assert one.size > 1000


def test_low_disk_is_noticed_before_the_first_byte(spool: Spool):
    """No file is opened."""
    one = intake(spool, limits=Limits(object_bytes=1000, free_bytes=2**60))
    one.write(DATA)
    refused(one, DiskFull)
    assert one.path is None


@pytest.mark.parametrize(("code", "error"), [
    (errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, NodeError)])
def test_failing_writes_become_a_status(
        spool: Spool, monkeypatch: pytest.MonkeyPatch, code: int, error: type[NodeError]):
    """Disk full, quota, hardware."""
    one = intake(spool)
    one.write(DATA[:100])

    def fail(*_: object) -> int:
        raise OSError(code, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        one.write(DATA[100:200])
    refused(one, error)


@pytest.mark.parametrize("request_", [None, Request("1.2", "../x", ExplicitVRLittleEndian, "A"),
                                      Request("", "1.2", ExplicitVRLittleEndian, "A")])
def test_data_without_a_sound_request_is_swallowed(spool: Spool, request_: Request | None):
    """Nothing is written."""
    one = intake(spool, request_)
    one.write(DATA)
    refused(one, CannotUnderstand)
    assert list(spool.incoming.iterdir()) == []


def test_request_without_a_data_set_is_refused(spool: Spool):
    """No fragment came."""
    with pytest.raises(CannotUnderstand, match="without a data set"):
        intake(spool).index()


def test_short_writes_are_completed(spool: Spool, monkeypatch: pytest.MonkeyPatch):
    """The kernel may take fewer bytes than it is given."""
    rng, write = random.Random(3), os.write
    one = intake(spool)
    one.write(b"")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:rng.randrange(1, 200)]))
        one.write(DATA)
    one.sync()
    assert isinstance(one.path, Path)
    assert one.path.read_bytes() == file_meta(REQUEST) + DATA
    one.discard()


def test_a_ledger_that_cannot_be_written_is_a_passing_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Disk full or locked for long: 0xA700, out of resources, after which senders try again; not 0x0110."""
    taken = intake(Spool(tmp_path))
    monkeypatch.setattr(taken, "index", lambda: None)
    requestor = SimpleNamespace(ae_title="SCANNER", address_info=None)
    event: Any = SimpleNamespace(request=SimpleNamespace(DataSet=taken),
                                 assoc=SimpleNamespace(requestor=requestor, may_store=True))

    def keep(*_: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        receiver = Receiver(Config(), Spool(tmp_path), ledger, clock=lambda: 1.0)
        monkeypatch.setattr(receiver, "_keep", keep)
        try:
            answer = receiver._on_c_store(event)
        finally:
            receiver.stop()
    assert isinstance(answer, Dataset) and answer.Status == 0xA700
