"""The kernel as a Parametric Map: the very same voxels, on the PET's spacing, in a place that is nobody's."""

from __future__ import annotations

from pathlib import Path

import highdicom
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from sop.derivation import is_own_output
from sop.kernel import kernel_object
from tests.dciodvfy import entity_errors, iod_errors
from tests.sop.companion_origin import KERNEL_SPACING, kernel, origin, read
from tests.sop.derived_series import source_series


def planes(ds: Dataset) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """First voxel of each frame, mm, and the frames in increasing position along the normal (highdicom sorts them)."""
    across, down = np.array(ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient,
                            dtype=float).reshape(2, 3)
    first = np.array([frame.PlanePositionSequence[0].ImagePositionPatient
                      for frame in ds.PerFrameFunctionalGroupsSequence], dtype=float)
    return first, np.argsort(first @ np.cross(across, down))


def test_the_kernel_comes_back_voxel_by_voxel(tmp_path: Path) -> None:
    """Float pixels, the axes not confused; the mapping says that the stored value is the weight, without unit."""
    made = origin(tmp_path)
    path = tmp_path / "kernel.dcm"
    path.write_bytes(kernel_object(kernel(), KERNEL_SPACING, made, made.series("kernel")))
    image = highdicom.imread(path)
    _, order = planes(image)
    stored = np.frombuffer(image.FloatPixelData, dtype="<f4").reshape(kernel().shape)
    assert np.array_equal(stored[order], kernel())
    assert np.array_equal(image.get_frames(apply_real_world_transform=True)[order], kernel())
    (mapping,) = image.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    assert (mapping.RealWorldValueSlope, mapping.MeasurementUnitsCodeSequence[0].CodeValue) == (1.0, "1")


def test_the_middle_voxel_lies_at_the_origin_of_a_frame_of_its_own(tmp_path: Path) -> None:
    """PET spacing and axes; no viewer can lay it over the patient."""
    made = origin(tmp_path)
    ds = read(kernel_object(kernel(), KERNEL_SPACING, made, made.series("kernel")))
    shared = ds.SharedFunctionalGroupsSequence[0]
    measures, plane = shared.PixelMeasuresSequence[0], shared.PlaneOrientationSequence[0]
    assert [float(value) for value in measures.PixelSpacing] == [4.6875, 4.0]
    assert float(measures.SpacingBetweenSlices) == 3.27
    across, down = np.array(plane.ImageOrientationPatient, dtype=float).reshape(2, 3)
    first, order = planes(ds)
    assert first[order[2]] + 3 * 4.6875 * down + 4 * 4.0 * across == pytest.approx([0, 0, 0], abs=1e-9)
    assert np.diff(first[order], axis=0) == pytest.approx(np.tile(3.27 * np.cross(across, down), (4, 1)))
    assert ds.FrameOfReferenceUID != made.source.frame_of_reference_uid


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0.6, 0.8, 0, 0, 0, -1)])
def test_the_standard_finds_no_fault(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    """dciodvfy and dcentvfy: no error, axial or not."""
    made = origin(tmp_path, source=source_series(orientation=orientation))
    path = tmp_path / "kernel.dcm"
    path.write_bytes(kernel_object(kernel(), KERNEL_SPACING, made, made.series("kernel")))
    assert not iod_errors(path) and not entity_errors([path, *made.derived.files], tmp_path)


def test_it_refers_to_source_and_derived_series_and_is_known_as_ours(tmp_path: Path) -> None:
    """Derived from the source's instances; both series listed; research use told; same input, same bytes."""
    made = origin(tmp_path)
    content = kernel_object(kernel(), KERNEL_SPACING, made, made.series("kernel"))
    assert content == kernel_object(kernel(), KERNEL_SPACING, made, made.series("kernel"))
    ds = read(content)
    (derivation,) = ds.SharedFunctionalGroupsSequence[0].DerivationImageSequence
    parents = [one.ReferencedSOPInstanceUID for one in derivation.SourceImageSequence]
    assert parents == list(made.source.sop_instance_uids)
    assert [item.SeriesInstanceUID for item in ds.ReferencedSeriesSequence] == [
        made.source.series, made.derived.series_instance_uid]
    (how,), (scheme,) = derivation.DerivationCodeSequence, ds.CodingSchemeIdentificationSequence
    assert how.CodeValue == "kernel-estimate" and how.CodingSchemeDesignator == scheme.CodingSchemeDesignator
    assert is_own_output(ds) and ds.ImageComments == "Research use, not for diagnosis"
    assert "5.50 x 6.00 x 6.25 mm" in ds.ContentDescription


def test_what_is_no_kernel_is_refused(tmp_path: Path) -> None:
    """Not finite, or no volume."""
    made = origin(tmp_path)
    for wrong in (np.full((3, 3, 3), np.nan, dtype=np.float32), np.ones((3, 3), dtype=np.float32)):
        with pytest.raises(ValueError, match="kernel"):
            kernel_object(wrong, KERNEL_SPACING, made, made.series("kernel"))
