"""What the worker does by the clock goes on after a failure, and says so without filling the log."""

from __future__ import annotations

import sqlite3

from structlog.testing import capture_logs

from dicomnode.schedule import build
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
