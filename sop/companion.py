"""What all companions of a derived PET series share: whose they are, their series, what they refer to, their bytes.

A companion is an object that tells of a derived series and is sent with it: measurement report, mapping to SUV,
kernel, pictures. highdicom makes its content; patient and study come byte for byte from the source, as in the derived
series; equipment, times and UIDs are set here, so that the same input gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType

from pydicom import dcmread
from pydicom.charset import convert_encodings
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian

from sop import modules
from sop.derivation import EQUIPMENT_NAME, Derivation
from sop.encoding import encoded, encoded_file_meta
from sop.modules import RESEARCH_USE, Clock
from sop.pet import DerivedSeries
from sop.series import SeriesInfo
from sop.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, uid_from

__all__ = ["KINDS", "CompanionSeries", "Origin", "instance_bytes", "instance_uid", "reference", "referenced_series",
           "source_images"]

#: kind -> (place of its series behind the derived one, SeriesDescription)
KINDS: Mapping[str, tuple[int, str]] = MappingProxyType({
    "report": (1, "NBD report"), "kernel": (2, "NBD kernel"), "pictures": (3, "NBD pictures"),
    "mapping": (4, "NBD SUV mapping"),
})
_LARGEST_IS = 2**31 - 1  # PS3.5 6.2
_MARKS = re.compile(r"\((?:update \d+|preview)\)")  # what tells a derived series from another of the same PET
# C.7.1.1, C.7.1.3, C.7.2.1 to C.7.2.3: whose study it is; its character set and time zone (C.12.1).
_SUBJECT = (
    "SpecificCharacterSet", "TimezoneOffsetFromUTC",
    "PatientName", "PatientID", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID",
    "PatientBirthDate", "PatientBirthTime", "PatientSex", "OtherPatientIDs", "OtherPatientIDsSequence",
    "OtherPatientNames", "EthnicGroup", "EthnicGroupCodeSequence", "PatientComments", "QualityControlSubject",
    "PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence",
    "PatientSpeciesDescription", "PatientSpeciesCodeSequence", "PatientBreedDescription",
    "PatientBreedCodeSequence", "ResponsiblePerson", "ResponsiblePersonRole", "ResponsibleOrganization",
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID", "ClinicalTrialTimePointID",
    "ClinicalTrialTimePointDescription",
    "StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
    "IssuerOfAccessionNumberSequence", "StudyDescription", "PhysiciansOfRecord", "NameOfPhysiciansReadingStudy",
    "ReferencedStudySequence", "ProcedureCodeSequence",
    "AdmittingDiagnosesDescription", "PatientAge", "PatientSize", "PatientWeight", "PatientBodyMassIndex",
    "PatientSexNeutered", "AdmissionID", "IssuerOfAdmissionIDSequence", "ServiceEpisodeID",
)
_TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
           "ReferringPhysicianName", "StudyID", "AccessionNumber")
_SUBJECT_TAGS = frozenset(int(tag_for_keyword(keyword) or 0) for keyword in _SUBJECT)
#: General Series (C.7.3.1), which an SR document has not: with a part that is unpaired, Laterality is not asked for.
_BODY_PART_TAGS = frozenset(int(tag_for_keyword(keyword) or 0) for keyword in ("BodyPartExamined", "Laterality"))
_DERIVED_TAGS = ["SOPClassUID", "SOPInstanceUID", "RescaleSlope", "ImagePositionPatient"]


@dataclass(frozen=True, eq=False)
class Origin:
    """What the companions of one derived series are made from.

    derived     SeriesInstanceUID, number and instances as they were written.
    headers     of the derived instances, in their order, without pixels: UIDs, RescaleSlope, ImagePositionPatient.
    clock       the time of processing.
    """

    source: SeriesInfo
    derived: DerivedSeries
    headers: tuple[Dataset, ...]
    derivation: Derivation
    clock: Clock

    @classmethod
    def of(cls, source: SeriesInfo, derived: DerivedSeries, derivation: Derivation, *, now: datetime) -> Origin:
        """With the headers read from the derived files. Raises OSError, pydicom.errors.InvalidDicomError."""
        headers = tuple(dcmread(path, stop_before_pixels=True, specific_tags=_DERIVED_TAGS) for path in derived.files)
        return cls(source, derived, headers, derivation,
                   Clock.at(now, str(source.first.get("TimezoneOffsetFromUTC") or "")))

    def series(self, kind: str) -> CompanionSeries:
        """The companion series of that kind: deterministic UID, a number that no other series of the study has."""
        place, description = KINDS[kind]
        if self.derivation.method != "nbd":
            description = description.replace("NBD", self.derivation.method)
        description = " ".join((description, *_MARKS.findall(self.derived.series_description)))
        uid = uid_from(self.derivation.uid_root, "companion series", self.derived.series_instance_uid, kind)
        return CompanionSeries(kind, uid, self._number(place), description)

    def _number(self, place: int) -> int:
        """Ten times the derived series' number and the place: two derived series next to each other never share one."""
        base, step = 10 * self.derived.series_number, 10
        if base + 10 * (len(self.derivation.taken_series_numbers) + 1) > _LARGEST_IS:
            base, step = self.derived.series_number, len(KINDS)
        number = base + place
        while number in self.derivation.taken_series_numbers:
            number += step
        return number

    @property
    def reference_image(self) -> Dataset:
        """A header for highdicom, which wants one to copy from: the study's UID and nothing of the patient."""
        image = Dataset()
        image.SOPClassUID, image.SOPInstanceUID = self.headers[0].SOPClassUID, self.headers[0].SOPInstanceUID
        image.StudyInstanceUID = self.source.study_instance_uid
        image.SeriesInstanceUID = self.derived.series_instance_uid
        for keyword in _TYPE_2:
            setattr(image, keyword, "")
        return image

    @property
    def evidence(self) -> list[Dataset]:
        """One header of references for each source and derived instance, each instance once."""
        found = []
        for series_uid, instances in self.instances.items():
            for sop_instance_uid, sop_class_uid in instances.items():
                item = Dataset()
                item.StudyInstanceUID, item.SeriesInstanceUID = self.source.study_instance_uid, series_uid
                item.SOPClassUID, item.SOPInstanceUID = sop_class_uid, sop_instance_uid
                found.append(item)
        return found

    @property
    def instances(self) -> dict[str, dict[str, str]]:
        """SeriesInstanceUID -> SOP Instance UID -> SOP Class UID."""
        return {
            self.source.series_instance_uid: {one.sop_instance_uid: one.sop_class_uid for one in self.source.slices},
            self.derived.series_instance_uid: {str(one.SOPInstanceUID): str(one.SOPClassUID) for one in self.headers},
        }


