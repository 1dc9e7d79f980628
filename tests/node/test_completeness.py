"""A series is processed only when it is proven whole: time, positions and counts, in any order of arrival."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from dicomnode.matching import Arrival, Completeness, completeness
from tests.node.matching_factories import arrivals_at, ct_header, enhanced_pet_header, mutate, pet_header, stack

QUIET_S, GIVE_UP_H = 30.0, 24.0
QUIET = QUIET_S
GIVEN_UP = GIVE_UP_H * 3600

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def judge(arrivals: list[Arrival], header: Dataset, *, now: float = QUIET, **options: Any) -> Completeness:
    return completeness(arrivals, header, now=now, quiet_s=QUIET_S, give_up_h=GIVE_UP_H, **options)


def state(arrivals: list[Arrival], header: Dataset, **options: Any) -> tuple[str, str]:
    found = judge(arrivals, header, **options)
    assert found.reason
    assert (found.until is not None) == (found.state == "waiting")
    assert bool(found.remedy) == (found.state == "held")
    return found.state, found.code


def test_quiet_uniform_and_counted_series_is_complete():
    """Quiet, evenly spaced, and as many slices as the header says."""
    assert state(stack(40), pet_header(NumberOfSlices=40)) == ("complete", "complete")


def test_nothing_is_complete_before_it_is_quiet():
    """One moment before the quiet time has passed the series waits, and says until when; at that moment it is done."""
    arrivals = [*stack(39), replace(stack(40)[-1], received_at=100.0)]
    early = judge(arrivals, pet_header(NumberOfSlices=40), now=129.9)
    assert (early.state, early.code, early.until) == ("waiting", "quiet", 130.0)
    assert judge(arrivals, pet_header(NumberOfSlices=40), now=130.0).state == "complete"


def test_clock_set_back_only_delays():
    """An arrival stamped in the future counts as having just come: never as long quiet."""
    arrivals = [replace(one, received_at=5000.0) for one in stack(40)]
    assert state(arrivals, pet_header(NumberOfSlices=40), now=100.0) == ("waiting", "quiet")


def test_missing_end_shows_in_the_count():
    """The last slices are missing and the rest is uniform: NumberOfSlices tells."""
    found = judge(stack(38), pet_header(NumberOfSlices=40))
    assert (found.state, found.code) == ("waiting", "slice-count")
    assert "38 of 40" in found.reason
    assert found.until == GIVEN_UP


def test_incomplete_series_is_held_after_the_give_up_time():
    """Waiting ends `give_up_h` after the last arrival, with the reason and what to do."""
    found = judge(stack(38), pet_header(NumberOfSlices=40), now=GIVEN_UP)
    assert (found.state, found.code) == ("held", "slice-count")
    assert "nothing new for 24 h" in found.reason


def test_gap_waits_and_names_the_place():
    """A missing inner slice is found by the gap it leaves, also where no count is stated."""
    arrivals = stack(20)
    del arrivals[10]
    found = judge(arrivals, pet_header())
    assert (found.state, found.code) == ("waiting", "gap")
    assert "27.00 and 33.00" in found.reason


def test_several_gaps_are_counted():
    """The reason names the first hole and how many more there are."""
    arrivals = stack(20)
    del arrivals[15], arrivals[10]
    assert "and at 1 other places" in judge(arrivals, pet_header()).reason


def test_every_second_slice_missing_is_not_complete():
    """Uniform gaps are no proof: twice the stated spacing means slices are missing."""
    assert state(stack(20, spacing=6.0), pet_header()) == ("waiting", "sparse")
    assert state(stack(20, spacing=6.0), pet_header(SliceThickness=None, SpacingBetweenSlices="-3.0"))[1] == "sparse"
    assert state(stack(20, spacing=6.0), pet_header(NumberOfSlices=40))[1] == "slice-count"


def test_uncounted_series_is_complete_by_its_spacing_and_says_what_is_unproven():
    """Without a count the spacing must agree with the header, and the reason admits that an end could be missing."""
    found = judge(stack(20), ct_header())
    assert found.state == "complete"
    assert "missing end" in found.reason


def test_spacing_between_slices_speaks_before_thickness():
    """Overlapping slices: 5 mm thick every 2.5 mm. The stated spacing shows what the thickness would hide."""
    header = ct_header(SliceThickness="5.0", SpacingBetweenSlices="2.5")
    assert state(stack(20, spacing=2.5), header)[0] == "complete"
    assert state(stack(10, spacing=5.0), header) == ("waiting", "sparse")


def test_series_without_any_evidence_is_never_complete():
    """No count, no spacing, no thickness: nothing is proven, so it waits and is then held."""
    assert state(stack(20), pet_header(SliceThickness=None)) == ("waiting", "unproven")
    assert state(stack(20), pet_header(SliceThickness=None), now=GIVEN_UP) == ("held", "unproven")


def test_source_peer_must_agree():
    """Where the source peer was asked, its count decides, even against a satisfied NumberOfSlices."""
    header = pet_header(NumberOfSlices=40)
    assert state(stack(40), header, expected_instances=41) == ("waiting", "peer-count")
    assert state(stack(40), header, expected_instances=40) == ("complete", "complete")
    assert state(stack(40), pet_header(SliceThickness=None), expected_instances=40) == ("complete", "complete")


def test_bed_overlap_jitter_is_still_one_grid():
    """Real whole-body series step by 3.19 to 3.29 mm where beds meet; that is uniform."""
    heights = [3.27 * index for index in range(20)]
    heights[10:] = [height - 0.08 for height in heights[10:]]
    heights[15:] = [height + 0.02 for height in heights[15:]]
    assert state(arrivals_at(*heights), pet_header(NumberOfSlices=20))[0] == "complete"


def test_irregular_spacing_is_held_at_once():
    """A stack that is on no grid cannot be mended by waiting."""
    heights = [3.0 * index for index in range(20)]
    heights[10:] = [height + 0.6 for height in heights[10:]]
    assert state(arrivals_at(*heights), pet_header(NumberOfSlices=20)) == ("held", "irregular")
    assert "slice spacing" in judge(arrivals_at(*heights), pet_header(NumberOfSlices=20)).remedy


def test_held_series_that_lacks_slices_asks_for_them():
    """The remedy fits the fault: here, what is missing."""
    assert "what is missing" in judge(stack(38), pet_header(NumberOfSlices=40), now=GIVEN_UP).remedy


def test_repeated_instance_counts_once():
    """The same SOP Instance again adds nothing."""
    arrivals = stack(40)
    assert state(arrivals + arrivals, pet_header(NumberOfSlices=40))[0] == "complete"
    assert state([*arrivals[:39], arrivals[0]], pet_header(NumberOfSlices=40))[1] == "slice-count"


def test_stray_duplicate_position_does_not_stand_in_for_a_missing_slice():
    """Forty instances of which two lie at one place are thirty-nine slices."""
    stray = replace(stack(1)[0], sop_instance_uid="1.9")
    assert state([*stack(39), stray], pet_header(NumberOfSlices=40)) == ("waiting", "slice-count")
    assert state([*stack(40), stray], pet_header(NumberOfSlices=40)) == ("complete", "complete")


def test_frames_in_disguise_are_held():
    """Every position twice in a series that calls itself STATIC: which of the two is the volume?"""
    again = [replace(one, sop_instance_uid=f"{one.sop_instance_uid}.2") for one in stack(40)]
    assert state(stack(40) + again, pet_header(NumberOfSlices=40)) == ("held", "repeated-positions")


def test_more_slices_than_stated_is_held():
    """Waiting cannot mend a surplus."""
    assert state(stack(41), pet_header(NumberOfSlices=40)) == ("held", "slice-count")


def frames(times: int, slices: int = 10) -> list[Arrival]:
    return [replace(one, sop_instance_uid=f"{one.sop_instance_uid}.{t}") for t in range(times) for one in stack(slices)]


def test_dynamic_series_needs_all_its_time_slices():
    """NumberOfSlices x NumberOfTimeSlices instances, each position equally often."""
    header = pet_header(SeriesType=["DYNAMIC", "IMAGE"], NumberOfSlices=10, NumberOfTimeSlices=4)
    assert state(frames(4), header) == ("complete", "complete")
    assert state(frames(3), header) == ("waiting", "frames-missing")
    assert state(frames(4)[:-1], header) == ("waiting", "frames-missing")
    assert state(frames(5), header) == ("held", "frames-surplus")


def test_gated_series_needs_all_its_gates():
    """NumberOfTimeSlots for each RR interval."""
    header = pet_header(SeriesType=["GATED", "IMAGE"], NumberOfSlices=10, NumberOfTimeSlots=3, NumberOfRRIntervals=2)
    assert state(frames(6), header) == ("complete", "complete")
    assert state(frames(3), header) == ("waiting", "frames-missing")


def test_frames_without_a_stated_number_must_be_even():
    """No NumberOfTimeSlices, no NumberOfTimeSlots: each position as often as every other is all that can be asked."""
    for series_type in ("DYNAMIC", "GATED"):
        header = pet_header(SeriesType=[series_type, "IMAGE"], NumberOfSlices=10)
        assert state(frames(4), header) == ("complete", "complete")
        assert state(frames(4)[:-1], header) == ("waiting", "frames-missing")


def test_gates_without_intervals_are_the_time_slots():
    """NumberOfRRIntervals is absent where the gating is not cardiac: one interval."""
    header = pet_header(SeriesType=["GATED", "IMAGE"], NumberOfSlices=10, NumberOfTimeSlots=3)
    assert state(frames(3), header) == ("complete", "complete")
    assert state(frames(2), header) == ("waiting", "frames-missing")


def test_static_series_ignores_number_of_time_slices():
    """A real GE STATIC series numbers its bed positions in NumberOfTimeSlices; its slices are not repeated."""
    assert state(stack(40), pet_header(NumberOfSlices=40, NumberOfTimeSlices=6))[0] == "complete"


def test_single_slice_is_no_volume():
    """One slice of many waits for the others; a series that is one slice is held."""
    assert state(stack(1), pet_header(NumberOfSlices=324)) == ("waiting", "single-slice")
    assert state(stack(1), pet_header(NumberOfSlices=324), now=GIVEN_UP) == ("held", "single-slice")
    assert state(stack(1), pet_header(NumberOfSlices=1)) == ("held", "single-slice")
    assert state(stack(1), pet_header(), expected_instances=1) == ("held", "single-slice")


def test_instances_without_place_are_held():
    """No position, or one that is not a number, proves no grid."""
    lost = replace(stack(40)[5], position=None)
    nan = replace(stack(40)[5], position=(0.0, 0.0, float("nan")))
    for bad in (lost, nan, replace(lost, orientation=None)):
        arrivals = stack(40)
        arrivals[5] = bad
        assert state(arrivals, pet_header(NumberOfSlices=40)) == ("held", "no-position")


def test_mixed_orientation_is_held():
    """A scout among axial slices makes no stack."""
    scout = arrivals_at(500.0, orientation=(1.0, 0.0, 0.0, 0.0, 0.0, -1.0))[0]
    arrivals = [*stack(40), replace(scout, sop_instance_uid="1.9")]
    assert state(arrivals, ct_header()) == ("held", "mixed-orientation")


def test_oblique_stack_is_measured_along_its_normal():
    """Slices tilted by 30 degrees, 3 mm apart along their normal."""
    c, s = 0.8660254, 0.5
    tilted = (1.0, 0.0, 0.0, 0.0, c, s)
    arrivals = [
        Arrival(f"1.2.{i}", 0.0, (0.0, -s * 3.0 * i, c * 3.0 * i), tilted) for i in range(20)
    ]
    assert state(arrivals, pet_header(NumberOfSlices=20))[0] == "complete"
    assert state(arrivals[:7] + arrivals[8:], pet_header(NumberOfSlices=20))[1] == "gap"


def enhanced(count: int = 3) -> list[Arrival]:
    return [Arrival("1.2.3", 0.0, None, None, frames=count)]


def test_enhanced_pet_is_complete_with_its_frames():
    """One multi-frame object is complete when all its frames are there and uniform."""
    assert state(enhanced(), enhanced_pet_header()) == ("complete", "complete")
    assert state(enhanced(2), enhanced_pet_header()) == ("held", "frames")
    assert state(enhanced(), enhanced_pet_header(NumberOfFrames=4)) == ("held", "frames")
    assert state(enhanced(), enhanced_pet_header(heights=(0.0, 3.0, 9.0))) == ("waiting", "gap")


def test_frames_without_description_are_held():
    """A multi-frame object that does not say where its frames lie, and an enhanced one of a single frame."""
    assert state(enhanced(45), pet_header(NumberOfFrames=45)) == ("held", "frames")
    assert state(enhanced(1), enhanced_pet_header(heights=(0.0,))) == ("waiting", "single-slice")


def test_parts_and_twins_of_enhanced_objects_are_held():
    """A concatenation, or two multi-frame objects, is not silently read as one volume."""
    assert state(enhanced(), enhanced_pet_header(InConcatenationTotalNumber=2)) == ("held", "concatenation")
    twins = [*enhanced(), replace(enhanced()[0], sop_instance_uid="1.2.4")]
    assert state(twins, enhanced_pet_header()) == ("held", "several-multi-frame")


def test_no_arrivals_is_an_error():
    """There is no series to judge."""
    with pytest.raises(ValueError, match="no arrivals"):
        judge([], pet_header())


# --- laws

headers = st.builds(
    lambda n, t, s: pet_header(NumberOfSlices=n, SliceThickness=t, SpacingBetweenSlices=s),
    st.none() | st.integers(1, 12),
    st.none() | st.sampled_from(["3.0", "6.0"]),
    st.none() | st.sampled_from(["3.0", "-3.0"]),
)
series = st.lists(
    st.builds(
        lambda uid, at, level: Arrival(f"1.2.{uid}", at, (0.0, 0.0, 3.0 * level), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)),
        st.integers(0, 15),
        st.floats(0, 1000),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=15,
)
whole = st.builds(
    lambda n, times: [replace(one, received_at=at) for one, at in zip(stack(n), times, strict=False)],
    st.integers(3, 15),
    st.lists(st.floats(0, 1000), min_size=15, max_size=15),
)
times = st.floats(0, 200_000)


@given(series, headers, times, st.floats(0, 600))
def test_law_never_complete_before_quiet(arrivals, header, now, quiet_s):
    """Whatever came: while anything is younger than the quiet time, the series is neither complete nor held."""
    found = completeness(arrivals, header, now=now, quiet_s=quiet_s, give_up_h=GIVE_UP_H)
    if now < max(one.received_at for one in arrivals) + quiet_s:
        assert (found.state, found.code) == ("waiting", "quiet")


@given(st.data(), series | whole, headers, times)
def test_law_order_of_arrival_does_not_matter(data, arrivals, header, now):
    """Any order, over any number of associations, gives the same verdict to the letter."""
    shuffled = data.draw(st.permutations(arrivals))
    assert judge(shuffled, header, now=now) == judge(arrivals, header, now=now)


@given(whole, st.data(), st.booleans())
def test_law_removing_inner_slices_is_never_complete(arrivals, data, counted):
    """From a complete series take any inner slices away: it is not complete, with a count stated or without."""
    header = pet_header(NumberOfSlices=len(arrivals) if counted else None)
    assert judge(arrivals, header, now=2000).state == "complete"
    inner = st.sets(st.integers(1, len(arrivals) - 2), min_size=1)
    gone = data.draw(inner)
    left = [one for index, one in enumerate(arrivals) if index not in gone]
    for now in (2000, 2000 + GIVEN_UP):
        assert judge(left, header, now=now).state != "complete"


@given(series, headers, times)
def test_law_waiting_ends(arrivals, header, now):
    """Looking again at `until` gives another answer than the one before: nobody waits for ever."""
    found = judge(arrivals, header, now=now)
    if found.until is not None:
        later = judge(arrivals, header, now=found.until)
        assert found.until > now
        assert later.code != "quiet"
        assert later.state != "waiting" or found.code == "quiet"


@given(st.sampled_from(["NumberOfSlices", "SliceThickness", "SpacingBetweenSlices", "SeriesType", "NumberOfFrames"]),
       st.binary(max_size=20))
def test_law_no_header_makes_the_rule_fail(keyword, raw):
    """Mutated elements give a verdict, never an exception."""
    header = pet_header()
    mutate(header, keyword, raw)
    assert judge(stack(5), header).reason
