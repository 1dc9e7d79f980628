"""Jobs in child processes: how a child ends decides the job's next state, and nothing it does takes the node down.

The children here are small programs that behave in one way each; the real pipeline runs in the last tests.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from dicomnode import operate
from dicomnode.executor import LOST_LIMIT, Executor
from dicomnode.ledger import NewJob
from dicomnode.runner import ChildRunner
from dicomnode.schedule import sweep_work
from dicomnode.work import run as work
from tests.factories import pet_series
from tests.node.line import PET_ROUTE, Line, full_settings_here
from tests.peers import REPOSITORY, StoragePeer, wait_until

ROUTE = PET_ROUTE + 'guide = "never"\n'
TOML = "[work]\nattempts = 2\nretry_s = 60\nlease_s = 5\nhang_s = 60\n"
PRELUDE = """
import json, os, pathlib, signal, sys, time
order = pathlib.Path(sys.argv[1])
def say(**message): print(json.dumps(message), flush=True)
def build(**more):
    folder = order.parent / "derived.tmp"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.dcm").write_bytes(b"derived")
    say(kind="built", report={"derived_series_uid": "2.25.77", "derived_instances": 2, **more})
"""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Line(tmp_path, toml=TOML, route=ROUTE) as line:
        yield line


def child(line: Line, program: str) -> Executor:
    """An executor whose child is `program`."""
    return Executor(line.config, line.ledger, line.spool, clock=line.clock, full_settings=full_settings_here,
                    runner=ChildRunner(command=(sys.executable, "-I", "-c", PRELUDE + program)))


def queued(line: Line, method: str = "nearest", *, identity: str = "id") -> int:
    """A queued job of a received series."""
    uid = line.receive(pet_series())
    row = line.ledger.series(uid)
    if row["state"] == "receiving":
        line.ledger.set_series(uid, "complete", now=line.now)
    inputs = tuple(one["sop_instance_uid"] for one in line.ledger.instances(uid))
    return line.ledger.add_job(NewJob(identity, uid, row["study_uid"], None, "all-pet", method, "default", {},
                                      ("PACS",), inputs), now=line.now)


def attempt(line: Line, executor: Executor, stop: threading.Event | None = None) -> dict[str, Any]:
    """Claim the job, run it once, and look at it."""
    job = line.ledger.claim(executor.name, now=line.now, lease_s=line.config.work.lease_s)
    assert job is not None
    executor.run_job(job, stop or threading.Event())
    return line.ledger.job(job["id"])


def work_folders(line: Line) -> list[str]:
    return [path.name for path in (line.spool.data_dir / "work").iterdir()]


def test_a_ledger_that_cannot_be_written_does_not_end_the_executor(line: Line, monkeypatch: pytest.MonkeyPatch):
    """Disk full: the executor asks again later; the worker is not started over and over."""
    stop, asked = threading.Event(), []

    def claim(*_: object, **__: object) -> None:
        asked.append(1)
        if len(asked) == 3:
            stop.set()
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(line.ledger, "claim", claim)
    monkeypatch.setattr("dicomnode.executor.LEDGER_WAIT_S", 0.0)
    child(line, "").run(stop)
    assert len(asked) == 3


def test_an_outcome_that_cannot_be_written_ends_neither_worker_nor_job(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locked as a job ends: other devices go on, and after its lease the series is entered without computing."""
    job_id = queued(line)
    stop, built, programs = threading.Event(), line.ledger.built, iter(["build()", "sys.exit('must not run')"])

    def locked(*_: object, **__: object) -> bool:
        monkeypatch.setattr(line.ledger, "built", built)
        line.now += 61
        raise sqlite3.OperationalError("database is locked")

    def run_job(self: Executor, job: dict[str, Any], stop: threading.Event) -> None:
        self._runner = ChildRunner(command=(sys.executable, "-I", "-c", PRELUDE + next(programs)))
        real(self, job, stop)
        stop.set()

    real = Executor.run_job
    monkeypatch.setattr(line.ledger, "built", locked)
    monkeypatch.setattr(Executor, "run_job", run_job)
    monkeypatch.setattr("dicomnode.executor.LEDGER_WAIT_S", 0.0)
    child(line, "").run(stop)
    assert line.ledger.job(job_id)["state"] == "built" and work_folders(line) == []


