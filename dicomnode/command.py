"""The command set of C-STORE-RSP, encoded directly (PS3.7 section 9.3.1.2, Implicit VR Little Endian).

pynetdicom builds it through data sets; at reception that was the larger half of the processor time for an instance.
"""

from __future__ import annotations

import struct

__all__ = ["store_response"]


def store_response(*, sop_class_uid: str, sop_instance_uid: str, message_id: int, status: int,
                   comment: str = "") -> bytes:
    """`comment` is ErrorComment (0000,0902), VR LO: cut to 64 characters, left out where empty."""
    elements = [
        (0x0002, _padded(sop_class_uid, b"\0")),
        (0x0100, struct.pack("<H", 0x8001)),  # CommandField
        (0x0120, struct.pack("<H", message_id)),
        (0x0800, struct.pack("<H", 0x0101)),  # CommandDataSetType: no data set
        (0x0900, struct.pack("<H", status)),
    ]
    if comment:
        elements.append((0x0902, _padded(comment[:64], b" ")))
    elements.append((0x1000, _padded(sop_instance_uid, b"\0")))
    body = b"".join(struct.pack("<HHI", 0x0000, number, len(value)) + value for number, value in elements)
    return struct.pack("<HHII", 0x0000, 0x0000, 4, len(body)) + body


def _padded(text: str, pad: bytes) -> bytes:
    value = text.encode("ascii", errors="replace")
    return value + pad if len(value) % 2 else value
