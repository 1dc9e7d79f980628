"""DICOM dates and times as points on one clock: VR DA, TM and DT [PS3.5 6.2].

Times are local to the scanner; TimezoneOffsetFromUTC (0008,0201) shifts all of a data set alike and cancels in every
difference. An offset written inside a DT is dropped for the same reason: the clock beside it shows the same hour.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

__all__ = ["parse_date", "parse_datetime", "parse_time"]

_DATE = re.compile(r"(\d{4})(\d{2})(\d{2})|(\d{4})\.(\d{2})\.(\d{2})")
_TIME = re.compile(r"(\d{2})(?::?(\d{2})(?::?(\d{2})(?:\.(\d{1,6}))?)?)?")
_DATETIME = re.compile(r"(\d{8})(\d{2}(?:\d{2}(?:\d{2}(?:\.\d{1,6})?)?)?)([+-]\d{4})?")


def parse_date(value: str) -> datetime:
    """Midnight of a DA value, "20260218" or the old "2026.02.18". Raises ValueError.

    >>> parse_date("20260218")
    datetime.datetime(2026, 2, 18, 0, 0)
    """
    match = _DATE.fullmatch(value.strip("\0 "))
    if not match:
        raise ValueError(f"not a date (DA): {len(value)} characters")
    year, month, day = (int(part) for part in match.groups() if part is not None)
    return datetime(year, month, day)


def parse_time(value: str) -> timedelta:
    """Time since midnight of a TM value; all digits of the fraction count. Raises ValueError.

    >>> parse_time("112011.05").total_seconds()
    40811.05
    """
    match = _TIME.fullmatch(value.strip("\0 "))
    if not match:
        raise ValueError(f"not a time (TM): {len(value)} characters")
    hours, minutes, seconds = (int(part or 0) for part in match.groups()[:3])
    if hours > 23 or minutes > 59 or seconds > 60:  # 60 is a leap second
        raise ValueError("not a time (TM): out of range")
    micros = int((match.group(4) or "").ljust(6, "0"))
    return timedelta(hours=hours, minutes=minutes, seconds=seconds, microseconds=micros)


def parse_datetime(value: str) -> datetime:
    """A DT value given at least to the hour; its UTC offset is dropped. Raises ValueError.

    >>> parse_datetime("20260218143500.5+0100")
    datetime.datetime(2026, 2, 18, 14, 35, 0, 500000)
    """
    match = _DATETIME.fullmatch(value.strip("\0 "))
    if not match:
        raise ValueError(f"not a date and time (DT) to the hour: {len(value)} characters")
    return parse_date(match.group(1)) + parse_time(match.group(2))
