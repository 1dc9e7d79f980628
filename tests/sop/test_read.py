"""read_series: one grid or a reason why not, on synthetic series."""

from __future__ import annotations

import copy
import pickle
import random
from functools import cache
from io import BytesIO
from pathlib import Path

import gdcm
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from scipy.spatial.transform import Rotation

from sop.errors import Refused
from sop.read import read_series
from tests.factories import (
    OBLIQUE,
    ct_series,
    decimal,
    enhanced_pet,
    nm_tomo,
    normal,
    pet_series,
    sphere_image,
)


def save(datasets: list[Dataset], folder: Path) -> list[Path]:
    """The data sets as files, named so that the folder order is not the slice order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for ds in datasets:
        path = folder / f"{str(ds.SOPInstanceUID)[-8:]}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def refusal(sources: object, **options: str) -> Refused:
    """The Refused that reading raises."""
    with pytest.raises(Refused) as caught:
        read_series(sources, **options)  # type: ignore[arg-type]
    return caught.value


def test_values_are_rescaled_by_each_slices_own_slope():
    """Every voxel is stored value times the slope of its slice, within half a quantum of what was written."""
    series = pet_series(slices=6)
    volume, info = read_series(series)
    expected = sphere_image((6, 16, 14))
    quantum = np.array([item.slope for item in info.slices])[:, None, None]
    assert len({item.slope for item in info.slices}) == 6
    assert np.all(np.abs(volume.array - expected) <= 0.5 * quantum + 1e-6 * expected)
    assert volume.unit == "Bq/ml" and info.source_units == "BQML" and set(info.to_source_units) == {1.0}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    spacing=st.tuples(st.floats(0.8, 6), st.floats(0.5, 8), st.floats(0.5, 8)),
    origin=st.tuples(*[st.floats(-900, 900)] * 3),
    slices=st.integers(2, 9),
    repeats=st.integers(0, 3),
)
def test_any_orientation_order_and_repetition_give_the_same_volume(seed, spacing, origin, slices, repeats):
    """A stack turned anyhow, shuffled and partly sent twice is read as the grid it was made on."""
    orientation = Rotation.random(random_state=seed).as_matrix()[:, :2].T.ravel().tolist()
    series = pet_series(slices=slices, rows=4, columns=5, spacing=spacing, origin=origin, orientation=orientation)
    shuffled = series + [copy.deepcopy(ds) for ds in series[:repeats]]
    random.Random(seed).shuffle(shuffled)
    volume, info = read_series(shuffled)
    assert np.allclose(volume.spacing, spacing, atol=1e-4)
    assert np.allclose(volume.origin, origin, atol=1e-4)
    assert np.allclose(volume.direction[:, 0], normal(orientation), atol=1e-4)
    assert np.allclose(volume.direction[:, 1], orientation[3:], atol=1e-6)
    assert np.allclose(volume.direction[:, 2], orientation[:3], atol=1e-6)
    assert info.sop_instance_uids == tuple(str(ds.SOPInstanceUID) for ds in series)
    assert np.array_equal(volume.array, read_series(series)[0].array)
    along = [float(np.dot(item.position, normal(orientation))) for item in info.slices]
    assert along == sorted(along)


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE], ids=["axial", "oblique"])
def test_simpleitk_sees_the_same_values_at_the_same_places(tmp_path, orientation):
    """The library most clients build on agrees about every voxel value and position."""
    paths = save(pet_series(slices=7, orientation=orientation, spacing=(3.0, 4.0, 5.0)), tmp_path)
    volume, info = read_series(paths)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path), info.series))
    reader.SetOutputPixelType(sitk.sitkFloat64)
    image = reader.Execute()
    assert np.allclose(sitk.GetArrayFromImage(image), volume.array, rtol=1e-6)
    for index in [(0, 0, 0), (6, 15, 13), (3, 2, 9)]:
        there = image.TransformIndexToPhysicalPoint([index[2], index[1], index[0]])
        assert np.allclose(there, volume.position(index), atol=1e-3)


def test_header_is_kept_as_it_came(tmp_path):
    """Number strings, private elements in their block, and everything but pixel data come through unchanged."""
    ds = pet_series(slices=1, PatientWeight="71.00", RescaleSlope="1.50000")[0]
    ds.add_new(0x00110010, "LO", "SITE")
    ds.add_new(0x001110AA, "UN", b"\x01\x02\x03\x00")
    path = save([ds], tmp_path)[0]
    before = copy.deepcopy(ds)
    header = read_series([path])[1].first
    assert "PixelData" not in header
    assert header.PatientWeight.original_string == "71.00"
    assert header[0x001110AA].value == b"\x01\x02\x03\x00"
    assert header.private_block(0x0009, "GEMS_PETD_01")[0x0D].value == "20200102111000.00"
    again = dcmread(path)
    del again.PixelData
    assert {e.tag: (e.VR, e.value) for e in header} == {e.tag: (e.VR, e.value) for e in again}
    read_series([ds])
    assert ds == before


def test_orientation_and_spacing_are_the_strings_that_were_written():
    """The writer can copy them without losing a digit."""
    series = pet_series(slices=3, PixelSpacing=["4.6875000", "4.07283"], ImageOrientationPatient=list("100010"))
    info = read_series(series)[1]
    assert info.pixel_spacing == ("4.6875000", "4.07283")
    assert info.orientation == ("1", "0", "0", "0", "1", "0")


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless], ids=lambda uid: uid.name)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_compressed_series_equal_the_native_one(tmp_path, syntax, signed):
    """JPEG 2000, JPEG-LS and RLE decode to the very same values."""
    series = pet_series(slices=3, rows=64, columns=64, signed=signed)
    native = read_series(series)[0]
    for ds in series:
        ds.compress(syntax, generate_instance_uid=False)
    volume, _ = read_series(save(series, tmp_path))
    assert np.array_equal(volume.array, native.array)


def jpeg_lossless(paths: list[Path]) -> None:
    """Rewrite the files as JPEG Lossless SV1, the most common compressed syntax of archives."""
    for path in paths:
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()


def test_jpeg_lossless_series_equals_the_native_one(tmp_path):
    """Decoded in a process of its own, from files and from memory."""
    series = pet_series(slices=3, rows=32, columns=32)
    native = read_series(series)[0]
    paths = save(series, tmp_path)
    jpeg_lossless(paths)
    assert dcmread(paths[0]).file_meta.TransferSyntaxUID == JPEGLosslessSV1
    assert np.array_equal(read_series(paths)[0].array, native.array)
    assert np.array_equal(read_series([dcmread(path) for path in paths])[0].array, native.array)


def test_damaged_jpeg_that_ends_its_decoder_is_refused(tmp_path):
    """GDCM ends its process over some streams; ours goes on and reads the next series."""
    paths = save(pet_series(slices=1, rows=32, columns=32), tmp_path)
    jpeg_lossless(paths)
    whole = paths[0].read_bytes()
    scan = whole.index(b"\xff\xc3")  # start of frame of the lossless process
    paths[0].write_bytes(whole[: scan + 4] + b"\x63" + whole[scan + 5 :])
    assert refusal(paths).code == "undecodable"
    paths[0].write_bytes(whole)
    assert read_series(paths)[0].shape == (1, 32, 32)


def test_deflated_and_big_endian_series_equal_the_native_one(tmp_path):
    """Transfer syntaxes that change the whole file, not the pixels alone."""
    series = pet_series(slices=3)
    native = read_series(series)[0]
    for ds in series:
        ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    assert np.array_equal(read_series(save(series, tmp_path / "deflated"))[0].array, native.array)
    for ds in series:
        ds["PixelData"].VR = "OW"
        ds.PixelData = np.frombuffer(ds.PixelData, "<i2").astype(">i2").tobytes()
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    big = tmp_path / "big"
    big.mkdir()
    for number, ds in enumerate(series):
        ds.save_as(big / f"{number}.dcm", implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert np.array_equal(read_series(sorted(big.iterdir()))[0].array, native.array)


def test_bits_above_the_stored_ones_are_not_values():
    """Old overlays in the high bits of a 12-bit CT do not change Hounsfield units."""
    series = ct_series(slices=4)
    plain = read_series(series)[0]
    for ds in series:
        ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") | 0x9000).astype("<u2").tobytes()
    assert np.array_equal(read_series(series)[0].array, plain.array)
    assert plain.unit == "[hnsf'U]" and plain.array.min() == -1000


def test_twelve_bit_signed_values_keep_their_sign():
    """The sign bit of a value stored in 12 bits is bit 11."""
    series = ct_series(slices=2, PixelRepresentation=1, RescaleIntercept="0")
    for ds in series:
        ds.PixelData = np.full((ds.Rows, ds.Columns), 0x0FFF, "<u2").tobytes()
    assert np.all(read_series(series)[0].array == -1)


def test_nonzero_intercept_of_a_pet_is_applied_and_noted():
    """PET does not allow it, so a reader of the report must know."""
    volume, info = read_series(pet_series(intercept=-100.0))
    assert np.allclose(volume.array, sphere_image((8, 16, 14)), rtol=1e-3, atol=2)
    assert any("RescaleIntercept" in note for note in info.notes)


def test_repeated_instances_are_taken_once_and_noted():
    """The same SOP instance twice, and another instance at a taken place: one of each, the same whatever the order."""
    series = pet_series(duplicates=(2, 5))
    series.append(copy.deepcopy(series[0]))
    forward, info = read_series(series)
    backward, other = read_series(series[::-1])
    assert forward.shape == (8, 16, 14)
    assert np.array_equal(forward.array, backward.array)
    assert info.sop_instance_uids == other.sop_instance_uids
    assert len(info.notes) == 2


def test_two_images_at_one_place_are_refused():
    """Two reconstructions under one series UID: no slice of one may stand among those of the other."""
    series = pet_series(duplicates=range(8))
    for ds in series[8:]:
        ds.RescaleSlope = decimal(1.1 * float(ds.RescaleSlope))
    assert refusal(series).code == refusal(series[::-1]).code == "conflict"
    assert refusal(series[:8] + series[11:12]).code == "conflict"


def test_a_slope_of_zero_that_would_wipe_out_a_slice_is_refused():
    """Zero times what is stored is a slice without activity; a slice in which nothing is stored may say so."""
    series = pet_series()
    series[3].RescaleSlope = "0"
    assert refusal(series).code == "rescale"
    series[3].PixelData = bytes(len(series[3].PixelData))
    assert not read_series(series)[0].array[3].any()


def test_one_uid_for_two_images_is_refused():
    """Nobody can tell which of them is meant."""
    series = pet_series()
    twin = copy.deepcopy(series[0])
    twin.PixelData = bytes(len(twin.PixelData))
    assert refusal([*series, twin]).code == "conflict"


def test_missing_slice_is_refused_with_its_place():
    """A gap is named in mm and never bridged."""
    error = refusal(pet_series(missing=(3,), spacing=(4.0, 4.0, 4.0)))
    assert error.code == "gap"
    assert "-92.000" in error.reason and "-84.000" in error.reason
    assert error.study and error.series and error.remedy
    assert error.study in str(error) and "Remedy:" in str(error)


def test_missing_end_is_refused_by_number_of_slices():
    """Positions alone cannot show that the last slice is missing; NumberOfSlices does."""
    assert refusal(pet_series(missing=(7,))).code == "slice-count"


def test_uneven_steps_are_refused_and_small_ones_are_not():
    """GE beds meet with steps 2.4 % off, which is one grid; 10 % is not."""
    series = pet_series(spacing=(3.27, 4.0, 4.0))
    for ds in series[4:]:
        ds.ImagePositionPatient[2] = float(ds.ImagePositionPatient[2]) + 0.08
    assert read_series(series)[0].spacing[0] == pytest.approx(3.27 + 0.08 / 7)
    for ds in series[4:]:
        ds.ImagePositionPatient[2] = float(ds.ImagePositionPatient[2]) + 0.25
    assert refusal(series).code == "uneven-spacing"


def test_steps_that_drift_off_the_grid_are_refused():
    """Each step within tolerance, but the spacing changes half-way: no grid fits."""
    series = pet_series(slices=40, rows=4, columns=4, spacing=(4.0, 4.0, 4.0))
    for index, ds in enumerate(series):
        ds.ImagePositionPatient[2] = -100 + 4.0 * index + 0.12 * max(0, index - 20)
    assert refusal(series).code == "uneven-spacing"


def test_sheared_stack_is_refused_and_oblique_is_not():
    """A tilted gantry gives slices that are not above one another."""
    assert refusal(pet_series(lateral_mm=0.2)).code == "sheared"
    assert refusal(pet_series(lateral_mm=0.2, orientation=OBLIQUE)).code == "sheared"
    assert read_series(pet_series(lateral_mm=0.005))[0].shape == (8, 16, 14)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"time_slices": 2}, "dynamic"),
        ({"gated": True}, "gated"),
        ({"SeriesType": ["WHOLE BODY", "REPROJECTION"]}, "reprojection"),
        ({"SeriesType": None}, "series-type"),
        ({"units": None}, "units-missing"),
        ({"units": "MLMINML"}, "units-unsupported"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "not-supported"),
        ({"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]}, "orientation"),
        ({"ImagePositionPatient": None}, "malformed"),
        ({"RescaleSlope": None}, "malformed"),
        ({"RescaleSlope": "-1"}, "rescale"),
        ({"PixelData": None}, "no-pixels"),
        ({"Rows": 0}, "too-large"),
        ({"BitsAllocated": 12}, "pixel-format"),
        ({"SamplesPerPixel": 3}, "pixel-format"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_volume_of_known_values_is_refused(options, code):
    """Each reason has its own code, a remedy, and names the series."""
    error = refusal(pet_series(**options))
    assert error.code == code
    assert error.remedy and error.series


def test_series_that_hides_its_time_slices_is_refused():
    """STATIC by name but several times at each place: frames in time."""
    series = pet_series(time_slices=2, SeriesType=["STATIC", "IMAGE"], NumberOfTimeSlices=None)
    assert refusal(series).code == "dynamic"


def test_number_of_time_slices_of_a_whole_body_means_nothing():
    """GE counts bed positions there."""
    assert read_series(pet_series(NumberOfTimeSlices=6))[0].shape == (8, 16, 14)


def test_two_series_at_once_are_refused():
    """Mixing them would make a grid out of both."""
    assert refusal(pet_series() + pet_series(series=1)).code == "mixed-series"


@pytest.mark.parametrize("keyword", ["PixelSpacing", "Rows", "FrameOfReferenceUID", "ImageOrientationPatient"])
def test_slices_of_another_grid_are_refused(keyword):
    """One slice that differs makes the whole series unusable."""
    series = pet_series()
    setattr(series[3], keyword, {"PixelSpacing": ["4.7", "4.7"], "Rows": 8, "FrameOfReferenceUID": "1.2.3",
                                 "ImageOrientationPatient": [*list("100"), "0", "0.9994", "0.0346"]}[keyword])
    assert refusal(series).code == "grid"


def test_missing_units_can_be_vouched_for():
    """Offline a person may name the unit; a stated unit is never overridden."""
    volume, info = read_series(pet_series(units=None, SeriesType=None), assume_units="BQML")
    assert volume.unit == "Bq/ml" and any("assumed" in note for note in info.notes)
    assert read_series(pet_series(units="GML"), assume_units="BQML")[0].unit == "g/ml{SUVbw}"


def test_philips_counts_become_activity_and_back():
    """Counts times (7053,xx09) are Bq/ml; to_source_units undoes it."""
    series = pet_series(vendor="PHILIPS", units="CNTS")
    volume, info = read_series(series)
    assert volume.unit == "Bq/ml" and info.source_units == "CNTS" and info.vendor == "PHILIPS"
    counts = volume.array * np.array(info.to_source_units)[:, None, None]
    assert np.allclose(counts, sphere_image((8, 16, 14)), rtol=1e-3)
    stored = np.frombuffer(series[0].PixelData, "<i2").reshape(16, 14)
    assert np.allclose(volume.array[0], stored * info.slices[0].slope * 2.134638)


def test_philips_factors_are_found_in_any_block_and_zero_is_none():
    """The creator decides, not the tag number; without a usable factor values stay counts."""
    series = pet_series(vendor="PHILIPS", units="CNTS")
    for ds in series:
        block = ds.private_block(0x7053, "Philips PET Private Group")
        suv, bqml = block[0x00].value, block[0x09].value
        for element in list(ds.group_dataset(0x7053)):
            del ds[element.tag]
        ds.add_new(0x70530012, "LO", "Philips PET Private Group")
        ds.add_new(0x70531200, "DS", str(suv))
        ds.add_new(0x70531209, "UN", f"{bqml} ".encode())
    assert read_series(series)[0].unit == "Bq/ml"
    for ds in series:
        ds[0x70531209].value = b"0 "
    assert read_series(series)[0].unit == "g/ml{SUVbw}"
    for ds in series:
        ds[0x70531200].value = "0"
    volume, info = read_series(series)
    assert volume.unit == "{counts}" and info.source_units == "CNTS"


def test_cut_off_file_is_refused(tmp_path):
    """A file that ends early, at any length, is refused with a reason and never half read."""
    paths = save(pet_series(slices=2), tmp_path)
    whole = paths[0].read_bytes()
    for length in [0, 100, 200, 1000, len(whole) - 300, len(whole) - 1]:
        paths[0].write_bytes(whole[:length])
        assert refusal(paths).code in {"unreadable", "truncated", "malformed", "no-pixels", "not-supported"}


@cache
def file_bytes() -> tuple[bytes, ...]:
    """A PET slice, an enhanced PET and an NM image as they lie on disk, with few pixels and so mostly header."""
    small = {"rows": 3, "columns": 3}
    buffers = []
    for ds in (pet_series(slices=1, **small)[0], enhanced_pet(slices=2, **small), nm_tomo(slices=2, **small)):
        buffer = BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        buffers.append(buffer.getvalue())
    return tuple(buffers)


@settings(max_examples=300, deadline=None)
@given(kind=st.integers(0, 2), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
def test_damaged_bytes_give_a_volume_or_a_refusal(tmp_path_factory, kind, changes):
    """Random changes of a file never raise anything but Refused."""
    paths = [tmp_path_factory.getbasetemp() / "damaged.dcm"]
    content = bytearray(file_bytes()[kind])
    for place, value in changes:
        content[132 + int(place * (len(content) - 133))] = value
    paths[0].write_bytes(content)
    try:
        volume, _ = read_series(paths)
    except Refused as error:
        refused = error
        volume = None
    assert volume is not None or (refused.code and refused.reason and refused.remedy)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless], ids=lambda uid: uid.name)
def test_broken_compressed_pixels_are_refused(tmp_path, syntax):
    """A decoder's own exception, panic or abort does not come through."""
    series = pet_series(slices=2, rows=64, columns=64)
    for ds in series:
        ds.compress(syntax, generate_instance_uid=False)
    series[1].PixelData = series[1].PixelData[:60] + bytes(len(series[1].PixelData) - 60)
    assert refusal(save(series, tmp_path)).code in {"undecodable", "truncated"}


def test_refusal_survives_the_way_between_processes():
    """Workers hand refusals to their parent by pickle."""
    error = refusal(pet_series(missing=(3,)))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.code == error.code == "gap" and again.series


def test_refusals_hold_no_patient():
    """Neither name nor identifier appears in what is logged."""
    for options in ({"missing": (3,)}, {"units": None}, {"PatientName": "Phantom^Synthetic", "Rows": 0}):
        assert "phantom" not in str(refusal(pet_series(**options))).lower()
