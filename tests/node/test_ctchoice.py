"""Which CT guides a PET, why the others do not, and how long a PET waits for one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.matching import GuideChoice, SeriesGeometry, choose_guide, geometry_of, guide_wait, normal_of
from tests.node.matching_factories import arrivals_at, ct_header, enhanced_pet_header, pet_header, stack

PET = SeriesGeometry("1.2.3", "1.2.3.1", "1.2.3.9", 0.0, 900.0, 3.0, 300)
CT = replace(PET, series_uid="1.2.3.2")
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def ct(uid: str, **changes: object) -> SeriesGeometry:
    return replace(CT, series_uid=uid, **changes)  # type: ignore[arg-type]


def reasons(choice: GuideChoice) -> dict[str, str]:
    return dict(choice.considered)


def test_geometry_reaches_from_face_to_face():
    """Forty slices 3 mm apart cover 120 mm: half a slice beyond the outer centres on either side."""
    found = geometry_of(stack(40, start=10.0), pet_header())
    assert (found.axial_min_mm, found.axial_max_mm) == pytest.approx((8.5, 128.5))
    assert (found.slices, found.slice_thickness_mm, found.is_parallel) == (40, 3.0, True)


def test_gaps_between_thin_slices_belong_to_the_stack():
    """1 mm slices every 5 mm: the extent follows the spacing, the thickness stays what the header says."""
    found = geometry_of(stack(10, spacing=5.0), ct_header(SliceThickness="1.0"))
    assert (found.axial_min_mm, found.axial_max_mm) == pytest.approx((-2.5, 47.5))
    assert found.slice_thickness_mm == 1.0


def test_ct_is_measured_along_the_normal_of_the_pet():
    """A CT numbered the other way round has the opposite normal; its extent along the PET's is the same."""
    flipped = arrivals_at(0.0, 3.0, 6.0, orientation=(1.0, 0.0, 0.0, 0.0, -1.0, 0.0))
    found = geometry_of(flipped, ct_header(), normal=(0.0, 0.0, 1.0))
    assert (found.axial_min_mm, found.axial_max_mm) == pytest.approx((-1.5, 7.5))
    assert found.is_parallel


def test_coronal_reformat_is_not_parallel():
    """A reformatted CT has its slices elsewhere; it does not pass for a thin axial stack."""
    found = geometry_of(arrivals_at(0.0, 3.0, orientation=CORONAL), ct_header(), normal=(0.0, 0.0, 1.0))
    assert not found.is_parallel
    assert choose_guide(PET, [replace(found, series_uid="1.2.3.2")]).series_uid is None


def test_ct_with_missing_slices_is_no_guide():
    """A hole in the CT would be bridged by nobody: it is passed over with the place of the hole."""
    arrivals = stack(20)
    del arrivals[10]
    holed = geometry_of(arrivals, ct_header(), normal=(0.0, 0.0, 1.0))
    choice = choose_guide(PET, [holed, ct("9", axial_max_mm=30.0)])
    assert choice.series_uid == "9"
    assert "27.00 and 33.00 mm" in reasons(choice)["1.2.3.2"]


def test_ct_with_tilted_gantry_is_no_guide():
    """A sheared stack has no right-angled grid."""
    sheared = [replace(one, position=(0.0, 0.2 * index, 3.0 * index)) for index, one in enumerate(stack(20))]
    found = geometry_of(sheared, ct_header(), normal=(0.0, 0.0, 1.0))
    assert "3.8 mm aside" in found.flaw
    assert choose_guide(PET, [found]).series_uid is None


@pytest.mark.parametrize(("aside", "flawed"), [(0.05, False), (0.15, True)])
def test_shear_is_told_from_rounding(aside, flawed):
    """A tenth of a millimetre is what rounded positions may lie aside; more is a sheared stack."""
    arrivals = stack(20)
    arrivals[7] = replace(arrivals[7], position=(-100.0 + aside, -100.0, 21.0))
    assert bool(geometry_of(arrivals, ct_header()).flaw) is flawed


def test_axis_is_the_normal_unless_given():
    """What a CT is to be measured along is read off the PET's geometry."""
    coronal = geometry_of(arrivals_at(0.0, 3.0, orientation=CORONAL), pet_header())
    assert coronal.axis == (0.0, 1.0, 0.0)
    assert geometry_of(stack(5), ct_header(), normal=coronal.axis).axis == coronal.axis


def test_enhanced_object_is_measured_by_its_frames():
    """The positions of a multi-frame object are inside its functional groups."""
    found = geometry_of([], enhanced_pet_header(heights=(0.0, 3.0, 6.0)))
    assert (found.axial_min_mm, found.axial_max_mm, found.slices) == pytest.approx((-1.5, 7.5, 3))


def test_series_without_place_has_no_extent():
    """Nothing to compare: no slices, and never chosen."""
    lost = [replace(one, position=None) for one in stack(5)]
    found = geometry_of(lost, ct_header(), normal=(0.0, 0.0, 1.0))
    assert (found.slices, found.axial_min_mm, found.axial_max_mm) == (0, 0.0, 0.0)
    assert "no volume" in reasons(choose_guide(PET, [found]))["1.2.3.2"]


