"""SUV factors: known answers, vendor rules, and refusal where something is missing."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from sop.errors import Refused
from sop.read import read_series
from sop.suv import (
    SUVFactors,
    body_surface_cm2,
    decayed_dose,
    lean_mass_hume_kg,
    lean_mass_janmahasatian_kg,
    shown_unit,
    suv_factors,
)
from sop.times import parse_date, parse_datetime, parse_time
from tests.factories import enhanced_pet, pet_series

HALF_LIFE_S = 6586.2
# Injection 10:10:00, series 11:10:00, 370 MBq, 71 kg.
AFTER_AN_HOUR = 71000 / (370e6 * 2 ** (-3600 / HALF_LIFE_S))


def pet(**options: object) -> list[Dataset]:
    """Two slices: the headers are what matters."""
    return pet_series(slices=2, rows=4, columns=4, **options)  # type: ignore[arg-type]


def with_tracer(series: list[Dataset], **attributes: str | None) -> list[Dataset]:
    """The series with other radiopharmaceutical attributes; None removes one."""
    for ds in series:
        for keyword, value in attributes.items():
            item = ds.RadiopharmaceuticalInformationSequence[0]
            if value is None:
                delattr(item, keyword)
            else:
                setattr(item, keyword, value)
    return series


def code(factor: float | Refused) -> str:
    """Code of a refused factor."""
    assert isinstance(factor, Refused), f"a factor was given: {factor}"
    return factor.code


def test_dose_decays_from_injection_to_series_time():
    """The plain case, by hand."""
    factors = suv_factors(pet())
    assert factors.bw == pytest.approx(AFTER_AN_HOUR, rel=1e-12)
    assert factors.rule == "Series Time"


def test_series_and_headers_give_the_same_factors():
    """SeriesInfo is the usual way in; headers alone do as well."""
    series = pet_series()
    assert suv_factors(read_series(series)[1]) == suv_factors(series)


def test_enhanced_pet_gives_the_factors_of_the_classic_series():
    """Dose in MBq, DecayCorrectionDateTime instead of Series Time: the same SUV."""
    assert suv_factors(read_series([enhanced_pet()])[1]) == suv_factors(read_series(pet_series())[1])


def test_enhanced_pet_corrected_to_the_injection_is_admin():
    """DecayCorrectionDateTime at the injection says what DecayCorrection ADMIN says."""
    factors = suv_factors(read_series([enhanced_pet_corrected_to("20200102101000")])[1])
    assert factors.bw == pytest.approx(71000 / 370e6)


def enhanced_pet_corrected_to(moment: str) -> Dataset:
    ds = enhanced_pet()
    ds.DecayCorrectionDateTime = moment
    return ds


def test_body_measures_are_those_of_the_published_formulas():
    """Factors to lean mass and body surface scale with the mass and surface in place of the weight."""
    factors = suv_factors(pet(PatientSex="F", PatientWeight="60", PatientSize="1.70"))
    bmi = 60 / 1.70**2
    assert factors.require("lbm_hume") == pytest.approx(
        factors.require() * (0.29569 * 60 + 0.41813 * 170 - 43.2933) / 60
    )
    assert factors.require("lbm_janmahasatian") == pytest.approx(factors.require() * 9270 / (8780 + 244 * bmi))
    assert factors.require("bsa") == pytest.approx(
        factors.require() * 71.84 * 60**0.425 * 170**0.725 / 60000
    )


def test_body_measures_lie_where_textbooks_put_them():
    """A man of 70 kg and 1.75 m: 52.8 and 55.9 kg lean, 1.85 m2; a woman of 60 kg and 1.65 m: 43.4 and 39.3 kg."""
    assert lean_mass_hume_kg(70, 1.75, "M") == pytest.approx(52.81, abs=0.01)
    assert lean_mass_janmahasatian_kg(70, 1.75, "M") == pytest.approx(55.86, abs=0.01)
    assert body_surface_cm2(70, 1.75) == pytest.approx(18481, abs=5)
    assert lean_mass_hume_kg(60, 1.65, "F") == pytest.approx(43.44, abs=0.01)
    assert lean_mass_janmahasatian_kg(60, 1.65, "F") == pytest.approx(39.29, abs=0.01)


def test_admin_does_not_decay_the_dose():
    """Values corrected to the injection meet the dose as it was injected."""
    assert suv_factors(pet(DecayCorrection="ADMIN")).bw == pytest.approx(71000 / 370e6)


def test_injection_before_midnight_is_the_day_before():
    """With a time only, 23:50 before a scan at 00:50 is an hour, not minus 23."""
    series = with_tracer(
        pet(SeriesTime="005000", AcquisitionTime="005000"),
        RadiopharmaceuticalStartDateTime=None, RadiopharmaceuticalStartTime="235000",
    )
    assert suv_factors(series).bw == pytest.approx(AFTER_AN_HOUR)


def test_fractions_of_a_second_count_whole():
    """`.05` is 50 ms, not half a second."""
    early = suv_factors(with_tracer(pet(), RadiopharmaceuticalStartDateTime="20200102101000.05")).require()
    assert early == pytest.approx(AFTER_AN_HOUR * 2 ** (-0.05 / HALF_LIFE_S), rel=1e-12)


def test_time_zone_cancels():
    """The offset applies to all times of the data set; one inside the injection's DT changes nothing."""
    series = with_tracer(pet(TimezoneOffsetFromUTC="+0100"), RadiopharmaceuticalStartDateTime="20200102101000+0100")
    assert suv_factors(series).bw == pytest.approx(AFTER_AN_HOUR)


