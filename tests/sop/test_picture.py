"""QC pictures as Secondary Capture: the very same pixels, nothing of the patient burned in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sop.derivation import is_own_output
from sop.picture import picture_objects
from tests.dciodvfy import entity_errors, iod_errors
from tests.sop.companion_origin import origin, read
from tests.sop.derived_series import NOW

RNG = np.random.default_rng(3)
PICTURES = [("MIPs before and after", RNG.integers(0, 256, (33, 47, 3), dtype=np.uint8)),
            ("Kernel", RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8))]


def test_the_pixels_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    """RGB, odd sizes too; one series, numbered in order, each with its title."""
    made = origin(tmp_path)
    found = [read(content) for content in picture_objects(PICTURES, made, made.series("pictures"))]
    for number, (ds, (title, rgb)) in enumerate(zip(found, PICTURES, strict=True), start=1):
        assert np.array_equal(ds.pixel_array, rgb)
        assert (int(ds.InstanceNumber), ds.DerivationDescription) == (number, title)
    assert len({ds.SeriesInstanceUID for ds in found}) == 1 and len({ds.SOPInstanceUID for ds in found}) == 2


def test_they_say_what_they_are(tmp_path: Path) -> None:
    """Derived on a workstation, no burned-in names, ours, for research; the time of processing."""
    made = origin(tmp_path)
    ds = read(picture_objects(PICTURES, made, made.series("pictures"))[0])
    assert (ds.ConversionType, ds.BurnedInAnnotation, list(ds.ImageType)) == ("WSD", "NO", ["DERIVED", "SECONDARY"])
    assert (ds.Modality, ds.SeriesDescription) == ("OT", "NBD pictures")
    assert ds.ImageComments == "Research use, not for diagnosis" and is_own_output(ds)
    assert ds.DateOfSecondaryCapture == NOW.strftime("%Y%m%d")
    assert {item.SeriesInstanceUID for item in ds.ReferencedSeriesSequence} == {
        made.source.series, made.derived.series_instance_uid}


def test_the_standard_finds_no_fault(tmp_path: Path) -> None:
    """dciodvfy and dcentvfy: no error."""
    made = origin(tmp_path)
    paths = []
    for number, content in enumerate(picture_objects(PICTURES, made, made.series("pictures"))):
        paths.append(tmp_path / f"{number}.dcm")
        paths[-1].write_bytes(content)
    assert not [error for path in paths for error in iod_errors(path)]
    assert not entity_errors([*paths, *made.derived.files], tmp_path)


def test_a_site_may_leave_the_research_statement_out(tmp_path: Path) -> None:
    """[derived] research_use = false."""
    made = origin(tmp_path, research_use=False)
    assert "ImageComments" not in read(picture_objects(PICTURES, made, made.series("pictures"))[0])


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    """Other than 8 bits in three colours."""
    made = origin(tmp_path)
    with pytest.raises((ValueError, TypeError)):
        picture_objects([("floats", np.zeros((4, 4, 3)))], made, made.series("pictures"))  # type: ignore[list-item]
