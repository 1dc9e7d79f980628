"""The derived PET series: each rule of geometry, values, SUV and time, and of writing whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from sop.check import check_derived
from sop.errors import Refused
from sop.pet import write_derived
from sop.read import read_series
from tests.factories import OBLIQUE, ct_series
from tests.sop.derived_series import (
    NOW,
    derivation,
    derive,
    doubled,
    read_back,
    save,
    source_series,
    values_of,
    written,
)

# Geometry


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE], ids=["axial", "oblique"])
def test_the_field_of_view_stays(orientation: tuple, tmp_path: Path) -> None:
    """Rules 1, 2: an independent reader (ITK) finds the same outer corners to a thousandth of a millimetre."""
    source = save(source_series(orientation=orientation), tmp_path / "source")
    files = derive(source, tmp_path / "derived")[0].files
    corners = [_itk_corners(paths) for paths in (source, files)]
    assert np.abs(corners[0] - corners[1]).max() < 1e-3


def _itk_image(paths: Sequence[Path]) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(paths[0].parent)))
    return reader.Execute()


def _itk_corners(paths: Sequence[Path]) -> np.ndarray:
    image = _itk_image(paths)
    ends = [(-0.5, n - 0.5) for n in image.GetSize()]
    return np.array([image.TransformContinuousIndexToPhysicalPoint((float(i), float(j), float(k)))
                     for i in ends[0] for j in ends[1] for k in ends[2]])


@pytest.mark.parametrize("name", ["ge_sts001_pet_raw", "philips_suvval_pt"])
def test_the_field_of_view_of_a_real_series_stays(name: str, shared_data: Path, tmp_path: Path) -> None:
    """Real scanners, uneven slice steps of two per cent among them; and the whole check passes."""
    source = sorted((shared_data / name).iterdir())
    files = derive(source, tmp_path / "derived")[0].files
    corners = [_itk_corners(paths) for paths in (source, files)]
    assert np.abs(corners[0] - corners[1]).max() < 1e-3
    assert check_derived(source, files).failures == ()


def test_the_same_suv_stands_at_the_same_place(tmp_path: Path) -> None:
    """Read by ITK, through the QIBA formula with each series' own header: SUV at the centres of source voxels."""
    source = save(source_series(orientation=OBLIQUE), tmp_path / "source")
    files = derive(source, tmp_path / "derived", image=lambda y: y.repeat(2, 0).repeat(2, 1).repeat(2, 2))[0].files
    before, after = _itk_image(source), _itk_image(files)
    rng = np.random.default_rng(2)
    hottest = max(values_of(ds).max() for ds in read_back(files)) * _qiba_suv_per_bqml(dcmread(files[0]))
    for index in rng.integers((0, 0, 0), before.GetSize(), (200, 3)).tolist():
        suv = before.GetPixel(index) * _qiba_suv_per_bqml(dcmread(source[0]))
        # A tenth of a voxel off the centre, where eight derived voxels meet.
        point = before.TransformContinuousIndexToPhysicalPoint([i + 0.1 for i in index])
        there = after.TransformPhysicalPointToIndex(point)
        assert after.GetPixel(there) * _qiba_suv_per_bqml(dcmread(files[0])) == pytest.approx(suv, abs=1e-4 * hottest)


