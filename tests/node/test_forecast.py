"""The forecast: what fits tonight, from measured durations, on the devices there are, within the windows."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.forecast import Durations, Measured, Running, Waiting, forecast, plan, waits
from dicomnode.sections import Route, Schedule
from dicomnode.windows import Openings
from tests.node.line import Line
from tests.node.test_ledger import JOB
from tests.node.test_states import instance

MB, MINUTE, H = 10**6, 60.0, 3600.0
BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = Openings(Schedule(timezone="Europe/Berlin", windows=("20:00-06:00",)), [])
ALWAYS = Openings(Schedule(), [])


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


def took(*minutes: float, size: int = 100 * MB, device: str = "cuda") -> Durations:
    return Durations(Measured("nbd", "best", device, size, one * MINUTE) for one in minutes)


def jobs(count: int, *, size: int = 100 * MB, urgent: bool = False, run_after: float = 0.0) -> list[Waiting]:
    return [Waiting(number, "r", "nbd", "best", size, run_after, urgent) for number in range(1, count + 1)]


# --- how long


def test_duration_is_the_median_of_jobs_of_like_size():
    """One night with a busy machine spoils nothing."""
    found = took(10, 11, 12, 11, 300).expect("nbd", "best", "cuda", 110 * MB)
    assert found is not None and found.seconds == 11 * MINUTE and found.jobs == 5
    assert found.spread_s < 2 * MINUTE


def test_duration_of_another_size_is_in_proportion():
    """A whole body after a week of heads."""
    found = took(10, 10, 10).expect("nbd", "best", "cuda", 600 * MB)
    assert found is not None and found.seconds == pytest.approx(60 * MINUTE)


def test_other_methods_and_devices_say_nothing():
    """A hundredfold apart: no guess."""
    for name in (("nbd", "preview", "cuda"), ("tv", "best", "cuda"), ("nbd", "best", "cpu")):
        assert took(10).expect(*name, 100 * MB) is None


# --- the plan


def test_night_is_filled_in_order_and_the_rest_is_told():
    """Ten hours, four hours each: two fit, the third runs past the end, the fourth starts the evening after."""
    now = at("2026-06-01 12:00")
    found = plan(jobs(4), [], ["cuda:0"], took(240, 240, 240), NIGHT, now=now)
    assert [one.verdict for one in found] == ["fits", "fits", "past-end", "not-tonight"]
    assert [one.start for one in found] == [at("2026-06-01 20:00"), at("2026-06-02 00:00"), at("2026-06-02 04:00"),
                                            at("2026-06-02 20:00")]
    assert found[2].end == at("2026-06-02 08:00") and "after the window closes at 06:00" in found[2].text
    assert found[3].text.startswith("does not fit before the window closes at 06:00 Europe/Berlin")


@pytest.mark.parametrize(("evening", "fitting"), [("2026-03-28", 9), ("2026-06-01", 10), ("2026-10-24", 11)])
def test_night_of_the_change_of_the_clocks_has_another_length(evening: str, fitting: int):
    """One job an hour: nine in March, eleven in October."""
    found = plan(jobs(14), [], ["cuda:0"], took(60, 60, 60), NIGHT, now=at(f"{evening} 18:00"))
    assert [one.verdict for one in found].count("fits") == fitting


def test_devices_work_in_parallel():
    """Two devices, two jobs at once."""
    now = at("2026-06-01 22:00")
    found = plan(jobs(4), [], ["cuda:0", "cuda:1"], took(60, 60, 60), NIGHT, now=now)
    assert [one.start for one in found] == [now, now, now + H, now + H]


def test_running_job_keeps_its_device_until_its_expected_end():
    """Also one that is overdue: it may end at any moment, and never in the past."""
    now = at("2026-06-01 22:00")
    for started, begin in ((now - 20 * MINUTE, now + 40 * MINUTE), (now - 5 * H, now + 1)):
        busy = [Running(9, "nbd", "best", 100 * MB, started, "cuda:1")]
        found = plan(jobs(2), busy, ["cuda:0", "cuda:1"], took(60, 60, 60), NIGHT, now=now)
        assert [one.start for one in found] == [now, begin]


def test_urgent_job_starts_outside_the_window():
    """It is no part of the night."""
    now = at("2026-06-01 12:00")
    found = plan([Waiting(1, "r", "nbd", "best", 100 * MB, 0, True), *jobs(1)], [], ["cuda:0"], took(60, 60, 60), NIGHT,
                 now=now)
    assert [(one.start, one.verdict) for one in found] == [(now, "fits"), (at("2026-06-01 20:00"), "fits")]


def test_without_a_measurement_it_says_so_and_plans_nothing_behind_it():
    """A start it has, the ones behind it on the only device have none."""
    now = at("2026-06-01 22:00")
    found = plan(jobs(2), [], ["cuda:0"], Durations([]), NIGHT, now=now)
    assert [(one.verdict, one.start, one.end) for one in found] == [("unknown", now, None), ("unknown", None, None)]
    assert "no measurement of nbd best" in found[0].text and "job 1, which runs before it" in found[1].text


def test_job_that_waits_for_another_attempt_lets_others_go_first():
    """As in the claims."""
    now = at("2026-06-01 22:00")
    found = plan([*jobs(1, run_after=now + 30 * MINUTE), Waiting(2, "r", "nbd", "best", 100 * MB, 0)], [], ["cuda:0"],
                 took(60, 60, 60), NIGHT, now=now)
    assert [(one.job, one.start) for one in found] == [(2, now), (1, now + H)]


@given(st.lists(st.tuples(st.integers(1, 500), st.booleans(), st.integers(0, 50)), max_size=12), st.integers(1, 3),
       st.lists(st.floats(1, 400), min_size=1, max_size=6), st.integers(0, 100))
def test_every_job_is_planned_once_and_no_device_does_two_at_a_time(some, devices, minutes, hour):
    """Nothing starts before it may, and a route's job starts only while its window is open."""
    now = at("2026-10-23 00:00") + hour * H
    waiting = [Waiting(number, "r", "nbd", "best", size * MB, now + wait * H / 10, urgent)
               for number, (size, urgent, wait) in enumerate(some)]
    found = plan(waiting, [], ["cuda:0"] * devices, took(*minutes), NIGHT, now=now)
    assert sorted(one.job for one in found) == list(range(len(waiting)))
    for one in found:
        job = waiting[one.job]
        assert one.start is not None and one.end is not None and one.latest is not None
        assert one.start >= max(now, job.run_after) and one.start < one.end <= one.latest + 1e-6
        assert job.urgent or NIGHT.of("r").is_open(one.start)
        assert sum(other.start <= one.start < other.end for other in found) <= devices


