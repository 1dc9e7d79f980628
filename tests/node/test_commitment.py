"""Storage commitment as SCU: what was asked, whoever answers, whenever it comes; only what failed is sent again."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pynetdicom import AE, evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from dicomnode import commitment, operate, proof
from dicomnode.proof import Prover
from tests.node.line import Line
from tests.node.test_delivery import built, deliver, states
from tests.peers import free_port, wait_until

TIMES = """[delivery]
retry_s = 30
give_up_h = 72
connect_timeout_s = 2
dimse_timeout_s = 3
commitment_timeout_s = 600
commitment_attempts = {attempts}
[[peer]]
name = "ARCHIVE"
ae_title = "ARCHIVE"
host = "127.0.0.1"
port = {port}
confirm = "{confirm}"
query = {query}
"""


PET = "1.2.840.10008.5.1.4.1.1.128"
NUMBERS = itertools.count(1)


class Archive:
    """A peer that stores, commits and answers C-FIND, in this process.

    `verdict(uid)`: FailureReason of an instance, 0 commits, None says nothing of it. `answer`: "same" (association),
    "never", or a C-STORE-like status with which the N-ACTION is refused. What it stored is in `stored`, in order.
    """

    def __init__(self, *, answer: str | int = "same", verdict: Callable[[str], int | None] = lambda _: 0,
                 offers: bool = True, finds: bool = True, stores: Sequence[str] = (PET,)) -> None:
        self.answer, self.verdict, self.finds = answer, verdict, finds
        self.stored: list[str] = []
        self.hidden: set[str] = set()
        self.requests: list[Dataset] = []
        self.statuses: list[int] = []
        self.port = free_port()
        ae = AE("ARCHIVE")
        for uid in (*stores, Verification, StudyRootQueryRetrieveInformationModelFind,
                    *([StorageCommitmentPushModel] if offers else [])):
            ae.add_supported_context(uid)
        self._server = ae.start_server(("127.0.0.1", self.port), block=False, evt_handlers=[
            (evt.EVT_C_STORE, self._store), (evt.EVT_N_ACTION, self._action), (evt.EVT_C_FIND, self._find)])

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def _store(self, event: evt.Event) -> int:
        self.stored.append(str(event.dataset.SOPInstanceUID))
        return 0x0000

    def _action(self, event: evt.Event) -> tuple[int, None]:
        self.requests.append(event.action_information)
        if isinstance(self.answer, int):
            return self.answer, None
        if self.answer == "same":
            threading.Thread(target=self._report, args=(event.assoc, event.action_information), daemon=True).start()
        return 0x0000, None

    def _report(self, association: Any, request: Dataset) -> None:
        time.sleep(0.1)  # the response to N-ACTION goes first
        report = self.report(request)
        status, _ = association.send_n_event_report(
            report, 2 if "FailedSOPSequence" in report else 1, StorageCommitmentPushModel,
            StorageCommitmentPushModelInstance)
        self.statuses.append(int(status.get("Status", -1)))

    def report(self, request: Dataset) -> Dataset:
        """Event Information of the answer to `request`."""
        report = Dataset()
        report.TransactionUID = request.TransactionUID
        report.ReferencedSOPSequence = []
        failed = []
        for item in request.ReferencedSOPSequence:
            reason = self.verdict(item.ReferencedSOPInstanceUID)
            if reason == 0:
                report.ReferencedSOPSequence.append(item)
            elif reason is not None:
                item.FailureReason = reason
                failed.append(item)
        if failed:
            report.FailedSOPSequence = failed
        return report

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        if not self.finds:
            yield 0xA900, None
            return
        for uid in dict.fromkeys(self.stored):
            if uid not in self.hidden:
                answer = Dataset()
                answer.QueryRetrieveLevel, answer.SOPInstanceUID = "IMAGE", uid
                yield 0xFF00, answer


def line(tmp_path: Path, archive: Archive, *, confirm: str = "commitment", query: bool = False,
         attempts: int = 3) -> Line:
    return Line(tmp_path, toml=TIMES.format(port=archive.port, confirm=confirm, query=str(query).lower(),
                                            attempts=attempts))


def prove(line: Line, *, stay_s: float = 3.0) -> Prover:
    """One tick, waited for."""
    prover = Prover(line.config, line.ledger, line.spool, clock=line.clock, rng=random.Random(0),
                    new_uid=lambda: f"2.25.{next(NUMBERS)}", stay_s=stay_s)
    prover.tick()
    for thread in prover.lanes.threads.values():
        thread.join(60)
    return prover


def sent(line: Line, *, slices: int = 4) -> int:
    """A job that the archive has stored: delivered, not proven."""
    job_id = built(line, send_to=("ARCHIVE",), slices=slices)
    deliver(line)
    assert states(line, job_id) == ("delivered", ["delivered"])
    return job_id


def answer(line: Line, archive: Archive, number: int = -1, *, ae_title: str = "ARCHIVE") -> int:
    """The report to a request, as if it came on a new association; the status that the archive gets."""
    report = archive.report(archive.requests[number])
    return commitment.report(line.ledger, report, event_type=1, calling_ae=ae_title, now=line.now)


def test_a_report_on_the_same_association_commits_delivery_and_job(tmp_path: Path) -> None:
    """Delivered, asked, answered at once: committed, and the history says by which proof."""
    with Archive() as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        prove(here)
        assert states(here, job_id) == ("committed", ["committed"])
        assert archive.statuses == [0x0000]
        assert here.ledger.job(job_id)["reason"] == "ARCHIVE: storage commitment of 4 instances"
        assert commitment.proven(here.ledger, job_id)
        (request,) = archive.requests
        assert {item.ReferencedSOPClassUID for item in request.ReferencedSOPSequence} == {PET}


def test_a_report_on_a_new_association_commits_too_and_twice_is_once(tmp_path: Path) -> None:
    """Whatever process takes it; the same report again is answered 0x0000 and changes nothing."""
    with Archive(answer="never") as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        prove(here, stay_s=0)
        assert states(here, job_id) == ("delivered", ["delivered"])
        assert not commitment.proven(here.ledger, job_id)
        assert answer(here, archive) == 0x0000
        assert states(here, job_id) == ("committed", ["committed"])
        history = here.ledger.events()
        assert answer(here, archive) == 0x0000
        assert here.ledger.events() == history


def test_nobody_else_may_answer(tmp_path: Path) -> None:
    """Another AE title, an unknown transaction, an unknown event type: refused, and the first two are recorded."""
    with Archive(answer="never") as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        prove(here, stay_s=0)
        assert answer(here, archive, ae_title="INTRUDER") == 0x0115
        report = archive.report(archive.requests[0])
        assert commitment.report(here.ledger, report, event_type=7, calling_ae="ARCHIVE", now=here.now) == 0x0113
        report.TransactionUID = "1.2.3"
        assert commitment.report(here.ledger, report, event_type=1, calling_ae="ARCHIVE", now=here.now) == 0x0115
        assert commitment.report(here.ledger, Dataset(), event_type=1, calling_ae="ARCHIVE", now=here.now) == 0x0115
        assert states(here, job_id) == ("delivered", ["delivered"])
        refusals = [event for event in here.ledger.events() if event["kind"] == "security"]
        assert [event["actor"] for event in refusals] == ["INTRUDER", "ARCHIVE"]


def test_exactly_what_is_not_committed_is_sent_again_and_asked_for_again(tmp_path: Path) -> None:
    """One of four fails with 0x0112: that one alone is stored and asked for again; then all is committed."""
    lacking: set[str] = set()
    with Archive(verdict=lambda uid: 0x0112 if uid in lacking else 0) as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        lacking.add(archive.stored[2])
        prove(here)
        assert states(here, job_id) == ("delivered", ["delivered"])
        prove(here)
        assert states(here, job_id) == ("sending", ["waiting"])
        (row,) = here.ledger.deliveries(job_id)
        assert "1 instances are sent again: not committed: no such object instance (0x0112)" in row["reason"]
        first, lost = list(archive.stored), set(lacking)
        lacking.clear()
        deliver(here)
        assert set(archive.stored[len(first):]) == lost and len(archive.stored) == 5
        prove(here)
        assert states(here, job_id) == ("committed", ["committed"])
        assert [len(request.ReferencedSOPSequence) for request in archive.requests] == [4, 1]


def test_an_instance_that_is_never_committed_holds_the_job_with_the_reason_in_words(tmp_path: Path) -> None:
    """After commitment_attempts; no C-FIND stands in for a refusal. `retry` sends that one again and asks anew."""
    lacking: set[str] = set()
    with Archive(verdict=lambda uid: 0x0213 if uid in lacking else 0) as archive, \
            line(tmp_path, archive, query=True, attempts=2) as here:
        job_id = sent(here)
        lacking.add(archive.stored[0])
        for _ in range(3):
            prove(here)
            prove(here)
            deliver(here)
        assert states(here, job_id) == ("held", ["dead"])
        job = here.ledger.job(job_id)
        assert job["code"] == "commitment"
        assert "resource limitation (0x0213)" in job["reason"] and "Remedy" in job["reason"]
        assert len(archive.requests) == 2 and len(archive.stored) == 5
        lacking.clear()
        operate.retry(here.ledger, f"job:{job_id}", now=here.now, actor="me")
        deliver(here)
        assert len(archive.stored) == 6
        prove(here)
        assert states(here, job_id) == ("committed", ["committed"])


def test_a_peer_that_is_silent_is_asked_again_and_then_the_count_decides(tmp_path: Path) -> None:
    """Two time-outs, then C-FIND at image level proves it, where the peer may be queried."""
    with Archive(answer="never") as archive, line(tmp_path, archive, query=True, attempts=2) as here:
        job_id = sent(here)
        for asked in (1, 2):
            prove(here, stay_s=0)
            prove(here, stay_s=0)
            assert len(archive.requests) == asked, "nothing is asked before the time-out"
            here.now += 601
        assert archive.requests[0].TransactionUID != archive.requests[1].TransactionUID
        prove(here, stay_s=0)
        assert states(here, job_id) == ("committed", ["committed"])
        assert "C-FIND finds 4 of 4 instances" in here.ledger.job(job_id)["reason"]
        assert len(archive.stored) == 4, "nothing was sent twice"


def test_without_query_the_job_is_held_and_a_late_answer_still_counts(tmp_path: Path) -> None:
    """Held with the remedy; the answer to the first transaction arrives after all: committed."""
    with Archive(answer="never") as archive, line(tmp_path, archive, attempts=2) as here:
        job_id = sent(here)
        for _ in range(3):
            prove(here, stay_s=0)
            here.now += 601
        assert states(here, job_id) == ("held", ["dead"])
        job = here.ledger.job(job_id)
        assert job["code"] == "commitment" and "peer.confirm" in job["reason"] and "no answer in time" in job["reason"]
        assert answer(here, archive, 0) == 0x0000
        assert states(here, job_id) == ("committed", ["committed"])
        assert "answered late" in here.ledger.deliveries(job_id)[0]["reason"]


@pytest.mark.parametrize(("options", "said"), [
    ({"answer": 0x0110}, "refused the request for storage commitment: processing failure (0x0110)"),
    ({"offers": False}, "does not offer storage commitment")])
def test_a_peer_that_refuses_the_request_is_tried_again_then_a_person_is_told(
        tmp_path: Path, options: dict[str, Any], said: str) -> None:
    """Refusals count as attempts, with pauses between; the reason names what the peer said."""
    with Archive(**options) as archive, line(tmp_path, archive, attempts=2) as here:
        job_id = sent(here)
        for _ in range(3):
            prove(here)
            assert len(here.ledger.query("SELECT * FROM commitment")) <= 2
            here.now += 100
        assert states(here, job_id) == ("held", ["dead"])
        assert said in here.ledger.job(job_id)["reason"]


def test_a_peer_that_is_down_costs_no_attempt(tmp_path: Path) -> None:
    """It is asked when it is back, until give_up_h; then the job is held."""
    archive = Archive()
    with line(tmp_path, archive) as here:
        with archive:
            job_id = sent(here)
        prove(here)
        (row,) = here.ledger.deliveries(job_id)
        assert (row["state"], row["proofs"]) == ("delivered", 0)
        assert "does not answer" in row["reason"] and row["prove_at"] > here.now
        here.now += 73 * 3600
        prove(here)
        assert states(here, job_id) == ("held", ["dead"])


def test_a_long_series_is_asked_for_in_requests_of_bounded_size(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instance in exactly one of them; all count as one attempt."""
    monkeypatch.setattr(proof, "MOST", 3)
    with Archive() as archive, line(tmp_path, archive) as here:
        job_id = sent(here, slices=7)
        prove(here)
        assert [len(request.ReferencedSOPSequence) for request in archive.requests] == [3, 3, 1]
        assert states(here, job_id) == ("committed", ["committed"])
        assert here.ledger.deliveries(job_id)[0]["proofs"] == 1


