"""What nobody can make of the node, by intent or by accident: memory by a few bytes, a place held for ever."""

from __future__ import annotations

import os
import resource
import socket
import struct
import time
import zlib
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from dicomnode.errors import TooLarge
from dicomnode.intake import Intake, Limits, Request
from dicomnode.spool import Spool
from sop import pixels
from sop.codestream import declared_pixels
from sop.errors import Refused
from sop.read import read_series
from tests.factories import ct_series, nm_tomo
from tests.node.test_reception_faults import ECHO_REQUEST
from tests.peers import ReceiverProcess, associate, echoscu, encoded, wait_until

CT = [(CTImageStorage, [ExplicitVRLittleEndian])]
MIB = 2**20


def ct(**attributes: object) -> Dataset:
    return ct_series(slices=1, **attributes)[0]


def compressed(syntax: str, **sizes: int) -> Dataset:
    """A CT slice of 64 x 64 pixels, encoded; `sizes` are written into the header afterwards."""
    dataset = ct(rows=64, columns=64)
    dataset.compress(syntax)
    for keyword, value in sizes.items():
        setattr(dataset, keyword, value)
    return dataset


def received(folder: Path, dataset: Dataset, data: bytes, limits: Limits) -> Intake:
    intake = Intake(Spool(folder), limits, lambda: Request(
        CTImageStorage, dataset.SOPInstanceUID, dataset.file_meta.TransferSyntaxUID, "SCANNER"))
    for start in range(0, len(data), MIB):
        intake.write(data[start:start + MIB])
    return intake


def bomb(inflated_mib: int) -> tuple[Dataset, bytes]:
    """A deflated CT whose pixels are that many MiB of zeros."""
    dataset = ct()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.PixelData = b""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = encoded(dataset)[:-12] + b"\xe0\x7f\x10\0OW\0\0" + struct.pack("<I", inflated_mib * MIB)
    data = deflater.compress(head) + b"".join(deflater.compress(bytes(MIB)) for _ in range(inflated_mib))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    return dataset, data + deflater.flush()


# --- what unpacks


def test_a_deflated_bomb_is_refused_at_reception_in_flat_memory(tmp_path: Path):
    """A few hundred kB that become 300 MiB: status 0xA701, nothing kept, no more than some MiB taken."""
    dataset, data = bomb(300)
    assert len(data) < MIB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    intake = received(tmp_path, dataset, data, Limits(object_bytes=2 * MIB, free_bytes=0, unpacked_bytes=200 * MIB))
    with pytest.raises(TooLarge, match="max_decompressed_mb") as refused:
        intake.index()
    assert refused.value.status == 0xA701
    intake.discard()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 1024
    assert list((tmp_path / "incoming").iterdir()) == []


def test_a_deflated_object_within_the_limit_is_taken(tmp_path: Path):
    """The limit is on what it becomes, not on the syntax."""
    dataset, data = bomb(20)
    limits = Limits(object_bytes=32 * MIB, free_bytes=0, unpacked_bytes=32 * MIB)
    intake = received(tmp_path, dataset, data, limits)
    assert intake.index().sop_instance_uid == dataset.SOPInstanceUID
    intake.discard()


@pytest.mark.parametrize(("sizes", "taken"), [
    ({}, True), ({"Rows": 65535, "Columns": 65535}, False), ({"NumberOfFrames": 999_999_999}, False),
    ({"SamplesPerPixel": 65535, "Rows": 8000, "Columns": 8000}, False)])
def test_a_compressed_object_that_promises_too_much_is_refused_before_it_is_unpacked(
        tmp_path: Path, sizes: dict[str, int], taken: bool):
    """Rows x Columns x frames x samples x bits, from the header alone."""
    dataset = compressed(RLELossless, **sizes)
    limits = Limits(object_bytes=MIB, free_bytes=0, unpacked_bytes=MIB)
    intake = received(tmp_path, dataset, encoded(dataset), limits)
    if taken:
        assert intake.index().pixel_bytes == 64 * 64 * 2
    else:
        with pytest.raises(TooLarge, match="Remedy"):
            intake.index()
    intake.discard()


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_a_codestream_larger_than_its_header_is_not_decoded(tmp_path: Path, syntax: str):
    """64 x 64 in the header, 40,000 x 40,000 in the codestream: a decoder would allocate what the codestream says."""
    dataset = compressed(syntax)
    frame = bytearray(next(generate_frames(dataset.PixelData, number_of_frames=1)))
    assert declared_pixels(bytes(frame)) == 64 * 64
    if syntax == JPEG2000Lossless:
        for at in (8, 12, 24, 28):  # Xsiz, Ysiz, XTsiz, YTsiz
            struct.pack_into(">I", frame, at, 40_000)
    else:
        struct.pack_into(">HH", frame, frame.index(b"\xff\xf7") + 5, 40_000, 40_000)
    assert declared_pixels(bytes(frame)) == 40_000**2
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    began = time.monotonic()
    with pytest.raises(Refused, match="declares 1600000000 pixels, its header 4096") as refused:
        read_series([tmp_path / "ct.dcm"])
    assert refused.value.code == "undecodable"
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("frame", [
    b"", b"\xff\xd8", b"\xff\xd8\xff\xc0\0", b"\xff\x4f\xff\x51\0", b"\xff\xd8\xff\xff\xff\xff",
    b"\xff\xd8\xff\xe0\0\0", b"\xff\xd8" + b"\xff\xd0" * 100, bytes(range(200)) * 5])
