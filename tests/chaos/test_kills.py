"""kill -9 of every process of the node at random moments, over the whole path from the scanner to the PACS."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.site import account, finished, route, send_until_acknowledged, storage_peers, studies
from tests.e2e.harness import RunningNode
from tests.peers import StoragePeer, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]
ALSO = ("report", "kernel", "pictures")
KILLS = int(os.environ.get("CHAOS_KILLS", "200"))


def test_kills_at_random_moments(tmp_path: Path, tell: Callable[..., None]):
    """Nothing acknowledged is lost, nothing is derived twice, all ends at both peers, and what goes beside it too."""
    rng = random.Random(20)
    killed: Counter[str] = Counter()
    done = threading.Event()
    sent = studies(tmp_path, 4)
    with StoragePeer("PACS") as pacs, StoragePeer("ARCHIVE") as archive, RunningNode(
        tmp_path / "node", peers=storage_peers(PACS=pacs, ARCHIVE=archive), quiet_s=1,
        route=route("PACS", "ARCHIVE", also=ALSO),
    ) as node:
        tries = 0

        def send() -> None:
            """Study after study, until the last kill: there is always something on every part of the path."""
            nonlocal tries
            number = 0
            while number < len(sent) or not done.is_set():
                if number == len(sent):
                    sent.extend(studies(tmp_path, 1, first=number))
                files = list(sent[number].files)
                tries += send_until_acknowledged(node.port, rng.sample(files, len(files)))
                number += 1

        sender = threading.Thread(target=send)
        sender.start()
        until = time.monotonic() + 1500
        while killed.total() < KILLS and time.monotonic() < until:
            time.sleep(rng.uniform(0.05, 2.5))
            kind = rng.choice(["receive", "work", "pipeline"])
            if victims := node.descendants(named=kind):
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed[kind] += 1
        done.set()
        sender.join(400)
        assert not sender.is_alive()
        wait_until("all studies delivered", finished(node, sent, "delivered"), timeout_s=400)
        tell(kills=dict(killed), sends=tries)
        assert killed.total() == KILLS, f"too few processes were there to be killed: {killed}"
        tell(**account(node, sent, {"PACS": pacs.datasets, "ARCHIVE": archive.datasets}))


def test_the_whole_node_is_killed_again_and_again(tmp_path: Path, tell: Callable[..., None]):
    """The supervisor dies, and all of it with it, as in a power cut; the next start goes on."""
    rng = random.Random(3)
    sent = studies(tmp_path, 6)
    files = [file for study in sent for file in study.files]
    with StoragePeer("PACS") as pacs, RunningNode(
        tmp_path / "node", peers=storage_peers(PACS=pacs), route=route("PACS", also=ALSO), quiet_s=1,
    ) as node:
        sender = threading.Thread(target=send_until_acknowledged, args=(node.port, rng.sample(files, len(files))))
        sender.start()
        kills = 0
        while kills < 15 or sender.is_alive():
            time.sleep(rng.uniform(0.5, 4.0))
            node.kill()
            kills += 1
            node.start()
            assert kills < 60, "sending does not end"
        sender.join()
        wait_until("all studies delivered", finished(node, sent, "delivered"), timeout_s=300)
        tell(kills=kills, **account(node, sent, {"PACS": pacs.datasets}))
