"""The measurement report of a derived PET series: TID 1500 (PS3.16) as Comprehensive 3D SR (PS3.3 A.35.13).

    Imaging Measurement Report
      observer: device (our name), procedure reported
      group "deconvolution"    method, preset and settings; kernel FWHM along the three axes; activity change; residual
      group "gates"            every gate: what was measured, whether it passed
      groups "region N"        two for each region of large uptake, before and after: maximum, mean, peak, volume, its
                               centre in the patient, the slice it was measured in. One tracking UID for both.

Numbers are those of the report on disk, to the last bit (FloatingPointValue).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from highdicom.sr import (
    AlgorithmIdentification,
    Comprehensive3DSR,
    CoordinatesForMeasurement3D,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    GraphicTypeValues3D,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RealWorldValueMap,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import RealWorldValueMappingStorage

from sop.codes import our_scheme, own, quantity, unit
from sop.companion import CompanionSeries, Origin, instance_bytes, instance_uid
from sop.derivation import EQUIPMENT_NAME
from sop.uids import uid_from

__all__ = ["report_object"]

# Of the kernel that is kept, on the PET's voxels, at half maximum. Not "row direction": in DICOM that runs along a row.
_AXES = (("fwhm-slices", "FWHM of the kernel on the PET's voxels, from slice to slice"),
         ("fwhm-rows", "FWHM of the kernel on the PET's voxels, from row to row"),
         ("fwhm-columns", "FWHM of the kernel on the PET's voxels, from column to column"))
_STATISTICS = (("max", codes.SCT.Maximum), ("mean", codes.SCT.Mean), ("peak", codes.DCM.PeakValueWithinROI))


def report_object(told: Mapping[str, Any], origin: Origin, series: CompanionSeries, *,
                  mapping: CompanionSeries | None) -> bytes:
    """The file of the report.

    told     the report of the job (report.json): method, preset, settings, device, gates, and "looks", the measures of
             dicomnode.looks: unit, kernel, regions, activity_change, residual_rms.
    mapping  the series of the mapping to SUV, where there is one: regions after deconvolution refer to it.

    Raises KeyError or ValueError where `told` lacks what is to be reported.
    """
    looks = told["looks"]
    algorithm = _algorithm(told, origin)
    groups = [_deconvolution(looks, origin, algorithm), *_gates(told["gates"], origin)]
    for region in looks["regions"]:
        groups += _region(region, looks["unit"], origin, algorithm, mapping)
    document = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_observer(origin)),
        procedure_reported=codes.cid100.PETUnspecifiedBodyRegion,
        imaging_measurements=groups)
    content = Comprehensive3DSR(
        _evidence(origin, mapping), document[0], series.series_instance_uid, series.series_number,
        instance_uid(origin, series, 1), 1, manufacturer=EQUIPMENT_NAME, is_complete=True, is_final=True,
        coding_schemes=[our_scheme()])
    return instance_bytes(content, origin, series, 1)


def _evidence(origin: Origin, mapping: CompanionSeries | None) -> list[Dataset]:
    """Headers of all that the report rests on. The first is what highdicom copies from; it names no patient."""
    first = origin.reference_image
    rest = [item for item in origin.evidence if item.SOPInstanceUID != first.SOPInstanceUID]
    if mapping is not None:
        item = Dataset()
        item.StudyInstanceUID, item.SeriesInstanceUID = first.StudyInstanceUID, mapping.series_instance_uid
        item.SOPClassUID, item.SOPInstanceUID = RealWorldValueMappingStorage, instance_uid(origin, mapping, 1)
        rest.append(item)
    return [first, *rest]


def _observer(origin: Origin) -> ObserverContext:
    """TID 1004: the node."""
    station = origin.derivation.station
    return ObserverContext(codes.DCM.Device, DeviceObserverIdentifyingAttributes(
        uid=uid_from(origin.derivation.uid_root, "device", EQUIPMENT_NAME, station),
        name=station or EQUIPMENT_NAME, manufacturer_name=EQUIPMENT_NAME,
        model_name=f"{EQUIPMENT_NAME} {origin.derivation.software_version}"))


def _algorithm(told: Mapping[str, Any], origin: Origin) -> AlgorithmIdentification:
    """TID 4019: method, version, preset and all settings."""
    parameters = [f"preset {told['preset']}", f"device {told['device']}",
                  f"settings {json.dumps(told['settings'], sort_keys=True)}"]
    return AlgorithmIdentification(str(told["method"]), origin.derivation.software_version, parameters,
                                   manufacturer=EQUIPMENT_NAME)


def _tracking(origin: Origin, name: str) -> TrackingIdentifier:
    return TrackingIdentifier(uid_from(origin.derivation.uid_root, "tracking", origin.derived.series_instance_uid,
                                       name), name)


def _deconvolution(looks: Mapping[str, Any], origin: Origin,
                   algorithm: AlgorithmIdentification) -> MeasurementsAndQualitativeEvaluations:
    """What holds for the whole series. Activity change in percent; the residual's RMS in the display unit."""
    measured = []
    if looks["kernel"] is not None:
        measured += [Measurement(own(value, meaning), float(width), unit("mm"))
                     for (value, meaning), width in zip(_AXES, looks["kernel"]["fwhm_mm"], strict=True)]
    measured.append(Measurement(own("activity-change", "Change of total activity by deconvolution"),
                                100.0 * float(looks["activity_change"]), unit("%")))
    measured.append(Measurement(_residual_code(looks), float(looks["residual_rms"]), unit(looks["unit"])))
    told = []
    if origin.derivation.research_use:
        told.append(QualitativeEvaluation(own("intended-use", "Intended use"),
                                          Code("113009", "DCM", "For Research")))
    return MeasurementsAndQualitativeEvaluations(
        _tracking(origin, "deconvolution"), algorithm_id=algorithm, measurements=measured,
        finding_type=own("deconvolution", "Deconvolution of the whole series"), qualitative_evaluations=told or None)


