"""SIGHUP: the configuration is read again. A file that is not usable changes nothing, and each wrong key is said.

What may change while the node runs takes effect at once: peers, routes, windows, limits, time-outs, delivery,
retention, alerts, log level. What cannot (`NEEDS_RESTART`) keeps its old value until the process is started anew, and
is named. Jobs that run keep the settings they were started with.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dicomnode.config import Config, load
from dicomnode.errors import ConfigError
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger

__all__ = ["NEEDS_RESTART", "Reading", "Reloader", "merged"]

#: Bound at the start: addresses we listen on, files we hold, what peers negotiate, who runs jobs.
NEEDS_RESTART = (
    "node.ae_title", "node.host", "node.port", "node.data_dir", "node.uid_root", "reception.max_pdu", "services", "tls",
    "web", "work.executor", "work.dask_scheduler", "work.dask_jobs",
)

log = get_logger(__name__)


@dataclass(frozen=True)
class Reading:
    """A configuration that was read again: what is in force from now on, which keys changed, which wait for a restart.

    Keys are "section.key"; of peers and routes their names, as in "peer PACS"; services in words.
    """

    config: Config
    changed: tuple[str, ...]
    restart: tuple[str, ...]


def merged(old: Config, new: Config) -> Reading:
    """`new` with the old values of what cannot change while the node runs.

    Raises ConfigError where the rest of `new` does not go with them.
    """
    differing = _differing(old, new)
    restart = tuple(key for key in differing if _needs_restart(key))
    values, before = new.model_dump(), old.model_dump()
    for key in restart:
        section, _, name = key.partition(".")
        values[section][name] = before[section][name]
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(str(item["msg"]).removeprefix("Value error, ") for item in error.errors())
        raise ConfigError(f"it needs a restart of the node ({', '.join(restart)}); without it: {problems}") from error
    changed = tuple(key for key in differing if key not in restart)
    return Reading(config, changed, (*restart, *_not_negotiated(old, new)))


def _not_negotiated(old: Config, new: Config) -> Iterator[str]:
    """What the presentation contexts that were bound at the start do not offer, and a peer wants for the first time."""
    if not any(peer.may_query for peer in old.peer) and any(peer.may_query for peer in new.peer):
        yield "C-GET for the first peer with may_query"
    asked = [any(peer.confirm == "commitment" for peer in config.peer) for config in (old, new)]
    if not old.services.storage_commitment and asked == [False, True]:
        yield "storage commitment for the first peer with confirm = \"commitment\""


def _needs_restart(key: str) -> bool:
    return key in NEEDS_RESTART or key.partition(".")[0] in NEEDS_RESTART


def _differing(old: Config, new: Config) -> list[str]:
    found = []
    for section in type(old).model_fields:
        before, after = getattr(old, section), getattr(new, section)
        if isinstance(before, tuple):
            names = _by_name(section, before), _by_name(section, after)
            changed = [name for name in {**names[0], **names[1]} if names[0].get(name) != names[1].get(name)]
            order = list(names[0]) != list(names[1]) and not changed
            found += changed or ([f"order of {section}s"] if order else [])
        else:
            found += [f"{section}.{key}" for key in type(before).model_fields
                      if getattr(before, key) != getattr(after, key)]
    return found


def _by_name(section: str, values: tuple[Any, ...]) -> Mapping[str, Any]:
    return {f"{section} {value.name}": value.model_dump() for value in values}


class Reloader:
    """The configuration of one process, which may be read again. `ask` is what SIGHUP calls.

    part    who reads, for log and ledger: receive, work.
    read    gives a Config for the path, or raises ConfigError.
    """

    def __init__(self, path: Path, config: Config, *, part: str, read: Callable[[Path], Config] = load) -> None:
        self._path, self._part, self._read = path, part, read
        self._asked = False  # no Event: a signal handler must not wait for its lock
        self.config = config

    def ask(self) -> None:
        """Have the configuration read again at the next turn."""
        self._asked = True

    def take(self, ledger: Ledger, apply: Callable[[Config], None], *, now: float) -> bool:
        """Where it was asked for: read the file and, if it is usable and changes something, `apply` it; whether it was.

        apply   has the process work by a configuration; raises ConfigError, and changes nothing, where it cannot.
        """
        if not self._asked:
            return False
        self._asked = False
        try:
            reading = merged(self.config, self._read(self._path))
            if reading.changed:
                apply(reading.config)
        except ConfigError as error:
            self._refused(ledger, str(error), now)
            return False
        self.config = reading.config
        self._accepted(ledger, reading, now)
        return bool(reading.changed)

    def _refused(self, ledger: Ledger, text: str, now: float) -> None:
        head, *keys = [line.strip() for line in text.splitlines() if line.strip()]
        log.error(f"The configuration was not read again, the old one stays in force: {head}", action="reload_refused")
        for key in keys:
            log.error(key, action="reload_wrong_key")
        self._note(ledger, "config-refused", f"the old configuration stays in force: {head} {'; '.join(keys)}", now)

    def _accepted(self, ledger: Ledger, reading: Reading, now: float) -> None:
        text = f"in force: {', '.join(reading.changed) or 'nothing new'}"
        if reading.restart:
            text += f"; not before a restart: {', '.join(reading.restart)}"
        log.info(f"The configuration was read again; {text}", action="reloaded", changed=list(reading.changed),
                 restart=list(reading.restart))
        self._note(ledger, "config-read", text, now)

    def _note(self, ledger: Ledger, code: str, reason: str, now: float) -> None:
        try:
            ledger.event("node", now=now, code=code, reason=reason[:2000], actor=self._part)
        except sqlite3.Error as error:  # a full disk must not keep a new configuration out
            log.error("An event could not be written to the ledger.", action="event_lost", error=str(error))
