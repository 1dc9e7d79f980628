"""The working process: matches, runs jobs, delivers. One per data directory; it meets the receiver in the ledger."""

from __future__ import annotations

import fcntl
import functools
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dicomnode import logs, schedule, workers
from dicomnode.alerts import ALERT_S, Alerter
from dicomnode.config import Config
from dicomnode.daskexecutor import Cluster, DaskRunner
from dicomnode.delivery import Deliverer
from dicomnode.errors import NodeError
from dicomnode.executor import LONGEST_WAIT_S, Executor
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.matcher import Matcher
from dicomnode.nightly import NIGHTLY_S, Nightly
from dicomnode.process import Pulse
from dicomnode.proof import Prover
from dicomnode.reload import Reloader
from dicomnode.retention import PURGE_S, Purger
from dicomnode.runner import ChildRunner, Runner
from dicomnode.services.commitscp import Reporter
from dicomnode.spool import Spool
from dicomnode.spoolcheck import require_jobs
from dicomnode.windows import Openings

__all__ = ["run"]

LOCK_WAIT_S = 10.0  # an earlier worker that is just ending
CLOSE_S = 4.0
#: A tick or an executor that did not get on for so long hangs. Far beyond what a slow disk or a locked ledger takes.
HANG_S = 900.0
#: Ticks that never last long: what they start works in threads of its own. Others may remove files for hours.
SHORT_TICKS = ("matcher", "deliveries", "proofs", "commitments", "sources")

log = get_logger(__name__)


def run(config: Config, *, stop: threading.Event, ready: Callable[[], None], pulse: Pulse | None = None,
        reloader: Reloader | None = None) -> None:
    """Work until `stop` is set; `ready` is called once when everything runs.

    pulse     shows which thread hangs.   reloader  tells of a new configuration.
    Raises NodeError where another worker has the data directory, LedgerCorrupt, and what ended an executor.
    """
    spool = Spool(config.node.data_dir)
    with _alone(spool.data_dir / "work.lock", stop), Ledger(spool.ledger_path) as ledger:
        require_jobs(ledger, spool)
        for name in workers.clear(ledger, now=time.time()):
            log.warning(f"worker {name} had ended without saying so", action="worker_gone")
        pulse = pulse or Pulse()
        crew = _Crew(config, ledger, spool, stop, pulse)
        alerter = Alerter(config, ledger, spool)
        rounds = _Rounds(config, ledger, spool, pulse, alerter)
        crew.start()
        rounds.start()
        log.info("worker runs", action="worker_ready", data_dir=str(spool.data_dir))
        ready()
        try:
            while not stop.wait(0.5) and crew.tend():
                rounds.watch()
                if reloader is not None:
                    reloader.take(ledger, functools.partial(_reconfigure, crew, rounds), now=time.time())
        finally:
            stop.set()
            rounds.end()
            crew.end()
            alerter.close(clean=crew.error is None)
        if crew.error is not None:
            raise crew.error
        log.info("worker ends", action="worker_stopped")


def _reconfigure(crew: _Crew, rounds: _Rounds, config: Config) -> None:
    rounds.reconfigure(config)
    crew.reconfigure(config)
    logs.configure(config.node)


# --- the ticks


@dataclass(frozen=True)
class _Parts:
    """What works by the clock under one configuration. The names are the same whatever it says."""

    ticks: Mapping[str, tuple[Callable[[], object], float]]  # name -> (call, every so many seconds)
    once: Callable[[], object]
    closers: tuple[Callable[[float], None], ...]  # stop what outlives a tick, within so many seconds

    def close(self) -> list[threading.Thread]:
        """All at once; join the threads."""
        threads = [threading.Thread(target=closer, args=(CLOSE_S,)) for closer in self.closers]
        for thread in threads:
            thread.start()
        return threads


