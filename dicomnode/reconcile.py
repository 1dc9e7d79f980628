"""The reconciliation of a night: what the sources hold for us, and how far each study got here.

Per source and study: eligible at the source, received, processed, delivered, committed, and of whatever is missing the
reason. A source is named as its peer; what came without being asked for stands under the peer that sent it, or its AE
title where several peers have that one. Studies are named by accession number, or by UID where they have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from dicomnode.config import Config
from dicomnode.ledger import Ledger
from dicomnode.memo import memo
from dicomnode.spool import fsync_dir
from dicomnode.views import timestamp

__all__ = ["KEPT_DAYS", "Reconciliation", "SourceLine", "StudyLine", "asked_key", "local_day",
           "problem_key", "report", "write"]

KEPT_DAYS = 90
OPEN_DAYS = 7  # what is still missing is shown for so long
STAGES = ("eligible", "received", "processed", "delivered", "committed")
BUILT = ("built", "sending", "delivered", "committed")


@dataclass(frozen=True)
class StudyLine:
    """One study of one source: numbers of PET series, and why any of them is not done."""

    study: str
    study_uid: str
    study_date: str
    eligible: int
    received: int
    processed: int
    delivered: int
    committed: int
    missing: tuple[str, ...]


@dataclass(frozen=True)
class SourceLine:
    """One source with its studies. `asked_at`: the last query that it answered, ISO 8601 UTC; None: it is not asked.

    `problem`: why the last query failed, or "".
    """

    source: str
    asked_at: str | None
    problem: str
    studies: tuple[StudyLine, ...]

    def totals(self) -> dict[str, int]:
        """The numbers of all its studies together."""
        return {stage: sum(getattr(line, stage) for line in self.studies) for stage in STAGES}


@dataclass(frozen=True)
class Reconciliation:
    """The report of one day (ISO date, in schedule.timezone) on the studies since the day `since`."""

    day: str
    since: str
    made_at: str
    sources: tuple[SourceLine, ...]

    @property
    def complete(self) -> bool:
        """Whether every source answered and nothing is missing anywhere."""
        return not any(source.problem or any(line.missing for line in source.studies) for source in self.sources)

    def totals(self) -> dict[str, int]:
        """The numbers of all sources together."""
        return {stage: sum(source.totals()[stage] for source in self.sources) for stage in STAGES}

    def as_json(self) -> dict[str, Any]:
        return {"day": self.day, "since": self.since, "made_at": self.made_at, "complete": self.complete,
                "totals": self.totals(),
                "sources": [asdict(source) | {"totals": source.totals()} for source in self.sources]}

    def text(self) -> str:
        """For people: a line for each source and study, below it what is missing and why."""
        lines = [f"Reconciliation of {self.day}: studies since {self.since} (made {self.made_at})"]
        for source in self.sources:
            asked = f", asked {source.asked_at}" if source.asked_at else ""
            lines.append(f"\n{source.source}{asked}: {_numbers(source.totals())}")
            lines += [f"  could not be asked: {source.problem}"] if source.problem else []
            for study in source.studies:
                lines.append(f"  {study.study}: {_numbers(vars(study))}")
                lines += [f"    missing: {why}" for why in study.missing]
        if not self.sources:
            lines.append("\nNo source was asked and nothing came.")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Row:
    """One PET or CT series: what the source says of it, what came of it, its newest job."""

    source: str
    asked: dict[str, Any] | None
    series: dict[str, Any] | None
    job: dict[str, Any] | None
    here: int

    def _either(self, key: str) -> str:
        return str((self.series or {}).get(key) or (self.asked or {}).get(key) or "")

    @property
    def study_uid(self) -> str:
        return self._either("study_uid")

    @property
    def accession_number(self) -> str:
        return self._either("accession_number")

    @property
    def study_date(self) -> str:
        return str((self.asked or {}).get("study_date") or "")

    @property
    def modality(self) -> str:
        return self._either("modality")

    @property
    def series_uid(self) -> str:
        return self._either("series_uid")

    @property
    def eligible(self) -> bool:
        """A PET that a route wants, as far as is known: its header, once it is here, has the last word."""
        if self.modality != "PT" or (self.asked is not None and not self.asked["wanted"] and self.series is None):
            return False
        return self.series is None or self.series["state"] != "ignored"

    @property
    def received(self) -> bool:
        return self.here >= max(1, (self.asked or {}).get("instances") or 1) and not self._still_comes

    @property
    def _still_comes(self) -> bool:
        return self.series is not None and self.series["state"] in ("receiving", "waiting") and self.job is None

    @property
    def processed(self) -> bool:
        return self.job is not None and self.job["state"] in BUILT

    @property
    def delivered(self) -> bool:
        return self.job is not None and self.job["state"] in ("delivered", "committed")

    @property
    def committed(self) -> bool:
        return self.job is not None and self.job["state"] == "committed"


def asked_key(source: str) -> str:
    """The memo with the time (unix seconds) of the last query that a source answered."""
    return f"source.asked:{source}"


def problem_key(source: str) -> str:
    """The memo with the reason why the last query of a source failed; "" after one that it answered."""
    return f"source.problem:{source}"


def local_day(config: Config, now: float) -> date:
    """The day in schedule.timezone at unix seconds `now`."""
    return datetime.fromtimestamp(now, ZoneInfo(config.schedule.timezone)).date()


def report(ledger: Ledger, config: Config, *, day: date, now: float) -> Reconciliation:
    """The reconciliation of `day`: studies of the last schedule.retrieve_days days and of that day itself.

    `day` is a day in schedule.timezone, `now` unix seconds. What a source has and is still missing here is shown for
    OPEN_DAYS days.
    """
    zone = ZoneInfo(config.schedule.timezone)
    first = day - timedelta(days=config.schedule.retrieve_days)
    begin = datetime(first.year, first.month, first.day, tzinfo=zone).timestamp()
    after = day + timedelta(days=1)
    end = min(now, datetime(after.year, after.month, after.day, tzinfo=zone).timestamp())
    rows = [replace(row, source=_peer_named(config, row.source)) if row.asked is None else row
            for row in _rows(ledger, first=first, last=day, begin=begin, end=end)]
    asked = [peer.name for peer in config.peer if peer.query]
    names = [*asked, *sorted({row.source for row in rows} - set(asked))]
    sources = []
    for name in names:
        lines = _studies(ledger, config, [row for row in rows if row.source == name])
        at = memo(ledger, asked_key(name))
        sources.append(SourceLine(name, timestamp(float(at)) if at else None, memo(ledger, problem_key(name)), lines))
    return Reconciliation(day.isoformat(), first.isoformat(), timestamp(now) or "", tuple(sources))


def write(reconciliation: Reconciliation, data_dir: Path) -> Path:
    """Write reports/DAY.json and .txt, each whole or not at all; older than KEPT_DAYS days go. The text's path."""
    folder = Path(data_dir) / "reports"
    folder.mkdir(mode=0o700, exist_ok=True)
    value = json.dumps(reconciliation.as_json(), indent=2, ensure_ascii=False) + "\n"
    for suffix, content in ((".json", value), (".txt", reconciliation.text())):
        part = folder / f"{reconciliation.day}{suffix}.part"
        with part.open("w", encoding="utf-8") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, folder / f"{reconciliation.day}{suffix}")
    fsync_dir(folder)
    oldest = (date.fromisoformat(reconciliation.day) - timedelta(days=KEPT_DAYS)).isoformat()
    for path in (*folder.glob("????-??-??.json"), *folder.glob("????-??-??.txt")):
        if path.stem < oldest:
            path.unlink(missing_ok=True)
    return folder / f"{reconciliation.day}.txt"


