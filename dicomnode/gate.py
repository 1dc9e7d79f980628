"""Who may open an association: calling AE title and address by the [[peer]] tables, called AE title, a free place.

Refusals are recorded as `security` events, few enough that port probes cannot fill the ledger.
"""

from __future__ import annotations

import ipaddress
import socket
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass

from dicomnode.config import Config, Peer
from dicomnode.ledger import Ledger
from dicomnode.logs import get_logger

__all__ = ["Gate", "Refusal", "SecurityLog", "address_allowed", "printable"]

_RESOLVED_FOR_S = 60.0
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

    def __init__(self, config: Config, *, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._resolved: dict[str, tuple[float, frozenset[Address]]] = {}
        self._lock = threading.Lock()
        self._open: set[int] = set()

    def enter(self, ticket: int, *, calling_ae: str, called_ae: str, address: str) -> Refusal | None:
        """None: come in, and call `leave(ticket)` at the end. Otherwise the refusal to send."""
        refusal = self._refusal(calling_ae.strip(), called_ae.strip(), address)
        if refusal is not None:
            return refusal
        with self._lock:
            limit = self._config.reception.max_associations
            if len(self._open) >= limit:
                return Refusal(2, 3, 2, "limit", f"{limit} associations are open, reception.max_associations")
            self._open.add(ticket)
        return None

    def leave(self, ticket: int) -> None:
        with self._lock:
            self._open.discard(ticket)

    def _refusal(self, calling_ae: str, called_ae: str, address: str) -> Refusal | None:
        node = self._config.node
        if self._config.reception.require_called_ae_title and called_ae != node.ae_title:
            return Refusal(1, 1, 7, "called_ae", f"called AE title {printable(called_ae)!r} is not {node.ae_title!r}")
        peers = [peer for peer in self._config.peer if peer.ae_title == calling_ae and peer.may_send]
        if not peers:
            return Refusal(1, 1, 3, "calling_ae", f"no [[peer]] that may send has AE title {printable(calling_ae)!r}")
        if not any(address_allowed(peer, address, self._resolve) for peer in peers):
            return Refusal(1, 1, 3, "address", f"{printable(calling_ae)!r} may not send from {address}")
        return None

    def _resolve(self, host: str) -> frozenset[Address]:
        """The addresses of a host name, looked up again each minute; none where the name is unknown."""
        now = self._clock()
        with self._lock:
            found = self._resolved.get(host)
        if found is None or abs(now - found[0]) > _RESOLVED_FOR_S:  # either way: the clock may be set back
            try:
                infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
                addresses = frozenset(_plain(str(info[4][0])) for info in infos)
            except (OSError, ValueError) as error:
                log.warning(f"The host {host!r} of a [[peer]] cannot be resolved: who calls from it is refused. "
                            "Remedy: mend the name or list its addresses.", action="host_unknown", error=str(error))
                addresses = frozenset()
            found = (now, addresses)
            with self._lock:
                self._resolved[host] = found
        return found[1]


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

    The next one says how many were left out. At most `distinct` different ones are told apart in that time.
    """

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float], quiet_s: float = 60.0,
                 distinct: int = 200) -> None:
        self._ledger, self._clock, self._quiet_s, self._distinct = ledger, clock, quiet_s, distinct
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str, str, str], tuple[float, int]] = {}

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
            self._ledger.event(kind, now=now, code=code, reason=text, actor=printable(calling_ae) or address,
                               study_uid=study_uid, series_uid=series_uid)
        except sqlite3.Error as error:  # a full disk must not change the answer that the peer gets
            log.error("An event could not be written to the ledger.", action="event_lost", error=str(error))

    def _forget(self, now: float) -> None:
        """Drop what was not seen for twenty quiet times, so that the counts of the rest are still told."""
        old = [key for key, (at, left_out) in self._last.items()
               if abs(now - at) > self._quiet_s * (20 if left_out else 1)]
        for key in old:
            del self._last[key]
