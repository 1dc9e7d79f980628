"""Stored values of one frame, whatever the transfer syntax; a broken one is refused with the reason."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.pixels import pixel_array
from pydicom.tag import Tag
from pydicom.uid import (
    HTJ2K,
    UID,
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    RLETransferSyntaxes,
)

from sop.bounded import BoundedFile
from sop.codestream import declared_pixels
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

# What one instance may become; a header that promises more is damaged or hostile.
MAX_BYTES = 8 * 2**30
MAX_DEFLATED_BYTES = 2 * 2**30

RESEND = "send the instance again from the scanner or the PACS"


def load(path: Path, *, pixels: bool) -> Dataset:
    """Read a DICOM file, without its pixel data or with little besides it.

    Raises Refused "unreadable", "too-large".
    """
    try:
        _refuse_if_bomb(path)
        with BoundedFile(path) as file:
            if pixels:
                return dcmread(file, specific_tags=NEEDED)
            header = dcmread(file, stop_before_pixels=True)
    except (MemoryError, Refused):
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

    Unused high bits are cleared (or the sign extended). Raises Refused "truncated", "pixel-format", "undecodable",
    "too-large" before anything is unpacked.
    """
    if "PixelData" not in data:
        raise Refused("no-pixels", f"instance {text(data, 'SOPInstanceUID')} has no Pixel Data", RESEND)
    if bits_allocated not in (8, 16, 32) or integer(data, "SamplesPerPixel", default=1) != 1:
        raise Refused("pixel-format", f"{bits_allocated} bits and {text(data, 'SamplesPerPixel')} samples per pixel "
                      "cannot be quantitative values", "send the original grey-scale series")
    if min(rows, columns, frames) <= 0 or rows * columns * frames * bits_allocated // 8 > MAX_BYTES:
        raise Refused("too-large", f"instance {text(data, 'SOPInstanceUID')} promises {frames} x {rows} x {columns} "
                      "pixels: none, or too many", RESEND)
    syntax = _syntax(data)
    if syntax.is_encapsulated:
        held = tuple(integer(data, keyword, default=1) for keyword in ("NumberOfFrames", "Rows", "Columns"))
        if held != (frames, rows, columns):  # decoders go by these
            raise Refused("malformed", f"instance {text(data, 'SOPInstanceUID')} holds {' x '.join(map(str, held))} "
                          f"pixels, {frames} x {rows} x {columns} are meant", RESEND)
        _refuse_more_than_promised(data, rows * columns, frames)
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


def _refuse_more_than_promised(data: Dataset, pixels: int, frames: int) -> None:
    """Each frame is looked at before a decoder allocates what it asks for."""
    instance = text(data, "SOPInstanceUID")
    try:
        declared = max((declared_pixels(frame) or 0
                        for frame in generate_frames(data.PixelData, number_of_frames=frames)), default=0)
    except MemoryError:
        raise
    except Exception as error:  # as in `load`
        raise Refused("undecodable", f"Pixel Data of instance {instance} cannot be taken apart "
                      f"({type(error).__name__})", RESEND) from error
    if declared > pixels:
        raise Refused("undecodable", f"a frame of instance {instance} declares {declared} pixels, its header {pixels}",
                      RESEND)


def _refuse_if_bomb(path: Path) -> None:
    """A deflated data set is inflated as a whole when it is read: not where that takes too much memory.

    Short ones are not looked at: deflate makes at most 1032 bytes of one (RFC 1951).
    """
    if path.stat().st_size * 1032 <= MAX_DEFLATED_BYTES:
        return
    with path.open("rb") as file:
        if read_preamble(file, force=False) is None:
            return
        meta = _read_file_meta_info(file)
        if text(meta, "TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := inflater.unconsumed_tail or file.read(2**20):
            size += len(inflater.decompress(piece, 2**20))
            if size > MAX_DEFLATED_BYTES:
                raise Refused("too-large", f"the deflated file {path.name} would inflate to more than "
                              f"{MAX_DEFLATED_BYTES // 2**30} GiB", RESEND)


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