def _qiba_suv_per_bqml(ds: Dataset) -> float:
    """Weight over dose decayed from injection to series time, both on the same day."""
    tracer = ds.RadiopharmaceuticalInformationSequence[0]
    start, scan = (sum(int(text[i:i + 2]) * 60 ** (2 - i // 2) for i in (0, 2, 4))
                   for text in (tracer.RadiopharmaceuticalStartTime, ds.SeriesTime))
    decayed = float(tracer.RadionuclideTotalDose) * 2 ** (-(scan - start) / float(tracer.RadionuclideHalfLife))
    return float(ds.PatientWeight) * 1000 / decayed


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spacing=st.tuples(*[st.floats(0.3, 9)] * 3), origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
       oblique=st.booleans())
def test_each_position_comes_from_the_origin(
    spacing: tuple, origin: tuple, oblique: bool, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Rules 1, 4, 8: a quarter source voxel before the source on all axes, no drift, at most 16 characters."""
    folder = tmp_path_factory.mktemp("positions")
    source = source_series(spacing=spacing, origin=origin, orientation=OBLIQUE if oblique else (1, 0, 0, 0, 1, 0))
    series, fine, _ = derive(source, folder / "derived")
    for i, ds in enumerate(read_back(series.files)):
        expected = fine.position((i, 0, 0))
        assert np.abs(np.array(ds.ImagePositionPatient, dtype=float) - expected).max() < 1e-9 * 1e4
        assert all(len(str(value)) <= 16 for value in ds.ImagePositionPatient)
    first = np.array(source[0].ImagePositionPatient, dtype=float)
    cosines = np.array(source[0].ImageOrientationPatient, dtype=float)
    step = (np.array(source[-1].ImagePositionPatient, dtype=float) - first) / (len(source) - 1)
    rows, columns = map(float, source[0].PixelSpacing)
    quarter = (step + rows * cosines[3:] + columns * cosines[:3]) / 4
    assert np.abs(fine.origin - (first - quarter)).max() < 1e-6


def test_size_and_numbering_are_those_of_the_new_grid(tmp_path: Path) -> None:
    """Rules 2 to 5: spacing and thickness halve, orientation is the source's text, indices rise with the position."""
    slices = written(tmp_path, SpacingBetweenSlices="-3.27")
    first = slices[0]
    assert len(slices) == 24
    assert (first.Rows, first.Columns) == (60, 52)
    assert list(map(str, first.PixelSpacing)) == ["2.34375", "2.0"]
    assert float(first.SliceThickness) == 1.635
    assert float(first.SpacingBetweenSlices) == pytest.approx(1.635, abs=1e-9)
    assert [ds.ImageIndex for ds in slices] == [ds.InstanceNumber for ds in slices] == list(range(1, 25))
    assert {ds.NumberOfSlices for ds in slices} == {24}
    along = [float(ds.ImagePositionPatient[2]) for ds in slices]
    assert along == sorted(along)
    source = source_series()[0]
    assert first["ImageOrientationPatient"].value == source["ImageOrientationPatient"].value


def test_spacing_between_slices_is_not_invented(tmp_path: Path) -> None:
    """Rule 4: where the source has none, there is none."""
    assert "SpacingBetweenSlices" not in written(tmp_path)[0]


@pytest.mark.parametrize(("first", "step"), [(-100.0, 3.27), (500.0, -3.27)])
def test_slice_location_counts_as_the_source_counts(first: float, step: float, tmp_path: Path) -> None:
    """Rule 4: with the table or against it."""
    source = source_series()
    for i, ds in enumerate(source):
        ds.SliceLocation = f"{first + i * step:.4f}"
    slices = read_back(derive(source, tmp_path / "derived")[0].files)
    expected = first + step * (np.arange(24) / 2 - 0.25)
    assert np.allclose([float(ds.SliceLocation) for ds in slices], expected, atol=1e-6)


def test_a_slice_location_that_follows_nothing_is_left_out(tmp_path: Path) -> None:
    """Neither guessed nor copied."""
    source = source_series()
    for i, ds in enumerate(source):
        ds.SliceLocation = str(i * i)
    assert "SliceLocation" not in read_back(derive(source, tmp_path / "derived")[0].files)[0]


def test_frame_of_reference_stays(tmp_path: Path) -> None:
    """Rule 6: the type 2 indicator is present even where the source forgot it."""
    slices = written(tmp_path, PositionReferenceIndicator=None)
    assert {ds.FrameOfReferenceUID for ds in slices} == {source_series()[0].FrameOfReferenceUID}
    assert all(ds.PositionReferenceIndicator in ("", None) for ds in slices)


def test_a_shuffled_source_gives_the_same_files(tmp_path: Path) -> None:
    """The order of arrival is no part of the result: byte for byte."""
    source = source_series()
    a = derive(source, tmp_path / "a")[0].files
    b = derive(source[::-1], tmp_path / "b")[0].files
    assert [path.name for path in a] == [path.name for path in b]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(a, b))


# Values


def test_values_come_back_to_a_hundredth_of_a_percent(tmp_path: Path) -> None:
    """Rules 12 to 14, 17: intercept 0, codes 0..32767, the rounded slope is the divisor."""
    series, fine, _ = derive(source_series(), tmp_path / "derived")
    for plane, ds in zip(fine.array, read_back(series.files)):
        assert float(ds.RescaleIntercept) == 0
        assert len(str(ds.RescaleSlope)) <= 16
        assert 0 <= ds.pixel_array.min() <= ds.pixel_array.max() <= 32767
        assert np.abs(values_of(ds) - plane).max() < 1e-4 * plane.max()
        assert (ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.SamplesPerPixel) == (16, 16, 15, 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exponent=st.floats(-25, 30), seed=st.integers(0, 1000))
def test_any_magnitude_keeps_its_precision(
    exponent: float, seed: int, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """From the smallest activity to the largest a float holds."""
    rng = np.random.default_rng(seed)
    fine = (rng.random((4, 8, 8)) * 10.0**exponent).astype(np.float32)
    series, image, _ = derive(source_series(slices=2, rows=4, columns=4, values=np.ones((2, 4, 4))),
                              tmp_path_factory.mktemp("magnitude") / "derived", image=lambda y: fine)
    for plane, ds in zip(image.array, read_back(series.files)):
        assert np.abs(values_of(ds) - plane).max() < 1e-4 * plane.max()


def test_an_empty_slice_has_a_positive_slope(tmp_path: Path) -> None:
    """Rule 13."""
    def with_empty_slice(y: np.ndarray) -> np.ndarray:
        fine = doubled(y)
        fine[5] = 0
        return fine
    slices = written(tmp_path, image=with_empty_slice)
    assert float(slices[5].RescaleSlope) > 0
    assert slices[5].pixel_array.max() == 0


def test_a_source_of_nothing_can_be_derived(tmp_path: Path) -> None:
    """All zeros in, all zeros out."""
    slices = written(tmp_path, values=np.zeros((12, 30, 26)))
    assert all(ds.pixel_array.max() == 0 and float(ds.RescaleSlope) > 0 and float(ds.WindowWidth) >= 1 for ds in slices)


def test_small_undershoots_become_zero_and_large_ones_are_refused(tmp_path: Path) -> None:
    """Rule 12: no offset, no hidden gain of activity."""
    def undershooting(size: float):
        def image(y: np.ndarray) -> np.ndarray:
            fine = doubled(y)
            fine[3, 0, :8] = -size
            return fine
        return image
    assert written(tmp_path / "small", image=undershooting(1.0))[3].pixel_array[0, 0] == 0
    with pytest.raises(Refused, match="below zero") as refused:
        written(tmp_path / "large", image=undershooting(1e6))
    assert refused.value.code == "negative-values"
    assert refused.value.series == source_series()[0].SeriesInstanceUID


def test_the_concentration_is_not_divided_among_sub_voxels(tmp_path: Path) -> None:
    """Rule 15: the mean of Bq/mL stays."""
    slices = written(tmp_path, image=lambda y: np.repeat(np.repeat(np.repeat(y, 2, 0), 2, 1), 2, 2))
    before = np.mean([values_of(ds) for ds in source_series()])
    assert np.mean([values_of(ds) for ds in slices]) == pytest.approx(before, rel=1e-4)


def test_one_window_for_the_series(tmp_path: Path) -> None:
    """Rule 18: the source's where all slices share it; else one that fits, never narrower than 1."""
    shared = written(tmp_path / "shared", WindowCenter="5000", WindowWidth="10000")
    assert {(str(ds.WindowCenter), str(ds.WindowWidth)) for ds in shared} == {("5000.0", "10000.0")}
    source = source_series()
    for i, ds in enumerate(source):
        ds.WindowCenter, ds.WindowWidth = str(100 + i), "0.5"
    fitted = read_back(derive(source, tmp_path / "fitted")[0].files)
    assert len({(str(ds.WindowCenter), str(ds.WindowWidth)) for ds in fitted}) == 1
    assert 1 <= float(fitted[0].WindowWidth) <= max(values_of(ds).max() for ds in fitted)


@pytest.mark.parametrize(("signed", "representation"), [(True, 1), (False, 0)])
def test_pixel_representation_is_the_same_throughout(signed: bool, representation: int, tmp_path: Path) -> None:
    """Rules 7, 14: the source's, and the codes read alike either way."""
    assert {ds.PixelRepresentation for ds in written(tmp_path, signed=signed)} == {representation}


# Units, SUV and time


def test_philips_counts_stay_counts_with_their_factors_in_place(tmp_path: Path) -> None:
    """Rule 16: stored x slope is counts again; creator and factors keep their fixed tags."""
    source = source_series(vendor="PHILIPS", units="CNTS", values=source_values(100.0))
    series, fine, info = derive(source, tmp_path / "derived")
    assert info.unit == "Bq/ml"
    for plane, ds in zip(fine.array, read_back(series.files)):
        assert ds.Units == "CNTS"
        assert ds[0x7053, 0x0010].value == "Philips PET Private Group"
        assert str(ds[0x7053, 0x1000].value) == "0.0002683712"
        assert str(ds[0x7053, 0x1009].value) == "2.134638"
        assert np.abs(values_of(ds) * 2.134638 - plane).max() < 1e-4 * plane.max()


def source_values(divisor: float) -> np.ndarray:
    """The usual image in smaller numbers."""
    return np.stack([values_of(ds) for ds in source_series()]) / divisor


def test_what_comes_from_the_scanner_comes_from_the_parent_slice(tmp_path: Path) -> None:
    """Rules 19 to 28: derived slice i repeats source slice i // 2, times as text, fractions too."""
    source = source_series(SeriesTime="111000.05", TimezoneOffsetFromUTC="+0100", LossyImageCompression="01",
                           LossyImageCompressionRatio="3.5", LossyImageCompressionMethod="ISO_10918_1")
    for i, ds in enumerate(source):
        ds.AcquisitionTime, ds.DecayFactor, ds.ActualFrameDuration = f"1110{i:02d}.070", f"1.{i:03d}", str(1000 + i)
    files = derive(save(source, tmp_path / "source"), tmp_path / "derived")[0].files
    for i, ds in enumerate(read_back(files)):
        parent = source[i // 2]
        for keyword in ("SeriesDate", "SeriesTime", "AcquisitionDate", "AcquisitionTime", "StudyTime",
                        "FrameReferenceTime", "DecayFactor", "ActualFrameDuration", "DecayCorrection", "CorrectedImage",
                        "PatientWeight", "PatientSize", "PatientSex", "DoseCalibrationFactor", "ScatterFractionFactor",
                        "ReconstructionMethod", "ReconstructionDiameter", "TimezoneOffsetFromUTC", "Units",
                        "LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod",
                        "RadiopharmaceuticalInformationSequence", "Manufacturer", "ManufacturerModelName",
                        "AccessionNumber", "StudyInstanceUID", "PatientID", "PatientBirthDate"):
            assert str(ds[keyword].value) == str(parent[keyword].value), keyword
        assert ds.private_block(0x0009, "GEMS_PETD_01")[0x0D].value == "20200102111000.00"


def test_the_time_of_processing_goes_where_it_belongs(tmp_path: Path) -> None:
    """Rules 19, 28, 32: creation, content and contribution time, in the time zone of the copied times."""
    ds = written(tmp_path, TimezoneOffsetFromUTC="+0130")[0]
    assert (ds.InstanceCreationDate, ds.InstanceCreationTime) == ("20260304", "063607.890000")
    assert (ds.ContentDate, ds.ContentTime) == ("20260304", "063607.890000")
    assert ds.ContributingEquipmentSequence[0].ContributionDateTime == "20260304063607.890000+0130"
    assert (ds.SeriesDate, ds.SeriesTime) == ("20200102", "111000")


@pytest.mark.parametrize(("now", "expected"), [
    (datetime(2026, 1, 2, 3, 4, 5), "20260102030405.000000"),
    (datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=-5))), "20260102030405.000000-0500"),
])
def test_without_a_time_zone_in_the_source_the_clock_is_written_as_given(
    now: datetime, expected: str, tmp_path: Path,
) -> None:
    """Nothing is guessed of the zone of the scanner."""
    assert written(tmp_path, now=now)[0].ContributingEquipmentSequence[0].ContributionDateTime == expected


