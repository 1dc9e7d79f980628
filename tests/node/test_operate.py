"""What a person may decide, and what is refused: retry, hold, release, cancel, urgent."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicomnode import operate, views
from dicomnode.errors import NotFound, RefusedInput
from dicomnode.ledger import InstanceRow, Ledger, NewJob

STUDY, PET, CT = "1.2.3", "1.2.3.1", "1.2.3.2"


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "ledger.sqlite3") as opened:
        yield opened


def arrive(ledger: Ledger, series: str = PET, *, modality: str = "PT", study: str = STUDY, accession: str = "A7",
           sha256: str = "0", at: float = 10.0) -> None:
    ledger.add_instances([InstanceRow(
        sop_instance_uid=f"{series}.9", sop_class_uid="1.2", study_uid=study, series_uid=series,
        transfer_syntax_uid="1.2.840.10008.1.2.1", path="x", bytes=1, sha256=sha256, calling_ae="SCANNER",
        address="127.0.0.1", received_at=at, modality=modality, accession_number=accession)])


def queue(ledger: Ledger, series: str = PET, *, identity: str = "i", study: str = STUDY) -> int:
    ledger.set_series(series, "complete", now=20)
    return ledger.add_job(NewJob(
        identity=identity, series_uid=series, study_uid=study, guide_series_uid=None, route="pet", method="tv",
        preset="default", settings={}, send_to=("PACS", "SECOND"), inputs=("1",)), now=20)


def build(ledger: Ledger, job: int) -> None:
    assert ledger.claim("worker", now=30, lease_s=60) is not None
    assert ledger.built(job, "worker", now=40, derived_series_uid="1.2.3.77", derived_path=f"derived/{job}",
                        derived_instances=2, report={})


def give_up(ledger: Ledger, job: int) -> None:
    """One delivery done, the other dead: the job is held."""
    ledger.set_job(job, "sending", now=50)
    done, dead = ledger.deliveries(job)
    ledger.set_delivery(done["id"], "delivered", now=51)
    ledger.set_delivery(dead["id"], "dead", now=52, reason="no answer for 72 h")
    assert ledger.job(job)["state"] == "held"


def test_retry_queues_a_held_job_with_fresh_attempts(ledger):
    """Every name of the job leads to it: job number, study, series, accession number."""
    arrive(ledger)
    job = queue(ledger)
    for name in (f"job:{job}", str(job), STUDY, PET, "A7"):
        ledger.claim("worker", now=30, lease_s=60)
        ledger.set_job(job, "held", now=31, code="attempts", reason="every attempt failed")
        done = operate.retry(ledger, name, now=32, actor="mia")
        row = ledger.job(job)
        assert (done.job, done.state, row["state"]) == (job, "queued", "queued")
        assert (row["attempts"], row["run_after"]) == (0, 32)
        assert row["finished_at"] is None


def test_retry_of_a_dead_delivery_sends_again_and_computes_nothing(ledger):
    """The job goes back to built; the delivery that succeeded stays delivered."""
    arrive(ledger)
    job = queue(ledger)
    build(ledger, job)
    give_up(ledger, job)
    done = operate.retry(ledger, "A7", now=100_000, actor="mia")
    assert (done.state, "SECOND" in done.text) == ("built", True)
    assert [row["state"] for row in ledger.deliveries(job)] == ["delivered", "waiting"]
    assert [row["peer"] for row in ledger.due_deliveries(now=100_000)] == ["SECOND"]
    assert ledger.deliveries(job)[1]["created_at"] == 100_000, "or it would be given up again at once"


def test_retry_of_a_dead_delivery_whose_series_is_gone_computes_it_and_sends_again(ledger):
    """Or the job, computed anew, would stay built for ever: nobody waited for it."""
    arrive(ledger)
    job = queue(ledger)
    build(ledger, job)
    give_up(ledger, job)
    with ledger.transaction() as db:
        db.execute("UPDATE job SET derived_path = NULL WHERE id = ?", (job,))
    assert operate.retry(ledger, "A7", now=30, actor="mia").state == "queued"
    build(ledger, job)
    assert [row["peer"] for row in ledger.due_deliveries(now=100_000)] == ["SECOND"]


def test_retry_of_a_held_series_looks_at_it_again(ledger):
    """Nothing is released: the same finding would hold it again."""
    arrive(ledger)
    ledger.set_series(PET, "held", now=20, code="gap", reason="a slice is missing")
    assert operate.retry(ledger, PET, now=21, actor="mia").state == "receiving"
    assert not ledger.series(PET)["released"]


def test_hold_stops_a_job_and_the_worker_notices(ledger):
    """The worker's next heartbeat says that the job is no longer its own."""
    arrive(ledger)
    job = queue(ledger)
    ledger.claim("worker", now=30, lease_s=60)
    operate.hold(ledger, STUDY, now=31, actor="mia")
    assert (ledger.job(job)["state"], ledger.job(job)["code"]) == ("held", "operator")
    assert not ledger.renew(job, "worker", now=32, lease_s=60)


