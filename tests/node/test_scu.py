"""Sending a series: what the peer does decides, and it is reported instance by instance."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider

from dicomnode import requesting, scu
from dicomnode.config import Peer
from dicomnode.errors import PeerUnreachable
from tests.factories import ct_series, pet_series
from tests.peers import StoragePeer, free_port, wait_until

TIMES = {"connect_timeout_s": 5.0, "dimse_timeout_s": 5.0}


def peer_at(port: int | None, ae_title: str = "PACS") -> Peer:
    return Peer(name="PACS", ae_title=ae_title, host="127.0.0.1", port=port)


def saved(folder: Path, datasets: list[Dataset]) -> list[Path]:
    paths = [folder / f"{number:03d}.dcm" for number in range(len(datasets))]
    for path, dataset in zip(paths, datasets, strict=True):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def send(port: int, files: list[Path], **options: Any) -> tuple[list[scu.Answer], list[scu.Answer]]:
    """(the last answers, all answers as they came)."""
    heard: list[scu.Answer] = []
    last = scu.send(peer_at(port), files, calling_ae="NBDNODE", on_answer=heard.append, **{**TIMES, **options})
    return last, heard


def once(uid_status: dict[str, int]) -> Callable[[Dataset], int]:
    """Answers the given status the first time an instance comes, success from then on."""
    left = dict(uid_status)
    return lambda dataset: left.pop(str(dataset.SOPInstanceUID), 0x0000)


def test_a_series_arrives_whole_over_one_association(tmp_path: Path) -> None:
    """Every instance is answered 0x0000, and one association was enough."""
    series = pet_series(slices=4)
    with StoragePeer() as peer:
        last, _ = send(peer.port, saved(tmp_path, series))
        assert peer.associations == 1
    assert [answer.status for answer in last] == [0] * 4
    assert {str(ds.SOPInstanceUID) for ds in peer.datasets} == {str(ds.SOPInstanceUID) for ds in series}
    assert all(np.array_equal(sent.pixel_array, ds.pixel_array) for sent, ds in zip(peer.datasets, series, strict=True))


def test_an_instance_refused_once_is_sent_again_by_itself(tmp_path: Path) -> None:
    """0xA700 for one instance: the others are stored, the one comes once more, and both answers are reported."""
    series = pet_series(slices=4)
    uid = str(series[1].SOPInstanceUID)
    with StoragePeer(status=once({uid: 0xA700})) as peer:
        last, heard = send(peer.port, saved(tmp_path, series))
    assert [answer.status for answer in last] == [0] * 4
    assert [answer.status for answer in heard if answer.sop_instance_uid == uid] == [0xA700, 0]


def test_a_warning_counts_as_stored(tmp_path: Path) -> None:
    """0xB000, coercion of data elements: stored, not sent again, and the answer tells."""
    with StoragePeer(status=lambda _: 0xB000) as peer:
        last, heard = send(peer.port, saved(tmp_path, pet_series(slices=3)))
    assert [answer.status for answer in last] == [0xB000] * 3 and len(heard) == 3
    assert all(answer.stored for answer in last)


def test_an_instance_refused_twice_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    """One bad instance fails alone."""
    series = pet_series(slices=4)
    bad = str(series[0].SOPInstanceUID)
    with StoragePeer(status=lambda ds: 0xC000 if str(ds.SOPInstanceUID) == bad else 0) as peer:
        last, _ = send(peer.port, saved(tmp_path, series))
    assert [answer.status for answer in last] == [0xC000, 0, 0, 0]


def test_a_peer_that_takes_only_uncompressed_objects_gets_them_decompressed(tmp_path: Path) -> None:
    """RLE on our disk, Explicit VR Little Endian on theirs, same pixels."""
    series = pet_series(slices=2)
    pixels = [dataset.pixel_array.copy() for dataset in series]
    for dataset in series:
        dataset.compress(RLELossless, generate_instance_uid=False)
    with StoragePeer() as peer:  # pynetdicom's default contexts are uncompressed
        last, _ = send(peer.port, saved(tmp_path, series))
    assert [answer.status for answer in last] == [0, 0]
    assert all(not ds.file_meta.TransferSyntaxUID.is_compressed for ds in peer.datasets)
    assert all(np.array_equal(ds.pixel_array, want) for ds, want in zip(peer.datasets, pixels, strict=True))


def test_a_peer_that_takes_only_implicit_vr_is_served(tmp_path: Path) -> None:
    """The plain context offers both plain transfer syntaxes."""
    series = pet_series(slices=2)
    assert series[0].file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    ae, got = AE("PACS"), []
    ae.add_supported_context(series[0].SOPClassUID, ImplicitVRLittleEndian)
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False,
                             evt_handlers=[(evt.EVT_C_STORE, lambda event: got.append(event.context) or 0)])
    try:
        last, _ = send(port, saved(tmp_path, series))
    finally:
        server.shutdown()
    assert [answer.status for answer in last] == [0, 0] and len(got) == 2


def test_an_object_goes_out_as_it_lies_whatever_the_peer_prefers(tmp_path: Path) -> None:
    """A peer that takes both plain syntaxes and would choose Implicit VR gets Explicit VR, byte for byte: Implicit VR
    would cost private attributes their VR, and us the memory for the whole object."""
    got: list[tuple[str, bytes]] = []
    ae = AE("PACS")
    files = saved(tmp_path, pet_series(slices=1))
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.128", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda event: got.append(
        (event.context.transfer_syntax, event.request.DataSet.getvalue())) or 0)])
    try:
        last, _ = send(port, files)
    finally:
        server.shutdown()
    ((syntax, data),) = got
    assert [answer.status for answer in last] == [0] and syntax == ExplicitVRLittleEndian
    assert files[0].read_bytes().endswith(data) and len(data) > 1000


def ct_only() -> AE:
    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.2")
    return ae


def test_a_sop_class_the_peer_does_not_know_is_told_per_instance(tmp_path: Path) -> None:
    """A peer for CT only: the CT is stored, the PET gets status 0x0122, once and without an exception."""
    port = free_port()
    server = ct_only().start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: 0)])
    try:
        last, heard = send(port, saved(tmp_path, [*pet_series(slices=1), *ct_series(slices=1)]))
    finally:
        server.shutdown()
    assert [answer.status for answer in last] == [0x0122, 0] and len(heard) == 2


def test_a_peer_that_knows_nothing_we_send_is_named(tmp_path: Path) -> None:
    """No presentation context at all: PeerUnreachable names the SOP class."""
    port = free_port()
    server = ct_only().start_server(("127.0.0.1", port), block=False)
    try:
        with pytest.raises(PeerUnreachable, match="no presentation context for Positron Emission"):
            send(port, saved(tmp_path, pet_series(slices=1)))
    finally:
        server.shutdown()


def test_nobody_there_is_peer_unreachable(tmp_path: Path) -> None:
    """A closed port: the message names the peer and a remedy."""
    with pytest.raises(PeerUnreachable, match=r"PACS .*does not answer.*Remedy"):
        send(free_port(), saved(tmp_path, pet_series(slices=1)))


def test_a_rejection_is_peer_unreachable_and_says_why(tmp_path: Path) -> None:
    """A peer that does not know our AE title."""
    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.128")
    ae.require_calling_aet = ["SOMEBODY"]
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False)
    try:
        with pytest.raises(PeerUnreachable, match="rejects the association"):
            send(port, saved(tmp_path, pet_series(slices=1)))
    finally:
        server.shutdown()


def test_a_peer_that_drops_half_way_leaves_the_answers_so_far(tmp_path: Path) -> None:
    """The peer aborts at the third instance: two answers were reported, then PeerUnreachable."""
    count = threading.Semaphore(2)

    def store(event: evt.Event) -> int:
        if not count.acquire(blocking=False):
            event.assoc.abort()
        return 0x0000

    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.128")
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    heard: list[scu.Answer] = []
    try:
        with pytest.raises(PeerUnreachable):
            scu.send(peer_at(port), saved(tmp_path, pet_series(slices=5)), calling_ae="NBDNODE", on_answer=heard.append,
                     **TIMES)
    finally:
        server.shutdown()
    assert [answer.status for answer in heard] == [0, 0]


def test_a_silent_peer_does_not_hold_us_for_ever(tmp_path: Path) -> None:
    """A port that accepts the connection and says nothing is given up after the timeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(PeerUnreachable):
            send(listener.getsockname()[1], saved(tmp_path, pet_series(slices=1)), connect_timeout_s=1.0)


