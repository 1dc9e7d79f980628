"""A whole node through a night: studies wait for their window and say so; what is delivered goes and may come again."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.e2e.harness import RunningNode
from tests.factories import pet_series
from tests.peers import StoragePeer, storescu, wait_until

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


def saved(folder: Path, *, seed: int) -> tuple[str, list[Path]]:
    """A small PET: its series UID and its files."""
    datasets = pet_series(slices=6, rows=16, columns=16, seed=seed)
    files = [folder / f"{dataset.SOPInstanceUID}.dcm" for dataset in datasets]
    for dataset, path in zip(datasets, files, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return str(datasets[0].SeriesInstanceUID), files


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_studies_wait_for_their_window_and_an_urgent_one_does_not(tmp_path: Path):
    """Two studies by day: both wait for the night; the one that a person hurries is delivered, the other stays."""
    now = datetime.now(UTC)
    route = ROUTE.format(opens=now + timedelta(hours=3), closes=now + timedelta(hours=4))
    series = [saved(tmp_path, seed=number) for number in range(2)]
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


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_is_delivered_goes_and_a_resend_is_a_repeat(tmp_path: Path):
    """Files go with the first tick after the restart; sent again they are kept again, and no second series goes out."""
    uid, files = saved(tmp_path, seed=3)
    route = ROUTE.partition("[schedule]")[0].replace("{{", "{").replace("}}", "}")
    with StoragePeer("PACS") as pacs, RunningNode(
            tmp_path / "node", peers={"SCANNER": ("SCANNER", None), "PACS": ("PACS", pacs.port)},
            route=f"{route}\n[retention]\ninputs_days = 0.00001\nderived_days = 0.00001\n") as node:
        def kept(folder: str) -> int:
            return len(list((node.data_dir / folder).rglob("*.dcm")))

        assert storescu(node.port, files).returncode == 0
        node.wait_for(uid, "delivered", timeout_s=60)
        sent = len(pacs.datasets)
        assert node.stop() == 0
        node.start()
        wait_until("the files are gone", lambda: kept("objects") == kept("derived") == 0, timeout_s=20)
        assert node.cli("retry", uid).returncode == 3  # delivered: nothing to retry
        assert storescu(node.port, files).returncode == 0
        assert kept("objects") == 6 and node.wait_for(uid, "delivered", timeout_s=10)["job"] == 1
        assert len(pacs.datasets) == sent == 12
        events = json.loads(node.cli("show", uid, "--json").stdout)["events"]
        assert [(event["code"], event["actor"]) for event in events if event["code"] in ("purged", "restored")
                and not event["job"]] == [("purged", "node"), ("restored", "SCANNER")]
