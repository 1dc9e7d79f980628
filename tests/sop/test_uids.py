"""UIDs of a derived series are a pure function of what decides its pixels."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sop.derivation import Derivation
from sop.uids import derived_uids, uid_from
from tests.sop.derived_series import derivation

UID = re.compile(r"[0-2](\.(0|[1-9][0-9]*))+")
SOURCES = [f"1.2.840.99.{n}" for n in range(5)]
roots = st.sampled_from(["2.25", "1.2.840.113619", "1.3.6.1.4.1.5962.99.1.1234567890.1234"])


@given(st.lists(st.text(st.characters(min_codepoint=48, max_codepoint=57), min_size=1, max_size=20), min_size=1,
                max_size=8, unique=True), roots, st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))
def test_uids_are_valid_unique_and_under_the_root(numbers: list[str], root: str, settings: dict) -> None:
    """At most 64 characters, no leading zeros, two new ones for each source slice (PS3.5 9.1)."""
    sources = [f"1.2.1{number}" for number in numbers]
    series, instances = derived_uids(sources, derivation(settings=settings, uid_root=root))
    everything = [series, *instances]
    assert len(set(everything)) == len(everything) == 2 * len(sources) + 1
    assert all(UID.fullmatch(uid) and len(uid) <= 64 and uid.startswith(root + ".") for uid in everything)


@given(st.permutations(range(5)))
def test_the_order_of_the_slices_does_not_matter(order: list[int]) -> None:
    """The series keeps its UID, and each slice its own two, in whatever order the source came."""
    series, instances = derived_uids(SOURCES, derivation())
    shuffled_series, shuffled = derived_uids([SOURCES[i] for i in order], derivation())
    assert shuffled_series == series
    for place, i in enumerate(order):
        assert shuffled[2 * place:2 * place + 2] == instances[2 * i:2 * i + 2]


@pytest.mark.parametrize("change", [
    {"method": "tv"}, {"preset": "preview"}, {"settings": {"seed": 2, "steps": [2, 3]}},
    {"settings": {"seed": 1, "steps": [2, 3], "more": None}}, {"software_version": "1.2.4"},
    {"guide_series_uid": "1.2.3"}, {"uid_root": "1.2.3"},
])
def test_whatever_changes_the_image_changes_every_uid(change: dict) -> None:
    """One UID never means two images."""
    before, after = derived_uids(SOURCES, derivation()), derived_uids(SOURCES, derivation(**change))
    assert not {before[0], *before[1]} & {after[0], *after[1]}


@pytest.mark.parametrize("change", [
    {"series_description": "{source} sharp"}, {"series_number_offset": 7}, {"taken_series_numbers": {1005}},
    {"research_use": False}, {"institution": "Hospital", "station": "NODE1"}, {"kernel_fwhm_mm": None},
    {"settings": {"steps": (2, 3), "seed": 1}},
])
def test_whatever_leaves_the_image_alone_leaves_the_uids_alone(change: dict) -> None:
    """Names, numbers and the order of settings are no part of the image."""
    assert derived_uids(SOURCES, derivation()) == derived_uids(SOURCES, derivation(**change))


def test_another_source_is_another_series() -> None:
    """One slice more or fewer, and every UID differs."""
    whole, part = derived_uids(SOURCES, derivation()), derived_uids(SOURCES[:-1], derivation())
    assert not {whole[0], *whole[1]} & {part[0], *part[1]}


def test_frames_of_one_instance_have_uids_of_their_own() -> None:
    """A multi-frame source repeats one UID; its derived slices do not."""
    series, instances = derived_uids(["1.2.3"] * 4, derivation())
    assert len({series, *instances}) == 9


def test_the_uids_never_change_between_versions() -> None:
    """Written down: a change here would send every study of every site a second time."""
    series, instances = derived_uids(["1.2.3"], Derivation("nbd", "best", {"seed": 0}, "1.0.0"))
    assert series == "2.25.173398566867290568340061845391430967963"
    assert instances == ["2.25.148952181577368573358601883929615179681", "2.25.5114055763898022372394901697298458492"]


def test_uids_under_the_generic_root_are_those_of_uuids() -> None:
    """2.25 is followed by a UUID as one integer (PS3.5 B.2), version 8, variant of RFC 9562."""
    made = uuid.UUID(int=int(uid_from("2.25", "anything").split(".")[2]))
    assert (made.version, made.variant) == (8, uuid.RFC_4122)


@pytest.mark.parametrize("wrong", [
    {"uid_root": "2.25."}, {"uid_root": "1.02"}, {"uid_root": "hospital"}, {"uid_root": "1." + "2" * 40},
    {"settings": {"when": object()}}, {"settings": {"rate": float("nan")}}, {"series_description": "{study}"},
    {"series_description": "{source}"}, {"series_description": " "},
])
def test_a_derivation_that_cannot_be_repeated_or_named_is_refused(wrong: dict) -> None:
    """Not a UID root, not JSON, not a name of its own: ValueError."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        derivation(**wrong)


def test_no_sources_no_series() -> None:
    """There is nothing to derive from."""
    with pytest.raises(ValueError, match="source"):
        derived_uids([], derivation())
