"""What reception must know of a data set: its identity, and the few attributes that matching asks for.

Only what stands before the pixels is read, from the encoded bytes. Identity must be right; anything else may be
garbage without the object being refused.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from dicomnode.errors import CannotUnderstand, TooLarge

__all__ = ["NATIVE", "Incomplete", "ObjectIndex", "read_index", "require_unpackable"]

_INFLATED_LIMIT = 16 * 2**20  # bytes; a deflated data set that hides more before its pixels is not read further
_PIECE = 2**20  # bytes
_ELEMENT_LIMIT = 20_000
_VALUE_LIMIT = 2**16  # bytes; no attribute looked for is longer
NATIVE = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian})  # nothing to unpack
_LAST = 0x00280100
_DEFLATE_MOST = 1032  # bytes that one byte of a deflated stream can become (RFC 1951: 258 bytes from 2 bits)
_TAGS = {keyword: Tag(keyword) for keyword in (
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "AccessionNumber", "Modality", "SeriesDescription",
    "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "ImagePositionPatient", "ImageOrientationPatient",
    "NumberOfFrames", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated")}
_WANTED = frozenset(_TAGS.values())


class Incomplete(Exception):
    """The bytes given end before the attributes that are looked for."""


@dataclass(frozen=True)
class ObjectIndex:
    """Identity and the attributes matching asks for; optional ones are None or "" where absent or unreadable.

    pixel_bytes   what the header promises the pixels to be, uncompressed; 0 where it promises nothing.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    modality: str
    accession_number: str
    series_number: str
    series_description: str
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    frames: int
    pixel_bytes: int = 0


def read_index(stream: BinaryIO, transfer_syntax_uid: str, *, whole: bool) -> ObjectIndex:
    """Read the index of an encoded data set from where `stream` stands (`whole`: it holds all of the data set).

    Raises Incomplete where more bytes are needed, CannotUnderstand where the data set cannot be read or lacks a UID.
    """
    if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        stream = _inflated(stream)
    reached, elements = False, 0

    def stop_when(tag: BaseTag, vr: str | None, length: int) -> bool:
        """Behind the last attribute looked for, at one too long to be true, or after more than any object has."""
        nonlocal reached, elements
        elements += 1
        reached = (tag > _LAST or elements > _ELEMENT_LIMIT
                   or (tag in _WANTED and _VALUE_LIMIT < length < 0xFFFFFFFF))
        return reached

    try:
        found = read_dataset(
            stream, transfer_syntax_uid == ImplicitVRLittleEndian, transfer_syntax_uid != ExplicitVRBigEndian,
            stop_when=stop_when, specific_tags=list(_TAGS.values()))
    except Exception as error:  # bytes of strangers: the reader may raise anything, RecursionError included
        if not whole:
            raise Incomplete from error
        raise CannotUnderstand(f"the data set cannot be read: {type(error).__name__}") from error
    if not reached and not whole:
        raise Incomplete
    return _index(found, big_endian=transfer_syntax_uid == ExplicitVRBigEndian)


def _inflated(stream: BinaryIO) -> BinaryIO:
    try:
        return io.BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream.read(_INFLATED_LIMIT), _INFLATED_LIMIT))
    except zlib.error as error:
        raise CannotUnderstand(f"the deflated data set cannot be inflated: {error}") from error


def _index(found: Dataset, *, big_endian: bool) -> ObjectIndex:
    uids = {keyword: _raw(found, keyword).decode("ascii", errors="replace").rstrip(" \0") for keyword in (
        "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")}
    missing = [keyword for keyword, uid in uids.items() if not uid]
    if missing:
        raise CannotUnderstand(f"the data set has no {', '.join(missing)}")
    return ObjectIndex(
        sop_class_uid=uids["SOPClassUID"],
        sop_instance_uid=uids["SOPInstanceUID"],
        study_uid=uids["StudyInstanceUID"],
        series_uid=uids["SeriesInstanceUID"],
        modality=_text(found, "Modality")[:16],
        accession_number=_text(found, "AccessionNumber", decoded=True)[:64],
        series_number=_text(found, "SeriesNumber")[:16],
        series_description=_text(found, "SeriesDescription", decoded=True)[:256],
        position=_numbers(found, "ImagePositionPatient", 3),
        orientation=_numbers(found, "ImageOrientationPatient", 6),
        frames=_count(_text(found, "NumberOfFrames")),
        pixel_bytes=_pixel_bytes(found, big_endian=big_endian),
    )


