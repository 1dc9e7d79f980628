"""The measurement report: read back it says the very same numbers, of the very same instances."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from highdicom.sr import srread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from sop.derivation import is_own_output
from sop.errors import Refused
from sop.kernel import kernel_object
from sop.mapping import mapping_object, real_world_slopes
from sop.picture import picture_objects
from sop.report import report_object
from sop.suv import suv_factors
from tests.dciodvfy import entity_errors, iod_errors
from tests.factories import enhanced_pet, pet_series
from tests.sop.companion_origin import KERNEL_SPACING, kernel, origin, read, told
from tests.sop.derived_series import source_series, values_of


def groups_of(content: bytes) -> Any:
    """Measurement groups of a report by highdicom, in order."""
    report: Any = srread(io.BytesIO(content)).content
    return report.get_image_measurement_groups()


@pytest.fixture
def groups(tmp_path: Path) -> Any:
    """Those of the whole report; the last ones are the regions'."""
    made = origin(tmp_path)
    return groups_of(report_object(told(), made, made.series("report"), mapping=made.series("mapping")))


def numbers(group: Any) -> dict[str, tuple[float, str]]:
    """Name (and derivation) -> (value, unit)."""
    return {" ".join([one.name.meaning, *([one.derivation.meaning] if one.derivation else [])]):
            (one.value, one.unit.value) for one in group.get_measurements()}


def test_the_whole_series_is_reported_with_its_numbers(groups: Any) -> None:
    """Kernel FWHM per axis, activity change in percent, residual in the display unit, meant for research."""
    found = numbers(groups[0])
    along = [f"FWHM of the kernel on the PET's voxels, from {axis} to {axis}" for axis in ("slice", "row", "column")]
    assert [found[name] for name in along] == [
        (5.501, "mm"), (6.002, "mm"), (6.253, "mm")]
    assert found["Change of total activity by deconvolution"] == (100 * 0.000123, "%")
    assert found["Residual after blurring again, root mean square"] == (0.0456, "g/ml{SUVbw}")
    (use,) = groups[0].get_qualitative_evaluations()
    assert (use.value.value, use.value.scheme_designator) == ("113009", "DCM")


def test_every_gate_tells_what_was_measured_and_whether_it_passed(groups: Any) -> None:
    """Gates whose names begin or end alike keep codes of their own; a value that is no number is left out."""
    measured, verdicts = groups[1].get_measurements(), groups[1].get_qualitative_evaluations()
    assert [(one.value, one.unit.value) for one in measured] == [(0.0012, "1"), (0.03, "1"), (0.011, "1"), (6.25, "mm")]
    assert [one.value.meaning for one in verdicts] == ["Succeeded"] * 4 + ["Failed"]
    assert len({one.name.value for one in verdicts}) == 5


def test_each_region_is_measured_before_and_after_at_one_place(groups: Any, tmp_path: Path) -> None:
    """SUVmax, SUVmean, SUVpeak with the standard's codes, to the last bit; one tracking UID for both."""
    before, after = groups[2:4]
    names = ("SUVbw Maximum", "SUVbw Mean", "SUVbw Peak Value Within ROI")
    region = told()["looks"]["regions"][0]
    for group, when in ((before, "before"), (after, "after")):
        found = numbers(group)
        assert [found[name] for name in names] == [
            (region[when][key], "g/ml{SUVbw}") for key in ("max", "mean", "peak")]
        assert found["Volume"] == (3.25, "ml")
        (point,) = group.get_measurements()[3].referenced_coordinates
        assert not any(one.referenced_coordinates for one in group.get_measurements()[:3])  # not the hottest place
        assert point.value.tolist() == [[1.5, -20.25, -80.0]] and point.graphic_type.value == "POINT"
        assert group.get_measurements()[0].name == codes.DCM.Suvbw
    assert before.tracking_uid == after.tracking_uid != groups[4].tracking_uid
    assert before.tracking_identifier == "region 1"


def test_each_region_names_the_slice_it_was_measured_in(groups: Any, tmp_path: Path) -> None:
    """Before: the source slice. After: that of its two derived slices that lies nearer to the centre."""
    made = origin(tmp_path, name="again")
    (before,), (after,) = groups[2].source_images, groups[3].source_images
    assert before.referenced_sop_instance_uid == made.source.slices[5].sop_instance_uid
    near = min(made.headers[10:12], key=lambda one: abs(float(one.ImagePositionPatient[2]) - -80.0))
    assert after.referenced_sop_instance_uid == near.SOPInstanceUID


