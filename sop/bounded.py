"""Files whose lengths lie: an element that claims 4 GB makes nobody allocate 4 GB to find that the file has ended."""

from __future__ import annotations

import io
import os
from pathlib import Path

__all__ = ["BoundedFile"]

_UNCHECKED = 2**16  # bytes; shorter reads are not worth a look at the file's end


class BoundedFile(io.BufferedReader):
    """A file open for reading that is never asked for more than it holds. Raises OSError."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _UNCHECKED:
            size = min(size, max(0, self._size - self.tell()))
        return super().read(size)