def test_a_series_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    """Rule 24: two weights in one series, no SUV can be trusted; nothing is left behind."""
    source = source_series()
    source[4].PatientWeight = "93"
    with pytest.raises(Refused, match="PatientWeight") as refused:
        derive(source, tmp_path / "derived")
    assert refused.value.code == "series-attributes-differ"
    assert list(tmp_path.iterdir()) == []


def test_a_series_without_attenuation_correction_gains_none(tmp_path: Path) -> None:
    """Rule 26."""
    assert "ATTN" not in written(tmp_path, attenuation_corrected=False)[0].CorrectedImage


@pytest.mark.parametrize("options", [
    {"slices": 1, "rows": 6, "columns": 4}, {"slices": 2, "rows": 3, "columns": 2},
    {"slices": 1, "rows": 1, "columns": 1},
    {"SeriesNumber": None, "SeriesDescription": None, "SliceThickness": ""}, {"intercept": -50.0},
    {"values": np.full((12, 30, 26), 100.0)}, {"SpecificCharacterSet": None, "StudyDescription": None},
], ids=["one slice", "two slices", "one voxel", "unnumbered", "intercept", "uniform", "plain ASCII"])
def test_odd_sources_give_right_series(options: dict, tmp_path: Path) -> None:
    """Small, flat, sparsely labelled: written, and passed by the check."""
    defaults = {"values": None} if "rows" in options else {}
    source = save(source_series(**(defaults | options)), tmp_path / "source")
    files = derive(source, tmp_path / "derived")[0].files
    assert check_derived(source, files).failures == ()