def test_an_attempt_whose_lease_ran_out_does_not_disturb_the_one_that_took_it_up(line: Line) -> None:
    """The clock leaps, another device takes the job: the first one's folder, failure and series touch nothing of it."""
    job_id = queued(line)
    first = line.ledger.claim("first", now=line.now, lease_s=5)
    assert first is not None
    line.now += 60
    second = line.ledger.claim("second", now=line.now, lease_s=5)
    assert second is not None and second["id"] == job_id
    folder = line.spool.data_dir / "work" / f"{job_id}.{second['attempts']}"
    folder.mkdir()
    for program in ("sys.exit(3)", "build()", 'say(kind="refused", code="gate", reason="r", remedy="m")'):
        child(line, program).run_job(first, threading.Event())
        row = line.ledger.job(job_id)
        assert (row["state"], row["lease_owner"], row["attempts"]) == ("running", "second", 2)
    assert folder.is_dir() and list((line.spool.data_dir / "derived").iterdir()) == []


def test_a_series_without_pictures_goes_on_and_the_log_says_so(line: Line) -> None:
    """What the child wrote to its own log goes with its folder; the worker says it, and the report keeps it."""
    queued(line)
    with capture_logs() as logs:
        row = attempt(line, child(line, 'build(looks={"problem": "no pictures: ValueError: odd"})'))
    assert row["state"] == "built" and row["report"]["looks"]["problem"].endswith("odd")
    assert [(one["log_level"], one["reason"]) for one in logs if one.get("action") == "looks_missing"] == [
        ("warning", "no pictures: ValueError: odd")]


@pytest.mark.parametrize("other", ["2.25.77", "2.25.78"])
def test_another_image_than_the_one_that_was_sent_is_held(line: Line, other: str) -> None:
    """Files lost after a part was sent, and computed again the bytes differ: held, and only a person sends it."""
    job_id = queued(line)
    job = attempt(line, child(line, "build()"))
    (delivery,) = line.ledger.deliveries(job_id)
    line.ledger.set_job(job_id, "sending", now=line.now)
    line.ledger.put_statuses(delivery["id"], [("2.25.77.0", 0, "")], now=line.now)
    line.ledger.set_job(job_id, "held", now=line.now, code="derived-lost", derived_path=None)
    shutil.rmtree(line.spool.absolute(job["derived_path"]))
    different = PRELUDE.replace('b"derived"', 'b"other"').replace("2.25.77", other)
    executor = Executor(line.config, line.ledger, line.spool, clock=line.clock, full_settings=full_settings_here,
                        runner=ChildRunner(command=(sys.executable, "-I", "-c", different + "build()")))
    line.ledger.set_delivery(delivery["id"], "dead", now=line.now, reason="down for days")
    for _ in range(2):  # a retry does not wash it clean, of a delivery that was given up neither
        operate.retry(line.ledger, f"job:{job_id}", now=line.now, actor="me")
        job = attempt(line, executor)
        assert (job["state"], job["code"], job["derived_series_uid"]) == ("held", "other-image", "2.25.77")
        assert "PACS" in job["reason"] and line.ledger.due_deliveries(now=line.now) == []
    operate.release(line.ledger, f"job:{job_id}", now=line.now, actor="me")
    job = line.ledger.job(job_id)
    assert (job["state"], job["derived_series_uid"]) == ("built", other)
    assert [row["id"] for row in line.ledger.due_deliveries(now=line.now)] == [delivery["id"]]
    assert line.ledger.statuses(delivery["id"]) == {}, "all of it is sent"


