"""Windows: open when the site's clock says so, in every time zone, across midnight and the change of the clocks."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dicomnode.sections import Route, Schedule
from dicomnode.windows import DAYS, Openings, Windows, parse_window

H = 3600.0
ZONES = ("UTC", "Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe", "America/New_York", "Asia/Kolkata",
         "Pacific/Apia", "Africa/Casablanca", "Asia/Tehran", "Pacific/Chatham", "America/St_Johns", "Antarctica/Troll")

times = st.integers(*(int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) for year in (1995, 2040)))
zones = st.sampled_from(ZONES)
clock = st.integers(0, 1439).map(lambda minutes: f"{minutes // 60:02d}:{minutes % 60:02d}")
days = st.one_of(st.just(""), st.builds("{}-{} ".format, st.sampled_from(DAYS), st.sampled_from(DAYS)),
                 st.lists(st.sampled_from(DAYS), min_size=1, unique=True).map(lambda some: ",".join(some) + " "))
texts = st.builds("{}{}-{}".format, days, clock, st.one_of(clock, st.just("24:00")))


def at(zone: str, text: str, fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


def changes(zone: str, moment: float, within: timedelta) -> bool:
    """Whether the clocks of the zone change near that moment."""
    offsets = {datetime.fromtimestamp(moment + hours * H, ZoneInfo(zone)).utcoffset()
               for hours in range(-int(within.total_seconds() / H), int(within.total_seconds() / H) + 1)}
    return len(offsets) > 1


# --- what a text says


@pytest.mark.parametrize(("text", "found", "start", "end"), [
    ("20:00-06:00", "mon,tue,wed,thu,fri,sat,sun", 1200, 1800),
    ("mon-fri 20:00-06:00", "mon,tue,wed,thu,fri", 1200, 1800),
    ("sat,sun 00:00-24:00", "sat,sun", 0, 1440),
    ("fri-mon,wed 01:30-02:00", "fri,sat,sun,mon,wed", 90, 120),
    ("mon 08:00-08:00", "mon", 480, 1920),
])
def test_text_means_days_and_times(text: str, found: str, start: int, end: int):
    """Days may wrap round the weekend; an end that is not later is the next day's."""
    window = parse_window(text)
    assert window.days == frozenset(DAYS.index(day) for day in found.split(","))
    assert (window.start, window.end) == (start, end)


@pytest.mark.parametrize("text", ["", "20:00", "mon-wed-fri 20:00-06:00", "24:00-06:00", "mo 20:00-06:00",
                                  "mon tue 20:00-06:00", "20:00-24:30", "20:61-22:00"])
def test_what_is_no_window_is_refused_with_an_example(text: str):
    """The same texts are refused in the configuration."""
    with pytest.raises(ValueError, match=r"write e\.g\."):
        parse_window(text)
    with pytest.raises(ValueError, match="windows"):
        Schedule(windows=(text,))


@given(texts)
def test_the_configuration_takes_what_can_be_parsed(text: str):
    """No text passes `dicomnode check` and then stops the node."""
    assert Schedule(windows=(text,)).windows == (text,)
    assert parse_window(text).start < parse_window(text).end <= 2880


# --- days on which nothing changes


@given(zones, texts, times)
def test_open_is_what_the_wall_clock_says(zone: str, text: str, moment: int):
    """Far from a change of the clocks: the minute of the week decides."""
    assume(not changes(zone, moment, timedelta(days=3)))
    window, local = parse_window(text), datetime.fromtimestamp(moment, ZoneInfo(zone))
    minute = local.hour * 60 + local.minute + local.second / 60
    expected = any((local.weekday() - back) % 7 in window.days and window.start <= minute + 1440 * back < window.end
                   for back in (0, 1))
    assert Windows([text], zone).is_open(moment) is expected


def test_weekday_is_the_day_on_which_it_opens():
    """"fri 20:00-06:00" lasts until Saturday morning; Friday morning is no part of it."""
    windows = Windows(["fri 20:00-06:00"], "Europe/Berlin")
    assert windows.is_open(at("Europe/Berlin", "2026-06-06 05:59"))
    assert not windows.is_open(at("Europe/Berlin", "2026-06-06 06:00"))
    assert not windows.is_open(at("Europe/Berlin", "2026-06-05 05:59"))
    assert windows.opens_at(at("Europe/Berlin", "2026-06-06 06:00")) == at("Europe/Berlin", "2026-06-12 20:00")


# --- the change of the clocks


@pytest.mark.parametrize(("zone", "evening", "hours"), [
    ("Europe/Berlin", "2026-03-28 20:00", 9), ("Europe/Berlin", "2026-10-24 20:00", 11),
    ("Europe/Berlin", "2026-06-01 20:00", 10), ("America/Sao_Paulo", "2018-11-03 20:00", 9),
    ("America/Sao_Paulo", "2018-02-17 20:00", 11), ("Australia/Lord_Howe", "2026-10-03 20:00", 9.5),
    ("Australia/Lord_Howe", "2026-04-04 20:00", 10.5), ("UTC", "2026-03-28 20:00", 10),
])
def test_night_of_the_change_is_shorter_or_longer(zone: str, evening: str, hours: float):
    """20:00 to 06:00 by the clock, however many hours that is; Lord Howe moves by half an hour."""
    windows, begin = Windows(["20:00-06:00"], zone), at(zone, evening)
    assert windows.opens_at(begin - 1) == begin
    assert windows.closes_at(begin) - begin == hours * H
    assert windows.open_seconds(begin - 5 * H, begin + 13 * H) == hours * H
    assert not windows.is_open(begin - 1) and not windows.is_open(begin + hours * H)
    assert windows.is_open(begin) and windows.is_open(begin + hours * H - 1)