def test_ge_scan_time_replaces_a_later_series_time():
    """A post-processed GE series says in its private block when the scan was."""
    factors = suv_factors(pet(SeriesTime="120000"))
    assert factors.bw == pytest.approx(AFTER_AN_HOUR)
    assert factors.rule == "GE scan date-time"


def test_later_series_time_is_computed_back_from_the_frames():
    """Acquisition Time plus the moment of average count rate minus Frame Reference Time is the reference."""
    factors = suv_factors(pet(vendor="SIEMENS", SeriesTime="120000"))
    assert factors.rule == "computed back from Frame Reference Time"
    assert factors.bw == pytest.approx(AFTER_AN_HOUR, rel=1e-4)  # 60 s is the frame's middle, 0.1 s off the average
    late_bed_only = suv_factors(pet(vendor="SIEMENS", SeriesTime="120000")[1:])
    assert late_bed_only.bw == pytest.approx(factors.require(), rel=1e-9)


def test_later_series_time_without_frame_times_uses_the_earliest_acquisition():
    """As viewers do."""
    factors = suv_factors(pet(vendor="SIEMENS", SeriesTime="120000", FrameReferenceTime="0"))
    assert factors.rule == "earliest Acquisition Time"
    assert factors.bw == pytest.approx(AFTER_AN_HOUR)


def test_contradicting_frame_times_are_refused():
    """Slices that point at different reference times leave no SUV."""
    series = pet(vendor="SIEMENS", SeriesTime="120000")
    series[1].FrameReferenceTime = "900000"
    assert code(suv_factors(series).bw) == "times"


def test_philips_counts_use_the_scanners_factor():
    """Counts times (7053,xx00); the factor given is for the Volume, which is in Bq/ml already."""
    volume, info = read_series(pet_series(vendor="PHILIPS", units="CNTS"))
    assert volume.unit == "Bq/ml"
    assert suv_factors(info).require() * 2.134638 == pytest.approx(0.0002683712)


def test_philips_factors_are_ignored_with_units_bqml():
    """They exist there too, and would be wrong."""
    assert suv_factors(pet(vendor="PHILIPS")).bw == pytest.approx(AFTER_AN_HOUR)


def test_philips_with_the_activity_factor_alone_goes_by_dose_and_time():
    """A SUV factor of zero is unusable; Bq/ml are then treated as such."""
    series = pet(vendor="PHILIPS", units="CNTS")
    for ds in series:
        ds.private_block(0x7053, "Philips PET Private Group")[0x00].value = "0"
    assert suv_factors(series).bw == pytest.approx(AFTER_AN_HOUR)


def test_counts_of_another_vendor_have_no_suv():
    """Nothing says what a count is."""
    assert code(suv_factors(pet(vendor="SIEMENS", units="CNTS")).bw) == "units"


def test_gml_is_suvbw_already():
    """One by body weight; nothing more is needed for it."""
    series = with_tracer(pet(units="GML", DecayCorrection="ADMIN"), RadionuclideTotalDose=None)
    assert suv_factors(series).bw == 1.0
    assert code(suv_factors(pet(units="GML", SUVType="LBM")).bw) == "units"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attenuation_corrected": False}, "not-attenuation-corrected"),
        ({"CorrectedImage": ["ATTN", "SCAT"]}, "not-decay-corrected"),
        ({"DecayCorrection": "NONE"}, "decay-correction"),
        ({"DecayCorrection": None}, "decay-correction"),
        ({"PatientWeight": "0"}, "weight-missing"),
        ({"PatientWeight": ""}, "weight-missing"),
        ({"PatientWeight": "71000"}, "weight-missing"),
        ({"RadiopharmaceuticalInformationSequence": []}, "radiopharmaceutical"),
        ({"SeriesTime": None}, "times"),
        ({"SeriesTime": "noon"}, "times"),
        ({"AcquisitionTime": None}, "times"),
        ({"units": None}, "units-missing"),
    ],
    ids=str,
)
def test_what_is_missing_is_refused(options, expected):
    """No factor at all, with the reason, the remedy and the series."""
    factors = suv_factors(pet(**options))
    for kind in ("bw", "lbm_hume", "lbm_janmahasatian", "bsa"):
        assert code(getattr(factors, kind)) == expected
    with pytest.raises(Refused) as caught:
        factors.require()
    assert caught.value.series and caught.value.remedy


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"RadionuclideTotalDose": "0"}, "dose-missing"),
        ({"RadionuclideTotalDose": None}, "dose-missing"),
        ({"RadionuclideHalfLife": None}, "half-life-missing"),
        ({"RadionuclideHalfLife": "-1"}, "half-life-missing"),
        ({"RadiopharmaceuticalStartDateTime": None, "RadiopharmaceuticalStartTime": None}, "injection-missing"),
        ({"RadiopharmaceuticalStartDateTime": "2020"}, "injection-missing"),
        ({"RadiopharmaceuticalStartDateTime": "20200102120000"}, "injection-after-scan"),
        ({"RadiopharmaceuticalStartDateTime": "20190102101000"}, "implausible-times"),
    ],
    ids=str,
)
def test_an_unusable_tracer_is_refused(attributes, expected):
    """Dose, half life and injection must make sense; one date shifted without the other does not."""
    assert code(suv_factors(with_tracer(pet(), **attributes)).bw) == expected