def _parts(config: Config, ledger: Ledger, spool: Spool) -> _Parts:
    deliverer, prover = Deliverer(config, ledger, spool), Prover(config, ledger, spool)
    matcher, reporter = Matcher(config, ledger, spool), Reporter(config, ledger, spool)
    nightly = Nightly(config, ledger, spool)
    return _Parts({
        "matcher": (matcher.tick, schedule.MATCH_S),
        "deliveries": (deliverer.tick, schedule.DELIVER_S),
        "proofs": (prover.tick, schedule.DELIVER_S),
        "commitments": (reporter.tick, schedule.DELIVER_S),
        "sources": (nightly.tick, NIGHTLY_S),
        "housekeeping": (lambda: _tidy(config, ledger, spool, now=time.time()), schedule.TIDY_S),
        "retention": (Purger(config, ledger, spool).tick, PURGE_S),
    }, once=matcher.prepare, closers=(deliverer.close, prover.close, reporter.close, nightly.close))


class _Rounds:
    """The scheduler, whose ticks always call the parts of the configuration in force."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, pulse: Pulse, alerter: Alerter) -> None:
        self._ledger, self._spool, self._pulse, self._alerter = ledger, spool, pulse, alerter
        self._parts = _parts(config, ledger, spool)
        ticks: dict[str, tuple[Callable[[], object], float]] = {
            name: (functools.partial(self._tick, name), seconds)
            for name, (_, seconds) in self._parts.ticks.items()}
        self._scheduler = schedule.build({**ticks, "alerts": (alerter.tick, ALERT_S)}, once=self._prepare)

    def _prepare(self) -> None:
        """In a thread that nobody waits for: it asks a child process that loads the libraries of a method."""
        threading.Thread(target=self._parts.once, name="prepare", daemon=True).start()

    def _tick(self, name: str) -> None:
        self._pulse.beat(name)
        try:
            with self._alerter.watching(name):
                self._parts.ticks[name][0]()
        finally:
            self._pulse.beat(name)

    def start(self) -> None:
        for name in SHORT_TICKS:
            self._pulse.expect(name, self._parts.ticks[name][1] + HANG_S)
        self._scheduler.start()

    def watch(self) -> None:
        """Called often, by a clock that nobody sets."""
        if schedule.mend(self._scheduler):
            log.warning("the clock was set back: what was due by it is done now", action="clock_set_back")

    def reconfigure(self, config: Config) -> None:
        """A tick that runs ends as it began; the next one works by the new configuration."""
        fresh = _parts(config, self._ledger, self._spool)
        for thread in self._parts.close():  # an instance on its way is finished; the new part sends the others
            thread.join()
        self._parts = fresh
        self._alerter.reconfigure(config)
        self._prepare()

    def end(self) -> None:
        for name in SHORT_TICKS:
            self._pulse.forget(name)
        closing = self._parts.close()
        self._scheduler.shutdown(wait=True)
        for thread in closing:
            thread.join()


# --- the executors


class _Crew:
    """The executors, one thread and one row of table worker each, and the thread that writes their heartbeats."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, stop: threading.Event, pulse: Pulse) -> None:
        self._config, self._ledger, self._spool, self._stop, self._pulse = config, ledger, spool, stop, pulse
        self._employment = _Employment(config, ledger)
        self._workers: dict[str, _Worker] = {}
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heart", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> None:
        lost = Executor(self._config, self._ledger, self._spool).recover()
        if lost:
            log.warning("jobs were running when the last worker ended", action="recovered", jobs=lost)
        self.tend()
        self._heart.start()

    def tend(self) -> bool:
        """Start the workers that are wanted and missing, forget those that have retired; False where one failed."""
        for name, worker in list(self._workers.items()):
            if not worker.is_alive():
                self.error = self.error or worker.error
                self._forget(name)
        if self.error is None:
            for name, device in _devices(self._config).items():
                if name not in self._workers:
                    self._hire(name, device)
        return self.error is None

    def reconfigure(self, config: Config) -> None:
        """Jobs that run go on as they were started; a device that is no longer named is left after its job."""
        self._config, self._employment = config, _Employment(config, self._ledger)
        wanted = _devices(config)
        for name, worker in self._workers.items():
            if name in wanted:
                worker.executor.reconfigure(config, runner=self._employment.runner(wanted[name]),
                                            may_start=self._employment.may_start)
                worker.retire.clear()
            else:
                worker.retire.set()

    def end(self) -> None:
        """`stop` is set: running jobs are put back."""
        for worker in self._workers.values():
            worker.join()
            self.error = self.error or worker.error
        self._over.set()
        if self._heart.ident is not None:
            self._heart.join()
        for name in list(self._workers):
            self._forget(name)

    def _hire(self, name: str, device: str) -> None:
        executor = Executor(self._config, self._ledger, self._spool, device=device, name=name,
                            runner=self._employment.runner(device), may_start=self._employment.may_start,
                            beat=functools.partial(self._pulse.beat, name))
        workers.enter(self._ledger, name, device=device, now=time.time())
        self._pulse.expect(name, HANG_S)
        self._workers[name] = _Worker(executor, self._stop)
        self._workers[name].start()

    def _forget(self, name: str) -> None:
        del self._workers[name]
        self._pulse.forget(name)
        workers.leave(self._ledger, name, now=time.time())

    def _beat(self) -> None:
        """Write how long ago each worker got on: one that hangs grows stale although this thread lives."""
        while not self._over.wait(self._config.work.heartbeat_s):
            now = time.time()
            try:
                workers.beat(self._ledger, [
                    workers.Beat(name, now - self._pulse.silent_s(name), worker.executor.job_id)
                    for name, worker in list(self._workers.items())])
            except sqlite3.Error as error:  # disk full, or locked for long: the next beat will tell
                log.warning("no heartbeat could be written", action="heartbeat_failed", error=str(error))