def _peer_named(config: Config, ae_title: str) -> str:
    """The name of the one peer with that AE title; the AE title itself where none or several have it."""
    names = [peer.name for peer in config.peer if peer.ae_title == ae_title]
    return names[0] if len(names) == 1 else ae_title


def _rows(ledger: Ledger, *, first: date, last: date, begin: float, end: float) -> list[_Row]:
    asked = [dict(row) for row in ledger.query(
        "SELECT * FROM source_series WHERE (study_date BETWEEN ? AND ? OR last_seen_at BETWEEN ? AND ? OR "
        "(wanted = 1 AND state <> 'arrived' AND first_seen_at BETWEEN ? AND ?)) AND first_seen_at <= ? "
        "ORDER BY study_date, study_uid, series_uid",
        (f"{first:%Y%m%d}", f"{last:%Y%m%d}", begin, end, end - OPEN_DAYS * 86400, end, end))]
    found = [_row(ledger, row["source"], row, row["series_uid"]) for row in asked]
    known = {row["series_uid"] for row in asked}
    came = ledger.query("SELECT series_uid, calling_ae FROM series WHERE modality = 'PT' AND first_at BETWEEN ? AND ? "
                        "ORDER BY first_at, series_uid", (begin, end))
    return found + [_row(ledger, row["calling_ae"], None, row["series_uid"]) for row in came
                    if row["series_uid"] not in known]


