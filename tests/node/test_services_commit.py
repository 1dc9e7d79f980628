"""Storage commitment as the SCP: what is safe here is said to be, and nothing else; no report is lost."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association

from dicomnode.config import parse
from dicomnode.ledger import Ledger
from dicomnode.services import commitscp
from dicomnode.services.commitscp import Reporter, Request, enter, verify
from dicomnode.spool import Spool
from dicomnode.stored import sha256_of
from dicomnode.troubles import Machine, find
from tests.factories import ct_series
from tests.node.line import Line
from tests.node.spoolpeers import PUSH_MODEL, PUSH_MODEL_INSTANCE, peers, send
from tests.peers import ReceiverProcess, free_port, wait_until

CT = str(CTImageStorage)


def asked_of(datasets: Sequence[Dataset]) -> list[tuple[str, str]]:
    return [(str(ds.SOPClassUID), str(ds.SOPInstanceUID)) for ds in datasets]


def action(transaction_uid: str, items: Sequence[tuple[str, str]]) -> Dataset:
    """The action information of a commitment request."""
    information = Dataset()
    information.TransactionUID = transaction_uid
    information.ReferencedSOPSequence = []
    for sop_class, uid in items:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        information.ReferencedSOPSequence.append(item)
    return information


class Listener:
    """A peer that hears commitment reports on associations opened to it; `status` is its answer."""

    def __init__(self, ae_title: str = "PACS", *, status: int = 0x0000) -> None:
        self.reports: list[tuple[int, Dataset]] = []
        self.status, self.port, self.ae_title = status, free_port(), ae_title

    def __enter__(self) -> Listener:
        ae = AE(self.ae_title)
        ae.add_supported_context(PUSH_MODEL, scu_role=True, scp_role=True)
        self._server = ae.start_server(("127.0.0.1", self.port), block=False,
                                       evt_handlers=[(evt.EVT_N_EVENT_REPORT, self.hear)])
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def hear(self, event: evt.Event) -> tuple[int, None]:
        self.reports.append((event.event_type, event.event_information))
        return self.status, None


# --- what is safe


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    with Line(tmp_path) as line:
        yield line


def verdict(line: Line, items: Sequence[tuple[str, str]], *, calling_ae: str = "SCANNER",
            **options: Any) -> dict[str, int]:
    """SOP Instance UID -> FailureReason, 0 for what is safe."""
    found = verify(line.ledger, line.spool, items, calling_ae=calling_ae, **options)
    return {uid: 0 for _, uid in found.safe} | {uid: reason for _, uid, reason in found.failed}


def kept(line: Line, datasets: Sequence[Dataset]) -> list[Path]:
    """Receive, with sizes and digests as the receiver enters them."""
    line.receive(datasets)
    paths = []
    for ds in datasets:
        row = line.ledger.known(ds.SOPInstanceUID)
        assert row is not None
        path = line.spool.absolute(row["path"])
        with line.ledger.transaction() as db:
            db.execute("UPDATE instance SET sha256 = ? WHERE sop_instance_uid = ?",
                       (sha256_of(path), ds.SOPInstanceUID))
        paths.append(path)
    return paths


def test_what_is_on_disk_is_safe_and_what_is_not_is_not(line):
    """Missing, cut short, changed within, never seen, of another class: each with its reason."""
    slices = ct_series(slices=6)
    uids = [str(ds.SOPInstanceUID) for ds in slices]
    paths = kept(line, slices)
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-2])
    paths[3].write_bytes(paths[3].read_bytes()[:-2] + b"\1\1")
    items = asked_of(slices)
    items[4] = ("1.2.840.10008.5.1.4.1.1.4", uids[4])
    found = verdict(line, [*items, (CT, "1.2.3")])
    assert [found[uid] for uid in (*uids, "1.2.3")] == [0, 0x0110, 0x0110, 0x0110, 0x0119, 0, 0x0112]


def test_large_requests_are_judged_by_size_alone(line):
    """Reading gigabytes again would hold up the node; a file of the wrong size is still found."""
    slices = ct_series(slices=2)
    paths = kept(line, slices)
    paths[0].write_bytes(paths[0].read_bytes()[:-2] + b"\1\1")
    paths[1].write_bytes(b"")
    assert list(verdict(line, asked_of(slices), digest_bytes=1).values()) == [0, 0x0110]


def test_what_was_purged_is_no_longer_held(line):
    """0x0112, even where a file is left."""
    slices = ct_series(slices=1)
    kept(line, slices)
    with line.ledger.transaction() as db:
        db.execute("UPDATE series SET purged_at = ?", (line.now + 1,))
    assert list(verdict(line, asked_of(slices)).values()) == [0x0112]


def test_what_came_after_a_purge_is_held(line):
    """A late slice of a series whose files were removed lies on disk: it can be committed to."""
    early, late = ct_series(slices=2)
    kept(line, [early])
    with line.ledger.transaction() as db:
        db.execute("UPDATE series SET purged_at = ?", (line.now + 1,))
    line.now += 2
    kept(line, [late])
    assert list(verdict(line, asked_of([early, late])).values()) == [0, 0x0112]


def test_bytes_that_were_only_put_aside_are_not_committed_to(line):
    """A peer whose object lost against another one under its UID must not delete its copy; the other may."""
    slices = ct_series(slices=1)
    kept(line, slices)
    slices[0].PatientComments = "other bytes"
    line.receive(slices, calling_ae="OTHER")
    assert list(verdict(line, asked_of(slices)).values()) == [0]
    assert list(verdict(line, asked_of(slices), calling_ae="OTHER").values()) == [0x0110]


# --- the request, over the network


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    archive = ('[[peer]]\nname = "ARCHIVE"\nae_title = "ARCHIVE"\nhost = "127.0.0.1"\nport = 1\nmay_send = false\n'
               'confirm = "commitment"\n')
    with ReceiverProcess(tmp_path_factory.mktemp("commit"), peers=peers(extra=archive)) as receiver:
        send(receiver, ct_series(slices=3))
        yield receiver


def requested(node: ReceiverProcess, information: Dataset, *, calling: str = "SCANNER", action_type: int = 1,
              handlers: Sequence[Any] = ()) -> tuple[Association, int]:
    """The association, still open, and the status of the N-ACTION."""
    ae = AE(calling)
    ae.dimse_timeout = ae.acse_timeout = 20
    assoc = ae.associate("127.0.0.1", node.port, [build_context(PUSH_MODEL, ExplicitVRLittleEndian)],
                         ae_title="NBDNODE", evt_handlers=list(handlers))
    assert assoc.is_established
    status, _ = assoc.send_n_action(information, action_type, PUSH_MODEL, PUSH_MODEL_INSTANCE)
    return assoc, int(status.Status)


def row_of(node: ReceiverProcess, transaction_uid: str) -> dict[str, Any]:
    with node.ledger() as ledger:
        rows = ledger.query("SELECT * FROM commitment_request WHERE transaction_uid = ?", (transaction_uid,))
    return dict(rows[0]) if rows else {}


def test_a_peer_that_stays_hears_the_report_on_its_association(node):
    """N-EVENT-REPORT 2: some are safe, one is not known; the ledger says that the peer was told."""
    heard: list[tuple[int, Dataset]] = []
    asked = [*asked_of(ct_series(slices=3)), (CT, "1.2.3")]
    assoc, status = requested(node, action("1.2.50", asked), handlers=[
        (evt.EVT_N_EVENT_REPORT, lambda event: heard.append((event.event_type, event.event_information)) or (0, None))])
    assert status == 0x0000
    wait_until("the report", lambda: heard, timeout_s=5)
    event_type, information = heard[0]
    assert event_type == 2 and information.TransactionUID == "1.2.50"
    assert {item.ReferencedSOPInstanceUID for item in information.ReferencedSOPSequence} == {
        uid for _, uid in asked[:3]}
    (failed,) = information.FailedSOPSequence
    assert (failed.ReferencedSOPInstanceUID, failed.FailureReason) == ("1.2.3", 0x0112)
    wait_until("the answer in the ledger", lambda: row_of(node, "1.2.50")["state"] == "answered", timeout_s=5)
    assoc.release()
    assert assoc.is_released


def test_a_peer_that_leaves_is_owed_the_report(node):
    """The request is durable before it is answered; the working process will tell."""
    assoc, status = requested(node, action("1.2.51", asked_of(ct_series(slices=3))))
    assoc.release()
    assert status == 0x0000 and row_of(node, "1.2.51")["state"] == "waiting"


@pytest.mark.parametrize(("information", "options", "expected"), [
    (action("1.2.52", []), {}, 0x0115),
    (action("", [(CT, "1.2.3")]), {}, 0x0115),
    (action("1.2.53", [(CT, "")]), {}, 0x0115),
    (action("1.2.54", [(CT, "1.2.3")]), {"action_type": 2}, 0x0123),
    (action("1.2.55", [(CT, "1.2.3")]), {"calling": "VIEWER"}, 0x0124),
])
def test_what_is_no_request_is_refused(node, information, options, expected):
    """By its status, and nothing is entered; the association stays."""
    assoc, status = requested(node, information, **options)
    assert status == expected and not row_of(node, str(information.TransactionUID))
    assoc.release()
    assert assoc.is_released


def test_the_same_transaction_is_answered_again_but_not_for_other_objects(node):
    """A repeated request is no harm; a UID that is used twice is."""
    for items, expected in (([(CT, "1.2.3")], 0x0000), ([(CT, "1.2.3")], 0x0000), ([(CT, "1.2.4")], 0x0115)):
        assoc, status = requested(node, action("1.2.56", items))
        assoc.release()
        assert status == expected


def test_a_request_beyond_the_limit_is_refused_not_swallowed(node):
    """22,000 references are more than is kept in memory: an answer, and the association goes on."""
    assoc, status = requested(node, action("1.2.57", [(CT, f"1.2.3.{number:050d}"[:60].replace(".0", ".1"))
                                                      for number in range(22_000)]))
    assert status == 0x0110 and node.memory_mb() < 150
    assoc.release()
    assert assoc.is_released


@pytest.mark.parametrize("calling", ["PACS", "ARCHIVE"])
def test_a_report_on_what_we_never_asked_is_refused(node, calling):
    """N-EVENT-REPORT from a peer in the SCP role: accepted as Orthanc proposes it, also of one that may not send but
    was asked (confirm); an unknown transaction is not."""
    ae = AE(calling)
    ae.dimse_timeout = ae.acse_timeout = 20
    assoc = ae.associate("127.0.0.1", node.port, [build_context(PUSH_MODEL, ExplicitVRLittleEndian)],
                         ae_title="NBDNODE", ext_neg=[build_role(PUSH_MODEL, scp_role=True)])
    assert assoc.is_established and assoc.accepted_contexts[0].as_scp
    status, _ = assoc.send_n_event_report(action("1.2.99", [(CT, "1.2.3")]), 1, PUSH_MODEL, PUSH_MODEL_INSTANCE)
    assert status.Status == 0x0115
    assoc.release()


# --- the report, on an association of our own


class Owing:
    """A ledger that owes PACS a report; the clock stands still."""

    def __init__(self, folder: Path, *, port: int | None) -> None:
        self.config = parse(f'[node]\ndata_dir = "{folder}"\n[delivery]\nconnect_timeout_s = 2\ndimse_timeout_s = 2\n'
                            '[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\n'
                            + (f"port = {port}\n" if port else ""))
        self.spool, self.now = Spool(folder), 1000.0
        self.ledger = Ledger(self.spool.ledger_path)
        enter(self.ledger, Request("1.2.60", ((CT, "1.2.3"),)), calling_ae="PACS", address="127.0.0.1", now=self.now)
        self.reporter = Reporter(self.config, self.ledger, self.spool, clock=lambda: self.now, rng=random.Random(1))

    def after(self, seconds: float) -> dict[str, Any]:
        """Let time go, tick, wait for what it started; the row."""
        self.now += seconds
        self.reporter.tick()
        self.reporter.lanes.join(10)
        return dict(self.ledger.query("SELECT * FROM commitment_request")[0])


def test_the_report_goes_out_on_a_new_association(tmp_path):
    """Not before the association that asked has had its time; we propose the SCP role."""
    with Listener() as pacs:
        owing = Owing(tmp_path, port=pacs.port)
        assert owing.after(1)["state"] == "waiting" and not pacs.reports
        assert owing.after(commitscp.SAME_ASSOCIATION_S)["state"] == "answered"
        ((event_type, information),) = pacs.reports
        assert event_type == 2 and information.FailedSOPSequence[0].FailureReason == 0x0112
        owing.after(1000)
        assert len(pacs.reports) == 1


def test_a_peer_that_is_down_is_asked_again_for_a_day(tmp_path):
    """With growing pauses; then given up, and said so in the history."""
    owing = Owing(tmp_path, port=free_port())
    first = owing.after(30)
    assert first["state"] == "waiting" and first["attempts"] == 1 and first["next_at"] > owing.now
    assert owing.after(0)["attempts"] == 1
    assert owing.after(commitscp.GIVE_UP_S)["state"] == "given-up"
    assert owing.ledger.events()[-1]["to_state"] == "given-up"


def test_a_transaction_that_is_over_keeps_no_list_and_its_uid_may_be_used_again(tmp_path):
    """The lists of a year would make much of the ledger; one that is still owed may not be changed."""
    with Listener() as pacs:
        owing = Owing(tmp_path, port=pacs.port)
        other = Request("1.2.60", ((CT, "1.2.4"),))
        with pytest.raises(commitscp.BadRequest, match="in use"):
            enter(owing.ledger, other, calling_ae="PACS", address="127.0.0.1", now=owing.now)
        row = owing.after(30)
        assert (row["state"], row["items"]) == ("answered", "[]")
        enter(owing.ledger, other, calling_ae="PACS", address="127.0.0.1", now=owing.now)
        assert owing.after(30)["state"] == "answered"
    assert pacs.reports[1][1].FailedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.4"


def test_a_report_that_was_given_up_is_a_trouble_for_two_days(tmp_path):
    """The peer believes that nothing is safe here, or waits for ever: a person is told whom to ask."""
    owing = Owing(tmp_path, port=free_port())
    machine = Machine(free_bytes=2**40)
    owing.after(30)
    assert not find(owing.ledger, owing.config, machine, now=owing.now)
    owing.after(commitscp.GIVE_UP_S)
    (trouble,) = find(owing.ledger, owing.config, machine, now=owing.now)
    assert trouble.key == "commitment:PACS" and "1 request" in trouble.text
    assert not find(owing.ledger, owing.config, machine, now=owing.now + 3 * 86400)


def test_a_report_that_the_peer_refuses_is_sent_again(tmp_path):
    """Another status than success is no answer."""
    with Listener(status=0x0110) as pacs:
        owing = Owing(tmp_path, port=pacs.port)
        row = owing.after(30)
        assert row["state"] == "waiting" and "0x0110" in row["reason"]
        pacs.status = 0x0000
        assert owing.after(4000)["state"] == "answered"


def test_a_clock_that_was_set_back_delays_no_report(tmp_path):
    """A time further ahead than any pause is taken for now."""
    with Listener() as pacs:
        assert Owing(tmp_path, port=pacs.port).after(-50_000)["state"] == "answered"


def test_a_peer_without_a_port_cannot_be_told(tmp_path):
    """Given up at once, with the remedy."""
    row = Owing(tmp_path, port=None).after(30)
    assert row["state"] == "given-up" and "peer.port" in row["reason"]


def test_a_tick_never_waits(tmp_path):
    """A peer that accepts connections and says nothing holds up nobody."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        owing = Owing(tmp_path, port=silent.getsockname()[1])
        owing.now += 30
        began = time.monotonic()
        owing.reporter.tick()
        assert time.monotonic() - began < 0.5 and threading.active_count() > 1
        owing.reporter.lanes.join(10)
        assert owing.ledger.query("SELECT attempts FROM commitment_request")[0]["attempts"] == 1