def test_the_same_image_computed_again_goes_on_being_sent(line: Line) -> None:
    """Files lost after a part was sent: the same bytes again, and the peer gets what it lacks."""
    job_id = queued(line)
    job = attempt(line, child(line, "build()"))
    (delivery,) = line.ledger.deliveries(job_id)
    line.ledger.set_job(job_id, "sending", now=line.now)
    line.ledger.put_statuses(delivery["id"], [("2.25.77.0", 0, "")], now=line.now)
    line.ledger.set_job(job_id, "held", now=line.now, code="derived-lost", derived_path=None)
    shutil.rmtree(line.spool.absolute(job["derived_path"]))
    operate.retry(line.ledger, f"job:{job_id}", now=line.now, actor="me")
    assert attempt(line, child(line, "build()"))["state"] == "built"
    assert line.ledger.statuses(delivery["id"]) == {"2.25.77.0": 0}


def test_a_built_series_is_moved_whole_to_its_place_and_entered_with_its_deliveries(line: Line) -> None:
    """derived/JOB holds the files and report.json; the work folder is gone; one delivery per peer waits."""
    queued(line)
    job = attempt(line, child(line, "build()"))
    folder = line.spool.absolute(job["derived_path"])
    assert job["state"] == "built" and job["derived_series_uid"] == "2.25.77" and job["derived_instances"] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["0.dcm", "1.dcm", "report.json"]
    assert json.loads((folder / "report.json").read_text())["identity"] == "id"
    assert work_folders(line) == []
    assert [(row["peer"], row["state"]) for row in line.ledger.deliveries(job["id"])] == [("PACS", "waiting")]


def test_a_series_that_replaces_one_already_sent_says_so(line: Line) -> None:
    """Superseded after sending: the new one's description counts the update; superseded before: nothing to say."""
    old_id = queued(line)
    executor = child(line, "text = json.loads(order.read_text())['derivation']['series_description']\n"
                           "say(kind='failed', reason=text)")
    old = attempt(line, child(line, "build()"))
    line.ledger.set_job(old_id, "superseded", now=line.now)
    line.ledger.set_series(old["series_uid"], "receiving", now=line.now)
    line.ledger.set_series(old["series_uid"], "complete", now=line.now)
    line.ledger.add_job(NewJob("id2", old["series_uid"], old["study_uid"], None, "all-pet", "nearest", "default", {},
                               ("PACS",), tuple(old["inputs"])), now=line.now)
    assert attempt(line, executor)["reason"].startswith("NBD deblurred (attempt")
    line.ledger.put_statuses(line.ledger.deliveries(old_id)[0]["id"], [("1.2", 0, "")], now=line.now)
    line.now += 61
    assert attempt(line, executor)["reason"].startswith("NBD deblurred (update 1) (attempt")


def test_what_a_library_prints_is_no_message(line: Line) -> None:
    """Text, an empty line, JSON that is none of ours: passed over, the job is built."""
    queued(line)
    job = attempt(line, child(line, "print('Loading plugins ...'); print(); print('[1, 2]', flush=True); build()"))
    assert job["state"] == "built"


def test_what_is_refused_is_held_at_once_with_reason_and_remedy(line: Line) -> None:
    """No second attempt: it would refuse again."""
    queued(line)
    job = attempt(line, child(line, 'say(kind="refused", code="gap", reason="a slice is missing", remedy="send it")'))
    assert (job["state"], job["code"]) == ("held", "gap")
    assert job["reason"] == "a slice is missing. Remedy: send it"


@pytest.mark.parametrize(("program", "reason", "code"), [
    ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, perhaps for lack of memory", "attempts"),
    ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", "attempts"),
    ("sys.exit('CUDA error: an illegal memory access')", "CUDA error", "device"),
    ("sys.exit(0)", "status 0", "attempts"),
    ('say(kind="failed", code="memory", reason="OutOfMemoryError: 2 GiB")', "OutOfMemoryError", "memory"),
])
def test_a_child_that_dies_is_tried_again_later_then_held(line: Line, program: str, reason: str, code: str) -> None:
    """Killed, crashed, ended without a word, failed: attempt by attempt with a wait, held after the last."""
    queued(line)
    executor = child(line, program)
    job = attempt(line, executor)
    assert job["state"] == "failed" and reason in job["reason"] and "attempt 1 of 2" in job["reason"]
    assert line.ledger.claim("w", now=line.now + 59, lease_s=5) is None, "not before retry_s"
    line.now += 61
    job = attempt(line, executor)
    assert (job["state"], job["code"], job["attempts"]) == ("held", code, 2)
    assert reason in job["reason"] and "Remedy" in job["reason"]
    assert work_folders(line) == []


