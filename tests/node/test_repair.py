"""Repair: whatever happens to the ledger's file, nothing on disk is lost and no input makes a second derived series."""

from __future__ import annotations

import fcntl
import io
import json
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode
from typer.testing import CliRunner

from dicomnode import receive, work
from dicomnode.cli import app
from dicomnode.errors import LedgerCorrupt, NodeError
from dicomnode.executor import RECIPE, Executor
from dicomnode.groupcommit import GroupCommitter
from dicomnode.intake import Intake, Limits, Request
from dicomnode.keeping import keep
from dicomnode.ledger import Ledger
from dicomnode.pipeline import _Reporter, _work_off
from dicomnode.repair import Report, repair
from dicomnode.salvage import TABLES
from dicomnode.spoolcheck import Found, at_start, require_jobs
from sop.errors import Refused
from tests.factories import ct_series, pet_series
from tests.node.line import Line, full_settings_here

STUDIES = 6


Sent = tuple[Request, bytes]  # one C-STORE request with its data set


@cache
def study(number: int) -> tuple[Sent, ...]:
    """Four slices of PET, then four of CT."""
    small = {"slices": 4, "rows": 6, "columns": 5, "seed": number}
    return tuple(sent(dataset) for dataset in [*pet_series(**small), *ct_series(**small)])


def sent(dataset: Dataset) -> Sent:
    syntax = dataset.file_meta.TransferSyntaxUID
    data = encode(dataset, syntax.is_implicit_VR, syntax.is_little_endian)
    assert data is not None
    return Request(str(dataset.SOPClassUID), str(dataset.SOPInstanceUID), str(syntax), "SCANNER"), data


class Node(Line):
    """A line whose objects come through reception itself; jobs are built by a program in this process."""

    def store(self, objects: Sequence[Sent]) -> list[str]:
        """What reception says of each."""
        committer = GroupCommitter(self.spool, self.ledger)
        try:
            return [self._one(request, data, committer) for request, data in objects]
        finally:
            committer.close()

    def _one(self, request: Request, data: bytes, committer: GroupCommitter) -> str:
        intake = Intake(self.spool, Limits(2**30, 0), lambda: request)
        try:
            intake.write(data)
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
        uid = f"2.25.{int(job['identity'][:24], 16)}"
        self._last = {"kind": "built", "report": {"derived_series_uid": uid, "derived_instances": 1}}
        return self

    ended = False
    _last: dict[str, Any]

    def read(self, wait_s: float) -> list[dict[str, Any]]:
        return [self._last]

    def finish(self, *, grace_s: float) -> Any:
        return None


class _Pipeline(_Builder):
    """What the child does with an order, in this process."""

    def start(self, job: dict[str, Any], order: dict[str, Any], folder: Path) -> _Builder:
        with pytest.raises(Refused) as refused:
            _work_off({**order, "device": "cpu", "threads": 1}, folder, _Reporter(io.StringIO()))
        why = refused.value
        self._last = {"kind": "refused", "code": why.code, "reason": why.reason, "remedy": why.remedy}
        return self


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
    *((overwritten, seed) for seed in range(4)), (truncated, 0), (truncated, 1), (first_page, 0),
    (wal_lost, 0), (wal_garbled, 1), (empty, 0), (text, 0), (gone, 0)]