def test_what_a_report_does_not_name_is_not_proven(tmp_path: Path) -> None:
    """Two of four named: the other two are asked for again, and not sent again."""
    named: list[str] = []
    with Archive(verdict=lambda uid: 0 if uid in named else None) as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        named += archive.stored[:2]
        prove(here)
        named += archive.stored[2:]
        prove(here)
        assert states(here, job_id) == ("committed", ["committed"])
        assert [len(request.ReferencedSOPSequence) for request in archive.requests] == [4, 2]
        assert len(archive.stored) == 4


def test_a_failure_without_a_reason_is_a_failure(tmp_path: Path) -> None:
    """FailureReason is empty: that instance is sent again, and an item that names none refuses the report."""
    with Archive(answer="never", verdict=lambda uid: 0x0110) as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        prove(here, stay_s=0)
        report = archive.report(archive.requests[0])
        for item in report.FailedSOPSequence:
            item.FailureReason = None
        nameless = deepcopy(report)
        nameless.FailedSOPSequence[0].ReferencedSOPInstanceUID = ""
        for information, status in ((nameless, 0x0115), (report, 0x0000)):
            assert commitment.report(here.ledger, information, event_type=2, calling_ae="ARCHIVE",
                                     now=here.now) == status
        prove(here)
        assert states(here, job_id) == ("sending", ["waiting"])


