"""Who may open an association: calling AE title, address, certificate by the [[peer]] tables; called AE title; a place.

Refusals are recorded as `security` events, few enough that port probes cannot fill the ledger.
"""

from __future__ import annotations

import contextlib
import ipaddress
import queue
import socket
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dicomnode.config import Config, Peer
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger
from dicomnode.tls import Authorities, Session

__all__ = ["Gate", "HostNames", "Refusal", "SecurityLog", "address_allowed", "printable"]

_RESOLVED_FOR_S = 60.0
_KEPT_FOR_S = 86400.0  # how long an answer holds while the name service is away
log = get_logger("gate")
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Refusal:
    """An A-ASSOCIATE-RJ (PS3.8 Table 9-21): result, source, reason; `code` and `why` for the record."""

    result: int
    source: int
    reason: int
    code: str
    why: str


def printable(text: str, *, limit: int = 64) -> str:
    """What a stranger sent, fit for a log line.

    >>> printable("AE\\x1b[31m")
    'AE?[31m'
    """
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


class Gate:
    """Decides on A-ASSOCIATE requests; counts the associations that are open."""

    def __init__(self, config: Config, *, clock: Callable[[], float], lookup_s: float = 5.0) -> None:
        self._names = HostNames(clock=clock, wait_s=lookup_s)
        self._lock = threading.Lock()
        self._open: dict[int, str] = {}
        self._callers: dict[int, tuple[Peer, ...]] = {}
        self.reconfigure(config)

    def reconfigure(self, config: Config) -> None:
        """For associations to come; those that are open stay and are counted."""
        self._config = config
        for peer in config.peer:
            if not peer.addresses:
                self._names.refresh(peer.host)

    def enter(self, ticket: int, *, calling_ae: str, called_ae: str, address: str, tls: Session | None = None,
              authorities: Authorities | None = None) -> Refusal | None:
        """None: come in, and call `leave(ticket)` at the end. Otherwise the refusal to send.

        tls, authorities   what the handshake showed, and whose certificates are whose; None for a plain connection.
        """
        calling_ae = calling_ae.strip()
        peers = self._admitted(calling_ae, called_ae.strip(), address, tls, authorities)
        if isinstance(peers, Refusal):
            return peers
        with self._lock:
            limit, own = self._config.reception.max_associations, self._config.reception.max_associations_per_peer
            if len(self._open) >= limit:
                return Refusal(2, 3, 2, "limit", f"{limit} associations are open, reception.max_associations")
            if list(self._open.values()).count(calling_ae) >= own:
                return Refusal(2, 3, 2, "limit", f"{printable(calling_ae)!r} has {own} associations open, "
                               "reception.max_associations_per_peer")
            self._open[ticket] = calling_ae
            self._callers[ticket] = peers
        return None

    def callers(self, ticket: int) -> tuple[Peer, ...]:
        """As which [[peer]] tables an association was let in: its rights are those of all of them."""
        with self._lock:
            return self._callers.get(ticket, ())

    def leave(self, ticket: int) -> None:
        with self._lock:
            self._open.pop(ticket, None)
            self._callers.pop(ticket, None)

    def _admitted(self, calling_ae: str, called_ae: str, address: str, tls: Session | None,
                  authorities: Authorities | None) -> Refusal | tuple[Peer, ...]:
        node = self._config.node
        if self._config.reception.require_called_ae_title and called_ae != node.ae_title:
            return Refusal(1, 1, 7, "called_ae", f"called AE title {printable(called_ae)!r} is not {node.ae_title!r}")
        peers = [peer for peer in self._config.peer if peer.ae_title == calling_ae and _may_call(peer)]
        if not peers:
            return Refusal(1, 1, 3, "calling_ae", f"no [[peer]] that may send has AE title {printable(calling_ae)!r}")
        peers = [peer for peer in peers if self._comes_from(peer, address)]
        if not peers:
            return Refusal(1, 1, 3, "address", f"{printable(calling_ae)!r} may not send from {address}")
        problems = [_tls_problem(peer, tls, authorities) for peer in peers]
        if None not in problems:
            return Refusal(1, 1, 1, "tls_required" if tls is None else "certificate",
                           f"{printable(calling_ae)!r} is not let in: {problems[0]}")
        return tuple(peer for peer, problem in zip(peers, problems, strict=True) if problem is None)

    def _comes_from(self, peer: Peer, address: str) -> bool:
        """Also after a second look, where the name may have other addresses by now."""
        if address_allowed(peer, address, self._names.known):
            return True
        return not peer.addresses and self._names.renewed(peer.host) and address_allowed(
            peer, address, self._names.known)


def _may_call(peer: Peer) -> bool:
    """To send, to ask, or to report on the storage commitment that we asked for."""
    return peer.may_send or peer.may_query or peer.confirm == "commitment"


def _tls_problem(peer: Peer, tls: Session | None, authorities: Authorities | None) -> str | None:
    """Why this connection is not that peer's."""
    if tls is None:
        return "it came without TLS, and peer.tls asks for it" if peer.tls else None
    return None if authorities is None else authorities.problem(peer, tls)


