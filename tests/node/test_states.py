"""The state machines of series and jobs: whatever is tried in whatever order, the ledger stays true to itself."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dicomnode.errors import NotFound, TransitionRefused
from dicomnode.ledger import InstanceRow, Ledger, NewJob
from dicomnode.states import (
    JOB_STATES,
    JOB_TRANSITIONS,
    SERIES_STATES,
    SERIES_TRANSITIONS,
    after_deliveries,
    may_follow,
)

SERIES = st.integers(1, 3).map(lambda number: f"1.2.{number}")
OWNERS = st.sampled_from(["worker 1", "worker 2"])
PEERS = ("PACS", "ARCHIVE")


@pytest.mark.parametrize(("table", "start"), [(SERIES_TRANSITIONS, "receiving"), (JOB_TRANSITIONS, "queued")])
def test_every_state_can_be_reached_and_every_target_is_a_state(table: dict[str, frozenset[str]], start: str):
    """No island, no typing error."""
    reached, todo = {start}, [start]
    while todo:
        new = table[todo.pop()] - reached
        reached |= new
        todo += new
    assert reached == set(table)


@pytest.mark.parametrize(("table", "final"), [(SERIES_TRANSITIONS, set()), (JOB_TRANSITIONS, {"superseded"})])
def test_only_a_superseded_job_is_at_its_end(table: dict[str, frozenset[str]], final: set[str]):
    """A person can get everything else going again."""
    assert {state for state, following in table.items() if not following} == final


def test_what_was_committed_is_never_computed_or_sent_again():
    """Only other input takes its place. What was delivered is sent again or held where a peer does not commit to it,
    and never computed without a person."""
    assert JOB_TRANSITIONS["committed"] == {"superseded"}
    assert not JOB_TRANSITIONS["delivered"] & {"queued", "running", "failed", "built"}


@given(st.sampled_from(sorted(JOB_TRANSITIONS)), st.lists(st.fixed_dictionaries({
    "peer": st.sampled_from("AB"), "state": st.sampled_from(["waiting", "delivered", "committed", "dead"]),
    "confirm": st.sampled_from(["store", "find", "commitment"]), "reason": st.just("why"), "proofs": st.integers(0, 2),
}), max_size=3))
def test_a_job_is_drawn_from_its_deliveries_by_steps_that_end(state: str, rows: list[dict[str, object]]):
    """For any deliveries: each step is allowed; none but a fully proven job is committed; a dead one never passes."""
    for _ in range(4):
        step = after_deliveries(state, rows)
        if step is None:
            break
        assert may_follow("job", state, step[0])
        state = step[0]
        if state == "committed":
            assert all(row["state"] == "committed" or (row["state"], row["confirm"]) == ("delivered", "store")
                       for row in rows)
        if state == "delivered":
            assert not {"dead", "waiting"} & {row["state"] for row in rows}
    assert after_deliveries(state, rows) is None


def test_unknown_states_are_an_error():
    """Not a silent False."""
    with pytest.raises(KeyError):
        may_follow("job", "finished", "queued")


class LedgerMachine(RuleBasedStateMachine):
    """Receiver, matcher, workers, delivery and operator act on one ledger in any order."""

    def __init__(self) -> None:
        super().__init__()
        shm = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(dir=shm if shm.is_dir() else None)
        self.ledger = Ledger(Path(self.folder.name) / "ledger.sqlite3")
        self.now = 1000.0
        self.first_bytes: dict[str, str] = {}

    def teardown(self) -> None:
        self.ledger.check()
        self.ledger.close()
        self.folder.cleanup()

    def tick(self) -> float:
        self.now += 1.0
        return self.now

    # --- what the processes do

    @rule(series=SERIES, number=st.integers(1, 4), version=st.sampled_from(["a", "b"]))
    def receive(self, series: str, number: int, version: str) -> None:
        uid = f"{series}.{number}"
        kept = self.ledger.add_instances([instance(series, uid, version, now=self.tick())])
        known = self.first_bytes.get(uid)
        assert kept == ["new" if known is None else "repeat" if known == version else "conflict"]
        self.first_bytes.setdefault(uid, version)

    @rule(series=SERIES, state=st.sampled_from(SERIES_STATES))
    def decide_on_series(self, series: str, state: str) -> None:
        try:
            old = self.ledger.series(series)["state"]
        except NotFound:
            with pytest.raises(NotFound):
                self.ledger.set_series(series, state, now=self.tick())
            return
        allowed = state == old or may_follow("series", old, state)
        try:
            self.ledger.set_series(series, state, now=self.tick(), code="test", reason="because")
        except TransitionRefused:
            assert not allowed
            assert self.ledger.series(series)["state"] == old
        else:
            assert allowed
            assert self.ledger.series(series)["state"] == state

    @rule(series=SERIES, setting=st.integers(1, 2))
    def queue_job(self, series: str, setting: int) -> None:
        if series not in {row["series_uid"] for row in self.ledger.series_of_study("1")}:
            return
        before = len(self.ledger.jobs_of_series(series))
        new = NewJob(identity=f"{series}/{setting}", series_uid=series, study_uid="1", guide_series_uid=None, route="r",
                     method="tv", preset="default", settings={"n": setting}, send_to=PEERS, inputs=("1", "2"))
        try:
            job_id = self.ledger.add_job(new, now=self.tick())
        except TransitionRefused:
            assert len(self.ledger.jobs_of_series(series)) == before, "a refused change left half of itself"
            return
        assert self.ledger.job(job_id)["settings"] == {"n": setting}
        assert self.ledger.add_job(new, now=self.tick()) == job_id, "one identity, one job"

    @rule(owner=OWNERS)
    def claim(self, owner: str) -> None:
        job = self.ledger.claim(owner, now=self.tick(), lease_s=5)
        if job is not None:
            assert (job["state"], job["lease_owner"]) == ("running", owner)
            assert job["lease_until"] == self.now + 5

    @rule(owner=OWNERS, job_id=st.integers(1, 6))
    def heartbeat(self, owner: str, job_id: int) -> None:
        alive = self.ledger.renew(job_id, owner, now=self.tick(), lease_s=5, progress={"step": 1})
        assert alive == (self.owner_of(job_id) == owner)

    @rule(owner=OWNERS, job_id=st.integers(1, 6))
    def build(self, owner: str, job_id: int) -> None:
        if self.job_or_none(job_id) is None:
            return
        mine = self.owner_of(job_id) == owner
        assert mine == self.ledger.built(job_id, owner, now=self.tick(), derived_series_uid=f"2.25.{job_id}",
                                         derived_path=f"derived/{job_id}", derived_instances=4, report={"ok": True})
        if mine:
            assert {d["peer"] for d in self.ledger.deliveries(job_id)} == set(PEERS)

    @rule(job_id=st.integers(1, 6), state=st.sampled_from(JOB_STATES))
    def decide_on_job(self, job_id: int, state: str) -> None:
        job = self.job_or_none(job_id)
        if job is None:
            return
        allowed = state == job["state"] or may_follow("job", job["state"], state)
        extra = {"lease_owner": "worker 1", "lease_until": self.now + 5} if state == "running" else {}
        if state == "delivered" or (state == "built" and not self.ledger.deliveries(job_id)):
            return  # those two come about by deliveries and by built()
        try:
            self.ledger.set_job(job_id, state, now=self.tick(), **extra)
        except TransitionRefused:
            assert not allowed
            assert self.ledger.job(job_id)["state"] == job["state"]
        else:
            assert allowed

    @rule(state=st.sampled_from(["waiting", "delivered", "dead"]))
    def deliver(self, state: str) -> None:
        for delivery in self.ledger.due_deliveries(now=self.tick())[:1]:
            if self.ledger.job(delivery["job_id"])["state"] == "built":
                self.ledger.set_job(delivery["job_id"], "sending", now=self.tick())
            self.ledger.put_statuses(delivery["id"], [("2.25.1", 0x0000, "")], now=self.now)
            self.ledger.set_delivery(delivery["id"], state, now=self.tick(), reason="tried", attempts=1,
                                     next_at=self.now if state == "waiting" else None)

    # --- what must hold at every moment

    def job_or_none(self, job_id: int) -> dict | None:
        try:
            return self.ledger.job(job_id)
        except NotFound:
            return None

    def owner_of(self, job_id: int) -> str | None:
        job = self.job_or_none(job_id)
        return job["lease_owner"] if job and job["state"] == "running" else None

    def jobs(self) -> list[dict]:
        series = [row["series_uid"] for row in self.ledger.series_of_study("1")]
        return [job for uid in series for job in self.ledger.jobs_of_series(uid)]

    @invariant()
    def instances_are_counted_and_the_first_bytes_stay(self) -> None:
        series = [row["series_uid"] for row in self.ledger.series_of_study("1")]
        rows = [row for uid in series for row in self.ledger.instances(uid)]
        assert {row["sop_instance_uid"]: row["sha256"] for row in rows} == {
            uid: digest(version) for uid, version in self.first_bytes.items()}
        assert sum(series["instances"] for series in self.ledger.series_of_study("1")) == len(rows)

    @invariant()
    def events_tell_the_whole_history(self) -> None:
        """Each change starts where the one before ended, is allowed, and the last one leads to the state of now."""
        now_at: dict[tuple[str, str], str] = {}
        for event in self.ledger.events():
            if event["kind"] not in ("series", "job"):
                continue
            what = (event["kind"], event["series_uid"] if event["kind"] == "series" else str(event["job_id"]))
            before = now_at.get(what, "")
            assert event["from_state"] == before
            if before and event["to_state"] != before:
                assert may_follow(event["kind"], before, event["to_state"])
            now_at[what] = event["to_state"]
        for series in self.ledger.series_of_study("1"):
            assert now_at["series", series["series_uid"]] == series["state"]
        for job in self.jobs():
            assert now_at["job", str(job["id"])] == job["state"]

    @invariant()
    def only_running_jobs_have_a_lease(self) -> None:
        for job in self.jobs():
            assert (job["lease_owner"] is not None) == (job["state"] == "running"), job

    @invariant()
    def a_delivered_job_was_delivered_everywhere(self) -> None:
        for job in self.jobs():
            if job["state"] in ("delivered", "committed"):
                assert {d["state"] for d in self.ledger.deliveries(job["id"])} == {"delivered"}

    @invariant()
    def counts_agree_with_the_rows(self) -> None:
        counts = self.ledger.counts()
        found: dict[str, int] = defaultdict(int)
        for job in self.jobs():
            found[job["state"]] += 1
        assert counts["job"] == dict(found)
        assert counts["instance"]["all"] == len(self.first_bytes)


def digest(version: str) -> str:
    return hashlib.sha256(version.encode()).hexdigest()


def instance(series: str, uid: str, version: str, *, now: float) -> InstanceRow:
    return InstanceRow(
        sop_instance_uid=uid, sop_class_uid="1.2", study_uid="1", series_uid=series,
        transfer_syntax_uid="1.2.840.10008.1.2", path=f"objects/{uid}", bytes=1, sha256=digest(version),
        calling_ae="SCANNER", address="127.0.0.1", received_at=now, position=(0.0, 0.0, now),
        orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), modality="PT")


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, derandomize=True,
                                      suppress_health_check=[HealthCheck.too_slow])