def test_a_report_without_suv_says_its_unit(tmp_path: Path) -> None:
    """Without weight there is no SUV: activity concentration, and no mapping that could be referred to."""
    made = origin(tmp_path)
    content = report_object(told(unit="kBq/mL"), made, made.series("report"), mapping=None)
    group = groups_of(content)[2]
    assert numbers(group)["Nuclear Medicine Tomographic Activity Maximum"] == (16.2, "kBq/ml")


@pytest.mark.parametrize("name", ["SUVlbm", "SUVlbm(Janma)", "SUVlbm(James128)", "SUVbsa", "SUVibw"])
def test_another_suv_has_its_own_code(tmp_path: Path, name: str) -> None:
    """CID 85 has a quantity and a unit for each."""
    made = origin(tmp_path)
    group = groups_of(report_object(told(unit=name), made, made.series("report"), mapping=None))[2]
    found = numbers(group)[f"{name} Maximum"]
    assert found[0] == 16.2 and found[1].endswith(f"/ml{{{name}}}")


def test_a_method_without_a_kernel_reports_none(tmp_path: Path) -> None:
    """An interpolation has no FWHM, and nothing was blurred again; all else is there."""
    made = origin(tmp_path)
    content = report_object(told(kernel=None), made, made.series("report"), mapping=None)
    group = groups_of(content)[0]
    assert not [name for name in numbers(group) if "FWHM" in name or "blurring" in name]
    assert numbers(group)["Source minus means of the image over its voxels, RMS"] == (0.0456, "g/ml{SUVbw}")


def test_the_report_rests_on_all_instances_of_both_series(tmp_path: Path) -> None:
    """Evidence: every source and derived instance and the mapping, each once."""
    made = origin(tmp_path)
    ds = read(report_object(told(), made, made.series("report"), mapping=made.series("mapping")))
    (study,) = ds.CurrentRequestedProcedureEvidenceSequence
    found = {item.SeriesInstanceUID: [one.ReferencedSOPInstanceUID for one in item.ReferencedSOPSequence]
             for item in study.ReferencedSeriesSequence}
    assert sorted(found.pop(made.source.series)) == sorted(made.source.sop_instance_uids)
    assert sorted(found.pop(made.derived.series_instance_uid)) == sorted(made.derived.sop_instance_uids)
    assert list(found) == [made.series("mapping").series_instance_uid] and study.StudyInstanceUID == made.source.study


@pytest.mark.parametrize("kind", ["report", "mapping"])
def test_the_standard_finds_no_fault(tmp_path: Path, kind: str) -> None:
    """dciodvfy: no error; dcentvfy: one study with source and derived series."""
    made = origin(tmp_path)
    content = (mapping_object(made, made.series(kind)) if kind == "mapping"
               else report_object(told(), made, made.series(kind), mapping=made.series("mapping")))
    path = tmp_path / "companion.dcm"
    path.write_bytes(content)
    assert not iod_errors(path) and not entity_errors([path, *made.derived.files], tmp_path)


