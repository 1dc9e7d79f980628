"""What the derived PET series is called, says of its making, refers to, and keeps byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from sop.derivation import is_own_output
from tests.factories import enhanced_pet
from tests.sop.derived_series import derive, read_back, save, source_series, values_of, written

PET = "1.2.840.10008.5.1.4.1.1.128"


def test_a_series_of_its_own_in_the_same_study(tmp_path: Path) -> None:
    """Rules 29, 30, 33: new UIDs, DERIVED PRIMARY, a number and a name of its own; file meta as in the data set."""
    series, _, info = derive(source_series(), tmp_path / "derived")
    slices = read_back(series.files)
    assert {ds.SeriesInstanceUID for ds in slices} == {series.series_instance_uid} != {info.series_instance_uid}
    assert tuple(ds.SOPInstanceUID for ds in slices) == series.sop_instance_uids
    for ds in slices:
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.file_meta.MediaStorageSOPClassUID == ds.SOPClassUID == PET
        assert ds.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert list(ds.ImageType) == ["DERIVED", "PRIMARY"]
    assert (slices[0].SeriesNumber, slices[0].SeriesDescription) == (1005, "NBD deblurred")
    assert (series.series_number, series.series_description) == (1005, "NBD deblurred")


@pytest.mark.parametrize(("changes", "number", "description"), [
    ({"taken_series_numbers": {1005, 1006}}, 1007, "NBD deblurred"),
    ({"series_number_offset": 50}, 55, "NBD deblurred"),
    ({"series_description": "{source} NBD"}, 1005, "PET AC NBD"),
    ({"preset": "preview"}, 1005, "NBD deblurred (preview)"),
    ({"method": "tv"}, 1005, "tv deblurred"),
    ({"preset": "preview", "series_description": "Preview of {source}"}, 1005, "Preview of PET AC"),
    ({"series_description": "{source} " + "x" * 61}, 1005, "PE " + "x" * 61),
])
def test_number_and_description_can_be_told(changes: dict, number: int, description: str, tmp_path: Path) -> None:
    """Rule 33: past the numbers that are taken; a preview always says so; NBD is said of NBD alone; at most 64
    characters."""
    ds = written(tmp_path, changes=changes)[0]
    assert (ds.SeriesNumber, ds.SeriesDescription) == (number, description)


def test_it_says_how_it_was_made(tmp_path: Path) -> None:
    """Rule 31: method, preset, version, kernel width and guide; before them what the source says of itself."""
    ds = written(tmp_path, changes={"guide_series_uid": "1.2.3.4"}, DerivationDescription="anonymised",
                 ImageComments="arms up")[0]
    for text in ("nbd", "best", "1.2.3", "5.50 x 6.00 x 6.25 mm", "1.2.3.4", "anonymised"):
        assert text in ds.DerivationDescription
    code = ds.DerivationCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("113085", "DCM")
    assert ds.ImageComments == "Research use, not for diagnosis; arms up"


def test_a_site_may_turn_off_the_research_comment(tmp_path: Path) -> None:
    """Then the source's comment stays, and none is made up."""
    ds = written(tmp_path / "a", changes={"research_use": False}, ImageComments="arms up")[0]
    assert ds.ImageComments == "arms up"
    assert "ImageComments" not in written(tmp_path / "b", changes={"research_use": False})[0]


