"""QC pictures as Secondary Capture (PS3.3 A.8.1): one colour image an instance, in one series.

Single frames rather than a multi-frame object: every PACS and viewer stores and shows them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from highdicom.sc import SCImage
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRLittleEndian

from sop.companion import CompanionSeries, Origin, instance_bytes, referenced_series, source_images
from sop.derivation import EQUIPMENT_NAME

__all__ = ["picture_objects"]


def picture_objects(pictures: Sequence[tuple[str, NDArray[np.uint8]]], origin: Origin,
                    series: CompanionSeries) -> list[bytes]:
    """One file for each (title, rgb): rgb uint8 (rows, columns, 3), without names or identifiers of the patient.

    Raises ValueError or TypeError where a picture is no such array.
    """
    return [_object(title, rgb, origin, series, number) for number, (title, rgb) in enumerate(pictures, start=1)]


def _object(title: str, rgb: NDArray[np.uint8], origin: Origin, series: CompanionSeries, number: int) -> bytes:
    content = SCImage.from_ref_dataset(
        origin.reference_image, np.ascontiguousarray(rgb), "RGB", 8, "PATIENT", series.series_instance_uid,
        series.series_number, str(origin.headers[0].SOPInstanceUID), number, EQUIPMENT_NAME,
        patient_orientation=("L", "F"), transfer_syntax_uid=ExplicitVRLittleEndian)
    content.ImageType = ["DERIVED", "SECONDARY"]
    content.ConversionType = "WSD"
    content.PatientOrientation = []  # C.7.6.1, type 2C: several projections in one picture have none
    content.BurnedInAnnotation = "NO"  # headings and axes, nothing that names the patient
    content.SecondaryCaptureDeviceManufacturer = EQUIPMENT_NAME
    content.SecondaryCaptureDeviceManufacturerModelName = EQUIPMENT_NAME
    content.SecondaryCaptureDeviceSoftwareVersions = origin.derivation.software_version
    content.DerivationDescription = title[:1024]
    content.SourceImageSequence = source_images(origin, origin.source.series_instance_uid,
                                                origin.derived.series_instance_uid)
    content.ReferencedSeriesSequence = referenced_series(origin)
    return instance_bytes(content, origin, series, number)
