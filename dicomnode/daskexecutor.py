"""Jobs on a Dask cluster (work.executor = "dask"): the ledger stays their owner, the cluster only lends its processors.

A job runs as ever in a child process of the node (dicomnode.pipeline), which reads, derives and checks; the child asks
the cluster for the deconvolution alone (dicomnode.daskclient). So what leaves the node is voxels and settings, and the
derived series is made and judged by the same code as without a cluster. `work.dask_jobs` such children run at once.

While the scheduler cannot be reached no job is claimed: the jobs stay queued, say why, and run when it is back. A job
whose worker was lost is queued again; the first loss is not counted as an attempt, further ones are, for a study that
takes down one worker after the other must end with a person.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dicomnode.daskclient import WorkerLost
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.runner import ChildRunner, Ending, Runner, Running

__all__ = ["WAITS", "Cluster", "DaskRunner", "unreachable"]

WAITS = "cluster-unreachable"  # the code of queued jobs that wait for the scheduler
PROBE_S = 15.0  # how long an answer of the scheduler counts
DEFAULT_PORT = 8786

log = get_logger(__name__)


def unreachable(scheduler: str, *, timeout_s: float = 2.0) -> str:
    """Why no connection to the scheduler can be opened, with the remedy; "" where it can. Needs no Dask."""
    parts = urlsplit(scheduler)
    try:
        with socket.create_connection((parts.hostname or "", parts.port or DEFAULT_PORT), timeout=timeout_s):
            return ""
    except (OSError, ValueError) as error:
        return (f"the Dask scheduler {scheduler} does not answer: {error}. Remedy: start it, or correct "
                "work.dask_scheduler; the jobs run when it is back")


class Cluster:
    """Whether the scheduler answers, for all executors of this node; queued jobs say that they wait for it.

    clock  seconds since 1970.   probe  why it does not answer, "" where it does.
    """

    def __init__(self, ledger: Ledger, scheduler: str, *, clock: Callable[[], float] = time.time,
                 probe: Callable[[str], str] = unreachable) -> None:
        self._ledger, self.scheduler, self._clock, self._probe = ledger, scheduler, clock, probe
        self._why, self._asked_at = "", float("-inf")

    def may_start(self, inner: Callable[[str], bool] | None = None) -> Callable[[str], bool]:
        """`may_start` of the executors: `inner`'s answer while the cluster is there, else no.

        An urgent job is claimed all the same, and comes back with the reason.
        """
        return lambda route: self.ready() and (inner is None or inner(route))

    def ready(self) -> bool:
        """Whether the scheduler answers; asked at most every PROBE_S."""
        now = self._clock()
        if not 0 <= now - self._asked_at < PROBE_S:
            why = self._probe(self.scheduler)
            if bool(why) != bool(self._why):
                action = "cluster_unreachable" if why else "cluster_back"
                log.warning(why or "the Dask scheduler is back", action=action, scheduler=self.scheduler)
            self._asked_at, self._why = now, why
            self._mark(why, now)
        return not self._why

    def _mark(self, why: str, now: float) -> None:
        """The jobs that wait for the cluster say so, and cease to when it is back: one event each."""
        asked = "SELECT id FROM job WHERE state = 'queued' AND " + ("code != ?" if why else "code = ?")
        if not self._ledger.query(asked, (WAITS,)):
            return
        with self._ledger.transaction():  # asked again: another executor may have claimed one
            for row in self._ledger.query(asked, (WAITS,)):
                self._ledger.set_job(row["id"], "queued", now=now, code=WAITS if why else "", reason=why)

    def losses(self, job_id: int) -> int:
        """How often a worker was lost with this job."""
        return self._ledger.count_events(job_id, code=WorkerLost.code)


class DaskRunner:
    """Runs orders in child processes that ask the cluster for the deconvolution.

    device   "auto", "cpu", "cuda": what a worker must offer.   threads  CPU threads of the computation on the worker.
    child    starts the child; None: as the node does without a cluster.
    """

    def __init__(self, cluster: Cluster, device: str = "auto", threads: int = 0, *,
                 child: Runner | None = None) -> None:
        self._cluster = cluster
        self._child = child or ChildRunner(device.partition(":")[0], threads)

    def start(self, job: Mapping[str, Any], order: Mapping[str, Any], folder: Path) -> Running:
        """Raises OSError where no process can be started."""
        running = self._child.start(job, {**order, "dask_scheduler": self._cluster.scheduler}, folder)
        return _Counted(running, lost_before=self._cluster.losses(int(job["id"])))


class _Counted:
    """A run whose worker was lost again counts as a failed attempt."""

    def __init__(self, running: Running, *, lost_before: int) -> None:
        self._running, self._lost_before = running, lost_before

    @property
    def ended(self) -> bool:
        return self._running.ended

    def read(self, wait_s: float) -> list[dict[str, Any]]:
        return [self._judged(message) for message in self._running.read(wait_s)]

    def finish(self, *, grace_s: float) -> Ending:
        return self._running.finish(grace_s=grace_s)

    def _judged(self, message: dict[str, Any]) -> dict[str, Any]:
        if self._lost_before and message["kind"] == "lost" and message.get("code") == WorkerLost.code:
            reason = f"{message['reason']}; it was not the first worker to be lost with this job"
            return {"kind": "failed", "code": message["code"], "reason": reason}
        return message
