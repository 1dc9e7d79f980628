"""Hostile input, made from good input by a seeded generator: files and the byte streams of whole associations.

Used by tests/node/test_fuzz_files.py, tests/node/test_fuzz_pdus.py (some hundreds) and scripts/fuzz.py (any number).
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from tests.factories import ct_series, enhanced_pet, nm_tomo, pet_series
from tests.peers import encoded

VRS = (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"OB", b"OD", b"OF", b"OL",
       b"OV", b"OW", b"PN", b"SH", b"SL", b"SQ", b"SS", b"ST", b"SV", b"TM", b"UC", b"UI", b"UL", b"UN", b"UR", b"US",
       b"UT", b"UV", b"??", b"\0\0")
LENGTHS = (0, 1, 2, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
Random = random.Random


@dataclass(frozen=True)
class Good:
    """A series to start from: encoded data sets of one transfer syntax."""

    name: str
    syntax: UID
    sop_class_uid: str
    sop_instance_uids: tuple[str, ...]
    data: tuple[bytes, ...]


def good_series() -> list[Good]:
    """PET, CT, NM, classic and enhanced, in every kind of transfer syntax that is decoded in the reading process."""
    def small() -> list[Dataset]:
        return ct_series(slices=3, rows=40, columns=40)

    made = [_good("pet", pet_series(slices=4)), _good("enhanced", [enhanced_pet(slices=4)]), _good("nm", [nm_tomo()]),
            _good("ct", small()), _good("implicit", small(), ImplicitVRLittleEndian),
            _good("deflated", small(), DeflatedExplicitVRLittleEndian)]
    for name, syntax in (("rle", RLELossless), ("jpeg-ls", JPEGLSLossless), ("jpeg-2000", JPEG2000Lossless)):
        series = small()
        for dataset in series:
            dataset.compress(syntax)
        made.append(_good(name, series, syntax))
    return made


def _good(name: str, series: Sequence[Dataset], syntax: UID = ExplicitVRLittleEndian) -> Good:
    for dataset in series:
        dataset.file_meta.TransferSyntaxUID = syntax
    data = [encoded(dataset) for dataset in series]
    if syntax == DeflatedExplicitVRLittleEndian:
        data = [_deflated(each) for each in data]
    return Good(name, syntax, series[0].SOPClassUID, tuple(str(each.SOPInstanceUID) for each in series), tuple(data))


def _deflated(data: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(data) + deflater.flush()


# --- data sets


def _flip_bits(data: bytearray, rng: Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: Random) -> None:
    start = _place(data, rng)
    data[start:start + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(1, 40))


def _truncate(data: bytearray, rng: Random) -> None:
    del data[rng.randrange(len(data)):]


def _cut_out(data: bytearray, rng: Random) -> None:
    start = _place(data, rng)
    del data[start:start + rng.randrange(1, 200)]


def _repeat(data: bytearray, rng: Random) -> None:
    start = _place(data, rng)
    data[start:start] = data[start:start + rng.randrange(1, 400)] * rng.randrange(1, 5)


def _element(data: bytearray, rng: Random) -> int:
    """Where an explicit element with a VR known to us begins, as far as one can be found."""
    for _ in range(50):
        at = data.find(rng.choice(VRS[:-2]), _place(data, rng))
        if at >= 4:
            return at - 4
    return _place(data, rng)


def _change_length(data: bytearray, rng: Random) -> None:
    at = _element(data, rng) + 6
    if rng.random() < 0.5:
        data[at:at + 2] = struct.pack("<H", rng.choice(LENGTHS) & 0xFFFF)
    else:
        data[at + 2:at + 6] = struct.pack("<I", rng.choice(LENGTHS))


def _change_vr(data: bytearray, rng: Random) -> None:
    at = _element(data, rng) + 4
    data[at:at + 2] = rng.choice(VRS)


def _nest(data: bytearray, rng: Random) -> None:
    """Sequences inside each other, without end or with one."""
    tag = rng.choice((b"\x08\0\x15\x11", b"\x54\0\x16\0", b"\x00\x52\x29\x92", b"\x09\0\x10\x10"))
    deep = rng.choice((3, 30, 300, 3000))
    inner = (tag + b"SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * deep
    if rng.random() < 0.5:
        inner += (b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0") * deep
    at = _element(data, rng)
    data[at:at] = inner


def _promise_much(data: bytearray, rng: Random) -> None:
    """Rows, Columns, NumberOfFrames, BitsAllocated and the like that nobody can hold."""
    tag = rng.choice((b"\x28\0\x10\0", b"\x28\0\x11\0", b"\x28\0\x00\x01", b"\x28\0\x02\0", b"\x28\0\x01\x01")) + b"US"
    at = data.find(tag)
    if at >= 0:
        data[at + 8:at + 10] = struct.pack("<H", rng.choice((0, 1, 8, 32, 64, 0x7FFF, 0xFFFF)))
    frames = rng.choice((b"0 ", b"-1", b"999999999 ", b"1e99", b"2147483648", b"\xff\xff", b"1\\2 "))
    if rng.random() < 0.3:
        at = data.find(b"\x28\0\x10\0US")
        data[at:at] = b"\x28\0\x08\0IS" + struct.pack("<H", len(frames)) + frames


def _splice(data: bytearray, rng: Random) -> None:
    """The end belongs to the beginning of itself: elements out of order."""
    half = rng.randrange(len(data))
    data[:] = data[half:] + data[:half]


DATA_SET_MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (
    _flip_bits, _flip_bits, _overwrite, _truncate, _cut_out, _repeat, _change_length, _change_length, _change_vr,
    _nest, _promise_much, _promise_much, _splice)


def _place(data: bytearray, rng: Random) -> int:
    """Two in three in the header."""
    if not data:
        return 0
    return rng.randrange(min(len(data), 1500) if rng.random() < 0.67 else len(data))


def mutated_data_set(good: Good, rng: Random) -> tuple[int, bytes]:
    """Which instance of the series was changed, and its bytes now; a deflated one before or after it was deflated."""
    which = rng.randrange(len(good.data))
    inside = good.syntax == DeflatedExplicitVRLittleEndian and rng.random() < 0.7
    data = bytearray(zlib.decompress(good.data[which], -zlib.MAX_WBITS) if inside else good.data[which])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            rng.choice(DATA_SET_MUTATIONS)(data, rng)
    return which, _deflated(bytes(data)) if inside else bytes(data)


# --- byte streams


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(body)) + body


def _pdu(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxI", kind, len(body)) + body


def associate_request(calling: str = "SCANNER", called: str = "NBDNODE") -> bytes:
    """A-ASSOCIATE-RQ for C-ECHO (context 1) and CT Image Storage (context 3) (PS3.8 section 9.3.2)."""
    contexts = b"".join(
        _item(0x20, bytes([number, 0, 0, 0]) + _item(0x30, uid.encode()) + _item(0x40, ExplicitVRLittleEndian.encode()))
        for number, uid in ((1, "1.2.840.10008.1.1"), (3, str(CTImageStorage))))
    user = _item(0x50, _item(0x51, struct.pack(">I", 16384)) + _item(0x52, b"1.2.826.0.1.3680043")
                 + _item(0x55, b"FUZZ"))
    body = (b"\0\1\0\0" + called.encode().ljust(16) + calling.encode().ljust(16) + bytes(32)
            + _item(0x10, b"1.2.840.10008.3.1.1.1") + contexts + user)
    return _pdu(1, body)


def _command(**elements: tuple[int, bytes]) -> bytes:
    body = b"".join(struct.pack("<HHI", 0, number, len(value)) + value for number, value in elements.values())
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


def _text(value: str) -> bytes:
    return value.encode() + b"\0" * (len(value) % 2)


def conversation(sop_instance_uid: str, data_set: bytes, *, fragment: int = 2000) -> list[bytes]:
    """The PDUs of a peer that associates, echoes, stores one object and releases."""
    echo = _command(affected=(2, _text("1.2.840.10008.1.1")), field=(0x100, struct.pack("<H", 0x30)),
                    message=(0x110, struct.pack("<H", 1)), kind=(0x800, struct.pack("<H", 0x101)))
    store = _command(affected=(2, _text(CTImageStorage)), field=(0x100, struct.pack("<H", 1)),
                     message=(0x110, struct.pack("<H", 2)), priority=(0x700, b"\0\0"),
                     kind=(0x800, struct.pack("<H", 1)), instance=(0x1000, _text(sop_instance_uid)))
    parts = [data_set[at:at + fragment] for at in range(0, len(data_set), fragment)]
    data = [_pdu(4, struct.pack(">IBB", len(part) + 2, 3, 2 if number == len(parts) - 1 else 0) + part)
            for number, part in enumerate(parts)]
    return [associate_request(), _pdu(4, struct.pack(">IBB", len(echo) + 2, 1, 3) + echo),
            _pdu(4, struct.pack(">IBB", len(store) + 2, 3, 3) + store), *data, _pdu(5, bytes(4))]


@dataclass(frozen=True)
class Stream:
    """What one hostile peer sends, waiting for an answer between the parts.

    cut   it is the beginning of a good conversation and ends before the object does.
    """

    parts: tuple[bytes, ...]
    cut: bool = False


def mutated_stream(pdus: Sequence[bytes], rng: Random) -> Stream:
    """Bits, lengths, types, order, pieces of pieces, rubbish; in the middle of a PDU or between them."""
    kind = rng.randrange(9)
    parts = [bytearray(pdu) for pdu in pdus]
    if kind == 0:
        rest = b"".join(pdus[1:-1])
        return Stream((pdus[0], rest[:rng.randrange(len(rest))]), cut=True)
    if kind == 1:
        return Stream((rng.randbytes(rng.choice((1, 5, 6, 7, 100, 5000))),))
    if kind == 2:
        rng.shuffle(parts)
    elif kind == 3:
        del parts[rng.randrange(len(parts))]
    elif kind == 4:
        parts.insert(rng.randrange(len(parts)), parts[rng.randrange(len(parts))])
    elif kind == 5:
        part = rng.choice(parts)
        part[0] = rng.randrange(256) if rng.random() < 0.3 else rng.randrange(0, 9)
    elif kind == 6:
        part = rng.choice(parts)
        part[2:6] = struct.pack(">I", rng.choice((0, 1, 3, 5, 100, 2**16, 2**20, 2**24, 2**31, 2**32 - 1)))
    else:
        part = parts[0] if rng.random() < 0.4 else rng.choice(parts)
        for _ in range(rng.choice((1, 2, 8, 30))):
            at = rng.randrange(len(part))
            part[at] = rng.choice((part[at] ^ 1 << rng.randrange(8), rng.randrange(256), 0, 255))
        if rng.random() < 0.2:
            at = rng.randrange(len(part))
            part[at:at] = rng.randbytes(rng.randrange(1, 50))
    if rng.random() < 0.1:  # all at once, which the protocol does not allow
        return Stream((b"".join(parts),))
    return Stream((bytes(parts[0]), b"".join(parts[1:])))
