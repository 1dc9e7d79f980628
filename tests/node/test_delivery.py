"""Deliveries: until every instance is confirmed, none twice without need, and one peer never in another's way."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from dicomnode import operate, views
from dicomnode.config import Delivery
from dicomnode.delivery import Deliverer, backoff_s, judge
from dicomnode.ledger import NewJob
from tests.factories import pet_series
from tests.node.line import Line
from tests.peers import StoragePeer, free_port, wait_until

FAST = "[delivery]\nretry_s = 30\nretry_max_s = 3600\ngive_up_h = 2\nconnect_timeout_s = 2\ndimse_timeout_s = 5\n"
OTHER = '[[peer]]\nname = "SECOND"\nae_title = "SECOND"\nhost = "127.0.0.1"\nport = {port}\n'


def built(line: Line, *, send_to: tuple[str, ...] = ("PACS",), slices: int = 4, seed: int = 0) -> int:
    """A job whose derived series (any DICOM files will do) lies in its folder; its id."""
    series = pet_series(slices=slices, seed=seed)
    uid = line.receive(series)
    line.ledger.set_series(uid, "complete", now=line.now)
    new = NewJob(f"id{seed}", uid, str(series[0].StudyInstanceUID), None, "all-pet", "nearest", "default", {}, send_to,
                 ("1",))
    job_id = line.ledger.add_job(new, now=line.now)
    folder = line.spool.data_dir / "derived" / str(job_id)
    folder.mkdir()
    for number, dataset in enumerate(series):
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    line.ledger.claim("w", now=line.now, lease_s=60)
    assert line.ledger.built(job_id, "w", now=line.now, derived_instances=slices, report={},
                             derived_series_uid=str(series[0].SeriesInstanceUID), derived_path=f"derived/{job_id}")
    return job_id


def deliver(line: Line) -> Deliverer:
    """One tick, waited for."""
    deliverer = Deliverer(line.config, line.ledger, line.spool, clock=line.clock, rng=random.Random(0))
    deliverer.tick()
    for thread in deliverer._threads.values():
        thread.join(60)
    return deliverer


def states(line: Line, job_id: int) -> tuple[str, list[str]]:
    """(state of the job, states of its deliveries)."""
    return line.ledger.job(job_id)["state"], [row["state"] for row in line.ledger.deliveries(job_id)]


@pytest.fixture
def peer() -> Iterator[StoragePeer]:
    with StoragePeer() as peer:
        yield peer


def test_a_built_series_is_delivered_when_every_instance_is_confirmed(tmp_path: Path, peer: StoragePeer) -> None:
    """All 0x0000: delivered, each instance once."""
    with Line(tmp_path, port=peer.port, toml=FAST) as line:
        job_id = built(line)
        deliver(line)
        assert states(line, job_id) == ("delivered", ["delivered"])
        assert len(peer.datasets) == 4


def test_warnings_deliver_and_are_recorded(tmp_path: Path) -> None:
    """0xB000 for all: delivered, and the delivery says how many warnings."""
    with StoragePeer(status=lambda _: 0xB000) as peer, Line(tmp_path, port=peer.port, toml=FAST) as line:
        job_id = built(line)
        deliver(line)
        assert states(line, job_id) == ("delivered", ["delivered"])
        (row,) = line.ledger.deliveries(job_id)
        assert "4 warnings (0xB000)" in row["reason"]
        assert set(line.ledger.statuses(row["id"]).values()) == {0xB000}


def test_a_full_peer_is_tried_again_later_and_only_with_what_is_missing(tmp_path: Path) -> None:
    """0xA700 twice for two instances, then room: the second attempt sends those two alone."""
    full = {"2": 2, "3": 2}

    def status(dataset: Dataset) -> int:
        key = str(dataset.InstanceNumber)
        if full.get(key, 0):
            full[key] -= 1
            return 0xA700
        return 0x0000

    with StoragePeer(status=status) as peer, Line(tmp_path, port=peer.port, toml=FAST) as line:
        job_id = built(line)
        deliver(line)
        (row,) = line.ledger.deliveries(job_id)
        assert states(line, job_id) == ("sending", ["waiting"]) and row["attempts"] == 1
        assert "2 of 4 instances not stored: status 0xA700" in row["reason"]
        assert 0.75 * 30 <= row["next_at"] - line.now <= 1.25 * 30
        deliver(line)
        assert len(peer.datasets) == 2, "nothing is sent before its time"
        line.now = row["next_at"]
        deliver(line)
        assert states(line, job_id) == ("delivered", ["delivered"])
        assert sorted(int(ds.InstanceNumber) for ds in peer.datasets) == [1, 2, 3, 4]


def test_a_peer_that_drops_half_way_gets_only_the_rest(tmp_path: Path) -> None:
    """What was confirmed before the drop is not sent again."""
    got: list[int] = []

    def store(event: evt.Event) -> int:
        if len(got) == 2 and 0 not in got:
            got.append(0)
            event.assoc.abort()
        else:
            got.append(int(event.dataset.InstanceNumber))
        return 0x0000

    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.128")
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        with Line(tmp_path, port=port, toml=FAST) as line:
            job_id = built(line)
            deliver(line)
            assert states(line, job_id) == ("sending", ["waiting"])
            line.now += 3600
            deliver(line)
            assert states(line, job_id) == ("delivered", ["delivered"])
    finally:
        server.shutdown()
    assert got[2] == 0 and sorted(got) == [0, 1, 2, 3, 4]


def test_an_unreachable_peer_is_given_up_after_its_time_and_a_person_is_told(tmp_path: Path) -> None:
    """Waiting with backoff, then dead: the job is held with peer and remedy."""
    with Line(tmp_path, port=free_port(), toml=FAST) as line:
        job_id = built(line)
        deliver(line)
        assert states(line, job_id) == ("sending", ["waiting"])
        line.now += 2.1 * 3600
        deliver(line)
        assert states(line, job_id) == ("held", ["dead"])
        job = line.ledger.job(job_id)
        assert job["code"] == "delivery" and "PACS" in job["reason"] and "Remedy" in job["reason"]


def test_a_peer_that_refuses_the_objects_is_believed_after_some_attempts(tmp_path: Path) -> None:
    """0xC000 for an instance each time: dead long before give_up_h."""
    with StoragePeer(status=lambda ds: 0xC000 if ds.InstanceNumber == 1 else 0) as peer, \
            Line(tmp_path, port=peer.port, toml=FAST.replace("give_up_h = 2", "give_up_h = 9999")) as line:
        job_id = built(line)
        for _ in range(5):
            deliver(line)
            line.now += 7200
        assert states(line, job_id) == ("held", ["dead"])


def test_one_peer_down_does_not_delay_another(tmp_path: Path, peer: StoragePeer) -> None:
    """The second peer has everything while the first is still silent."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        toml = FAST + OTHER.format(port=peer.port)
        with Line(tmp_path, port=silent.getsockname()[1], toml=toml) as line:
            job_id = built(line, send_to=("PACS", "SECOND"))
            peer.ae_title = "SECOND"
            deliverer = Deliverer(line.config, line.ledger, line.spool, clock=line.clock)
            deliverer.tick()
            started = time.monotonic()
            wait_until("the second peer", lambda: states(line, job_id)[1][1] == "delivered", timeout_s=20)
            assert states(line, job_id) == ("sending", ["waiting", "delivered"])
            assert time.monotonic() - started < 20
            deliverer.close(30)


