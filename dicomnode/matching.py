"""Which series is eligible, whether it is complete, and which CT belongs to it: pure rules, no disk, no clock.

Headers are pydicom data sets without pixels; times are unix seconds and come as arguments. The rules live in
eligibility.py, completeness.py and ctchoice.py; this is their door.
"""

from __future__ import annotations

from dicomnode.arrival import Arrival, Vector, arrival_of, normal_of
from dicomnode.completeness import Completeness, completeness
from dicomnode.ctchoice import GuideChoice, GuideDecision, SeriesGeometry, choose_guide, geometry_of, guide_wait
from dicomnode.eligibility import Eligibility, eligible

__all__ = [
    "Arrival",
    "Completeness",
    "Eligibility",
    "GuideChoice",
    "GuideDecision",
    "SeriesGeometry",
    "Vector",
    "arrival_of",
    "choose_guide",
    "completeness",
    "eligible",
    "geometry_of",
    "guide_wait",
    "normal_of",
]
