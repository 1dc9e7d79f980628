"""Reading multi-frame objects: Enhanced PET and CT, reconstructed NM."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from sop.read import read_series
from tests.factories import OBLIQUE, ct_series, enhanced_ct, enhanced_pet, nm_tomo, pet_series
from tests.sop.test_read import refusal, save


@pytest.mark.parametrize("options", [{}, {"orientation": OBLIQUE}, {"units": "GML"}], ids=str)
def test_enhanced_pet_gives_the_volume_of_the_classic_series(tmp_path, options):
    """Values, grid, unit and the attributes an SUV needs are those of the single-frame series."""
    volume, info = read_series(pet_series(**options))
    path = save([enhanced_pet(**options)], tmp_path)
    other, enhanced = read_series(path)
    assert np.array_equal(other.array, volume.array)
    assert other.same_grid(volume) and other.unit == volume.unit
    assert enhanced.sop_class_uid == "1.2.840.10008.5.1.4.1.1.130"
    assert [item.frame for item in enhanced.slices] == list(range(1, 9))
    for keyword in ("SOPClassUID", "Units", "SeriesType", "DecayCorrection", "SeriesDate", "SeriesTime",
                    "AcquisitionTime", "FrameReferenceTime", "ActualFrameDuration", "ImagePositionPatient",
                    "PixelSpacing", "NumberOfSlices"):
        assert enhanced.slices[5].header[keyword].value == info.slices[5].header[keyword].value, keyword
    tracer = enhanced.first.RadiopharmaceuticalInformationSequence[0]
    assert float(tracer.RadionuclideTotalDose) == 370e6
    assert "SharedFunctionalGroupsSequence" not in enhanced.first
    assert {"ATTN", "DECY"} <= set(enhanced.first.CorrectedImage)


def test_reading_an_enhanced_pet_leaves_it_alone():
    """The translated headers are copies."""
    source = enhanced_pet()
    before = copy.deepcopy(source)
    read_series([source])
    assert source == before


def test_enhanced_pet_of_several_times_is_refused():
    """By its image type, and by its positions where the type is silent."""
    assert refusal([enhanced_pet(time_slices=2)]).code == "dynamic"
    silent = enhanced_pet(time_slices=2)
    silent.ImageType = ["ORIGINAL", "PRIMARY", "STATIC", "NONE"]
    assert refusal([silent]).code == "dynamic"


def test_enhanced_pet_sent_twice_is_taken_once():
    """The same instance again changes nothing; a part of an image is refused."""
    source = enhanced_pet()
    volume, info = read_series([source, copy.deepcopy(source)])
    assert volume.shape == (8, 16, 14) and len(info.notes) == 1
    assert refusal([enhanced_pet(InConcatenationTotalNumber=2)]).code == "concatenation"


def test_enhanced_ct_is_read_as_a_guide():
    """Hounsfield units on the same grid as the single-frame CT."""
    volume, other = read_series(ct_series())[0], read_series([enhanced_ct()])[0]
    assert np.array_equal(volume.array, other.array)
    assert other.same_grid(volume) and other.unit == "[hnsf'U]"


def test_reconstructed_nm_is_stacked_by_the_signed_spacing():
    """A negative SpacingBetweenSlices stacks against the normal: the first frame lies highest."""
    volume, info = read_series([nm_tomo(slices=6, step_mm=-4.0)])
    assert volume.unit == "{counts}" and np.allclose(volume.origin, (-20, -16, 30))
    assert [item.frame for item in info.slices] == [6, 5, 4, 3, 2, 1]
    upward = read_series([nm_tomo(slices=6, step_mm=4.0)])[0]
    assert np.array_equal(upward.array, volume.array[::-1])


def test_planar_nm_is_refused():
    """Views are not slices."""
    assert refusal([nm_tomo(ImageType=["ORIGINAL", "PRIMARY", "STATIC", "EMISSION"])]).code == "not-supported"
