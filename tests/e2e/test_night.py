"""A whole node outside its window: studies wait and say until when, an urgent one goes through at once."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.e2e.harness import RunningNode
from tests.factories import pet_series
from tests.peers import StoragePeer, storescu

ROUTE = """
[[route]]
name = "all PET"
when = {{ Modality = "PT" }}
method = "nearest"
preset = "default"
guide = "never"
send_to = ["PACS"]
[schedule]
windows = ["{opens:%H:%M}-{closes:%H:%M}"]
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_studies_wait_for_their_window_and_an_urgent_one_does_not(tmp_path: Path):
    """Two studies by day: both wait for the night; the one that a person hurries is delivered, the other stays."""
    now = datetime.now(UTC)
    route = ROUTE.format(opens=now + timedelta(hours=3), closes=now + timedelta(hours=4))
    series = []
    for number in range(2):
        datasets = pet_series(slices=6, rows=16, columns=16, seed=number)
        files = [tmp_path / f"{dataset.SOPInstanceUID}.dcm" for dataset in datasets]
        for dataset, path in zip(datasets, files, strict=True):
            dataset.save_as(path, enforce_file_format=True)
        series.append((str(datasets[0].SeriesInstanceUID), files))
    with StoragePeer("PACS") as pacs, RunningNode(
            tmp_path / "node", peers={"SCANNER": ("SCANNER", None), "PACS": ("PACS", pacs.port)}, route=route) as node:
        for _, files in series:
            assert storescu(node.port, files).returncode == 0
        for uid, _ in series:
            row = node.wait_for(uid, "queued", timeout_s=40)
            assert row["waits"].startswith("window opens ") and row["waits"].endswith(" UTC")
        done = node.cli("urgent", series[1][0])
        assert done.returncode == 0, done.stderr
        assert node.wait_for(series[1][0], "delivered", timeout_s=60)["job"] == 2
        row = node.job(series[0][0])
        assert row is not None and row["state"] == "queued"
        tonight = json.loads(node.cli("status", "--json").stdout)["tonight"]
        assert [job["job"] for job in tonight["jobs"]] == [1] and tonight["measured"][0]["method"] == "nearest"
        assert tonight["counts"] == {"fits": 1, "past-end": 0, "not-tonight": 0, "unknown": 0}
