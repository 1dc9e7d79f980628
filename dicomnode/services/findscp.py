"""Which entity matches a query, and what is answered: PS3.4 C.2.2.2 (matching), C.4.1 (C-FIND), C.6 (the models).

Pure: an entity is a function from keyword to values. A key is matched on its own level and on those above it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from pydicom.charset import python_encoding
from pydicom.datadict import dictionary_VR, keyword_for_tag
from pydicom.dataset import Dataset

from dicomnode.errors import NodeError
from dicomnode.headers import values

__all__ = ["HEADER_KEYS", "LEVELS", "BadQuery", "Entity", "Query", "answer", "matches", "matches_value", "read_query"]

#: keyword -> its values as text, () where it has none
Entity = Callable[[str], tuple[str, ...]]

LEVELS = ("PATIENT", "STUDY", "SERIES", "IMAGE")
UNIQUE = {"PATIENT": "PatientID", "STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}

#: By level, what is read from a header: keys that may be matched and returned.
HEADER_KEYS: Mapping[str, tuple[str, ...]] = {
    "PATIENT": ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientComments",
                "EthnicGroup"),
    "STUDY": ("StudyDate", "StudyTime", "AccessionNumber", "StudyID", "StudyDescription", "ReferringPhysicianName",
              "PatientAge", "PatientSize", "PatientWeight", "Occupation"),
    "SERIES": ("Modality", "SeriesNumber", "SeriesDescription", "SeriesDate", "SeriesTime", "BodyPartExamined",
               "ProtocolName", "Laterality", "PatientPosition", "Manufacturer", "ManufacturerModelName", "StationName",
               "InstitutionName", "OperatorsName", "PerformingPhysicianName", "FrameOfReferenceUID",
               "PerformedProcedureStepStartDate", "PerformedProcedureStepStartTime", "PerformedProcedureStepID",
               "PerformedProcedureStepDescription"),
    "IMAGE": ("InstanceNumber", "ContentDate", "ContentTime", "AcquisitionDate", "AcquisitionTime",
              "AcquisitionNumber", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "ImageType"),
}
_COUNTED = {
    "PATIENT": ("NumberOfPatientRelatedStudies", "NumberOfPatientRelatedSeries", "NumberOfPatientRelatedInstances"),
    "STUDY": ("StudyInstanceUID", "ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"),
    "SERIES": ("SeriesInstanceUID", "NumberOfSeriesRelatedInstances"),
    "IMAGE": ("SOPInstanceUID", "SOPClassUID", "AvailableTransferSyntaxUID"),
}
_OF_THE_QUERY = frozenset({"QueryRetrieveLevel", "SpecificCharacterSet", "RetrieveAETitle", "InstanceAvailability",
                           "TimezoneOffsetFromUTC", "QueryRetrieveView"})
_WILD = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})  # C.2.2.2.4
_RANGE = frozenset({"DA", "TM"})  # C.2.2.2.5
_SINGLE_BYTE = ("ISO_IR 100", "ISO_IR 101", "ISO_IR 109", "ISO_IR 110", "ISO_IR 126", "ISO_IR 127", "ISO_IR 138",
                "ISO_IR 144", "ISO_IR 148", "ISO_IR 166", "ISO_IR 192", "GB18030")


class BadQuery(NodeError):
    """The identifier does not fit the information model."""

    status = 0xA900  # PS3.4 Table C.4-1: identifier does not match SOP class


@dataclass(frozen=True)
class Query:
    """A C-FIND, C-MOVE or C-GET identifier: level, keys with what they must match (() is universal)."""

    level: str
    keys: Mapping[str, tuple[str, ...]]
    charset: str = ""
    unsupported: tuple[str, ...] = ()

    def uids(self, level: str) -> tuple[str, ...]:
        """The list of UIDs (or PatientIDs) given for the unique key of a level; () where none or with wild cards."""
        return self.exact(UNIQUE[level])

    def exact(self, keyword: str) -> tuple[str, ...]:
        """The values given for a key; () where none or with wild cards."""
        given = self.keys.get(keyword, ())
        return () if any("*" in value or "?" in value for value in given) else given


def read_query(identifier: Dataset, *, patient_root: bool, retrieve: bool = False) -> Query:
    """Raises BadQuery: a wrong level, or a unique key of a level above (PS3.4 C.4.1.2.2.1: hierarchical) missing.

    `retrieve`: a C-MOVE or C-GET, which must also give the unique key of its own level (C.4.2.2.1), a single value or a
    list of UIDs.
    """
    levels = LEVELS if patient_root else LEVELS[1:]
    level = "".join(values(identifier, "QueryRetrieveLevel")[:1]).upper()
    if level not in levels:
        raise BadQuery(f"QueryRetrieveLevel must be one of {', '.join(levels)}")
    keys, unsupported = {}, []
    known = _supported(level)
    for element in identifier:
        keyword = keyword_for_tag(element.tag)
        if keyword in _OF_THE_QUERY or element.tag.element == 0:
            continue
        if keyword in known:
            keys[keyword] = tuple(value for value in values(identifier, keyword) if value)
        else:
            unsupported.append(keyword or str(element.tag))
    query = Query(level, keys, "".join(values(identifier, "SpecificCharacterSet")[:1]), tuple(unsupported))
    for above in levels[:levels.index(level)]:
        given = query.uids(above)
        if len(given) != 1 and not (retrieve and given):
            raise BadQuery(f"a query at level {level} must give one {UNIQUE[above]}")
    if retrieve and not query.uids(level):
        raise BadQuery(f"a retrieval at level {level} must give {UNIQUE[level]}")
    return query


def _supported(level: str) -> frozenset[str]:
    """Header keys down to this level, what is counted at this level, the unique keys above."""
    shown = LEVELS[:LEVELS.index(level) + 1]
    return frozenset((*(key for name in shown for key in (UNIQUE[name], *HEADER_KEYS[name])), *_COUNTED[level]))


def matches(query: Query, entity: Entity) -> bool:
    """Whether the entity has, for every key, a value that matches."""
    return all(matches_value(keyword, wanted, entity(keyword)) for keyword, wanted in query.keys.items() if wanted)


def matches_value(keyword: str, wanted: tuple[str, ...], have: tuple[str, ...]) -> bool:
    """PS3.4 C.2.2.2.1 to C.2.2.2.5: universal, list of UIDs, range, wild card, single value; multi-valued: any.

    >>> matches_value("StudyDate", ("20240101-20240131",), ("20240117",))
    True
    >>> matches_value("PatientName", ("mu*",), ("Muster^Anna",))
    True
    """
    if not wanted or wanted == ("*",):
        return True
    kind = dictionary_VR(keyword)
    return any(_matches_one(kind, pattern, value) for pattern in wanted for value in (have or ("",)))


def _matches_one(kind: str, pattern: str, value: str) -> bool:
    if kind in _RANGE:
        return _in_range(kind, pattern, value)
    if kind == "PN":  # C.2.2.2.1.1 leaves case to the SCP; each component group by itself
        wanted = _folded(pattern)
        return any(_wild(wanted, _folded(group)) for group in (value, *value.split("=")))
    if kind in _WILD:
        return _wild(pattern, value)
    if kind in ("IS", "DS", "US", "UL", "SS", "SL"):
        return _number(pattern) == _number(value)
    return pattern == value


def _folded(name: str) -> str:
    return name.casefold().rstrip("^= ")


def _wild(pattern: str, value: str) -> bool:
    """`*` and `?` only: brackets stand for themselves."""
    return fnmatch.fnmatchcase(value, pattern.replace("[", "[[]"))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _in_range(kind: str, pattern: str, value: str) -> bool:
    """Single date or time, or a range with both ends in it; what has no date is in no range."""
    low, dash, high = pattern.partition("-")
    if not value:
        return False
    first, last = _moment(kind, low, "0"), _moment(kind, high if dash else low, "9")
    return (not low or first <= _moment(kind, value, "0")) and (not (high or not dash) or
                                                                _moment(kind, value, "0") <= last)


def _moment(kind: str, text: str, digit: str) -> str:
    """A date as YYYYMMDD, a time with all its digits: `10` begins at 100000.000000 and ends at 10:59:59.999999.

    Dots and colons of ACR-NEMA (PS3.5 Table 6.2-1, notes) are dropped.
    """
    whole, fraction = text, ""
    if kind == "TM":
        whole, _, fraction = text.partition(".")
    digits = re.sub(r"[^0-9]", "", whole)
    return digits if kind == "DA" else digits.ljust(6, digit) + fraction.ljust(6, digit)


def answer(query: Query, entity: Entity, *, ae_title: str) -> Dataset:
    """The identifier of a pending response (C.4.1.1.3.2): the keys asked for, the unique keys, where to retrieve."""
    response = Dataset()
    response.QueryRetrieveLevel = query.level
    response.RetrieveAETitle = ae_title
    response.InstanceAvailability = "ONLINE"
    shown = dict.fromkeys((*query.keys, *(UNIQUE[name] for name in LEVELS[:LEVELS.index(query.level) + 1])))
    found = {keyword: entity(keyword) for keyword in shown}
    charset = _charset(found, query.charset)
    if charset:
        response.SpecificCharacterSet = charset
    for keyword, have in found.items():
        if have or keyword in query.keys:
            setattr(response, keyword, _typed(keyword, have))
    return response


def _typed(keyword: str, have: tuple[str, ...]) -> list[str] | str | int | None:
    """As pydicom takes it; None where a header holds what its VR does not allow."""
    kind = dictionary_VR(keyword)
    try:
        if kind in ("IS", "US", "UL", "SS", "SL") and have:
            return int(have[0])
        if kind == "DS":
            [float(value) for value in have]
    except ValueError:
        return None
    return list(have) if len(have) > 1 else "".join(have) or None


def _charset(found: Mapping[str, tuple[str, ...]], asked: str) -> str:
    """The peer's own SpecificCharacterSet where it can say everything, UTF-8 where not; empty: plain ASCII."""
    text = "".join(_all(found))
    if text.isascii():
        return ""
    if asked in _SINGLE_BYTE:
        try:
            text.encode(python_encoding[asked])
            return asked
        except (UnicodeEncodeError, LookupError):
            return "ISO_IR 192"
    return "ISO_IR 192"


def _all(found: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    for have in found.values():
        yield from have
