"""What may go, goes: never before its results are confirmed, never twice, never half, whatever happens meanwhile."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom import dcmwrite
from pydicom.dataset import Dataset
from structlog.testing import capture_logs

from dicomnode import operate, retention
from dicomnode.errors import RefusedInput
from dicomnode.groupcommit import GroupCommitter
from dicomnode.ledger import NewJob
from dicomnode.retention import Purger
from dicomnode.states import JOB_STATES
from tests.factories import ct_series, pet_series
from tests.node.line import PET_ROUTE, Line
from tests.node.test_states import instance

DAY = 86400.0
DAYS = '[retention]\ninputs_days = 10\nderived_days = 20\nignored_days = 5\n'
ROUTE = PET_ROUTE + 'guide = "never"\n'


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """A node that keeps inputs 10 days, derived series 20, ignored objects 5."""
    with Line(tmp_path, toml=DAYS, route=ROUTE) as line:
        yield line


def purge(line: Line, *, after_days: float = 0.0, **options: Any) -> int:
    """A fresh purger, as after a restart, one tick, on a node that has run all the time."""
    line.now += after_days * DAY
    with line.ledger.transaction() as db:
        db.execute("DELETE FROM memo WHERE key = ?", (retention.CLOCK,))
    return Purger(line.config, line.ledger, line.spool, clock=line.clock, **options).tick()


def judge(line: Line) -> None:
    line.now += 31
    line.matcher().tick()


def build(line: Line, *, confirm: str = "store") -> int:
    """The newest job is built, its derived series on disk; its id."""
    job = line.ledger.claim("w", now=line.now, lease_s=60)
    assert job is not None
    folder = line.spool.data_dir / "derived" / str(job["id"])
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"x" * 1000)
    assert line.ledger.built(job["id"], "w", now=line.now, derived_series_uid=f"2.25.{job['id']}",
                             derived_path=line.spool.relative(folder), derived_instances=1, report={})
    with line.ledger.transaction() as db:
        db.execute("UPDATE delivery SET confirm = ? WHERE job_id = ?", (confirm, job["id"]))
    return int(job["id"])


def deliver(line: Line, job: int) -> None:
    line.ledger.set_job(job, "sending", now=line.now)
    for row in line.ledger.deliveries(job):
        line.ledger.put_statuses(row["id"], [("2.25.1", 0, "")], now=line.now)
        line.ledger.set_delivery(row["id"], "delivered", now=line.now)


def delivered(line: Line, datasets: Sequence[Dataset], **options: Any) -> tuple[str, int]:
    """The series received, judged, built and delivered: its UID, the job."""
    uid = line.receive(datasets)
    judge(line)
    job = build(line, **options)
    deliver(line, job)
    return uid, job


def files(line: Line, folder: str = "objects") -> int:
    return sum(path.is_file() for path in (line.spool.data_dir / folder).rglob("*"))


def resend(line: Line, datasets: Sequence[Dataset]) -> list[str]:
    """As the receiver keeps what comes: what each was."""
    committer = GroupCommitter(line.spool, line.ledger)
    kept = []
    try:
        for dataset in datasets:
            written = io.BytesIO()
            dcmwrite(written, dataset, enforce_file_format=True)
            handle, path = line.spool.create_incoming()
            with open(handle, "wb") as file:
                file.write(written.getvalue())
            kept.append(committer.keep(path, line._kept(dataset, "SCANNER")))
            path.unlink(missing_ok=True)
    finally:
        committer.close()
    return kept


def codes(line: Line, uid: str) -> list[str]:
    return [event["code"] for event in line.ledger.events() if event["series_uid"] == uid
            and event["kind"] == "series" and event["code"] in ("purged", "restored")]


# --- what goes, and when


def test_inputs_go_when_their_time_is_over_and_their_rows_stay(line: Line) -> None:
    """Files and folders are gone; what came is still known, and the history says when it went."""
    uid, job = delivered(line, pet_series())
    assert purge(line, after_days=9.9) == 0 and files(line) == 8
    assert purge(line, after_days=0.2) == 1 and files(line) == 0
    assert list((line.spool.data_dir / "objects").iterdir()) == []
    assert len(line.ledger.instances(uid)) == 8 and line.ledger.series(uid)["purged_at"] == line.now
    assert codes(line, uid) == ["purged"] and line.ledger.job(job)["derived_path"] is not None
    assert purge(line, after_days=1) == 0, "nothing goes twice"


def test_derived_series_has_a_time_of_its_own(line: Line) -> None:
    """Its folder goes, its row says so."""
    _, job = delivered(line, pet_series())
    purge(line, after_days=19.9)
    assert files(line, "derived") == 1
    purge(line, after_days=0.2)
    assert files(line, "derived") == 0
    row = line.ledger.job(job)
    assert (row["state"], row["derived_path"], row["purged_at"]) == ("delivered", None, line.now)


def test_nothing_goes_that_a_peer_has_still_to_commit_to(line: Line) -> None:
    """Delivered is not enough where commitment is asked for; committed is."""
    _, job = delivered(line, pet_series(), confirm="commitment")
    assert purge(line, after_days=100) == 0 and files(line) == 8
    for row in line.ledger.deliveries(job):
        line.ledger.set_delivery(row["id"], "committed", now=line.now)
    assert line.ledger.job(job)["state"] == "committed"
    purge(line, after_days=100)
    assert files(line) == files(line, "derived") == 0


@pytest.mark.parametrize("state", ["queued", "running", "failed", "held", "built", "sending"])
def test_nothing_goes_of_a_job_that_is_not_done(line: Line, state: str) -> None:
    """However old it is, and however full the disk."""
    uid = line.receive(pet_series())
    judge(line)
    if state in ("built", "sending"):
        job = build(line)
    else:
        job = line.ledger.jobs_of_series(uid)[0]["id"]
        if state in ("running", "failed"):
            line.ledger.set_job(job, "running", now=line.now, lease_until=line.now + 10**9)
    if line.ledger.job(job)["state"] != state:
        line.ledger.set_job(job, state, now=line.now, run_after=10.0**12)
    assert purge(line, after_days=1000, free_bytes=lambda: 0) == 0 and files(line) == 8


def test_held_or_arriving_series_stay(line: Line) -> None:
    """Also where an earlier job of the series was delivered."""
    held, _ = delivered(line, pet_series())
    line.ledger.set_series(held, "held", now=line.now, code="late-input", reason="input changed")
    line.receive(pet_series(seed=5))
    assert purge(line, after_days=1000) == 0 and files(line) == 16


def test_ignored_objects_go_after_ignored_days(line: Line) -> None:
    """So do those of a job that a person cancelled."""
    ct = line.receive(ct_series(seed=3))
    pet = line.receive(pet_series())
    judge(line)
    operate.cancel(line.ledger, pet, now=line.now, actor="mia")
    assert purge(line, after_days=4.9) == 0
    assert purge(line, after_days=0.2) == 2
    assert codes(line, ct) == codes(line, pet) == ["purged"] and files(line) == 0


def test_guide_goes_with_its_pet_never_before(line: Line) -> None:
    """The CT of a study whose PET is still there is no ignored object."""
    ct = line.receive(ct_series())
    pet, _ = delivered(line, pet_series())
    purge(line, after_days=9)
    assert codes(line, ct) == []
    purge(line, after_days=2)
    purge(line)
    assert codes(line, pet) == ["purged"] and codes(line, ct) == ["purged"] and files(line) == 0


def test_zero_keeps_for_ever(tmp_path: Path) -> None:
    """Also when the disk is full; then the log says that nothing may go, once an hour, with a remedy."""
    with Line(tmp_path, toml="[retention]\nfree_mb = 100\n", route=ROUTE) as line:
        delivered(line, pet_series())
        purger = Purger(line.config, line.ledger, line.spool, clock=line.clock, free_bytes=lambda: 50 * 2**20)
        with capture_logs() as logs:
            for _ in range(3):
                line.now += 60
                assert purger.tick() == 0
        said = [entry["event"] for entry in logs if entry["log_level"] == "error"]
        assert len(said) == 1 and "50 MiB free" in said[0] and "Remedy" in said[0] and "inputs_days" in said[0]
        assert files(line) == 8


def test_conflicting_objects_stay_and_keep_their_series(line: Line) -> None:
    """A person must be able to compare; once accepted, the series may go, the other bytes never."""
    uid, _ = delivered(line, pet_series())
    other = pet_series()[0]
    other.PatientComments = "other bytes"
    assert resend(line, [other]) == ["conflict"]
    assert purge(line, after_days=11) == 0
    with line.ledger.transaction() as db:
        db.execute("UPDATE conflict SET accepted = 1")
    assert purge(line) == 1 and codes(line, uid) == ["purged"]
    assert files(line) == 0 and files(line, "conflicts") == 1


# --- derived series that nobody got


def test_derived_series_of_a_cancelled_job_goes_if_nothing_was_sent(line: Line) -> None:
    """After an hour for second thoughts; a retry computes it again."""
    uid = line.receive(pet_series())
    judge(line)
    job = build(line)
    operate.cancel(line.ledger, uid, now=line.now, actor="mia")
    purge(line)
    assert files(line, "derived") == 1
    purge(line, after_days=0.1)
    assert files(line, "derived") == 0 and files(line) == 8
    assert operate.retry(line.ledger, uid, now=line.now, actor="mia").state == "queued"
    assert build(line) == job and line.ledger.job(job)["purged_at"] is None


def test_derived_series_of_a_superseded_job_goes_if_nothing_was_sent(line: Line) -> None:
    """What was sent is kept for derived_days: somebody may ask what went out."""
    for number, sent in enumerate((False, True)):
        uid = line.receive(pet_series(seed=number))
        judge(line)
        job = build(line)
        if sent:
            line.ledger.put_statuses(line.ledger.deliveries(job)[0]["id"], [("2.25.1", 0, "")], now=line.now)
        line.ledger.set_job(job, "superseded", now=line.now)
        assert line.state(uid)[0] == "matched"
    purge(line, after_days=1)
    assert [row["derived_path"] for row in line.ledger.query("SELECT derived_path FROM job ORDER BY id")] == [
        None, "derived/2"]
    assert files(line, "derived") == 1
    purge(line, after_days=20)
    assert files(line, "derived") == 0


def test_folder_that_a_stopped_job_left_goes(line: Line) -> None:
    """It was taken away just as it had built; one that a held job left stays, for its retry takes it over."""
    left = []
    for number, state in enumerate(("cancelled", "held")):
        uid = line.receive(pet_series(seed=number))
        judge(line)
        job = line.ledger.jobs_of_series(uid)[0]["id"]
        line.ledger.set_job(job, state, now=line.now)
        (line.spool.data_dir / "derived" / str(job)).mkdir()
        left.append(job)
    (line.spool.data_dir / "derived" / "not a job").mkdir()
    purge(line)
    assert {path.name for path in (line.spool.data_dir / "derived").iterdir()} == {str(left[1]), "not a job"}


# --- what comes again


def test_resend_of_what_was_removed_is_a_repeat_and_makes_no_job(line: Line) -> None:
    """Kept again, counted from now, removed again."""
    uid, job = delivered(line, pet_series())
    purge(line, after_days=11)
    assert resend(line, pet_series()) == ["repeat"] * 8
    judge(line)
    assert files(line) == 8 and line.state(uid)[0] == "matched"
    assert [row["id"] for row in line.ledger.jobs_of_series(uid)] == [job]
    assert line.ledger.series(uid)["purged_at"] is None and codes(line, uid) == ["purged", "restored"]
    purge(line, after_days=9)
    assert files(line) == 8
    purge(line, after_days=2)
    assert files(line) == 0


def test_resend_while_files_are_removed_stops_the_removal(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger says already that they are gone; the first object that comes again keeps all that are still there."""
    uid, _ = delivered(line, pet_series())
    remove = Purger._remove

    def one_batch_then_the_receiver(self: Purger, key: str) -> None:
        with line.ledger.transaction() as db:
            paths = json.loads(line.ledger.query("SELECT value FROM memo WHERE key = ?", (key,))[0]["value"])
            retention._unlink(line.spool, paths[:3])
            db.execute("UPDATE memo SET value = ? WHERE key = ?", (json.dumps(paths[3:]), key))
        assert resend(line, pet_series()) == ["repeat"] * 8
        remove(self, key)

    monkeypatch.setattr(Purger, "_remove", one_batch_then_the_receiver)
    assert purge(line, after_days=11) == 1
    assert files(line) == 8 and codes(line, uid) == ["purged", "restored"]