def _residual_code(looks: Mapping[str, Any]) -> Code:
    """Source minus what: a method without a kernel blurs nothing again."""
    if looks["kernel"] is None:
        return own("residual-mean", "Source minus means of the image over its voxels, RMS")
    return own("residual-rms", "Residual after blurring again, root mean square")


def _gates(gates: Sequence[Mapping[str, Any]], origin: Origin) -> list[MeasurementsAndQualitativeEvaluations]:
    """One group: for each gate what was measured, and whether it passed. A value that is no number is left out."""
    if not gates:
        return []
    passed = {True: codes.DCM.Succeeded, False: codes.DCM.Failed}
    return [MeasurementsAndQualitativeEvaluations(
        _tracking(origin, "gates"), finding_type=own("gates", "Safeguards that the result must pass"),
        measurements=[Measurement(_gate_code(gate), float(gate["measured"]), _gate_unit(gate))
                      for gate in gates if gate["measured"] is not None],
        qualitative_evaluations=[QualitativeEvaluation(_gate_code(gate), passed[bool(gate["ok"])]) for gate in gates])]


def _gate_unit(gate: Mapping[str, Any]) -> Code:
    """mm for a width; all others are ratios or voxels (deconv.safeguards.gates)."""
    return unit("mm" if gate["name"] == "kernel-width" else "1")


def _gate_code(gate: Mapping[str, Any]) -> Code:
    """Its limit stands in the meaning; shortened, the value keeps apart what begins alike."""
    name = str(gate["name"])
    value = f"g-{name}" if len(name) <= 14 else f"g-{name[:8]}-{name[-5:]}"
    return own(value, f"Gate {name}, limit {gate['limit']:g}")


def _region(region: Mapping[str, Any], display_unit: str, origin: Origin, algorithm: AlgorithmIdentification,
            mapping: CompanionSeries | None) -> list[MeasurementsAndQualitativeEvaluations]:
    """Before and after: the same place in the patient, each measured in its own image."""
    parent = int(region["source_slice"])
    source = origin.source.slices[parent]
    derived = origin.headers[_nearest(origin, parent, region["centre_mm"])]
    before = SourceImageForMeasurementGroup(source.sop_class_uid, source.sop_instance_uid,
                                            None if source.frame is None else [source.frame])
    after = SourceImageForMeasurementGroup(str(derived.SOPClassUID), str(derived.SOPInstanceUID))
    value_map = None if mapping is None else RealWorldValueMap(instance_uid(origin, mapping, 1))
    return [
        _measured(region, "before", display_unit, origin, before, None, None),
        _measured(region, "after", display_unit, origin, after, algorithm, value_map),
    ]


def _nearest(origin: Origin, parent: int, centre_mm: Sequence[float]) -> int:
    """Which of the two derived slices of a source slice lies nearer to the centre of a region."""
    across, down = np.array([float(text) for text in origin.source.orientation]).reshape(2, 3)
    normal = np.cross(across, down)
    heights = [float(np.dot(np.array(origin.headers[index].ImagePositionPatient, dtype=float), normal))
               for index in (2 * parent, 2 * parent + 1)]
    wanted = float(np.dot(np.array(centre_mm, dtype=float), normal))
    return 2 * parent + int(abs(heights[1] - wanted) < abs(heights[0] - wanted))


def _measured(region: Mapping[str, Any], when: str, display_unit: str, origin: Origin,
              image: SourceImageForMeasurementGroup, algorithm: AlgorithmIdentification | None,
              value_map: RealWorldValueMap | None) -> MeasurementsAndQualitativeEvaluations:
    name = f"region {region['label']}"
    point = CoordinatesForMeasurement3D(
        GraphicTypeValues3D.POINT, np.array([region["centre_mm"]], dtype=float), origin.source.frame_of_reference_uid)
    measured = [
        Measurement(quantity(display_unit), float(region[when][key]), unit(display_unit), derivation=derivation)
        for key, derivation in _STATISTICS]
    # The centre tells where the region is. It is not where the maximum lies, so no uptake is said to come from there.
    measured.append(Measurement(codes.SCT.Volume, float(region["volume_ml"]), unit("ml"),
                                referenced_coordinates=[point]))
    return MeasurementsAndQualitativeEvaluations(
        _tracking(origin, name), session=f"{when} deconvolution", algorithm_id=algorithm, source_images=[image],
        finding_type=own("large-uptake", "Region of large uptake"), finding_sites=[FindingSite(codes.SCT.EntireBody)],
        measurements=measured, referenced_real_world_value_map=value_map)
