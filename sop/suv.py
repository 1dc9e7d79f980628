"""Standardised uptake values: factors by vendor rules; what is missing is refused, not guessed.

    SUVbw  = c W / D          c activity concentration, Bq/ml; W body weight, g; D = A 2^(-t / T_half) decayed dose, Bq
    SUVlbm = c LBM / D        LBM lean body mass, g
    SUVbsa = c BSA / D        BSA body surface area, cm2

t runs from the injection to the time the values are decay corrected to:
    DecayCorrection ADMIN   the injection, t = 0
    DecayCorrection START   Series Date and Time [PS3.3 C.8.9.1.1.2], unless these lie after the acquisition, as in a
                            post-processed series; then GE's private scan date-time (0009,xx0D), else the time computed
                            back from Acquisition Time and Frame Reference Time [C.8.9.4.1.5], else the earliest
                            Acquisition Time of the series.
    DecayCorrection NONE    no SUV.
Philips counts (CNTS) use the scanner's own SUV factor (7053,xx00) where it is usable. Units GML are an SUV already.

The order of these rules is that of the QIBA vendor-neutral pseudo-code for SUV. Lean body mass: [H66] Hume, J Clin
Pathol 1966;19:389, and [J05] Janmahasatian et al., Clin Pharmacokinet 2005;44:1051. Body surface: [D16] Du Bois and
Du Bois, Arch Intern Med 1916;17:863.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydicom.dataset import Dataset

from sop.errors import Refused
from sop.header import items, numbers, private_text, text, texts
from sop.kinds import vendor
from sop.series import SeriesInfo
from sop.times import parse_date, parse_datetime, parse_time
from sop.units import PHILIPS_BQML, PHILIPS_SUV, pet_scale, philips_factor

__all__ = [
    "SUVFactors", "body_surface_cm2", "decayed_dose", "lean_mass_hume_kg", "lean_mass_janmahasatian_kg", "shown_unit",
    "suv_factors",
]

GE_CREATOR, GE_SCAN_DATETIME = "GEMS_PETD_01", 0x0D
# Half lives between injection and scan beyond which the dates must be wrong (one date shifted, the other not).
MOST_HALF_LIVES = 10.0
# Slices whose reference times, computed back, lie farther apart than this do not share one.
SAME_REFERENCE_S = 2.0
NO_SUV = "correct the header at the scanner and send the series again; deblurring itself does not need it"


@dataclass(frozen=True)
class SUVFactors:
    """A Volume value times `bw` is SUVbw, and so on; a Refused tells why a factor cannot be had.

    bw                  g/ml; body weight.
    lbm_hume            g/ml; lean body mass after [H66].
    lbm_janmahasatian   g/ml; lean body mass after [J05].
    bsa                 cm2/ml; body surface area after [D16].
    rule                where the factors come from, a phrase for a report.
    """

    bw: float | Refused
    lbm_hume: float | Refused
    lbm_janmahasatian: float | Refused
    bsa: float | Refused
    rule: str

    def require(self, kind: str = "bw") -> float:
        """The factor of that name; raises the Refused where there is none."""
        factor = getattr(self, kind)
        if isinstance(factor, Refused):
            raise factor
        return float(factor)


def shown_unit(source: SeriesInfo | Dataset | Sequence[Dataset], unit: str) -> tuple[str, float, str]:
    """(unit that people read, what a Volume value is multiplied by for it, why it is not SUVbw).

    SUVbw where the headers lead to it, else kBq/mL for Bq/ml, else what the Volume is in, without UCUM's braces.
    source   what `suv_factors` takes;  unit  of the Volume.

    >>> header = Dataset(); header.Units, header.CorrectedImage, header.SUVType = "GML", ["ATTN"], "LBM"
    >>> shown_unit(header, "g/ml{SUVlbm}")[:2], shown_unit(header, "{counts}/s")[:2]
    (('SUVlbm', 1.0), ('counts/s', 1.0))
    """
    bw = suv_factors(source).bw
    if not isinstance(bw, Refused):
        return "SUVbw", float(bw), ""
    if unit == "Bq/ml":
        return "kBq/mL", 1e-3, bw.reason
    before, _, annotation = unit.partition("{")
    return (annotation.rstrip("}") if before else unit.replace("{", "").replace("}", "")) or unit, 1.0, bw.reason


def lean_mass_hume_kg(weight_kg: float, size_m: float, sex: str) -> float:
    """Lean body mass after [H66], sex "M" or "F".

    >>> round(lean_mass_hume_kg(75.0, 1.85, "M"), 2)
    57.84
    """
    if sex == "M":
        return 0.3281 * weight_kg + 0.33929 * size_m * 100 - 29.5336
    return 0.29569 * weight_kg + 0.41813 * size_m * 100 - 43.2933


def lean_mass_janmahasatian_kg(weight_kg: float, size_m: float, sex: str) -> float:
    """Lean body mass after [J05], sex "M" or "F".

    >>> round(lean_mass_janmahasatian_kg(75.0, 1.85, "M"), 4)
    60.9153
    """
    bmi = weight_kg / size_m**2
    if sex == "M":
        return 9270 * weight_kg / (6680 + 216 * bmi)
    return 9270 * weight_kg / (8780 + 244 * bmi)


def body_surface_cm2(weight_kg: float, size_m: float) -> float:
    """Body surface area after [D16]: 71.84 W^0.425 H^0.725 with H in cm.

    >>> round(body_surface_cm2(75.0, 1.85), 2)
    19813.76
    """
    return 71.84 * weight_kg**0.425 * (size_m * 100) ** 0.725


def decayed_dose(dose_bq: float, elapsed_s: float, half_life_s: float) -> float:
    """Activity left after `elapsed_s`, Bq: A 2^(-t / T_half).

    >>> decayed_dose(4e8, 6586.2, 6586.2)
    200000000.0
    """
    return dose_bq * 2.0 ** (-elapsed_s / half_life_s)


def suv_factors(source: SeriesInfo | Dataset | Sequence[Dataset]) -> SUVFactors:
    """Factors for values in the unit of the Volume that `read_series` makes of the series.

    source   a SeriesInfo, or headers of one PET series: all of them where Series Time may lie after Acquisition Time.

    Never raises for missing information: the Refused stands in the field.

    >>> header = Dataset(); header.Units, header.CorrectedImage = "GML", ["ATTN", "DECY"]
    >>> suv_factors(header).require("bw")
    1.0
    >>> header.Units = "BQML"
    >>> suv_factors(header).bw.code
    'weight-missing'
    """
    headers = _headers(source)
    study, series = text(headers[0], "StudyInstanceUID"), text(headers[0], "SeriesInstanceUID")
    try:
        unit = source.unit if isinstance(source, SeriesInfo) else pet_scale(headers).unit
        bw, rule = _bw(headers, unit)
    except Refused as refusal:
        named = refusal.of(study, series)
        return SUVFactors(named, named, named, named, "none")
    try:
        weight = _positive(headers[0], "PatientWeight", "weight-missing", most=700.0)
        size = _positive(headers[0], "PatientSize", "size-missing", most=3.0)
    except Refused as refusal:
        named = refusal.of(study, series)
        return SUVFactors(bw, named, named, named, rule)
    surface = bw * body_surface_cm2(weight, size) / (weight * 1000)
    sex = text(headers[0], "PatientSex").upper()
    if sex not in ("M", "F"):
        named = _refused("sex-missing", "lean body mass needs PatientSex M or F").of(study, series)
        return SUVFactors(bw, named, named, surface, rule)
    hume, janmahasatian = lean_mass_hume_kg(weight, size, sex), lean_mass_janmahasatian_kg(weight, size, sex)
    if not 0 < hume < weight:
        named = _refused("body-size", f"weight and size give a lean mass of {hume:.1f} kg after Hume").of(study, series)
        return SUVFactors(bw, named, bw * janmahasatian / weight, surface, rule)
    return SUVFactors(bw, bw * hume / weight, bw * janmahasatian / weight, surface, rule)


def _headers(source: SeriesInfo | Dataset | Sequence[Dataset]) -> list[Dataset]:
    if isinstance(source, SeriesInfo):
        return [item.header for item in source.slices]
    return [source] if isinstance(source, Dataset) else list(source)


def _refused(code: str, reason: str) -> Refused:
    return Refused(code, f"no SUV: {reason}", NO_SUV)


def _bw(headers: Sequence[Dataset], unit: str) -> tuple[float, str]:
    """The factor to SUVbw and the rule it came by. Raises Refused."""
    first = headers[0]
    for keyword in ("PatientWeight", "PatientSize", "PatientSex", "Units", "DecayCorrection", "SeriesDate",
                    "SeriesTime", "CorrectedImage", "TimezoneOffsetFromUTC", "SUVType"):
        if len({text(header, keyword) for header in headers}) > 1:
            raise _refused("series-attributes-differ", f"{keyword} differs within the series")
    corrections = set(texts(first, "CorrectedImage"))
    if "ATTN" not in corrections:
        raise _refused("not-attenuation-corrected", "CorrectedImage does not hold ATTN")
    if unit == "g/ml{SUVbw}" and text(first, "Units").upper() != "CNTS":
        return 1.0, "the series is in SUVbw"
    if text(first, "Units").upper() == "CNTS":
        factor = _philips_bw(headers, unit)
        if factor is not None:
            return factor, "scanner's own factor (Philips)"
    if unit != "Bq/ml":
        raise _refused("units", f"values in {unit} do not lead to SUVbw")
    if "DECY" not in corrections:
        raise _refused("not-decay-corrected", "CorrectedImage does not hold DECY")
    weight = _positive(first, "PatientWeight", "weight-missing", most=700.0)
    dose, rule = _decayed(headers)
    return weight * 1000 / dose, rule


def _philips_bw(headers: Sequence[Dataset], unit: str) -> float | None:
    suv = {philips_factor(header, PHILIPS_SUV) for header in headers}
    bqml = {philips_factor(header, PHILIPS_BQML) for header in headers}
    if None in suv:
        return None
    if unit == "g/ml{SUVbw}":
        return 1.0
    if len(suv) > 1 or len(bqml) > 1 or None in bqml:
        raise _refused("series-attributes-differ", "the Philips factors differ within the series")
    return float(suv.pop() or 0.0) / float(bqml.pop() or 1.0)


def _decayed(headers: Sequence[Dataset]) -> tuple[float, str]:
    """Dose at the time the values stand for, Bq. Raises Refused."""
    first = headers[0]
    tracers = {_tracer_key(header) for header in headers}
    isotopes = items(first, "RadiopharmaceuticalInformationSequence")
    if len(tracers) > 1 or len(isotopes) != 1:
        raise _refused("radiopharmaceutical", "one item of RadiopharmaceuticalInformationSequence is needed, the same "
                       f"in all slices; there are {max(len(tracers), len(isotopes))}")
    tracer = isotopes[0]
    dose = _positive(tracer, "RadionuclideTotalDose", "dose-missing", most=1e12)
    decay = text(first, "DecayCorrection").upper()
    if decay == "ADMIN":
        return dose, "decay corrected to administration"
    if decay != "START":
        raise _refused("decay-correction", f"DecayCorrection is {decay or 'missing'}, START or ADMIN is needed")
    half_life = _positive(tracer, "RadionuclideHalfLife", "half-life-missing", most=1e9)
    scan, rule = _reference_time(headers, half_life)
    elapsed = (scan - _injection(tracer, first, scan)).total_seconds()
    if elapsed < 0:
        raise _refused("injection-after-scan", f"the injection is dated {-elapsed:.0f} s after the scan")
    if elapsed > MOST_HALF_LIVES * half_life:
        raise _refused("implausible-times", f"the injection is dated {elapsed / half_life:.0f} half lives before scan")
    return decayed_dose(dose, elapsed, half_life), rule


def _tracer_key(header: Dataset) -> tuple[str, ...]:
    keywords = ("RadionuclideTotalDose", "RadionuclideHalfLife", "RadiopharmaceuticalStartTime",
                "RadiopharmaceuticalStartDateTime")
    isotopes = items(header, "RadiopharmaceuticalInformationSequence")
    return tuple(text(item, keyword) for item in isotopes for keyword in keywords)


def _positive(dataset: Dataset, keyword: str, code: str, *, most: float) -> float:
    if not text(dataset, keyword):
        raise _refused(code, f"{keyword} is missing")
    value = numbers(dataset, keyword, 1)[0]
    if not 0 < value <= most:
        raise _refused(code, f"{keyword} {value:g} is not above 0 and up to {most:g}")
    return value


def _moment(dataset: Dataset, date_keyword: str, time_keyword: str) -> datetime | None:
    date, time = text(dataset, date_keyword), text(dataset, time_keyword)
    if not date or not time:
        return None
    try:
        return parse_date(date) + parse_time(time)
    except ValueError as error:
        raise _refused("times", f"{date_keyword} and {time_keyword} are not a date and a time") from error


def _reference_time(headers: Sequence[Dataset], half_life_s: float) -> tuple[datetime, str]:
    """The moment START values are corrected to, and the rule. Raises Refused "times"."""
    series = _moment(headers[0], "SeriesDate", "SeriesTime")
    acquired = [_moment(header, "AcquisitionDate", "AcquisitionTime") for header in headers]
    known = [moment for moment in acquired if moment is not None]
    if series is None or len(known) < len(headers):
        raise _refused("times", "Series or Acquisition Date and Time are missing")
    if series <= min(known):
        return series, "Series Time"
    private = _ge_scan_time(headers[0])
    if private is not None:
        return private, "GE scan date-time"
    back = [_computed_back(header, moment, half_life_s) for header, moment in zip(headers, known, strict=True)]
    moments = [moment for moment in back if moment is not None]
    if len(moments) < len(headers):
        return min(known), "earliest Acquisition Time"
    if (max(moments) - min(moments)).total_seconds() > SAME_REFERENCE_S:
        apart_s = (max(moments) - min(moments)).total_seconds()
        raise _refused("times", "Series Time lies after the acquisition, and the reference times computed back from "
                       f"the slices lie {apart_s:.0f} s apart")
    return min(moments), "computed back from Frame Reference Time"


def _ge_scan_time(header: Dataset) -> datetime | None:
    try:
        return parse_datetime(private_text(header, 0x0009, GE_CREATOR, GE_SCAN_DATETIME))
    except ValueError:
        return None


def _computed_back(header: Dataset, acquired: datetime, half_life_s: float) -> datetime | None:
    """Acquisition start, plus the frame's effective time, minus Frame Reference Time; None where these are not given.

    Frame Reference Time points at the moment of average count rate, t = ln(x / (1 - e^-x)) / lambda with
    x = lambda * duration; GE counts it from the start of the frame instead (measured on a Discovery ST).
    """
    if not text(header, "FrameReferenceTime") or not text(header, "ActualFrameDuration"):
        return None
    offset_s = numbers(header, "FrameReferenceTime", 1)[0] / 1000
    duration_s = numbers(header, "ActualFrameDuration", 1)[0] / 1000
    if offset_s <= 0 or duration_s <= 0:
        return None
    decay = math.log(2) / half_life_s
    x = decay * duration_s
    effective_s = 0.0 if vendor(header) == "GE" else math.log(x / -math.expm1(-x)) / decay
    return acquired + timedelta(seconds=effective_s - offset_s)


def _injection(tracer: Dataset, header: Dataset, scan: datetime) -> datetime:
    """Start of the injection. With only a time, the date is the series date, or the day before where that would lie
    after the scan. Raises Refused "injection-missing"."""
    whole, time = text(tracer, "RadiopharmaceuticalStartDateTime"), text(tracer, "RadiopharmaceuticalStartTime")
    try:
        if whole:
            return parse_datetime(whole)
        if not time:
            raise _refused("injection-missing", "RadiopharmaceuticalStartDateTime and StartTime are missing")
        moment = parse_date(text(header, "SeriesDate")) + parse_time(time)
    except Refused:
        raise
    except ValueError as error:
        raise _refused("injection-missing", "the radiopharmaceutical start is not a date and time") from error
    return moment if moment <= scan else moment - timedelta(days=1)
