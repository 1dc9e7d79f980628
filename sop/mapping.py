"""Real World Value Mapping (PS3.3 A.46) of the derived PET to SUVbw, an object of its own.

RealWorldValueSlope maps the stored value itself (C.7.6.16.2.11), so it holds the slope of the slice, the scanner's
factor (Philips) and the SUV factor of sop.suv: SUVbw = stored value x RealWorldValueSlope. Slopes differ from slice to
slice, so every instance has a mapping of its own. The PET objects stay as they are.
"""

from __future__ import annotations

from highdicom.pm import RealWorldValueMapping
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.sr.codedict import codes
from pydicom.uid import RealWorldValueMappingStorage

from sop.codes import unit
from sop.companion import CompanionSeries, Origin, instance_bytes, reference, referenced_series
from sop.modules import RESEARCH_USE
from sop.pet import TOP_CODE
from sop.suv import suv_factors

__all__ = ["mapping_object", "real_world_slopes"]


def real_world_slopes(origin: Origin) -> dict[str, float]:
    """SOP Instance UID of each derived instance -> SUVbw of stored value 1. Raises Refused where there is no SUV."""
    factor = suv_factors(origin.source).require("bw")
    return {str(header.SOPInstanceUID): float(header.RescaleSlope) * origin.source.slices[index // 2].factor * factor
            for index, header in enumerate(origin.headers)}


def mapping_object(origin: Origin, series: CompanionSeries) -> bytes:
    """The file of the mapping. Raises Refused where the headers lead to no SUV."""
    content = Dataset()
    content.SOPClassUID = RealWorldValueMappingStorage
    content.Modality = "RWV"
    content.ContentLabel, content.ContentCreatorName = "SUVBW", ""
    content.ContentDescription = f"SUVbw; {RESEARCH_USE}" if origin.derivation.research_use else "SUVbw"
    items = []
    for header, slope in zip(origin.headers, real_world_slopes(origin).values(), strict=True):
        item = Dataset()
        item.ReferencedImageSequence = Items([reference(str(header.SOPClassUID), str(header.SOPInstanceUID))])
        item.RealWorldValueMappingSequence = Items([RealWorldValueMapping(
            lut_label="SUVBW", lut_explanation="Standardized Uptake Value, body weight", unit=unit("SUVbw"),
            value_range=(0, TOP_CODE), slope=slope, intercept=0.0, quantity_definition=codes.DCM.Suvbw)])
        items.append(item)
    content.ReferencedImageRealWorldValueMappingSequence = Items(items)
    content.ReferencedSeriesSequence = Items(referenced_series(origin)[1:])
    return instance_bytes(content, origin, series, 1)