def test_a_study_named_as_a_whole_means_its_pet(ledger):
    """Holding a study that still arrives does not hold the CT; the CT can be named by itself."""
    arrive(ledger)
    arrive(ledger, CT, modality="CT")
    assert operate.hold(ledger, STUDY, now=20, actor="mia").series == PET
    assert ledger.series(CT)["state"] == "receiving"
    assert operate.hold(ledger, CT, now=20, actor="mia").series == CT


def test_a_series_held_by_a_person_stays_held_when_more_arrives(ledger):
    """Code "operator" is what reception respects."""
    arrive(ledger)
    operate.hold(ledger, PET, now=20, actor="mia")
    ledger.add_instances([InstanceRow(
        sop_instance_uid=f"{PET}.10", sop_class_uid="1.2", study_uid=STUDY, series_uid=PET, transfer_syntax_uid="1",
        path="y", bytes=1, sha256="1", calling_ae="SCANNER", address="", received_at=30, modality="PT")])
    assert ledger.series(PET)["state"] == "held"


def test_release_of_a_series_accepts_its_conflicts_and_says_who(ledger):
    """The series is processed as it is; the event names the person and what was overruled."""
    arrive(ledger)
    arrive(ledger, sha256="other bytes")
    ledger.set_series(PET, "held", now=20, code="conflict", reason="other bytes came")
    operate.release(ledger, PET, now=21, actor="mia")
    row = ledger.series(PET)
    assert (row["state"], row["released"]) == ("receiving", 1)
    assert ledger.conflicts(PET) == [] and len(ledger.conflicts(PET, accepted=True)) == 1
    event = ledger.events(study_uid=STUDY)[-1]
    assert event["actor"] == "mia" and "other bytes came" in event["reason"]


def test_release_sends_what_is_built(ledger):
    """A held job whose derived series lies there goes to its peers as it is."""
    arrive(ledger)
    job = queue(ledger)
    build(ledger, job)
    operate.hold(ledger, str(job), now=45, actor="mia")
    assert operate.release(ledger, str(job), now=46, actor="noa").state == "built"
    assert len(ledger.due_deliveries(now=46)) == 2


@pytest.mark.parametrize("verb", ["release", "retry"])
def test_a_job_stopped_after_its_last_instance_ends_delivered(ledger, verb):
    """Held or cancelled while the last answers came in: nothing is left to send, so it must not wait to be sent."""
    arrive(ledger)
    job = queue(ledger)
    build(ledger, job)
    ledger.set_job(job, "sending", now=50)
    operate.hold(ledger, str(job), now=51, actor="mia")
    for row in ledger.deliveries(job):
        ledger.set_delivery(row["id"], "delivered", now=52)
    assert ledger.job(job)["state"] == "held"
    getattr(operate, verb)(ledger, str(job), now=53, actor="mia")
    if verb == "retry":  # queued again: the executor finds the derived series and enters it
        assert ledger.claim("worker", now=54, lease_s=60) is not None
        assert ledger.built(job, "worker", now=55, derived_series_uid="1.2.3.77", derived_path=f"derived/{job}",
                            derived_instances=2, report={})
    assert ledger.job(job)["state"] == "delivered"


@pytest.mark.parametrize("code", ["no-route", "operator"])
def test_retry_looks_again_at_a_series_that_no_rule_excludes(ledger, code):
    """A route was added since, or a person changed their mind; what is ignored by rule stays so."""
    arrive(ledger)
    ledger.set_series(PET, "ignored", now=20, code=code)
    assert operate.retry(ledger, STUDY, now=21, actor="mia").state == "receiving"
    ledger.set_series(PET, "ignored", now=22, code="localizer")
    with pytest.raises(RefusedInput, match="nothing to retry"):
        operate.retry(ledger, STUDY, now=23, actor="mia")


def test_release_refuses_a_job_that_built_nothing(ledger):
    """There is nothing to send; the remedy is named."""
    arrive(ledger)
    job = queue(ledger)
    ledger.claim("worker", now=30, lease_s=60)
    ledger.set_job(job, "held", now=31, code="gate", reason="kernel-width")
    with pytest.raises(RefusedInput, match=f"retry job:{job}"):
        operate.release(ledger, str(job), now=32, actor="mia")


def test_release_of_a_job_that_a_person_held_lets_it_go_on(ledger):
    """It was stopped before it had built anything: it is queued again."""
    arrive(ledger)
    job = queue(ledger)
    operate.hold(ledger, str(job), now=31, actor="mia")
    assert operate.release(ledger, str(job), now=32, actor="mia").state == "queued"


