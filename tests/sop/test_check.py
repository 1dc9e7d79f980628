"""The check passes a right derived series and names what is wrong with each faulty one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from scipy import ndimage

from sop.check import Limits, check_derived
from sop.errors import Refused
from tests.factories import OBLIQUE, enhanced_pet
from tests.sop.derived_series import derive, doubled, save, source_series

Slices = list[Dataset]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """Files of a source and of the right derived series, in increasing position."""
    folder = tmp_path_factory.mktemp("series")
    source = save(source_series(TimezoneOffsetFromUTC="+0100", LossyImageCompression="00"), folder / "source")
    return source, list(derive(source, folder / "derived")[0].files)


@pytest.mark.parametrize("options", [
    {}, {"orientation": OBLIQUE}, {"vendor": "PHILIPS", "units": "CNTS"}, {"vendor": "SIEMENS"},
    {"signed": False}, {"SpacingBetweenSlices": "3.27"}, {"SliceLocation": None}, {"units": "GML"},
    {"DecayCorrection": "NONE"}, {"PatientWeight": ""},
])
def test_a_right_series_passes_every_item(options: dict, tmp_path: Path) -> None:
    """Whatever the scanner, orientation or unit: no item fails, and the report is plain JSON."""
    source = save(source_series(**options), tmp_path / "source")
    derived = derive(source, tmp_path / "derived")[0].files
    report = check_derived(source, derived[::-1])
    assert report.failures == ()
    assert report.ok and len(report.items) > 40
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_a_series_from_an_enhanced_source_passes(tmp_path: Path) -> None:
    """Enhanced PET in, classic PET out: the frames are the parents."""
    slices = source_series()
    source = save([enhanced_pet(**{"slices": 12, "rows": 30, "columns": 26, "spacing": (3.27, 4.6875, 4.0),
                                   "values": np.stack([ds.pixel_array * float(ds.RescaleSlope) for ds in slices])})],
                  tmp_path / "source")
    derived = derive(source, tmp_path / "derived")[0].files
    assert check_derived(source, derived).failures == ()


def set_all(**values: object) -> Callable[[Slices], None]:
    """A fault that sets (None: removes) attributes in all slices."""
    def fault(slices: Slices) -> None:
        for ds in slices:
            _set(ds, values)
    return fault


def set_one(**values: object) -> Callable[[Slices], None]:
    """A fault in the seventh slice only."""
    return lambda slices: _set(slices[6], values)


def _set(ds: Dataset, values: dict[str, object]) -> None:
    for keyword, value in values.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)


def each(change: Callable[[Dataset], object]) -> Callable[[Slices], None]:
    """A fault applied to all slices one by one."""
    def fault(slices: Slices) -> None:
        for ds in slices:
            change(ds)
    return fault


def _moved(ds: Dataset, by: tuple[float, float, float]) -> None:
    ds.ImagePositionPatient = [f"{float(x) + d:.6f}" for x, d in zip(ds.ImagePositionPatient, by)]


def _drifting(slices: Slices) -> None:
    """Positions by adding up a spacing rounded to two decimals."""
    x, y, z = slices[0].ImagePositionPatient
    for i, ds in enumerate(slices):
        ds.ImagePositionPatient = [x, y, f"{float(z) + i * 1.64:.4f}"]


def _reversed_positions(slices: Slices) -> None:
    places = [ds.ImagePositionPatient for ds in slices]
    for i, ds in enumerate(slices):
        ds.ImagePositionPatient = places[-1 - i]
        ds.ImageIndex = len(slices) - i


def _reversed_pixels(slices: Slices) -> None:
    pixels = [(ds.PixelData, ds.RescaleSlope) for ds in slices]
    for ds, (data, slope) in zip(slices, pixels[::-1]):
        ds.PixelData, ds.RescaleSlope = data, slope


def _mirrored(ds: Dataset) -> None:
    ds.PixelData = np.ascontiguousarray(ds.pixel_array[:, ::-1]).tobytes()


def _shuffled(slices: Slices) -> None:
    order = np.random.default_rng(3).permutation(len(slices))
    pixels = [(slices[i].PixelData, slices[i].RescaleSlope) for i in order]
    for ds, (data, slope) in zip(slices, pixels):
        ds.PixelData, ds.RescaleSlope = data, slope


def _swapped_spacing(ds: Dataset) -> None:
    ds.PixelSpacing = list(ds.PixelSpacing)[::-1]


def _image_index_backwards(slices: Slices) -> None:
    for i, ds in enumerate(slices):
        ds.ImageIndex = len(slices) - i


def _tracer(**values: object) -> Callable[[Slices], None]:
    return each(lambda ds: _set(ds.RadiopharmaceuticalInformationSequence[0], values))


def _slope_times(factor: float) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        ds.RescaleSlope = f"{float(ds.RescaleSlope) * factor:.8g}"
    return change


def _codes_to_65535(ds: Dataset) -> None:
    ds.PixelRepresentation, ds.RescaleSlope = 0, f"{float(ds.RescaleSlope) / 2:.10g}"
    ds.PixelData = (ds.pixel_array.astype("<u2") * 2).tobytes()


def _coarse(ds: Dataset) -> None:
    ds.RescaleSlope = f"{float(ds.RescaleSlope) * 64:.10g}"
    ds.PixelData = np.round(ds.pixel_array / 64).astype("<u2").tobytes()


def _hot_voxel(slices: Slices) -> None:
    factor = 64.0
    _slope_times(factor)(slices[11])
    pixels = np.round(slices[11].pixel_array / factor).astype("<u2")
    pixels[20, 20] = 32767
    slices[11].PixelData = pixels.tobytes()


def _private_block_moved(slices: Slices) -> None:
    for ds in slices:
        value = ds.private_block(0x0009, "GEMS_PETD_01")[0x0D].value
        del ds[0x0009, 0x0010], ds[0x0009, 0x100D]
        ds.add_new((0x0009, 0x0011), "LO", "GEMS_PETD_01")
        ds.add_new((0x0009, 0x110D), "DT", value)


def _reference_lost(ds: Dataset) -> None:
    del ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence[-1]


def _wrong_purpose(ds: Dataset) -> None:
    ds.SourceImageSequence[0].PurposeOfReferenceCodeSequence[0].CodeValue = "121320"


def _two_slices_on(slices: Slices) -> None:
    """References that are two source slices off."""
    sequences = [ds.SourceImageSequence for ds in slices]
    for i, ds in enumerate(slices):
        ds.SourceImageSequence = sequences[(i + 4) % len(slices)]


def _same_uid_twice(slices: Slices) -> None:
    slices[3].SOPInstanceUID = slices[3].file_meta.MediaStorageSOPInstanceUID = slices[2].SOPInstanceUID


def _parents_wrong(slices: Slices) -> None:
    """All slices with the times of the first bed."""
    for ds in slices:
        ds.AcquisitionTime, ds.FrameReferenceTime = slices[0].AcquisitionTime, slices[0].FrameReferenceTime


def _ragged(slices: Slices) -> None:
    x, y, z = slices[5].ImagePositionPatient
    slices[5].ImagePositionPatient = [x, y, f"{float(z) + 0.05:.4f}"]


def _truncated(slices: Slices) -> None:
    slices[4].PixelData = slices[4].PixelData[:-200]


def _long_decimal(ds: Dataset) -> None:
    ds.SliceThickness = "1.635000000000000000"


FAULTS: list[tuple[str, str, Callable[[Slices], object]]] = [
    ("quarter voxel along rows", "first-voxel", each(lambda ds: _moved(ds, (1.0, 0, 0)))),
    ("quarter voxel along slices", "outer-corners", each(lambda ds: _moved(ds, (0, 0, 0.8175)))),
    ("first voxel where the source's is", "first-voxel", each(lambda ds: _moved(ds, (1.0, 1.171875, 0.8175)))),
    ("rounded spacing added up", "slice-step", _drifting),
    ("rounded spacing moves the corners", "outer-corners", _drifting),
    ("one slice out of line", "uniform-positions", _ragged),
    ("positions reversed", "content-orientation", _reversed_positions),
    ("pixels reversed", "content-orientation", _reversed_pixels),
    ("image mirrored", "content-orientation", each(_mirrored)),
    ("a slice missing", "slice-count", lambda slices: slices.pop()),
    ("a slice missing inside", "uniform-positions", lambda slices: slices.pop(9)),
    ("stale NumberOfSlices", "number-of-slices", set_all(NumberOfSlices=12)),
    ("another image", "content-likeness", _shuffled),
    ("ImageIndex backwards", "image-index", _image_index_backwards),
    ("ImageIndex of the parent", "image-index", each(lambda ds: _set(ds, {"ImageIndex": (ds.ImageIndex + 1) // 2}))),
    ("orientation recomputed", "orientation",
     set_all(ImageOrientationPatient=["1.000000", "0", "0", "0", "1.000000", "0"])),
    ("PixelSpacing swapped", "pixel-spacing", each(_swapped_spacing)),
    ("PixelSpacing kept", "pixel-spacing", set_all(PixelSpacing=["4.6875", "4"])),
    ("SliceThickness kept", "slice-thickness", set_all(SliceThickness="3.27")),
    ("SpacingBetweenSlices invented", "spacing-between-slices", set_all(SpacingBetweenSlices="3.27")),
    ("SliceLocation stale", "slice-location", set_one(SliceLocation="-100")),
    ("Decimal String too long", "position-strings", each(_long_decimal)),
    ("other frame of reference", "frame-of-reference", set_all(FrameOfReferenceUID="1.2.3")),
    ("PositionReferenceIndicator lost", "frame-of-reference", set_all(PositionReferenceIndicator=None)),
    ("intercept for negatives", "rescale-intercept", set_all(RescaleIntercept="-100")),
    ("all slopes doubled", "activity", each(_slope_times(2))),
    ("per mL taken for per voxel", "activity", each(_slope_times(1 / 8))),
    ("one wrong slope", "slice-activity", lambda slices: _slope_times(3)(slices[10])),
    ("slope zero", "rescale-slope", set_one(RescaleSlope="0")),
    ("slope negative", "rescale-slope", set_one(RescaleSlope="-1")),
    ("codes above 32767", "stored-range", each(_codes_to_65535)),
    ("coarse codes", "quantisation", each(_coarse)),
    ("a voxel forty times too hot", "maximum", _hot_voxel),
    ("12 bits", "bits", set_all(BitsStored=12, HighBit=11)),
    ("MONOCHROME1", "bits", set_all(PhotometricInterpretation="MONOCHROME1")),
    ("pixel data cut", "pixel-data", _truncated),
    ("window below one", "window", set_all(WindowWidth="0.5")),
    ("window of other units", "window", set_all(WindowCenter="2000000", WindowWidth="3000000")),
    ("ATTN lost", "corrections", set_all(CorrectedImage=["DECY", "SCAT", "RAN"])),
    ("units changed", "corrections", set_all(Units="CNTS")),
    ("decay reference changed", "corrections", set_all(DecayCorrection="ADMIN")),
    ("decay reference changed shifts SUV", "suv", set_all(DecayCorrection="ADMIN")),
    ("weight changed", "patient", set_all(PatientWeight="80")),
    ("weight changed shifts SUV", "suv", set_all(PatientWeight="80")),
    ("height lost", "patient", set_all(PatientSize=None)),
    ("name changed", "patient", set_all(PatientName="Other^Person")),
    ("series time of processing", "times", set_all(SeriesDate="20260304", SeriesTime="050607")),
    ("acquisition time of the first bed", "times", _parents_wrong),
    ("fraction of a second dropped", "times", set_all(SeriesTime="1110")),
    ("time zone lost", "times", set_all(TimezoneOffsetFromUTC=None)),
    ("decay factor lost", "times", set_all(DecayFactor=None)),
    ("injection time lost", "radiopharmaceutical", _tracer(RadiopharmaceuticalStartTime=None)),
    ("dose changed", "radiopharmaceutical", _tracer(RadionuclideTotalDose="400000000")),
    ("dose changed shifts SUV", "suv", _tracer(RadionuclideTotalDose="400000000")),
    ("other study", "study", set_all(StudyInstanceUID="1.2.3.4")),
    ("accession number changed", "study", set_all(AccessionNumber="77")),
    ("source's series UID", "series-uid", each(lambda ds: _set(ds, {
        "SeriesInstanceUID": ds.ReferencedSeriesSequence[0].SeriesInstanceUID}))),
    ("two series", "series-level", set_one(SeriesInstanceUID="1.2.3.5")),
    ("weight in one slice", "series-level", set_one(PatientWeight="70")),
    ("one instance twice", "instance-uids", _same_uid_twice),
    ("UID too long", "instance-uids", set_one(SOPInstanceUID="1." + "2" * 63)),
    ("file meta of another instance", "instance-uids", set_one(SOPInstanceUID="1.2.3.6")),
    ("secondary capture", "sop-class", set_all(SOPClassUID="1.2.840.10008.5.1.4.1.1.7")),
    ("ORIGINAL", "image-type", set_all(ImageType=["ORIGINAL", "PRIMARY"])),
    ("DERIVED SECONDARY", "image-type", set_all(ImageType=["DERIVED", "SECONDARY"])),
    ("source's series number", "series-number", set_all(SeriesNumber="5")),
    ("source's description", "series-description", set_all(SeriesDescription="PET AC")),
    ("no derivation code", "derivation", set_all(DerivationCodeSequence=None)),
    ("no derivation description", "derivation", set_one(DerivationDescription="")),
    ("no source images", "source-images", set_all(SourceImageSequence=None)),
    ("wrong purpose of reference", "source-images", each(_wrong_purpose)),
    ("references to other slices", "source-images", _two_slices_on),
    ("reference not listed", "source-images", each(_reference_lost)),
    ("no references at all", "source-images", set_all(ReferencedSeriesSequence=None, SourceImageSequence=None)),
    ("no contributing equipment", "contributing-equipment", set_all(ContributingEquipmentSequence=None)),
    ("no creation time", "creation-time", set_all(InstanceCreationTime=None)),
    ("manufacturer replaced", "copied-attributes", set_all(Manufacturer="dicomnode")),
    ("method of reconstruction lost", "corrections", set_all(ReconstructionMethod=None)),
    ("body part lost", "copied-attributes", set_all(BodyPartExamined=None)),
    ("patient position added", "copied-attributes", set_all(PatientPosition="HFS")),
    ("character set lost", "character-set", set_all(SpecificCharacterSet=None)),
    ("lossy compression denied", "lossy-compression", set_all(LossyImageCompression=None)),
    ("private block moved", "private-elements", _private_block_moved),
    ("private element lost", "private-elements", each(lambda ds: ds.__delitem__((0x0009, 0x100D)))),
    ("overlay kept", "stale-attributes", each(lambda ds: ds.add_new((0x6000, 0x0010), "US", 30))),
    ("old pixel range kept", "stale-attributes", each(lambda ds: ds.add_new((0x0028, 0x0107), "SS", 99))),
]


@pytest.mark.parametrize(("item", "fault"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_each_fault_is_named(
    item: str, fault: Callable[[Slices], object], series: tuple[list[Path], list[Path]], tmp_path: Path,
) -> None:
    """A series with one rule broken on purpose fails, and the item that names the rule is among the failures."""
    source, derived = series
    slices = [dcmread(path) for path in derived]
    fault(slices)
    for number, ds in enumerate(slices):
        ds.save_as(tmp_path / f"{number}.dcm", enforce_file_format=item != "instance-uids")
    report = check_derived(source, sorted(tmp_path.iterdir()))
    assert item in {failure.name for failure in report.failures}
    assert not report.ok


def _corners_aligned(y: np.ndarray) -> np.ndarray:
    fine = ndimage.zoom(y.astype(np.float64), 2, order=1, grid_mode=False)
    return fine * (8 * y.sum(dtype=np.float64) / fine.sum())


def _half_a_fine_voxel_aside(y: np.ndarray) -> np.ndarray:
    return np.maximum(ndimage.shift(doubled(y), (0, 0, 0.5), order=1, mode="nearest"), 0)


def _half_a_fine_slice_aside(y: np.ndarray) -> np.ndarray:
    return np.maximum(ndimage.shift(doubled(y), (0.5, 0, 0), order=1, mode="nearest"), 0)


@pytest.mark.parametrize(("image", "items"), [
    (_corners_aligned, ["content-stretch-slice", "content-stretch-row", "content-stretch-column"]),
    (_half_a_fine_voxel_aside, ["content-shift-column"]),
    (_half_a_fine_slice_aside, ["content-shift-slice"]),
], ids=["corners aligned", "quarter source voxel along rows", "quarter source voxel along slices"])
def test_displaced_content_is_caught_though_every_header_is_right(
    image: Callable, items: list[str], tmp_path: Path,
) -> None:
    """A quarter source voxel shows nowhere but in the content (rule 1)."""
    source = save(source_series(), tmp_path / "source")
    report = check_derived(source, derive(source, tmp_path / "derived", image=image)[0].files)
    assert {failure.name for failure in report.failures} == set(items)


def test_sharpened_content_is_not_taken_for_displaced(tmp_path: Path) -> None:
    """Deblurring makes edges steep; it does not move them."""
    def sharpened(y: np.ndarray) -> np.ndarray:
        fine = doubled(y).astype(np.float64)
        sharp = fine + 1.5 * (fine - ndimage.gaussian_filter(fine, 2.0, mode="nearest"))
        sharp = np.maximum(sharp, 0)
        return sharp * (8 * y.sum(dtype=np.float64) / sharp.sum())
    source = save(source_series(), tmp_path / "source")
    report = check_derived(source, derive(source, tmp_path / "derived", image=sharpened)[0].files)
    assert report.failures == ()


def _gaussian_kernel(shape: tuple[int, int, int], sigma: float) -> np.ndarray:
    delta = np.zeros(shape)
    delta[tuple(n // 2 for n in shape)] = 1
    kernel = ndimage.gaussian_filter(delta, sigma, truncate=8)
    return kernel / kernel.sum()


def test_with_its_kernel_the_image_must_explain_the_source(tmp_path: Path) -> None:
    """y = D(x) * k holds for the right kernel and fails, by residual and slice activity, for a far too wide one."""
    sharp = np.zeros((24, 60, 52))
    rng = np.random.default_rng(5)
    sharp[4:20, 10:50, 10:42] = 500
    for _ in range(8):
        d, h, w = rng.integers((6, 12, 12), (18, 48, 40))
        sharp[d - 2:d + 2, h - 3:h + 3, w - 3:w + 3] = 9000
    kernel = _gaussian_kernel((7, 7, 7), 0.9)
    coarse = sharp.reshape(12, 2, 30, 2, 26, 2).mean(axis=(1, 3, 5))
    measured = ndimage.convolve(coarse, kernel, mode="nearest")
    source = save(source_series(values=measured), tmp_path / "source")
    derived = derive(source, tmp_path / "derived", image=lambda y: sharp)[0].files
    spacing = (3.27, 4.6875, 4.0)
    assert check_derived(source, derived, kernel=kernel, kernel_spacing=spacing).failures == ()
    wide = check_derived(source, derived, kernel=_gaussian_kernel((9, 9, 9), 2.5), kernel_spacing=spacing)
    assert {"residual", "slice-activity"} <= {failure.name for failure in wide.failures}


def test_a_kernel_that_cannot_be_one_is_refused(series: tuple[list[Path], list[Path]]) -> None:
    """Even sizes, another sum and another grid are errors of the caller."""
    for kernel, spacing in ((np.full((2, 3, 3), 1 / 18), None), (np.ones((3, 3, 3)), None),
                            (np.full((3, 3, 3), 1 / 27), (1.6, 2.3, 2.0))):
        with pytest.raises(ValueError, match="kernel"):
            check_derived(*series, kernel=kernel, kernel_spacing=spacing)


def test_other_series_among_the_source_files_are_passed_over(
    series: tuple[list[Path], list[Path]], tmp_path: Path,
) -> None:
    """The whole study may be named as source; the series that the derived one refers to is used."""
    source, derived = series
    other = save(source_series(series=1), tmp_path)
    assert check_derived([*other, *source], derived).failures == ()
    with pytest.raises(Refused, match="source"):
        check_derived(other, derived)


def test_repeated_source_instances_are_counted_once(series: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    """A source that came twice is still one series (rule 9)."""
    source, derived = series
    again = save([dcmread(path) for path in source], tmp_path)
    assert check_derived([*source, *again], derived).failures == ()


def test_limits_can_be_set(series: tuple[list[Path], list[Path]]) -> None:
    """A site may judge more strictly; the report says by which figure."""
    report = check_derived(*series, limits=Limits(maximum=0.5))
    assert [failure.name for failure in report.failures] == ["maximum"]
    assert report.failures[0].limit == 0.5


def test_nothing_to_check_is_an_error(series: tuple[list[Path], list[Path]]) -> None:
    """An empty list never passes."""
    with pytest.raises(FileNotFoundError):
        check_derived(series[0], [])
    with pytest.raises(FileNotFoundError):
        check_derived([], series[1])


def test_the_check_shares_nothing_with_the_writer() -> None:
    """Neither module of the check imports the writer, its modules or its encoding."""
    folder = Path(__file__).resolve().parents[2] / "sop"
    for path in (folder / "check.py", *(folder / "checks").glob("*.py")):
        imports = [line for line in path.read_text().splitlines() if line.startswith(("import", "from"))]
        assert not [line for line in imports if any(
            name in line for name in ("sop.pet", "sop.modules", "sop.encoding", "sop.uids", "sop.derivation")
        ) or line.startswith("from sop import")]


def test_the_document_names_every_item_and_no_other(series: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    """docs/derived-series.md tells a person what each failing item means."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "derived-series.md").read_text()
    kernel = np.zeros((3, 3, 3))
    kernel[1, 1, 1] = 1
    boxed = derive(series[0], tmp_path / "boxed", region_box="box:0-12,5-20,5-20")[0].files
    items = {item.name for files in (series[1], boxed) for item in check_derived(series[0], files, kernel=kernel).items}
    rows = [line.split("|")[4] for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    named = set(re.findall(r"`([a-z*-]+)`", " ".join(rows)))
    told = set(re.findall(r"`([a-z*-]+)`", text))
    assert not [name for name in items if not any(fnmatch(name, pattern) for pattern in told)]
    assert not [pattern for pattern in named if not any(fnmatch(name, pattern) for name in items)]
