"""What is wrong, as a function of the ledger, the configuration and what the machine says. Nothing is sent from here.

Texts hold codes, UIDs, accession numbers and names of the configuration, never a reason taken from an object: what
leaves the hospital by mail or chat cannot hold a patient's name.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from dicomnode import workers
from dicomnode.config import Config
from dicomnode.ledger import Ledger
from dicomnode.memo import memo
from dicomnode.reconcile import problem_key

__all__ = ["CERTIFICATE_LAST_DAYS", "CERTIFICATE_WARN_DAYS", "Machine", "Trouble", "find"]

Level = Literal["warning", "problem"]

CERTIFICATE_WARN_DAYS, CERTIFICATE_LAST_DAYS = 30.0, 7.0
SETTLING_S = 120.0        # what mends itself within this was never worth a message: a restart, a slow disk
PEER_SILENT_S = 3600.0    # deliveries to a peer fail for so long
SOURCE_SILENT_S = 900.0
UNTOLD_S = 3 * 86400.0    # after a request for storage commitment, which is given up after a day
RESTARTS, RESTARTS_S = 3, 3600.0
SLOWEST_HEARTBEATS = 6    # a worker that missed so many is stale
LATE_CLOCK_S = 60.0
MIB = 2**20


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong. The same thing has the same `key` for as long as it lasts.

    grace_s   it is said when it has lasted so long, seconds.
    once      it happened and is over: said once, never repeated and never called resolved.
    """

    key: str
    level: Level
    text: str
    grace_s: float = 0.0
    once: bool = False


@dataclass(frozen=True)
class Machine:
    """What the ledger does not know. None: it could not be found out, or does not apply.

    free_bytes         of the file system of the data directory.
    receiver_runs      whether a receiving process has the data directory.
    certificates       name in the configuration -> days until it expires, negative: it has; None: unreadable.
    failing            tick of the worker -> since when it fails without a success between, seconds since 1970.
    clock_back_s       by how much the clock is behind what it said a moment ago.
    starts             when the worker started, the last times, seconds since 1970.
    died               the worker before this one ended without being stopped.
    """

    free_bytes: int
    receiver_runs: bool | None = None
    certificates: Mapping[str, float | None] = field(default_factory=dict)
    failing: Mapping[str, float] = field(default_factory=dict)
    clock_back_s: float = 0.0
    starts: tuple[float, ...] = ()
    died: bool = False


def find(ledger: Ledger, config: Config, machine: Machine, *, now: float) -> list[Trouble]:
    """All that is wrong at `now`, the worst kind first; no key twice."""
    return [*_machine(config, machine, now), *_workers(ledger, config, now), *_cluster(ledger), *_studies(ledger),
            *_deliveries(ledger, now), *_reports(ledger, now), *_sources(ledger, config)]