def test_the_patient_is_copied_byte_for_byte_and_the_equipment_is_ours(tmp_path: Path) -> None:
    """A name beyond ASCII survives in its character set; who made it is told, and we know it again."""
    source = source_series(SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jürgen", AccessionNumber="A-17",
                           StudyDescription="Ganzkörper")
    made = origin(tmp_path, source=source, institution="Klinik für Radiologie", station="NODE1")
    ds = read(report_object(told(), made, made.series("report"), mapping=None))
    assert str(ds.PatientName) == "Müller^Jürgen" and ds.SpecificCharacterSet == "ISO_IR 100"
    assert (ds.AccessionNumber, ds.StudyDescription, ds.StudyInstanceUID) == ("A-17", "Ganzkörper", made.source.study)
    assert (ds.Manufacturer, ds.SoftwareVersions, ds.StationName) == ("dicomnode", "1.2.3", "NODE1")
    assert ds.InstitutionName == "Klinik für Radiologie"
    assert is_own_output(ds) and (ds.Modality, ds.SeriesDescription) == ("SR", "NBD report")
    assert (ds.ContentDate, ds.SeriesTime) == ("20260304", "050607.890000")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing is drawn or read from the machine's clock; UIDs lie below the site's root."""
    first, second = (origin(tmp_path, name=name, uid_root="1.2.826.0.1.3680043.10") for name in ("one", "two"))
    made = [report_object(told(), one, one.series("report"), mapping=one.series("mapping")) for one in (first, second)]
    assert made[0] == made[1]
    assert read(made[0]).SOPInstanceUID.startswith("1.2.826.0.1.3680043.10.")
    assert len({first.series(kind).series_instance_uid for kind in ("report", "mapping", "kernel", "pictures")}) == 4


def test_series_numbers_never_meet(tmp_path: Path) -> None:
    """Two derived series next to each other, and a number that is taken: all companions differ."""
    kinds = ("report", "mapping", "kernel", "pictures")
    neighbours = [origin(tmp_path, source=source_series(SeriesNumber=number), name=str(number)) for number in (5, 6)]
    found = [one.series(kind).series_number for one in neighbours for kind in kinds]
    assert len({*found, *(one.derived.series_number for one in neighbours)}) == 10
    taken = origin(tmp_path, name="taken", taken_series_numbers=frozenset({10051}))
    numbers = [taken.series(kind).series_number for kind in kinds]
    assert 10051 not in numbers and len(set(numbers)) == 4
    late = origin(tmp_path, source=source_series(SeriesNumber=2147480000), name="late")
    assert all(late.derived.series_number < late.series(kind).series_number < 2**31 for kind in kinds)


def bare() -> list[Dataset]:
    """A source that lacks what it may lack: type 2 attributes of patient and study."""
    source = source_series()
    for ds in source:
        for keyword in ("StudyID", "ReferringPhysicianName", "PatientBirthDate", "AccessionNumber", "StudyTime"):
            del ds[keyword]
    return source


ODD = {
    "enhanced": lambda: [enhanced_pet(slices=12)],
    "suv": lambda: pet_series(slices=12, units="GML"),
    "japanese": lambda: source_series(SpecificCharacterSet=["", "ISO 2022 IR 87"],
                                      PatientName="Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"),
    "bare": bare,
}


@pytest.mark.parametrize("kind", ODD)
def test_every_companion_of_an_odd_source_is_without_fault(tmp_path: Path, kind: str) -> None:
    """Frames of one instance, values that are SUV already, two character sets, empty patients."""
    source = ODD[kind]()
    made = origin(tmp_path, source=source)
    contents = [report_object(told(), made, made.series("report"), mapping=made.series("mapping")),
                mapping_object(made, made.series("mapping")),
                kernel_object(kernel(), KERNEL_SPACING, made, made.series("kernel")),
                *picture_objects([("white", np.full((9, 7, 3), 255, np.uint8))], made, made.series("pictures"))]
    paths = [tmp_path / f"{number}.dcm" for number in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
        assert not iod_errors(path)
        assert read(content).PatientName == source[0].PatientName
    assert not entity_errors([*paths, *made.derived.files], tmp_path)


def test_an_update_and_another_method_are_told_in_the_description(tmp_path: Path) -> None:
    """As the derived series tells it: a list of series at the PACS shows which belong together."""
    update = origin(tmp_path, name="update", series_description="NBD deblurred (update 2)")
    assert update.series("report").series_description == "NBD report (update 2)"
    other = origin(tmp_path, name="other", method="tv", preset="preview")
    assert other.series("mapping").series_description == "tv SUV mapping (preview)"


# --- the mapping to SUVbw


@pytest.mark.parametrize("vendor", ["GE", "SIEMENS", "PHILIPS"])
def test_the_mapping_gives_the_suv_of_sop_suv_in_every_slice(tmp_path: Path, vendor: str) -> None:
    """Stored value times RealWorldValueSlope is rescaled value times the factor of sop.suv, slice by slice."""
    made = origin(tmp_path, source=pet_series(vendor=vendor, units="CNTS" if vendor == "PHILIPS" else "BQML"))
    ds = read(mapping_object(made, made.series("mapping")))
    factor = suv_factors(made.source).require("bw")
    items = {item.ReferencedImageSequence[0].ReferencedSOPInstanceUID: item.RealWorldValueMappingSequence[0]
             for item in ds.ReferencedImageRealWorldValueMappingSequence}
    assert len(items) == len(made.headers)
    for index, path in enumerate(made.derived.files):
        image = read(path.read_bytes())
        mapped = image.pixel_array * items[image.SOPInstanceUID].RealWorldValueSlope
        expected = values_of(image) * made.source.slices[index // 2].factor * factor
        assert mapped == pytest.approx(expected, rel=1e-12, abs=0)
        assert items[image.SOPInstanceUID].MeasurementUnitsCodeSequence[0].CodeValue == "g/ml{SUVbw}"
    assert len(set(real_world_slopes(made).values())) > 1, "slopes differ from slice to slice"


def test_there_is_no_mapping_where_there_is_no_suv(tmp_path: Path) -> None:
    """Without weight the mapping is refused, not guessed."""
    made = origin(tmp_path, source=source_series(PatientWeight=""))
    with pytest.raises(Refused, match="PatientWeight"):
        mapping_object(made, made.series("mapping"))