LACK = """
settings = json.loads(order.read_text())["settings"]
print(settings, file=sys.stderr)
"""


@pytest.mark.parametrize("ends", [
    'say(kind="failed", code="memory", reason="MemoryError")', "sys.exit('CUDA error: launch failed')",
    "sys.exit('terminate called after throwing an instance of std::bad_alloc')"])
def test_each_attempt_after_a_lack_of_memory_may_use_half(tmp_path: Path, ends: str) -> None:
    """4 GB, the method's own; then 2, then 1: said to the child and in the reason; a retry begins with 4 again."""
    with Line(tmp_path, toml="[work]\nattempts = 3\nretry_s = 1\n", route=ROUTE) as line:
        job_id = queued(line, "tv")
        note = f"pathlib.Path({str(tmp_path)!r}, 'allowed').open('a').write(str(settings.get('memory_gb')) + ' ')\n"
        executor = child(line, LACK + note + ends)
        given = []
        for _ in range(3):
            given.append(attempt(line, executor)["memory_gb"])
            line.now += 10
        assert (tmp_path / "allowed").read_text() == "None 2.0 1.0 "
        assert given == [2.0, 1.0, None]
        job = line.ledger.job(job_id)
        assert job["state"] == "held" and job["code"] in ("memory", "device") and "Remedy" in job["reason"]


def test_a_method_that_cannot_do_with_less_is_tried_as_it_is(line: Line) -> None:
    """It has no such setting; nothing is added to its settings."""
    queued(line)
    job = attempt(line, child(line, 'say(kind="failed", code="memory", reason="MemoryError")'))
    assert (job["state"], job["code"], job["memory_gb"]) == ("failed", "memory", None)


def test_only_a_second_kill_by_somebody_unknown_is_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    """One kill -9 must not change the image; two are no accident."""
    with Line(tmp_path, toml="[work]\nattempts = 4\nretry_s = 1\n", route=ROUTE) as line:
        queued(line, "tv")
        executor, given = child(line, "os.kill(os.getpid(), signal.SIGKILL)"), []
        for _ in range(3):
            given.append(attempt(line, executor)["memory_gb"])
            line.now += 10
        assert given == [None, 2.0, 1.0]


