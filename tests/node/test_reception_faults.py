"""What must not break reception: hostile bytes, peers that stop half-way, full disks, damaged files, kill -9."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import _config

from dicomnode.ledger import Ledger
from tests.factories import ct_series
from tests.peers import ReceiverProcess, associate, echoscu, encoded, store_encoded, wait_until

CT = [(CTImageStorage, [ExplicitVRLittleEndian])]
SUCCESS = 0x0000


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(body)) + body


def _echo_request() -> bytes:
    """A-ASSOCIATE-RQ of SCANNER for C-ECHO (PS3.8 section 9.3.2)."""
    context = _item(0x20, b"\1\0\0\0" + _item(0x30, b"1.2.840.10008.1.1") + _item(0x40, b"1.2.840.10008.1.2"))
    user = _item(0x50, _item(0x51, struct.pack(">I", 16384)) + _item(0x52, b"1.2.826.0.1.3680043"))
    body = (b"\0\1\0\0" + b"NBDNODE".ljust(16) + b"SCANNER".ljust(16) + bytes(32)
            + _item(0x10, b"1.2.840.10008.3.1.1.1") + context + user)
    return b"\1\0" + struct.pack(">I", len(body)) + body


ECHO_REQUEST = _echo_request()


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    with ReceiverProcess(tmp_path_factory.mktemp("receiver"), reception="low_disk_mb = 1\nnetwork_timeout_s = 2\n"
                         "acse_timeout_s = 2\ndimse_timeout_s = 10") as process:
        yield process


def ct(number: int, *, slices: int = 1) -> list[Dataset]:
    return ct_series(slices=slices, seed=number)


def lies_intact(receiver: ReceiverProcess, sop_instance_uid: str, data_set: bytes | None = None,
                ledger: Ledger | None = None) -> bool:
    """Whether ledger and disk hold that instance, whole (and it is these bytes)."""
    with nullcontext(ledger) if ledger else receiver.ledger() as opened:
        row = opened.known(sop_instance_uid)
    if row is None:
        return False
    data = (receiver.data_dir / row["path"]).read_bytes()
    meta_length = struct.unpack_from("<I", data, 140)[0]
    kept = data[144 + meta_length:]
    assert len(data) == row["bytes"]
    assert hashlib.sha256(kept).hexdigest() == row["sha256"], "the object on disk is not the one acknowledged"
    return data_set is None or kept == data_set


def connection(receiver: ReceiverProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", receiver.port), timeout=10)


def closed_by_peer(sock: socket.socket, *, timeout_s: float) -> bool:
    """Whether the other end closes within that time, whatever it says before."""
    sock.settimeout(timeout_s)
    try:
        while sock.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


# --- hostile bytes


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_data_sets_are_answered_and_what_is_accepted_is_kept_as_sent(
        receiver: ReceiverProcess, monkeypatch: pytest.MonkeyPatch):
    """300 seeded mutations, two in three of them in the header: every one answered on a living association."""
    monkeypatch.setitem(_config.VALIDATORS, "UI", lambda value: (True, ""))
    rng = random.Random(20260)
    assoc = associate(receiver.port, CT)
    ledger = receiver.ledger()
    counts: dict[int, int] = {}
    dataset = ct(10_000)[0]
    for number in range(300):
        dataset.SOPInstanceUID = f"2.25.99{number}"
        data = mutated(encoded(dataset), rng)
        response = store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, data)
        assert response is not None and response.Status is not None, f"mutation {number} was not answered"
        counts[response.Status] = counts.get(response.Status, 0) + 1
        if response.Status == SUCCESS:
            assert lies_intact(receiver, dataset.SOPInstanceUID, data, ledger), f"mutation {number} is not kept as sent"
        else:
            assert not lies_intact(receiver, dataset.SOPInstanceUID, ledger=ledger)
    assoc.release()
    ledger.close()
    assert set(counts) <= {SUCCESS, 0xA900, 0xC000}, {hex(status): n for status, n in counts.items()}
    assert counts[SUCCESS] > 50
    assert counts[0xC000] > 20
    assert list((receiver.data_dir / "incoming").iterdir()) == []


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Flipped, cut, doubled, filled or swapped somewhere."""
    end = len(data) if rng.random() < 0.34 else min(len(data), 700)
    at = rng.randrange(end)
    size = rng.choice([1, 1, 2, 4, 8, 64])
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + size:]
    if kind == 2:
        return data[:at] + data[at:at + size] * 2 + data[at + size:]
    if kind == 3:
        return data[:at] + bytes([rng.choice([0x00, 0xff])]) * size + data[at + size:]
    if kind == 4:
        return data[:at] + rng.randbytes(size) + data[at + size:]
    other = rng.randrange(end)
    return data[:at] + data[other:other + size] + data[at + size:]