def test_it_says_from_what_it_was_made(tmp_path: Path) -> None:
    """Rule 31: the source slices on either side, purpose 121322, all listed under their series."""
    source = source_series()
    slices = read_back(derive(source, tmp_path / "derived")[0].files)
    for i, ds in enumerate(slices):
        named = [item.ReferencedSOPInstanceUID for item in ds.SourceImageSequence]
        sides = [i // 2, i // 2 + (1 if i % 2 else -1)]
        assert named == [source[s].SOPInstanceUID for s in sides if 0 <= s < len(source)]
        assert {item.PurposeOfReferenceCodeSequence[0].CodeValue for item in ds.SourceImageSequence} == {"121322"}
        assert ds.ReferencedSeriesSequence[0].SeriesInstanceUID == source[0].SeriesInstanceUID
        listed = {item.ReferencedSOPInstanceUID for item in ds.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
        assert listed == set(named)


def test_it_says_by_whom_it_was_made_and_is_recognised(tmp_path: Path) -> None:
    """Rules 32, 38: our equipment beside what the source names; a series that comes back is known."""
    earlier = Dataset()
    earlier.Manufacturer = "Gateway"
    ds = written(tmp_path, changes={"institution": "Hospital", "station": "NODE1"},
                 ContributingEquipmentSequence=[earlier])[0]
    theirs, ours = ds.ContributingEquipmentSequence
    assert theirs.Manufacturer == "Gateway"
    assert (ours.Manufacturer, ours.SoftwareVersions) == ("dicomnode", "1.2.3")
    assert (ours.InstitutionName, ours.StationName) == ("Hospital", "NODE1")
    assert ours.PurposeOfReferenceCodeSequence[0].CodeValue == "109102"
    assert is_own_output(ds)
    assert not is_own_output(source_series()[0])


def test_own_output_is_known_by_the_root_of_the_site_alone(tmp_path: Path) -> None:
    """A PACS may drop sequences; the generic root is anybody's."""
    ds = written(tmp_path, changes={"uid_root": "1.2.840.99999"})[0]
    del ds.ContributingEquipmentSequence
    assert is_own_output(ds, "1.2.840.99999")
    assert not is_own_output(ds, "1.2.840.9999")
    ds.SeriesInstanceUID = "2.25.1"
    assert not is_own_output(ds)


@pytest.mark.parametrize(("charset", "name"), [
    ("ISO_IR 100", "Müller^Jörg".encode("latin-1")),
    ("ISO_IR 192", "山田^太郎".encode()),
    (["", "ISO 2022 IR 87"], b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B"),
    ("ISO_IR 100", b"M\x81ller^\xff\xfe"),
    ("ISO_IR 192", b"broken\xff\xfe^utf"),
])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_names_survive_byte_for_byte(charset: str | list[str], name: bytes, syntax: str, tmp_path: Path) -> None:
    """Rule 34: also where the bytes do not fit the character set they claim."""
    name += b" " * (len(name) % 2)
    source = source_series(SpecificCharacterSet=charset, PatientName="@" * len(name))
    for ds in source:
        ds.file_meta.TransferSyntaxUID = syntax
    paths = save(source, tmp_path / "source")
    for path in paths:
        path.write_bytes(path.read_bytes().replace(b"@" * len(name), name))
    for path in derive(paths, tmp_path / "derived")[0].files:
        raw = dcmread(path).get_item("PatientName")
        assert raw.value == name


def test_what_describes_the_old_grid_is_gone(tmp_path: Path) -> None:
    """Rule 11: overlays, icon, ranges, private copies; the factors of the same private block stay."""
    source = source_series(vendor="PHILIPS", units="CNTS", PixelAspectRatio=["1", "1"], SmallestImagePixelValue=0,
                           LargestImagePixelValue=99, NumberOfTimeSlices=1)
    for ds in source:
        ds.add_new((0x6000, 0x0010), "US", 30)
        ds.add_new((0x6002, 0x3000), "OW", b"\0\0")
        icon = Dataset()
        icon.Rows = 1
        ds.IconImageSequence = [icon]
        ds.private_block(0x7053, "Philips PET Private Group").add_new(0x03, "LO", "old.img")
        for creator, elements in (("SIEMENS CSA HEADER", (0x10, 0x20)), ("GEMS_PETD_01", (0x69, 0xA2, 0xDF, 0x0D))):
            block = ds.private_block(0x0029 if "CSA" in creator else 0x0009, creator, create=True)
            for element in elements:
                block.add_new(element, "OB" if element != 0x0D else "DT", b"\1\2" if element != 0x0D else "20200102")
    ds = read_back(derive(source, tmp_path / "derived")[0].files)[0]
    for keyword in ("PixelAspectRatio", "SmallestImagePixelValue", "LargestImagePixelValue", "IconImageSequence",
                    "NumberOfTimeSlices"):
        assert keyword not in ds
    assert not [tag for tag in ds.keys() if tag.group & 0xFF00 == 0x6000]  # noqa: SIM118
    assert (0x7053, 0x1003) not in ds and (0x7053, 0x1009) in ds
    assert (0x0029, 0x1010) not in ds and (0x0029, 0x1020) not in ds
    assert (0x0009, 0x1069) not in ds and (0x0009, 0x10A2) not in ds and (0x0009, 0x10DF) not in ds
    assert (0x0009, 0x100D) in ds
    assert "ReconstructionDiameter" in ds


def test_forbidden_attributes_are_not_added(tmp_path: Path) -> None:
    """Rule 35: no PatientPosition beside PatientOrientationCodeSequence."""
    assert "PatientPosition" not in written(tmp_path)[0]


def test_standard_extended_attributes_stay(tmp_path: Path) -> None:
    """Rule 37: RescaleType and the like are copied."""
    assert written(tmp_path, RescaleType="BQML")[0].RescaleType == "BQML"


def test_an_enhanced_source_gives_a_classic_series(tmp_path: Path) -> None:
    """Rule 29: classic PET images that refer to the frames."""
    slices = source_series()
    source = enhanced_pet(slices=12, rows=30, columns=26, values=np.stack([values_of(ds) for ds in slices]))
    derived = read_back(derive([source], tmp_path / "derived")[0].files)
    assert {ds.SOPClassUID for ds in derived} == {PET}
    assert len({ds.SOPInstanceUID for ds in derived}) == 24
    assert "PerFrameFunctionalGroupsSequence" not in derived[0] and "NumberOfFrames" not in derived[0]
    assert derived[7].SourceImageSequence[0].ReferencedFrameNumber == 4
    assert derived[0].Units == "BQML" and "assumed" not in derived[0].DerivationDescription
