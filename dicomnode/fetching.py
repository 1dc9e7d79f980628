"""Having one study or series sent here: by C-MOVE to our own receiver, or by C-GET, kept as the receiver keeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

from pynetdicom.association import Association

from dicomnode.config import Config, Peer
from dicomnode.errors import NodeError, NotFound, PeerRefused, RefusedInput
from dicomnode.headers import text
from dicomnode.keeping import Keeper
from dicomnode.ledger import Ledger
from dicomnode.query import Asking, Retrieved, Times, date_range, retrieve
from dicomnode.scu import named
from dicomnode.spool import Spool, valid_uid

__all__ = ["Fetch", "fetch", "fetch_named", "find"]

ARRIVAL_S = 5.0  # after the peer's last word; the instances are acknowledged by then, unless it answers first
FEW = 500  # at most so many instances are named one by one; else the whole series is asked for


@dataclass(frozen=True)
class Fetch:
    """What is wanted from whom; `series_uid` "" for the whole study."""

    peer: Peer
    study_uid: str
    series_uid: str = ""


def fetch(config: Config, ledger: Ledger, spool: Spool, what: Fetch, *, clock: Callable[[], float] = time.time,
          on_open: Callable[[Association], None] = lambda _: None,
          on_progress: Callable[[int], None] = lambda _: None) -> Retrieved:
    """Ask for it and wait for the peer's last word: what it says it did.

    By C-MOVE the instances come through the receiver, another process: whether they came is in the ledger. Of a series
    that is here in part only the missing instances are asked for, where the peer can name them.
    Raises PeerUnreachable, PeerRefused, NodeError where what came could not be kept.
    """
    peer, times = what.peer, Times.of(config)
    missing = _missing(ledger, what, times)
    if peer.retrieve == "c-move":
        return retrieve(peer, times, study_uid=what.study_uid, series_uid=what.series_uid, instances=missing,
                        on_open=on_open, on_progress=on_progress)
    with Keeper(config, spool, ledger, calling_ae=peer.ae_title, address=peer.host, clock=clock) as keeper:
        try:
            done = retrieve(peer, times, study_uid=what.study_uid, series_uid=what.series_uid, instances=missing,
                            keep=keeper.on_c_store, on_open=on_open, on_progress=on_progress)
        except PeerRefused:
            if not keeper.refused:
                raise
    if keeper.refused:
        raise NodeError(f"{len(keeper.refused)} of {len(keeper.refused) + keeper.kept} instances that came by C-GET "
                        f"could not be kept: {keeper.refused[0]}")
    return done


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


def find(config: Config, peer_name: str, *, days: tuple[date, date] | None = None,
         study: str = "") -> list[dict[str, Any]]:
    """What a peer holds, as JSON values: the studies of some days, or with `study` (UID or accession number) that one.

    Of a named study the series are told too. Raises ConfigError, PeerUnreachable, PeerRefused.
    """
    peer = config.named_peer(peer_name)
    with Asking(peer, Times.of(config)) as asking:
        studies = asking.studies(study_date=date_range(*days) if days else "", **_named(study))
        return [{"study": one.study_uid, "study_date": one.study_date, "accession_number": one.accession_number,
                 "modalities": list(one.modalities)} | ({"series": [
                     {"series": series.series_uid, "modality": series.modality, "instances": series.instances,
                      "series_number": text(series.header, "SeriesNumber"),
                      "series_description": text(series.header, "SeriesDescription")}
                     for series in asking.series(one.study_uid)]} if study else {}) for one in studies]


def fetch_named(config: Config, ledger: Ledger, spool: Spool, peer_name: str, what: str, *, study: str = "",
                on_progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Fetch the study or series `what` (UID, or accession number of a study) now; what became of it, as JSON values.

    study  Study Instance UID of a series that neither the ledger nor the peer places without it.
    Raises NotFound where the peer does not hold it, RefusedInput where several studies are meant, NodeError where it
    says that it sent what is not here, PeerUnreachable, PeerRefused.
    """
    wanted = _place(config, ledger, config.named_peer(peer_name), what, study)
    done = fetch(config, ledger, spool, wanted, on_progress=on_progress)
    until = time.monotonic() + ARRIVAL_S
    while (here := _count(ledger, wanted)) < done.arrived and time.monotonic() < until:
        time.sleep(0.1)
    said = done.said(wanted.peer.retrieve)
    if here < done.arrived:
        raise NodeError(f"{said}, and {here} are here. Remedy: is the receiver running, and does {named(wanted.peer)} "
                        f"send to our AE title {config.node.ae_title} at its address and port?")
    return {"peer": peer_name, "study": wanted.study_uid, "series": wanted.series_uid, "sent": done.arrived,
            "failed": done.failed, "here": here, "said": said}


def _place(config: Config, ledger: Ledger, peer: Peer, what: str, study: str) -> Fetch:
    if study:
        return Fetch(peer, study, what)
    for table in ("series", "source_series"):
        for row in ledger.query(f"SELECT study_uid FROM {table} WHERE series_uid = ?", (what,)):
            return Fetch(peer, row["study_uid"], what)
    with Asking(peer, Times.of(config)) as asking:
        studies = asking.studies(**_named(what))
    if len(studies) > 1:
        raise RefusedInput(f"{what!r} stands for {len(studies)} studies at {peer.name}: "
                           f"{', '.join(one.study_uid for one in studies)}. Remedy: name one of them.")
    if not studies:
        raise NotFound(f"{peer.name} holds no study {what!r}. Remedy: `dicomnode find {peer.name} --date DAY` lists "
                       "what it holds; of a series name the study too, with --study.")
    return Fetch(peer, studies[0].study_uid)


def _named(study: str) -> dict[str, str]:
    """The key by which a study is asked for."""
    return {"study_uid" if valid_uid(study) and "." in study else "accession_number": study}


def _count(ledger: Ledger, wanted: Fetch) -> int:
    return int(ledger.query("SELECT count(*) AS n FROM instance WHERE study_uid = ? AND (? = '' OR series_uid = ?)",
                            (wanted.study_uid, wanted.series_uid, wanted.series_uid))[0]["n"])