# --- why a job waits


def test_waiting_job_says_for_what():
    """The window with its zone, the next attempt, or its turn."""
    now = at("2026-06-01 12:00")
    row = {"state": "queued", "route": "r", "urgent": 0, "run_after": now - 5}
    assert waits(row, NIGHT, now=now) == "window opens 20:00 Europe/Berlin"
    assert waits(row, ALWAYS, now=now) == "for its turn"
    assert waits(row | {"urgent": 1}, NIGHT, now=now) == "urgent: before all others"
    assert waits(row | {"state": "failed", "run_after": now + 60}, ALWAYS, now=now) == "tried again 10:01 UTC"
    assert waits(row | {"state": "running"}, NIGHT, now=now) == ""


# --- from the ledger


def test_ledger_gives_measurements_and_queue(tmp_path: Path):
    """Durations by what the report says of the device; a job that was interrupted measures nothing."""
    with Line(tmp_path, toml='[work]\ndevice = "cuda:0"\n[schedule]\ntimezone = "Europe/Berlin"\n'
                             'windows = ["20:00-06:00"]\n') as line:
        now = at("2026-06-01 22:00")
        for number in range(4):
            series = f"1.2.{number}"
            line.ledger.add_instances([instance(series, f"{series}.1", "a", now=now - 9 * H)])
            line.ledger.set_series(series, "complete", now=now)
            job = line.ledger.add_job(replace(JOB, identity=series, series_uid=series, method="nbd", preset="best",
                                              settings={}), now=now - 9 * H)
            if number == 3:
                break
            line.ledger.claim("w", now=now - 5 * H, lease_s=60)
            if number == 1:  # stopped after ten seconds, then done in ten more from its checkpoint
                line.ledger.set_job(job, "queued", now=now - 5 * H + 10, code="stopped")
                line.ledger.claim("w", now=now - 4 * H, lease_s=60)
            ended = now - 4 * H + 10 if number == 1 else now - 5 * H + 60 * (number + 1)
            line.ledger.built(job, "w", now=ended, derived_series_uid=f"2.25.{number}", derived_path="derived/1",
                              derived_instances=1, report={"device": "cuda"})
        value = forecast(line.ledger, line.config, now=now)
    assert value["measured"] == [{"method": "nbd", "preset": "best", "device": "cuda", "jobs": 2, "median_s": 120.0,
                                  "spread_s": pytest.approx(89.0)}]
    assert value["counts"] == {"fits": 1, "past-end": 0, "not-tonight": 0, "unknown": 0}
    assert [(one["job"], one["start"], one["end"]) for one in value["jobs"]] == [
        (4, "2026-06-01T20:00:00Z", "2026-06-01T20:02:00Z")]


