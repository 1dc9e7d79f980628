"""The ledger: durable, whole or not at all, shared by processes, true about what came and what was done."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dicomnode import receive
from dicomnode.errors import LedgerCorrupt, NodeError, NotFound, TransitionRefused
from dicomnode.ledger import SCHEMA_VERSION, InstanceRow, Ledger, NewJob
from dicomnode.schedule import mend_times
from tests.node.test_states import digest, instance

JOB = NewJob(identity="i", series_uid="1.2.1", study_uid="1", guide_series_uid="1.2.2", route="r", method="tv",
             preset="default", settings={"psf_fwhm_mm": 6.0}, send_to=("PACS", "ARCHIVE"), inputs=("1.2.1.1",))


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite3") as opened:
        yield opened


def received(ledger: Ledger, *, series: str = "1.2.1", number: int = 1, version: str = "a", now: float = 100.0) -> str:
    return ledger.add_instances([instance(series, f"{series}.{number}", version, now=now)])[0]


def running_job(ledger: Ledger, new: NewJob = JOB) -> int:
    received(ledger)
    ledger.set_series("1.2.1", "complete", now=101)
    job_id = ledger.add_job(new, now=102)
    claimed = ledger.claim("worker", now=103, lease_s=60)
    assert claimed is not None and claimed["id"] == job_id
    return job_id


def build(ledger: Ledger, job_id: int) -> None:
    assert ledger.built(job_id, "worker", now=104, derived_series_uid="2.25.1", derived_path="derived/1",
                        derived_instances=2, report={"checks": []})


# --- durability


def test_commit_is_on_disk_before_it_returns(ledger: Ledger):
    """Write-ahead log with synchronous=FULL."""
    with ledger.transaction() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_a_commit_that_fails_leaves_no_transaction_open(ledger: Ledger):
    """Else later rows would join it, be reported as entered, and be gone with the process."""
    def commit_fails() -> None:
        with ledger.transaction() as db:
            db.execute("PRAGMA defer_foreign_keys=ON")  # checked at COMMIT, which sqlite then leaves undone
            db.execute("INSERT INTO delivery (job_id, peer, state, next_at, created_at) VALUES (9, 'P', 'dead', 0, 0)")

    with pytest.raises(sqlite3.IntegrityError):
        commit_fails()
    assert received(ledger) == "new"
    with Ledger(ledger.path) as other:
        assert other.known("1.2.1.1") is not None


def test_rows_of_a_killed_process_are_there(tmp_path: Path):
    """What add_instances returned for survives kill -9 right after."""
    code = ("import os, sys; from pathlib import Path; from dicomnode.ledger import Ledger; "
            "from tests.node.test_states import instance; ledger = Ledger(Path(sys.argv[1])); "
            "ledger.add_instances([instance('1.2.1', '1.2.1.1', 'a', now=1.0)]); os.kill(os.getpid(), 9)")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "ledger.sqlite3")], cwd=root)
    assert done.returncode == -9
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        assert ledger.known("1.2.1.1") is not None


def test_transaction_is_whole_or_not_at_all(ledger: Ledger):
    """An exception leaves nothing behind, nested blocks included."""
    def half() -> None:
        with ledger.transaction():
            received(ledger)
            with ledger.transaction():
                ledger.event("reception", now=1)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        half()
    assert ledger.known("1.2.1.1") is None
    assert ledger.events() == []


def test_two_ledgers_on_one_file_see_each_other(tmp_path: Path):
    """Receiver and worker are two processes."""
    with Ledger(tmp_path / "l") as one, Ledger(tmp_path / "l") as two:
        received(one)
        assert two.known("1.2.1.1") is not None
        received(two, number=2)
        assert len(one.instances("1.2.1")) == 2


def test_threads_share_a_ledger(ledger: Ledger):
    """Four threads enter 25 instances each; none is lost, none fails."""
    threads = [threading.Thread(target=lambda n=n: [received(ledger, number=100 * n + i) for i in range(25)])
               for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.series("1.2.1")["instances"] == 100


@pytest.mark.parametrize("start", [0, 4096])
def test_damaged_file_is_reported_with_a_remedy(tmp_path: Path, start: int):
    """At opening where the header is gone, by check() where a page is."""
    path = tmp_path / "l"
    with Ledger(path) as ledger:
        for number in range(300):
            received(ledger, number=number + 1)
    data = bytearray(path.read_bytes())
    data[start:] = random.Random(1).randbytes(len(data) - start)
    path.write_bytes(data)
    with pytest.raises(LedgerCorrupt, match=r"Remedy: .*backup"):
        Ledger(path).check()


@pytest.mark.parametrize("size", [2**30, 0])
def test_damage_is_told_at_once_and_of_a_large_ledger_while_the_node_receives(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int):
    """A ledger of years takes minutes to read: nobody waits for it, and the damage ends the receiver all the same."""
    monkeypatch.setattr(receive, "CHECKED_FIRST", size)
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path) as ledger:
        ledger.add_instances([instance("1.2", f"1.2.{number}", "a", now=1.0) for number in range(200)])
        root = ledger.query("SELECT rootpage FROM sqlite_master WHERE name = 'instance'")[0]["rootpage"]
    data = bytearray(path.read_bytes())
    data[(root - 1) * 4096 + 12:root * 4096] = b"\xff" * (4096 - 12)
    path.write_bytes(data)
    with Ledger(path) as ledger, pytest.raises(LedgerCorrupt, match="Remedy"):  # noqa: PT012 - found in either line
        damage = receive._Damage(ledger)
        until = time.monotonic() + 10
        while time.monotonic() < until:
            damage.tell()
            time.sleep(0.01)


def test_ledger_that_is_locked_or_out_of_reach_is_not_called_damaged(tmp_path: Path):
    """Nobody is sent to repair a sound file."""
    with pytest.raises(NodeError, match="needs no repair") as caught:
        Ledger(tmp_path / "nowhere" / "ledger.sqlite3")
    assert not isinstance(caught.value, LedgerCorrupt)
    path = tmp_path / "ledger.sqlite3"
    with Ledger(path), sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version=2")  # as before an upgrade
        other.commit()
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(NodeError, match=r"locked.*needs no repair"):
            Ledger(path, timeout_s=0.01)


def test_ledger_of_a_newer_version_is_refused(tmp_path: Path):
    """Never written to by software that does not know it."""
    Ledger(tmp_path / "l").close()
    with sqlite3.connect(tmp_path / "l") as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(LedgerCorrupt, match=f"schema version {SCHEMA_VERSION + 1}"):
        Ledger(tmp_path / "l")


def test_sound_ledger_passes_its_check(ledger: Ledger):
    """check() finds nothing."""
    received(ledger)
    ledger.check()


# --- reception


def test_new_repeat_and_conflict_in_one_batch(ledger: Ledger):
    """Each is judged after those before it; the first bytes stay in use."""
    rows = [instance("1.2.1", "1.2.1.1", version, now=now) for now, version in enumerate("aaba")]
    assert ledger.add_instances(rows) == ["new", "repeat", "conflict", "repeat"]
    assert ledger.known("1.2.1.1")["sha256"] == digest("a")
    assert [row["sha256"] for row in ledger.conflicts("1.2.1")] == [digest("b")]
    assert ledger.series("1.2.1")["instances"] == 1


def test_instance_comes_back_as_it_was_entered(ledger: Ledger):
    """Position and orientation as tuples; None stays None."""
    row = instance("1.2.1", "1.2.1.1", "a", now=5.0)
    bare = replace(row, sop_instance_uid="1.2.1.2", position=None, orientation=None, received_at=6.0)
    ledger.add_instances([row, bare])
    first, second = ledger.instances("1.2.1")
    assert {key: first[key] for key in first} == {key: getattr(row, key) for key in first}
    assert (second["position"], second["orientation"]) == (None, None)


def test_conflict_counts_for_the_series_in_use(ledger: Ledger):
    """Whatever series the other bytes claim to be of."""
    received(ledger)
    ledger.add_instances([replace(instance("1.2.9", "1.2.1.1", "b", now=2), study_uid="9")])
    assert len(ledger.conflicts("1.2.1")) == 1
    assert ledger.conflicts("1.2.9") == []
    with pytest.raises(NotFound):
        ledger.series("1.2.9")


@pytest.mark.parametrize(("path", "after"), [
    (["waiting"], "receiving"), (["complete", "matched"], "receiving"), (["held"], "receiving"),
    (["ignored"], "ignored")])
def test_late_instance_reopens_the_series(ledger: Ledger, path: list[str], after: str):
    """Waiting, matched and held series are looked at again; what a rule ignores stays ignored."""
    received(ledger)
    for state in path:
        ledger.set_series("1.2.1", state, now=101, until=999.0)
    assert received(ledger, number=2, now=102) == "new"
    assert ledger.series("1.2.1")["state"] == after
    assert ledger.series("1.2.1")["last_at"] == 102


def test_series_held_by_a_person_stays_held(ledger: Ledger):
    """Code `operator` outlasts late instances."""
    received(ledger)
    ledger.set_series("1.2.1", "held", now=101, code="operator")
    received(ledger, number=2)
    assert ledger.series("1.2.1")["state"] == "held"


def test_due_series_are_quiet_or_their_time_has_come(ledger: Ledger):
    """Receiving: quiet long enough. Waiting: until."""
    received(ledger, series="1.2.1", now=100)
    received(ledger, series="1.2.2", now=100)
    ledger.set_series("1.2.2", "waiting", now=100, until=150)
    due = lambda now: [row["series_uid"] for row in ledger.due_series(now=now, quiet_s=30)]  # noqa: E731
    assert (due(129), due(130), due(150)) == ([], ["1.2.1"], ["1.2.1", "1.2.2"])


def test_times_that_a_wrong_clock_stamped_are_not_waited_for(ledger: Ledger):
    """The clock stood years ahead and was set back: what it stamped is due soon; what is rightly waited for is kept."""
    ahead = 3e8
    received(ledger, series="1.2.1", now=ahead)
    received(ledger, series="1.2.2", now=ahead)
    ledger.set_series("1.2.2", "waiting", now=ahead, until=ahead + 86400)
    received(ledger, series="1.2.3", now=90)
    ledger.set_series("1.2.3", "waiting", now=90, until=5000)
    received(ledger, series="1.2.4", now=ahead)
    ledger.set_series("1.2.4", "complete", now=ahead)
    ledger.add_job(replace(JOB, identity="future", series_uid="1.2.4"), now=ahead)
    assert ledger.due_series(now=200, quiet_s=30) == [] and ledger.claim("w", now=200, lease_s=60) is None
    assert mend_times(ledger, now=100, longest_wait_s=86400) == 2 + 2 + 1 + 1  # instances, arrivals, until, job
    assert [row["series_uid"] for row in ledger.due_series(now=130, quiet_s=30)] == ["1.2.1", "1.2.2"]
    assert [row["received_at"] for row in ledger.instances("1.2.1")] == [100]
    assert ledger.series("1.2.3")["until"] == 5000
    assert ledger.claim("w", now=130, lease_s=60) is not None
    assert mend_times(ledger, now=101, longest_wait_s=86400) == 0


# --- jobs


def test_same_identity_is_the_same_job(ledger: Ledger):
    """Matching twice, or after a crash, never makes a second job."""
    received(ledger)
    ledger.set_series("1.2.1", "complete", now=101)
    assert ledger.add_job(JOB, now=102) == ledger.add_job(JOB, now=103)
    assert len(ledger.jobs_of_series("1.2.1")) == 1
    assert ledger.series("1.2.1")["state"] == "matched"


def test_job_of_a_series_that_may_not_be_matched_is_not_made(ledger: Ledger):
    """The refused transition takes the job row with it."""
    received(ledger)
    ledger.set_series("1.2.1", "ignored", now=101)
    with pytest.raises(TransitionRefused):
        ledger.add_job(JOB, now=102)
    assert ledger.jobs_of_series("1.2.1") == []


def test_one_job_goes_to_one_worker(tmp_path: Path):
    """Eight workers on ledgers of their own claim at once: five jobs, five claims, no job twice."""
    with Ledger(tmp_path / "l") as ledger:
        received(ledger)
        ledger.set_series("1.2.1", "complete", now=101)
        for number in range(5):
            ledger.add_job(replace(JOB, identity=str(number)), now=102)
    claimed: list[int] = []

    def work(number: int) -> None:
        with Ledger(tmp_path / "l") as mine:
            while (job := mine.claim(f"worker {number}", now=103, lease_s=60)) is not None:
                claimed.append(job["id"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == [1, 2, 3, 4, 5]


def test_priority_then_age_decides_who_is_next(ledger: Ledger):
    """And run_after keeps a failed job back."""
    received(ledger)
    ledger.set_series("1.2.1", "complete", now=101)
    for number, priority in enumerate((0, 5, 0)):
        ledger.add_job(replace(JOB, identity=str(number), priority=priority), now=102)
    assert [ledger.claim("w", now=103, lease_s=600)["id"] for _ in range(3)] == [2, 1, 3]
    ledger.set_job(1, "failed", now=104, run_after=200)
    assert ledger.claim("w", now=150, lease_s=60) is None
    assert ledger.claim("w", now=200, lease_s=60)["id"] == 1


def test_job_waits_until_its_route_may_start(ledger: Ledger):
    """Queued or failed; another route's jobs do not wait for it, and an urgent job does not wait at all."""
    received(ledger)
    ledger.set_series("1.2.1", "complete", now=101)
    night = ledger.add_job(replace(JOB, route="night", priority=9), now=102)
    day = ledger.add_job(replace(JOB, identity="j", route="day"), now=102)
    closed = lambda route: route != "night"  # noqa: E731
    first = ledger.claim("w", now=103, lease_s=60, may_start=closed)
    assert first is not None and first["id"] == day
    assert ledger.claim("w", now=103, lease_s=60, may_start=closed) is None
    assert ledger.job(night)["state"] == "queued"
    with ledger.transaction() as db:
        db.execute("UPDATE job SET urgent = 1 WHERE id = ?", (night,))
    urgent = ledger.claim("w", now=104, lease_s=60, may_start=closed)
    assert urgent is not None and urgent["id"] == night