def test_retry_of_what_was_removed_says_what_to_do(tmp_path: Path) -> None:
    """Refused until every object came again; then it is done."""
    with Line(tmp_path, toml=DAYS, route=ROUTE.replace('"PT"', '"XX"')) as line:
        uid = line.receive(pet_series())
        judge(line)
        assert line.state(uid) == ("ignored", "no-route")
        purge(line, after_days=6)
        with pytest.raises(RefusedInput, match=r"8 of 8 objects .* are gone: they were removed on 1970.*sent again"):
            operate.retry(line.ledger, uid, now=line.now, actor="mia")
        resend(line, pet_series()[:5])
        with pytest.raises(RefusedInput, match="3 of 8 objects"):
            operate.retry(line.ledger, uid, now=line.now, actor="mia")
        resend(line, pet_series()[5:])
        assert operate.retry(line.ledger, uid, now=line.now, actor="mia").state == "receiving"


def test_late_instance_of_a_removed_series_is_kept_and_held(line: Line) -> None:
    """The others are gone: a person is asked. The whole series sent again and a retry lead on."""
    series = pet_series(slices=9, NumberOfSlices=None, SliceThickness="3.27")
    uid, _ = delivered(line, series[:8])
    purge(line, after_days=11)
    line.receive(series[8:])
    judge(line)
    assert line.state(uid) == ("held", "input-gone") and "Remedy" in line.ledger.series(uid)["reason"]
    with pytest.raises(RefusedInput, match="8 of 9 objects"):
        operate.release(line.ledger, uid, now=line.now, actor="mia")
    assert resend(line, series) == ["repeat"] * 9
    operate.release(line.ledger, uid, now=line.now, actor="mia")
    judge(line)
    assert [(row["state"], len(row["inputs"])) for row in line.ledger.jobs_of_series(uid)] == [
        ("superseded", 8), ("queued", 9)]


