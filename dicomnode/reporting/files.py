"""Reports on disk: written aside and renamed, for their owner alone, and never over something else."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dicomnode.errors import ConfigError, RefusedInput
from dicomnode.reporting.blocks import StudyReport

__all__ = ["FORMATS", "file_name", "formats_of", "targets", "write"]

FORMATS = ("html", "pdf")
LARGEST = 2**26  # bytes: what is larger was never a report


def file_name(report: StudyReport, suffix: str) -> str:
    """By accession number where there is one, else by UID; letters that a file system may not take are replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", report.accession_number)[:64].strip("._-") or report.study
    return f"dicomnode-report-{name}.{suffix}"


def formats_of(wanted: str | None, out: Path) -> tuple[str, ...]:
    """Which formats are asked for: named, or by the suffix of a file, or both. Raises ConfigError."""
    suffix = out.suffix.lower().removeprefix(".") if not out.is_dir() else ""
    if wanted is None:
        return (suffix,) if suffix in FORMATS else FORMATS
    named = tuple(dict.fromkeys(part.strip().lower() for part in wanted.split(",") if part.strip()))
    if not named or set(named) - set(FORMATS):
        raise ConfigError(f"--format takes {', '.join(FORMATS)} or both with a comma, got {wanted!r}")
    if suffix in FORMATS and named != (suffix,):
        raise ConfigError(f"--out {out} is one {suffix} file, --format asks for {' and '.join(named)}. "
                          "Remedy: name a folder")
    return named


def targets(report: StudyReport, out: Path, formats: tuple[str, ...]) -> dict[str, Path]:
    """format -> the file to be written: `out` itself where it is named like one, else in that folder."""
    if not out.is_dir() and out.suffix.lower().removeprefix(".") in FORMATS:
        return {formats[0]: out}
    return {suffix: out / file_name(report, suffix) for suffix in formats}


def write(report: StudyReport, contents: Mapping[Path, bytes], *, force: bool = False) -> None:
    """Write every file, each whole or not at all, mode 0600: patient data.

    A report of the same study is replaced; anything else only by `force`. Raises RefusedInput before anything is
    written, OSError.
    """
    for path in contents:
        if not force:
            _require_ours(path, report.study)
    for path, content in contents.items():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, content)


def _require_ours(path: Path, study: str) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_file() or path.is_symlink():
        raise RefusedInput(f"{path} is there and is no plain file. Remedy: name another file with --out")
    there = path.read_bytes() if path.stat().st_size <= LARGEST else b""
    marks = (f'<meta name="dicomnode-study" content="{study}">'.encode(), f"(study {study})".encode())
    if not any(mark in there for mark in marks):
        raise RefusedInput(f"{path} is there and is not a report of study {study}. Remedy: name another file with "
                           "--out, or replace it with --force")


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".dicomnode-report-", suffix=".part")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