def test_urgent_goes_before_priority(ledger: Ledger):
    """However high the priority of the others."""
    received(ledger)
    ledger.set_series("1.2.1", "complete", now=101)
    ledger.add_job(replace(JOB, priority=100), now=102)
    urgent = ledger.add_job(replace(JOB, identity="j", urgent=True), now=102)
    job = ledger.claim("w", now=103, lease_s=60)
    assert job is not None and job["id"] == urgent


def test_lease_that_runs_out_while_the_window_is_closed_waits_for_the_next(ledger: Ledger):
    """The job is taken from the process that died, counted as an attempt, and goes on when its window opens."""
    job_id = running_job(ledger)
    assert ledger.claim("other", now=200, lease_s=60, may_start=lambda route: False) is None
    lost = ledger.job(job_id)
    assert (lost["state"], lost["code"], lost["attempts"]) == ("failed", "lease", 1)
    job = ledger.claim("other", now=300, lease_s=60, may_start=lambda route: True)
    assert job is not None and (job["id"], job["attempts"]) == (job_id, 2)


def test_lease_that_ran_out_gives_the_job_to_another(ledger: Ledger):
    """The first worker learns it from its heartbeat and cannot build any more."""
    job_id = running_job(ledger)
    assert ledger.renew(job_id, "worker", now=150, lease_s=60, progress={"step": 3})
    assert ledger.claim("other", now=209, lease_s=60) is None
    taken = ledger.claim("other", now=211, lease_s=60)
    assert taken is not None and (taken["id"], taken["attempts"], taken["progress"]) == (job_id, 2, None)
    assert not ledger.renew(job_id, "worker", now=212, lease_s=60)
    assert not ledger.built(job_id, "worker", now=213, derived_series_uid="2.25.1", derived_path="derived/1",
                            derived_instances=2, report={})
    assert ledger.deliveries(job_id) == []


