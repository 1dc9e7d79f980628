"""Stored values of one frame, whatever the transfer syntax; a broken one is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.pixels import pixel_array
from pydicom.tag import Tag
from pydicom.uid import (
    HTJ2K,
    UID,
    AllTransferSyntaxes,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    RLETransferSyntaxes,
)

from sop.errors import Refused
from sop.header import integer, raw_elements, text
from sop.isolated import IsolatedDecoder

__all__ = ["frames_of", "load"]

# All a decoder needs, so that the second reading of a file skips the rest.
NEEDED = ["SOPInstanceUID", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames",
          "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData",
          "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]

# Everything else is JPEG, which only GDCM reads in full; a damaged stream makes GDCM end its process, so it has one of
# its own.
DECODERS = {
    **dict.fromkeys(JPEGLSTransferSyntaxes, "pyjpegls"),
    **dict.fromkeys(JPEG2000TransferSyntaxes, "pylibjpeg"),
    **dict.fromkeys([HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL], "pylibjpeg"),
    **dict.fromkeys(RLETransferSyntaxes, "pylibjpeg"),
}

RESEND = "send the instance again from the scanner or the PACS"


def load(path: Path, *, pixels: bool) -> Dataset:
    """Read a DICOM file, without its pixel data or with little besides it.

    Raises Refused "unreadable".
    """
    try:
        if pixels:
            return dcmread(path, specific_tags=NEEDED)
        header = dcmread(path, stop_before_pixels=True)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise Refused("unreadable", f"file {path.name} is not there", "check the folder") from error
    except InvalidDicomError as error:
        raise Refused("unreadable", f"file {path.name} is not a DICOM file", "leave it out") from error
    except Exception as error:  # a damaged file makes the parser raise nearly anything
        reason = f"file {path.name} cannot be read as DICOM ({type(error).__name__})"
        raise Refused("unreadable", reason, RESEND) from error
    return header


def frames_of(
    data: Dataset, *, bits_allocated: int, rows: int, columns: int, frames: int, isolated: IsolatedDecoder
) -> NDArray:
    """Stored values (frames, rows, columns), native or decoded.

    isolated   decodes the JPEG processes.

    Unused high bits are cleared (or the sign extended). Raises Refused "truncated", "pixel-format", "undecodable".
    """
    if "PixelData" not in data:
        raise Refused("no-pixels", f"instance {text(data, 'SOPInstanceUID')} has no Pixel Data", RESEND)
    if bits_allocated not in (8, 16, 32) or integer(data, "SamplesPerPixel", default=1) != 1:
        raise Refused("pixel-format", f"{bits_allocated} bits and {text(data, 'SamplesPerPixel')} samples per pixel "
                      "cannot be quantitative values", "send the original grey-scale series")
    syntax = _syntax(data)
    if syntax.is_encapsulated:
        stored = _decoded(data, syntax, isolated)
    else:
        stored = _native(data, syntax, bits_allocated, rows * columns * frames)
    if stored.size != frames * rows * columns:
        raise Refused("truncated", f"instance {text(data, 'SOPInstanceUID')} holds {stored.size} pixels, its header "
                      f"promises {frames} x {rows} x {columns}", RESEND)
    return stored.reshape(frames, rows, columns)


def _syntax(data: Dataset) -> UID:
    meta = getattr(data, "file_meta", None)
    uid = text(meta, "TransferSyntaxUID") if meta is not None else ""
    if uid and UID(uid) not in AllTransferSyntaxes:
        raise Refused("pixel-format", "the transfer syntax is none that DICOM defines", RESEND)
    if uid:
        return UID(uid)
    little = data.original_encoding[1]
    return UID("1.2.840.10008.1.2.2") if little is False else UID("1.2.840.10008.1.2.1")


def _native(data: Dataset, syntax: UID, bits_allocated: int, count: int) -> NDArray:
    raw = raw_elements(data)[Tag("PixelData")].value
    need = count * bits_allocated // 8
    if raw is None or len(raw) < need:
        raise Refused("truncated", f"Pixel Data of instance {text(data, 'SOPInstanceUID')} ends after "
                      f"{len(raw or b'')} of {need} bytes", RESEND)
    signed = integer(data, "PixelRepresentation") == 1
    order = ">" if not syntax.is_little_endian else "<"
    stored = np.frombuffer(raw, dtype=f"{order}{'i' if signed else 'u'}{bits_allocated // 8}", count=count)
    used, high = integer(data, "BitsStored"), integer(data, "HighBit")
    if used == bits_allocated:
        return stored
    if not 0 < used <= high + 1 <= bits_allocated:
        reason = f"BitsStored {used} and HighBit {high} do not fit in {bits_allocated} bits"
        raise Refused("pixel-format", reason, RESEND)
    # Moving the value to the top drops overlay bits above it; moving it back extends the sign.
    return (stored << (bits_allocated - 1 - high)) >> (bits_allocated - used)


def _decoded(data: Dataset, syntax: UID, isolated: IsolatedDecoder) -> NDArray:
    try:
        if syntax in DECODERS:
            return np.asarray(pixel_array(data, decoding_plugin=DECODERS[syntax]))
        return isolated.decode(data)
    except (MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # each plugin has exceptions of its own; a panic of the RLE one is no Exception
        reason = f"Pixel Data of instance {text(data, 'SOPInstanceUID')} ({syntax.name}) cannot be decoded"
        raise Refused("undecodable", f"{reason} ({type(error).__name__})", RESEND) from error
