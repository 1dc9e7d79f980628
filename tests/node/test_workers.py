"""Workers: one executor per device, each with a row that tells whether it lives; a thread that hangs is noticed."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dicomnode import views, work, workers
from dicomnode.ledger import NewJob
from dicomnode.process import Pulse
from dicomnode.runner import ChildRunner
from tests.factories import pet_series
from tests.node.line import PET_ROUTE, Line
from tests.peers import wait_until

TWO = '[work]\ndevices = ["cpu", "cuda:0"]\nheartbeat_s = 1\nlease_s = 5\n'
WAITS = """
import json, pathlib, sys, time, os
order = json.loads(pathlib.Path(sys.argv[1]).read_text())
print(json.dumps({"kind": "progress", "stage": order["device"] + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "all")
                  + " " + str(order["threads"]), "step": 1, "steps": 2, "loss": None}), flush=True)
time.sleep(60)
"""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Line(tmp_path, toml=TWO, route=PET_ROUTE + 'guide = "never"\n') as line:
        yield line


def queue(line: Line, count: int) -> list[int]:
    uid = line.receive(pet_series())
    row = line.ledger.series(uid)
    line.ledger.set_series(uid, "complete", now=line.now)
    return [line.ledger.add_job(NewJob(f"id-{number}", uid, row["study_uid"], None, "all-pet", "nearest", "default", {},
                                       ("PACS",), ()), now=line.now) for number in range(count)]


@contextmanager
def running(line: Line, monkeypatch: pytest.MonkeyPatch, program: str, **options: Any) -> Iterator[threading.Thread]:
    """A worker process's inside, in a thread, whose children are `program`."""
    monkeypatch.setattr("dicomnode.matcher.Matcher.prepare", lambda _: None)  # loads the libraries of a method
    monkeypatch.setattr(work, "ChildRunner", lambda device, threads: ChildRunner(
        device, threads, command=(sys.executable, "-I", "-c", program)))
    stop, ready = threading.Event(), threading.Event()
    thread = threading.Thread(target=work.run, args=(line.config,),
                              kwargs={"stop": stop, "ready": ready.set, **options})
    thread.start()
    try:
        assert ready.wait(20)
        yield thread
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()