@dataclass(frozen=True)
class CompanionSeries:
    """One series of companions; kind: a key of KINDS."""

    kind: str
    series_instance_uid: str
    series_number: int
    series_description: str


def instance_uid(origin: Origin, series: CompanionSeries, number: int) -> str:
    """SOP Instance UID of the `number`-th instance, from 1, of a companion series."""
    return uid_from(origin.derivation.uid_root, "companion", series.series_instance_uid, str(number))


def reference(sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    """One item that references an instance (PS3.3 Table 10-11)."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
    return item


def referenced_series(origin: Origin) -> Items:
    """ReferencedSeriesSequence of C.12.2: all instances of the source and of the derived series."""
    found = []
    for series_uid, instances in origin.instances.items():
        item = Dataset()
        item.SeriesInstanceUID = series_uid
        item.ReferencedInstanceSequence = Items(
            reference(sop_class_uid, uid) for uid, sop_class_uid in instances.items())
        found.append(item)
    return Items(found)


def source_images(origin: Origin, *series_instance_uids: str) -> Items:
    """SourceImageSequence of C.7.6.1.1.4: all instances of these series (source, derived), purpose 121322."""
    instances = origin.instances
    found = []
    for series_uid in series_instance_uids:
        for uid, sop_class_uid in instances[series_uid].items():
            item = reference(sop_class_uid, uid)
            item.PurposeOfReferenceCodeSequence = Items(
                [modules.code("121322", "DCM", "Source image for image processing operation")])
            found.append(item)
    return Items(found)


def instance_bytes(content: Dataset, origin: Origin, series: CompanionSeries, number: int) -> bytes:
    """The whole file of the `number`-th instance of a companion series, Explicit VR Little Endian.

    content   what the object says (made by highdicom); changed here: series, equipment, times and UIDs are set.
    """
    _series_and_equipment(content, origin, series, number)
    _times(content, origin.clock)
    first = modules.copied(origin.source.first)
    encodings = convert_encodings(first.get("SpecificCharacterSet"))
    taken = _SUBJECT_TAGS if content.Modality == "SR" else _SUBJECT_TAGS | _BODY_PART_TAGS
    subject = {tag: value for tag, value in encoded(first).items() if tag in taken}
    for tag in [tag for tag in content.keys() if int(tag) in taken]:  # noqa: SIM118 (iterating reads elements)
        del content[tag]
    missing = Dataset()
    for keyword in _TYPE_2:
        setattr(missing, keyword, "")
    elements = encoded(missing) | encoded(content, encodings) | subject
    return _file_meta(content) + b"".join(value for _, value in sorted(elements.items()))


def _series_and_equipment(content: Dataset, origin: Origin, series: CompanionSeries, number: int) -> None:
    """C.7.3.1, C.7.5.1, C.12.1: ours, not the scanner's; our item in ContributingEquipmentSequence is how we know it
    again when it comes back (sop.derivation.is_own_output)."""
    derivation = origin.derivation
    content.SeriesInstanceUID, content.SeriesNumber = series.series_instance_uid, series.series_number
    content.SeriesDescription, content.InstanceNumber = series.series_description, number
    content.SOPInstanceUID = instance_uid(origin, series, number)
    content.Manufacturer = content.ManufacturerModelName = EQUIPMENT_NAME
    content.SoftwareVersions = derivation.software_version
    content.DeviceSerialNumber = derivation.station or EQUIPMENT_NAME
    if derivation.institution:
        content.InstitutionName = derivation.institution
    if derivation.station:
        content.StationName = derivation.station
    ours = modules.contributing_equipment(Dataset(), derivation, origin.clock)
    content.ContributingEquipmentSequence = ours.ContributingEquipmentSequence
    if derivation.research_use and "Rows" in content:
        content.ImageComments = RESEARCH_USE


def _times(content: Dataset, clock: Clock) -> None:
    """highdicom reads the clock of the machine; what it set is replaced by the time of processing."""
    for name in ("InstanceCreation", "Series", "Content"):
        setattr(content, f"{name}Date", clock.date)
        setattr(content, f"{name}Time", clock.time)
    if "DateOfSecondaryCapture" in content:
        content.DateOfSecondaryCapture, content.TimeOfSecondaryCapture = clock.date, clock.time


def _file_meta(content: Dataset) -> bytes:
    meta = Dataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = content.SOPClassUID
    meta.MediaStorageSOPInstanceUID = content.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    return encoded_file_meta(meta)
