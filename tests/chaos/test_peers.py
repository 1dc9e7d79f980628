"""Peers that reject, hang, drop the association half-way, answer warnings or refuse; and one that is down for good."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.site import account, finished, route, send_until_acknowledged, storage_peers, studies
from tests.e2e.harness import RunningNode
from tests.peers import StoragePeer, free_port, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


class Rude:
    """A port that takes connections and never says a word, or hangs up after `after` bytes."""

    def __init__(self, after: int | None = None) -> None:
        self.ae_title, self.after, self.connections = "RUDE", after, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            if self.after is not None:
                connection.recv(self.after)
                connection.close()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept(), which would keep the port
        self._listener.close()
        for connection in self._open:
            connection.close()


def test_bad_peers_hold_up_nobody(tmp_path: Path, tell: Callable[..., None]):
    """Beside a silent, a dropping, an absent and a moody peer the good one is served at once, the others later."""
    sent = studies(tmp_path, 3)
    silent, dropping, absent = Rude(), Rude(after=100), free_port()
    answers = iter([0xA700, 0x0000, 0xB000, 0xA900, 0xC123, 0x0110] * 40)
    with StoragePeer("GOOD") as good, StoragePeer("MOODY", status=lambda _: next(answers, 0x0000)) as moody:
        peers = storage_peers(GOOD=good, MOODY=moody)
        peers |= {"SILENT": ("SILENT", silent.port), "DROPPING": ("DROPPING", dropping.port),
                  "ABSENT": ("ABSENT", absent)}
        names = ("SILENT", "DROPPING", "ABSENT", "MOODY", "GOOD")
        with RunningNode(tmp_path / "node", peers=peers, route=route(*names), quiet_s=1) as node:
            for study in sent:
                send_until_acknowledged(node.port, study.files)
            started = time.monotonic()
            whole = 2 * sum(study.pet_slices for study in sent)
            wait_until("the good peer has everything", lambda: len(good.datasets) >= whole, timeout_s=60)
            tell(good_peer_s=round(time.monotonic() - started, 1))
            wait_until("the moody peer has everything",
                       lambda: len({d.SOPInstanceUID for d in moody.datasets}) >= whole, timeout_s=120)
            assert {row["state"] for row in node.jobs() if row["job"]} == {"sending"}, "the silent peer has nothing yet"
            silent.stop()
            dropping.stop()
            late = [StoragePeer(name, port=port) for name, port in
                    (("SILENT", silent.port), ("DROPPING", dropping.port), ("ABSENT", absent))]
            for peer in late:
                peer.start()
            try:
                wait_until("all studies delivered everywhere", finished(node, sent, "delivered"), timeout_s=120)
                tell(connections_to_silent=silent.connections, connections_to_dropping=dropping.connections,
                     **account(node, sent, {"GOOD": good.datasets, "MOODY": moody.datasets,
                                            **{peer.ae_title: peer.datasets for peer in late}}))
            finally:
                for peer in late:
                    peer.stop()


def test_a_peer_that_refuses_the_objects(tmp_path: Path, tell: Callable[..., None]):
    """0xC000 for ever: the job is held with the status in its reason; `retry` sends again and computes nothing."""
    sent = studies(tmp_path, 1)
    refusing = threading.Event()
    refusing.set()
    with StoragePeer("PACS", status=lambda _: 0xC000 if refusing.is_set() else 0) as pacs, RunningNode(
        tmp_path / "node", peers=storage_peers(PACS=pacs), route=route("PACS"), quiet_s=1,
    ) as node:
        send_until_acknowledged(node.port, sent[0].files)
        row = node.wait_for(sent[0].pet_series, "held", timeout_s=120)
        assert "0xC000" in row["reason"]
        before = os.stat(node.data_dir / "derived" / str(row["job"])).st_mtime_ns
        refusing.clear()
        assert node.cli("retry", f"job:{row['job']}").returncode == 0
        node.wait_for(sent[0].pet_series, "delivered", timeout_s=60)
        assert os.stat(node.data_dir / "derived" / str(row["job"])).st_mtime_ns == before
        tell(**account(node, sent, {"PACS": pacs.datasets}))