@pytest.mark.parametrize("keyword", ["PatientWeight", "DecayCorrection", "SeriesTime"])
def test_series_attributes_that_differ_are_refused(keyword):
    """Two weights in one series: neither is taken."""
    series = pet()
    setattr(series[1], keyword, {"PatientWeight": "80", "DecayCorrection": "ADMIN", "SeriesTime": "111001"}[keyword])
    assert code(suv_factors(series).bw) == "series-attributes-differ"


def test_missing_size_or_sex_costs_only_what_needs_it():
    """SUVbw stands without size; SUVbsa stands without sex."""
    without_size = suv_factors(pet(PatientSize=None))
    assert without_size.bw == pytest.approx(AFTER_AN_HOUR)
    assert {code(without_size.bsa), code(without_size.lbm_hume)} == {"size-missing"}
    without_sex = suv_factors(pet(PatientSex="O"))
    assert isinstance(without_sex.bsa, float)
    assert code(without_sex.lbm_janmahasatian) == "sex-missing"


def test_size_in_centimetres_is_not_believed():
    """PatientSize is in metres; 163 is refused, not divided."""
    assert code(suv_factors(pet(PatientSize="163")).bsa) == "size-missing"


@given(st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2199, 12, 31)))
def test_dates_and_times_come_back_as_they_were_written(moment):
    """DA, TM and DT to the microsecond."""
    assert parse_datetime(moment.strftime("%Y%m%d%H%M%S.%f")) == moment
    assert parse_date(moment.strftime("%Y%m%d")) + parse_time(moment.strftime("%H%M%S.%f")) == moment
    assert parse_date(moment.strftime("%Y.%m.%d")) + parse_time(moment.strftime("%H:%M:%S")) == moment.replace(
        microsecond=0
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10", timedelta(hours=10)), ("1015", timedelta(hours=10, minutes=15)), ("235960", timedelta(days=1)),
     ("101500.5 ", timedelta(hours=10, minutes=15, microseconds=500000)),
     ("101500.000005", timedelta(hours=10, minutes=15, microseconds=5))],
)
def test_short_times_and_fractions_are_read(text, expected):
    """A TM may stop after hours or minutes; padding is no part of it."""
    assert parse_time(text) == expected


@pytest.mark.parametrize("text", ["", "24", "1060", "10150", "101500.", "101500.1234567", "-1", "ten"])
def test_what_is_no_time_is_an_error(text):
    """Nothing is made of it."""
    with pytest.raises(ValueError, match="TM"):
        parse_time(text)


@given(st.floats(1e6, 1e10), st.floats(0, 50), st.floats(60, 1e6))
def test_decay_is_undone_by_growth(dose, half_lives, half_life):
    """Decaying and growing back gives the dose again."""
    elapsed = half_lives * half_life
    assert decayed_dose(decayed_dose(dose, elapsed, half_life), -elapsed, half_life) == pytest.approx(dose)


def test_factors_are_a_plain_value():
    """Equal inputs, equal factors."""
    assert isinstance(suv_factors(pet()), SUVFactors) and suv_factors(pet()) == suv_factors(pet())


@pytest.mark.parametrize(("unit", "shown"), [
    ("Bq/ml", "kBq/mL"), ("{counts}", "counts"), ("{counts}/s", "counts/s"), ("{propcounts}/s", "propcounts/s"),
    ("g/ml{SUVlbm}", "SUVlbm"), ("g/ml{SUVlbm(Janma)}", "SUVlbm(Janma)"), ("cm2/ml{SUVbsa}", "SUVbsa")])
def test_what_is_no_suvbw_is_shown_in_its_own_unit(unit: str, shown: str) -> None:
    """Never under another name, with the reason why there is no SUVbw."""
    header = pet(PatientWeight="", DecayCorrection="NONE")[0]
    name, factor, why = shown_unit(header, unit)
    assert (name, factor) == (shown, 1e-3 if unit == "Bq/ml" else 1.0) and "no SUV" in why