def test_port_probes_and_mutated_pdus_neither_stop_nor_fill_the_receiver(receiver: ReceiverProcess):
    """300 connections: silent, HTTP, random bytes, mutated A-ASSOCIATE-RQ; then a C-ECHO; few events, flat memory."""
    rng = random.Random(20261)
    before = receiver.memory_mb()
    with receiver.ledger() as ledger:
        events_before = len(ledger.events())
    for number in range(300):
        with connection(receiver) as sock:
            what = number % 4
            if what == 1:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            elif what == 2:
                sock.sendall(rng.randbytes(rng.randrange(1, 300)))
            elif what == 3:
                sock.sendall(ECHO_REQUEST[:6] + mutated(ECHO_REQUEST[6:], rng))
    assert echoscu(receiver.port).returncode == 0
    with receiver.ledger() as ledger:
        assert len(ledger.events()) - events_before < 50
    assert receiver.memory_mb() - before < 20
    wait_until("its threads to end", lambda: threads(receiver) < 40, timeout_s=20)


def test_silent_connections_do_not_keep_others_out(tmp_path: Path):
    """More of them than there are places: the oldest has to go, a peer with a request is served at once."""
    with ReceiverProcess(tmp_path, reception="low_disk_mb = 1\nmax_associations = 5") as receiver:
        silent = [connection(receiver) for _ in range(50)]
        assert echoscu(receiver.port).returncode == 0
        assert closed_by_peer(silent[0], timeout_s=5)
        assert threads(receiver) < 80
        for sock in silent:
            sock.close()


def threads(receiver: ReceiverProcess) -> int:
    assert receiver.process is not None
    return len(os.listdir(f"/proc/{receiver.process.pid}/task"))


def test_plain_association_request_of_the_probe_is_a_valid_one(receiver: ReceiverProcess):
    """The PDU that the mutations start from is accepted as it is."""
    with connection(receiver) as sock:
        sock.sendall(ECHO_REQUEST)
        assert sock.recv(1) == b"\x02"  # A-ASSOCIATE-AC


def test_pdu_longer_than_announced_ends_the_association_without_growing(receiver: ReceiverProcess):
    """A length of 4 GB: the connection is closed, memory stays."""
    before = receiver.memory_mb()
    with connection(receiver) as sock:
        sock.sendall(ECHO_REQUEST)
        assert sock.recv(1) == b"\x02"
        sock.sendall(b"\x04\x00\xff\xff\xff\xf0" + bytes(1000))
        assert closed_by_peer(sock, timeout_s=5)
    assert receiver.memory_mb() - before < 10


# --- peers that stop


def test_peers_that_fall_silent_are_let_go_and_block_nobody(receiver: ReceiverProcess):
    """Connected only; stopped in a PDU; idle after association: all closed in time, others served meanwhile."""
    silent, halfway, idle = (connection(receiver) for _ in range(3))
    halfway.sendall(ECHO_REQUEST)
    assert halfway.recv(1) == b"\x02"
    halfway.sendall(b"\x04\x00\x00\x00\x10\x00" + bytes(100))
    idle.sendall(ECHO_REQUEST)
    assert echoscu(receiver.port).returncode == 0
    for sock in (silent, halfway, idle):
        assert closed_by_peer(sock, timeout_s=12)
        sock.close()


