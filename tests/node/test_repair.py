"""Repair: whatever happens to the ledger's file, nothing on disk is lost and no input makes a second derived series."""

from __future__ import annotations

import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from dicomnode.executor import Executor
from dicomnode.groupcommit import GroupCommitter
from dicomnode.intake import Intake, Limits, Request
from dicomnode.keeping import keep
from dicomnode.ledger import Ledger
from dicomnode.repair import Report, repair
from tests.factories import ct_series, pet_series
from tests.node.line import Line, full_settings_here

NOW = 5000.0
STUDIES = 6


def encoded(dataset: Dataset) -> bytes:
    """The data set as it comes by C-STORE."""
    from pynetdicom.dsutils import encode

    syntax = dataset.file_meta.TransferSyntaxUID
    found = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian)
    assert found is not None
    return found


class Node(Line):
    """A line whose objects come through reception itself; jobs are built by a program in this process."""

    def store(self, datasets: list[Dataset], *, calling_ae: str = "SCANNER") -> list[str]:
        committer = GroupCommitter(self.spool, self.ledger)
        try:
            return [self._one(dataset, committer, calling_ae) for dataset in datasets]
        finally:
            committer.close()

    def _one(self, dataset: Dataset, committer: GroupCommitter, calling_ae: str) -> str:
        request = Request(str(dataset.SOPClassUID), str(dataset.SOPInstanceUID),
                          str(dataset.file_meta.TransferSyntaxUID), calling_ae)
        intake = Intake(self.spool, Limits(2**30, 0), lambda: request)
        try:
            intake.write(encoded(dataset))
            return keep(intake, intake.index(), spool=self.spool, committer=committer, address="127.0.0.1",
                        now=self.now)
        finally:
            intake.discard()

    def decide(self) -> None:
        """Quiet long enough, and judged; late decisions too."""
        for _ in range(4):
            self.now += 700
            self.matcher().tick()

    def build(self) -> None:
        """Every job that waits is built; which image it is, its identity says."""
        executor = Executor(self.config, self.ledger, self.spool, clock=self.clock,
                            full_settings=full_settings_here, runner=_Builder())  # type: ignore[arg-type]
        while (job := self.ledger.claim(executor.name, now=self.now, lease_s=60)) is not None:
            executor.run_job(job, threading.Event())

    def deliver(self) -> None:
        for row in self.ledger.due_deliveries(now=self.now):
            job = self.ledger.job(row["job_id"])
            if job["state"] == "built":
                self.ledger.set_job(job["id"], "sending", now=self.now)
            self.ledger.put_statuses(row["id"], [(f"{job['derived_series_uid']}.1", 0, "")], now=self.now)
            self.ledger.set_delivery(row["id"], "delivered", now=self.now)

    def repair(self, **options: Any) -> Report:
        """Close, repair, open."""
        self.ledger.close()
        report = repair(self.spool.data_dir, now=self.now, **options)
        self.ledger = Ledger(self.spool.ledger_path)
        return report

    def derived(self) -> dict[str, list[str]]:
        """PET series -> UIDs of its derived series, of jobs that were not replaced."""
        found: dict[str, list[str]] = {}
        for row in self.ledger.query("SELECT series_uid, derived_series_uid FROM job WHERE state != 'superseded'"):
            found.setdefault(row["series_uid"], []).append(row["derived_series_uid"])
        return found


class _Builder:
    """A runner that makes a derived series of one file at once; its UID follows from the order alone."""

    def start(self, job: dict[str, Any], order: dict[str, Any], folder: Path) -> _Builder:
        (folder / "derived.tmp").mkdir()
        (folder / "derived.tmp" / "1.dcm").write_bytes(b"derived")
        self._uid = f"2.25.{int(job['identity'][:24], 16)}"
        return self

    ended = False

    def read(self, wait_s: float) -> list[dict[str, Any]]:
        return [{"kind": "built", "report": {"derived_series_uid": self._uid, "derived_instances": 1}}]

    def finish(self, *, grace_s: float) -> Any:
        return None


