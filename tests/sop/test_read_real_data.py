"""read_series and suv_factors on scanners' own series."""

from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset

from sop.errors import Refused
from sop.read import read_series
from sop.suv import suv_factors
from sop.units import PHILIPS_BQML, PHILIPS_SUV, philips_factor

# Factors of the calculate-suv project for the first instance of each extract, for rescaled values.
KNOWN_FACTORS = {
    "PHILIPS_BQML": 0.0007463747013889488,
    "PHILIPS_CNTS_AND_BQML_SUV": 0.000551,
    "PHILIPS_CNTS_AND_SUV": 0.000728,
    "SIEMENS": 0.00042748316187197236,
    "GE_MEDICAL_AND_BQML": 0.0005367387681819742,
    "BQML_AC_DT_lessThan_S_DT_SIEMENS": 0.0004069156854009332,
    "CPS_AND_BQML_AC_DT_-_S_DT": 0.00026503312764157046,
    "RADIOPHARM_DATETIME_UNDEFINED": 0.0003721089202818729,
}


def files(folder: Path) -> list[Path]:
    """All files of a folder, in an order that has nothing to do with position."""
    found = sorted(folder.iterdir())
    random.Random(7).shuffle(found)
    return found


def header_of(extract: dict) -> Dataset:
    """A header from one entry of an extract."""
    header, tracer = Dataset(), Dataset()
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.128"
    for keyword, value in extract.items():
        if keyword == "PhilipsPETPrivateGroup":
            block = header.private_block(0x7053, "Philips PET Private Group", create=True)
            for name, element in (("SUVScaleFactor", PHILIPS_SUV), ("ActivityConcentrationScaleFactor", PHILIPS_BQML)):
                if name in value:
                    block.add_new(element, "DS", value[name].strip())
        elif keyword.startswith("Radi"):
            setattr(tracer, keyword, str(value).strip())
        else:
            setattr(header, keyword, value)
    header.RadiopharmaceuticalInformationSequence = [tracer]
    return header


def test_ge_whole_body_shuffled_is_one_grid(shared_data):
    """267 slices of six beds that meet with steps of 3.19 to 3.29 mm: one grid with one spacing."""
    volume, info = read_series(files(shared_data / "ge_sts001_pet_raw"))
    assert volume.shape == (267, 128, 128)
    assert volume.spacing == pytest.approx([3.27, 4.6875, 4.6875], abs=1e-6)
    assert volume.origin == pytest.approx([-297.65625, -297.65625, -881.3])
    assert volume.unit == "Bq/ml" and info.vendor == "GE" and info.notes == ()
    assert len({item.slope for item in info.slices}) > 250
    # Instance numbers run against the normal on this scanner.
    assert [int(item.header.InstanceNumber) for item in info.slices[:2]] == [267, 266]


