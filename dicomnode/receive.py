"""The receiving process: opens spool and ledger, verifies them, listens until told to stop. Never loads torch."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dicomnode.config import Config
from dicomnode.errors import LedgerCorrupt, NodeError
from dicomnode.ledger import Ledger
from dicomnode.logs import configure, get_logger
from dicomnode.process import Pulse
from dicomnode.reload import Reloader
from dicomnode.scp import Receiver
from dicomnode.spool import Spool
from dicomnode.spoolcheck import at_start, require_jobs

__all__ = ["run"]

POLL_S = 0.5
CHECKED_FIRST = 2**30  # bytes; reading a larger ledger takes minutes, and the scanners are not to wait for it


def run(config: Config, *, stop: threading.Event, ready: Callable[[], None], pulse: Pulse | None = None,
        reloader: Reloader | None = None) -> None:
    """Receive until `stop` is set; `ready` is called once associations are accepted.

    pulse     shows which thread hangs.   reloader  tells of a new configuration.
    Raises LedgerCorrupt where the ledger is damaged, NodeError where another receiver uses the data directory or a
    thread ended, OSError where directory or address cannot be used.
    """
    configure(config.node)
    log = get_logger("receive")
    spool = Spool(config.node.data_dir)
    with _only_receiver(spool.data_dir), Ledger(spool.ledger_path) as ledger:
        damage = _Damage(ledger)
        require_jobs(ledger, spool)
        swept = spool.sweep_incoming()
        found = at_start(ledger, spool, now=time.time())
        if found.alarming:
            log.warning(str(found), action="spool_damaged", missing=found.missing, unknown=found.unknown,
                        held=len(found.held))
        receiver = Receiver(config, spool, ledger, clock=time.time)
        receiver.start()
        node, known = config.node, ledger.counts()["instance"]["all"]
        ports = " and ".join([f"port {node.port}"] * config.tls.plain
                             + [f"port {config.tls.port} with TLS"] * (config.tls.port is not None))
        log.info(f"{node.ae_title} receives on {node.host} {ports}; {known} instances are known, "
                 f"{swept} unfinished files were removed.", action="receiver_started", port=node.port, swept=swept)
        try:
            ready()
            while not stop.wait(POLL_S):
                if reloader is not None:
                    reloader.take(ledger, partial(_reconfigure, receiver), now=time.time())
                damage.tell()
                if dead := receiver.dead():
                    raise NodeError(f"the receiver's thread {dead} ended. Remedy: the log says why; the receiver is to "
                                    "be started again.")
        finally:
            receiver.stop()
            log.info("The receiver has stopped.", action="receiver_stopped")


class _Damage:
    """Whether the ledger is sound: known at once, of a large one while objects come in already."""

    def __init__(self, ledger: Ledger) -> None:
        self._found: LedgerCorrupt | None = None
        if ledger.path.stat().st_size <= CHECKED_FIRST:
            ledger.check()
        else:
            own = Ledger(ledger.path)  # a connection of its own: nobody waits for it
            threading.Thread(target=self._look, args=(own,), name="ledger-check", daemon=True).start()

    def _look(self, own: Ledger) -> None:
        try:
            with own:
                own.check()
        except LedgerCorrupt as error:
            self._found = error
        except NodeError as error:
            get_logger("receive").warning(str(error), action="ledger_unchecked")

    def tell(self) -> None:
        """Raises LedgerCorrupt once it is known to be damaged."""
        if self._found is not None:
            raise self._found


def _reconfigure(receiver: Receiver, config: Config) -> None:
    receiver.reconfigure(config)
    configure(config.node)


@contextmanager
def _only_receiver(data_dir: Path) -> Iterator[None]:
    """Hold the data directory's lock; the kernel lets it go with the process, however that ends."""
    with (data_dir / "receiver.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NodeError(f"another receiver uses {data_dir}. Remedy: end it, or give this one its own.") from error
        yield
