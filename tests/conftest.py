"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of public PET/CT/NM DICOM beside the checkout; its PROVENANCE.md names sources and licences."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real DICOM data not present: no folder {SHARED_DATA.name!r} in ../shared beside the checkout")
    return SHARED_DATA
