"""What the machine says of itself and the ledger cannot know: disk, receiver, certificates. Looking changes nothing."""

from __future__ import annotations

from pathlib import Path

from dicomnode.config import Config
from dicomnode.errors import ConfigError
from dicomnode.spool import Spool
from dicomnode.troubles import Machine

__all__ = ["certificate_days", "look", "receiver_runs"]


def look(config: Config, spool: Spool, *, now: float, starts: tuple[float, ...] = ()) -> Machine:
    """What can be seen from any process that may read the data directory."""
    return Machine(free_bytes=spool.free_bytes(), receiver_runs=receiver_runs(spool.data_dir),
                   certificates=certificate_days(config, now=now), starts=starts)


def receiver_runs(data_dir: Path) -> bool | None:
    """Whether somebody holds the receiver's lock, by /proc/locks: asking for the lock itself could stop a receiver.

    None where that cannot be told: then the worker's own lock is not to be seen there either.
    """
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        receiver, worker = (str((data_dir / name).stat().st_ino) for name in ("receiver.lock", "work.lock"))
    except (OSError, UnicodeDecodeError):
        return None
    inodes = {fields[5].rpartition(":")[2] for fields in lines if len(fields) > 5 and fields[1] == "FLOCK"}
    return receiver in inodes if worker in inodes else None


def certificate_days(config: Config, *, now: float) -> dict[str, float | None]:
    """Key of the configuration -> days until the certificate in that file expires; None: it cannot be read."""
    from dicomnode.tls import certificate_days_left, certificate_files  # loads ssl: only who uses TLS needs it

    found: dict[str, float | None] = {}
    for name, path in certificate_files(config.tls, config.peer).items():
        try:
            found[name] = certificate_days_left(path, now=now)
        except ConfigError:
            found[name] = None
    return found
