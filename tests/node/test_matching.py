"""The rules on real studies: every series of the public data gets the right verdict, whole or in parts."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from dicomnode.matching import (
    Completeness,
    SeriesGeometry,
    arrival_of,
    choose_guide,
    completeness,
    eligible,
    geometry_of,
    normal_of,
)
from tests.node.matching_factories import pet_header

FOLDERS = {
    # folder: instances, eligibility, completeness once quiet
    "ge_sts001_pet_raw": (267, "pet", "complete"),
    "ge_sts001_ibsi/PET": (59, "derived", "complete"),
    "ge_sts001_ibsi/CT": (59, "guide", "complete"),
    "ge_sts035_ibsi/PET": (61, "derived", "complete"),
    "ge_sts035_ibsi/CT": (63, "guide", "complete"),
    "philips_suvval_pt": (45, "pet", "complete"),
    "philips_suvval_ct": (8, "guide", "gap"),
    "nema_iec_minimal_pet": (89, "header-incomplete", "complete"),
    "nm_jaszczak": (1, "other-sop-class", None),
}


@pytest.fixture(scope="module")
def series(shared_data: Path) -> dict[str, list[Dataset]]:
    """Headers of each series, under its folder; a folder with several series is numbered by UID."""
    found: dict[str, list[Dataset]] = {}
    for folder in (*FOLDERS, "flt_single"):
        by_uid = defaultdict(list)
        for path in sorted((shared_data / folder).glob("*.dcm")):
            header = dcmread(path, stop_before_pixels=True)
            by_uid[str(header.SeriesInstanceUID)].append(header)
        several = len(by_uid) > 1
        for number, uid in enumerate(sorted(by_uid)):
            found[f"{folder}#{number}" if several else folder] = by_uid[uid]
    return found


def quiet(headers: list[Dataset], hours: float = 1.0) -> Completeness:
    arrivals = [arrival_of(header, received_at=0.0) for header in headers]
    return completeness(arrivals, headers[0], now=hours * 3600, quiet_s=30, give_up_h=24)


def place(headers: list[Dataset], along: list[Dataset] | None = None) -> SeriesGeometry:
    normal = normal_of([float(value) for value in (along or headers)[0].ImageOrientationPatient])
    return geometry_of([arrival_of(header, received_at=0.0) for header in headers], headers[0], normal=normal)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_instance_gets_its_series_verdict(series, folder):
    """Any instance of the series may be the one that is looked at: the verdict is the same."""
    count, code, _ = FOLDERS[folder]
    verdicts = {eligible(header, own_output=False).code for header in series[folder]}
    assert len(series[folder]) == count
    assert verdicts == {code}


@pytest.mark.parametrize("folder", [name for name, (_, _, whole) in FOLDERS.items() if whole])
def test_real_series_are_whole_or_say_what_is_missing(series, folder):
    """The count and the gaps of real scanners pass; the 8 of 24 Philips CT slices do not."""
    assert quiet(series[folder]).code == FOLDERS[folder][2]


def test_refusals_say_what_and_why(series):
    """NEMA lacks Units and SeriesType, the breast FLT is DYNAMIC: held with the reason and a remedy."""
    nema = eligible(series["nema_iec_minimal_pet"][0], own_output=False)
    assert nema.kind == "refused"
    assert "Units" in nema.reason
    assert "SeriesType" in nema.reason
    verdicts = {name: eligible(series[name][0], own_output=False) for name in ("flt_single#0", "flt_single#1")}
    assert sorted((found.kind, found.code) for found in verdicts.values()) == [("pet", "pet"), ("refused", "dynamic")]
    assert all(found.remedy for found in (nema, *verdicts.values()) if found.kind == "refused")


def test_single_slices_of_large_series_wait_and_are_held(series):
    """One slice of 111 and one of 324: never a volume."""
    pair = [series["flt_single#0"], series["flt_single#1"]]
    found = [quiet(headers) for headers in pair]
    assert {(one.state, one.code) for one in found} == {("waiting", "single-slice")}
    assert {one.reason.split(" slices")[0] for one in found} == {"1 of 111", "1 of 324"}
    assert {quiet(headers, hours=24).state for headers in pair} == {"held"}


@pytest.mark.parametrize("gone", [slice(0, 1), slice(100, 101), slice(266, 267), slice(200, 267), slice(1, None, 2)])
def test_any_missing_part_of_the_whole_body_series_shows(series, gone):
    """First slice, an inner one, the last, the last bed, every second: not complete."""
    headers = sorted(series["ge_sts001_pet_raw"], key=lambda header: float(header.ImagePositionPatient[2]))
    del headers[gone]
    assert quiet(headers).state == "waiting"
    assert quiet(headers, hours=24).state == "held"


def test_real_pet_gets_the_ct_of_its_study(series):
    """The cropped CT of the same study and frame of reference covers 59 of 267 slices and is the one chosen."""
    pet = series["ge_sts001_pet_raw"]
    names = ("ge_sts001_ibsi/CT", "ge_sts035_ibsi/CT", "philips_suvval_ct")
    choice = choose_guide(place(pet), [place(series[name], along=pet) for name in names])
    assert choice.series_uid == series["ge_sts001_ibsi/CT"][0].SeriesInstanceUID
    assert choice.coverage == pytest.approx(59 * 3.27 / (267 * 3.27), abs=0.002)
    assert sum("another study" in reason for _, reason in choice.considered) == 2


def test_philips_ct_of_another_study_is_never_paired(series):
    """It lies at the heights of the PET; that does not make it a CT of this patient position."""
    pet = series["philips_suvval_pt"]
    choice = choose_guide(place(pet), [place(series["philips_suvval_ct"], along=pet)])
    assert choice.series_uid is None
    assert choice.considered == ((series["philips_suvval_ct"][0].SeriesInstanceUID, "belongs to another study"),)


def test_real_vendor_headers_are_corrected_and_quantitative(shared_data):
    """Corrections and units as eight real scanners write them are accepted; the extracts lack the rest of a header."""
    extracts = sorted((shared_data / "calculate_suv_vendor_metadata").glob("*.json"))
    assert len(extracts) == 8
    for path in extracts:
        for instance in json.loads(path.read_text()):
            header = pet_header(CorrectedImage=instance["CorrectedImage"], Units=instance["Units"])
            factors = instance.get("PhilipsPETPrivateGroup") or {}
            block = header.private_block(0x7053, "Philips PET Private Group", create=True)
            for element, name in ((0x00, "SUVScaleFactor"), (0x09, "ActivityConcentrationScaleFactor")):
                if factors.get(name):
                    block.add_new(element, "DS", str(factors[name])[:16])
            assert eligible(header, own_output=False).kind == "pet", path.name