def test_a_kill_that_the_kernel_counted_is_a_lack_of_memory_at_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/vmstat says that it killed a process for it while the child ran."""
    counts = iter((7, 8))
    monkeypatch.setattr("dicomnode.runner._kernel_kills", lambda: next(counts))
    with Line(tmp_path, toml=TOML, route=ROUTE) as line:
        queued(line, "tv")
        job = attempt(line, child(line, "os.kill(os.getpid(), signal.SIGKILL)"))
        assert (job["state"], job["code"], job["memory_gb"]) == ("failed", "memory", 2.0)
        assert "killed by SIGKILL for lack of memory" in job["reason"] and "with 2 GB" in job["reason"]


def test_the_pipeline_says_itself_that_memory_ran_out(line: Line) -> None:
    """A MemoryError anywhere in it is the last word, with its code."""
    queued(line, "tv")
    program = ("import sys, dicomnode.pipeline as pipeline\n"
               "def work_off(*_):\n"
               "    bytearray(1 << 60)\n"
               "pipeline._work_off = work_off\n"
               "pipeline.main(sys.argv[1:])")
    executor = Executor(line.config, line.ledger, line.spool, clock=line.clock, full_settings=full_settings_here,
                        runner=ChildRunner(command=(sys.executable, "-c", program)))
    job = attempt(line, executor)
    assert (job["state"], job["code"], job["memory_gb"]) == ("failed", "memory", 2.0)
    assert "MemoryError" in job["reason"]


def test_memory_too_small_for_the_smallest_tile_holds_the_job_for_memory(line: Line) -> None:
    """The method refuses the halved memory: the person reads of memory, not of a wrong setting."""
    job_id = queued(line, "tv")
    attempt(line, child(line, 'say(kind="failed", code="memory", reason="MemoryError")'))
    line.now += 61
    refuse = 'say(kind="refused", code="method", reason="the smallest tile needs 3 GB", remedy="another method")'
    job = attempt(line, child(line, refuse))
    assert (job["state"], job["code"], job["memory_gb"]) == ("held", "memory", None)
    assert "3 GB" in job["reason"] and f"retry job:{job_id}" in job["reason"]


def test_a_job_that_fails_lets_others_go_first(line: Line) -> None:
    """Poison in the queue starves nobody: while it waits for its next attempt, the next job is taken."""
    first = queued(line)
    second = queued(line, identity="other")
    assert attempt(line, child(line, "os.kill(os.getpid(), signal.SIGSEGV)"))["id"] == first
    assert attempt(line, child(line, "build()"))["id"] == second


def test_a_job_that_ends_its_worker_again_and_again_lets_others_go_first(line: Line) -> None:
    """The first time it goes on at once; then only when nobody else waits, or after a wait that doubles."""
    first, second = queued(line), queued(line, identity="other")
    executor, claimed = child(line, "build()"), []
    for _ in range(3):
        job = line.ledger.claim("dead", now=line.now, lease_s=60)
        assert job is not None
        claimed.append(job["id"])
        if job["id"] == second:
            break
        executor.recover()
    assert claimed == [first, first, second]
    assert line.ledger.job(first)["run_after"] == line.now + 60
    line.ledger.set_job(second, "cancelled", now=line.now)
    line.now += 61
    assert line.ledger.claim("dead", now=line.now, lease_s=60)["id"] == first  # type: ignore[index]
    executor.recover()
    assert line.ledger.job(first)["run_after"] == line.now, "nobody else waits"


def test_what_ran_the_job_was_lost_is_no_attempt(line: Line) -> None:
    """A cluster that went away delays the job, nothing else."""
    queued(line)
    job = attempt(line, child(line, 'say(kind="lost", code="cluster-unreachable", reason="no scheduler")'))
    assert (job["state"], job["code"], job["attempts"]) == ("queued", "cluster-unreachable", 0)
    assert job["run_after"] == line.now + 60


@pytest.mark.parametrize("program", [
    'say(kind="failed", reason="OSError: [Errno 28] No space left on device", code="disk")',
    'raise OSError(28, "No space left on device")'])
def test_a_full_disk_is_no_attempt_and_is_waited_for_longer_each_time(line: Line, program: str) -> None:
    """A night with a full disk holds no study: each goes on by itself when there is room."""
    queued(line)
    for wait_s in (60, 120, 240):
        job = attempt(line, child(line, program))
        assert (job["state"], job["code"], job["attempts"]) == ("queued", "disk-full", 0)
        assert job["run_after"] == line.now + wait_s and "free disk space" in job["reason"]
        line.now += wait_s
    assert attempt(line, child(line, "build()"))["state"] == "built"


def test_a_damaged_series_is_not_adopted(line: Line) -> None:
    """Other bytes in derived/JOB than were checked: computed again."""
    job_id = queued(line)
    executor = child(line, "build()")
    attempt(line, executor)
    (line.spool.data_dir / "derived" / str(job_id) / "1.dcm").write_bytes(b"rotten")
    line.ledger.set_job(job_id, "queued", now=line.now)
    job = attempt(line, executor)
    assert job["state"] == "built" and (line.spool.absolute(job["derived_path"]) / "1.dcm").read_bytes() == b"derived"


def test_waits_between_attempts_double(tmp_path: Path) -> None:
    """retry_s, then twice, then four times as long."""
    with Line(tmp_path, toml="[work]\nattempts = 4\nretry_s = 60\n", route=ROUTE) as line:
        queued(line)
        executor, waits = child(line, "sys.exit(1)"), []
        for _ in range(3):
            job = attempt(line, executor)
            waits.append(job["run_after"] - line.now)
            line.now = job["run_after"]
        assert waits == [60, 120, 240]


def test_a_child_that_hangs_is_killed_and_counts_as_a_failed_attempt(tmp_path: Path) -> None:
    """Alive, but without progress for hang_s."""
    with Line(tmp_path, toml=TOML, route=ROUTE) as line:
        object.__setattr__(line.config.work, "hang_s", 1.0)  # below what a configuration may say, for the test's sake
        queued(line)
        started = time.monotonic()
        job = attempt(line, child(line, "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"))
        assert job["state"] == "failed" and "no progress for 1 s" in job["reason"]
        assert time.monotonic() - started < 12


def test_progress_reaches_the_ledger_and_keeps_the_lease(line: Line) -> None:
    """While the child works its last progress can be read, and the lease lies ahead."""
    job_id = queued(line)
    seen: list[dict[str, Any]] = []

    def look() -> None:
        seen.append(wait_until("progress", lambda: line.ledger.job(job_id)["progress"]))
        seen.append(line.ledger.job(job_id))

    watcher = threading.Thread(target=look)
    watcher.start()
    program = 'say(kind="progress", stage="main", step=7, steps=9, loss=None); time.sleep(2.5); build()'
    attempt(line, child(line, program))
    watcher.join()
    assert seen[0] == {"stage": "main", "step": 7, "steps": 9, "loss": None}
    assert seen[1]["lease_until"] == line.now + 5


def test_a_ledger_that_cannot_be_written_does_not_end_a_running_job(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full or locked for a while: the child works on, and what it makes is entered when it is done."""
    queued(line)
    asked = []

    def renew(*_: object, **__: object) -> bool:
        asked.append(1)
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(line.ledger, "renew", renew)
    assert attempt(line, child(line, "time.sleep(1.5); build()"))["state"] == "built"
    assert len(asked) == 1, "asked again only after a while"