def test_derived_series_is_known_as_ours(ledger: Ledger):
    """By its UID, once built."""
    job_id = running_job(ledger)
    assert ledger.job_of_derived("2.25.1") is None
    build(ledger, job_id)
    found = ledger.job_of_derived("2.25.1")
    assert found is not None and (found["id"], found["report"]) == (job_id, {"checks": []})


# --- deliveries


def test_job_is_delivered_when_the_last_peer_has_all(ledger: Ledger):
    """Not before; statuses of single instances are kept."""
    job_id = running_job(ledger)
    build(ledger, job_id)
    first, second = ledger.due_deliveries(now=104)
    ledger.set_job(job_id, "sending", now=105)
    ledger.put_statuses(first["id"], [("2.25.7", 0xB000, "coerced"), ("2.25.8", 0x0000, "")], now=105)
    ledger.set_delivery(first["id"], "delivered", now=106)
    assert ledger.job(job_id)["state"] == "sending"
    assert ledger.statuses(first["id"]) == {"2.25.7": 0xB000, "2.25.8": 0x0000}
    ledger.set_delivery(second["id"], "delivered", now=107)
    assert (ledger.job(job_id)["state"], ledger.job(job_id)["finished_at"]) == ("delivered", 107)


def test_dead_delivery_holds_the_job_with_peer_and_reason(ledger: Ledger):
    """After the others had their chance."""
    job_id = running_job(ledger)
    build(ledger, job_id)
    first, second = ledger.due_deliveries(now=104)
    ledger.set_job(job_id, "sending", now=105)
    ledger.set_delivery(first["id"], "dead", now=106, reason="gave up after 72 h")
    assert ledger.job(job_id)["state"] == "sending"
    ledger.set_delivery(second["id"], "delivered", now=107)
    held = ledger.job(job_id)
    assert (held["state"], held["code"]) == ("held", "delivery")


