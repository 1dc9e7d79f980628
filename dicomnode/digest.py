"""The digest: one message a day that says what came, what was done, what waits. Also proof that the node lives."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime, timedelta
from statistics import median
from zoneinfo import ZoneInfo

from dicomnode import reconcile
from dicomnode.config import Config
from dicomnode.ledger import Ledger

__all__ = ["due", "text"]

DAY_S = 86400.0


def due(done: str, *, now: float, at: str, zone: ZoneInfo) -> str | None:
    """The day (ISO 8601, in `zone`) whose digest is to be sent now; None where it is not yet `at`, or was sent.

    done   the day of the last digest, "" before the first. One in the future was written under a wrong clock.

    >>> due("2026-03-28", now=1774764000.0, at="07:00", zone=ZoneInfo("Europe/Berlin"))  # 2026-03-29 08:00 CEST
    '2026-03-29'
    >>> due("2026-03-29", now=1774764000.0, at="07:00", zone=ZoneInfo("Europe/Berlin")) is None
    True
    """
    local = datetime.fromtimestamp(now, zone)
    day = local.date() if f"{local:%H:%M}" >= at else local.date() - timedelta(days=1)
    return None if done == day.isoformat() else day.isoformat()


def text(ledger: Ledger, config: Config, *, now: float, free_bytes: int, day: str) -> str:
    """The digest of the 24 hours until `now`, `day` being today; times in schedule.timezone. UIDs are not in it."""
    return "\n".join([*_came(ledger, now - DAY_S), *_done(ledger, now - DAY_S), *_waits(ledger),
                      f"disk: {free_bytes / 2**30:.1f} GiB free, watermark "
                      f"{config.reception.low_disk_mb / 1024:.1f} GiB", *_workers(ledger, now),
                      *_reconciled(ledger, config, now=now, day=day)])


def _came(ledger: Ledger, since: float) -> Iterator[str]:
    rows = ledger.query("SELECT modality, count(*) AS n, sum(state = 'ignored') AS ignored FROM series "
                        "WHERE last_at >= ? GROUP BY modality ORDER BY modality", (since,))
    instances = ledger.query("SELECT count(*) AS n FROM instance WHERE received_at >= ? AND series_uid IN "
                             "(SELECT series_uid FROM series WHERE last_at >= ?)", (since, since))[0]["n"]
    series = ", ".join(f"{row['n']} {row['modality'] or 'unnamed'}" + (
        f" ({row['ignored']} not to be processed)" if row["ignored"] else "") for row in rows)
    yield f"received: {instances} instances" + (f"; series: {series}" if rows else "")


def _done(ledger: Ledger, since: float) -> Iterator[str]:
    jobs = ledger.query("SELECT started_at, built_at, device, state FROM job WHERE built_at >= ?", (since,))
    took = sorted(row["built_at"] - row["started_at"] for row in jobs if row["started_at"] is not None)
    yield f"deblurred: {len(jobs)} series" + (
        f"; {_duration(median(took))} each (median), at most {_duration(took[-1])}" if took else "")
    for row in ledger.query("SELECT peer, sum(state IN ('delivered', 'committed')) AS sent, sum(state = 'committed') "
                            "AS committed FROM delivery WHERE done_at >= ? GROUP BY peer ORDER BY peer", (since,)):
        proven = f", {row['committed']} of them committed" if row["committed"] else ""
        yield f"delivered to {row['peer']}: {row['sent']} series{proven}"


def _waits(ledger: Ledger) -> Iterator[str]:
    counts = ledger.counts()
    held = counts["series"].get("held", 0) + counts["job"].get("held", 0)
    waiting = sum(counts["job"].get(state, 0) for state in ("queued", "failed"))
    yield f"held for a person: {held}" + (" (dicomnode alert lists them)" if held else "")
    yield (f"to be deblurred: {waiting}, running: {counts['job'].get('running', 0)}, "
           f"to be delivered: {counts['delivery'].get('waiting', 0)}, given up: {counts['delivery'].get('dead', 0)}")


def _workers(ledger: Ledger, now: float) -> Iterator[str]:
    rows = ledger.query("SELECT name, device, heartbeat_at FROM worker ORDER BY name")
    if rows:
        yield "workers: " + ", ".join(f"{row['name']} on {row['device']} ({_duration(now - row['heartbeat_at'])} ago)"
                                      for row in rows)


def _reconciled(ledger: Ledger, config: Config, *, now: float, day: str) -> Iterator[str]:
    """The numbers of the reconciliation; who lacks what stays in its report."""
    if not any(peer.query for peer in config.peer):
        return
    found = reconcile.report(ledger, config, day=date.fromisoformat(day), now=now)
    for source in found.sources:
        numbers = ", ".join(f"{n} {stage}" for stage, n in source.totals().items())
        lacking = sum(bool(study.missing) for study in source.studies)
        asked = "; could not be asked" if source.problem else ""
        yield (f"reconciliation with {source.source} since {found.since}: {numbers}; "
               f"{f'{lacking} studies lack something' if lacking else 'nothing is missing'}{asked}")
    if not found.complete:
        yield f"see reports/{day}.txt in the data directory"


def _duration(seconds: float) -> str:
    """
    >>> _duration(42.0), _duration(600.0), _duration(9000.0)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{max(seconds, 0.0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
