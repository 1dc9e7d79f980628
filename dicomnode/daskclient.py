"""One deconvolution on a Dask cluster, asked for by the child process of a job. What the workers do: dicomnode.remote.

Only voxels and settings travel. Two things end it without a word on the study, so that the job is queued again:

    ClusterUnavailable  no scheduler answers, no worker offers what is needed, the workers run another software
    WorkerLost          the worker ended in the middle (its machine, its network, its memory)

A worker takes one job at a time: it offers the Dask resource GPU or CPU once, and a job asks for one.
`distributed` is imported where it is used; without it nothing of this works, and the message says so.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future as Pending
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import TYPE_CHECKING, Any

from deconv import OnStep, Progress, Volume
from dicomnode import __version__, remote
from dicomnode.errors import NodeError
from dicomnode.remote import Computed, Order, opened, packed

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["ClusterUnavailable", "WorkerLost", "deconvolve"]

CONNECT_S = 10.0
POLL_S = 0.5
WATCH_S = 2.0  # how often it is looked whether the worker still lives
PATIENCE_S = 600.0  # for a worker to come that offers what is needed: adaptive clusters start them on demand


class ClusterUnavailable(NodeError):
    """The cluster cannot be used now; nothing was computed. The job waits for it."""

    code = "cluster"


class WorkerLost(NodeError):
    """The worker that computed is gone; the job can be tried again."""

    code = "dask-worker-lost"


def deconvolve(
    scheduler: str, volume: Volume, guide: Volume | None, *, method: str, preset: str, overrides: Mapping[str, Any],
    device: str, threads: int, key: str, on_step: OnStep | None = None,
    clock: Callable[[], float] = time.monotonic, patience_s: float = PATIENCE_S,
) -> Computed:
    """One deconvolution on the cluster of `scheduler` ("tcp://host:8786", "tls://..."): the same bits as here.

    device      "auto": a worker that offers GPU where there is one, else CPU; "cuda" and "cpu" ask for that kind.
    key         name of the task on the cluster, never used before: it tells no more than it must.
    patience_s  how long at most no worker may be there that offers what is needed.

    Raises ClusterUnavailable and WorkerLost (above), ValueError where the method does not take volume or settings,
    RuntimeError where the computation failed. Whatever `on_step` raises ends the task on the cluster too.
    """
    client = _connect(scheduler)
    try:
        wish = _Wish(client, scheduler, device, on_step, clock, patience_s)
        resource = wish.resource()
        order = packed(Order(volume, guide, method, preset, dict(overrides), "cuda" if resource == "GPU" else "cpu",
                             threads))
        answer = _Task(client, scheduler, resource, wish, key, clock).result(order, threads)
    finally:
        client.close()
    return _computed(answer, scheduler)


def _connect(scheduler: str) -> Client:
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise ClusterUnavailable(f"work.executor = \"dask\" needs Dask: {error}. Remedy: pip install "
                                 "'dicomnode[dask]'") from error
    dask.config.set({"distributed.admin.large-graph-warning-threshold": "10GB"})  # one order is one volume
    try:
        return Client(scheduler, timeout=CONNECT_S, set_as_default=False, name="dicomnode")
    except (OSError, ValueError, TypeError) as error:  # TypeError: tls:// without certificates
        raise ClusterUnavailable(f"no connection with the Dask scheduler {scheduler}: {error}. Remedy: start it, or "
                                 "correct work.dask_scheduler or Dask's TLS settings") from error


def _workers(client: Client, scheduler: str) -> dict[str, Any]:
    """Address -> what the scheduler knows of each worker."""
    if client.status != "running":
        raise ClusterUnavailable(f"the connection with the Dask scheduler {scheduler} was lost")
    try:
        return dict(client.sync(client.scheduler.identity, callback_timeout=CONNECT_S)["workers"])  # type: ignore
    except (OSError, NotYet, TimeoutError) as error:
        raise ClusterUnavailable(f"the Dask scheduler {scheduler} does not answer any more: {error}") from error


class _Wish:
    """Which resource is asked for, and how long it is waited for in vain."""

    def __init__(self, client: Client, scheduler: str, device: str, on_step: OnStep | None,
                 clock: Callable[[], float], patience_s: float) -> None:
        self._client, self._scheduler, self._clock = client, scheduler, clock
        self._device = device.partition(":")[0]
        self.say: OnStep = on_step or (lambda _: None)
        self._until, self._patience_s = clock() + patience_s, patience_s

    def resource(self) -> str:
        """ "GPU" or "CPU"; for "auto" what the workers offer, after waiting for one of them."""
        if self._device != "auto":
            return "GPU" if self._device == "cuda" else "CPU"
        while True:
            workers = _workers(self._client, self._scheduler)
            for resource in ("GPU", "CPU"):
                if _offers(workers, resource):
                    return resource
            self.missing(workers, "GPU or CPU")
            time.sleep(POLL_S)

    def missing(self, workers: Mapping[str, Any], resource: str) -> None:
        """Nobody offers it: say so, or lose patience."""
        self.say(Progress(f"no worker offers {resource}", 0, 1, math.nan))
        if self._clock() > self._until:
            raise ClusterUnavailable(
                f"for {self._patience_s:g} s none of the {len(workers)} workers of the cluster has offered the "
                f"resource {resource}. Remedy: start workers with --nthreads 1 --resources \"GPU=1\" (or CPU=1)")

    def found(self) -> None:
        self._until = self._clock() + self._patience_s


def _offers(workers: Mapping[str, Any], resource: str) -> bool:
    return any(facts.get("resources", {}).get(resource, 0) >= 1 for facts in workers.values())


class _Task:
    """One order on the cluster, from submission to the packed answer; gone from there however this ends."""

    def __init__(self, client: Client, scheduler: str, resource: str, wish: _Wish, key: str,
                 clock: Callable[[], float]) -> None:
        self._client, self._scheduler, self._resource, self._wish = client, scheduler, resource, wish
        self._key, self._clock = key, clock
        self._heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._worker = ""  # that has begun
        self._watched = -math.inf

    def result(self, order: bytes, threads: int) -> bytes:
        self._client.subscribe_topic(remote.TOPIC, self._hear)
        future = self._client.submit(remote.run, order, version=__version__, threads=threads, key=self._key,
                                     resources={self._resource: 1}, pure=False)
        future.add_done_callback(lambda _: self._heard.put({"kind": "ended"}))
        try:
            while not future.done():
                self._step(future)
            return self._fetched(future)
        finally:
            future.release()

    def _hear(self, event: tuple[float, Any]) -> None:
        message = event[1]
        if isinstance(message, dict) and message.get("key") == self._key:
            self._heard.put(message)

    def _step(self, future: Future) -> None:
        try:
            message = self._heard.get(timeout=POLL_S)
        except queue.Empty:
            message = {"kind": "silence"}
        if message["kind"] == "progress":
            self._wish.say(Progress(message["stage"], message["step"], message["steps"], message["loss"]))
        elif message["kind"] == "started":
            if self._worker:  # Dask starts a lost task again elsewhere; the ledger decides about that
                raise self._lost()
            self._worker = message["worker"]
        self._watch()
        if future.status in ("lost", "cancelled"):
            raise WorkerLost(f"the Dask scheduler {self._scheduler} has lost the task; was it restarted?")

    def _watch(self) -> None:
        if self._clock() - self._watched < WATCH_S:
            return
        self._watched = self._clock()
        workers = _workers(self._client, self._scheduler)
        if self._worker:
            if self._worker not in workers:
                raise self._lost()
        elif _offers(workers, self._resource):
            self._wish.found()
            self._wish.say(Progress(f"waiting for a {self._resource} worker", 0, 1, math.nan))
        else:
            self._wish.missing(workers, self._resource)

    def _lost(self) -> WorkerLost:
        return WorkerLost(f"the Dask worker {self._worker} ended while it computed")

    def _fetched(self, future: Future) -> bytes:
        """The answer, straight from the worker where it can be reached, else through the scheduler."""
        if future.status == "error":
            raise _error(future.exception(timeout=CONNECT_S), self._scheduler)
        if future.status != "finished":
            raise WorkerLost(f"the Dask scheduler {self._scheduler} has lost the task: {future.status}")
        pool = ThreadPoolExecutor(1)
        try:
            pending: Pending[bytes] = pool.submit(self._client.gather, future, direct=True)
            while True:
                try:
                    return pending.result(POLL_S)
                except NotYet:
                    self._wish.say(Progress("gather", 0, 1, math.nan))
                    self._watch()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _error(error: BaseException | None, scheduler: str) -> Exception:
    """What the failure of a task, as Dask tells it, means here."""
    from distributed import KilledWorker

    if isinstance(error, KilledWorker):
        return WorkerLost(f"workers of the cluster ended one after the other over this task: {error}")
    if isinstance(error, ImportError):
        return ClusterUnavailable(f"the workers of {scheduler} cannot load dicomnode: {error}. Remedy: install "
                                  f"dicomnode {__version__} on scheduler and workers")
    return RuntimeError(f"on the cluster: {type(error).__name__}: {error}")


def _computed(answer: bytes, scheduler: str) -> Computed:
    message = opened(answer)
    kind = message["kind"]
    if kind == "version":
        raise ClusterUnavailable(
            f"a worker of {scheduler} runs dicomnode {message['version']}, this node {__version__}, and derived series "
            "name the software that made them. Remedy: install the same version on scheduler and workers")
    if kind == "unfit":
        raise ValueError(message["reason"])
    if kind == "failed":
        raise RuntimeError(message["reason"])
    return Computed(message["result"], message["device"], message["threads"], message["torch"])
