"""How values are said on a page: times in the node's zone, durations, sizes, and the tone of a state.

Every time is a <time> element with its moment in UTC; what is shown is the clock of the site, whose zone stands in the
footer of each page.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

from markupsafe import Markup, escape

__all__ = ["TONES", "Words", "brief", "duration", "parts_of", "size", "tone"]

#: state -> class of style.css: good (done), run (goes on by itself now), wait (goes on by itself later), bad (a person)
TONES = {
    "receiving": "run", "complete": "run", "matched": "run", "waiting": "wait", "held": "bad", "ignored": "none",
    "queued": "wait", "running": "run", "failed": "wait", "built": "run", "sending": "run", "delivered": "good",
    "committed": "good", "cancelled": "none", "superseded": "none", "dead": "bad",
    "fits": "good", "past-end": "wait", "not-tonight": "wait", "unknown": "none",
    "problem": "bad", "warning": "wait", "over": "good",
}


def tone(state: str) -> str:
    """The class of a state's badge; "none" for one that needs no eye."""
    return TONES.get(state, "none")


def duration(seconds: float | None) -> str:
    """Seconds in words, to two places.

    >>> duration(42), duration(600), duration(7500), duration(200000), duration(None)
    ('42 s', '10 min', '2 h 5 min', '2 d 7 h', '–')
    """
    if seconds is None:
        return "–"
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold.

    >>> size(512), size(72_386_486_272)
    ('512 B', '72.4 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parts_of(reason: str) -> tuple[str, str]:
    """What is wrong, and the remedy that the sentence names ("" where none).

    >>> parts_of("slices are missing. Remedy: send the series again")
    ('slices are missing', 'send the series again')
    """
    what, _, remedy = reason.partition("Remedy:")
    return what.strip().rstrip("."), remedy.strip()


_LONG_UID = re.compile(r"\d+(?:\.\d+){2,}")


def brief(text: str) -> Markup:
    """A sentence with its long UIDs cut to their end; the title of each has the whole.

    >>> str(brief("series 2.25.183457288553045224361355652320253575862 is held"))
    'series <span class="uid" title="2.25.183457288553045224361355652320253575862">…320253575862</span> is held'
    """
    parts, at = Markup(""), 0
    for found in _LONG_UID.finditer(text):
        if len(found.group()) > 24:
            parts += escape(text[at:found.start()]) + Markup('<span class="uid" title="{}">…{}</span>').format(
                found.group(), found.group()[-12:])
            at = found.end()
    return parts + escape(text[at:])


class Words:
    """Times as people at the site read them. A moment is ISO 8601 (dicomnode.views), unix seconds, or None."""

    def __init__(self, zone: str, now: float) -> None:
        self.zone = zone
        self._zone = ZoneInfo(zone)
        self._now = datetime.fromtimestamp(now, self._zone)

    tone = staticmethod(tone)
    duration = staticmethod(duration)
    size = staticmethod(size)
    parts_of = staticmethod(parts_of)
    brief = staticmethod(brief)

    def _local(self, moment: str | float) -> datetime:
        if isinstance(moment, str):
            return datetime.fromisoformat(moment).astimezone(self._zone)
        return datetime.fromtimestamp(moment, self._zone)

    def clock(self, moment: str | float | None) -> Markup:
        """Today the time alone, else the day with it, of another year the date: "21:06", "22 Sep 21:06"."""
        if moment is None:
            return Markup("–")
        local = self._local(moment)
        if local.date() == self._now.date():
            text = f"{local:%H:%M}"
        elif abs((local - self._now).days) < 300:
            text = f"{local.day} {local:%b %H:%M}"
        else:
            text = f"{local:%Y-%m-%d}"
        return _element(local, text, self.zone)

    def moment(self, moment: str | float | None) -> Markup:
        """Date and time, always alike, for columns: "2026-09-22 21:06"."""
        return Markup("–") if moment is None else _element(self._local(moment), f"{self._local(moment):%Y-%m-%d %H:%M}",
                                                           self.zone)

    def since(self, moment: str | float | None) -> str:
        """How long ago, or how long until then: "3 min"."""
        return duration(None if moment is None else abs((self._now - self._local(moment)).total_seconds()))

    def day(self, iso: str) -> str:
        """A day of the calendar as people write it.

        >>> Words("UTC", 0).day("2026-09-23")
        'Wed 23 Sep 2026'
        """
        one = date.fromisoformat(iso)
        return f"{one:%a} {one.day} {one:%b %Y}"


def _element(local: datetime, text: str, zone: str) -> Markup:
    utc = local.astimezone(UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        f"{utc:%Y-%m-%dT%H:%M:%SZ}", f"{local:%a %Y-%m-%d %H:%M:%S} {zone}", text)