@pytest.mark.parametrize("syntax", [RLELossless, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_the_transfer_syntax_of_the_source_does_not_matter(syntax: UID, tmp_path: Path) -> None:
    """Compressed, implicit, big endian: the same derived pixels and the same copied attributes."""
    expected = [(ds.PixelData, ds.PatientName) for ds in written(tmp_path / "plain", PatientName="Müller^Jörg")]
    source = source_series(PatientName="Müller^Jörg")
    paths = save(source, tmp_path / "source")
    for path, ds in zip(paths, source):
        if syntax == RLELossless:
            ds.compress(RLELossless)
        elif syntax == ExplicitVRBigEndian:
            ds.PixelData = ds.pixel_array.astype(">i2").tobytes()
        ds.file_meta.TransferSyntaxUID, ds.preamble = syntax, bytes(128)
        dcmwrite(path, ds, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian,
                 force_encoding=True)
    files = derive(paths, tmp_path / "derived")[0].files
    assert [(ds.PixelData, ds.PatientName) for ds in read_back(files)] == expected
    assert check_derived(paths, files).failures == ()


def test_only_pet_is_written_as_pet(tmp_path: Path) -> None:
    """A CT on a doubled grid is no PET series."""
    volume, info = read_series(ct_series(slices=4, rows=6, columns=6))
    with pytest.raises(Refused) as refused:
        write_derived(volume.doubled(np.zeros((8, 12, 12))), info, derivation(), tmp_path / "derived", now=NOW)
    assert refused.value.code == "not-pet"


# Whole or not at all


def test_the_same_derivation_twice_is_the_same_series(tmp_path: Path) -> None:
    """Promise 2: byte for byte, whenever; and writing into the same folder replaces it."""
    first = derive(source_series(), tmp_path / "a")[0]
    again = derive(source_series(), tmp_path / "b")[0]
    assert [path.read_bytes() for path in first.files] == [path.read_bytes() for path in again.files]
    replaced = derive(source_series(), tmp_path / "a", now=datetime(2027, 1, 1))[0]
    assert replaced.sop_instance_uids == first.sop_instance_uids
    assert sorted((tmp_path / "a").iterdir()) == sorted(replaced.files)
    assert dcmread(replaced.files[0]).ContentDate == "20270101"


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    """What is not of this series is never removed."""
    (tmp_path / "derived").mkdir()
    (tmp_path / "derived" / "letter.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"letter\.txt"):
        derive(source_series(), tmp_path / "derived")
    assert [path.name for path in (tmp_path / "derived").iterdir()] == ["letter.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the tenth file: no folder, no part of one."""
    written_files = []

    def failing(path: Path, *parts: bytes) -> None:
        written_files.append(path)
        if len(written_files) == 10:
            raise OSError(28, "No space left on device")
        path.write_bytes(b"".join(parts))

    monkeypatch.setattr("sop.pet._write_flushed", failing)
    with pytest.raises(OSError, match="No space"):
        derive(source_series(), tmp_path / "derived")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    """The next attempt begins afresh."""
    (tmp_path / ".derived.partial").mkdir()
    (tmp_path / ".derived.partial" / "junk.dcm").write_bytes(b"half")
    series = derive(source_series(), tmp_path / "derived")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["derived"]
    assert len(list((tmp_path / "derived").iterdir())) == len(series.files)


def test_an_image_of_another_grid_or_unit_is_refused(tmp_path: Path) -> None:
    """Not doubled, shifted by a quarter voxel, of another shape, in another unit: nothing is written."""
    volume, info = read_series(source_series())
    fine = volume.doubled(doubled(volume.array))
    moved = copy.copy(fine)
    object.__setattr__(moved, "origin", volume.origin)
    for image, code in ((volume, "grid"), (moved, "grid"), (fine.with_array(fine.array, unit="g/ml{SUVbw}"), "unit")):
        with pytest.raises(Refused) as refused:
            write_derived(image, info, derivation(), tmp_path / "derived", now=NOW)
        assert refused.value.code == code
    assert list(tmp_path.iterdir()) == []
