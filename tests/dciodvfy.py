"""What dciodvfy and dcentvfy (dicom3tools) say of files, without what is theirs and not the files'."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

__all__ = ["entity_errors", "iod_errors"]

# "Missing attribute Type 2C <Laterality>" unless BodyPartExamined names an unpaired part; "AccessionNumber (Series
# versus Study)" as soon as an SR is in the study.
_THEIRS = re.compile(r"<Laterality>|PatientPosition|AccessionNumber \(Series versus Study\)")


def _errors(tool: str, *arguments: str, keep: bool = False) -> set[str]:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (Debian package dicom3tools)")
    command = [tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return {line for line in lines if "Error" in line and (keep or not _THEIRS.search(line))}


def iod_errors(path: Path, *, all_of_them: bool = False) -> set[str]:
    """Errors of one instance; warnings do not count. all_of_them: also what is the tool's own, for files that name an
    unpaired BodyPartExamined."""
    return _errors("dciodvfy", str(path), keep=all_of_them)


def entity_errors(paths: Iterable[Path], folder: Path) -> set[str]:
    """Contradictions between instances of a study; `folder` is for the list of files."""
    listing = folder / "files.txt"
    listing.write_text("".join(f"{path}\n" for path in paths))
    return _errors("dcentvfy", "-f", str(listing))
