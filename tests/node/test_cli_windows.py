"""The command line says why a job waits, what fits tonight, and hurries one."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dicomnode.cli.app import app
from dicomnode.ledger import Ledger, NewJob
from tests.node.test_states import instance

SERIES = "1.2.3.1"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A node with one queued job, whose window opens in three hours."""
    opens = datetime.fromtimestamp(time.time() + 3 * 3600, UTC)
    path = tmp_path / "node.toml"
    path.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n[schedule]\nwindows = '
                    f'["{opens:%H}:00-{(opens.hour + 1) % 24:02d}:00"]\n')
    (tmp_path / "data").mkdir()
    with Ledger(tmp_path / "data" / "ledger.sqlite3") as ledger:
        ledger.add_instances([instance(SERIES, f"{SERIES}.1", "a", now=100.0)])
        ledger.set_series(SERIES, "complete", now=101)
        ledger.add_job(NewJob(identity="i", series_uid=SERIES, study_uid="1", guide_series_uid=None, route="r",
                              method="tv", preset="default", settings={}, send_to=("PACS",), inputs=()), now=102)
    return path


def answer(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return " ".join(result.stdout.split())


def test_a_waiting_job_says_when_its_window_opens(config: Path) -> None:
    """In jobs and in show, for people and for programs; with the time zone."""
    waits = answer("jobs", "--config", config)[0]["waits"]
    assert waits.startswith("window opens ") and waits.endswith(":00 UTC")
    assert answer("show", SERIES, "--config", config)["series"][0]["jobs"][0]["waits"] == waits
    assert "window opens" in said("jobs", "--config", config) and waits in said("show", SERIES, "--config", config)


def test_status_tells_what_fits_tonight(config: Path) -> None:
    """Without measurements it says so and invents nothing."""
    value = answer("status", "--config", config)["tonight"]
    assert value["counts"]["unknown"] == 1 and value["jobs"][0]["end"] is None
    text = said("status", "--config", config)
    assert "Tonight not known: 1" in text and "no measurement of tv default" in text


def test_urgent_job_waits_for_no_window(config: Path) -> None:
    """Named by its number or its series; the history names the person."""
    assert "before all others" in said("urgent", "job:1", "--config", config)
    assert answer("jobs", "--config", config)[0]["waits"] == "urgent: before all others"
    events = answer("show", SERIES, "--config", config)["events"]
    assert [event["code"] for event in events if event["actor"] != "node"][-1] == "urgent"