def _row(ledger: Ledger, source: str, asked: dict[str, Any] | None, series_uid: str) -> _Row:
    series = ledger.query("SELECT * FROM series WHERE series_uid = ?", (series_uid,))
    jobs = [job for job in ledger.jobs_of_series(series_uid) if job["state"] != "superseded"]
    return _Row(source, asked, dict(series[0]) if series else None, jobs[-1] if jobs else None,
                int(series[0]["instances"]) if series else 0)


def _studies(ledger: Ledger, config: Config, rows: Sequence[_Row]) -> tuple[StudyLine, ...]:
    """One line for each study that has an eligible PET series."""
    lines = []
    for study_uid in dict.fromkeys(row.study_uid for row in rows):
        of_study = [row for row in rows if row.study_uid == study_uid]
        pets = [row for row in of_study if row.eligible]
        if not pets:
            continue
        guides = [row for row in of_study if row.modality != "PT" and row.asked and row.asked["wanted"]]
        missing = [why for row in (*pets, *guides) for why in _missing(ledger, config, row)]
        lines.append(StudyLine(
            next((row.accession_number for row in of_study if row.accession_number), study_uid), study_uid,
            next((row.study_date for row in of_study if row.study_date), ""), len(pets),
            received=sum(row.received for row in pets), processed=sum(row.processed for row in pets),
            delivered=sum(row.delivered for row in pets), committed=sum(row.committed for row in pets),
            missing=tuple(missing)))
    return tuple(lines)


def _missing(ledger: Ledger, config: Config, row: _Row) -> Iterable[str]:
    """Why a series is not done, one sentence; nothing where it is."""
    name = f"{row.modality} series {row.series_uid}"
    if not row.received:
        of = (row.asked or {}).get("instances")
        count = f"{row.here} of {of} images are here" if of else f"{row.here or 'no'} images are here"
        reasons = [(row.series or {}).get("reason")]
        if row.here < max(1, of or 1):
            reasons.insert(0, (row.asked or {}).get("reason"))
        yield ": ".join([f"{name}: {count}", *filter(None, dict.fromkeys(reasons))])
    elif row.modality != "PT":
        return
    elif row.job is None:
        assert row.series is not None
        yield f"{name} is {row.series['state']}: {row.series['reason'] or row.series['code']}".rstrip(": ")
    elif not row.delivered:
        waits = [f"to {delivery['peer']}: {delivery['reason'] or delivery['state']}"
                 for delivery in ledger.deliveries(row.job["id"]) if delivery["state"] in ("waiting", "dead")]
        why = "; ".join(filter(None, [row.job["reason"], *waits]))
        yield f"{name}: job {row.job['id']} is {row.job['state']}{': ' + why if why else ''}"
    elif not row.committed:
        asked = {peer.name for peer in config.peer if peer.confirm == "commitment"}
        waits = [delivery["peer"] for delivery in ledger.deliveries(row.job["id"])
                 if delivery["peer"] in asked and delivery["state"] != "committed"]
        if waits:
            yield f"{name}: job {row.job['id']} is delivered; {', '.join(waits)} has not committed to it yet"


def _numbers(values: Any) -> str:
    return ", ".join(f"{values[stage]} {stage}" for stage in STAGES)
