"""What the worker does by the clock goes on after a failure, and says so without filling the log."""

from __future__ import annotations

import sqlite3
import threading
from datetime import UTC, datetime, timedelta

from structlog.testing import capture_logs

from dicomnode.schedule import build, mend
from tests.peers import wait_until


def test_a_tick_that_fails_is_tried_again_and_said_once_a_minute():
    """As while the disk is full: one sentence without a traceback, not one at every tick."""
    calls = []

    def match() -> None:
        calls.append(1)
        raise sqlite3.OperationalError("database or disk is full")

    nothing = lambda: None  # noqa: E731
    scheduler = build({"matcher": (match, 0.05), "deliveries": (nothing, 1.0)}, once=nothing)
    with capture_logs() as logs:
        scheduler.start()
        try:
            wait_until("five ticks", lambda: len(calls) >= 5)
        finally:
            scheduler.shutdown(wait=True)
    said = [entry for entry in logs if entry["action"] == "tick_failed"]
    assert [(entry["tick"], entry["exc_info"]) for entry in said] == [("matcher", False)]
    assert "disk is full" in said[0]["error"]


def test_ticks_go_on_when_the_clock_is_set_back():
    """Planned an hour ahead by the clock that was wrong: they come now, and go on at their interval."""
    calls = []
    scheduler = build({"matcher": (lambda: calls.append(1), 0.05), "slow": (lambda: None, 3600.0)}, once=lambda: None)
    scheduler.start()
    try:
        wait_until("the first tick", lambda: bool(calls))
        assert mend(scheduler) == 0
        scheduler.get_job("matcher").modify(next_run_time=datetime.now(UTC) + timedelta(hours=1))
        before = len(calls)
        assert mend(scheduler) == 1
        wait_until("ticks again", lambda: len(calls) >= before + 3)
    finally:
        scheduler.shutdown(wait=True)


def test_a_tick_that_lasts_holds_up_no_other():
    """A retrieval of hours, and the others every 50 ms."""
    over, calls = threading.Event(), []
    scheduler = build({"retrieval": (lambda: over.wait(10), 0.05), "matcher": (lambda: calls.append(1), 0.05)},
                      once=lambda: over.wait(10))
    scheduler.start()
    try:
        wait_until("five ticks", lambda: len(calls) >= 5)
    finally:
        over.set()
        scheduler.shutdown(wait=True)
