"""The node in figures, for monitoring: what is so at this moment. What adds up over the years is counted by `tally`.

Every query goes by an index or looks at the few rows that are not finished, so that years of history cost nothing.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dicomnode import machine, workers
from dicomnode.config import Config
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.memo import memo
from dicomnode.reconcile import problem_key
from dicomnode.spool import Spool
from dicomnode.states import JOB_STATES, SERIES_STATES
from dicomnode.views import progress_of

__all__ = ["Deliveries", "Gpu", "Now", "Worker", "certificates", "finished", "gpus", "retention_s", "take"]

GPU_QUERY = ("index", "name", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu")
GPU_S = 5.0
MIB = 2**20
FINISHED = {"job": ("delivered", "committed", "cancelled", "superseded"), "series": ("matched", "ignored"),
            "commitment": ("asked", "confirmed", "failed", "late")}
UNFINISHED = {"job": tuple(state for state in JOB_STATES if state not in FINISHED["job"]),
              "series": tuple(state for state in SERIES_STATES if state not in FINISHED["series"])}

log = get_logger(__name__)


@dataclass(frozen=True)
class Deliveries:
    """To one peer: so many wait to be sent (`failing` of them were tried in vain), were given up, wait for proof."""

    waiting: int = 0
    failing: int = 0
    dead: int = 0
    unproven: int = 0
    oldest_at: float | None = None


@dataclass(frozen=True)
class Worker:
    """One device at work: `up` while its heartbeat is fresh, the time of that in seconds since 1970."""

    device: str
    up: bool
    busy: bool
    heartbeat_at: float


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of one GPU; None: it does not say."""

    index: str
    name: str
    utilisation: float | None  # of 1
    used_bytes: float | None
    total_bytes: float | None
    celsius: float | None


@dataclass(frozen=True)
class Now:
    """Times are seconds since 1970, sizes bytes.

    jobs, series   state -> how many; only what is not finished.
    queued         route -> how many jobs wait (queued, or failed and tried again).
    urgent         how many of them are urgent.
    queued_at      when the oldest of them was queued; None: nothing waits.
    running_at     when the job that runs longest was started.
    held           ("job" or "series", code) -> how many wait for a person.
    progress       job's device -> how far it is, 0 to 1.
    sources        name of a source -> whether it could be asked the last time.
    alerts         "warning", "problem" -> how many things are wrong.
    receiver_up    None: that cannot be told on this machine.
    """

    jobs: Mapping[str, int]
    series: Mapping[str, int]
    queued: Mapping[str, int]
    urgent: int
    queued_at: float | None
    running_at: float | None
    progress: Mapping[str, float]
    held: Mapping[tuple[str, str], int]
    deliveries: Mapping[str, Deliveries]
    workers: tuple[Worker, ...]
    sources: Mapping[str, bool]
    alerts: Mapping[str, int]
    receiver_up: bool | None
    disk_free: int
    disk_total: int
    ledger_bytes: int


def take(ledger: Ledger, config: Config, spool: Spool, *, now: float) -> Now:
    """Look at ledger and disk. Raises sqlite3.Error, OSError."""
    disk = shutil.disk_usage(spool.data_dir)
    queue = ledger.query("SELECT route, urgent, count(*) AS n, min(created_at) AS oldest FROM job "
                         "WHERE state IN ('queued', 'failed') GROUP BY route, urgent")
    running = ledger.query("SELECT min(started_at) AS at FROM job WHERE state = 'running'")[0]["at"]
    queued: dict[str, int] = {route.name: 0 for route in config.route}
    for row in queue:
        queued[row["route"]] = queued.get(row["route"], 0) + row["n"]
    return Now(
        jobs=_by_state(ledger, "job", UNFINISHED["job"]), series=_by_state(ledger, "series", UNFINISHED["series"]),
        queued=queued,
        urgent=sum(row["n"] for row in queue if row["urgent"]),
        queued_at=min((row["oldest"] for row in queue), default=None), running_at=running,
        progress=_progress(ledger), held=_held(ledger), deliveries=_deliveries(ledger, config),
        workers=_workers(ledger, now), alerts=_alerts(ledger),
        sources={peer.name: not memo(ledger, problem_key(peer.name)) for peer in config.peer if peer.query},
        receiver_up=machine.receiver_runs(spool.data_dir), disk_free=disk.free, disk_total=disk.total,
        ledger_bytes=sum(path.stat().st_size for path in spool.data_dir.glob(f"{spool.ledger_path.name}*")))


def finished(ledger: Ledger) -> dict[str, dict[str, int]]:
    """"job", "series", "commitment" -> state -> how many are finished: years of them, not to be counted too often."""
    return {table: _by_state(ledger, table, states) for table, states in FINISHED.items()}


