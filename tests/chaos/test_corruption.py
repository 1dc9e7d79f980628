"""The disk damages the ledger and what was received, amid studies; repair, and the node goes on."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.site import account, finished, route, send_until_acknowledged, storage_peers, studies
from tests.e2e.harness import RunningNode
from tests.peers import StoragePeer, storescu, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
PAGE = 4096


def pages(ledger: Path, rng: random.Random) -> None:
    """Four pages of nonsense, behind the first."""
    data = bytearray(ledger.read_bytes())
    for page in rng.sample(range(1, max(2, len(data) // PAGE)), min(4, max(1, len(data) // PAGE - 1))):
        data[page * PAGE:(page + 1) * PAGE] = rng.randbytes(PAGE)
    ledger.write_bytes(data)


def cut(ledger: Path, rng: random.Random) -> None:
    """The second half is gone, and the write-ahead log."""
    Path(f"{ledger}-wal").unlink(missing_ok=True)
    with ledger.open("r+b") as file:
        file.truncate(max(100, ledger.stat().st_size // 2))


def log_lost(ledger: Path, rng: random.Random) -> None:
    """The write-ahead log is gone."""
    Path(f"{ledger}-wal").unlink(missing_ok=True)


def emptied(ledger: Path, rng: random.Random) -> None:
    """No byte is left."""
    Path(f"{ledger}-wal").unlink(missing_ok=True)
    ledger.write_bytes(b"")


def text(ledger: Path, rng: random.Random) -> None:
    """Another program wrote its log into it."""
    ledger.write_bytes(b"service restarted\n" * 5000)


def has_built(node: RunningNode, count: int) -> bool:
    """Whether so many derived series lie on disk."""
    return len(list((node.data_dir / "derived").glob("*/report.json"))) >= count


def mended(node: RunningNode) -> dict[str, Any]:
    """`dicomnode repair`, once the killed node has let go of its locks; what it says."""
    def ask() -> dict[str, Any] | None:
        done = node.cli("repair", "--json")
        return json.loads(done.stdout) if done.returncode == 0 else None

    return wait_until("the repair", ask, timeout_s=60)


def test_the_ledger_is_damaged_amid_studies(tmp_path: Path, tell: Callable[..., None]):
    """Five ways, one after the other: nothing received is lost, nothing is derived twice, every study is delivered."""
    rng = random.Random(11)
    sent = studies(tmp_path, 6)
    files = [file for study in sent for file in study.files]
    entered = jobs = salvaged = 0
    with StoragePeer("PACS") as pacs, RunningNode(
        tmp_path / "node", peers=storage_peers(PACS=pacs), route=route("PACS"), quiet_s=1,
    ) as node:
        ledger = node.data_dir / "ledger.sqlite3"
        sender = threading.Thread(target=send_until_acknowledged, args=(node.port, files))
        sender.start()
        for built, damage in ((0, pages), (0, cut), (1, log_lost), (2, emptied), (3, text)):
            wait_until(f"{built} built", partial(has_built, node, built), timeout_s=150)
            time.sleep(rng.uniform(1.0, 4.0))
            node.kill()
            time.sleep(0.5)
            damage(ledger, rng)
            report = mended(node)
            assert report["lost"] == [], "every object lies whole on disk"
            entered += report["entered"].get("instances", 0)
            jobs += report["entered"].get("jobs", 0)
            salvaged += sum(report["salvaged"].values())
            node.start()
        sender.join(300)
        assert not sender.is_alive()
        wait_until("all studies delivered", finished(node, sent, "delivered"), timeout_s=300)
        assert jobs > 0, "no job had to be brought back from the report of its derived series"
        tell(damages=5, rows_salvaged=salvaged, objects_entered_from_disk=entered, jobs_entered_from_disk=jobs,
             **account(node, sent, {"PACS": pacs.datasets}))


def test_objects_rot_before_they_are_used(tmp_path: Path, tell: Callable[..., None]):
    """Bits flip, files are cut and vanish while the node is down: held, never used; a resend brings all home."""
    rng = random.Random(5)
    sent = studies(tmp_path, 3)
    with StoragePeer("PACS") as pacs, RunningNode(
        tmp_path / "node", peers=storage_peers(PACS=pacs), route=route("PACS"), quiet_s=20,
    ) as node:
        assert storescu(node.port, [file for study in sent for file in study.files], timeout_s=60).returncode == 0
        node.kill()
        for study, spoil in zip(sent, ("flip", "cut", "remove"), strict=True):
            path = rng.choice(list((node.data_dir / "objects").glob(f"*/{study.pet_series}/*.dcm")))
            data = bytearray(path.read_bytes())
            data[-9] ^= 4
            if spoil == "remove":
                path.unlink()
            else:
                path.write_bytes(data if spoil == "flip" else data[:-40])
        node.start()
        wait_until("all studies held", finished(node, sent, "held"), timeout_s=120)
        assert not pacs.datasets, "damaged input was used"
        for study in sent:
            assert storescu(node.port, list(study.files), timeout_s=60).returncode == 0
        wait_until("all studies delivered", finished(node, sent, "delivered"), timeout_s=120)
        tell(spoilt=len(sent), **account(node, sent, {"PACS": pacs.datasets}))