def test_sending_stops_between_instances_when_told(tmp_path: Path) -> None:
    """`stopped` is asked before each instance; the rest is left unsent."""
    heard: list[scu.Answer] = []
    with StoragePeer() as peer:
        last = scu.send(peer_at(peer.port), saved(tmp_path, pet_series(slices=5)), calling_ae="NBDNODE",
                        on_answer=heard.append, stopped=lambda: len(heard) >= 2, **TIMES)
    assert len(last) == len(peer.datasets) == 2


def test_echo_succeeds_or_says_who_does_not_answer() -> None:
    """C-ECHO against a peer, and against nobody."""
    with StoragePeer() as peer:
        scu.echo(peer_at(peer.port), calling_ae="NBDNODE", **TIMES)
    with pytest.raises(PeerUnreachable, match="PACS"):
        scu.echo(peer_at(peer.port), calling_ae="NBDNODE", **TIMES)


def test_no_answer_is_lost_to_the_association_s_own_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That thread is held up between saying that it is paused and looking for messages, as on a busy machine; who waits
    for the answer is even later."""
    def held_up(self: threading.Event, timeout: float | None = None) -> bool:
        was_set = self.is_set()
        answer = threading.Event.wait(self, timeout)
        if was_set:
            time.sleep(0.03)
        return answer

    def late(self: DIMSEServiceProvider, block: bool = False) -> Any:
        if block:
            time.sleep(0.06)
        return taken(self, block)

    taken = DIMSEServiceProvider.get_msg
    monkeypatch.setattr(DIMSEServiceProvider, "get_msg", late)
    monkeypatch.setattr(requesting._Checkpoint, "wait", held_up)
    with StoragePeer() as peer:
        last, _ = send(peer.port, saved(tmp_path, pet_series(slices=20)), dimse_timeout_s=2.0)
    assert [answer.status for answer in last] == [0] * 20


class Freezing:
    """A line to a peer that is no longer read from after `after` bytes, and stays open: a process that was stopped."""

    def __init__(self, to: int, *, after: int) -> None:
        self._to, self._after = to, after
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that little waits in the kernel
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.port = int(self._listener.getsockname()[1])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Freezing:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)
        self._listener.close()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.create_connection(("127.0.0.1", self._to)) as far:
            seen = 0
            while seen <= self._after:
                for ready in select.select([near, far], [], [])[0]:
                    data = ready.recv(4096)
                    seen += len(data) if ready is near else 0
                    (far if ready is near else near).sendall(data)
            self._over.wait(60)


def large(folder: Path) -> list[Path]:
    """One object of 8 MiB: more than a kernel keeps for a peer that does not read."""
    dataset = pet_series(slices=1)[0]
    dataset.Rows = dataset.Columns = 2048
    dataset.PixelData = bytes(2048 * 2048 * 2)
    return saved(folder, [dataset])


def test_a_peer_that_takes_no_more_bytes_is_given_up_in_the_middle(tmp_path: Path) -> None:
    """It keeps the connection and does not read: the lane of its deliveries must not stand still for ever."""
    begun = time.monotonic()
    with StoragePeer() as peer, Freezing(peer.port, after=20_000) as line, pytest.raises(PeerUnreachable):
        send(line.port, large(tmp_path), dimse_timeout_s=1.0)
    assert time.monotonic() - begun < 10


def test_an_abort_ends_an_association_whose_peer_takes_no_more_bytes(tmp_path: Path) -> None:
    """Who closes the lanes does not wait for it either: it takes seconds, and the sender hears of it."""
    opened: list[Association] = []
    with StoragePeer() as peer, Freezing(peer.port, after=20_000) as line:
        def go() -> None:
            with pytest.raises(PeerUnreachable):
                send(line.port, large(tmp_path), dimse_timeout_s=60.0, on_open=opened.append)

        sender = threading.Thread(target=go)
        sender.start()
        wait_until("the sender to be stuck",
                   lambda: opened and opened[0].dul.to_provider_queue.qsize() >= requesting.QUEUED)
        begun = time.monotonic()
        opened[0].abort()
        sender.join(10)
        assert not sender.is_alive() and time.monotonic() - begun < 6


def test_what_is_sent_waits_for_the_peer_and_not_in_memory(tmp_path: Path) -> None:
    """A peer that takes PDUs of any length (maximum length 0) and reads slowly: few short PDUs wait for it."""
    waiting: list[int] = []
    lengths: list[int] = []

    def look(association: Association) -> None:
        association.bind(evt.EVT_PDU_SENT, lambda event: (
            lengths.append(len(event.pdu)), waiting.append(association.dul.to_provider_queue.qsize())))

    ae = AE("PACS")
    ae.add_supported_context("1.2.840.10008.5.1.4.1.1.128")
    ae.maximum_pdu_size = 0
    port = free_port()
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: 0)])
    try:
        last, _ = send(port, large(tmp_path), on_open=look)
    finally:
        server.shutdown()
    assert [answer.status for answer in last] == [0]
    assert len(lengths) > 60 and max(lengths) <= requesting.LARGEST_PDU + 6 and max(waiting) <= requesting.QUEUED
