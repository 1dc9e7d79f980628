"""Which series is deblurred, which guides, which is left alone and which is held."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicomnode.matching import eligible
from tests.node.matching_factories import ct_header, enhanced_pet_header, mutate, pet_header

pytestmark = pytest.mark.filterwarnings("ignore:.*Invalid value for VR:UserWarning", "ignore::UserWarning:pydicom")


def verdict(header: Dataset, **options: bool) -> tuple[str, str]:
    found = eligible(header, own_output=False, **options)
    return found.kind, found.code


@pytest.mark.parametrize("series_type", ["STATIC", "WHOLE BODY"])
def test_corrected_volume_is_deblurred(series_type):
    """An attenuation-corrected static or whole-body PET in BQML is what the node is for."""
    assert verdict(pet_header(SeriesType=[series_type, "IMAGE"])) == ("pet", "pet")


def test_grey_image_is_no_picture():
    """One sample per pixel, either way round: a volume."""
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        assert verdict(pet_header(SamplesPerPixel=1, PhotometricInterpretation=photometric))[0] == "pet"


def test_own_output_is_never_processed_again():
    """A derived series that auto-routing sends back is ignored, whatever its header looks like."""
    assert eligible(pet_header(), own_output=True).code == "own-output"


def test_uncorrected_series_is_ignored_not_held():
    """Scanners send a NAC series beside every corrected one: it must not call a person."""
    assert verdict(pet_header(CorrectedImage=["DECY", "SCAT"])) == ("ignored", "not-attenuation-corrected")


@pytest.mark.parametrize("series_type", ["DYNAMIC", "GATED"])
def test_dynamic_and_gated_series_are_refused_with_a_remedy(series_type):
    """Only static and whole-body volumes are processed; the remedy names what to send instead."""
    header = pet_header(SeriesType=[series_type, "IMAGE"])
    found = eligible(header, own_output=False)
    assert (found.kind, found.code) == ("refused", series_type.lower())
    assert "static" in found.remedy


@pytest.mark.parametrize(
    "keyword",
    ["CorrectedImage", "Units", "SeriesType", "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient"],
)
def test_stripped_header_is_refused_by_name(keyword):
    """What a header does not say is not guessed: the refusal names the attribute and a remedy."""
    found = eligible(pet_header(**{keyword: None}), own_output=False)
    assert (found.kind, found.code) == ("refused", "header-incomplete")
    assert keyword in found.reason
    assert found.remedy


@pytest.mark.parametrize("keyword", ["CorrectedImage", "Units", "SeriesType"])
def test_empty_attribute_counts_as_missing(keyword):
    """De-identification often empties instead of deleting; the verdict is the same."""
    assert verdict(pet_header(**{keyword: ""})) == ("refused", "header-incomplete")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SeriesType": ["WHOLE BODY", "REPROJECTION"]}, "projection"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "projection"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "FUSED"]}, "picture"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "picture"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "picture"),
        ({"SamplesPerPixel": 3}, "picture"),
        ({"SamplesPerPixel": 1, "PhotometricInterpretation": "PALETTE COLOR"}, "picture"),
        ({"BurnedInAnnotation": "YES"}, "picture"),
        ({"CountsSource": "TRANSMISSION"}, "transmission"),
        ({"ImageType": ["DERIVED", "PRIMARY"]}, "derived"),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "derived"),
    ],
)
def test_what_is_no_original_volume_is_ignored(changes, code):
    """MIPs, fused and captured pictures, scouts, attenuation maps and derived series are stored and left alone."""
    assert verdict(pet_header(**changes)) == ("ignored", code)


def test_unknown_series_type_is_held():
    """A SeriesType outside the standard is refused, not read as STATIC."""
    assert verdict(pet_header(SeriesType=["SOMETHING", "IMAGE"])) == ("refused", "series-type")
    assert verdict(pet_header(SeriesType="STATIC")) == ("refused", "series-type")


def philips(creator: str = "Philips PET Private Group", **factors: str) -> Dataset:
    header = pet_header(Units="CNTS")
    block = header.private_block(0x7053, creator, create=True)
    for name, value in factors.items():
        block.add_new({"suv": 0x00, "activity": 0x09}[name], "DS", value)
    return header


def test_counts_need_a_usable_philips_factor():
    """CNTS is quantitative with a positive Philips factor under its private creator, and not otherwise."""
    assert verdict(philips(suv="0.000274")) == ("pet", "pet")
    assert verdict(philips(suv="0", activity="1.5")) == ("pet", "pet")
    assert verdict(philips(suv="0")) == ("refused", "units")
    assert verdict(philips("Somebody else", suv="0.000274")) == ("refused", "units")
    assert verdict(pet_header(Units="CNTS")) == ("refused", "units")


def test_philips_factor_as_unknown_bytes_is_read():
    """A peer that does not know the element sends its factor as UN: still the same number."""
    header = pet_header(Units="CNTS")
    header.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "UN", b"0.000274 ")
    assert verdict(header) == ("pet", "pet")


def test_proportional_counts_are_refused():
    """PROPCPS has no way to activity."""
    assert verdict(pet_header(Units="PROPCPS")) == ("refused", "units")


@pytest.mark.parametrize("units", ["GML", "CM2ML"])
def test_suv_is_a_unit(units):
    """Series already in SUV, by weight or by body surface, are deblurred in that unit."""
    assert verdict(pet_header(Units=units)) == ("pet", "pet")


def test_ct_volume_guides_and_scouts_do_not():
    """A CT with a place in the patient may guide, as scanners or de-identification wrote it."""
    assert verdict(ct_header()) == ("guide", "guide")
    assert verdict(ct_header(ImageType=["DERIVED", "SECONDARY", "AXIAL"])) == ("guide", "guide")
    assert verdict(ct_header(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])) == ("ignored", "localizer")
    assert verdict(ct_header(ImageType=["DERIVED", "SECONDARY", "MIP"])) == ("ignored", "projection")
    assert verdict(ct_header(ImagePositionPatient=None)) == ("ignored", "no-geometry")


@pytest.mark.parametrize(
    ("sop_class", "modality", "code"),
    [
        ("1.2.840.10008.5.1.4.1.1.20", "NM", "other-sop-class"),
        ("1.2.840.10008.5.1.4.1.1.88.67", "SR", "other-sop-class"),
        ("1.2.840.10008.5.1.4.1.1.4", "MR", "other-sop-class"),
        ("1.2.840.10008.5.1.4.1.1.7", "PT", "pet-picture"),
        ("1.2.3.4.5", "OT", "other-sop-class"),
    ],
)
def test_other_objects_are_stored_and_ignored(sop_class, modality, code):
    """Dose reports, NM, MR and Secondary Capture, also of modality PT: chosen by SOP Class, not by Modality."""
    assert verdict(pet_header(SOPClassUID=sop_class, Modality=modality)) == ("ignored", code)


def test_enhanced_pet_is_judged_by_its_own_attributes():
    """Enhanced PET says AttenuationCorrected, ImageType value 3 and a value mapping instead of the classic ones."""
    assert verdict(enhanced_pet_header()) == ("pet", "pet")
    assert verdict(enhanced_pet_header(AttenuationCorrected="NO")) == ("ignored", "not-attenuation-corrected")
    assert verdict(enhanced_pet_header(AttenuationCorrected=None)) == ("refused", "header-incomplete")
    assert verdict(enhanced_pet_header(SharedFunctionalGroupsSequence=None)) == ("refused", "header-incomplete")
    dynamic = enhanced_pet_header(ImageType=["ORIGINAL", "PRIMARY", "DYNAMIC", "NONE"])
    assert verdict(dynamic) == ("refused", "dynamic")
    gated = enhanced_pet_header(ImageType=["ORIGINAL", "PRIMARY", "RESP_GATED", "NONE"])
    assert verdict(gated) == ("refused", "gated")
    assert verdict(enhanced_pet_header(VolumeBasedCalculationTechnique="MAX_IP")) == ("ignored", "projection")


def test_legacy_converted_pet_is_held():
    """The repackaged copy is refused with the remedy to send the original."""
    found = eligible(pet_header(SOPClassUID="1.2.840.10008.5.1.4.1.1.128.1"), own_output=False)
    assert (found.kind, found.code) == ("refused", "legacy-converted")
    assert "original" in found.remedy


KEYWORDS = st.sampled_from(
    ["SOPClassUID", "ImageType", "SeriesType", "CorrectedImage", "Units", "SamplesPerPixel", "SeriesInstanceUID",
     "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames", "PhotometricInterpretation"]
)


@given(st.dictionaries(KEYWORDS, st.binary(max_size=40), max_size=6))
def test_no_header_makes_the_rule_fail(mutations):
    """Whatever bytes stand in the elements, there is a verdict with a reason."""
    header = pet_header()
    for keyword, raw in mutations.items():
        mutate(header, keyword, raw)
    found = eligible(header, own_output=False)
    assert found.kind in ("pet", "guide", "ignored", "refused")
    assert found.reason
