"""Who works now: one row per executor, with a heartbeat, so that a person sees a worker that died or hangs.

A worker (one executor: one device, one job at a time) is named host:pid:device. Its row comes when it starts, shows its
heartbeat and its job while it lives, and goes when its process ends in good order. What is left by a process that was
killed is stale, until the next worker on the same data directory clears it away.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode.ledger import Ledger

__all__ = ["STALE_S", "Beat", "beat", "clear", "enter", "leave", "listing", "stale", "worker_names"]

#: Without a heartbeat for so long a worker counts as dead or hung. Generous: a slow disk is no hang.
STALE_S = 120.0


@dataclass(frozen=True)
class Beat:
    """A sign of life of one worker, and the job that it runs."""

    name: str
    at: float
    job_id: int | None


def worker_names(devices: Sequence[str]) -> list[str]:
    """host:pid:device for each of the devices of this process; one that is listed twice is numbered.

    >>> [name.rpartition(":")[2] for name in worker_names(["cpu", "cpu"])]
    ['cpu', 'cpu#2']
    """
    before = f"{os.uname().nodename}:{os.getpid()}"
    counts = [list(devices[:number + 1]).count(device) for number, device in enumerate(devices)]
    return [f"{before}:{device}" + (f"#{count}" if count > 1 else "")
            for device, count in zip(devices, counts, strict=True)]


def clear(ledger: Ledger, *, now: float) -> list[str]:
    """At the start of the one worker process of a data directory: rows left by killed ones go; their names."""
    with ledger.transaction() as db:
        left = listing(ledger)
        for row in left:
            db.execute("DELETE FROM worker WHERE name = ?", (row["name"],))
            ledger.event("node", now=now, from_state="worker", code="worker-gone",
                         reason=f"worker {row['name']} ended without saying so")
    return [row["name"] for row in left]


def enter(ledger: Ledger, name: str, *, device: str, now: float) -> None:
    """A worker of this process starts."""
    with ledger.transaction() as db:
        db.execute("INSERT OR REPLACE INTO worker (name, device, pid, started_at, heartbeat_at) VALUES (?, ?, ?, ?, ?)",
                   (name, device, os.getpid(), now, now))
        ledger.event("node", now=now, to_state="worker", code="worker-started", reason=f"worker {name} started")


def beat(ledger: Ledger, beats: Sequence[Beat]) -> None:
    """Write the heartbeats, all in one transaction; no events: they would fill the ledger."""
    with ledger.transaction() as db:
        db.executemany("UPDATE worker SET heartbeat_at = ?, job_id = ? WHERE name = ?",
                       [(one.at, one.job_id, one.name) for one in beats])


def leave(ledger: Ledger, name: str, *, now: float) -> None:
    """A worker ends in good order."""
    with ledger.transaction() as db:
        if db.execute("DELETE FROM worker WHERE name = ?", (name,)).rowcount:
            ledger.event("node", now=now, from_state="worker", code="worker-ended", reason=f"worker {name} ended")


def listing(ledger: Ledger) -> list[dict[str, Any]]:
    """The rows of table worker, by name."""
    return [dict(row) for row in ledger.query("SELECT * FROM worker ORDER BY name")]


def stale(ledger: Ledger, now: float, *, limit_s: float = STALE_S) -> list[dict[str, Any]]:
    """The workers without a heartbeat for `limit_s` seconds: dead or hung. Rows of `listing`, with `silent_s`."""
    return [{**row, "silent_s": now - row["heartbeat_at"]} for row in listing(ledger)
            if now - row["heartbeat_at"] > limit_s]