@pytest.mark.parametrize(
    "name", ["ge_sts001_pet_raw", "ge_sts001_ibsi/PET", "ge_sts001_ibsi/CT", "ge_sts035_ibsi/CT", "philips_suvval_pt"]
)
def test_simpleitk_sees_the_same_voxels(shared_data, name):
    """Values and positions of the reader most clients use, at all slices and at the corners."""
    volume, info = read_series(files(shared_data / name))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(shared_data / name), info.series))
    reader.SetOutputPixelType(sitk.sitkFloat64)
    image = reader.Execute()
    array = sitk.GetArrayFromImage(image)
    factors = np.array(info.to_source_units)[:, None, None]
    assert np.allclose(array, volume.array * factors, rtol=1e-6, atol=1e-6)
    depth, rows, columns = volume.shape
    for index in [(0, 0, 0), (depth - 1, rows - 1, columns - 1), (depth // 2, 3, 5)]:
        there = image.TransformIndexToPhysicalPoint([index[2], index[1], index[0]])
        assert np.allclose(there, volume.position(index), atol=0.02)


def test_ge_suv_equals_the_published_suv_crop(shared_data):
    """The same scan was published in Bq/ml and, cropped, as SUVbw by others: both ways meet."""
    whole, info = read_series(files(shared_data / "ge_sts001_pet_raw"))
    crop, crop_info = read_series(files(shared_data / "ge_sts001_ibsi" / "PET"))
    assert crop.unit == "g/ml{SUVbw}" and suv_factors(crop_info).bw == 1.0
    start = np.round(whole.index(crop.position((0, 0, 0)))).astype(int)
    assert np.allclose(whole.position(start), crop.position((0, 0, 0)), atol=0.02)
    d, h, w = (slice(s, s + n) for s, n in zip(start, crop.shape, strict=True))
    suv = whole.array[d, h, w] * suv_factors(info).require()
    assert np.allclose(suv, crop.array, rtol=2e-3, atol=2e-3)


def test_ct_lies_on_the_frame_of_reference_of_its_pet(shared_data):
    """59 CT slices in Hounsfield units inside the whole-body PET."""
    pet, pet_info = read_series(files(shared_data / "ge_sts001_pet_raw"))
    ct, ct_info = read_series(files(shared_data / "ge_sts001_ibsi" / "CT"))
    assert ct.unit == "[hnsf'U]" and ct.array.min() >= -1024
    assert ct_info.frame_of_reference_uid == pet_info.frame_of_reference_uid
    assert np.all(pet.index(ct.position((0, 0, 0))) > -0.5)


def test_philips_counts_are_activity_and_suv(shared_data):
    """A uniform phantom of known activity reads SUV 1 in its middle."""
    volume, info = read_series(files(shared_data / "philips_suvval_pt"))
    assert volume.unit == "Bq/ml" and info.source_units == "CNTS"
    assert philips_factor(info.first, PHILIPS_BQML) == 2.134638
    factors = suv_factors(info)
    assert isinstance(factors.lbm_hume, Refused)  # neither size nor sex
    inside = volume.array > 0.5 * np.percentile(volume.array, 99.5)
    core = np.median(volume.array[10:-10][inside[10:-10]]) * factors.require()
    assert core == pytest.approx(1.0, abs=0.06)


def test_philips_ct_with_missing_slices_is_refused(shared_data):
    """8 of 24 slices were published; the hole is named."""
    with pytest.raises(Refused) as caught:
        read_series(files(shared_data / "philips_suvval_ct"))
    assert caught.value.code == "gap" and "215.600 mm" in caught.value.reason


def test_nema_phantom_needs_a_person_to_name_its_unit(shared_data):
    """Without Units it is refused; vouched for, the hot spheres are the high values although MONOCHROME1."""
    with pytest.raises(Refused) as caught:
        read_series(files(shared_data / "nema_iec_minimal_pet"))
    assert caught.value.code == "units-missing"
    volume, info = read_series(files(shared_data / "nema_iec_minimal_pet"), assume_units="BQML")
    assert volume.shape == (89, 192, 192) and volume.unit == "Bq/ml"
    assert any("MONOCHROME1" in note for note in info.notes)
    assert volume.array[:, :5, :5].max() < 0.1 * volume.array.max()
    assert isinstance(suv_factors(info).bw, Refused)


def test_jaszczak_phantom_is_a_stack_against_the_normal(shared_data):
    """45 frames of a Tc-99m RECON TOMO with negative spacing."""
    volume, info = read_series(files(shared_data / "nm_jaszczak"))
    assert volume.shape == (45, 128, 128) and volume.unit == "{counts}"
    assert [item.frame for item in info.slices[:2]] == [45, 44]


@pytest.mark.parametrize(("name", "code"), [("1.dcm", "slice-count"), ("2.dcm", "dynamic")])
def test_single_slices_of_a_study_are_refused(shared_data, name, code):
    """One of 324 slices, and one of a dynamic series."""
    with pytest.raises(Refused) as caught:
        read_series([shared_data / "flt_single" / name])
    assert caught.value.code == code


@pytest.mark.parametrize("name", sorted(KNOWN_FACTORS))
def test_factors_equal_those_of_calculate_suv(shared_data, name):
    """Eight scanners' headers: the factor for rescaled values is the known one."""
    text = (shared_data / "calculate_suv_vendor_metadata" / f"{name}-instances.json").read_text()
    headers = [header_of(extract) for extract in json.loads(text)]
    factor = suv_factors(headers).require()
    if "CNTS" in name:
        factor *= philips_factor(headers[0], PHILIPS_BQML) or philips_factor(headers[0], PHILIPS_SUV)
    assert factor == pytest.approx(KNOWN_FACTORS[name], rel=1e-9)


@pytest.mark.parametrize("name", ["ge_sts001_pet_raw", "ge_sts035_ibsi/PET", "philips_suvval_pt"])
def test_headers_are_byte_for_byte_the_scanners(shared_data, name):
    """Written again, the header of every slice gives the bytes of its file up to the pixel data."""
    info = read_series(files(shared_data / name))[1]
    for item in info.slices:
        assert item.path is not None
        buffer = BytesIO()
        item.header.save_as(buffer, implicit_vr=True, little_endian=True)
        written = buffer.getvalue()
        start = written.index(b"\x08\x00\x05\x00")  # SpecificCharacterSet, the first element of these files
        assert written[start:] in item.path.read_bytes()
