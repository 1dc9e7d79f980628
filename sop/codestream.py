"""How large an encoded frame says it is, read from its own header: no decoder is asked to make more than was promised.

A decoder allocates what the codestream declares, whatever Rows and Columns say; a few bytes can ask for gigabytes.
JPEG and JPEG-LS: the frame header SOFn (ITU-T T.81 B.2.2, T.87 C.2.2). JPEG 2000 and HTJ2K: the marker SIZ (ITU-T T.800
A.5.1). RLE has no size of its own.
"""

from __future__ import annotations

import struct

__all__ = ["declared_pixels"]

# SOF0 to SOF15 without DHT, JPG and DAC (T.81 Table B.1), and SOF55 of JPEG-LS.
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}
_ALONE = frozenset({0x01, *range(0xD0, 0xDA)})  # markers without a length: TEM, RSTn, SOI, EOI
_SIZ = b"\xff\x4f\xff\x51"
_LOOKED_AT = 2**20  # bytes; headers, tables and comments take less


def declared_pixels(frame: bytes) -> int | None:
    """Pixels times components of one encoded frame; None where it declares nothing that can be read."""
    start = frame.find(_SIZ, 0, 4096)  # behind the boxes of a JP2 file, where there are any
    if start >= 0:
        return _jpeg_2000(frame, start + len(_SIZ))
    if frame[:2] == b"\xff\xd8":
        return _jpeg(frame[:_LOOKED_AT])
    return None


def _jpeg_2000(frame: bytes, at: int) -> int | None:
    try:
        _, _, width, height, left, top, *_, components = struct.unpack_from(">HHIIIIIIIIH", frame, at)
    except struct.error:
        return None
    return max(0, width - left) * max(0, height - top) * components


def _jpeg(frame: bytes) -> int | None:
    at = 2
    while at + 4 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker in _ALONE:
            at += 2
        elif marker in _FRAME_HEADERS:
            if at + 10 > len(frame):
                return None
            _, height, width, components = struct.unpack_from(">BHHB", frame, at + 4)
            return int(height) * int(width) * int(components)
        else:
            at += 2 + int(struct.unpack_from(">H", frame, at + 2)[0])
    return None
