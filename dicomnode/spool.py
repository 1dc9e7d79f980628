"""Objects on disk: written aside, fsynced, renamed, folder fsynced. Only then may anyone hear that they are safe.

    data_dir/ledger.sqlite3      the ledger
    data_dir/incoming/           being written; whatever lies there at start was never acknowledged
    data_dir/objects/STUDY/SERIES/SOP.dcm       as received: file meta information, then the data set byte for byte
    data_dir/conflicts/SOP.SHA256.dcm           other bytes under a known SOP Instance UID
    data_dir/damaged/            what `dicomnode repair` put aside: not what was received, or of no known job
    data_dir/derived/JOB/        derived series, whole and checked
    data_dir/work/               unfinished work of running jobs
    data_dir/checkpoints/JOB/    from where a long method goes on after a crash
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from dicomnode.errors import CannotUnderstand, DiskFull

__all__ = ["Spool", "fsync_dir", "valid_uid"]

_FOLDERS_REMEMBERED = 10_000
_UID = re.compile(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*")


def valid_uid(uid: str) -> bool:
    """PS3.5 section 9.1: at most 64 characters, components of digits without leading zeros. Safe as a file name.

    >>> valid_uid("1.2.840.10008.1.2"), valid_uid("1..2"), valid_uid("../etc"), valid_uid("1.02")
    (True, False, False, False)
    """
    return len(uid) <= 64 and _UID.fullmatch(uid) is not None


def fsync_dir(folder: Path) -> None:
    """Make renames into `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Spool:
    """The data directory. Creates its folders (mode 0700: patient data)."""

    FOLDERS = ("incoming", "objects", "conflicts", "derived", "work", "checkpoints")

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = Path(data_dir)
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # the ledger in it tells who was examined, too
        for name in self.FOLDERS:
            (self.data_dir / name).mkdir(mode=0o700, exist_ok=True)
        fsync_dir(self.data_dir)
        self._known_folders: set[Path] = set()

    @property
    def incoming(self) -> Path:
        return self.data_dir / "incoming"

    @property
    def ledger_path(self) -> Path:
        return self.data_dir / "ledger.sqlite3"

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.data_dir).free

    def require_free(self, needed: int) -> None:
        """Raises DiskFull where fewer than `needed` bytes are free."""
        free = self.free_bytes()
        if free < needed:
            raise DiskFull(f"{free // 2**20} MiB free in the data directory, the watermark is {needed // 2**20} MiB. "
                           "Remedy: free space or lower reception.low_disk_mb; the sender may try again.")

    def object_path(self, study_uid: str, series_uid: str, sop_instance_uid: str) -> Path:
        """Where that instance lives. Raises CannotUnderstand for what is not a UID."""
        for uid in (study_uid, series_uid, sop_instance_uid):
            if not valid_uid(uid):
                raise CannotUnderstand(f"{uid[:80]!r} is not a UID (PS3.5 section 9.1)")
        return self.data_dir / "objects" / study_uid / series_uid / f"{sop_instance_uid}.dcm"

    def conflict_path(self, sop_instance_uid: str, sha256: str) -> Path:
        return self.data_dir / "conflicts" / f"{sop_instance_uid}.{sha256[:16]}.dcm"

    def relative(self, path: Path) -> str:
        """The form in which the ledger keeps paths."""
        return str(path.relative_to(self.data_dir))

    def absolute(self, relative: str) -> Path:
        return self.data_dir / relative

    def create_incoming(self) -> tuple[int, Path]:
        """A new empty file in incoming/, open for writing: its descriptor and path."""
        handle, name = tempfile.mkstemp(dir=self.incoming, suffix=".part")
        return handle, Path(name)

    def publish(self, written: Path, target: Path) -> None:
        """Move a closed, fsynced file to its place and make the move durable."""
        self.place(written, target)
        fsync_dir(target.parent)

    def place(self, written: Path, target: Path) -> None:
        """Move a closed, fsynced file to its place; durable once the caller has called fsync_dir(target.parent).

        For many files at once: a folder then needs one fsync for all of them.
        """
        self._make_folder(target.parent)
        try:
            os.replace(written, target)
        except FileNotFoundError:  # housekeeping removed the emptied folder since it was last used
            self._known_folders.discard(target.parent)
            self._make_folder(target.parent)
            os.replace(written, target)

    def _make_folder(self, folder: Path) -> None:
        """Create `folder` durably: each folder from the data directory down to it is fsynced once per process.

        Also those found existing: a process that was killed may have made them and not come to the fsync.
        """
        if folder in self._known_folders:
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in folder.relative_to(self.data_dir).parents:
            fsync_dir(self.data_dir / path)
        if len(self._known_folders) >= _FOLDERS_REMEMBERED:
            self._known_folders.clear()
        self._known_folders.add(folder)

    def sweep_incoming(self) -> int:
        """Remove what an earlier process left half-written (never acknowledged); how many files."""
        left = [path for path in self.incoming.iterdir() if path.is_file()]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)