def test_down_hanging_refusing_and_slow_peers_block_nobody(tmp_path: Path) -> None:
    """Two jobs for five peers: the good one has both at once, the slow one when it can; the others say why not."""
    release = threading.Event()

    def hangs(_: Dataset) -> int:
        release.wait(60)
        return 0x0000

    def slow(_: Dataset) -> int:
        time.sleep(0.15)
        return 0x0000

    strict = AE("REFUSES")
    strict.require_calling_aet = ["SOMEBODY"]
    strict.add_supported_context("1.2.840.10008.5.1.4.1.1.128")
    ports = {"REFUSES": free_port(), "DOWN": free_port()}
    server = strict.start_server(("127.0.0.1", ports["REFUSES"]), block=False)
    with StoragePeer("GOOD") as good, StoragePeer("SLOW", status=slow) as slowly, \
            StoragePeer("HANGS", status=hangs) as hanging:
        ports |= {"GOOD": good.port, "SLOW": slowly.port, "HANGS": hanging.port}
        toml = FAST.replace("dimse_timeout_s = 5", "dimse_timeout_s = 30") + "".join(
            OTHER.format(port=port).replace("SECOND", name) for name, port in ports.items())
        with Line(tmp_path, toml=toml) as line:
            jobs = [built(line, send_to=("HANGS", "DOWN", "REFUSES", "SLOW", "GOOD"), seed=seed) for seed in (0, 1)]
            deliverer = Deliverer(line.config, line.ledger, line.spool, clock=line.clock, rng=random.Random(0))

            def rows(peer: str) -> list[dict[str, object]]:
                return [row for job in jobs for row in line.ledger.deliveries(job) if row["peer"] == peer]

            def all_of(peer: str) -> bool:
                deliverer.tick()
                return {row["state"] for row in rows(peer)} == {"delivered"}

            wait_until("both jobs at the good peer", lambda: all_of("GOOD"), timeout_s=15)
            wait_until("both jobs at the slow peer", lambda: all_of("SLOW"), timeout_s=15)
            assert [row["state"] for row in rows("HANGS")] == ["waiting", "waiting"] and not hanging.datasets
            wait_until("why not", lambda: all(row["reason"] for row in rows("DOWN") + rows("REFUSES")), timeout_s=15)
            assert all("does not answer" in str(row["reason"]) for row in rows("DOWN"))
            assert all("rejects the association" in str(row["reason"]) for row in rows("REFUSES"))
            assert [line.ledger.job(job)["state"] for job in jobs] == ["sending", "sending"]
            assert len(good.datasets) == len(slowly.datasets) == 8, "each instance once"
            release.set()
            wait_until("both jobs at the peer that hung", lambda: all_of("HANGS"), timeout_s=15)
            deliverer.close(10)
    assert server is not None
    server.shutdown()