def study(number: int) -> list[Dataset]:
    return [*pet_series(slices=4, rows=6, columns=5, seed=number), *ct_series(slices=4, rows=6, columns=5, seed=number)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six studies: two delivered, two built, one queued and one amid reception. The ledger is not checkpointed."""
    folder = tmp_path_factory.mktemp("site")
    with Node(folder / "made") as node:
        for number in range(2):
            node.store(study(number))
        node.decide()
        node.build()
        node.deliver()
        for number in (2, 3):
            node.store(study(number))
        node.decide()
        node.build()
        node.store(study(4))
        node.decide()
        node.store(study(5)[:2])
        (folder / "now").write_text(str(node.now))
        shutil.copytree(node.spool.data_dir, folder / "data")
    return folder


@pytest.fixture
def node(site: Path, tmp_path: Path) -> Iterator[Node]:
    shutil.copytree(site / "data", tmp_path / "data")
    with Node(tmp_path) as node:
        node.now = float((site / "now").read_text())
        yield node


def checkpointed(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def overwritten(path: Path, seed: int) -> None:
    """Three pages of nonsense somewhere behind the first."""
    rng = random.Random(seed)
    checkpointed(path)
    data = bytearray(path.read_bytes())
    for page in rng.sample(range(1, len(data) // 4096), 3):
        data[page * 4096:(page + 1) * 4096] = rng.randbytes(4096)
    path.write_bytes(data)


def first_page(path: Path, seed: int) -> None:
    checkpointed(path)
    with path.open("r+b") as file:
        file.write(random.Random(seed).randbytes(4096))


def truncated(path: Path, seed: int) -> None:
    checkpointed(path)
    with path.open("r+b") as file:
        file.truncate(random.Random(seed).randrange(8192, path.stat().st_size))


def wal_lost(path: Path, seed: int) -> None:
    Path(f"{path}-wal").unlink()


def wal_garbled(path: Path, seed: int) -> None:
    log, rng = Path(f"{path}-wal"), random.Random(seed)
    data = bytearray(log.read_bytes())
    start = rng.randrange(len(data))
    data[start:] = rng.randbytes(len(data) - start)
    log.write_bytes(data)


def empty(path: Path, seed: int) -> None:
    Path(f"{path}-wal").unlink()
    path.write_bytes(b"")


def text(path: Path, seed: int) -> None:
    path.write_text("this is no ledger\n" * 1000)


def gone(path: Path, seed: int) -> None:
    for side in ("", "-wal", "-shm"):
        Path(f"{path}{side}").unlink(missing_ok=True)


DAMAGES: list[tuple[Callable[[Path, int], None], int]] = [
    *((overwritten, seed) for seed in range(8)), *((truncated, seed) for seed in range(3)), (first_page, 0),
    (wal_lost, 0), (wal_garbled, 1), (wal_garbled, 2), (empty, 0), (text, 0), (gone, 0)]


@pytest.mark.parametrize(("damage", "seed"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_whatever_happens_to_the_ledger_every_study_ends_with_its_one_derived_series(node, site, damage, seed):
    """After damage, repair and a resend of all: every object known, one derived series of each input, the same UID."""
    data = node.spool.data_dir
    before = node.derived()
    node.ledger.close()
    damaged = data / "ledger.sqlite3"
    shutil.rmtree(data)
    shutil.copytree(site / "data", data)
    damage(damaged, seed)
    kept = damaged.read_bytes() if damaged.exists() else b""

    report = repair(data, now=node.now)
    node.ledger = Ledger(node.spool.ledger_path)
    node.ledger.check()
    assert not report.set_aside or not kept or (data / report.set_aside).read_bytes() == kept
    assert not report.rebuilt.lost, "every object lies whole on disk"
    assert node.ledger.counts()["instance"]["all"] == 5 * 8 + 2
    for number in range(STUDIES):
        assert set(node.store(study(number))) <= {"repeat", "new"}
    node.decide()
    node.build()
    after = node.derived()
    assert {series: after[series] for series, uids in before.items() if uids != [None]} == {
        series: uids for series, uids in before.items() if uids != [None]}
    assert len(after) == STUDIES and all(len(uids) == 1 and uids[0] for uids in after.values())
    assert not node.repair(dry_run=True).needed