def _machine(config: Config, machine: Machine, now: float) -> Iterator[Trouble]:
    free, watermark = machine.free_bytes // MIB, config.reception.low_disk_mb
    if free <= watermark:
        yield Trouble("disk", "problem", f"{free} MiB free, at or below the watermark of {watermark} MiB: every object "
                      "is refused. Remedy: free space, or set [retention]")
    elif free < max(2 * watermark, config.retention.free_mb):
        yield Trouble("disk", "warning", f"{free} MiB free, near the watermark of {watermark} MiB. Remedy: free space",
                      grace_s=SETTLING_S)
    if machine.receiver_runs is False:
        yield Trouble("receiver", "problem", "no receiving process has the data directory: nothing can come in. "
                      "Remedy: systemctl status dicomnode-receive", grace_s=SETTLING_S)
    for name, since in sorted(machine.failing.items()):
        yield Trouble(f"tick:{name}", "problem", f"{name} fails since {_minutes(now - since)}. Remedy: the log says "
                      "why (action tick_failed)", grace_s=SETTLING_S)
    for name, days in machine.certificates.items():
        if days is None:
            yield Trouble(f"certificate:{name}", "problem", f"{name} cannot be read. Remedy: dicomnode check")
        elif days < CERTIFICATE_WARN_DAYS:
            text = f"expires in {days:.0f} days" if days >= 0 else f"expired {-days:.0f} days ago"
            yield Trouble(f"certificate:{name}", "warning" if days >= CERTIFICATE_LAST_DAYS else "problem",
                          f"{name} {text}. Remedy: renew the certificate")
    if machine.clock_back_s > LATE_CLOCK_S:
        yield Trouble(f"once:clock:{now:.0f}", "warning", f"the clock was set back by "
                      f"{_minutes(machine.clock_back_s)}. Remedy: keep it by systemd-timesyncd or chrony", once=True)
    if machine.died:
        yield Trouble(f"once:died:{now:.0f}", "warning", "the worker ended without being stopped (crash, kill or power "
                      "loss) and runs again. Remedy: journalctl --namespace=dicomnode -u dicomnode-work", once=True)
    restarts = [at for at in machine.starts if now - RESTARTS_S < at <= now]
    if len(restarts) > RESTARTS:
        yield Trouble("restarts", "problem", f"the worker started {len(restarts)} times within an hour. "
                      "Remedy: journalctl --namespace=dicomnode -u dicomnode-work")


def _workers(ledger: Ledger, config: Config, now: float) -> Iterator[Trouble]:
    limit_s = max(SETTLING_S, SLOWEST_HEARTBEATS * config.work.heartbeat_s)
    for row in workers.stale(ledger, now, limit_s=limit_s):
        doing = f" with job {row['job_id']}" if row["job_id"] is not None else ""
        yield Trouble(f"worker:{row['name']}", "problem", f"worker {row['name']} on {row['device']}{doing} was last "
                      f"heard of {_minutes(row['silent_s'])} ago. Remedy: dicomnode status",
                      grace_s=SETTLING_S)


def _cluster(ledger: Ledger) -> Iterator[Trouble]:
    """Jobs that a Dask cluster keeps waiting: no scheduler, no worker that fits, other software there. A job that has
    just been claimed again is not yet proof of the contrary."""
    waiting = """
        WITH waits AS (SELECT id, state, code,
            coalesce(CASE WHEN json_valid(progress) THEN json_extract(progress, '$.stage') END, 'read') AS stage,
            (SELECT event.code FROM event WHERE event.job_id = job.id AND event.to_state = 'queued'
             ORDER BY event.id DESC LIMIT 1) AS before FROM job WHERE state IN ('queued', 'running'))
        SELECT count(*) AS jobs, min(id) AS first FROM waits
        WHERE (state = 'queued' AND code IN ('cluster', 'cluster-unreachable'))
           OR (state = 'running' AND stage LIKE 'no worker offers%')
           OR (state = 'running' AND stage = 'read' AND before IN ('cluster', 'cluster-unreachable'))"""
    for row in ledger.query(waiting):
        if row["jobs"]:
            yield Trouble("cluster", "problem", f"the Dask cluster cannot be used, {row['jobs']} jobs wait for it. "
                          f"Remedy: dicomnode show job:{row['first']} says why", grace_s=SETTLING_S)


def _studies(ledger: Ledger) -> Iterator[Trouble]:
    """Series and jobs that wait for a person; those that a person put there are no news."""
    for row in ledger.query("SELECT * FROM series WHERE state = 'held' AND code != 'operator' ORDER BY last_at"):
        yield Trouble(f"series:{row['series_uid']}:{row['code']}", "problem",
                      f"{_modality(row['modality'])} series held ({row['code']}): {_named(row)}. "
                      f"Remedy: dicomnode show {row['study_uid']}")
    held = ("SELECT job.*, series.accession_number FROM job JOIN series USING (series_uid) "
            "WHERE job.state = 'held' AND job.code NOT IN ('operator', 'delivery', 'commitment') ORDER BY job.id")
    for row in ledger.query(held):
        yield Trouble(f"job:{row['id']}:{row['code']}", "problem",
                      f"job {row['id']} held ({row['code']}): {_named(row)}. Remedy: dicomnode show {row['study_uid']}")


