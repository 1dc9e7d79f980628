"""An object as it lies on disk: its digest again, and what its row in the ledger says, read from the file alone.

A file begins with file meta information (PS3.10 section 7.1), then come the bytes of the data set as they were
received. The digest in the ledger is of those bytes.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom import dcmread
from pydicom.dataset import FileDataset

from dicomnode.errors import CannotUnderstand
from dicomnode.objectindex import NATIVE, ObjectIndex, read_index
from sop.bounded import BoundedFile

__all__ = ["Stored", "read_stored", "sha256_of"]

_GROUP_LENGTH = struct.pack("<HH2sH", 0x0002, 0x0000, b"UL", 4)  # PS3.10 Table 7.1-1: always the first element
_META_AT = 132  # preamble and prefix
_META_LIMIT = 2**16  # bytes; ours has some hundred


@dataclass(frozen=True)
class Stored:
    """A whole object. calling_ae: SourceApplicationEntityTitle of the file meta information. bytes: of the file."""

    index: ObjectIndex
    transfer_syntax_uid: str
    calling_ae: str
    sha256: str
    bytes: int


def sha256_of(path: Path) -> str:
    """The digest of the data set in a file. Raises OSError, CannotUnderstand where it has no file meta information."""
    with path.open("rb") as file:
        _to_data_set(file)
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_stored(path: Path) -> Stored:
    """Read an object and see that it is whole. Raises OSError, CannotUnderstand.

    Whole: it can be read to its end, and uncompressed pixels are as many as its header promises. What was changed
    without changing its length cannot be seen without the digest that its row had.
    """
    size = path.stat().st_size
    try:
        with BoundedFile(path) as file:
            whole: FileDataset = dcmread(file)
        syntax = str(whole.file_meta.TransferSyntaxUID)
        calling_ae = str(whole.file_meta.get("SourceApplicationEntityTitle", ""))
        pixels = len(whole.get_item("PixelData").value or b"") if "PixelData" in whole else 0
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the parser raise nearly anything
        raise CannotUnderstand(f"it cannot be read to its end ({type(error).__name__})") from error
    with BoundedFile(path) as file:
        _to_data_set(file)
        index = read_index(file, syntax, whole=True)
    if syntax in NATIVE and pixels < index.pixel_bytes:
        raise CannotUnderstand(f"it is cut short: {pixels} of {index.pixel_bytes} bytes of pixels")
    return Stored(index, syntax, calling_ae, sha256_of(path), size)


def _to_data_set(file: BinaryIO) -> None:
    head = file.read(_META_AT + len(_GROUP_LENGTH) + 4)
    length = int.from_bytes(head[-4:], "little")
    if head[128:_META_AT] != b"DICM" or head[_META_AT:-4] != _GROUP_LENGTH or length > _META_LIMIT:
        raise CannotUnderstand("it does not begin with file meta information")
    file.seek(len(head) + length)
