"""The working process: matches, runs jobs, delivers. One per data directory; it meets the receiver in the ledger."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dicomnode import schedule
from dicomnode.config import Config
from dicomnode.delivery import Deliverer
from dicomnode.errors import NodeError
from dicomnode.executor import LONGEST_WAIT_S, Executor
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.matcher import Matcher
from dicomnode.spool import Spool

__all__ = ["run"]

LOCK_WAIT_S = 10.0  # an earlier worker that is just ending
CLOSE_S = 4.0

log = get_logger(__name__)


def run(config: Config, *, stop: threading.Event, ready: Callable[[], None]) -> None:
    """Work until `stop` is set; `ready` is called once when everything runs.

    Raises NodeError where another worker has the data directory, LedgerCorrupt, and what ended the executor.
    """
    spool = Spool(config.node.data_dir)
    with _alone(spool.data_dir / "work.lock", stop), Ledger(spool.ledger_path) as ledger:
        executor = Executor(config, ledger, spool)
        lost = executor.recover()
        if lost:
            log.warning("jobs were running when the last worker ended", action="recovered", jobs=lost)
        deliverer = Deliverer(config, ledger, spool)
        matcher = Matcher(config, ledger, spool)
        runner = _Runner(executor, stop)
        scheduler = schedule.build({
            "matcher": (matcher.tick, schedule.MATCH_S),
            "deliveries": (deliverer.tick, schedule.DELIVER_S),
            "housekeeping": (lambda: _tidy(config, ledger, spool, now=time.time()), schedule.TIDY_S),
        }, once=matcher.prepare)
        runner.start()
        scheduler.start()
        log.info("worker runs", action="worker_ready", data_dir=str(spool.data_dir))
        ready()
        try:
            while not stop.wait(0.5) and runner.is_alive():
                pass
        finally:
            stop.set()
            scheduler.shutdown(wait=True)
            deliverer.close(CLOSE_S)
            runner.join()
        if runner.error is not None:
            raise runner.error
        log.info("worker ends", action="worker_stopped")


def _tidy(config: Config, ledger: Ledger, spool: Spool, *, now: float) -> None:
    """At the start and every hour: times that a wrong clock stamped, and folders that nobody owns."""
    complete = config.completeness
    waits = [complete.give_up_h * 3600, complete.ct_wait_s, 1.25 * config.delivery.retry_max_s, LONGEST_WAIT_S,
             *(route.ct_wait_s or 0.0 for route in config.route)]
    mended = ledger.mend_times(now=now, longest_wait_s=max(waits) + complete.quiet_s + 60)
    if mended:
        log.warning("times ahead of the clock were set to now: was the clock set back?", action="times_mended",
                    times=mended)
    schedule.sweep_work(ledger, spool)


class _Runner(threading.Thread):
    """The executor's thread. It starts the children, and they die with it: it must live as long as they do."""

    def __init__(self, executor: Executor, stop: threading.Event) -> None:
        super().__init__(name="executor")
        self._executor, self._stop_wanted = executor, stop
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._executor.run(self._stop_wanted)
        except Exception as error:
            # Kept for the main thread, which ends the process with it: the supervisor starts a fresh worker.
            self.error = error


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
