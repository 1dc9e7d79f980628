"""Data elements to bytes in Explicit VR Little Endian (PS3.5 7.1), one by one, and copied ones byte for byte.

pydicom decodes and re-encodes every text when the transfer syntax changes; a name with bytes outside its declared
character set would not survive that. Here an element nobody has touched keeps the bytes it came with.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import cast

from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_VR, private_dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr_element, write_data_element
from pydicom.tag import BaseTag
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32

__all__ = ["PIXEL_DATA", "encoded", "encoded_file_meta", "pixel_data_header"]

PIXEL_DATA = 0x7FE00010

_BYTES_AS_THEY_ARE = frozenset((
    "AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "OB", "PN", "SH", "ST", "TM", "UC", "UI", "UN", "UR", "UT",
))
_TWO_BYTE_NUMBERS = frozenset(("US", "SS", "OW"))


def _element_bytes(tag: int, vr: str, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\0" if vr in ("OB", "UI", "UN") else b" "
    if vr not in EXPLICIT_VR_LENGTH_32 and len(value) > 0xFFFF:
        vr = "UN"  # PS3.5 6.2.2: the short length field cannot hold it
    if vr in EXPLICIT_VR_LENGTH_32:
        return struct.pack("<HH2sHI", tag >> 16, tag & 0xFFFF, vr.encode("ascii"), 0, len(value)) + value
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr.encode("ascii"), len(value)) + value


def _value_representation(raw: RawDataElement, ds: Dataset) -> str:
    if raw.VR is not None and raw.VR != "UN":
        return raw.VR
    tag = BaseTag(raw.tag)
    try:
        if not tag.is_private:
            return dictionary_VR(tag)
        if tag.is_private_creator:
            return "LO"
        creator = ds.get((tag.group, tag.element >> 8))
        return private_dictionary_VR(tag, str(creator.value)) if creator is not None else "UN"
    except KeyError:
        return "UN"


def _sequence_bytes(tag: int, items: Iterable[Dataset], encodings: list[str]) -> bytes:
    body = bytearray()
    for item in items:
        content = b"".join(value for _, value in sorted(encoded(item, encodings).items()))
        body += struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content
    return _element_bytes(tag, "SQ", bytes(body))


def encoded(ds: Dataset, encodings: list[str] | None = None) -> dict[int, bytes]:
    """Tag -> the whole element (tag, VR, length, value) in Explicit VR Little Endian; group lengths left out.

    encodings  Python codecs of the enclosing data set's SpecificCharacterSet, for an item without its own.
    """
    if "SpecificCharacterSet" in ds:
        encodings = convert_encodings(ds.SpecificCharacterSet)
    encodings = encodings or convert_encodings(None)
    elements: dict[int, bytes] = {}
    for tag in sorted(ds.keys()):
        if tag.element == 0:
            continue
        item = ds.get_item(tag)
        if isinstance(item, RawDataElement) and item.is_little_endian and item.value is not None:
            vr = _value_representation(item, ds)
            if vr in _BYTES_AS_THEY_ARE or vr in _TWO_BYTE_NUMBERS or (vr == item.VR and vr != "SQ"):
                elements[int(tag)] = _element_bytes(tag, vr, item.value)
                continue
        elements[int(tag)] = _decoded_element_bytes(ds, tag, encodings)
    return elements


def _decoded_element_bytes(ds: Dataset, tag: BaseTag, encodings: list[str]) -> bytes:
    element = cast(DataElement, ds[tag])
    if element.VR == "SQ":
        return _sequence_bytes(tag, element.value, encodings)
    if " or " in str(element.VR):
        element = cast(DataElement, correct_ambiguous_vr_element(element, ds, True))
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_data_element(buffer, element, encodings)
    return buffer.getvalue()


def encoded_file_meta(meta: Dataset) -> bytes:
    """Preamble, prefix and file meta information with its group length (PS3.10 7.1)."""
    body = b"".join(value for _, value in sorted(encoded(meta).items()))
    return b"\0" * 128 + b"DICM" + _element_bytes(0x00020000, "UL", struct.pack("<I", len(body))) + body


def pixel_data_header(length: int) -> bytes:
    """Tag, VR and length of uncompressed 16-bit PixelData of `length` bytes, which follow."""
    return struct.pack("<HH2sHI", PIXEL_DATA >> 16, PIXEL_DATA & 0xFFFF, b"OW", 0, length)