def test_find_proves_a_delivery_and_what_is_lacking_is_sent_again(tmp_path: Path) -> None:
    """confirm = "find": all listed: committed. One lacking: looked for once more, then sent again, that one alone."""
    with Archive() as archive, line(tmp_path, archive, confirm="find") as here:
        job_id = sent(here)
        archive.hidden.add(archive.stored[1])
        prove(here)
        assert states(here, job_id) == ("delivered", ["delivered"])
        here.now += 100
        prove(here)
        assert states(here, job_id) == ("sending", ["waiting"])
        deliver(here)
        assert len(archive.stored) == 5
        archive.hidden.clear()
        prove(here)
        assert states(here, job_id) == ("committed", ["committed"])
        assert archive.requests == []


@pytest.mark.parametrize("finds", [True, False])
def test_find_in_vain_holds_the_job(tmp_path: Path, finds: bool) -> None:
    """Never listed, or the query is refused each time: held, and nothing is called committed."""
    with Archive(finds=finds) as archive, line(tmp_path, archive, confirm="find", attempts=2) as here:
        job_id = sent(here)
        archive.hidden.update(archive.stored)
        for _ in range(2):
            prove(here)
            here.now += 100
        assert states(here, job_id) == ("held", ["dead"])
        assert ("0 of 4" if finds else "0xA900") in here.ledger.job(job_id)["reason"]


