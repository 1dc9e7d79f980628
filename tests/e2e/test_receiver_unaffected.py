"""Whatever the worker does - stands still, dies again and again, has no memory, locks the ledger - receiving goes on.

Each scene sends while it happens, as a scanner does: one association, one C-STORE after the other, and looks at every
answer and how long it took.
"""

from __future__ import annotations

import copy
import os
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from pydicom.uid import ImplicitVRLittleEndian

from tests.e2e.harness import RunningNode
from tests.factories import ct_series, make_uid, pet_series
from tests.peers import StoragePeer, associate, encoded, store_encoded, wait_until

pytestmark = pytest.mark.slow

ROUTE = """
[[route]]
name = "all-pet"
when = { Modality = "PT" }
method = "nearest"
preset = "default"
send_to = ["PACS"]
[work]
retry_s = 0.5
attempts = 1000
"""
COUNT = 60
SLOW_S = 5.0  # no answer may take so long, on a machine with much else to do; a worker that is in the way takes longer


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningNode, StoragePeer]]:
    with StoragePeer() as peer, RunningNode(
        tmp_path_factory.mktemp("node"), peers={"PACS": (peer.ae_title, peer.port), "SCANNER": ("SCANNER", None)},
        route=ROUTE, quiet_s=1,
    ) as node:
        yield node, peer


def send(node: RunningNode, name: str) -> list[float]:
    """COUNT instances of a new series, each answered with success; how long each answer took, s."""
    template = ct_series(seed=1)[0]
    template.SeriesInstanceUID, template.StudyInstanceUID = make_uid(name, "series"), make_uid(name, "study")
    sop_class, took = str(template.SOPClassUID), []
    assoc = associate(node.port, [(sop_class, [ImplicitVRLittleEndian])])
    assert assoc.is_established
    for number in range(COUNT):
        instance = copy.deepcopy(template)
        instance.SOPInstanceUID = make_uid(name, number)
        instance.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        begun = time.monotonic()
        status = store_encoded(assoc, sop_class, instance.SOPInstanceUID, encoded(instance))
        took.append(time.monotonic() - begun)
        assert status.Status == 0x0000, f"instance {number}: {status}"
    assoc.release()
    with node.ledger() as ledger:
        assert ledger.series(str(template.SeriesInstanceUID))["instances"] == COUNT
    return took


def worker(node: RunningNode) -> int:
    """Process id of the worker that runs now."""
    return int(wait_until("a worker", lambda: node.descendants(named="dicomnode work"), timeout_s=60)[0])


@contextmanager
def meanwhile(act: Callable[[threading.Event], None]) -> Iterator[None]:
    """`act` in a thread of its own until the block is left."""
    over = threading.Event()
    thread = threading.Thread(target=act, args=(over,))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def lockable(node: RunningNode) -> bool:
    """Whether nobody holds the ledger's write lock now."""
    db = sqlite3.connect(node.data_dir / "ledger.sqlite3", timeout=0.2, isolation_level=None)
    try:
        db.execute("BEGIN IMMEDIATE")
        db.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return False
    finally:
        db.close()
    return True


def test_a_worker_that_stands_still(scene: tuple[RunningNode, StoragePeer]) -> None:
    """SIGSTOP, outside of a transaction: every object is taken at once."""
    node, _ = scene
    pid = worker(node)
    os.kill(pid, signal.SIGSTOP)
    while not lockable(node):
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
        os.kill(pid, signal.SIGSTOP)
    try:
        took = send(node, "stopped")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert max(took) < SLOW_S


def test_a_worker_that_dies_again_and_again(scene: tuple[RunningNode, StoragePeer]) -> None:
    """kill -9 as often as it is there: it leaves no lock behind."""
    node, _ = scene
    killed = []

    def kill(over: threading.Event) -> None:
        while not over.wait(0.2):
            for pid in node.descendants(named="dicomnode work"):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    took: list[float] = []
    with meanwhile(kill):
        until = time.monotonic() + 4
        while time.monotonic() < until:
            took += send(node, f"killed {len(took)}")
    assert len(killed) >= 2 and max(took) < SLOW_S


def test_somebody_who_holds_the_write_lock_for_five_seconds(scene: tuple[RunningNode, StoragePeer]) -> None:
    """Objects are answered when it is free again, and not a moment before: 0x0000 means that the row is there."""
    node, _ = scene
    locked = threading.Event()

    def lock(_: threading.Event) -> None:
        db = sqlite3.connect(node.data_dir / "ledger.sqlite3", timeout=20, isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        locked.set()
        time.sleep(5)
        db.execute("ROLLBACK")
        db.close()

    with meanwhile(lock):
        assert locked.wait(30)
        took = send(node, "locked")
    assert 4 < max(took) < 5 + SLOW_S
    assert sorted(took)[-2] < SLOW_S


def test_a_worker_that_runs_out_of_memory(scene: tuple[RunningNode, StoragePeer]) -> None:
    """With no byte left for it (RLIMIT_AS) objects are taken as ever; with room again the study is delivered."""
    node, peer = scene
    pid = worker(node)
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (2**20, before[1]))
    series = pet_series(seed=3)
    assoc = associate(node.port, [(str(series[0].SOPClassUID), [ImplicitVRLittleEndian])])
    for ds in series:
        ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        assert store_encoded(assoc, str(ds.SOPClassUID), str(ds.SOPInstanceUID), encoded(ds)).Status == 0x0000
    assoc.release()
    took = send(node, "memory")
    time.sleep(2)
    for left in node.descendants(named="dicomnode work"):
        resource.prlimit(left, resource.RLIMIT_AS, before)
    row = node.wait_for(str(series[0].SeriesInstanceUID), "delivered", timeout_s=60)
    assert max(took) < SLOW_S
    assert {str(ds.SeriesInstanceUID) for ds in peer.datasets} == {row["derived_series"]}
