"""Commands about sources: find, fetch, reconcile."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, console, open_ledger, print_json

__all__ = ["fetch", "find", "reconcile"]

PeerName = Annotated[str, typer.Argument(metavar="PEER", help="Name of a [[peer]].")]


def find(
    peer: PeerName,
    day: Annotated[str, typer.Option("--date", metavar="DAY", help="2024-03-01, 2024-03-01..2024-03-05, today, "
                                     "yesterday. Without --date and --study: today.")] = "",
    study: Annotated[str, typer.Option("--study", help="Study Instance UID or accession number; lists its series.")]
    = "",
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
) -> None:
    """What a peer holds, by C-FIND: the studies of some days, or the series of one study."""
    from dicomnode import fetching, query
    from dicomnode.config import load
    from dicomnode.reconcile import local_day

    settings = load(config)
    days = query.days_of(day or "today", today=local_day(settings, time.time()))
    rows = fetching.find(settings, peer, days=None if study and not day else days, study=study)
    if as_json:
        print_json(rows)
        return
    out = console()
    for row in rows:
        out.print(f"{row['study_date']}  {row['accession_number'] or '-'}  {'/'.join(row['modalities']) or '-'}  "
                  f"{row['study']}", markup=False, soft_wrap=True)
        for series in row.get("series", ()):
            count = "?" if series["instances"] is None else series["instances"]
            out.print(f"    {series['modality']:<3} {count:>5} images  {series['series']}  {series['series_number']} "
                      f"{series['series_description']}", markup=False, soft_wrap=True)
    if not rows:
        span = " to ".join(dict.fromkeys(str(one) for one in days))
        asked = f"study {study!r}" if study else f"study of {span}"
        out.print(f"{peer} lists no {asked}.", markup=False, soft_wrap=True)


def fetch(
    peer: PeerName,
    what: Annotated[str, typer.Argument(metavar="STUDY|SERIES", help="Study or series UID, or accession number.")],
    study: Annotated[str, typer.Option("--study", metavar="UID", help="Study Instance UID of the series.")] = "",
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
) -> None:
    """Have a peer send a study or series to this node now, by C-MOVE or C-GET (peer.retrieve)."""
    from dicomnode import fetching
    from dicomnode.spool import Spool

    with open_ledger(config) as (settings, ledger):
        done = fetching.fetch_named(settings, ledger, Spool(settings.node.data_dir), peer, what, study=study)
    if as_json:
        print_json(done)
    else:
        console().print(f"{done['said']}; {done['here']} images of it are here.", markup=False, soft_wrap=True)


def reconcile(
    day: Annotated[str, typer.Option("--date", metavar="DAY", help="The day of the report.")] = "today",
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
) -> None:
    """Eligible at the sources, received, processed, delivered: how far each study got, and what is missing and why."""
    from dicomnode import query
    from dicomnode import reconcile as reconciliation

    with open_ledger(config) as (settings, ledger):
        now = time.time()
        last = query.days_of(day, today=reconciliation.local_day(settings, now))[1]
        found = reconciliation.report(ledger, settings, day=last, now=now)
    if as_json:
        print_json(found.as_json())
    else:
        console().print(found.text(), markup=False, end="", soft_wrap=True)