def test_a_codestream_that_says_nothing_is_left_to_the_decoder(frame: bytes):
    """Cut or garbled headers end without an answer, and quickly."""
    assert declared_pixels(frame) is None


def test_a_deflated_file_that_would_fill_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also outside the node, where `dicomnode deblur` meets files that nobody received."""
    monkeypatch.setattr(pixels, "MAX_DEFLATED_BYTES", 20 * MIB)
    dataset, data = bomb(30)
    small, little = bomb(10)
    for name, (header, stream) in {"large": (dataset, data), "small": (small, little)}.items():
        empty = Dataset()
        empty.file_meta = header.file_meta
        empty.save_as(tmp_path / name, enforce_file_format=True)
        with (tmp_path / name).open("r+b") as file:
            file.truncate(os.path.getsize(tmp_path / name) - len(_deflated_nothing()))
            file.seek(0, 2)
            file.write(stream)
    with pytest.raises(Refused, match="would inflate to more"):
        pixels.load(tmp_path / "large", pixels=True)
    assert pixels.load(tmp_path / "small", pixels=False).SOPInstanceUID == small.SOPInstanceUID


def _deflated_nothing() -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = deflater.compress(b"") + deflater.flush()
    return packed + b"\0" * (len(packed) % 2)


def test_a_header_that_promises_more_pixels_than_any_object_has_is_refused(tmp_path: Path):
    """Before a decoder is called, and before the volume is allocated."""
    dataset = compressed(RLELossless, Rows=65535, Columns=65535)
    dataset.BitsAllocated = 32
    dataset.save_as(tmp_path / "ct.dcm", enforce_file_format=True)
    with pytest.raises(Refused) as refused:
        read_series([tmp_path / "ct.dcm"])
    assert refused.value.code in {"too-large", "pixel-format"}


@pytest.mark.parametrize("frames", [2**31, 0, -5])
def test_frames_that_nobody_can_hold_are_refused_before_a_slice_is_made_of_each(tmp_path: Path, frames: int):
    """NumberOfFrames of a multi-frame object is believed only as far as an object may go."""
    nm_tomo(NumberOfFrames=str(frames), NumberOfSlices=None, SliceVector=None).save_as(
        tmp_path / "nm.dcm", enforce_file_format=True)
    with pytest.raises(Refused, match="NumberOfFrames is") as refused:
        read_series([tmp_path / "nm.dcm"])
    assert refused.value.code == "too-large"


# --- who stays


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory):
    with ReceiverProcess(tmp_path_factory.mktemp("limits"), reception=(
            "low_disk_mb = 1\nmax_association_s = 1.5\nacse_timeout_s = 1")) as process:
        yield process


def test_an_association_that_lasts_too_long_is_aborted_and_recorded(receiver: ReceiverProcess):
    """reception.max_association_s; the place is free again."""
    began = time.monotonic()
    association = associate(receiver.port, CT)
    assert association.is_established
    wait_until("the abort", lambda: association.is_aborted, timeout_s=8)
    assert 1.0 < time.monotonic() - began < 6
    with receiver.ledger() as ledger:
        event = wait_until("the event", lambda: [e for e in ledger.events() if e["code"] == "association_time"])[0]
    assert "max_association_s" in event["reason"] and event["actor"] == "SCANNER"
    assert echoscu(receiver.port).returncode == 0


def test_a_peer_that_sends_a_byte_now_and_then_does_not_keep_its_place(receiver: ReceiverProcess):
    """In the middle of a PDU, never silent for long: the connection ends with its time all the same."""
    with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as slow:
        slow.sendall(ECHO_REQUEST)
        assert slow.recv(4096)[:1] == b"\2"
        slow.sendall(b"\4\0" + struct.pack(">I", 60_000))
        slow.settimeout(0.1)
        until = time.monotonic() + 8
        while time.monotonic() < until:
            try:
                slow.sendall(b"\0")
                if not slow.recv(100):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert time.monotonic() < until, "it still holds its place"
    assert echoscu(receiver.port).returncode == 0
