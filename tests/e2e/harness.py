"""A whole node as a user starts it: `dicomnode serve --config FILE` as a process of its own, on free loopback ports."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dicomnode import views
from tests.peers import ReceiverProcess


class RunningNode(ReceiverProcess):
    """`dicomnode serve` on a configuration made of the contract's keys; stopped when the block is left."""

    command = ("-m", "dicomnode", "serve", "--config")

    def __init__(self, folder: Path, *, peers: dict[str, tuple[str, int | None]], route: str,
                 quiet_s: float = 1.5, ct_wait_s: float = 5, give_up_h: float = 24) -> None:
        limits = f"[completeness]\nquiet_s = {quiet_s}\nct_wait_s = {ct_wait_s}\ngive_up_h = {give_up_h}\n"
        tables = [f'[[peer]]\nname = "{name}"\nae_title = "{ae_title}"\nhost = "127.0.0.1"\n'
                  + (f"port = {port}\n" if port else "") for name, (ae_title, port) in peers.items()]
        super().__init__(folder, peers="\n".join([limits, *tables, route]), reception="low_disk_mb = 64")

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "dicomnode", *arguments, "--config", str(self.config_path)],
                              capture_output=True, text=True, timeout=60)

    def jobs(self) -> list[dict[str, Any]]:
        """What `dicomnode jobs` prints; read here, since a process for each look takes a core from the node."""
        with self.ledger() as ledger:
            return views.jobs(ledger)

    def job(self, series_uid: str) -> dict[str, Any] | None:
        return next((row for row in self.jobs() if row["series"] == series_uid), None)

    def wait_for(self, series_uid: str, *states: str, timeout_s: float = 120) -> dict[str, Any]:
        """The job row of a series once its state is one of `states`."""
        until = time.monotonic() + timeout_s
        while (row := self.job(series_uid)) is None or row["state"] not in states:
            assert time.monotonic() < until, (
                f"series {series_uid} is not {' or '.join(states)} after {timeout_s} s but {row}; "
                f"log:\n{self.log()[-4000:]}")
            time.sleep(0.3)
        return row

    def descendants(self, *, named: str = "") -> list[int]:
        """Process ids below `serve` whose command line holds `named`."""
        assert self.process is not None
        found: list[int] = []
        todo = [self.process.pid]
        while todo:
            parent = todo.pop()
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                try:
                    pids = [int(pid) for pid in children.read_text().split()]
                except OSError:
                    continue
                todo += pids
                found += [pid for pid in pids if named in _command(pid)]
        return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def shuffled_shares(files: list[Path], shares: int, *, seed: int) -> list[list[Path]]:
    """`files` in random order, dealt into `shares` piles."""
    mixed = random.Random(seed).sample(files, len(files))
    return [mixed[i::shares] for i in range(shares)]