@pytest.mark.parametrize("state", ["cancelled", "superseded", "held"])
def test_a_job_that_a_person_takes_away_is_killed(line: Line, state: str) -> None:
    """The child ends, the state the person gave stays, nothing is built."""
    job_id = queued(line)
    taker = threading.Timer(0.5, lambda: line.ledger.set_job(job_id, state, now=line.now, actor="me"))
    taker.start()
    started = time.monotonic()
    job = attempt(line, child(line, "time.sleep(60); build()"))
    taker.join()
    assert job["state"] == state and job["derived_path"] is None
    assert time.monotonic() - started < 10


def test_a_stopped_worker_puts_its_job_back_uncounted(line: Line) -> None:
    """SIGTERM of the worker: the child ends, the job is queued again with all its attempts."""
    queued(line)
    stop = threading.Event()
    timer = threading.Timer(0.5, stop.set)
    timer.start()
    job = attempt(line, child(line, "time.sleep(60)"), stop)
    timer.join()
    assert (job["state"], job["attempts"]) == ("queued", 0)


def test_a_child_that_a_service_manager_ends_with_us_is_not_a_failed_attempt(line: Line) -> None:
    """SIGTERM to all processes at once: the child is gone first, the stop reaches us a moment later."""
    queued(line)
    stop = threading.Event()
    timer = threading.Timer(0.6, stop.set)
    timer.start()
    job = attempt(line, child(line, "os.kill(os.getpid(), signal.SIGTERM)"), stop)
    timer.join()
    assert (job["state"], job["attempts"]) == ("queued", 0)