@pytest.mark.parametrize(
    ("description", "hint"),
    [("CTAC 3.75 Thick", True), ("AC_CT Body", True), ("AC CT  3.0", True), ("CT WB Attenuation", True),
     ("CT Thorax Venous", False), ("ACETABULUM CT", False), ("Lung tract", False), ("CT ACUTE", False)],
)
def test_attenuation_correction_ct_is_recognised_by_its_description(description, hint):
    """Scanners name it in the series description; a word that merely contains the letters does not count."""
    assert geometry_of(stack(5), ct_header(SeriesDescription=description)).attenuation_correction_hint is hint


@pytest.mark.parametrize(("agent", "contrast"), [("ULTRAVIST 370", True), ("", False), ("NONE", False), (None, False)])
def test_contrast_is_read_from_the_agent(agent, contrast):
    """ContrastBolusAgent names the agent; NONE is how some scanners say no."""
    assert geometry_of(stack(5), ct_header(ContrastBolusAgent=agent)).contrast is contrast


def test_best_coverage_wins():
    """The CT that covers more of the PET is chosen although the other is thinner."""
    choice = choose_guide(PET, [ct("1", axial_max_mm=300.0, slice_thickness_mm=1.0), ct("2")])
    assert (choice.series_uid, choice.code, choice.coverage) == ("2", "chosen", 1.0)
    assert "covers less" in reasons(choice)["1"]


def test_partial_coverage_is_used_and_said():
    """A CT of part of the body guides that part; the choice says how much."""
    choice = choose_guide(PET, [ct("1", axial_min_mm=450.0, axial_max_mm=1200.0)])
    assert (choice.series_uid, choice.coverage) == ("1", 0.5)
    assert "50%" in choice.reason


def test_thinner_slices_win_at_equal_coverage():
    """One per cent of coverage is no difference; a thinner slice is."""
    choice = choose_guide(PET, [ct("1", slice_thickness_mm=5.0), ct("2", slice_thickness_mm=1.5, axial_max_mm=895.0)])
    assert choice.series_uid == "2"
    assert "thicker" in reasons(choice)["1"]


def test_unknown_thickness_is_not_taken_for_thin():
    """A CT that does not say its thickness does not beat one that does."""
    assert choose_guide(PET, [ct("1", slice_thickness_mm=0.0), ct("2", slice_thickness_mm=5.0)]).series_uid == "2"


def test_correction_ct_is_preferred_over_contrast_ct_on_ties():
    """Same cover, same slices: the attenuation-correction CT, then the one without contrast, then the first UID."""
    plain, enhanced = ct("3"), ct("1", contrast=True)
    assert choose_guide(PET, [plain, enhanced]).series_uid == "3"
    assert "contrast" in reasons(choose_guide(PET, [plain, enhanced]))["1"]
    assert choose_guide(PET, [plain, enhanced, ct("9", attenuation_correction_hint=True)]).series_uid == "9"
    tie = choose_guide(PET, [plain, ct("2")])
    assert tie.series_uid == "2"
    assert "UID comes later" in reasons(tie)["3"]


def test_ct_named_by_the_pet_is_the_correction_ct():
    """Siemens writes the description of the CT it used into AttenuationCorrectionMethod."""
    pet = replace(PET, attenuation_correction_method="measured,LD FLT 3.0")
    assert choose_guide(pet, [ct("1", description="Thorax"), ct("2", description="LD FLT 3.0")]).series_uid == "2"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"study_uid": "1.2.4"}, "another study"),
        ({"frame_of_reference_uid": "1.2.8"}, "another frame of reference"),
        ({"frame_of_reference_uid": ""}, "another frame of reference"),
        ({"is_localizer": True}, "scout"),
        ({"slices": 1}, "no volume"),
        ({"is_parallel": False}, "not parallel"),
        ({"flaw": "slices missing"}, "slices missing"),
        ({"axial_min_mm": 900.0, "axial_max_mm": 1500.0}, "does not overlap"),
    ],
)
def test_unusable_ct_is_passed_over_with_its_reason(changes, why):
    """Every candidate gets a reason, and no unusable one is chosen for want of a better."""
    choice = choose_guide(PET, [ct("1", **changes)])
    assert (choice.series_uid, choice.code, choice.coverage) == (None, "no-usable-ct", 0.0)
    assert why in reasons(choice)["1"]


def test_pet_without_frame_of_reference_gets_no_ct():
    """Two empty FrameOfReferenceUIDs are not the same frame of reference."""
    lost = replace(PET, frame_of_reference_uid="")
    assert choose_guide(lost, [ct("1", frame_of_reference_uid="")]).series_uid is None


def test_two_slices_are_a_volume():
    """The least that has a spacing."""
    assert choose_guide(PET, [ct("1", slices=2)]).series_uid == "1"