def test_object_broken_off_half_way_leaves_nothing(receiver: ReceiverProcess):
    """The sender vanishes in the middle of a data set: no file, no row; a later send is a success."""
    dataset = ct(20_000)[0]
    dataset.PixelData = bytes(600_000)
    data = encoded(dataset)
    assoc = associate(receiver.port, CT)
    sock = assoc.dul.socket.socket
    sent = 0
    send = sock.send

    class Cut:
        """The socket of a peer whose power fails after 300 kB."""

        def __getattr__(self, name: str) -> object:
            return getattr(sock, name)

        def send(self, chunk: bytes) -> int:
            nonlocal sent
            sent += len(chunk)
            if sent > 300_000:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
                raise OSError("gone")
            return send(chunk)

    assoc.dul.socket.socket = Cut()
    store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, data)
    wait_until("the half object to be gone", lambda: not list((receiver.data_dir / "incoming").iterdir()))
    assert not lies_intact(receiver, dataset.SOPInstanceUID)
    again = associate(receiver.port, CT)
    assert store_encoded(again, CTImageStorage, dataset.SOPInstanceUID, data).Status == SUCCESS
    again.release()
    assert lies_intact(receiver, dataset.SOPInstanceUID, data)


# --- disk


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_full_disk_is_answered_out_of_resources_and_reception_recovers(tmp_path: Path):
    """A data directory of 6 MB: 0xA700 when it is full, nothing half-kept; success again when there is room."""
    small = tmp_path / "node" / "data"
    small.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        ballast = small / "ballast"
        with ReceiverProcess(tmp_path / "node", reception="low_disk_mb = 0") as receiver:
            ballast.write_bytes(bytes(2_500_000))
            assoc = associate(receiver.port, CT)
            statuses = []
            for number in range(30):
                dataset = ct(30_000 + number)[0]
                dataset.PixelData = bytes(400_000)
                statuses.append(store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, encoded(dataset)).Status)
                assert lies_intact(receiver, dataset.SOPInstanceUID) == (statuses[-1] == SUCCESS)
            assert set(statuses) <= {SUCCESS, 0xA700, 0x0110}
            assert statuses[0] == SUCCESS
            assert statuses[-1] in (0xA700, 0x0110)
            assert 0xA700 in statuses
            assert list((small / "incoming").iterdir()) == []
            ballast.unlink()
            assert store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, encoded(dataset)).Status == SUCCESS
            assoc.release()
            assert lies_intact(receiver, dataset.SOPInstanceUID)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_object_missing_or_short_on_disk_is_restored_by_a_resend(receiver: ReceiverProcess):
    """A repeat is answered 0x0000 only if the bytes are really there."""
    first, second = ct(40_000, slices=2)
    assoc = associate(receiver.port, CT)
    for dataset in (first, second):
        assert store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, encoded(dataset)).Status == SUCCESS
    with receiver.ledger() as ledger:
        paths = [receiver.data_dir / ledger.known(ds.SOPInstanceUID)["path"] for ds in (first, second)]
    paths[0].unlink()
    os.truncate(paths[1], 100)
    for dataset in (first, second):
        assert store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, encoded(dataset)).Status == SUCCESS
        assert lies_intact(receiver, dataset.SOPInstanceUID, encoded(dataset))
    assoc.release()


def test_folder_removed_by_housekeeping_is_made_again(receiver: ReceiverProcess):
    """A late instance of a series whose folder is gone."""
    first, second = ct(41_000, slices=2)
    assoc = associate(receiver.port, CT)
    assert store_encoded(assoc, CTImageStorage, first.SOPInstanceUID, encoded(first)).Status == SUCCESS
    folder = receiver.data_dir / "objects" / first.StudyInstanceUID
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    assert store_encoded(assoc, CTImageStorage, second.SOPInstanceUID, encoded(second)).Status == SUCCESS
    assoc.release()
    assert lies_intact(receiver, second.SOPInstanceUID, encoded(second))


def test_damaged_ledger_is_found_at_start(tmp_path: Path):
    """The receiver does not accept associations on a ledger it cannot trust, and says what to do."""
    with ReceiverProcess(tmp_path) as receiver:
        assoc = associate(receiver.port, CT)
        for dataset in ct(42_000, slices=40):
            assert store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, encoded(dataset)).Status == SUCCESS
        assoc.release()
    ledger = receiver.data_dir / "ledger.sqlite3"
    data = bytearray(ledger.read_bytes())
    data[4096:] = random.Random(1).randbytes(len(data) - 4096)
    ledger.write_bytes(data)
    with pytest.raises(AssertionError, match=r"Remedy: .*backup"):
        receiver.start()
    receiver.kill()


# --- kill -9


