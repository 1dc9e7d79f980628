"""dciodvfy finds no error in a derived series that the source does not have; dcentvfy finds the study consistent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.dciodvfy import entity_errors, iod_errors
from tests.factories import OBLIQUE, ct_series, enhanced_pet
from tests.sop.derived_series import derive, save, source_series, values_of


@pytest.mark.parametrize("options", [
    {}, {"orientation": OBLIQUE}, {"vendor": "PHILIPS", "units": "CNTS"}, {"vendor": "SIEMENS"}, {"units": "GML"},
    {"SpacingBetweenSlices": "3.27"}, {"ImageComments": "café", "SpecificCharacterSet": "ISO_IR 192"},
])
def test_a_derived_series_has_no_error_of_its_own(options: dict, tmp_path: Path) -> None:
    """Slice by slice, first, middle and last."""
    source = save(source_series(**options), tmp_path / "source")
    known = {error for path in source for error in iod_errors(path)}
    files = derive(source, tmp_path / "derived", institution="Hospital", station="NODE1")[0].files
    for path in (files[0], files[11], files[-1]):
        assert iod_errors(path) <= known


def test_a_series_from_an_enhanced_source_is_as_sound_as_one_from_a_classic_source(tmp_path: Path) -> None:
    """What an enhanced image says in functional groups, the classic one says where its own modules want it."""
    classic = source_series()
    values = np.stack([values_of(ds) for ds in classic])
    enhanced = enhanced_pet(slices=12, rows=30, columns=26, spacing=(3.27, 4.6875, 4.0), values=values)
    known = {error for path in save(classic, tmp_path / "classic") for error in iod_errors(path)}
    files = derive(save([enhanced], tmp_path / "enhanced"), tmp_path / "derived")[0].files
    for path in (files[0], files[11], files[-1]):
        assert iod_errors(path) <= known


def test_the_study_stays_consistent(tmp_path: Path) -> None:
    """PET, CT and derived PET together."""
    source = save(source_series(), tmp_path / "source")
    ct = save(ct_series(), tmp_path / "ct")
    files = derive(source, tmp_path / "derived")[0].files
    known = entity_errors([*source, *ct], tmp_path)
    assert entity_errors([*source, *ct, *files], tmp_path) <= known


@pytest.mark.parametrize("name", ["ge_sts001_pet_raw", "philips_suvval_pt", "ge_sts001_ibsi/PET", "ge_sts035_ibsi/PET"])
def test_a_series_derived_from_a_real_one_has_no_error_of_its_own(
    name: str, shared_data: Path, tmp_path: Path,
) -> None:
    """GE whole body, Philips counts, SUV crops."""
    source = sorted((shared_data / name).iterdir())
    files = derive(source, tmp_path / "derived")[0].files
    # Each attribute of the header comes from one of these source slices.
    known = {error for path in source[::10] for error in iod_errors(path)}
    for path in files[::len(files) // 5]:
        assert iod_errors(path) <= known
    assert entity_errors(files, tmp_path) <= entity_errors(source, tmp_path)