def test_waiting_delivery_is_due_at_its_time(ledger: Ledger):
    """And not while its job is held."""
    job_id = running_job(ledger)
    build(ledger, job_id)
    for delivery in ledger.due_deliveries(now=104):
        ledger.set_delivery(delivery["id"], "waiting", now=105, next_at=300, attempts=1, reason="refused")
    assert ledger.due_deliveries(now=299) == []
    assert len(ledger.due_deliveries(now=300)) == 2
    ledger.set_job(job_id, "held", now=301)
    assert ledger.due_deliveries(now=302) == []


# --- looking


def test_overview_has_a_row_for_each_series_and_filters(ledger: Ledger):
    """By study, series, derived series and accession number."""
    row = replace(instance("1.2.1", "1.2.1.1", "a", now=100), accession_number="ACC")
    ledger.add_instances([row])
    received(ledger, series="1.2.2", now=50)
    ledger.set_series("1.2.1", "complete", now=101)
    job_id = ledger.add_job(JOB, now=102)
    ledger.claim("worker", now=103, lease_s=60)
    build(ledger, job_id)
    assert [r["series_uid"] for r in ledger.overview()] == ["1.2.1", "1.2.2"]
    for text in ("1.2.1", "ACC", "2.25.1"):
        assert [(r["series_uid"], r["job_state"]) for r in ledger.overview(text)] == [("1.2.1", "built")]
    assert ledger.overview("1.9") == []


