"""Many at once and much noise: 50 senders, port probes in thousands, instances by the hundred thousand."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.site import account, descriptors, finished, memory_mb, route, storage_peers, studies
from tests.e2e.harness import RunningNode
from tests.factories import ct_series
from tests.peers import ReceiverProcess, StoragePeer, echoscu, storescu, wait_until

pytestmark = [pytest.mark.timeout(7200)]


@pytest.mark.chaos
def test_fifty_senders_at_once(tmp_path: Path, tell: Callable[..., None]):
    """None is refused below the limit; every study is delivered once."""
    sent = studies(tmp_path, 50, ct=False)
    with StoragePeer("PACS") as pacs, RunningNode(
        tmp_path / "node", peers=storage_peers(PACS=pacs), route=route("PACS"), quiet_s=2,
    ) as node:
        started = time.monotonic()
        with ThreadPoolExecutor(50) as pool:
            codes = list(pool.map(lambda study: storescu(node.port, study.files, timeout_s=300).returncode, sent))
        took = time.monotonic() - started
        assert codes == [0] * 50
        wait_until("all studies delivered", finished(node, sent, "delivered"), timeout_s=900)
        tell(senders=50, sending_s=round(took, 1), **account(node, sent, {"PACS": pacs.datasets}))


@pytest.mark.chaos
def test_port_probes(tmp_path: Path, tell: Callable[..., None]):
    """10,000 connections that say nothing, noise, HTTP or half an association: memory and open files stay flat."""
    rng = random.Random(9)
    noise: list[Callable[[], bytes]] = [
        lambda: b"", lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", lambda: rng.randbytes(rng.randrange(1, 400)),
        lambda: b"\x01\x00\x00\x00\x00\xcd" + rng.randbytes(60),
        lambda: b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(80)]
    count = int(os.environ.get("CHAOS_PROBES", "10000"))
    with ReceiverProcess(tmp_path, reception="low_disk_mb = 1\nacse_timeout_s = 2\nnetwork_timeout_s = 2") as receiver:
        assert receiver.process is not None

        def probe(_: int) -> None:
            try:
                with socket.create_connection(("127.0.0.1", receiver.port), timeout=5) as connection:
                    connection.sendall(rng.choice(noise)())
            except OSError:
                pass  # reset by the receiver: it may

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(probe, range(count // 10)))
            time.sleep(3)
            before, files_before = memory_mb(receiver.process.pid), descriptors(receiver.process.pid)
            list(pool.map(probe, range(count - count // 10)))
        wait_until("the last probes have gone", lambda: descriptors(receiver.process.pid) <= files_before + 2)
        after = memory_mb(receiver.process.pid)
        tell(probes=count, memory_before_mb=round(before, 1), memory_after_mb=round(after, 1))
        assert after < before + 10
        assert after < 150
        assert echoscu(receiver.port).returncode == 0


@pytest.mark.soak
def test_a_million_small_instances(tmp_path: Path, tell: Callable[..., None]):
    """As many as SOAK_INSTANCES or SOAK_MINUTES allow: all in the ledger, the receiver's memory flat, below 150 MB."""
    wanted = int(os.environ.get("SOAK_INSTANCES", "1000000"))
    until = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "60"))
    senders, at_once = 4, 2000
    acknowledged = [0] * senders
    failures: list[str] = []
    image = ct_series(slices=1, seed=1)[0]
    image.Rows = image.Columns = 8
    image.PixelData = bytes(128)
    image.save_as(tmp_path / "image.dcm", enforce_file_format=True)
    with ReceiverProcess(tmp_path, reception="low_disk_mb = 64") as receiver:
        assert receiver.process is not None
        pid = receiver.process.pid
        # DCMTK makes up UIDs: a new instance for every image, a new series after 500, a new study after 20 series.
        options = ["+IR", "500", "+IS", "20", "--repeat", str(at_once)]

        def send(number: int) -> None:
            """Associations of `at_once` instances, one after the other."""
            while sum(acknowledged) < wanted and time.monotonic() < until and not failures:
                done = storescu(receiver.port, [tmp_path / "image.dcm"], options=options, timeout_s=1800)
                if done.returncode != 0:
                    failures.append((done.stdout + done.stderr)[-500:])
                    return
                acknowledged[number] += (done.stdout + done.stderr).count("Received Store Response (Success)")

        threads = [threading.Thread(target=send, args=(number,)) for number in range(senders)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        memory: list[float] = []
        while any(thread.is_alive() for thread in threads):
            time.sleep(5)
            memory.append(memory_mb(pid))
        took = time.monotonic() - started
        assert not failures, failures[0]
        total = sum(acknowledged)
        with receiver.ledger() as ledger:
            assert ledger.counts()["instance"]["all"] == total
        settled = memory[len(memory) // 5:]
        tell(instances=total, minutes=round(took / 60, 1), a_second=round(total / took),
             memory_first_mb=round(settled[0], 1), memory_last_mb=round(settled[-1], 1),
             memory_most_mb=round(max(memory), 1))
        assert max(memory) < 150
        assert settled[-1] < settled[0] + 15