def _by_state(ledger: Ledger, table: str, states: Sequence[str]) -> dict[str, int]:
    """All of `states` are there."""
    rows = ledger.query(f"SELECT state, count(*) AS n FROM {table} WHERE state IN (SELECT value FROM json_each(?)) "
                        "GROUP BY state", (json.dumps(states),))
    return dict.fromkeys(states, 0) | {row["state"]: row["n"] for row in rows}


def _progress(ledger: Ledger) -> dict[str, float]:
    """By the device that runs the job; two on the same device: the last one."""
    found = {}
    for row in ledger.query("SELECT coalesce(device, '') AS device, progress FROM job WHERE state = 'running'"):
        progress = progress_of(row["progress"]) or {}
        if progress.get("steps") and row["device"]:
            found[row["device"]] = min(1.0, progress.get("step", 0) / progress["steps"])
    return found


def _held(ledger: Ledger) -> dict[tuple[str, str], int]:
    return {(table, row["code"]): row["n"] for table in ("job", "series") for row in ledger.query(
        f"SELECT code, count(*) AS n FROM {table} WHERE state = 'held' GROUP BY code")}


def _deliveries(ledger: Ledger, config: Config) -> dict[str, Deliveries]:
    """Of every peer that a route sends to, and of those that something waits for."""
    rows = ledger.query("""
        SELECT peer, sum(state = 'waiting') AS waiting, sum(state = 'waiting' AND attempts > 0) AS failing,
               sum(state = 'dead') AS dead, min(CASE state WHEN 'waiting' THEN created_at END) AS oldest_at
          FROM delivery WHERE state IN ('waiting', 'dead') GROUP BY peer""")
    unproven = {row["peer"]: row["n"] for row in ledger.query(
        "SELECT peer, count(*) AS n FROM delivery WHERE prove_at IS NOT NULL AND +state = 'delivered' GROUP BY peer")}
    found = {name: Deliveries(unproven=unproven.get(name, 0))
             for name in [*(peer for route in config.route for peer in route.send_to), *unproven]}
    return found | {row["peer"]: Deliveries(row["waiting"], row["failing"], row["dead"],
                                            unproven.get(row["peer"], 0), row["oldest_at"]) for row in rows}


def _workers(ledger: Ledger, now: float) -> tuple[Worker, ...]:
    """The newest of each device: a worker's full name holds its process id, and would be another after each start."""
    late = {row["name"] for row in workers.stale(ledger, now)}
    newest = {row["name"].split(":", 2)[-1]: row
              for row in sorted(workers.listing(ledger), key=lambda row: row["heartbeat_at"])}
    return tuple(Worker(device, row["name"] not in late, row["job_id"] is not None, row["heartbeat_at"])
                 for device, row in sorted(newest.items()))


def _alerts(ledger: Ledger) -> dict[str, int]:
    """What is wrong now; what happened once and is over does not count."""
    return {"warning": 0, "problem": 0} | {row["level"]: row["n"] for row in ledger.query(
        "SELECT level, count(*) AS n FROM alert WHERE resolved_at IS NULL AND key NOT LIKE 'once:%' GROUP BY level")}


def certificates(config: Config, *, now: float) -> dict[str, float | None]:
    """Key of the configuration -> when the certificate in that file expires, seconds since 1970; None: unreadable."""
    from dicomnode.errors import ConfigError
    from dicomnode.tls import certificate_days_left

    days = dict(machine.certificate_days(config, now=now))
    if config.web.certificate is not None:
        try:
            days["web.certificate"] = certificate_days_left(config.web.certificate, now=now)
        except ConfigError:
            days["web.certificate"] = None
    return {name: None if left is None else now + 86400 * left for name, left in days.items()}


def _ask_nvidia() -> str:
    """What nvidia-smi prints; "" where there is none or it fails (GPU_S at most: a GPU that hangs may hang it, too)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        return subprocess.run([program, f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=GPU_S, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("nvidia-smi does not answer", action="gpu_silent", error=str(error))
        return ""


def gpus(ask: Callable[[], str] = _ask_nvidia) -> list[Gpu]:
    """The GPUs of this machine by nvidia-smi (sizes in MiB, percent, degrees Celsius); none where it is not there."""
    found = []
    for fields in csv.reader(ask().splitlines(), skipinitialspace=True):
        if len(fields) == len(GPU_QUERY):
            index, name, *rest = fields
            percent, used, total, celsius = map(_number, rest)
            found.append(Gpu(index, name, _times(percent, 0.01), _times(used, MIB), _times(total, MIB), celsius))
    return found


def _number(text: str) -> float | None:
    """
    >>> _number("81"), _number("[N/A]")
    (81.0, None)
    """
    try:
        return float(text)
    except ValueError:
        return None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def retention_s(config: Config) -> dict[str, float]:
    """Kind of objects -> seconds that they are kept after they are finished; 0: for ever."""
    limits = config.retention
    days = {"inputs": limits.inputs_days, "derived": limits.derived_days, "ignored": limits.ignored_days}
    return {what: 86400 * limit for what, limit in days.items()}