@pytest.mark.parametrize(
    ("orientation", "normal"),
    [
        ((0.0, 1.0, 0.0, 0.0, 0.0, -1.0), (-1.0, 0.0, 0.0)),  # sagittal
        ((1.0, 0.0, 0.0, 0.0, 0.0, -1.0), (0.0, 1.0, 0.0)),  # coronal
        ((-1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),  # axial, mirrored
        ((0.0, 1.0, 0.0, -1.0, 0.0, 0.0), (0.0, 0.0, 1.0)),  # axial, turned in its plane
        ((0.0, 1.001, 0.0, 0.0, 0.0, 1.001), (1.0, 0.0, 0.0)),  # rounded cosines
        ((1.001, 0.0, 0.0, 0.0, 0.0, 1.001), (0.0, -1.0, 0.0)),
    ],
)
def test_normal_is_row_times_column(orientation, normal):
    """The slice normal is a unit vector, right-handed with the row and column directions."""
    assert normal_of(orientation) == pytest.approx(normal, abs=1e-12)


@pytest.mark.parametrize("orientation", [None, (1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 1.0, 0.0, 0.0), (float("nan"),) * 6])
def test_no_plane_no_normal(orientation):
    """Missing, short, parallel or not-a-number cosines span no plane."""
    assert normal_of(orientation) is None


def test_no_candidates():
    """Nothing came: said as such."""
    assert choose_guide(PET, []) == GuideChoice(None, "no-ct", "no CT came", 0.0, ())


def test_one_uid_twice_is_an_error():
    """Two candidates under one UID are a mistake of the caller."""
    with pytest.raises(ValueError, match="SeriesInstanceUID"):
        choose_guide(PET, [CT, CT])


candidates = st.lists(
    st.builds(
        SeriesGeometry,
        study_uid=st.sampled_from(["1.2.3", "1.2.4"]),
        series_uid=st.integers(1, 99).map(lambda n: f"1.2.3.{n}"),
        frame_of_reference_uid=st.sampled_from(["1.2.3.9", "1.2.3.8", ""]),
        axial_min_mm=st.floats(-500, 800),
        axial_max_mm=st.floats(-500, 1500),
        slice_thickness_mm=st.sampled_from([0.0, 1.0, 1.05, 3.0]),
        slices=st.integers(0, 400),
        is_localizer=st.booleans(),
        is_parallel=st.booleans(),
        attenuation_correction_hint=st.booleans(),
        contrast=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.series_uid,
)


@given(candidates)
def test_law_only_the_same_study_and_frame_of_reference(series):
    """Whatever else a CT offers: never another study's, never another frame of reference's, never a scout."""
    choice = choose_guide(PET, series)
    chosen = [one for one in series if one.series_uid == choice.series_uid]
    for one in chosen:
        assert (one.study_uid, one.frame_of_reference_uid) == (PET.study_uid, PET.frame_of_reference_uid)
        assert not one.is_localizer
        assert 0 < choice.coverage <= 1
    assert (choice.series_uid is None) == (not chosen)


@given(st.data(), candidates)
def test_law_order_of_candidates_does_not_matter(data, series):
    """The same candidates in any order give the same choice and the same reasons."""
    assert choose_guide(PET, data.draw(st.permutations(series))) == choose_guide(PET, series)


@given(candidates)
def test_law_every_candidate_gets_a_reason(series):
    """What was considered is all that was offered, each with a sentence."""
    choice = choose_guide(PET, series)
    assert [uid for uid, _ in choice.considered] == sorted(one.series_uid for one in series)
    assert all(reason for _, reason in choice.considered)


@given(candidates)
def test_law_nothing_usable_covers_clearly_more(series):
    """No usable CT covers the PET more than one per cent better than the chosen one."""
    choice = choose_guide(PET, series)
    alone = [choose_guide(PET, [one]).coverage for one in series]
    assert choice.coverage >= max(alone, default=0.0) - 0.01 - 1e-9


NOTHING = choose_guide(PET, [])


def wait(choice: GuideChoice, now: float, allow_unguided: bool = True) -> tuple[str, float | None]:
    decision = guide_wait(choice, completed_at=1000.0, now=now, ct_wait_s=600.0, allow_unguided=allow_unguided)
    assert decision.reason
    return decision.state, decision.until


def test_chosen_ct_is_used_at_once():
    """A match ends the waiting."""
    assert wait(choose_guide(PET, [CT]), now=1000.0) == ("use", None)


def test_missing_ct_is_waited_for_and_then_the_route_decides():
    """`ct_wait_s` after the PET was complete: unguided where the route allows it, held where not."""
    assert wait(NOTHING, now=1599.9) == ("waiting", 1600.0)
    assert wait(NOTHING, now=1600.0) == ("unguided", None)
    assert wait(NOTHING, now=1600.0, allow_unguided=False) == ("held", None)


def test_held_for_want_of_a_ct_names_the_remedy():
    """The person who finds it held learns what to do."""
    held = guide_wait(NOTHING, completed_at=0.0, now=9999.0, ct_wait_s=600.0, allow_unguided=False)
    assert "send the CT" in held.reason
