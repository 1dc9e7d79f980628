"""Whether a route would want a series that a source lists: pure rules on what C-FIND answered, which is never all.

An attribute that the answer lacks, or holds empty, is unknown; where the known ones do not decide, the series counts as
wanted: its header has the last word once it is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pydicom.dataset import Dataset

from dicomnode.eligibility import GEOMETRY, PET_IMAGE, eligible
from dicomnode.headers import values
from dicomnode.routing import CALLING_AE_TITLE, When, matches

__all__ = ["Verdict", "judge", "return_keys"]

#: What eligibility looks at and C-FIND may tell: "" or many values as they come.
ASKED = ("SOPClassUID", "ImageType", "SeriesType", "CorrectedImage", "CountsSource", "Units", "BurnedInAnnotation")
#: An answer without these says nothing; a PET that had these values would be taken.
ASSUMED = {"SOPClassUID": PET_IMAGE, "Modality": "PT", "ImageType": ["ORIGINAL", "PRIMARY"],
           "SeriesType": ["WHOLE BODY", "IMAGE"], "CorrectedImage": ["ATTN"], "Units": "BQML"}
UNDECIDED = ("header-incomplete", "units")  # eligibility codes that a C-FIND answer cannot prove


class Route(Protocol):
    """What the rules need to know of a route."""

    @property
    def name(self) -> str: ...
    @property
    def when(self) -> When: ...
    @property
    def guide(self) -> str: ...


@dataclass(frozen=True)
class Verdict:
    """`wanted`, why, and whether a CT of the study may be wanted as a guide."""

    wanted: bool
    reason: str
    guided: bool = False


def return_keys(routes: Iterable[Route]) -> tuple[str, ...]:
    """The keywords to ask for besides those of every series query; attributes inside sequences cannot be asked for."""
    named = {keyword for route in routes for keyword in route.when if "." not in keyword}
    return tuple(sorted({*ASKED, *named} - {CALLING_AE_TITLE, "Modality"}))


def judge(answer: Dataset, routes: Iterable[Route], *, calling_ae: str) -> Verdict:
    """What to think of a series by its C-FIND answer.  calling_ae: the AE title that would send it."""
    verdict = eligible(_likely(answer), own_output=False)
    if verdict.kind != "pet" and verdict.code not in UNDECIDED:
        return Verdict(False, verdict.reason)
    possible = []
    for route in routes:
        sure = _matches(route.when, answer, calling_ae)
        if sure is not False:
            possible.append(route)
        if sure:
            break
    if not possible:
        return Verdict(False, "no route matches")
    names = " or ".join(route.name for route in possible)
    return Verdict(True, f"route {names} wants it" if sure else f"route {names} may want it",
                   any(route.guide != "never" for route in possible))


def _likely(answer: Dataset) -> Dataset:
    """The most that the series can be: known attributes as answered, the others as a PET that is taken has them."""
    header = Dataset()
    for keyword in {*ASKED, *ASSUMED}:
        known = values(answer, keyword) or ASSUMED.get(keyword)
        if known is not None:
            setattr(header, keyword, known if isinstance(known, str) else list(known))
    header.FrameOfReferenceUID = "1.2.3"
    for keyword, count in zip(GEOMETRY[1:], (3, 6, 2), strict=True):
        setattr(header, keyword, [0] * count)
    return header


def _matches(when: When, answer: Dataset, calling_ae: str) -> bool | None:
    """True, False, or None where an unknown attribute decides."""
    sure = True
    for keyword, globs in when.items():
        if keyword != CALLING_AE_TITLE and not values(answer, keyword):
            sure = False
        elif not matches({keyword: globs}, answer, calling_ae):
            return False
    return True if sure else None
