"""Checkpoints: a long run that was killed goes on where it was, and ends in the same bits.

    checkpoints = Checkpoints(folder)                     # one folder per job
    run = checkpoints.of("member-2", (y,), settings)      # one name per run in it
    state = run.load()                                    # None: start afresh; run.ignored says why
    ...
    run.offer(lambda: {"step": step, "gx": gx.state_dict()})  # after every step; writes once `every_s` have passed

A state is nested dicts, lists and tuples of tensors, numpy arrays, numbers, strings, booleans and None; loading runs no
code from the file. A file holds the identity of what it belongs to (source values, settings, device, software) and the
SHA-256 of its content; one that belongs to something else or is damaged is ignored, and the reason is logged.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Checkpoint", "Checkpoints", "FORMAT", "State", "identity"]

FORMAT = 1
SUFFIX = ".checkpoint"
HEADER_BYTES = 512  # JSON, padded with spaces; the content follows
NUMPY = "__numpy__"

State = Mapping[str, Any]

log = logging.getLogger(__name__)


def identity(
    arrays: Sequence[NDArray[Any] | None], settings: Mapping[str, Any], *, device: str | torch.device = "cpu",
    version: str = "",
) -> str:
    """What a run belongs to, as SHA-256 in hex: whoever has the same ends in the same bits.

    arrays    the run's data in a fixed order; None where an optional one is missing.
    settings  plain JSON values (`finish.plain`).
    device    its kind counts, and on a CPU the number of threads: both change the last bits.
    version   of the software that calls; the versions of torch and of the file's format are added.
    """
    digest = sha256()
    kind = torch.device(device).type
    threads = torch.get_num_threads() if kind == "cpu" else 0
    about = {"format": FORMAT, "torch": torch.__version__, "version": version, "device": kind, "threads": threads,
             "settings": settings}
    digest.update(json.dumps(about, sort_keys=True).encode())
    for array in arrays:
        shape = None if array is None else [*array.shape, array.dtype.str]
        digest.update(json.dumps(shape).encode())
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often runs are kept. One process at a time may use the folder.

    folder   made at the first write (mode 0700: it holds patient data).
    every_s  least seconds of `clock` between two writes of one run; 0: at every step.
    keep     newest states of a run that stay on disk.
    version  of the software: a state of another version is not taken.
    """

    folder: Path
    every_s: float = 60.0
    keep: int = 1
    version: str = ""
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if self.every_s < 0 or self.keep < 1:
            raise ValueError(f"every_s must not be negative and keep be at least 1, got {self.every_s} and {self.keep}")

    def of(
        self, name: str, arrays: Sequence[NDArray[Any] | None], settings: Mapping[str, Any], *,
        device: str | torch.device = "cpu",
    ) -> Checkpoint:
        """The checkpoint of the run called `name`; arrays, settings, device: see `identity`.

        Raises ValueError for a name that is not letters, digits, "_" and "-".
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"a run's name is letters, digits, '_' and '-', got {name!r}")
        return Checkpoint(self, name, identity(arrays, settings, device=device, version=self.version))

    def clear(self) -> None:
        """Remove the states of all runs, and the folder if nothing else lies in it: the job is done."""
        for path in [*self.folder.glob(f"*{SUFFIX}"), *self.folder.glob(".*.tmp")]:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


@dataclass
class Checkpoint:
    """The kept states of one run. `ignored`: why states that lie there were not taken."""

    checkpoints: Checkpoints
    name: str
    belongs_to: str
    ignored: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._written_at = self.checkpoints.clock()

    def load(self) -> dict[str, Any] | None:
        """The newest whole state of this run, tensors on the CPU; None where there is none."""
        for path in reversed(self._files()):
            try:
                return _read(path, self.belongs_to)
            except (_Unfit, OSError) as error:
                self.ignored.append(f"{path.name}: {error}")
                log.warning("checkpoint %s is not used: %s", path, error)
        return None

    def offer(self, state: Callable[[], State | None]) -> bool:
        """Write what `state()` returns if it is time; whether it was written. None from `state()`: not now.

        A folder that cannot be written (disk full) does not end the run: it is logged and tried again later.
        """
        if self.checkpoints.clock() - self._written_at < self.checkpoints.every_s:
            return False
        found = state()
        if found is None:
            return False
        try:
            self._write(found)
        except OSError as error:
            log.warning("no checkpoint of %s can be written to %s: %s", self.name, self.checkpoints.folder, error)
            return False
        finally:
            self._written_at = self.checkpoints.clock()
        return True

    def remove(self) -> None:
        """Forget the run's states."""
        for path in [*self._files(), self._aside]:
            path.unlink(missing_ok=True)

    @property
    def _aside(self) -> Path:
        return self.checkpoints.folder / f".{self.name}.tmp"

    def _files(self) -> list[Path]:
        """Oldest first."""
        numbered = {}
        for path in self.checkpoints.folder.glob(f"{self.name}.*{SUFFIX}"):
            number = path.name.removeprefix(f"{self.name}.").removesuffix(SUFFIX)
            if number.isdecimal():
                numbered[int(number)] = path
        return [numbered[number] for number in sorted(numbered)]

    def _write(self, state: State) -> None:
        folder = self.checkpoints.folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = self._files()
        number = int(there[-1].name.split(".")[-2]) + 1 if there else 1
        try:
            with self._aside.open("w+b") as handle:
                _put(handle, state, self.belongs_to)
            os.replace(self._aside, folder / f"{self.name}.{number:08d}{SUFFIX}")
        finally:
            self._aside.unlink(missing_ok=True)
        _fsync(folder)
        for old in self._files()[: -self.checkpoints.keep]:
            old.unlink(missing_ok=True)


