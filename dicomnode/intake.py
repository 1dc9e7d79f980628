"""The data set of one C-STORE request on its way in: written to disk as it arrives, so that memory stays flat.

The data set of another request (a query) is short and stays in memory.

pynetdicom hands each fragment to `write`; the file begins with file meta information made from the request
(PS3.10 section 7.1), then come the bytes of the data set as received. Nothing raises here: an error is kept, the rest
of the data set is swallowed, and `C-STORE` answers with its status.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydicom.uid import DeflatedExplicitVRLittleEndian

from dicomnode.errors import CannotUnderstand, DiskFull, NodeError, TooLarge
from dicomnode.objectindex import NATIVE, Incomplete, ObjectIndex, read_index, require_unpackable
from dicomnode.sections import Reception
from dicomnode.spool import Spool, valid_uid
from sop.bounded import BoundedFile
from sop.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME

__all__ = ["Intake", "Limits", "Request", "file_meta"]

_IN_MEMORY = 2 * 2**20  # bytes of a data set that is no object; 10,000 references of a storage commitment request
_HEAD = 64 * 1024  # bytes kept in memory for the index; what needs more is read back from the file


@dataclass(frozen=True)
class Limits:
    """Bytes: the largest object, what must stay free on the disk, and what an object may become unpacked."""

    object_bytes: int
    free_bytes: int
    unpacked_bytes: int = 8 * 2**30

    @classmethod
    def of(cls, reception: Reception) -> Limits:
        return cls(object_bytes=reception.max_object_mb * 2**20, free_bytes=reception.low_disk_mb * 2**20,
                   unpacked_bytes=reception.max_decompressed_mb * 2**20)


@dataclass(frozen=True)
class Request:
    """What the C-STORE request said of the data set."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str


class Intake(io.BytesIO):
    """`request` is called at the first fragment, when the command set is known; None: not a C-STORE request."""

    def __init__(self, spool: Spool, limits: Limits, request: Callable[[], Request | None]) -> None:
        super().__init__()
        self._spool, self._limits, self._ask = spool, limits, request
        self._file = -1
        self._head: list[bytes] = []
        self._head_size = 0
        self._hash = hashlib.sha256()
        self._closed_early = False
        self.path: Path | None = None
        self.request: Request | None = None
        self.error: NodeError | None = None
        self.size = 0  # bytes of the data set
        self.file_size = 0

    def write(self, data: Any) -> int:
        if self.error is None and not self._closed_early:
            try:
                if self.path is None and (self.size or not self._open()):
                    self._remember(data)
                else:
                    self._append(data)
            except NodeError as error:
                self._give_up(error)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                self._give_up(DiskFull("the disk filled up while the object came in. Remedy: free space; the sender "
                                       "may try again.") if full else NodeError(f"cannot write the object: {error}"))
        self.size += len(data)
        return len(data)

    def _open(self) -> bool:
        """False: not an object."""
        self.request = self._ask()
        if self.request is None:
            return False
        for uid in (self.request.sop_class_uid, self.request.sop_instance_uid):
            if not valid_uid(uid):
                raise CannotUnderstand(f"{uid[:80]!r} in the request is not a UID (PS3.5 section 9.1)")
        self._spool.require_free(self._limits.free_bytes)
        self._file, self.path = self._spool.create_incoming()
        meta = file_meta(self.request)
        self.file_size = os.write(self._file, meta)
        return True

    def _remember(self, data: bytes | memoryview) -> None:
        if self.size + len(data) > _IN_MEMORY:
            self.truncate(0)
            raise TooLarge(f"the data set of the request is larger than {_IN_MEMORY // 2**20} MiB")
        super().write(data)

    def _append(self, data: bytes | memoryview) -> None:
        if self.size + len(data) > self._limits.object_bytes:
            raise TooLarge(f"the object is larger than {self._limits.object_bytes // 2**20} MiB. "
                           "Remedy: raise reception.max_object_mb.")
        rest = memoryview(data)
        while rest:
            written = os.write(self._file, rest)
            rest = rest[written:]
        self.file_size += len(data)
        self._hash.update(data)
        if self._head_size < _HEAD:
            self._head.append(bytes(data[:_HEAD - self._head_size]))
            self._head_size += len(self._head[-1])

    def sync(self) -> None:
        """Data on disk, file closed; its name is still the temporary one. Raises NodeError, OSError."""
        if self.error is not None:
            raise self.error
        if self.path is None:
            raise CannotUnderstand("the request came without a data set")
        self._spool.require_free(self._limits.free_bytes)
        os.fdatasync(self._file)
        self._close()

    @property
    def sha256(self) -> str:
        """Of the data set as received, without file meta information."""
        return self._hash.hexdigest()

    def index(self) -> ObjectIndex:
        """Raises CannotUnderstand, TooLarge where it would become too large unpacked."""
        if self.error is not None:
            raise self.error
        if self.request is None or self.path is None:
            raise CannotUnderstand("the request came without a data set")
        syntax = self.request.transfer_syntax_uid
        try:
            found = read_index(io.BytesIO(b"".join(self._head)), syntax, whole=self._head_size == self.size)
        except Incomplete:
            with self._data_set() as file:
                found = read_index(file, syntax, whole=True)
        if syntax not in NATIVE:
            limit = self._limits.unpacked_bytes
            if syntax == DeflatedExplicitVRLittleEndian:  # inflated, it is an object like any other
                limit = min(limit, self._limits.object_bytes)
            with self._data_set() as file:
                require_unpackable(found, syntax, file, size=self.size, limit=limit)
        return found

    def _data_set(self) -> BinaryIO:
        """The file, where the data set begins."""
        assert self.path is not None
        file = BoundedFile(self.path)
        file.seek(self.file_size - self.size)
        return file

    def discard(self) -> None:
        """Forget the object and its file; harmless once the file has been moved to its place."""
        self._closed_early = True
        self._close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self._head.clear()

    def _give_up(self, error: NodeError) -> None:
        self.discard()
        self.error = error

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def file_meta(request: Request) -> bytes:
    """Preamble, prefix and file meta information (PS3.10 section 7.1, Explicit VR Little Endian)."""
    def element(number: int, vr: bytes, value: bytes) -> bytes:
        if len(value) % 2:
            value += b" " if vr in (b"SH", b"AE") else b"\0"
        length = struct.pack("<H", len(value)) if vr != b"OB" else struct.pack("<HI", 0, len(value))
        return struct.pack("<HH", 0x0002, number) + vr + length + value

    body = b"".join((
        element(0x0001, b"OB", b"\0\1"),
        element(0x0002, b"UI", request.sop_class_uid.encode("ascii")),
        element(0x0003, b"UI", request.sop_instance_uid.encode("ascii")),
        element(0x0010, b"UI", request.transfer_syntax_uid.encode("ascii")),
        element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID.encode("ascii")),
        element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME.encode("ascii")),
        element(0x0016, b"AE", request.calling_ae.encode("ascii", errors="replace")),
    ))
    return b"\0" * 128 + b"DICM" + element(0x0000, b"UL", struct.pack("<I", len(body))) + body
