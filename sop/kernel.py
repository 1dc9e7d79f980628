"""The kernel as a Parametric Map (PS3.3 A.75): float voxels, their sum one, on the PET's spacing.

A kernel tells how a point is blurred; it has no place in the patient. So it has a frame of reference of its own, its
centre voxel at the origin, its axes along those of the PET, and no viewer lays it over the patient.
"""

from __future__ import annotations

import numpy as np
from highdicom import PixelMeasuresSequence, PlaneOrientationSequence, PlanePositionSequence, VOILUTTransformation
from highdicom.enum import CoordinateSystemNames
from highdicom.pm import ParametricMap, RealWorldValueMapping
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes

from sop import modules
from sop.codes import kernel_estimate, kernel_weight, our_scheme
from sop.companion import CompanionSeries, Origin, instance_bytes, referenced_series, source_images
from sop.derivation import EQUIPMENT_NAME
from sop.uids import uid_from

__all__ = ["kernel_object"]


def kernel_object(kernel: NDArray[np.float32], spacing_mm: tuple[float, float, float], origin: Origin,
                  series: CompanionSeries) -> bytes:
    """The file of the kernel.

    kernel      (d, h, w), axes slice, row, column of the PET in increasing slice position.
    spacing_mm  between its voxels along (d, h, w).

    Raises ValueError where the kernel is not a finite volume.
    """
    values = np.ascontiguousarray(kernel, dtype=np.float32)
    if values.ndim != 3 or not np.isfinite(values).all():
        raise ValueError(f"a kernel of shape {values.shape} with finite values in it is needed")
    orientation = [float(text) for text in origin.source.orientation]
    reference = origin.reference_image
    reference.Rows, reference.Columns = values.shape[1:]
    reference.FrameOfReferenceUID = uid_from(
        origin.derivation.uid_root, "kernel frame of reference", origin.derived.series_instance_uid)
    reference.ImageOrientationPatient, reference.ImagePositionPatient = orientation, [0.0, 0.0, 0.0]
    reference.PixelSpacing, reference.SliceThickness = list(spacing_mm[1:]), spacing_mm[0]
    content = ParametricMap(
        [reference], values, series.series_instance_uid, series.series_number, reference.SOPInstanceUID, 1,
        EQUIPMENT_NAME, EQUIPMENT_NAME, origin.derivation.software_version, EQUIPMENT_NAME,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[_mapping(values)],
        voi_lut_transformations=[_window(values)],
        content_label="KERNEL", content_description=_description(origin),
        pixel_measures=PixelMeasuresSequence(spacing_mm[1:], spacing_mm[0], spacing_mm[0]),
        plane_orientation=PlaneOrientationSequence(CoordinateSystemNames.PATIENT, orientation),
        plane_positions=_positions(values.shape, spacing_mm, orientation),
        derivation=kernel_estimate(), coding_schemes=[our_scheme()],
    )
    _own_references(content, origin)
    _own_dimensions(content, origin)
    return instance_bytes(content, origin, series, 1)


def _mapping(values: NDArray[np.float32]) -> RealWorldValueMapping:
    """The stored values are the weights themselves (C.7.6.16.2.11), without a unit."""
    return RealWorldValueMapping(
        lut_label="WEIGHT", lut_explanation="Weight of the point spread kernel, their sum is one",
        unit=codes.UCUM.NoUnits, value_range=(float(values.min()), float(values.max())), slope=1.0, intercept=0.0,
        quantity_definition=kernel_weight())


def _window(values: NDArray[np.float32]) -> VOILUTTransformation:
    top = max(float(values.max()), 1e-6)
    return VOILUTTransformation(window_center=top / 2, window_width=top, voi_lut_function="LINEAR_EXACT")


def _description(origin: Origin) -> str:
    widths = origin.derivation.kernel_fwhm_mm
    told = "" if widths is None else f", FWHM {' x '.join(f'{width:.2f}' for width in widths)} mm"
    return f"Point spread kernel{told}"[:64]


def _positions(shape: tuple[int, ...], spacing_mm: tuple[float, float, float],
               orientation: list[float]) -> list[PlanePositionSequence]:
    """The first voxel of each plane, mm: the voxel in the middle of the kernel lies at the origin."""
    across, down = np.array(orientation).reshape(2, 3)
    across, down = across / np.linalg.norm(across), down / np.linalg.norm(down)
    along = np.cross(across, down)
    middle = [(n - 1) / 2 for n in shape]
    start = -middle[1] * spacing_mm[1] * down - middle[2] * spacing_mm[2] * across
    return [PlanePositionSequence(CoordinateSystemNames.PATIENT,
                                  [float(value) + 0.0 for value in start + (k - middle[0]) * spacing_mm[0] * along])
            for k in range(shape[0])]


def _own_references(content: Dataset, origin: Origin) -> None:
    """Derivation Image macro (C.7.6.16.2.6) from the source's instances; both series in C.12.2."""
    item = Dataset()
    item.DerivationDescription = f"Point spread kernel estimated by {origin.derivation.method}, " \
                                 f"{EQUIPMENT_NAME} {origin.derivation.software_version}"
    estimate = kernel_estimate()
    item.DerivationCodeSequence = Items([modules.code(estimate.value, estimate.scheme_designator, estimate.meaning)])
    item.SourceImageSequence = source_images(origin, origin.source.series_instance_uid)
    for frame in content.PerFrameFunctionalGroupsSequence:
        frame.pop("DerivationImageSequence", None)
    content.SharedFunctionalGroupsSequence[0].DerivationImageSequence = Items([item])
    content.ReferencedSeriesSequence = referenced_series(origin)


def _own_dimensions(content: Dataset, origin: Origin) -> None:
    """highdicom draws the UID of the dimensions; ours is the same for the same input."""
    uid = uid_from(origin.derivation.uid_root, "kernel dimensions", origin.derived.series_instance_uid)
    for item in (*content.DimensionOrganizationSequence, *content.DimensionIndexSequence):
        item.DimensionOrganizationUID = uid
