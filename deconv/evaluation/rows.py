"""What is kept: one line of JSON for every run, its arrays beside it, so that an interrupted benchmark goes on.

A run is known by a key over all that determines its result: the case and the bits measured, the method with its full
settings, the device, the code that computes it, and torch's version. Code is read without comments and docstrings, and
only what the method imports, with its weights: a sentence mended in another method throws away no night's work.
Figures are not part of the key: where the rulers have changed, runs are measured anew from their arrays.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arrays", "Row", "Store", "code_digest", "key_of"]

_PACKAGE = Path(__file__).resolve().parents[1]
#: where reading begins for presets that share a door, so that one does not answer for another
_ROOTS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("nbd", "paper"): ("deconv.blind", "deconv.stages", "deconv.finish", "deconv.texture"),
    ("nbd", "preview"): ("deconv.preview",),
    ("nbd", "best"): ("deconv.best",),
}
#: the phantom's bits are in the key, and figures are measured anew
_NOT_READ = {"deconv.phantoms", "deconv.metrics"}
#: module -> folder of the data that decide what it does
_DATA: Mapping[str, str] = {"deconv.psfnet": "weights", "deconv.quality.brisque": "quality/brisque_model"}
_RULERS = ("deconv.evaluation.measures",)


@dataclass(frozen=True)
class Row:
    """One run of one method on one case, as it is kept. Times in seconds, memory in MB (10^6 bytes).

    method    what is shown; variant  the label in `methods.VARIANTS`, which says nothing of a shortened schedule.
    settings  every setting of the method, plain.         own      what the method measured of itself.
    figures   what `measures.figures` found.              rulers   digest of the code that found it.
    peak_mb   by how much the process's resident memory rose above what it held before; peak_how says how it was read.
    failed    why there is no result; "" where there is one.
    """

    key: str
    case: Mapping[str, Any]
    case_label: str
    method: str
    variant: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_mb: float = 0.0
    peak_how: str = ""
    own: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    rulers: str = ""
    failed: str = ""


@dataclass(frozen=True, eq=False)
class Arrays:
    """The arrays of a run: image and uncertainty (2D, 2H, 2W), kernel (d, h, w); None where the method has none."""

    image: NDArray[np.float32]
    kernel: NDArray[np.float32] | None = None
    uncertainty: NDArray[np.float32] | None = None


class Store:
    """A folder with rows.jsonl and arrays/<key>.npz. Appending a line is one write: several processes may share it.

    Raises ValueError for a line that is no row. What a killed process left of its last line is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "rows.jsonl"
        (folder / "arrays").mkdir(parents=True, exist_ok=True)
        self._cut_broken_end()
        self._rows = {row.key: row for row in _read(self.path)}

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> Row | None:
        """The latest row of that key."""
        return self._rows.get(key)

    def arrays(self, key: str) -> Arrays | None:
        """The arrays of that key; None where they are not here (rows that came without them)."""
        path = self._array_path(key)
        if not path.is_file():
            return None
        with np.load(path) as found:
            return Arrays(found["image"], found.get("kernel"), found.get("uncertainty"))

    def add(self, row: Row, arrays: Arrays | None = None) -> None:
        """Keep a row for good, its arrays first, so that no row promises arrays that were never written."""
        if arrays is not None:
            path = self._array_path(row.key)
            aside = path.with_suffix(f".{os.getpid()}.part")
            with aside.open("wb") as file:
                np.savez(file, **{name: value for name, value in vars(arrays).items() if value is not None})
            aside.replace(path)
        line = json.dumps(asdict(row), ensure_ascii=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._rows[row.key] = row

    def merge(self, other: Path) -> int:
        """Take over the rows, with their arrays, of another folder that are not here; how many there were."""
        source = Store(other)
        new = [row for key, row in source._rows.items() if key not in self._rows]
        for row in new:
            self.add(row, source.arrays(row.key))
        return len(new)

    def remeasured(self, row: Row, figures: Mapping[str, Any], rulers: str) -> Row:
        """The row with new figures, kept."""
        row = replace(row, figures=figures, rulers=rulers)
        self.add(row)
        return row

    def _array_path(self, key: str) -> Path:
        return self.folder / "arrays" / f"{key}.npz"

    def _cut_broken_end(self) -> None:
        if self.path.is_file() and (text := self.path.read_bytes()) and not text.endswith(b"\n"):
            os.truncate(self.path, text.rfind(b"\n") + 1)


def key_of(
    case: Mapping[str, Any], measured: NDArray[np.float32], method: str, preset: str, settings: Mapping[str, Any],
    device: str,
) -> str:
    """The key of a run (hex, 32 digits); see the module. `settings` hold the seed, the full schedule and all else."""
    import torch

    text = json.dumps([case, method, preset, settings, device, code_digest(method, preset), torch.__version__],
                      sort_keys=True, default=str)
    return hashlib.sha256(text.encode() + np.ascontiguousarray(measured).tobytes()).hexdigest()[:32]


@cache
def code_digest(method: str, preset: str) -> str:
    """Digest of the code that computes `preset` of `method`: its modules and all of deconv that they import."""
    import deconv

    return _digest_of(_ROOTS.get((method, preset), (deconv.METHODS[method].partition(":")[0],)), _NOT_READ)


@cache
def rulers_digest() -> str:
    """Digest of the code that measures a result."""
    return _digest_of(_RULERS, set())


def _digest_of(roots: Sequence[str], not_read: set[str]) -> str:
    seen: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        path = _file_of(module)
        if module in seen or module in not_read or path is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += _imported(tree)
        said = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode())
        for data in sorted((_PACKAGE / _DATA[module]).glob("*")) if module in _DATA else []:
            said.update(data.name.encode() + data.read_bytes())
        seen[module] = said.hexdigest()
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]


def _file_of(module: str) -> Path | None:
    """The file of a module of this package; None for a name in a module, another package, or the package's own door."""
    parts = module.split(".")
    if parts[0] != _PACKAGE.name or len(parts) == 1:
        return None
    path = _PACKAGE.joinpath(*parts[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return tree


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    known = {entry.name for entry in fields(Row)}
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = json.loads(line)
            rows.append(Row(**{name: value for name, value in entry.items() if name in known}))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no row of a benchmark: {error}. Remedy: remove it, or start "
                             f"afresh in another folder") from error
    return rows