def test_a_job_is_committed_when_every_delivery_that_can_be_proven_is(tmp_path: Path) -> None:
    """One peer commits, the other only answers: committed, and the history names both."""
    with Archive() as archive, Archive() as plain:
        toml = TIMES.format(port=archive.port, confirm="commitment", query="false", attempts=3)
        with Line(tmp_path, port=plain.port, toml=toml) as here:
            job_id = built(here, send_to=("PACS", "ARCHIVE"))
            deliver(here)
            assert states(here, job_id) == ("delivered", ["delivered", "delivered"])
            prove(here)
            assert states(here, job_id) == ("committed", ["delivered", "committed"])
            reason = here.ledger.job(job_id)["reason"]
            assert "PACS: 4 instances stored" in reason and "ARCHIVE: storage commitment" in reason


def test_a_peer_whose_proof_is_no_longer_wanted_is_done(tmp_path: Path) -> None:
    """The configuration says confirm = "store" now: delivered is the end."""
    with Archive(answer="never") as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        (tmp_path / "b").mkdir()
        here.config = line(tmp_path / "b", archive, confirm="store").config
        prove(here)
        assert states(here, job_id) == ("delivered", ["delivered"])
        assert archive.requests == [] and commitment.proven(here.ledger, job_id)


def test_closing_does_not_wait_for_a_peer_that_will_not_answer(tmp_path: Path) -> None:
    """The stay ends at once; the transaction stays open, and its answer counts."""
    with Archive(answer="never") as archive, line(tmp_path, archive) as here:
        job_id = sent(here)
        prover = Prover(here.config, here.ledger, here.spool, clock=here.clock, stay_s=60)
        prover.tick()
        wait_until("the request", lambda: archive.requests, timeout_s=10)
        started = time.monotonic()
        prover.close(10)
        assert time.monotonic() - started < 5
        assert answer(here, archive) == 0x0000
        assert states(here, job_id) == ("committed", ["committed"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0, 0x0110, 0x0112, 0x0131, None]), min_size=4, max_size=4), max_size=4),
       st.data())
