"""Phantoms as DICOM: they say that they are synthetic, they are correct, and the same phantom is the same study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from deconv.volume import Volume
from dicomnode import matching, phantomstudy
from sop.phantom import write_phantom
from sop.read import read_series
from sop.suv import suv_factors
from tests.dciodvfy import entity_errors, iod_errors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    phantom = phantomstudy.make("spheres", size=(16, 40, 40), seed=1)
    folder = tmp_path_factory.mktemp("phantom")
    return phantom, phantomstudy.write(phantom, folder, seed=1), folder


def test_what_is_read_is_what_was_made(made):
    """Grid exact, values to the quantisation, PET in Bq/mL and CT in HU."""
    phantom, study, _ = made
    pet, info = read_series(study.pet)
    ct, ct_info = read_series(study.ct)
    assert pet.same_grid(phantom.measured) and info.unit == "Bq/ml"
    assert np.abs(pet.array - phantom.measured.array).max() < 2e-5 * phantom.measured.array.max()
    assert ct.same_grid(phantom.ct) and np.array_equal(ct.array, phantom.ct.array)
    assert info.frame_of_reference_uid == ct_info.frame_of_reference_uid


def test_the_background_has_the_suv_it_was_given(made):
    """SUVbw 1 for the background: dose, weight, half life and times belong together."""
    phantom, study, _ = made
    _, info = read_series(study.pet)
    assert suv_factors(info).require("bw") * phantom.background == pytest.approx(1, rel=1e-6)


def test_every_header_says_synthetic(made):
    """Name, identifier, descriptions and comments; nobody takes it for a patient."""
    _, study, _ = made
    for path in (*study.pet, *study.ct):
        ds = dcmread(path, stop_before_pixels=True)
        for keyword in ("PatientName", "PatientID", "StudyDescription", "SeriesDescription"):
            assert "SYNTHETIC" in str(ds[keyword].value)
        assert "no patient" in ds.ImageComments and ds.QualityControlSubject == "YES"


def test_the_checkers_find_no_error(made, tmp_path):
    """dciodvfy on first and last PET and CT, dcentvfy on the study."""
    _, study, _ = made
    for path in (study.pet[0], study.pet[-1], study.ct[0], study.ct[-1]):
        assert iod_errors(path) == set()
    assert entity_errors((*study.pet, *study.ct), tmp_path) == set()


def test_the_node_takes_the_pet_and_its_ct(made):
    """Eligible and guide, by the same rules as a scanner's."""
    _, study, _ = made
    kinds = [matching.eligible(dcmread(files[0]), own_output=False).kind for files in (study.pet, study.ct)]
    assert kinds == ["pet", "guide"]


def test_the_same_phantom_is_the_same_study_and_another_is_not(tmp_path):
    """Same arguments, same bytes; other voxels, other UIDs: one UID never means two images."""
    volume = Volume.axial(np.full((2, 4, 4), 1000.0), (3, 3, 3))
    arguments = {"name": "flat", "now": phantomstudy.SCANNED, "suv_1_bqml": 1000.0}
    first = write_phantom(tmp_path / "a", volume, None, **arguments)
    again = write_phantom(tmp_path / "b", volume, None, **arguments)
    other = write_phantom(tmp_path / "c", volume.with_array(volume.array * 1.01), None, **arguments)
    assert [path.read_bytes() for path in first.pet] == [path.read_bytes() for path in again.pet]
    uids = [dcmread(path).SOPInstanceUID for path in (*first.pet, *other.pet)]
    assert len(set(uids)) == 4 and first.study_uid != other.study_uid


@pytest.mark.parametrize("volume", [
    Volume.axial(np.ones((2, 4, 4)), (3, 3, 3), unit="g/ml{SUVbw}"),
    Volume(np.ones((2, 4, 4)), np.ones(3), np.zeros(3), np.eye(3), "Bq/ml"),
])
def test_what_it_cannot_write_is_refused(volume, tmp_path: Path):
    """Another unit, or a volume that is not axial."""
    with pytest.raises(ValueError, match="must be"):
        write_phantom(tmp_path, volume, None, name="x", now=phantomstudy.SCANNED, suv_1_bqml=1.0)