def _deliveries(ledger: Ledger, now: float) -> Iterator[Trouble]:
    dead = ("SELECT delivery.id, delivery.peer, delivery.proofs, job.id AS job_id, job.study_uid, job.series_uid, "
            "series.accession_number FROM delivery JOIN job ON job.id = delivery.job_id JOIN series USING (series_uid) "
            "WHERE delivery.state = 'dead' AND (job.state IN ('built', 'sending', 'delivered') "
            "OR (job.state = 'held' AND job.code != 'operator')) ORDER BY delivery.id")
    for row in ledger.query(dead):
        what = "was sent and is not confirmed" if row["proofs"] else "was given up"
        yield Trouble(f"delivery:{row['id']}", "problem", f"delivery of job {row['job_id']} to {row['peer']} {what}: "
                      f"{_named(row)}. Remedy: dicomnode show {row['study_uid']}")
    waiting = ("SELECT delivery.peer, count(*) AS n, min(delivery.created_at) AS since FROM delivery "
               "JOIN job ON job.id = delivery.job_id WHERE delivery.state = 'waiting' AND delivery.attempts > 0 "
               "AND job.state IN ('built', 'sending') AND delivery.created_at < ? GROUP BY delivery.peer")
    for row in ledger.query(waiting, (now - PEER_SILENT_S,)):
        yield Trouble(f"peer:{row['peer']}", "warning", f"{row['n']} deliveries to {row['peer']} fail since "
                      f"{_minutes(now - row['since'])} and are tried again. Remedy: dicomnode check")


def _reports(ledger: Ledger, now: float) -> Iterator[Trouble]:
    """Peers that asked whether their objects are safe here and could not be told."""
    for row in ledger.query("SELECT calling_ae, count(*) AS n FROM commitment_request WHERE state = 'given-up' "
                            "AND asked_at > ? GROUP BY calling_ae", (now - UNTOLD_S,)):
        name = "".join(char for char in row["calling_ae"][:16] if char.isprintable())
        yield Trouble(f"commitment:{name}", "warning", f"{row['n']} request{'s' * (row['n'] > 1)} of {name} for "
                      "storage commitment could not be answered. Remedy: peer.port must be where it listens; it may "
                      "have to ask again")


def _sources(ledger: Ledger, config: Config) -> Iterator[Trouble]:
    for peer in config.peer:
        if peer.query and memo(ledger, problem_key(peer.name)):
            yield Trouble(f"source:{peer.name}", "warning", f"source {peer.name} cannot be asked for its studies; "
                          "it is tried again. Remedy: dicomnode check", grace_s=SOURCE_SILENT_S)
    for row in ledger.query("SELECT source, count(*) AS n FROM source_series WHERE state = 'failed' AND wanted = 1 "
                            "GROUP BY source"):
        yield Trouble(f"source:{row['source']}:failed", "problem", f"{row['n']} series of {row['source']} could not be "
                      "fetched. Remedy: the reconciliation report names them")


def _named(row: sqlite3.Row) -> str:
    """Accession number where there is one, and UIDs."""
    accession = "".join(char for char in row["accession_number"][:16] if char.isprintable())
    return f"{f'accession {accession}, ' if accession else ''}study {row['study_uid']}, series {row['series_uid']}"


def _modality(text: str) -> str:
    return text[:16] if text[:16].isalnum() else "a"


def _minutes(seconds: float) -> str:
    """
    >>> _minutes(90.0), _minutes(7200.0), _minutes(300000.0)
    ('1 min', '2.0 h', '3.5 days')
    """
    if seconds < 5400:
        return f"{max(seconds, 0.0) // 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
