"""/metrics for Prometheus: the node in figures, read from ledger and disk when it is asked.

Names follow prometheus.io/docs/practices/naming: base units, `_total` for what only grows, times as seconds since 1970.
No label ever holds a UID, a name of a patient or anything else taken from an object.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from itertools import product
from typing import Any, Generic, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dicomnode import __version__, measures
from dicomnode.config import Config
from dicomnode.forecast import forecast
from dicomnode.ledger import SCHEMA_VERSION
from dicomnode.measures import Deliveries, Gpu, Now, gpus
from dicomnode.states import JOB_STATES
from dicomnode.tally import BUCKETS_S, NODE_EVENTS, OTHER, History, Received, Reception, Spread, Tally
from dicomnode.web.access import Viewer
from dicomnode.web.site import Site

__all__ = ["NodeCollector", "router"]

Labels = tuple[str, ...]
Value = TypeVar("Value")
PREFIX = "dicomnode_"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
# What is dear to find out is asked no more often.
GPU_S, FORECAST_S, FINISHED_S, CERTIFICATE_S = 15.0, 60.0, 60.0, 300.0
MIB = 2**20

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse, tags=["Health"])
def metrics(request: Request, user: Viewer) -> PlainTextResponse:
    """The node in figures, in the text format of Prometheus."""
    return PlainTextResponse(generate_latest(_registry(request)), media_type=TEXT)


def _registry(request: Request) -> CollectorRegistry:
    """One for each application, made when it is first asked: what was counted is remembered between two looks."""
    state = request.app.state
    if not hasattr(state, "metrics"):
        registry = CollectorRegistry(auto_describe=False)
        registry.register(NodeCollector(lambda: state.site))
        ProcessCollector(registry=registry)
        state.metrics = registry
    found: CollectorRegistry = state.metrics
    return found


class _Kept(Generic[Value]):
    """The value of `ask`, no older than `seconds`."""

    def __init__(self, seconds: float, timer: Callable[[], float]) -> None:
        self._seconds, self._timer = seconds, timer
        self._lock = threading.Lock()
        self._found: tuple[float, Value] | None = None

    def get(self, ask: Callable[[], Value]) -> Value:
        with self._lock:
            if self._found is None or not 0 <= self._timer() - self._found[0] < self._seconds:
                self._found = self._timer(), ask()
            return self._found[1]


class NodeCollector(Collector):
    """Reads the node of `site` at every scrape.

    ask_gpus   what the machine has; none where nvidia-smi is not there.   timer   seconds that only grow.
    """

    def __init__(self, site: Callable[[], Site], *, ask_gpus: Callable[[], list[Gpu]] = gpus,
                 timer: Callable[[], float] = time.monotonic) -> None:
        self._site, self._ask_gpus, self._timer = site, ask_gpus, timer
        self._tally, self._reception = Tally(timer=timer), Reception(timer=timer)
        self._gpus = _Kept[list[Gpu]](GPU_S, timer)
        self._plan = _Kept[dict[str, Any]](FORECAST_S, timer)
        self._finished = _Kept[dict[str, dict[str, int]]](FINISHED_S, timer)
        self._certificates = _Kept[dict[str, float | None]](CERTIFICATE_S, timer)

    def describe(self) -> Iterable[Metric]:
        """Nothing is looked at when the registry is made."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Raises sqlite3.Error, OSError: the scrape fails, and Prometheus says `up` is 0."""
        began, site = self._timer(), self._site()
        now = site.clock()
        seen = measures.take(site.ledger, site.config, site.spool, now=now)
        over = self._finished.get(lambda: measures.finished(site.ledger))
        history = self._tally.look(site.ledger)
        received = self._reception.look(site.ledger, now=now)
        plan = self._plan.get(lambda: forecast(site.ledger, site.config, now=now))
        expires = self._certificates.get(lambda: measures.certificates(site.config, now=now))
        yield from _about(site)
        yield from _work(seen, over, now)
        yield from _plan(plan)
        yield from _delivering(seen.deliveries, over["commitment"])
        yield from _machine(seen, site)
        yield from _gpus(self._gpus.get(self._ask_gpus))
        yield _gauge("certificate_expiry_timestamp_seconds", "When the certificate of that key of the configuration "
                     "expires, seconds since 1970; NaN: it cannot be read.", ["certificate"],
                     {(name,): float("nan") if at is None else at for name, at in expires.items()})
        yield _gauge("history_read", "1: all of the ledger is counted. 0: it is long and still being read; counters "
                     "come once it is.", [], {(): float(history is not None and received is not None)})
        if history is not None and received is not None:
            yield from _history(history, site.config)
            yield from _received(received, {peer.ae_title for peer in site.config.peer})
        yield _gauge("scrape_duration_seconds", "How long it took to find all this out.", [],
                     {(): self._timer() - began})