def test_committed_means_that_each_instance_was_named_once_as_kept(
        tmp_path_factory: pytest.TempPathFactory, answers: list[list[int | None]], data: st.DataObject) -> None:
    """For any answers to any number of open transactions, in any order: committed if and only if each instance was."""
    with Line(tmp_path_factory.mktemp("line"), toml=TIMES.format(
            port=1, confirm="commitment", query="false", attempts=3)) as here:
        job_id = built(here, send_to=("ARCHIVE",))
        (row,) = here.ledger.deliveries(job_id)
        uids = [f"1.2.{number}" for number in range(4)]
        here.ledger.put_statuses(row["id"], [(uid, 0, "") for uid in uids], now=1)
        here.ledger.set_job(job_id, "sending", now=1)
        here.ledger.set_delivery(row["id"], "delivered", now=1, confirm="commitment", prove_at=1)
        for number in range(len(answers)):
            commitment.enter(here.ledger, row["id"], transaction_uid=f"2.{number}", ae_title="A", uids=uids, now=1,
                             due_at=9)
        kept: set[str] = set()
        for number in data.draw(st.permutations(range(len(answers)))):
            verdicts = list(zip(uids, answers[number], strict=True))
            for _ in range(data.draw(st.integers(1, 2))):
                assert commitment.answered(
                    here.ledger, transaction_uid=f"2.{number}", calling_ae="A", event_type=2, now=2,
                    succeeded=[("1.2", uid) for uid, reason in verdicts if reason == 0],
                    failed=[("1.2", uid, reason) for uid, reason in verdicts if reason]) == 0x0000
            kept |= {uid for uid, reason in verdicts if reason == 0}
        assert (here.ledger.deliveries(job_id)[0]["state"] == "committed") == (kept == set(uids))
        assert set(commitment.uncommitted(here.ledger, row["id"])) == set(uids) - kept