class HostNames:
    """Addresses of host names: looked up in the background, the last good answer kept while none comes."""

    def __init__(self, *, clock: Callable[[], float], wait_s: float) -> None:
        self._clock, self._wait_s = clock, wait_s
        self._lock = threading.Lock()
        self._good: dict[str, tuple[float, frozenset[Address]]] = {}
        self._asked: dict[str, tuple[float, threading.Event]] = {}

    def known(self, host: str) -> frozenset[Address]:
        """The last good answer, not older than a day; a new one is asked for where it is older than a minute."""
        self.refresh(host)
        with self._lock:
            at, addresses = self._good.get(host, (0.0, frozenset()))
        return addresses if abs(self._clock() - at) <= _KEPT_FOR_S else frozenset()

    def renewed(self, host: str) -> bool:
        """Wait for the look-up under way, if there is one: whether it has ended."""
        with self._lock:
            _, done = self._asked[host]
        return done.wait(self._wait_s)

    def refresh(self, host: str) -> None:
        """Begin a look-up unless one is under way or was made in the last minute."""
        now = self._clock()
        with self._lock:
            at, done = self._asked.get(host, (None, None))
            if at is not None and done is not None and (not done.is_set() or abs(now - at) <= _RESOLVED_FOR_S):
                return  # abs: the clock may be set back
            done = threading.Event()
            self._asked[host] = (now, done)
        threading.Thread(target=self._look_up, args=(host, now, done), name="host-name", daemon=True).start()

    def _look_up(self, host: str, now: float, done: threading.Event) -> None:
        try:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            addresses = frozenset(_plain(str(info[4][0])) for info in infos)
            with self._lock:
                self._good[host] = (now, addresses)
        except (OSError, ValueError) as error:
            log.warning(f"The host {host!r} of a [[peer]] cannot be resolved: the last answer is used for a day, "
                        "without one nobody is let in from there. Remedy: mend the name or list its addresses.",
                        action="host_unknown", error=str(error))
        finally:
            done.set()


def address_allowed(peer: Peer, address: str, resolve: Callable[[str], frozenset[Address]]) -> bool:
    """Whether `address` is in `peer.addresses`, or where none are listed, is an address of `peer.host`."""
    caller = _plain(address)
    if peer.addresses:
        networks = [ipaddress.ip_network(text, strict=False) for text in peer.addresses]
        return any(caller.version == network.version and caller in network for network in networks)
    return caller in resolve(peer.host)


def _plain(address: str) -> Address:
    """An address without zone; IPv4 written as IPv6 becomes IPv4."""
    parsed = ipaddress.ip_address(address.split("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


class SecurityLog:
    """Writes events and log lines, at most one a `quiet_s` for the same kind, code, caller and address.

    The next one says how many were left out. At most `distinct` different ones are told apart in that time. The ledger
    is written by a thread of its own, through a connection of its own: a locked ledger keeps no association waiting.
    """

    _WAITING = 1000  # events; what comes while so many wait is only logged
    _LOCKED_S, _AGAIN_S = 5.0, 1.0

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float], quiet_s: float = 60.0,
                 distinct: int = 200) -> None:
        self._clock, self._quiet_s, self._distinct = clock, quiet_s, distinct
        self._ledger = Ledger(ledger.path, timeout_s=self._LOCKED_S)
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str, str, str], tuple[float, int]] = {}
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(self._WAITING)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="security-log", daemon=True)
        self._thread.start()

    def flush(self) -> None:
        """Wait until what was recorded is written or given up."""
        self._queue.join()

    def close(self, *, wait_s: float = 5.0) -> None:
        """Write what waits, unless the ledger stays locked, and end the thread."""
        self._closing.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(wait_s)

    def record(self, kind: str, code: str, reason: str, *, calling_ae: str, address: str,
               study_uid: str = "", series_uid: str = "") -> None:
        """One event of kind "security" or "reception"."""
        now = self._clock()
        key = (kind, code, calling_ae, address)
        with self._lock:
            self._forget(now)
            if key not in self._last and len(self._last) >= self._distinct:
                key = (kind, "various", "", "")
                code, reason = "various", "many different callers are refused"
                calling_ae, address = "", "many addresses"
            last, left_out = self._last.get(key, (None, 0))
            if last is not None and abs(now - last) < self._quiet_s:
                self._last[key] = (last, left_out + 1)
                return
            self._last[key] = (now, 0)
        text = f"{reason}, from {address}" + (f" ({left_out} more of these since the last note)" if left_out else "")
        log.warning(f"Refused: {text}", action=f"{kind}_refused", code=code, calling_ae=printable(calling_ae),
                    address=address)
        try:
            self._queue.put_nowait({"kind": kind, "now": now, "code": code, "reason": text, "study_uid": study_uid,
                                    "series_uid": series_uid, "actor": printable(calling_ae) or address})
        except queue.Full:
            log.error("An event could not be written to the ledger: too many wait.", action="event_lost")

    def _write(self) -> None:
        """The thread: one event after the other, each again while the ledger is locked or the disk full."""
        while (event := self._queue.get()) is not None:
            told = False
            while not self._written(event, tell=not told):
                told = True
                if self._closing.wait(self._AGAIN_S):
                    log.error("An event could not be written to the ledger: it is locked.", action="event_lost")
                    break
            self._queue.task_done()
        self._ledger.close()
        self._queue.task_done()

    def _written(self, event: dict[str, Any], *, tell: bool) -> bool:
        """False: to be tried again."""
        try:
            self._ledger.event(**event)
        except sqlite3.OperationalError as error:
            if tell:
                log.warning("An event cannot be written to the ledger now; it is tried again.", action="event_waits",
                            error=str(error))
            return False
        except sqlite3.Error as error:
            log.error("An event could not be written to the ledger.", action="event_lost", error=str(error))
        return True

    def _forget(self, now: float) -> None:
        """Drop what was not seen for twenty quiet times, so that the counts of the rest are still told."""
        old = [key for key, (at, left_out) in self._last.items()
               if abs(now - at) > self._quiet_s * (20 if left_out else 1)]
        for key in old:
            del self._last[key]