def test_one_dead_peer_holds_the_job_after_the_others_have_it_and_retry_sends_to_it_alone(tmp_path: Path) -> None:
    """Given up after its age: held with that peer's reason, not the last one's. Retried: delivered."""
    with StoragePeer("SECOND") as second:
        port = free_port()
        with Line(tmp_path, port=port, toml=FAST + OTHER.format(port=second.port)) as line:
            job_id = built(line, send_to=("PACS", "SECOND"))
            line.now += 3 * 3600
            deliver(line)
            assert states(line, job_id) == ("held", ["dead", "delivered"])
            job = line.ledger.job(job_id)
            assert job["code"] == "delivery" and job["reason"].startswith("PACS: ")
            operate.retry(line.ledger, f"job:{job_id}", now=line.now, actor="me")
            with StoragePeer("PACS", port=port) as first:
                deliver(line)
                assert states(line, job_id) == ("delivered", ["delivered", "delivered"])
                assert len(first.datasets) == len(second.datasets) == 4


def test_show_tells_warnings_and_refusals_of_each_peer(tmp_path: Path) -> None:
    """How many instances were answered with which status, and what the peer said to it."""
    with StoragePeer(status=lambda ds: {1: 0xB007, 2: 0xA700}.get(int(ds.InstanceNumber), 0)) as peer, \
            Line(tmp_path, port=peer.port, toml=FAST) as line:
        job_id = built(line)
        deliver(line)
        study = line.ledger.job(job_id)["study_uid"]
        (shown,) = [series for series in views.show(line.ledger, study)["series"] if series["jobs"]]
        (delivery,) = shown["jobs"][0]["deliveries"]
        assert (delivery["accepted"], delivery["answered"], delivery["committed"]) == (3, 4, 0)
        assert [(remark["status"], remark["instances"]) for remark in delivery["remarks"]] == [
            ("0xA700", 1), ("0xB007", 1)]