class _Unfit(Exception):
    """A checkpoint that cannot be taken, and why."""


def _put(handle: BinaryIO, state: State, belongs_to: str) -> None:
    handle.write(b" " * HEADER_BYTES)
    torch.save(_packed(dict(state)), handle)
    header = {"format": FORMAT, "belongs_to": belongs_to, "sha256": _content_digest(handle)}
    handle.seek(0)
    handle.write(json.dumps(header).encode().ljust(HEADER_BYTES))
    handle.flush()
    os.fsync(handle.fileno())


def _read(path: Path, belongs_to: str) -> dict[str, Any]:
    with path.open("rb") as handle:
        try:
            header = json.loads(handle.read(HEADER_BYTES))
            form, owner, digest = (str(header[key]) for key in ("format", "belongs_to", "sha256"))
        except (ValueError, KeyError, TypeError) as error:
            raise _Unfit("it is damaged (its first bytes)") from error
        if form != str(FORMAT):
            raise _Unfit(f"it has format {form}, not {FORMAT}")
        if owner != belongs_to:
            raise _Unfit("it belongs to another source, other settings, another device or another software version")
        if digest != _content_digest(handle):
            raise _Unfit("it is damaged (its content has another SHA-256)")
        handle.seek(HEADER_BYTES)
        return dict(_unpacked(torch.load(handle, map_location="cpu", weights_only=True)))


def _content_digest(handle: BinaryIO) -> str:
    handle.seek(HEADER_BYTES)
    digest = sha256()
    while block := handle.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _packed(value: Any) -> Any:
    """numpy arrays as marked tensors: the reader takes nothing that could run code."""
    if isinstance(value, np.ndarray):
        return {NUMPY: torch.from_numpy(np.array(value))}
    if isinstance(value, Mapping):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_packed(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, torch.Tensor | str | int | float):
        return value
    raise TypeError(f"a checkpoint holds tensors, arrays and plain values, got {type(value).__name__}")


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {NUMPY}:
            return value[NUMPY].numpy()
        return {key: _unpacked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_unpacked(item) for item in value)
    return value


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