def test_looking_reads_no_table_of_years_from_end_to_end(ledger: Ledger):
    """One study, what waits for a person, the counts, a worker's claims: by an index, also among millions of rows."""
    said: list[str] = []
    ledger._db.set_trace_callback(said.append)
    ledger.overview("1.2.3")
    ledger.overview(active=True)
    ledger.overview(limit=5)
    ledger.events(study_uid="1.2.3")
    ledger.count_events(7, code="worker-lost")
    ledger.due_series(now=1.0, quiet_s=30.0)
    ledger.due_deliveries(now=1.0)
    ledger.claim("w", now=1.0, lease_s=60, may_start=lambda route: True)
    ledger.counts()
    ledger._db.set_trace_callback(None)
    scans = [row["detail"] for sql in said for row in ledger.query(f"EXPLAIN QUERY PLAN {sql}")
             if row["detail"].startswith("SCAN") and "INDEX" not in row["detail"]]
    assert len(said) > 9 and set(scans) <= {"SCAN series", "SCAN (subquery-1)"}


def test_unknown_names_are_not_found(ledger: Ledger):
    """Series, job and delivery."""
    with pytest.raises(NotFound, match=r"no series 1\.2\.9"):
        ledger.series("1.2.9")
    with pytest.raises(NotFound, match="no job 9"):
        ledger.job(9)
    with pytest.raises(NotFound, match="no delivery 9"):
        ledger.set_delivery(9, "dead", now=1)


def test_instance_row_cannot_be_changed():
    """What was received is a fact."""
    with pytest.raises(AttributeError):
        instance("1", "1", "a", now=1).path = "elsewhere"  # type: ignore[misc]
    assert InstanceRow.__dataclass_params__.frozen  # type: ignore[attr-defined]