def test_nothing_acknowledged_is_lost_by_kill_9(tmp_path: Path):
    """Three senders, ten kills at random moments: what was answered 0x0000 lies intact; a resend completes."""
    rng = random.Random(9)
    receiver = ReceiverProcess(tmp_path)
    series = [ct(50_000 + sender, slices=60) for sender in range(3)]
    data = {ds.SOPInstanceUID: encoded(ds) for one in series for ds in one}
    acknowledged: set[str] = set()
    done = threading.Event()

    def send(datasets: list[Dataset]) -> None:
        """Again and again until each was answered with success, then from the start: repeats are sent too."""
        left: list[Dataset] = []
        while not done.is_set():
            left = left or list(datasets)
            assoc = associate(receiver.port, CT)
            if not assoc.is_established:
                time.sleep(0.05)
                continue
            while left and not done.is_set():
                uid = left[-1].SOPInstanceUID
                response = store_encoded(assoc, CTImageStorage, uid, data[uid])
                if response is None or response.Status is None:
                    break
                assert response.Status == SUCCESS, hex(response.Status)
                acknowledged.add(uid)
                left.pop()
            if assoc.is_established:
                assoc.release()

    receiver.start()
    with ThreadPoolExecutor(3) as pool:
        senders = [pool.submit(send, one) for one in series]
        for _ in range(10):
            time.sleep(rng.uniform(0.1, 0.8))
            receiver.kill()
            with receiver.ledger() as ledger:
                for uid in set(acknowledged):
                    assert lies_intact(receiver, uid, data[uid], ledger), f"{uid} was acknowledged and is lost"
            receiver.start()
        wait_until("every instance to be acknowledged", lambda: len(acknowledged) == len(data), timeout_s=40)
        done.set()
        for sender in senders:
            sender.result(30)
    assert receiver.stop() == 0
    with receiver.ledger() as ledger:
        assert all(lies_intact(receiver, uid, data[uid], ledger) for uid in data)
        assert ledger.counts()["instance"]["all"] == len(data)
        assert all(not ledger.conflicts(one[0].SeriesInstanceUID) for one in series)
    assert sum(1 for path in (receiver.data_dir / "objects").rglob("*.dcm")) == len(data)
    assert list((receiver.data_dir / "incoming").iterdir()) == []


def test_object_on_disk_without_a_row_does_not_hinder_a_resend(tmp_path: Path):
    """As a kill between rename and commit leaves it: never acknowledged, so also other bytes may take its place."""
    dataset = ct(60_000)[0]
    receiver = ReceiverProcess(tmp_path)
    place = (receiver.data_dir / "objects" / dataset.StudyInstanceUID / dataset.SeriesInstanceUID
             / f"{dataset.SOPInstanceUID}.dcm")
    place.parent.mkdir(parents=True)
    place.write_bytes(b"left by a process that was killed")
    (receiver.data_dir / "incoming").mkdir()
    (receiver.data_dir / "incoming" / "left.part").write_bytes(b"half an object")
    with receiver:
        assert list((receiver.data_dir / "incoming").iterdir()) == []
        assoc = associate(receiver.port, CT)
        assert store_encoded(assoc, CTImageStorage, dataset.SOPInstanceUID, encoded(dataset)).Status == SUCCESS
        assoc.release()
        assert lies_intact(receiver, dataset.SOPInstanceUID, encoded(dataset))


def test_second_receiver_on_the_same_data_directory_is_refused(receiver: ReceiverProcess, tmp_path: Path):
    """It would sweep away what the first is writing."""
    second = ReceiverProcess(tmp_path)
    text = second.config_path.read_text(encoding="utf-8").replace(str(second.data_dir), str(receiver.data_dir))
    second.config_path.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match="another receiver uses"):
        second.start()
    second.kill()
    assert echoscu(receiver.port).returncode == 0


def test_sigterm_ends_the_receiver_cleanly_with_associations_open(tmp_path: Path):
    """Exit code 0 within seconds; the peer's association is aborted."""
    receiver = ReceiverProcess(tmp_path)
    receiver.start()
    assoc = associate(receiver.port, CT)
    assert receiver.stop(timeout_s=10) == 0
    wait_until("the abort to arrive", lambda: not assoc.is_established)
    assert "receiver_stopped" in receiver.log()