# --- crashes


def test_crash_after_the_ledger_and_before_the_files_is_finished_at_the_next_tick(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile the series counts as gone."""
    uid, _ = delivered(line, pet_series())
    with monkeypatch.context() as patch:
        patch.setattr(Purger, "_remove", lambda self, key: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            purge(line, after_days=11)
    assert files(line) == 8 and line.ledger.series(uid)["purged_at"] is not None
    purge(line)
    assert files(line) == 0 and codes(line, uid) == ["purged"]


def test_crash_between_two_files_is_finished_and_a_resend_meanwhile_is_kept(
        line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the files are gone; the series comes again before the next tick, which then takes nothing."""
    uid, _ = delivered(line, pet_series())
    unlink = Path.unlink
    gone = itertools.count()

    def dies(path: Path, missing_ok: bool = False) -> None:
        if next(gone) == 4:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            purge(line, after_days=11)
    assert files(line) == 4
    assert resend(line, pet_series()) == ["repeat"] * 8
    purge(line)
    assert files(line) == 8 and codes(line, uid) == ["purged", "restored"]


def test_crash_at_any_step_is_finished_by_the_next_tick(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each file removed, each folder made durable, each folder removed; the purge is one event all the same."""
    steps = [(Path, "unlink"), (retention, "fsync_dir"), (Path, "rmdir")]
    crashed = 0
    for last in range(9):
        uid, _ = delivered(line, pet_series(slices=4, seed=last))
        line.now += 11 * DAY
        left = itertools.count(last, -1)
        with monkeypatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, _dies(getattr(owner, name), left))
            try:
                purge(line)
            except KeyboardInterrupt:
                crashed += 1
        purge(line)
        assert files(line) == 0 and codes(line, uid) == ["purged"], last
        assert line.ledger.query("SELECT * FROM memo WHERE key LIKE 'purge:%'") == []
    assert crashed == 8, "each step was reached once, and the last round had none left"


def _dies(call: Any, left: Iterator[int]) -> Any:
    def dying(*arguments: Any, **options: Any) -> Any:
        if next(left) == 0:
            raise KeyboardInterrupt
        return call(*arguments, **options)

    return dying


def test_many_files_go_in_batches(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The receiver waits for one batch, not for a series of thousands; what a crash left is taken up."""
    monkeypatch.setattr(retention, "BATCH", 3)
    delivered(line, pet_series())
    purge(line, after_days=11)
    assert files(line) == 0
    assert line.ledger.query("SELECT * FROM memo WHERE key LIKE 'purge:%'") == []


# --- the clock


def test_clock_that_leaps_ahead_removes_nothing_for_a_day(line: Line) -> None:
    """Put right within the day it has done no harm, restart or not; if it was right, what is old goes a day later."""
    delivered(line, pet_series())

    def tick(seconds: float) -> int:
        line.now += seconds
        return Purger(line.config, line.ledger, line.spool, clock=line.clock).tick()

    assert tick(0) == tick(3600) == 0
    assert [tick(400 * DAY), tick(3600), tick(-400 * DAY), tick(3600)] == [0, 0, 0, 0]
    assert [tick(12 * DAY), tick(0.5 * DAY), tick(0.6 * DAY)] == [0, 0, 1]
    assert files(line) == 0


# --- space


def test_below_the_watermark_the_oldest_go_first_and_no_more_than_needed(tmp_path: Path) -> None:
    """Before their days are over; what is not confirmed stays."""
    with Line(tmp_path, toml=DAYS + "free_mb = 100\n", route=ROUTE) as line:
        studies = []
        for number in range(3):
            studies.append(delivered(line, pet_series(seed=number))[0])
            line.now += 60
        waiting, _ = delivered(line, pet_series(seed=9), confirm="commitment")
        size = sum(row["bytes"] for row in line.ledger.instances(studies[0]))
        free = 100 * 2**20 - size - 10
        assert purge(line, free_bytes=lambda: free) >= 2
        assert [codes(line, uid) for uid in (*studies, waiting)] == [["purged"], [], [], []]


Mix = tuple[str, str | None, str, str, int]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(
    st.sampled_from(["matched", "held", "ignored", "receiving", "waiting"]),
    st.sampled_from([None, *JOB_STATES]),
    st.sampled_from(["store", "commitment"]), st.sampled_from(["delivered", "committed", "waiting", "dead"]),
    st.integers(0, 40)), min_size=1, max_size=6), st.booleans())
