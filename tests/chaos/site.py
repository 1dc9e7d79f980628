"""A site for scenarios: studies to send, a node that processes them, peers that receive, and the account at the end."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode

from tests.e2e.harness import RunningNode
from tests.factories import ct_series, pet_series
from tests.peers import StoragePeer, storescu

QUICK = """
[work]
retry_s = 0.5
lease_s = 5
attempts = 100
[delivery]
retry_s = 0.5
retry_max_s = 2
connect_timeout_s = 3
dimse_timeout_s = 5
"""


def route(*peers: str, also: Sequence[str] = ()) -> str:
    """All PET by the quickest method to those peers, with short waits."""
    return (f'[[route]]\nname = "all PET"\nwhen = {{ Modality = "PT" }}\nmethod = "nearest"\npreset = "default"\n'
            f"send_to = {json.dumps(peers)}\nalso = {json.dumps(also)}\n{QUICK}")


@dataclass(frozen=True)
class Study:
    """A PET of `slices` slices and its CT, as files named by SOP Instance UID."""

    files: tuple[Path, ...]
    pet_series: str
    pet_slices: int

    @classmethod
    def make(cls, folder: Path, number: int, *, slices: int = 12, ct: bool = True) -> Study:
        folder.mkdir(parents=True, exist_ok=True)
        datasets = pet_series(slices=slices, rows=20, columns=18, seed=number) + (ct_series(seed=number) if ct else [])
        files = []
        for dataset in datasets:
            path = folder / f"{dataset.SOPInstanceUID}.dcm"
            dataset.save_as(path, enforce_file_format=True)
            files.append(path)
        return cls(tuple(files), str(datasets[0].SeriesInstanceUID), slices)


def studies(folder: Path, count: int, *, first: int = 0, **options: Any) -> list[Study]:
    """`count` studies, all different."""
    return [Study.make(folder / f"study{number}", number, **options) for number in range(first, first + count)]


def send_until_acknowledged(port: int, files: Iterable[Path], *, pause_s: float = 0.3, for_s: float = 300.0) -> int:
    """One association per instance, as some scanners do, each again until it is answered with success; how often."""
    tries, until = 0, time.monotonic() + for_s
    for file in files:
        while True:
            tries += 1
            if storescu(port, [file], timeout_s=60).returncode == 0:
                break
            assert time.monotonic() < until, f"{file.name} was not acknowledged within {for_s:g} s"
            time.sleep(pause_s)
    return tries


def finished(node: RunningNode, wanted: Sequence[Study], *states: str) -> Callable[[], bool]:
    """Whether the jobs of all these studies are in one of `states`; for `wait_until`."""
    uids = {study.pet_series for study in wanted}

    def ask() -> bool:
        time.sleep(1.0)  # each look is a process of its own
        rows = {row["series"]: row["state"] for row in node.jobs() if row["series"] in uids}
        return len(rows) == len(uids) and set(rows.values()) <= set(states)

    return ask


def account(node: RunningNode, sent: Sequence[Study], received: dict[str, Sequence[Dataset]]) -> dict[str, int]:
    """Hold the node to its promises and return what was counted; fails the test where one is broken.

    received  peer's name -> what it stored. Every acknowledged instance lies on disk with its digest and a ledger row;
    each study has one derived series at each peer, whole, and what its job tells of beside it (nothing of it left out
    but a kernel that does not exist), no UID with two objects; the ledger is sound; no unfinished file is left.
    """
    data = node.data_dir
    with closing(sqlite3.connect(f"file:{data / 'ledger.sqlite3'}?mode=ro", uri=True)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        rows = dict(db.execute("SELECT sop_instance_uid, path FROM instance"))
        jobs = db.execute("SELECT series_uid, derived_series_uid, report FROM job "
                          "WHERE state != 'superseded'").fetchall()
        unfinished = db.execute("SELECT count(*) FROM series WHERE state IN ('receiving', 'complete')").fetchone()[0]
    expected = {path.stem for study in sent for path in study.files}
    lost = sorted(uid for uid in expected if uid not in rows or not (data / rows[uid]).is_file())
    assert not lost, f"{len(lost)} acknowledged instances are lost: {lost[:3]}"
    by_series = Counter(series for series, _, _ in jobs)
    assert {study.pet_series for study in sent} <= set(by_series), "a study has no job"
    assert max(by_series.values()) == 1, f"a series has two jobs: {by_series.most_common(2)}"
    assert unfinished == 0, f"{unfinished} series were never decided"
    slices, derived, beside = {study.pet_series: study.pet_slices for study in sent}, {}, {}
    for series, uid, report in jobs:
        if series in slices:
            derived[uid] = 2 * slices[series]
            also = (json.loads(report) if report else {}).get("also", {"series": [], "left_out": {}})
            beside.update({one["series_uid"]: one["instances"] for one in also["series"]})
            assert set(also["left_out"]) <= {"kernel"}, f"left out beside a derived series: {also['left_out']}"
    for name, datasets in received.items():
        _whole_and_once(name, datasets, derived | beside)
    leftovers = [path for path in (data / "incoming").iterdir() if time.time() - path.stat().st_mtime > 60]
    assert not leftovers, f"unfinished files are left: {leftovers[:3]}"
    counted = {"studies": len(sent), "instances": len(expected), "jobs": len(jobs), "derived instances": 0}
    for found in received.values():
        uids = {d.SOPInstanceUID: d.SeriesInstanceUID in beside for d in found}
        counted["derived instances"] += len(uids) - sum(uids.values())
        if beside:
            counted["instances beside them"] = counted.get("instances beside them", 0) + sum(uids.values())
    return counted


def _whole_and_once(name: str, datasets: Sequence[Dataset], expected: dict[str, int]) -> None:
    """expected  SeriesInstanceUID -> instances."""
    found: dict[str, set[str]] = {}
    objects: dict[str, str] = {}
    for dataset in datasets:
        uid, content = str(dataset.SOPInstanceUID), encode(dataset, False, True)
        assert content is not None, f"{name} got {uid}, which cannot be written again"
        digest = hashlib.sha256(content).hexdigest()
        found.setdefault(str(dataset.SeriesInstanceUID), set()).add(uid)
        assert objects.setdefault(uid, digest) == digest, f"{name}: one UID means two objects: {uid}"
    assert set(found) == set(expected), f"{name} has {len(found)} series of ours, {len(expected)} were due"
    short = {series: len(uids) for series, uids in found.items() if len(uids) != expected[series]}
    assert not short, f"{name}: series of ours that are not whole: {short}"


def storage_peers(**peers: StoragePeer) -> dict[str, tuple[str, int | None]]:
    """For RunningNode: SCANNER may send, the others receive."""
    return {**{name: (peer.ae_title, peer.port) for name, peer in peers.items()}, "SCANNER": ("SCANNER", None)}


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"process {pid} is gone")


def descriptors(pid: int) -> int:
    """Open files of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def mounted(folder: Path, megabytes: int) -> bool:
    """Mount a tmpfs of that size; False where this machine does not let us."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
                          capture_output=True, check=False).returncode == 0
