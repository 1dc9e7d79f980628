"""kill -9 at random moments: nothing acknowledged is lost, nothing is derived twice, every study ends delivered."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from pydicom.uid import UID

from tests.e2e.harness import RunningNode
from tests.factories import ct_series, pet_series
from tests.peers import StoragePeer, storescu, wait_until

ROUTE = """
[[route]]
name = "all PET"
when = { Modality = "PT" }
method = "nearest"
preset = "default"
send_to = ["PACS"]
[work]
retry_s = 0.5
lease_s = 5
attempts = 100
[delivery]
retry_s = 0.5
retry_max_s = 2
"""
STUDIES = 4
KILLS = 12  # two hundred: tests/chaos/test_kills.py


def _send_until_acknowledged(port: int, file: Path) -> None:
    """As a scanner does it: one association per instance, again until it is answered with success."""
    for _ in range(200):
        if storescu(port, [file]).returncode == 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"{file.name} was never acknowledged")


@pytest.mark.timeout(500)
def test_a_dozen_kills_lose_and_double_nothing(tmp_path: Path):
    """Receiver, worker and running job are killed 12 times while four studies go through."""
    rng = random.Random(7)
    studies = []
    for number in range(STUDIES):
        folder = tmp_path / f"study{number}"
        folder.mkdir()
        files = []
        for dataset in [*pet_series(slices=12, rows=20, columns=18, seed=number), *ct_series(seed=number)]:
            path = folder / f"{dataset.SOPInstanceUID}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            files.append((path, dataset))
        studies.append(files)
    pets = {str(ds.SeriesInstanceUID) for files in studies for _, ds in files if ds.Modality == "PT"}
    assert len(pets) == STUDIES

    killed: Counter[str] = Counter()
    with StoragePeer() as peer, RunningNode(
        tmp_path / "node", peers={"PACS": (peer.ae_title, peer.port), "SCANNER": ("SCANNER", None)}, route=ROUTE,
        quiet_s=1,
    ) as node:
        def send() -> None:
            for files in studies:
                for path, _ in rng.sample(files, len(files)):
                    _send_until_acknowledged(node.port, path)

        sender = threading.Thread(target=send)
        sender.start()
        deadline = time.monotonic() + 240
        while killed.total() < KILLS and time.monotonic() < deadline:
            time.sleep(rng.uniform(0.05, 2.5))
            kind = rng.choice(["receive", "work", "pipeline"])
            victims = node.descendants(named=kind)
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed[kind] += 1
        sender.join(240)
        assert not sender.is_alive()
        assert killed.total() == KILLS, f"too few processes were there to be killed: {killed}"
        rows = wait_until("all studies delivered", lambda: _all_delivered(node, pets), timeout_s=200)

        instances = {Path(p).stem for p in (node.folder / "data" / "objects").rglob("*.dcm")}
        assert instances == {path.stem for files in studies for path, _ in files}, "an acknowledged instance is missing"

    derived = {row["derived_series"] for row in rows}
    assert len(derived) == STUDIES
    received = peer.datasets
    assert {str(ds.SeriesInstanceUID) for ds in received} == derived, "a derived series was made twice"
    uids = Counter(UID(ds.SOPInstanceUID) for ds in received)
    assert len(uids) == STUDIES * 24
    for uid in uids:
        images = {ds.PixelData for ds in received if ds.SOPInstanceUID == uid}
        assert len(images) == 1, f"one UID means {len(images)} images: {uid}"


def _all_delivered(node: RunningNode, pets: set[str]) -> list[dict] | None:
    time.sleep(1)
    rows = [row for row in node.jobs() if row["series"] in pets]
    return rows if len(rows) == len(pets) and all(row["state"] == "delivered" for row in rows) else None