def test_a_job_taken_away_is_not_sent_on(tmp_path: Path) -> None:
    """Cancelled in the middle: sending stops within a second or so, the state stays."""
    enough = threading.Event()

    def slow(_: Dataset) -> int:
        enough.set()
        time.sleep(0.4)
        return 0

    with StoragePeer(status=slow) as peer, Line(tmp_path, port=peer.port, toml=FAST) as line:
        job_id = built(line, slices=20)
        deliverer = Deliverer(line.config, line.ledger, line.spool, clock=line.clock)
        deliverer.tick()
        assert enough.wait(20)
        line.ledger.set_job(job_id, "cancelled", now=line.now, actor="me")
        for thread in deliverer._threads.values():
            thread.join(20)
        assert states(line, job_id) == ("cancelled", ["waiting"])
        assert len(peer.datasets) < 10


def test_closing_does_not_wait_for_a_silent_peer(tmp_path: Path) -> None:
    """The association is aborted, so that the process can end; the delivery stays due."""
    asked, answer = threading.Event(), threading.Event()

    def silent(_: Dataset) -> int:
        asked.set()
        answer.wait(30)
        return 0

    with StoragePeer(status=silent) as peer, Line(tmp_path, port=peer.port) as line:
        job_id = built(line)
        deliverer = Deliverer(line.config, line.ledger, line.spool, clock=line.clock)
        deliverer.tick()
        assert asked.wait(20)
        (association,) = deliverer._open.values()
        deliverer.close(0.2)
        wait_until("the association to end", lambda: not association.is_alive(), timeout_s=5)
        assert states(line, job_id) == ("sending", ["waiting"])
        answer.set()


def test_a_derived_series_that_lost_a_file_is_never_sent_in_part(tmp_path: Path, peer: StoragePeer) -> None:
    """Held; the remedy computes it again."""
    with Line(tmp_path, port=peer.port, toml=FAST) as line:
        job_id = built(line)
        next(line.spool.absolute(line.ledger.job(job_id)["derived_path"]).glob("*.dcm")).unlink()
        deliver(line)
        job = line.ledger.job(job_id)
        assert (job["state"], job["code"], job["derived_path"]) == ("held", "derived-lost", None)
        assert peer.datasets == []


def test_a_peer_missing_from_the_configuration_waits_for_a_person_to_add_it(tmp_path: Path) -> None:
    """The route's peer was removed while the job ran: not lost, tried again, with the reason."""
    with Line(tmp_path, toml=FAST) as line:
        job_id = built(line, send_to=("GONE",))
        deliver(line)
        assert states(line, job_id) == ("sending", ["waiting"])
        assert "no [[peer]] is named 'GONE'" in line.ledger.deliveries(job_id)[0]["reason"]


@given(st.lists(st.sampled_from([0x0000, 0xB000, 0xB007, 0xA700, 0xA900, 0xC000, 0x0122, 0xFE00]), max_size=20),
       st.integers(0, 5))
def test_delivered_means_that_every_instance_was_confirmed(statuses: list[int], unanswered: int) -> None:
    """For any answers: delivered if and only if all are success or warning and none is missing."""
    expected = len(statuses) + unanswered
    good = all(status == 0 or status >> 12 == 0xB for status in statuses)
    verdict = judge(statuses, expected=expected)
    assert verdict.delivered == (good and unanswered == 0)
    assert not (verdict.refused and verdict.delivered)
    if 0xA700 in statuses:
        assert not verdict.refused, "a full peer may have room later"


@given(st.integers(1, 1000), st.integers(0, 2**32))
def test_waits_grow_to_the_limit_and_never_beyond_with_jitter(attempts: int, seed: int) -> None:
    """Within 25 % of the doubling wait, capped; two seeds do not march in step."""
    delivery = Delivery(retry_s=30, retry_max_s=3600)
    wait = backoff_s(attempts, delivery, random.Random(seed))
    steady = min(3600.0, 30 * 2.0 ** min(attempts - 1, 40))
    assert 0.75 * steady <= wait <= 1.25 * steady