def _gauge(name: str, text: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    """`values`: values of the labels -> the figure."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(list(key), value)
    return family


def _counter(name: str, text: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    """`name` without _total."""
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(list(key), value)
    return family


def _histogram(name: str, text: str, labels: list[str], spreads: Mapping[Labels, Spread]) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    for key, spread in sorted(spreads.items()):
        total, buckets = 0, []
        for end, count in zip([*map(str, BUCKETS_S), "+Inf"], spread.buckets, strict=True):
            total += count
            buckets.append((end, float(total)))
        family.add_metric(list(key), buckets, spread.sum)
    return family


def _keyed(values: Mapping[str, float]) -> dict[Labels, float]:
    return {(key,): value for key, value in values.items()}


def _about(site: Site) -> Iterable[Metric]:
    yield InfoMetricFamily(PREFIX + "build", "Version of the software and of its ledger.",
                           {"version": __version__, "ledger": str(SCHEMA_VERSION)})
    yield _gauge("retention_seconds", "How long finished objects are kept; 0: for ever.", ["what"],
                 _keyed(measures.retention_s(site.config)))


def _work(seen: Now, over: Mapping[str, Mapping[str, int]], now: float) -> Iterable[Metric]:
    yield _gauge("jobs", "Jobs by state; what is finished (delivered, committed, cancelled, superseded) as of a minute "
                 "ago.", ["state"], _keyed({**seen.jobs, **over["job"]}))
    yield _gauge("series", "Series received, by state; what is finished (matched, ignored) as of a minute ago.",
                 ["state"], _keyed({**seen.series, **over["series"]}))
    yield _gauge("queue_jobs", "Jobs that wait for their turn (queued, or failed and to be tried again).", ["route"],
                 _keyed(seen.queued))
    yield _gauge("queue_urgent_jobs", "Waiting jobs that are urgent.", [], {(): seen.urgent})
    yield _gauge("queue_oldest_age_seconds", "For how long the oldest waiting job waits; 0: none waits.", [],
                 {(): _age(seen.queued_at, now)})
    yield _gauge("running_oldest_age_seconds", "For how long the job runs that runs longest; 0: none runs.", [],
                 {(): _age(seen.running_at, now)})
    yield _gauge("running_progress_ratio", "How far the running job is, by device, 0 to 1.", ["device"],
                 _keyed(seen.progress))
    yield _gauge("held", "Jobs and series that wait for a person, by reason code.", ["what", "code"], seen.held)


def _age(at: float | None, now: float) -> float:
    return 0.0 if at is None else max(0.0, now - at)


def _plan(plan: Mapping[str, Any]) -> Iterable[Metric]:
    yield _gauge("forecast_jobs", "Waiting jobs by what the forecast says: fits, past-end (of the window), "
                 "not-tonight, unknown.", ["verdict"], _keyed(plan["counts"]))
    yield _gauge("forecast_work_seconds", "Work that the forecast sees in the waiting jobs that start tonight, "
                 "seconds, all devices together.", [], {(): _work_s(plan["jobs"])})


def _work_s(jobs: Iterable[Mapping[str, Any]]) -> float:
    return sum((datetime.fromisoformat(job["end"]) - datetime.fromisoformat(job["start"])).total_seconds()
               for job in jobs if job["verdict"] in ("fits", "past-end") and job["start"] and job["end"])


def _delivering(peers: Mapping[str, Deliveries], commitments: Mapping[str, int]) -> Iterable[Metric]:
    yield _gauge("deliveries", "Deliveries by peer: waiting (to be sent), failing (of these, tried in vain), dead "
                 "(given up), unproven (sent, proof not yet there).", ["peer", "state"],
                 {(peer, state): getattr(one, state) for peer, one in peers.items()
                  for state in ("waiting", "failing", "dead", "unproven")})
    yield _gauge("delivery_oldest_timestamp_seconds", "When the oldest waiting delivery was entered, by peer.",
                 ["peer"], {(peer,): one.oldest_at for peer, one in peers.items() if one.oldest_at is not None})
    yield _gauge("commitments", "Requests for storage commitment that we made, by state.", ["state"],
                 _keyed(commitments))


def _machine(seen: Now, site: Site) -> Iterable[Metric]:
    yield _gauge("worker_up", "1: the worker's heartbeat is fresh. 0: it died or hangs.", ["worker"],
                 {(one.device,): one.up for one in seen.workers})
    yield _gauge("worker_busy", "1: the worker has a job.", ["worker"],
                 {(one.device,): one.busy for one in seen.workers})
    yield _gauge("worker_heartbeat_timestamp_seconds", "Last sign of life of the worker.", ["worker"],
                 {(one.device,): one.heartbeat_at for one in seen.workers})
    yield _gauge("receiver_up", "1: a receiving process has the data directory; absent: cannot be told here.", [],
                 {} if seen.receiver_up is None else {(): seen.receiver_up})
    yield _gauge("source_up", "1: the source could be asked for its studies the last time.", ["peer"],
                 _keyed(seen.sources))
    yield _gauge("alerts", "Things that are wrong now, by level, as the node itself sees it.", ["level"],
                 _keyed(seen.alerts))
    yield _gauge("disk_free_bytes", "Free on the file system of the data directory.", [], {(): seen.disk_free})
    yield _gauge("disk_size_bytes", "Size of the file system of the data directory.", [], {(): seen.disk_total})
    yield _gauge("disk_watermark_bytes", "Below so much free space every object is refused.", [],
                 {(): site.config.reception.low_disk_mb * MIB})
    yield _gauge("ledger_size_bytes", "Size of the ledger with its write-ahead log.", [], {(): seen.ledger_bytes})


def _gpus(found: list[Gpu]) -> Iterable[Metric]:
    for name, text, value in (
            ("gpu_utilization_ratio", "Part of the time that the GPU computed, 0 to 1.", "utilisation"),
            ("gpu_memory_used_bytes", "Memory of the GPU in use.", "used_bytes"),
            ("gpu_memory_size_bytes", "Memory of the GPU.", "total_bytes"),
            ("gpu_temperature_celsius", "Temperature of the GPU.", "celsius")):
        values = {(gpu.index, gpu.name): getattr(gpu, value) for gpu in found if getattr(gpu, value) is not None}
        if values:
            yield _gauge(name, text, ["gpu", "model"], values)


def _history(history: History, config: Config) -> Iterable[Metric]:
    """What can be is there from the start, with 0: the rise of a counter that has just appeared cannot be seen."""
    routes = [route.name for route in config.route]
    peers = {peer for route in config.route for peer in route.send_to}
    counts = history.counts
    yield _histogram("job_duration_seconds", "From the start of a job's last run to its result.",
                     ["method", "preset", "device"], history.durations)
    yield _histogram("job_wait_seconds", "From queued to the first start, windows included.", ["route"],
                     {(route,): Spread() for route in routes} | history.waits)
    yield _counter("job_changes", "Changes of jobs into that state.", ["route", "state"],
                   _zero(product(routes, JOB_STATES)) | counts.get("job_changes", {}))
    yield _counter("job_failures", "Attempts that failed, by reason code.", ["code"], counts.get("failures", {}))
    yield _counter("holds", "Jobs and series that came to wait for a person, by reason code.", ["what", "code"],
                   counts.get("holds", {}))
    yield _counter("received_series", "Series of which something came, by modality.", ["modality"],
                   _zero([("PT",), ("CT",)]) | counts.get("series", {}))
    yield _counter("refusals", "What was refused: associations (security), objects and other events of reception, by "
                   "reason code.", ["kind", "code"], counts.get("refusals", {}))
    yield _counter("deliveries_finished", "Deliveries that were delivered, committed or given up (dead), by peer.",
                   ["peer", "state"],
                   _zero(product(peers, ("delivered", "committed", "dead"))) | counts.get("deliveries", {}))
    yield _counter("sent_instances", "Instances of deliveries that are complete, by peer.", ["peer"],
                   _zero(product(peers)) | counts.get("sent", {}))
    yield _gauge("delivery_success_timestamp_seconds", "When a delivery to that peer last succeeded.", ["peer"],
                 _keyed(history.last))
    yield _counter("purges", "Series (inputs) and jobs (derived series) whose files were removed.", ["what"],
                   _zero([("series",), ("job",)]) | counts.get("purges", {}))
    yield _counter("node_events", "Starts of the worker process (started) and of its workers (worker-started), workers "
                   "that ended without saying so (worker-gone), repairs of the ledger (repaired).", ["event"],
                   _zero(product(NODE_EVENTS)) | counts.get("node", {}))


def _zero(labels: Iterable[Labels]) -> dict[Labels, float]:
    return dict.fromkeys(labels, 0.0)


def _received(received: Mapping[str, Received], known: set[str]) -> Iterable[Metric]:
    """By the AE titles of the configuration; what came from others, of an older configuration, is one."""
    callers: dict[Labels, Received] = {(title,): Received() for title in known}
    for title, one in received.items():
        callers.setdefault((title if title in known else OTHER,), Received()).add(one.instances, one.bytes, one.last_at)
    yield _counter("received_instances", "Instances received, by calling AE title.", ["calling_ae"],
                   {key: one.instances for key, one in callers.items()})
    yield _counter("received_bytes", "Bytes of the instances received, by calling AE title.", ["calling_ae"],
                   {key: one.bytes for key, one in callers.items()})
    yield _gauge("received_timestamp_seconds", "When the last instance came, by calling AE title.", ["calling_ae"],
                 {key: one.last_at for key, one in callers.items() if one.last_at})