def require_unpackable(index: ObjectIndex, transfer_syntax_uid: str, stream: BinaryIO, *, size: int,
                       limit: int) -> None:
    """Raises TooLarge where an object of `size` bytes would become more than `limit` bytes unpacked.

    Compressed pixels are judged by what the header promises; a deflated data set (from where `stream` stands) is
    inflated piece by piece, without keeping anything, where it is long enough to become that large.
    """
    syntax = UID(transfer_syntax_uid)
    unpacked = 0
    if syntax == DeflatedExplicitVRLittleEndian:
        if size * _DEFLATE_MOST > limit:
            unpacked = _inflated_size(stream, limit)
    elif syntax.is_transfer_syntax and syntax.is_encapsulated:
        unpacked = index.pixel_bytes
    if unpacked > limit:
        raise TooLarge(f"the object would unpack to more than {limit // 2**20} MiB. "
                       "Remedy: raise reception.max_decompressed_mb, and max_object_mb for deflated ones.")


def _inflated_size(stream: BinaryIO, limit: int) -> int:
    """How long the data set is, or a number above `limit`."""
    inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    try:
        while size <= limit and not inflater.eof:
            piece = inflater.unconsumed_tail or stream.read(_PIECE)
            if not piece:
                break
            size += len(inflater.decompress(piece, _PIECE))
    except zlib.error as error:
        raise CannotUnderstand(f"the deflated data set cannot be inflated: {error}") from error
    return size


def _raw(found: Dataset, keyword: str) -> bytes:
    """The bytes as they came; none where absent, a sequence, or under a VR that pydicom does not know."""
    if _TAGS[keyword] not in found:
        return b""
    try:
        value = found.get_item(_TAGS[keyword]).value
    except (NotImplementedError, ValueError, TypeError, LookupError, AttributeError):
        return b""
    return value if isinstance(value, bytes) else b""


def _text(found: Dataset, keyword: str, *, decoded: bool = False) -> str:
    """The value without padding and control characters; `decoded` by SpecificCharacterSet, else ASCII."""
    raw = _raw(found, keyword)
    text = raw.decode("ascii", errors="replace")
    if decoded and not raw.isascii():
        try:
            names = _raw(found, "SpecificCharacterSet").decode("ascii", errors="replace")
            encodings = convert_encodings([name.strip(" \0") for name in names.split("\\")])
            text = decode_bytes(raw, encodings, set())
        except (LookupError, ValueError, TypeError, AttributeError):
            pass  # a wrong character set: the ASCII part is kept, the rest shows as replacement characters
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "", text).strip()


def _pixel_bytes(found: Dataset, *, big_endian: bool) -> int:
    """Rows x Columns x SamplesPerPixel x NumberOfFrames x BitsAllocated, in bytes."""
    bits = _count(_text(found, "NumberOfFrames"))
    for keyword, missing in (("Rows", 0), ("Columns", 0), ("SamplesPerPixel", 1), ("BitsAllocated", 16)):
        raw = _raw(found, keyword)[:2]
        bits *= int.from_bytes(raw, "big" if big_endian else "little") if len(raw) == 2 else missing
    return bits // 8


def _numbers(found: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(part) for part in _text(found, keyword).split("\\"))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _count(text: str) -> int:
    return int(text) if re.fullmatch(r"[1-9]\d{0,8}", text) else 1