def _devices(config: Config) -> dict[str, str]:
    """Worker's name -> its device, one job at a time on each."""
    work = config.work
    devices = ["dask"] * work.dask_jobs if work.executor == "dask" else list(work.devices) or [work.device]
    return dict(zip(workers.worker_names(devices), devices, strict=True))


class _Employment:
    """What the executors get of one configuration: when jobs may start, and what runs them."""

    def __init__(self, config: Config, ledger: Ledger, *, clock: Callable[[], float] = time.time) -> None:
        self._work, self._clock = config.work, clock
        self._openings = Openings(config.schedule, config.route)
        self._cluster = Cluster(ledger, self._work.dask_scheduler) if self._work.executor == "dask" else None

    def may_start(self, route: str) -> bool:
        """Whether jobs of that route may start now."""
        opened = self._openings.may_start(self._clock())
        return opened(route) if self._cluster is None else self._cluster.may_start(opened)(route)

    def runner(self, device: str) -> Runner:
        """Several devices share the processor's cores, unless the configuration says how many threads a job takes."""
        threads, count = self._work.threads, len(self._work.devices)
        if self._cluster is not None:
            return DaskRunner(self._cluster, self._work.device, threads)
        if not threads and count > 1:
            threads = max(1, (os.cpu_count() or 1) // count)
        return ChildRunner(device, threads)


class _Worker(threading.Thread):
    """An executor's thread. It starts the children, and they die with it: it must live as long as they do."""

    def __init__(self, executor: Executor, stop: threading.Event) -> None:
        super().__init__(name=f"executor-{executor.device}")
        self.executor, self._stop_wanted = executor, stop
        self.retire = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.executor.run(self._stop_wanted, self.retire)
        except Exception as error:
            # Kept for the main thread, which ends the process with it: the supervisor starts a fresh worker.
            self.error = error


def _tidy(config: Config, ledger: Ledger, spool: Spool, *, now: float) -> None:
    """At the start and every hour: times that a wrong clock stamped, and folders that nobody owns."""
    complete = config.completeness
    waits = [complete.give_up_h * 3600, complete.ct_wait_s, 1.25 * config.delivery.retry_max_s, LONGEST_WAIT_S,
             config.delivery.commitment_timeout_s, *(route.ct_wait_s or 0.0 for route in config.route)]
    mended = schedule.mend_times(ledger, now=now, longest_wait_s=max(waits) + complete.quiet_s + 60)
    if mended:
        log.warning("times ahead of the clock were set to now: was the clock set back?", action="times_mended",
                    times=mended)
    schedule.sweep_work(ledger, spool)


@contextmanager
def _alone(path: Path, stop: threading.Event) -> Iterator[None]:
    """Hold the lock file of the data directory; the kernel drops it with the process, however that ends."""
    until = time.monotonic() + LOCK_WAIT_S
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stop.is_set() or time.monotonic() > until:
                    raise NodeError(f"another worker has the data directory {path.parent}. Remedy: stop it, or give "
                                    "this node a data directory of its own.") from None
                stop.wait(0.2)
        yield
