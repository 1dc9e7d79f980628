"""Decoding in a process of its own, for the one decoder that ends its process over a damaged stream.

Only GDCM reads the JPEG processes (lossless, 12 bit) that archives use most, and its C++ exceptions cannot be caught
from Python. The child is started at the first such instance, asked once per instance, and ends with its input.

Messages both ways: length (8 bytes, little endian), then that many bytes. To the child a DICOM file; from the child an
array in NumPy's format, or nothing at all where it could not be decoded.
"""

from __future__ import annotations

import os
import selectors
import struct
import subprocess
import sys
import time
from io import BytesIO
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels import pixel_array

__all__ = ["ChildFailed", "IsolatedDecoder"]

LENGTH = struct.Struct("<q")


class ChildFailed(RuntimeError):
    """The child could not decode the instance: it said so, died, or took too long."""


class IsolatedDecoder:
    """Decodes data sets with GDCM in a child process; a context manager. Not for use by several threads."""

    def __init__(self, *, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> IsolatedDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def decode(self, data: Dataset) -> NDArray:
        """Stored values of all frames. Raises ChildFailed; the next call starts a new child."""
        request = BytesIO()
        data.save_as(request, enforce_file_format=False)
        try:
            child = self._start()
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(LENGTH.pack(request.tell()) + request.getvalue())
            child.stdin.flush()
            deadline = time.monotonic() + self._timeout_s
            (size,) = LENGTH.unpack(self._receive(child.stdout, LENGTH.size, deadline))
            answer = self._receive(child.stdout, size, deadline)
        except (OSError, ChildFailed) as error:
            self._end()
            raise ChildFailed(str(error) or type(error).__name__) from error
        if not answer:
            raise ChildFailed("the decoder refused the stream")
        return np.load(BytesIO(answer), allow_pickle=False)

    def _start(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "sop.isolated"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()

    @staticmethod
    def _receive(stream: IO[bytes], size: int, deadline: float) -> bytes:
        parts = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while len(parts) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise ChildFailed("the decoder took too long")
                part = os.read(stream.fileno(), min(size - len(parts), 1 << 20))
                if not part:
                    raise ChildFailed("the decoder died")
                parts += part
        return bytes(parts)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The child's loop, until its input ends."""
    while head := requests.read(LENGTH.size):
        (size,) = LENGTH.unpack(head)
        request = BytesIO(requests.read(size))
        answer = BytesIO()
        try:
            decoded = pixel_array(dcmread(request, force=True), decoding_plugin="gdcm")
            np.save(answer, np.asarray(decoded), allow_pickle=False)
        except Exception:  # whatever it was, the parent hears that there is no array
            answer = BytesIO()
        answers.write(LENGTH.pack(len(answer.getvalue())) + answer.getvalue())
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