def test_whatever_the_states_only_what_is_confirmed_or_unwanted_goes(
        tmp_path_factory: pytest.TempPathFactory, some: list[Mix], full: bool) -> None:
    """Any mix of series, jobs and deliveries, old and new, on a full disk or not."""
    with Line(tmp_path_factory.mktemp("line"), toml=DAYS + "free_mb = 1\n", route=ROUTE) as line:
        for number, (series, state, confirm, delivery, age) in enumerate(some):
            uid, at = f"1.2.{number}", line.now + (40 - age) * DAY
            line.ledger.add_instances([instance(uid, f"{uid}.1", "a", now=at)])
            with line.ledger.transaction() as db:  # straight into the tables: also mixes that no path leads to
                if state is not None:
                    line.ledger.set_series(uid, "complete", now=at)
                    job = line.ledger.add_job(_job(uid), now=at)
                    db.execute("UPDATE job SET state = ?, finished_at = ?, derived_path = 'derived/x' WHERE id = ?",
                               (state, at, job))
                    db.execute("INSERT INTO delivery (job_id, peer, state, next_at, created_at, confirm) "
                               "VALUES (?, 'PACS', ?, 0, 0, ?)", (job, delivery, confirm))
                db.execute("UPDATE series SET state = ? WHERE series_uid = ?", (series, uid))
        line.now += 40 * DAY
        purge(line, free_bytes=lambda: 0 if full else 10**12)
        for number, (series, state, confirm, delivery, age) in enumerate(some):
            proven = state == "committed" or (state == "delivered" and (
                delivery == "committed" or (delivery == "delivered" and confirm == "store")))
            wanted_no_more = series == "ignored" or (series == "matched" and state == "cancelled")
            over = state in (None, "delivered", "committed", "superseded", "cancelled")
            may = over and ((series == "matched" and proven and (full or age >= 10))
                            or (wanted_no_more and (full or age >= 5)))
            assert (line.ledger.series(f"1.2.{number}")["purged_at"] is not None) == may, some[number]


def _job(uid: str) -> NewJob:
    return NewJob(identity=uid, series_uid=uid, study_uid=f"{uid}.0", guide_series_uid=None, route="r", method="tv",
                  preset="default", settings={}, send_to=("PACS",), inputs=(json.dumps(uid),))
