"""How times are written in a report."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

__all__ = ["Times"]


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