def test_a_series_that_was_kept_but_not_entered_is_adopted(line: Line) -> None:
    """A crash between rename and commit: the next attempt enters what lies there, without computing."""
    queued(line)
    executor = child(line, "build()")
    line.ledger.built, real = (lambda *_, **__: False), line.ledger.built  # type: ignore[method-assign]
    assert attempt(line, executor)["state"] == "running"
    line.ledger.built = real  # type: ignore[method-assign]
    executor.recover()
    job = attempt(line, child(line, "sys.exit('must not run')"))
    assert job["state"] == "built" and job["derived_series_uid"] == "2.25.77"


def test_a_part_of_a_series_is_not_adopted(line: Line) -> None:
    """A file that is gone from derived/JOB: computed again, whole."""
    job_id = queued(line)
    executor = child(line, "build()")
    attempt(line, executor)
    (line.spool.data_dir / "derived" / str(job_id) / "1.dcm").unlink()
    line.ledger.set_job(job_id, "queued", now=line.now)
    job = attempt(line, executor)
    assert job["state"] == "built" and len(list(line.spool.absolute(job["derived_path"]).glob("*.dcm"))) == 2


def test_jobs_of_a_dead_worker_are_queued_at_once_and_held_if_it_dies_of_them_again_and_again(line: Line) -> None:
    """No wait for the lease at a restart, the attempt is not counted; but not for ever."""
    job_id = queued(line)
    executor = child(line, "build()")
    for _ in range(LOST_LIMIT):
        assert line.ledger.claim("dead", now=line.now, lease_s=60) is not None
        assert executor.recover() == 1
        assert (line.ledger.job(job_id)["state"], line.ledger.job(job_id)["attempts"]) == ("queued", 0)
    line.ledger.claim("dead", now=line.now, lease_s=60)
    executor.recover()
    assert (line.ledger.job(job_id)["state"], line.ledger.job(job_id)["code"]) == ("held", "worker-lost")


