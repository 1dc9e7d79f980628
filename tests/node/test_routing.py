"""The first route whose globs all match decides; a key that is no DICOM keyword is found before the node starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from dicomnode.routing import first_route, matches, validate_when
from tests.node.matching_factories import mutate, pet_header

RADIOPHARMACEUTICAL = "RadiopharmaceuticalInformationSequence.Radiopharmaceutical"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


@dataclass(frozen=True)
class Route:
    name: str
    when: Mapping[str, str | Sequence[str]]


def tracer_header(*tracers: str) -> Dataset:
    header = pet_header(StationName="PETCT1", SeriesDescription="PET AC WB ")
    isotopes = []
    for tracer in tracers:
        item = Dataset()
        item.Radiopharmaceutical = tracer
        isotopes.append(item)
    header.RadiopharmaceuticalInformationSequence = DicomSequence(isotopes)
    return header


def match(when: Mapping[str, str | Sequence[str]], header: Dataset | None = None, calling_ae: str = "SCANNER") -> bool:
    assert validate_when(when) == []
    return matches(when, header or tracer_header("FDG"), calling_ae)


def test_first_matching_route_wins():
    """Routes are tried in the order of the file, each returned as it was given."""
    routes = [
        Route("mr", {"Modality": "MR"}),
        Route("psma", {"Modality": "PT", RADIOPHARMACEUTICAL: "*PSMA*"}),
        Route("any-pet", {"Modality": "PT"}),
        Route("rest", {}),
    ]
    assert first_route(routes, tracer_header("68Ga-PSMA-11"), calling_ae="A") is routes[1]
    assert first_route(routes, tracer_header("FDG"), calling_ae="A") is routes[2]
    assert first_route(routes[:2], tracer_header("FDG"), calling_ae="A") is None


def test_all_keywords_must_match():
    """A route is a conjunction of its keys."""
    assert match({"Modality": "PT", "StationName": "PETCT?"})
    assert not match({"Modality": "PT", "StationName": "MR*"})


def test_empty_when_matches_everything():
    """The catch-all route at the end of a file."""
    assert match({})


def test_case_and_padding_do_not_matter():
    """Vendors write FDG, Fdg and `PET AC WB ` with a padding space."""
    assert match({RADIOPHARMACEUTICAL: "fdg"})
    assert match({"SeriesDescription": "pet ac wb"})
    assert match({"SeriesDescription": " PET*WB "})


def test_list_of_globs_means_any_of_them():
    """A list is an alternative."""
    assert match({"StationName": ["PETCT2", "PETCT1"]})
    assert not match({"StationName": ["PETCT2", "PETCT3"]})


def test_any_item_of_a_sequence_matches():
    """Two tracers in one study: either is enough."""
    header = tracer_header("Rb-82", "68Ga-PSMA-11")
    assert match({RADIOPHARMACEUTICAL: "*PSMA*"}, header)
    assert match({RADIOPHARMACEUTICAL: "Rb*"}, header)
    assert not match({RADIOPHARMACEUTICAL: "*FDG*"}, header)


def test_deeply_nested_keyword():
    """Dots go down as many sequences as needed."""
    header = tracer_header("FDG")
    code = Dataset()
    code.CodeMeaning = "^18^Fluorine"
    header.RadiopharmaceuticalInformationSequence[0].RadionuclideCodeSequence = DicomSequence([code])
    assert match({"RadiopharmaceuticalInformationSequence.RadionuclideCodeSequence.CodeMeaning": "*fluorine*"}, header)


def test_any_of_several_values_or_all_joined():
    """ImageType matches by one value or as the backslash-joined whole."""
    assert match({"ImageType": "ORIGINAL"})
    assert match({"ImageType": "original\\primary"})
    assert not match({"ImageType": "DERIVED*"})


def test_calling_ae_title_is_matched_like_an_attribute():
    """Who sent it decides, padding and case aside."""
    assert match({"CallingAETitle": "scan*"}, calling_ae="SCANNER ")
    assert not match({"CallingAETitle": "PACS"}, calling_ae="SCANNER")


def test_absent_attribute_is_the_empty_value():
    """`*` matches an absent attribute as universal matching does; `?*` asks for a value; "" asks for none."""
    assert match({"BodyPartExamined": "*"})
    assert not match({"BodyPartExamined": "?*"})
    assert match({"BodyPartExamined": ""})
    assert not match({"StationName": ""})
    assert not match({RADIOPHARMACEUTICAL: "?*"}, pet_header())


def test_numbers_match_as_they_are_written():
    """DS and IS keep the digits of the file."""
    assert match({"SliceThickness": "3.0", "PixelSpacing": "4.0"}, pet_header())


@pytest.mark.parametrize(
    ("when", "problem"),
    [
        ({"Modalty": "PT"}, "did you mean Modality?"),
        ({"modality": "PT"}, "did you mean Modality?"),
        ({"CallingAE": "X"}, "did you mean CallingAETitle?"),
        ({"RadiopharmaceuticalInformationSequence.Radiopharmaceutcal": "X"}, "did you mean Radiopharmaceutical?"),
        ({"RadiopharmaceuticalInformationSequence": "X"}, "name an attribute of its items"),
        ({"Modality.CodeMeaning": "X"}, "no sequence"),
        ({"PixelData": "X"}, "no text to match"),
        ({"Modality": []}, "empty list"),
        ({"Modality": 3}, "write it in quotes"),
        ({"Modality": ["PT", 3]}, "write it in quotes"),
        ({"": "PT"}, "no DICOM keyword"),
    ],
)
def test_mistakes_are_named_with_a_suggestion(when, problem):
    """A misspelt key would silently never match: the configuration is refused instead."""
    (found,) = validate_when(when)
    assert problem in found


letters = st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="*?[]\\")
plain = st.text(letters, min_size=1, max_size=16)


@given(plain)
def test_law_a_value_matches_itself_and_its_parts(value):
    """A text without wildcards matches itself; with * for any part of it, still."""
    header = pet_header(StationName=value)
    middle = len(value) // 2
    parts = (f"{value[:middle]}*", f"*{value[middle:]}", "?" * len(value), "*")
    for glob in (value, value.upper(), value.lower(), *parts):
        assert match({"StationName": glob}, header)


@given(plain, plain)
def test_law_text_without_wildcards_matches_only_itself(value, other):
    """Without wildcards, a glob is equality, case aside."""
    assert match({"StationName": other}, pet_header(StationName=value)) == (value.casefold() == other.casefold())


@given(st.text(max_size=12), plain)
def test_law_no_glob_makes_matching_fail(glob, value):
    """Any text is a glob: unbalanced brackets and odd characters match or do not, but never raise."""
    assert matches({"StationName": glob}, pet_header(StationName=value), "A") in (True, False)


@given(st.lists(plain, max_size=4), plain)
def test_law_list_is_or(globs, value):
    """A list matches exactly when one of its globs does."""
    header = pet_header(StationName=value)
    assert matches({"StationName": globs}, header, "A") == any(matches({"StationName": g}, header, "A") for g in globs)


@given(st.sampled_from(["SamplesPerPixel", "SliceThickness", "ImageType", "StationName", "StudyDate"]),
       st.binary(max_size=12))
def test_law_no_header_makes_matching_fail(keyword, raw):
    """Mutated elements match or do not, but never raise."""
    header = pet_header()
    mutate(header, keyword, raw)
    assert matches({keyword: "*"}, header, "A")