def test_time_that_is_skipped_is_the_moment_of_the_change():
    """02:30 does not exist on 2026-03-29 in Berlin: what opens or closes then does so at 03:00."""
    change = at("Europe/Berlin", "2026-03-29 03:00")
    opening, closing = (Windows([text], "Europe/Berlin") for text in ("02:30-06:00", "20:00-02:30"))
    assert opening.opens_at(change - 2 * H) == change == closing.closes_at(change - 2 * H)
    within = Windows(["sun 02:10-02:50"], "Europe/Berlin")
    assert within.opens_at(change - 2 * H) == at("Europe/Berlin", "2026-04-05 02:10")


def test_time_that_comes_twice_is_the_first():
    """02:30 comes twice on 2026-10-25 in Berlin; nothing that closes then opens again."""
    first = at("Europe/Berlin", "2026-10-25 02:30")
    opening, closing = (Windows([text], "Europe/Berlin") for text in ("02:30-06:00", "20:00-02:30"))
    assert opening.opens_at(first - H) == first == closing.closes_at(first - H)
    assert not closing.is_open(first + 0.75 * H)  # 02:15 for the second time


def test_midnight_that_is_skipped_opens_the_day():
    """In São Paulo 2018-11-04 began at 01:00."""
    windows = Windows(["sun 00:00-24:00"], "America/Sao_Paulo")
    begin = at("America/Sao_Paulo", "2018-11-04 01:00")
    assert windows.opens_at(begin - 5 * H) == begin and windows.closes_at(begin) - begin == 23 * H


def test_day_that_a_zone_skipped_opens_nothing():
    """Samoa had no 2011-12-30: no window of that Friday, and Thursday's night goes on into Saturday."""
    windows = Windows(["fri 08:00-10:00"], "Pacific/Apia")
    thursday = at("Pacific/Apia", "2011-12-29 12:00")
    assert windows.opens_at(thursday) == at("Pacific/Apia", "2012-01-06 08:00")
    night = Windows(["thu 20:00-06:00"], "Pacific/Apia")
    assert night.closes_at(thursday) == at("Pacific/Apia", "2011-12-31 00:00")


# --- laws, in every zone, at any time


@given(zones, clock, clock, times)
def test_windows_that_touch_leave_no_gap_and_no_overlap(zone: str, one: str, other: str, moment: int):
    """At each moment exactly one of "A-B" and "B-A" is open."""
    assume(one != other)
    assert Windows([f"{one}-{other}"], zone).is_open(moment) != Windows([f"{other}-{one}"], zone).is_open(moment)
    assert Windows([f"{one}-{other}", f"{other}-{one}"], zone).closes_at(moment) == math.inf


@settings(max_examples=60)
@given(zones, st.lists(texts, min_size=1, max_size=3), times)
def test_what_is_said_of_opening_and_closing_is_so(zone: str, some: list[str], moment: int):
    """Open from `opens_at` until `closes_at`, closed just before and just after."""
    windows = Windows(some, zone)
    opens, closes = windows.opens_at(moment), windows.closes_at(moment)
    assert moment <= opens < closes
    assert windows.is_open(opens) and (opens == moment) is windows.is_open(moment)
    if opens > moment:
        assert not windows.is_open(opens - 1) and windows.open_seconds(moment, opens) == 0
    if closes < math.inf:
        assert windows.is_open(closes - 1) and not windows.is_open(closes)
        assert windows.open_seconds(opens, closes) == closes - opens


@settings(max_examples=40)
@given(zones, st.lists(texts, min_size=1, max_size=3), times, st.integers(0, 90), st.integers(0, 90))
def test_open_time_adds_up(zone: str, some: list[str], moment: int, first: int, second: int):
    """Two stretches together have what the whole has, never more than it lasts."""
    windows = Windows(some, zone)
    middle, end = moment + first * H, moment + (first + second) * H
    whole = windows.open_seconds(moment, end)
    assert whole == pytest.approx(windows.open_seconds(moment, middle) + windows.open_seconds(middle, end))
    assert 0 <= whole <= end - moment


# --- routes


def test_route_without_windows_has_the_schedules():
    """Own windows, none ("always"), the schedule's; a route that is gone from the configuration has the schedule's."""
    openings = Openings(Schedule(timezone="Europe/Berlin", windows=("20:00-06:00",)), [
        Route(name="own", when={}, send_to=("P",), windows=("12:00-13:00",)),
        Route(name="always", when={}, send_to=("P",), windows=()), Route(name="plain", when={}, send_to=("P",))])
    may = openings.may_start(at("Europe/Berlin", "2026-06-01 12:30"))
    assert [may(name) for name in ("own", "always", "plain", "gone")] == [True, True, False, False]


def test_moment_is_told_with_zone_and_with_its_date_when_far():
    """People read local time; the zone is named."""
    windows, now = Windows(["20:00-06:00"], "Europe/Berlin"), at("Europe/Berlin", "2026-06-01 12:00")
    assert windows.text(windows.opens_at(now), now=now) == "20:00 Europe/Berlin"
    assert windows.text(now + 49 * H, now=now) == "Wed 2026-06-03 13:00 Europe/Berlin"
