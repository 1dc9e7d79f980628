"""How figures, times and names of gates are written for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

__all__ = ["AXES", "GATES", "Times", "figure", "percent"]

AXES = ("slice", "row", "column")

#: Gate (deconv.safeguards) -> what is measured, and its unit.
GATES = {
    "activity": ("change of the total activity", "%"),
    "activity-scale": ("correction of the solver's own total", "%"),
    "maximum": ("highest value, over the source's", "times"),
    "kernel-centroid": ("the kernel's centre, off the middle", "voxels"),
    "kernel-maximum": ("share of the kernel in its middle voxel", ""),
    "kernel-width": ("widest axis of the kernel", "mm"),
    "slice-activity": ("largest change of a slice, blurred again", "%"),
    "end-slice-activity": ("the same in the slices at the ends", "%"),
    "residual": ("what blurring again does not explain", "%"),
    "slice-gain": ("correction of a single slice", "%"),
    "seam": ("step at the border of the region", ""),
    "uncertainty": ("voxels whose uncertainty is impossible", "voxels"),
}


class Times:
    """Moments of dicomnode.views (ISO 8601, UTC) as the clock of the site shows them (schedule.timezone)."""

    def __init__(self, zone: str) -> None:
        self.zone = zone
        self._zone = ZoneInfo(zone)

    def say(self, moment: str | None) -> str:
        """To the second; "" for none.

        >>> Times("Europe/Berlin").say("2026-09-23T18:47:11Z")
        '2026-09-23 20:47:11'
        """
        return f"{datetime.fromisoformat(moment).astimezone(self._zone):%Y-%m-%d %H:%M:%S}" if moment else ""

    def minute(self, moment: str | None) -> str:
        """To the minute."""
        return self.say(moment)[:16]


def figure(value: Any, unit: str = "") -> str:
    """Four digits, at most four decimals, and the unit; a share as per cent; "–" for what was not measured.

    >>> figure(0.00215, "%"), figure(6.1137, "mm"), figure(1.26e-10, "%"), figure(0.0), figure(None), figure(12345.6)
    ('0.215 %', '6.114 mm', '< 0.0001 %', '0', '–', '12346')
    """
    if value is None:
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    number = float(value) * (100.0 if unit == "%" else 1.0)
    if 0 < abs(number) < 5e-5:
        text = "< 0.0001"
    elif abs(number) >= 1000:
        text = f"{number:.0f}"
    else:
        text = f"{number:.4g}" if abs(number) >= 0.001 or not number else f"{number:.4f}"
    return f"{text} {unit}".rstrip()


def percent(change: float | None, digits: int = 1) -> str:
    """A relative change with its sign.

    >>> percent(0.283), percent(-1e-10, 3), percent(None)
    ('+28.3 %', '+0.000 %', '–')
    """
    return "–" if change is None else f"{round(100 * change, digits) + 0.0:+.{digits}f} %"  # never -0.0