@pytest.mark.parametrize("seed", range(4))
def test_jobs_are_claimed_in_the_order_and_at_the_times_of_the_plan(tmp_path: Path, seed: int):
    """Priorities, urgent ones, waits after failures and routes by day and by night: plan and claims agree."""
    rng, now = random.Random(seed), at("2026-10-24 15:00")
    routes = "".join(f'[[route]]\nname = "{name}"\nwhen = {{ Modality = "PT" }}\nsend_to = ["PACS"]\n'
                     f'windows = ["{window}"]\n' for name, window in (("day", "07:00-17:30"), ("night", "20:00-06:00")))
    with Line(tmp_path, toml='[schedule]\ntimezone = "Europe/Berlin"\n', route=routes) as line:
        ledger = line.ledger
        for number in range(15):
            series = f"1.2.{number}"
            ledger.add_instances([instance(series, f"{series}.1", "a", now=now)])
            ledger.set_series(series, "complete", now=now)
            job = ledger.add_job(replace(JOB, identity=series, series_uid=series, route=rng.choice(["day", "night"]),
                                         priority=rng.randrange(3), urgent=rng.random() < 0.2), now=now)
            with ledger.transaction() as db:
                db.execute("UPDATE job SET run_after = ? WHERE id = ?", (now + rng.choice([0, 0, 5 * H]), job))
        with ledger.transaction() as db:  # an old job that took two hours
            db.execute("INSERT INTO job (identity, series_uid, study_uid, route, method, preset, settings, send_to, "
                       "inputs, state, run_after, created_at, started_at, built_at, report) SELECT 'x', series_uid, "
                       "'1', 'day', method, preset, '{}', '[]', '[]', 'delivered', 0, 0, 1, 7201, "
                       "'{\"device\": \"cpu\"}' FROM job WHERE id = 1")
        found = forecast(ledger, line.config, now=now)["jobs"]
        openings = Openings(line.config.schedule, line.config.route)
        assert len(found) == 15
        free_at = now
        for one in found:
            start, end = (datetime.fromisoformat(one[name]).timestamp() for name in ("start", "end"))
            if start > free_at:  # nothing could have started before
                assert ledger.claim("w", now=start - 1, lease_s=1e9, may_start=openings.may_start(start - 1)) is None
            claimed = ledger.claim("w", now=start, lease_s=1e9, may_start=openings.may_start(start))
            assert claimed is not None and claimed["id"] == one["job"]
            free_at = end


def test_route_with_its_own_windows_is_planned_by_them():
    """Day jobs run by day, night jobs at night, whatever their order in the queue."""
    openings = Openings(Schedule(timezone="Europe/Berlin", windows=("20:00-06:00",)),
                        [Route(name="day", when={}, send_to=("P",), windows=())])
    now = at("2026-06-01 12:00")
    found = plan([Waiting(1, "night", "nbd", "best", 100 * MB, 0), Waiting(2, "day", "nbd", "best", 100 * MB, 0)], [],
                 ["cuda:0"], took(60, 60, 60), openings, now=now)
    assert [(one.job, one.start) for one in found] == [(2, now), (1, at("2026-06-01 20:00"))]