def test_two_devices_run_two_jobs_at_once_and_each_child_sees_its_own(line: Line, monkeypatch: pytest.MonkeyPatch):
    """One job at a time on each; the GPU's child sees that GPU alone; threads are shared; the job says where it ran."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    first, second, third = queue(line, 3)

    def stages() -> list[str] | None:
        found = [line.ledger.job(job)["progress"] for job in (first, second)]
        return [one["stage"] for one in found] if all(found) else None

    with running(line, monkeypatch, WAITS):
        seen = wait_until("both jobs to run", stages, timeout_s=20)
        jobs = [line.ledger.job(job) for job in (first, second, third)]
    assert sorted(seen) == ["cpu all 4", "cuda:0 0 4"]
    assert {job["device"] for job in jobs[:2]} == {"cpu", "cuda:0"} and jobs[2]["state"] == "queued"
    assert {line.ledger.job(job)["state"] for job in (first, second)} == {"queued"}, "put back by the stop"


def test_a_worker_has_a_row_while_it_lives_and_none_after_an_orderly_end(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """host:pid:device, its job, a heartbeat that moves on."""
    (job,) = queue(line, 1)
    with running(line, monkeypatch, WAITS):
        begun = {row["name"]: row["heartbeat_at"] for row in workers.listing(line.ledger)}
        before = f"{os.uname().nodename}:{os.getpid()}"
        assert set(begun) == {f"{before}:cpu", f"{before}:cuda:0"}
        rows = wait_until("a heartbeat with the job", lambda: [
            row for row in workers.listing(line.ledger) if row["job_id"] == job], timeout_s=10)
        assert rows[0]["heartbeat_at"] > begun[rows[0]["name"]]
        assert workers.stale(line.ledger, time.time()) == []
    assert workers.listing(line.ledger) == []
    assert [event["code"] for event in line.ledger.events() if event["code"].startswith("worker-")] == [
        "worker-started", "worker-started", "worker-ended", "worker-ended"]


def test_a_worker_without_a_heartbeat_is_stale_and_cleared_by_the_next_one(line: Line) -> None:
    """Killed: its row stays and grows old; the next start of the worker removes it and says so."""
    workers.enter(line.ledger, "host:7:cpu", device="cpu", now=1000.0)
    workers.beat(line.ledger, [workers.Beat("host:7:cpu", 1100.0, 12)])
    assert workers.stale(line.ledger, 1100.0 + workers.STALE_S) == []
    seen = [views.status(line.ledger, free_bytes=1, now=now + workers.STALE_S)["workers"][0] for now in (1100, 1101)]
    assert [one["stale"] for one in seen] == [False, True] and seen[0]["device"] == "cpu" and seen[0]["job"] == 12
    (found,) = workers.stale(line.ledger, 1101.0 + workers.STALE_S)
    assert (found["name"], found["job_id"], found["silent_s"]) == ("host:7:cpu", 12, workers.STALE_S + 1)
    assert workers.clear(line.ledger, now=1300.0) == ["host:7:cpu"]
    assert workers.listing(line.ledger) == []
    assert line.ledger.events()[-1]["code"] == "worker-gone"


def test_an_executor_that_hangs_stops_beating_although_its_process_lives(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row ages, and the process no longer says that all is well; the other executor's row stays fresh."""
    hang = threading.Event()
    real = line.ledger.claim

    def claim(owner: str, **options: Any) -> Any:
        if owner.endswith(":cpu"):
            hang.wait(20)
        return real(owner, **options)

    monkeypatch.setattr(work, "HANG_S", 1.0)
    monkeypatch.setattr("dicomnode.ledger.Ledger.claim", lambda _, owner, **options: claim(owner, **options))
    pulse = Pulse()
    with running(line, monkeypatch, WAITS, pulse=pulse):
        wait_until("the pulse to miss it", lambda: [name for name in pulse.late() if name.endswith(":cpu")])
        time.sleep(1.5)
        ages = {row["device"]: row["heartbeat_at"] for row in workers.listing(line.ledger)}
        late = pulse.late()
        hang.set()
    assert ages["cuda:0"] - ages["cpu"] > 1.0
    assert [name for name in late if name.endswith(("cpu", "cuda:0"))] == [f"{os.uname().nodename}:{os.getpid()}:cpu"]


def test_devices_that_are_named_twice_are_two_workers() -> None:
    """Two jobs at a time on one device."""
    first, second = workers.worker_names(["cpu", "cpu"])
    assert first.endswith(":cpu") and second.endswith(":cpu#2")


def test_a_thread_is_late_only_after_its_own_limit() -> None:
    """One that is not expected is never late; one that beats in time neither."""
    now = [0.0]
    pulse = Pulse(lambda: now[0])
    pulse.beat("nobody")
    pulse.expect("slow", 100.0)
    pulse.expect("quick", 10.0)
    now[0] = 10.0
    assert pulse.late() == {}
    now[0] = 11.0
    assert pulse.late() == {"quick": 11.0} and pulse.silent_s("slow") == 11.0
    pulse.beat("quick")
    assert pulse.late() == {}
    now[0] = 101.0
    pulse.forget("quick")
    assert pulse.late() == {"slow": 101.0} and pulse.silent_s("quick") == 0.0


def test_a_child_sees_the_gpu_that_the_service_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA_VISIBLE_DEVICES=3,5 for the worker: its cuda:1 is GPU 5."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    child = ChildRunner("cuda:1", command=(sys.executable, "-I", "-c", WAITS)).start({"id": 1}, {}, tmp_path)
    messages: list[dict[str, Any]] = []
    while not messages:
        messages = child.read(5.0)
    child.finish(grace_s=0.0)
    assert messages[0]["stage"] == "cuda:0 5 0"
    assert json.loads((tmp_path / "order.json").read_text())["device"] == "cuda:0"