def test_the_child_dies_with_its_parent() -> None:
    """kill -9 of a process whose child is tied to it: the child is gone soon after."""
    parent = subprocess.Popen(
        [sys.executable, "-c", "import os, subprocess, sys, time\n"
         "program = 'import os, time; from dicomnode.process import tie_to_parent; tie_to_parent();'\n"
         "program += 'print(os.getpid(), flush=True); time.sleep(60)'\n"
         "environment = {**os.environ, 'DICOMNODE_PARENT': str(os.getpid())}\n"
         "subprocess.Popen([sys.executable, '-c', program], env=environment).wait()"],
        stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until("the child to die", lambda: not alive(pid), timeout_s=10)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def checkpoint_folders(line: Line) -> list[str]:
    return [path.name for path in (line.spool.data_dir / "checkpoints").iterdir()]


def test_the_next_attempt_finds_what_a_killed_one_kept_and_a_built_series_leaves_nothing(line: Line) -> None:
    """checkpoints/JOB outlives the child and its work folder; it goes with the job's success."""
    job_id = queued(line)
    program = """
import pathlib
kept = pathlib.Path(json.loads(order.read_text())["checkpoints"])
if not kept.exists():
    kept.mkdir(); (kept / "state").write_text("7"); os.kill(os.getpid(), signal.SIGKILL)
assert (kept / "state").read_text() == "7"
build()
"""
    executor = child(line, program)
    assert attempt(line, executor)["state"] == "failed"
    assert work_folders(line) == [] and checkpoint_folders(line) == [str(job_id)]
    assert sweep_work(line.ledger, line.spool) == 0, "the job will go on from it"
    line.now += 61
    assert attempt(line, executor)["state"] == "built"
    assert checkpoint_folders(line) == []


def test_checkpoints_that_no_job_will_go_on_from_are_removed(line: Line) -> None:
    """Refused: at once. Cancelled, or of a job that is not known: swept. Queued again by a stop: kept."""
    job_id = queued(line)
    keep = 'import pathlib; pathlib.Path(json.loads(order.read_text())["checkpoints"]).mkdir(exist_ok=True)\n'
    stop = threading.Event()
    timer = threading.Timer(2.0, stop.set)
    timer.start()
    assert attempt(line, child(line, keep + "time.sleep(60)"), stop)["state"] == "queued"
    assert checkpoint_folders(line) == [str(job_id)]
    refuse = 'say(kind="refused", code="gate", reason="not safe", remedy="another preset")'
    assert attempt(line, child(line, keep + refuse))["state"] == "held"
    assert checkpoint_folders(line) == []
    line.ledger.set_job(job_id, "cancelled", now=line.now)
    for name in (str(job_id), "999"):
        (line.spool.data_dir / "checkpoints" / name).mkdir()
    assert sweep_work(line.ledger, line.spool) == 2
    assert checkpoint_folders(line) == []


def test_work_folders_without_a_running_job_are_swept(line: Line) -> None:
    """Left by a crash: removed; the folder of a running job stays."""
    job_id = queued(line)
    line.ledger.claim("w", now=line.now, lease_s=60)
    for name in (str(job_id), "999"):
        (line.spool.data_dir / "work" / name).mkdir()
    assert sweep_work(line.ledger, line.spool) == 1
    assert work_folders(line) == [str(job_id)]


# --- the real pipeline


def test_the_real_pipeline_builds_a_series_and_a_repeat_gives_the_same_bytes(line: Line) -> None:
    """Same UIDs, same pixels, same headers: a repeat can replace, never double."""
    uid = line.receive(pet_series())
    line.now += 31
    line.matcher().tick()
    executor = Executor(line.config, line.ledger, line.spool, clock=line.clock)
    job = attempt(line, executor)
    assert job["state"] == "built", job["reason"]
    assert job["series_uid"] == uid and job["derived_instances"] == 16
    first = {path.name: path.read_bytes() for path in line.spool.absolute(job["derived_path"]).glob("*.dcm")}
    for path in line.spool.absolute(job["derived_path"]).iterdir():
        path.unlink()
    line.ledger.set_job(job["id"], "queued", now=line.now)
    line.now += 5000
    again = attempt(line, executor)
    assert again["derived_series_uid"] == job["derived_series_uid"]
    assert first == {path.name: path.read_bytes() for path in line.spool.absolute(again["derived_path"]).glob("*.dcm")}


def test_a_worker_killed_in_the_middle_of_a_job_delivers_exactly_one_series(tmp_path: Path) -> None:
    """kill -9 while the pipeline runs, then a new worker: one derived series arrives, every instance once."""
    with StoragePeer() as peer, Line(tmp_path, port=peer.port, route=ROUTE) as line:
        line.now = time.time() - 31
        uid = line.receive(pet_series())
        line.now += 31
        line.matcher().tick()
        (job,) = line.ledger.jobs_of_series(uid)
        first = worker(line)
        try:
            wait_until("the job to run", lambda: line.ledger.job(job["id"])["state"] == "running", timeout_s=60)
            time.sleep(0.5)  # the child is loading its libraries, which takes seconds
        finally:
            first.kill()
            first.wait()
        stop = threading.Event()
        second = threading.Thread(target=work, args=(line.config,), kwargs={"stop": stop, "ready": lambda: None})
        second.start()
        try:
            wait_until("delivery", lambda: line.ledger.job(job["id"])["state"] == "delivered", timeout_s=90)
        finally:
            stop.set()
            second.join()
        assert line.ledger.job(job["id"])["attempts"] == 1, "the lost attempt is not counted"
    assert len({ds.SeriesInstanceUID for ds in peer.datasets}) == 1
    uids = [ds.SOPInstanceUID for ds in peer.datasets]
    assert len(uids) == len(set(uids)) == 16


def worker(line: Line) -> subprocess.Popen:
    """A working process on the line's data directory."""
    program = ("import sys\nfrom dicomnode.config import Config\nfrom dicomnode.process import stop_on_signals\n"
               "from dicomnode.work import run\n"
               "run(Config.model_validate_json(sys.argv[1]), stop=stop_on_signals(), ready=lambda: None)")
    return subprocess.Popen([sys.executable, "-c", program, line.config.model_dump_json()], cwd=REPOSITORY,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
