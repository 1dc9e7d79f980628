"""The key under which PSFs are kept: real headers give it, damaged ones give blanks, people may complete it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from sop.scanner import ScannerKey, nuclide, scanner_key


def pet_header(folder: Path) -> Dataset:
    """The first PET header in a folder of real data."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".dcm", ""):
            header = dcmread(path, stop_before_pixels=True, force=True)
            if header.get("Modality") == "PT":
                return header
    raise AssertionError(f"no PET in {folder.name}")


def tracer(code: str = "", half_life: str = "") -> Dataset:
    """A header with one radiopharmaceutical item."""
    header, item, concept = Dataset(), Dataset(), Dataset()
    if code:
        concept.CodeValue = code
        item.RadionuclideCodeSequence = Sequence([concept])
    if half_life:
        item.RadionuclideHalfLife = half_life
    header.RadiopharmaceuticalInformationSequence = Sequence([item])
    return header


@pytest.mark.parametrize(("folder", "text"), [
    ("ge_sts001_pet_raw", "GE MEDICAL SYSTEMS DISCOVERY ST, OSEM, 3.27 x 4.69 x 4.69 mm, F-18"),
    ("ge_sts035_ibsi", "GE MEDICAL SYSTEMS DISCOVERY ST, OSEM, 3.27 x 5.47 x 5.47 mm, F-18"),
    ("philips_suvval_pt", "PHILIPS INGENUITY TF PET/CT, 2103, BLOB-OS-TF, 4.00 x 4.00 x 4.00 mm, F-18"),
    ("flt_single", "1094, OSEM2D 2I8S XYZ GAUSS6.00, 5.00 x 4.07 x 4.07 mm, F-18"),
])
def test_real_scanners_have_a_key(shared_data: Path, folder: str, text: str) -> None:
    """Two GE series of one scanner but unlike voxels are apart."""
    key = scanner_key(pet_header(shared_data / folder))
    assert str(key) == text and key.missing == ()


def test_a_header_without_a_scanner_says_what_it_lacks(shared_data: Path) -> None:
    """The NEMA phantom's minimal header; a person may say the rest."""
    key = scanner_key(pet_header(shared_data / "nema_iec_minimal_pet"))
    assert key.missing == ("model", "reconstruction", "radionuclide")
    told = key.with_values({"model": "Biograph  mCT", "reconstruction": "psf+tof 3i21s", "radionuclide": "ga-68"})
    assert told.missing == () and told.radionuclide == "Ga-68"
    assert told.model == "BIOGRAPH MCT" and told.spacing == key.spacing


@pytest.mark.parametrize(("header", "name"), [
    (tracer("C-111A1"), "F-18"), (tracer("77004003"), "F-18"), (tracer("C-131A3", "6586.2"), "Ga-68"),
    (tracer(half_life="6588"), "F-18"), (tracer(half_life="4080"), "Ga-68"),
    (tracer(half_life="500000"), "T1/2 5e+05 s"),
    (tracer("Z-99"), "Z-99"), (tracer(), ""), (Dataset(), ""),
])
def test_the_radionuclide_goes_by_code_then_by_half_life(header: Dataset, name: str) -> None:
    """Old and new code of one nuclide are one; an unknown one stays apart from all others."""
    assert nuclide(header) == name


def test_case_and_blanks_do_not_make_another_scanner() -> None:
    """"Siemens " and "SIEMENS" are one; a serial number goes before a station name."""
    one, other = Dataset(), Dataset()
    one.Manufacturer, one.StationName, one.DeviceSerialNumber = "Siemens ", "CTAWP1", "123"
    other.Manufacturer, other.StationName, other.DeviceSerialNumber = "SIEMENS", "CTAWP2", "123"
    assert scanner_key(one) == scanner_key(other)
    assert scanner_key(one).device == "123"


def test_iterations_and_subsets_are_part_of_the_key() -> None:
    """GE keeps them in private elements."""
    header = Dataset()
    block = header.private_block(0x0009, "GEMS_PETD_01", create=True)
    block.add_new(0xB2, "SL", 3)
    block.add_new(0xB3, "SL", 24)
    key = scanner_key(header)
    assert (key.iterations, key.subsets) == ("3", "24") and "3 iterations 24 subsets" in str(key)


def test_damaged_values_count_as_absent() -> None:
    """A key never raises: what cannot be read cannot match."""
    header = Dataset()
    header.PixelSpacing, header.SliceThickness = ["4", "4"], "3"
    header.PixelSpacing = ["4"]
    assert scanner_key(header) == ScannerKey()
    assert str(ScannerKey()) == "unknown scanner"


def test_a_key_makes_a_round_trip_and_knows_its_parts() -> None:
    """As the ledger keeps it; a part that does not exist is refused by name."""
    key = ScannerKey("GE", "MI", "7", "VPFX-S", "STANDARD", "4", "16", "2.79 x 2.73 x 2.73", "Ga-68")
    assert ScannerKey(**key.as_dict()) == key
    with pytest.raises(ValueError, match="no colour"):
        key.with_values({"colour": "blue"})
