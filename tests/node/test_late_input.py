"""Input that changes after its series was sent: held, ignored or superseding, as the route or the site says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dicomnode import operate
from tests.factories import ct_series
from tests.node.line import PET_ROUTE, Line
from tests.node.test_matcher import build_and_send, jobs, judge, longer

Opened = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """A node with that policy, in which a PET of 8 slices has been sent."""
    @contextmanager
    def node(policy: str, *, route: str = "", where: str = "site") -> Iterator[tuple[Line, str, list[Any]]]:
        site, own = ("", f'late_input = "{policy}"\n') if where == "route" else (policy, "")
        with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n' + own + route) as line:
            if site:
                complete = line.config.completeness.model_copy(update={"late_input": site})
                line.config = line.config.model_copy(update={"completeness": complete})
            series = longer(20)
            uid = line.receive(series[:8])
            judge(line, after_s=31)
            build_and_send(line, uid)
            yield line, uid, series

    return node


def codes(line: Line, uid: str) -> list[str]:
    return [event["code"] for event in line.ledger.events() if event["series_uid"] == uid and event["kind"] == "series"]


@pytest.mark.parametrize("where", ["site", "route"])
def test_supersede_makes_a_new_job_by_itself(opened: Opened, where: str) -> None:
    """Once nothing has come for twice the quiet time; the one sent is superseded."""
    with opened("supersede", where=where) as (line, uid, series):
        line.receive(series[8:10])
        judge(line, after_s=31)
        assert line.state(uid) == ("waiting", "late-input")
        assert "10 now" in line.ledger.series(uid)["reason"] and jobs(line, uid) == [("sending", 8)]
        judge(line, after_s=30)
        assert jobs(line, uid) == [("superseded", 8), ("queued", 10)] and line.state(uid)[0] == "matched"


def test_stutter_of_single_instances_makes_one_job(opened: Opened) -> None:
    """One every 40 s, each after the quiet time: the new job waits until they have stopped."""
    with opened("supersede") as (line, uid, series):
        for number in range(8, 20):
            line.receive(series[number:number + 1])
            for _ in range(8):
                judge(line, after_s=5)
        judge(line, after_s=60)
        assert jobs(line, uid) == [("superseded", 8), ("queued", 20)]


def test_pause_doubles_with_each_job_of_the_series(opened: Opened) -> None:
    """An instance every ten minutes for two hours: a handful of jobs, not twelve."""
    with opened("supersede") as (line, uid, series):
        for number in range(8, 20):
            line.receive(series[number:number + 1])
            for _ in range(10):
                judge(line, after_s=60)
            if line.ledger.jobs_of_series(uid)[-1]["state"] == "queued":
                build_and_send(line, uid)
        assert len(line.ledger.jobs_of_series(uid)) <= 6
        judge(line, after_s=3601)
        assert jobs(line, uid)[-1] == ("queued", 20)


def test_repeated_arrival_of_the_same_stray_is_one_arrival(opened: Opened) -> None:
    """A sender that retries all night changes nothing after the first."""
    with opened("supersede") as (line, uid, series):
        for _ in range(10):
            line.receive(series[8:9])
            judge(line, after_s=100)
        assert jobs(line, uid) == [("superseded", 8), ("queued", 9)]


def test_ignore_keeps_the_objects_and_leaves_everything_as_it_was(opened: Opened) -> None:
    """Matched as before, no new job, an event for each arrival; the objects are in the ledger and on disk."""
    with opened("ignore") as (line, uid, series):
        for number in (8, 9):
            line.receive(series[number:number + 1])
            judge(line, after_s=31)
            assert line.state(uid) == ("matched", "late-input") and jobs(line, uid) == [("sending", 8)]
        assert codes(line, uid).count("late-input") == 2
        rows = line.ledger.instances(uid)
        assert len(rows) == 10 and all(line.spool.absolute(row["path"]).is_file() for row in rows)


def test_ignored_stray_need_not_make_a_whole_series(opened: Opened) -> None:
    """A slice far away would leave a gap for a day; it is ignored at once."""
    with opened("ignore") as (line, uid, series):
        line.receive(series[15:16])
        judge(line, after_s=31)
        assert line.state(uid) == ("matched", "late-input") and jobs(line, uid) == [("sending", 8)]


def test_person_may_use_what_was_ignored(opened: Opened) -> None:
    """Release makes the job that supersedes; without late input there is nothing to release."""
    with opened("ignore") as (line, uid, series):
        line.receive(series[8:10])
        judge(line, after_s=31)
        assert operate.release(line.ledger, uid, now=line.now, actor="mia").state == "receiving"
        judge(line, after_s=31)
        assert jobs(line, uid) == [("superseded", 8), ("queued", 10)] and line.state(uid) == ("matched", "")


@pytest.mark.parametrize("policy", ["ignore", "supersede"])
def test_what_is_not_sent_yet_takes_late_input_whatever_the_policy(tmp_path: Path, policy: str) -> None:
    """A queued job is made new with all that came."""
    with Line(tmp_path, route=PET_ROUTE + f'guide = "never"\nlate_input = "{policy}"\n') as line:
        series = longer(10)
        uid = line.receive(series[:8])
        judge(line, after_s=31)
        line.receive(series[8:])
        judge(line, after_s=31)
        assert jobs(line, uid) == [("superseded", 8), ("queued", 10)]


def test_other_series_of_the_study_are_not_late_input(opened: Opened) -> None:
    """A CT that comes after the PET was sent is kept as guide, and changes nothing."""
    with opened("supersede") as (line, uid, _):
        ct = line.receive(ct_series())
        judge(line, after_s=31)
        assert line.state(ct) == ("ignored", "guide") and jobs(line, uid) == [("sending", 8)]


def test_urgent_wish_and_urgent_job_outlive_late_input(tmp_path: Path) -> None:
    """Wished for before the job was there, and kept by the job that takes its place."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\n') as line:
        series = longer(10)
        uid = line.receive(series[:8])
        assert operate.urgent(line.ledger, uid, now=line.now, actor="mia").job is None
        judge(line, after_s=31)
        line.receive(series[8:])
        judge(line, after_s=31)
        assert [(job["state"], job["urgent"]) for job in line.ledger.jobs_of_series(uid)] == [
            ("superseded", 1), ("queued", 1)]
        assert line.ledger.query("SELECT * FROM memo WHERE key LIKE 'urgent:%'") == []


def test_urgent_route_makes_urgent_jobs(tmp_path: Path) -> None:
    """They start whatever the window."""
    with Line(tmp_path, route=PET_ROUTE + 'guide = "never"\nurgent = true\n') as line:
        uid = line.receive(longer(8))
        judge(line, after_s=31)
        assert [job["urgent"] for job in line.ledger.jobs_of_series(uid)] == [1]
        assert line.ledger.claim("w", now=line.now, lease_s=60, may_start=lambda route: False) is not None