@pytest.mark.parametrize(("damage", "seed"), DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_whatever_happens_to_the_ledger_every_study_ends_with_its_one_derived_series(node, site, damage, seed):
    """After damage, repair and a resend: every object known, one derived series of each input, the same UID."""
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
    require_jobs(node.ledger, node.spool)
    assert not report.set_aside or not kept or (data / report.set_aside).read_bytes() == kept
    assert not report.rebuilt.lost, "every object lies whole on disk"
    assert node.ledger.counts()["instance"]["all"] == 5 * 8 + 2
    assert set(node.store(study(0)[::3])) == {"repeat"} and node.store(study(5)) == ["repeat"] * 2 + ["new"] * 6
    node.decide()
    node.build()
    after = node.derived()
    assert {series: after[series] for series, uids in before.items() if uids != [None]} == {
        series: uids for series, uids in before.items() if uids != [None]}
    assert len(after) == STUDIES and all(len(uids) == 1 and uids[0] for uids in after.values())
    assert not node.repair(dry_run=True).needed


def test_what_can_be_read_is_read(node, site):
    """Nonsense in three pages of many costs what stood in them and little else; history and jobs are there again."""
    before = {table: node.ledger.query(f"SELECT count(*) AS n FROM {table}")[0]["n"] for table in TABLES}
    node.ledger.close()
    overwritten(node.spool.ledger_path, 5)
    report = repair(node.spool.data_dir, now=node.now)
    node.ledger = Ledger(node.spool.ledger_path)
    assert report.damage and report.rebuilt.unread
    assert sum(report.rebuilt.salvaged.values()) > 0.6 * sum(before.values())
    told = [row for row in node.ledger.events() if row["kind"] == "node" and row["code"] == "repaired"]
    assert len(told) == 1 and "rows salvaged" in told[0]["reason"]


@pytest.mark.parametrize("where", range(4))
def test_an_interrupted_repair_leaves_the_damaged_ledger_and_is_run_again(node, monkeypatch, where):
    """Whatever step it dies at: either all is as it was, or no process opens the ledger until it is completed."""
    path = node.spool.ledger_path
    node.ledger.close()
    overwritten(path, 3)
    damaged, calls, real = path.read_bytes(), [], os.replace

    def dying(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > where // 2:
            raise OSError("power is gone")
        real(*arguments)

    monkeypatch.setattr("dicomnode.repair.os.replace", dying)
    if where % 2:
        monkeypatch.setattr("dicomnode.repair.os.link", dying)
    with pytest.raises(OSError, match="power"):
        repair(node.spool.data_dir, now=node.now)
    monkeypatch.undo()
    assert path.read_bytes() == damaged
    if (node.spool.data_dir / "ledger.repaired.sqlite3").exists():
        with pytest.raises(LedgerCorrupt, match="dicomnode repair"):
            Ledger(path)
    report = repair(node.spool.data_dir, now=node.now)
    assert (node.spool.data_dir / report.set_aside).read_bytes() == damaged
    node.ledger = Ledger(path)
    node.ledger.check()
    assert node.ledger.counts()["instance"]["all"] == 5 * 8 + 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_ledger_repaired_by_root_belongs_to_the_node(node):
    """It is whose the data directory is: the node runs as a user of its own."""
    files_of(node, 4)[0].write_bytes(b"rotten")
    os.chown(node.spool.data_dir, 12345, 12346)
    node.repair()
    names = ("ledger.sqlite3", "receiver.lock", "work.lock", "damaged")
    assert {(node.spool.data_dir / name).stat().st_uid for name in names} == {12345}


def test_a_sound_node_is_left_as_it_is(node):
    """Nothing to repair: the same file, no copy, no event."""
    events = len(node.ledger.events())
    report = node.repair()
    assert not report.needed and report.set_aside == "" and "nothing to repair" in report.text()
    assert len(node.ledger.events()) == events
    assert not list(node.spool.data_dir.glob("*damaged*")) and not (node.spool.data_dir / "repair.tmp").exists()


def test_a_node_that_runs_is_not_repaired(node):
    """Both processes write into the ledger; each holds its lock."""
    for name in ("receiver.lock", "work.lock"):
        with (node.spool.data_dir / name).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(NodeError, match=f"{name}.*Remedy: stop it"):
                repair(node.spool.data_dir, now=node.now)


def test_a_ledger_of_a_newer_version_is_not_taken_for_a_damaged_one(node):
    """What this software does not know it does not rebuild."""
    with node.ledger.transaction() as db:
        db.execute("PRAGMA user_version=99")
    node.ledger.close()
    with pytest.raises(LedgerCorrupt, match="version 99"):
        repair(node.spool.data_dir, now=node.now)
    with sqlite3.connect(node.spool.ledger_path) as db:
        db.execute("PRAGMA user_version=3")


def files_of(node: Node, number: int) -> list[Path]:
    return [node.spool.absolute(node.ledger.known(request.sop_instance_uid)["path"])  # type: ignore[index]
            for request, _ in study(number)]


def flip(path: Path) -> None:
    """One bit of the pixels."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_objects_that_are_damaged_or_gone_are_told_and_a_resend_brings_them_back(node):
    """One bit, a short file, a missing one: put aside, named with study and remedy; sent again they are new."""
    rotten, short, missing = files_of(node, 4)[:3]
    flip(rotten)
    short.write_bytes(short.read_bytes()[:-20])
    missing.unlink()
    assert node.repair(dry_run=True).needed and rotten.exists(), "a dry run changes nothing"

    report = node.repair()
    assert {lost.sop for lost in report.rebuilt.lost} == {path.stem for path in (rotten, short, missing)}
    assert not rotten.exists() and len(list((node.spool.data_dir / "damaged").iterdir())) == 2
    pet = rotten.parent.name
    assert node.state(pet) == ("held", "input-lost")
    node.build()
    assert [row["code"] for row in node.ledger.jobs_of_series(pet)] == ["input-damaged"], "never of a part of its input"
    told = report.text()
    assert all(path.stem in told for path in (rotten, short, missing)) and "send it to this node again" in told

    node.now += 10
    assert sorted(node.store(study(4))) == ["new"] * 3 + ["repeat"] * 5
    node.decide()
    node.build()
    assert [row["state"] for row in node.ledger.jobs_of_series(pet)] == ["built"]
    assert not node.repair(dry_run=True).needed


def test_a_cut_file_without_a_row_is_not_entered(node):
    """With the ledger gone too only the file can tell; it tells that its pixels are not all there."""
    short = files_of(node, 1)[0]
    short.write_bytes(short.read_bytes()[:-20])
    node.ledger.close()
    gone(node.spool.ledger_path, 0)
    report = repair(node.spool.data_dir, now=node.now)
    node.ledger = Ledger(node.spool.ledger_path)
    assert [lost.sop for lost in report.rebuilt.lost] == [short.stem] and not short.exists()
    assert "cut short" in report.rebuilt.lost[0].reason


def test_a_job_brought_back_keeps_number_settings_and_what_a_person_decided(node):
    """The row is lost, the history is not: a cancelled job stays cancelled; the next one gets a number of its own."""
    jobs = {row["id"]: node.ledger.job(row["id"]) for row in node.ledger.query("SELECT id FROM job")}
    stopped = next(job for job in jobs.values() if job["state"] == "built")
    node.ledger.set_job(stopped["id"], "cancelled", now=node.now, code="operator")
    with node.ledger.transaction() as db:
        for table in ("delivery_instance", "delivery", "job"):
            db.execute(f"DELETE FROM {table}")
        db.execute("DELETE FROM sqlite_sequence WHERE name = 'job'")
    assert node.repair().rebuilt.entered["jobs"] == 4
    for number, old in jobs.items():
        if old["derived_path"] is None:
            continue
        new = node.ledger.job(number)
        assert new["state"] == ("cancelled" if number == stopped["id"] else "sending")
        assert {key: new[key] for key in (*RECIPE, "identity")} == {key: old[key] for key in (*RECIPE, "identity")}
        assert len(node.ledger.deliveries(number)) == (number != stopped["id"])
    node.decide()
    assert node.ledger.query("SELECT max(id) AS top FROM job")[0]["top"] > max(jobs)


def test_what_was_sent_by_a_job_that_nobody_knows_is_not_made_again_unasked(node):
    """Row and report are gone, the history says that something was sent: held for a person."""
    job = node.ledger.query("SELECT * FROM job WHERE state = 'delivered'")[0]
    shutil.rmtree(node.spool.absolute(job["derived_path"]))
    with node.ledger.transaction() as db:
        db.execute("PRAGMA defer_foreign_keys=ON")
        for table in ("delivery_instance", "delivery", "job"):
            db.execute(f"DELETE FROM {table}")
    node.repair()
    assert node.state(job["series_uid"]) == ("held", "repaired")


def test_what_was_purged_stays_purged(node):
    """Files that were removed on purpose are not lost, and a resend of them makes no job."""
    series = files_of(node, 0)[0].parent
    for path in series.iterdir():
        path.unlink()
    with node.ledger.transaction() as db:
        db.execute("UPDATE series SET purged_at = ? WHERE series_uid = ?", (node.now, series.name))
    assert not node.repair().needed
    assert set(node.store(study(0)[:4])) == {"repeat"}


def test_a_derived_series_that_is_not_whole_is_made_again_under_the_same_uids(node):
    """Its files rot before they are sent: the job is queued again."""
    job = next(node.ledger.job(row["id"]) for row in node.ledger.query("SELECT id FROM job WHERE state = 'built'"))
    (node.spool.absolute(job["derived_path"]) / "1.dcm").write_bytes(b"rotten")
    assert node.repair().rebuilt.restarted["jobs"] == 1
    assert node.ledger.job(job["id"])["state"] == "queued"
    node.build()
    again = node.ledger.job(job["id"])
    assert (again["state"], again["derived_series_uid"]) == ("built", job["derived_series_uid"])


# --- the node itself


def test_the_start_holds_what_lacks_files_and_a_resend_lets_it_go_on(node):
    """A queued job and a series amid reception miss files: held with the remedy; sent again, both go on."""
    queued, coming = files_of(node, 4), [node.spool.absolute(row["path"]) for row in node.ledger.query(
        "SELECT path FROM instance WHERE sop_instance_uid = ?", (study(5)[0][0].sop_instance_uid,))]
    queued[1].unlink()
    coming[0].write_bytes(b"short")
    found = at_start(node.ledger, node.spool, now=node.now)
    assert (found.missing, found.unknown, len(found.held)) == (1, 0, 2)
    job = node.ledger.jobs_of_series(queued[0].parent.name)[0]
    assert (job["state"], job["code"]) == ("held", "input-damaged") and "Remedy: send the series again" in job["reason"]
    assert node.state(coming[0].parent.name) == ("held", "input-damaged")
    assert [row["code"] for row in node.ledger.events()][-1] == "spool"

    node.now += 5
    assert node.store(study(4)) == ["repeat"] * 8 and node.store(study(5)) == ["repeat"] * 2 + ["new"] * 6
    node.decide()
    node.build()
    assert node.ledger.job(job["id"])["state"] == "built"
    assert [row["state"] for row in node.ledger.jobs_of_series(coming[0].parent.name)] == ["built"]


def test_a_start_on_a_sound_spool_says_nothing(node):
    """No event, nothing held."""
    events = len(node.ledger.events())
    assert at_start(node.ledger, node.spool, now=node.now) == Found(0, 0, ())
    assert len(node.ledger.events()) == events


def test_files_without_rows_are_told_at_the_start(node):
    """The write-ahead log is lost: the file is sound, and the objects know better."""
    with node.ledger.transaction() as db:
        db.execute("DELETE FROM instance WHERE series_uid = ?", (files_of(node, 4)[0].parent.name,))
    assert at_start(node.ledger, node.spool, now=node.now).unknown == 4


def test_a_ledger_that_is_older_than_what_lies_on_disk_is_refused(node):
    """Its next job would take the number, and the folder, of one that it does not know."""
    require_jobs(node.ledger, node.spool)
    (node.spool.data_dir / "derived" / "77").mkdir()
    with pytest.raises(LedgerCorrupt, match=r"derived/77.*Remedy: .*dicomnode repair"):
        require_jobs(node.ledger, node.spool)
    for part in (receive.run, work.run):
        with pytest.raises(LedgerCorrupt):
            part(node.config, stop=threading.Event(), ready=lambda: None)
    assert node.repair().rebuilt.lost[0].reason.startswith("the job of derived/77 is not known")
    require_jobs(node.ledger, node.spool)
    assert (node.spool.data_dir / "damaged" / f"derived-77.{int(node.now)}").is_dir()


def test_a_bit_that_flips_in_an_input_is_noticed_before_it_is_used(node):
    """Held with study's remedy, not one derived file; sent again, the same job is built."""
    rotten = files_of(node, 4)[2]
    flip(rotten)
    executor = Executor(node.config, node.ledger, node.spool, clock=node.clock, full_settings=full_settings_here,
                        runner=_Pipeline())  # type: ignore[arg-type]
    job = node.ledger.claim(executor.name, now=node.now, lease_s=60)
    executor.run_job(job, threading.Event())
    held = node.ledger.job(job["id"])
    assert (held["state"], held["code"]) == ("held", "input-damaged") and rotten.stem in held["reason"]
    assert not (node.spool.data_dir / "derived" / str(job["id"])).exists()
    node.decide()
    assert node.ledger.job(job["id"])["state"] == "held", "nothing has come yet"
    node.store(study(4))
    node.decide()
    node.build()
    assert node.ledger.job(job["id"])["state"] == "built"


def test_the_command_says_what_is_lost_and_what_was_done(node, tmp_path):
    """`repair --dry-run` changes nothing and ends with 1; `repair` mends, and then there is nothing left to do."""
    config = tmp_path / "node.toml"
    config.write_text(f'[node]\ndata_dir = "{node.spool.data_dir}"\n')
    node.ledger.close()
    overwritten(node.spool.ledger_path, 2)
    files_of_study = next((node.spool.data_dir / "objects").glob("*/*/*.dcm"))
    files_of_study.unlink()

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["repair", *arguments, "--config", str(config)])

    looked, mended, after = run("--dry-run"), run(), run("--json")
    assert looked.exit_code == 1 and "Nothing was changed" in looked.stdout
    assert mended.exit_code == 0 and "The old ledger is kept as ledger.damaged-" in mended.stdout
    assert f"study {files_of_study.parent.parent.name}" in mended.stdout
    assert after.exit_code == 0 and json.loads(after.stdout)["needed"] is False
    node.ledger = Ledger(node.spool.ledger_path)
