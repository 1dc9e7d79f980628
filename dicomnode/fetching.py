"""Having one study or series sent here: by C-MOVE to our own receiver, or by C-GET, kept as the receiver keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pynetdicom.association import Association

from dicomnode.config import Config, Peer
from dicomnode.errors import NodeError, PeerRefused
from dicomnode.keeping import Keeper
from dicomnode.ledger import Ledger
from dicomnode.query import Asking, Retrieved, Times, retrieve
from dicomnode.spool import Spool

__all__ = ["Fetch", "fetch"]

FEW = 500  # at most so many instances are named one by one; else the whole series is asked for


@dataclass(frozen=True)
class Fetch:
    """What is wanted from whom; `series_uid` "" for the whole study."""

    peer: Peer
    study_uid: str
    series_uid: str = ""


def fetch(config: Config, ledger: Ledger, spool: Spool, what: Fetch, *, clock: Callable[[], float] = time.time,
          on_open: Callable[[Association], None] = lambda _: None,
          on_progress: Callable[[int], None] = lambda _: None) -> str:
    """Ask for it and wait for the peer's last word; one sentence on what the peer says it did.

    By C-MOVE the instances come through the receiver, another process: whether they came is in the ledger. Of a series
    that is here in part only the missing instances are asked for, where the peer can name them.
    Raises PeerUnreachable, PeerRefused, NodeError where what came could not be kept.
    """
    peer, times = what.peer, Times.of(config)
    missing = _missing(ledger, what, times)
    if peer.retrieve == "c-move":
        done = retrieve(peer, times, study_uid=what.study_uid, series_uid=what.series_uid, instances=missing,
                        on_open=on_open, on_progress=on_progress)
        return _said(done, "C-MOVE")
    with Keeper(config, spool, ledger, calling_ae=peer.ae_title, address=peer.host, clock=clock) as keeper:
        done = retrieve(peer, times, study_uid=what.study_uid, series_uid=what.series_uid, instances=missing,
                        keep=keeper.on_c_store, on_open=on_open, on_progress=on_progress)
    if keeper.refused:
        raise NodeError(f"{len(keeper.refused)} of {len(keeper.refused) + keeper.kept} instances that came by C-GET "
                        f"could not be kept: {keeper.refused[0]}")
    return _said(done, "C-GET")


def _missing(ledger: Ledger, what: Fetch, times: Times) -> tuple[str, ...]:
    """The instances to name; () where the whole series is to be asked for."""
    here = {row["sop_instance_uid"] for row in ledger.query(
        "SELECT sop_instance_uid FROM instance WHERE series_uid = ?", (what.series_uid,))}
    if not here:
        return ()
    try:
        with Asking(what.peer, times) as asking:
            there = asking.instances(what.study_uid, what.series_uid)
    except PeerRefused:
        return ()  # it does not answer at image level: what is here already comes again and is recognised
    missing = tuple(uid for uid in there if uid not in here)
    return missing if len(missing) <= FEW else ()


def _said(done: Retrieved, how: str) -> str:
    failed = f", {done.failed} failed" if done.failed else ""
    return f"{how} was answered with status 0x{done.status:04X}: {done.arrived} instances sent{failed}"
