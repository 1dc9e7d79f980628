"""Routes: the first whose globs all match the header decides method, preset, region and destinations.

A route's `when` maps DICOM keywords to globs (`*`, `?`, `[abc]`), upper and lower case alike, padding removed:

    Modality = "PT"                                            one glob
    StationName = ["PETCT1", "PETCT2*"]                        any of several
    "RadiopharmaceuticalInformationSequence.Radiopharmaceutical" = "*PSMA*"    any item of the sequence
    CallingAETitle = "ORTHANC"                                 who sent it (not a DICOM attribute of the object)

An attribute with several values matches by any of them, or by all joined with a backslash. An attribute that is
absent or empty has the value "": `*` matches it, as universal matching does (PS3.4 C.2.2.2.3), `?*` asks for a value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import translate
from functools import lru_cache
from typing import Protocol, TypeVar

from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset

from dicomnode.headers import items, values

__all__ = ["CALLING_AE_TITLE", "Route", "When", "first_route", "matches", "validate_when"]

CALLING_AE_TITLE = "CallingAETitle"

When = Mapping[str, str | Sequence[str]]

_BINARY_VRS = {"AT", "OB", "OD", "OF", "OL", "OV", "OW", "UN"}


class Route(Protocol):
    """Anything with globs to match by."""

    @property
    def when(self) -> When: ...


AnyRoute = TypeVar("AnyRoute", bound=Route)


def first_route(routes: Iterable[AnyRoute], header: Dataset, *, calling_ae: str) -> AnyRoute | None:
    """The first route that matches the header and the calling AE title, or None."""
    return next((route for route in routes if matches(route.when, header, calling_ae)), None)


def matches(when: When, header: Dataset, calling_ae: str) -> bool:
    """Whether every keyword of `when` has a value that one of its globs matches. An empty `when` matches all."""
    return all(_any_glob(globs, _candidates(keyword, header, calling_ae)) for keyword, globs in when.items())


def _any_glob(globs: str | Sequence[str], candidates: Sequence[str]) -> bool:
    patterns = [globs] if isinstance(globs, str) else globs
    return any(_pattern(glob).match(value.strip().casefold()) for glob in patterns for value in candidates)


@lru_cache(maxsize=1024)
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(translate(glob.strip().casefold()))


def _candidates(keyword: str, header: Dataset, calling_ae: str) -> list[str]:
    """The values a glob may match: each value of the attribute, in each item on the way, and all values joined."""
    if keyword == CALLING_AE_TITLE:
        return [calling_ae]
    *sequences, last = keyword.split(".")
    holders = [header]
    for sequence in sequences:
        holders = [item for holder in holders for item in items(holder, sequence)]
    found: list[str] = []
    for holder in holders:
        many = values(holder, last)
        found += [*many, "\\".join(many)] if many else [""]
    return found or [""]


def validate_when(when: Mapping[str, object]) -> list[str]:
    """What is wrong with the keys and globs of a `when`, one sentence each; [] if it can be used."""
    problems = []
    for keyword, globs in when.items():
        problem = _keyword_problem(keyword)
        if problem:
            problems.append(problem)
        several = list(globs) if isinstance(globs, list | tuple) else [globs]
        if not several:
            problems.append(f"{keyword}: an empty list of globs never matches; give at least one, or drop the key")
        no_text = [glob for glob in several if not isinstance(glob, str)]
        problems += [f"{keyword}: {glob!r} is no text; write it in quotes" for glob in no_text]
    return problems


def _keyword_problem(keyword: str) -> str:
    """What is wrong with one dotted keyword, or ""."""
    if keyword == CALLING_AE_TITLE:
        return ""
    parts = keyword.split(".")
    for part in parts:
        if not part or tag_for_keyword(part) is None:  # retired entries of the dictionary have an empty keyword
            return f"{keyword}: {part!r} is no DICOM keyword{_suggestion(part)}"
    *sequences, (last, vr) = [(part, dictionary_VR(part)) for part in parts]
    for part, part_vr in sequences:
        if part_vr != "SQ":
            return f"{keyword}: {part} is no sequence (VR {part_vr}), nothing can follow it"
    if vr == "SQ":
        return f"{keyword}: {last} is a sequence; name an attribute of its items after a dot"
    if _BINARY_VRS & set(vr.split(" or ")):
        return f"{keyword}: {last} has no text to match (VR {vr})"
    return ""


def _suggestion(word: str) -> str:
    known = [CALLING_AE_TITLE, *(entry[4] for entry in DicomDictionary.values() if entry[4])]
    near = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), near, n=1, cutoff=0.6)
    return f"; did you mean {near[close[0]]}?" if close else ""