def test_a_series_held_after_delivery_is_what_release_means(ledger):
    """Input that changed after delivery holds the series, not the delivered job; the list says so."""
    arrive(ledger)
    job = queue(ledger)
    build(ledger, job)
    ledger.set_job(job, "sending", now=50)
    for row in ledger.deliveries(job):
        ledger.set_delivery(row["id"], "delivered", now=51)
    ledger.set_series(PET, "held", now=60, code="late-input", reason="input changed")
    assert [(row["state"], row["code"]) for row in views.jobs(ledger)] == [("held", "late-input")]
    assert operate.release(ledger, "A7", now=61, actor="mia").state == "receiving"
    assert ledger.job(job)["state"] == "delivered"


def test_cancel_ends_a_job_and_ignores_a_series_without_one(ledger):
    """A cancelled job can be retried."""
    arrive(ledger)
    arrive(ledger, "1.2.3.5")
    job = queue(ledger)
    assert operate.cancel(ledger, str(job), now=30, actor="mia").state == "cancelled"
    assert operate.cancel(ledger, "1.2.3.5", now=30, actor="mia").state == "ignored"
    assert operate.retry(ledger, str(job), now=31, actor="mia").state == "queued"


def test_urgent_starts_before_all_others_whatever_the_window(ledger):
    """Whoever was hurried last goes first; the history says who decided."""
    jobs = []
    for number in range(3):
        arrive(ledger, f"1.2.3.{number + 4}", accession=f"A{number}")
        jobs.append(queue(ledger, f"1.2.3.{number + 4}", identity=str(number)))
    assert operate.urgent(ledger, "A1", now=30, actor="mia").job == jobs[1]
    assert operate.urgent(ledger, f"job:{jobs[2]}", now=31, actor="mia").state == "queued"
    claimed = [ledger.claim("w", now=32, lease_s=60, may_start=lambda route: False) for _ in range(3)]
    assert [job and job["id"] for job in claimed] == [jobs[2], jobs[1], None]
    said = [event for event in ledger.events() if event["code"] == "urgent"]
    assert [(event["job_id"], event["actor"]) for event in said] == [(jobs[1], "mia"), (jobs[2], "mia")]


def test_urgent_job_does_not_wait_for_its_next_attempt(ledger):
    """A failed one is tried at once; one that runs already is refused."""
    arrive(ledger)
    job = queue(ledger)
    ledger.claim("w", now=30, lease_s=60)
    with pytest.raises(RefusedInput, match=r"nothing to hurry.*running"):
        operate.urgent(ledger, "A7", now=31, actor="mia")
    ledger.set_job(job, "failed", now=31, run_after=3600)
    operate.urgent(ledger, "A7", now=32, actor="mia")
    assert ledger.claim("w", now=32, lease_s=60) is not None


def test_two_choices_are_refused_with_the_list(ledger):
    """A study with two queued jobs: neither is held, both are named."""
    arrive(ledger)
    arrive(ledger, "1.2.3.5")
    queue(ledger)
    queue(ledger, "1.2.3.5", identity="j")
    with pytest.raises(RefusedInput, match=r"2 choices.*1\.2\.3\.1.*1\.2\.3\.5|2 choices.*1\.2\.3\.5.*1\.2\.3\.1"):
        operate.hold(ledger, STUDY, now=30, actor="mia")
    assert ledger.counts()["job"] == {"queued": 2}


def test_a_number_that_is_job_and_accession_number_is_refused(ledger):
    """Writing job:1 decides."""
    arrive(ledger, accession="1")
    job = queue(ledger)
    assert job == 1
    with pytest.raises(RefusedInput, match="job:1"):
        operate.hold(ledger, "1", now=30, actor="mia")
    assert operate.hold(ledger, "job:1", now=30, actor="mia").job == 1


def test_what_is_not_there_or_not_in_that_state_is_refused(ledger):
    """Unknown names are NotFound; a delivered job cannot be held, and the message says its state."""
    arrive(ledger)
    for name in ("nothing", "job:9", "job:x", "99"):
        with pytest.raises(NotFound):
            operate.retry(ledger, name, now=30, actor="mia")
    with pytest.raises(RefusedInput, match="is receiving"):
        operate.release(ledger, PET, now=30, actor="mia")


def test_show_tells_the_whole_story(ledger):
    """What came, the job, each delivery with its count, and every event in order."""
    arrive(ledger)
    job = queue(ledger)
    build(ledger, job)
    give_up(ledger, job)
    value = views.show(ledger, "A7")
    found = value["series"][0]["jobs"][0]
    assert (found["job"], found["state"], found["derived_series"]) == (job, "held", "1.2.3.77")
    assert [(row["peer"], row["state"]) for row in found["deliveries"]] == [("PACS", "delivered"), ("SECOND", "dead")]
    assert [event["to_state"] for event in value["events"] if event["job"]] == [
        "queued", "running", "built", "sending", "delivered", "dead", "held"]


def test_one_accession_number_of_two_studies_is_refused(ledger):
    """`show` does not mix two patients' studies."""
    arrive(ledger)
    arrive(ledger, "9.9.1", study="9.9")
    with pytest.raises(RefusedInput, match=r"1\.2\.3, 9\.9"):
        views.show(ledger, "A7")
