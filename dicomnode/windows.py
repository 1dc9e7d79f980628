"""When jobs may start: weekly windows in a time zone, across midnight and the change of the clocks. Pure, no clock.

A window is "mon-fri 20:00-06:00": on these days (left out: every day) it opens at the first time, and closes at the
second, on the next day where that is not later than the first. The days are those on which it opens: "fri 20:00-06:00"
lasts until Saturday morning.

A time of day means the first moment at which the clock has reached it. So a time that is skipped in spring is the
moment of the change, one that comes twice in autumn is the first, a window across the change is an hour shorter or
longer, and windows that touch on paper touch in fact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from dicomnode.sections import Route, Schedule

__all__ = ["Openings", "Window", "Windows", "parse_window"]

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = timedelta(days=1)
LOOK_BACK = 2  # days: a window lasts up to 24 hours, and a zone may skip a day of the calendar
HORIZON = 15  # days: what stays open for so long never closes, for windows repeat each week


@dataclass(frozen=True)
class Window:
    """Days of the week (0 is Monday) on which it opens; minutes after midnight of that day, `end` up to 2880."""

    days: frozenset[int]
    start: int
    end: int


def parse_window(text: str) -> Window:
    """The window that `text` describes. Raises ValueError.

    >>> parse_window("sat,sun 00:00-24:00")
    Window(days=frozenset({5, 6}), start=0, end=1440)
    >>> parse_window("22:00-06:00").end
    1800
    """
    try:
        *named, times = text.split()
        days = _days(named[0]) if named else frozenset(range(7))
        start, end = (_minutes(part) for part in times.split("-"))
    except (ValueError, IndexError):
        raise ValueError(f"{text!r} is no window; write e.g. \"mon-fri 20:00-06:00\"") from None
    if len(named) > 1 or start >= 1440:
        raise ValueError(f"{text!r} is no window; write e.g. \"mon-fri 20:00-06:00\"")
    return Window(days, start, end if end > start else end + 1440)


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {day % 7 for day in range(begin, end + 1 if end >= begin else end + 8)}
    return frozenset(found)


def _minutes(text: str) -> int:
    hours, minutes = (int(part) for part in text.split(":"))
    if not (0 <= minutes < 60 and 0 <= 60 * hours + minutes <= 1440):
        raise ValueError(text)
    return 60 * hours + minutes


class Windows:
    """Windows in one time zone; none at all means always. Times are seconds since 1970-01-01 UTC."""

    def __init__(self, texts: Sequence[str], timezone: str) -> None:
        self._windows = tuple(parse_window(text) for text in texts)
        self._zone = ZoneInfo(timezone)
        self.timezone = timezone

    @property
    def always(self) -> bool:
        return not self._windows

    def is_open(self, now: float) -> bool:
        return self.always or any(start <= now for start, _ in self._spans(now, now))

    def opens_at(self, now: float) -> float:
        """`now` where it is open, else when it opens next."""
        if self.always:
            return now
        return max(now, next(start for start, _ in self._spans(now, math.inf)))

    def closes_at(self, now: float) -> float:
        """The end of the time that is open at `now` or, where none is, of the next one; infinite: it never closes."""
        if self.always:
            return math.inf
        end = next(end for _, end in self._spans(now, math.inf))
        return end if end < now + HORIZON * DAY.total_seconds() else math.inf

    def open_seconds(self, begin: float, end: float) -> float:
        """How much open time lies between the two moments."""
        if self.always:
            return max(0.0, end - begin)
        return sum((max(0.0, min(end, until) - max(begin, since)) for since, until in self._spans(begin, end)), 0.0)

    def text(self, moment: float, *, now: float) -> str:
        """A moment as people at the site write it; with its date where it is not within a day of `now`."""
        local = datetime.fromtimestamp(moment, self._zone)
        near = abs(moment - now) < DAY.total_seconds()
        return f"{local:%H:%M} {self.timezone}" if near else f"{local:%a %Y-%m-%d %H:%M} {self.timezone}"

    def _spans(self, begin: float, end: float) -> Iterator[tuple[float, float]]:
        """(opens, closes) of the times that close after `begin` and open not after `end`, in order, merged."""
        since = until = -math.inf
        for start, stop in self._single(begin, end):
            if stop <= begin or stop <= start:
                continue
            if start <= until:
                until = max(until, stop)
            else:
                if until > begin:
                    yield since, until
                since, until = start, stop
            if until - begin > (HORIZON + 1) * DAY.total_seconds() and end == math.inf:
                break  # it never closes
        if until > begin:
            yield since, until

    def _single(self, begin: float, end: float) -> Iterator[tuple[float, float]]:
        """Each day's windows, ordered by their opening; from the days before `begin` until they open after `end`."""
        day = datetime.fromtimestamp(begin, self._zone).date() - LOOK_BACK * DAY
        while True:
            for start, stop in _of_day(self._windows, self._zone, day):
                if start > end:
                    return
                yield start, stop
            day += DAY
            if end != math.inf and _moment(self._zone, day, 0) > end:
                return


@lru_cache(maxsize=4096)
def _of_day(windows: tuple[Window, ...], zone: ZoneInfo, day: date) -> tuple[tuple[float, float], ...]:
    """(opens, closes) of the windows of a day, in order. Kept: a forecast asks for the same days hundreds of times."""
    return tuple(sorted((_moment(zone, day, window.start), _moment(zone, day, window.end))
                        for window in windows if day.weekday() in window.days))


@lru_cache(maxsize=4096)
def _moment(zone: ZoneInfo, day: date, minutes: int) -> float:
    """The first moment at which the clock has reached so many minutes after midnight of `day`."""
    wall = datetime(day.year, day.month, day.day) + timedelta(minutes=minutes)
    late = wall.replace(tzinfo=zone).timestamp()
    if _wall(zone, late) == wall:
        return late
    # Skipped: by the offset after the change the moment lies before the change, by the one before it after.
    early = wall.replace(tzinfo=zone, fold=1).timestamp()
    while late - early > 1:
        middle = float((late + early) // 2)
        early, late = (early, middle) if _wall(zone, middle) >= wall else (middle, late)
    return late


def _wall(zone: ZoneInfo, moment: float) -> datetime:
    return datetime.fromtimestamp(moment, zone).replace(tzinfo=None, fold=0)


class Openings:
    """The windows of every route; a route without its own, or gone from the configuration, has the schedule's."""

    def __init__(self, schedule: Schedule, routes: Iterable[Route]) -> None:
        self._default = Windows(schedule.windows, schedule.timezone)
        self._own = {route.name: Windows(route.windows, schedule.timezone)
                     for route in routes if route.windows is not None}

    def of(self, route: str) -> Windows:
        return self._own.get(route, self._default)

    def may_start(self, now: float) -> Callable[[str], bool]:
        """For `Ledger.claim`: whether jobs of a route may start now."""
        return lambda route: self.of(route).is_open(now)
