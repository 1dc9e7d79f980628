"""What people and programs see of the ledger: plain JSON values made of its rows. No patient names are in the ledger.

The command line prints them. Times are ISO 8601 in UTC.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from dicomnode import companions, workers
from dicomnode.errors import NotFound, RefusedInput
from dicomnode.ledger import Ledger

__all__ = ["jobs", "progress_of", "show", "status", "timestamp"]

Json = dict[str, Any]


def timestamp(seconds: float | None) -> str | None:
    """ISO 8601 in UTC, to the second.

    >>> timestamp(0.0)
    '1970-01-01T00:00:00Z'
    """
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def jobs(ledger: Ledger, study: str | None = None, *, limit: int | None = None) -> list[Json]:
    """One element per series, newest first; `study` filters by study, series or derived series UID or accession number.

    limit   so many; None: all.

    `state`, `code` and `reason` are the newest job's where the series has one, else the series' own; a series that is
    held (input that changed after delivery, for instance) says so in any case.
    """
    return [_series(row) for row in ledger.overview(study, limit=limit)]


def show(ledger: Ledger, study: str) -> Json:
    """Everything about one study: its series, their jobs and deliveries, and the history.

    `judged` of a series says why it was found complete and which CT was chosen, of which, and why.
    `study` is a study, series or derived series UID or an accession number. Raises NotFound, and RefusedInput where
    an accession number belongs to several studies.
    """
    found = {row["study_uid"] for row in ledger.overview(study)}
    if not found:
        raise NotFound(f"nothing in the ledger is called {study!r}. Remedy: `dicomnode jobs` lists what came.")
    if len(found) > 1:
        raise RefusedInput(f"{study!r} stands for {len(found)} studies: {', '.join(sorted(found))}. "
                           "Remedy: name one of them by its Study Instance UID.")
    study_uid = found.pop()
    rows = sorted(ledger.overview(study_uid), key=lambda row: (row["first_at"], row["series_uid"]))
    events = [_event(event) for event in ledger.events(study_uid=study_uid)]
    return {
        "study": study_uid,
        "accession_number": next((row["accession_number"] for row in rows if row["accession_number"]), ""),
        "series": [_series(row) | {
            "judged": next((event["reason"] for event in reversed(events)
                            if event["series"] == row["series_uid"] and event["to_state"] == "complete"), ""),
            "conflicts": len(ledger.conflicts(row["series_uid"])),
            "jobs": [_job(ledger, job) for job in ledger.jobs_of_series(row["series_uid"])],
        } for row in rows],
        "events": events,
    }


def status(ledger: Ledger, *, free_bytes: int, now: float) -> Json:
    """The node at a glance: rows by state, who works, what runs, what waits for a person, and the disk."""
    views = [_series(row) for row in ledger.overview(active=True)]
    return {
        "at": timestamp(now),
        "counts": ledger.counts(),
        "workers": _workers(ledger, now),
        "running": [view for view in views if view["state"] == "running"],
        "held": [view for view in views if view["state"] == "held"],
        "last_received_at": timestamp(ledger.query("SELECT max(last_at) AS at FROM series")[0]["at"]),
        "free_bytes": free_bytes,
    }


def _workers(ledger: Ledger, now: float) -> list[Json]:
    late = {row["name"] for row in workers.stale(ledger, now)}
    return [{"name": row["name"], "device": row["device"], "job": row["job_id"], "stale": row["name"] in late,
             "started_at": timestamp(row["started_at"]), "heartbeat_at": timestamp(row["heartbeat_at"])}
            for row in workers.listing(ledger)]


def progress_of(text: str | None) -> Json | None:
    """What a running job said last; None where it said nothing or its row is damaged, which `dicomnode repair` finds.

    >>> progress_of('{"stage": "main"}'), progress_of('{"sta')
    ({'stage': 'main'}, None)
    """
    try:
        said = json.loads(text or "null")
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def _series(row: Mapping[str, Any]) -> Json:
    source = "series" if row["job_id"] is None or row["series_state"] == "held" else "job"
    return {
        "study": row["study_uid"],
        "series": row["series_uid"],
        "modality": row["modality"],
        "accession_number": row["accession_number"],
        "series_number": row["series_number"],
        "series_description": row["series_description"],
        "instances": row["instances"],
        "calling_ae": row["calling_ae"],
        "received_at": timestamp(row["first_at"]),
        "last_received_at": timestamp(row["last_at"]),
        "state": row[f"{source}_state"],
        "code": row[f"{source}_code"],
        "reason": row[f"{source}_reason"],
        "series_state": row["series_state"],
        "series_reason": row["series_reason"],
        "until": timestamp(row["until"]) if row["series_state"] == "waiting" else None,
        "job": row["job_id"],
        "route": row["route"],
        "method": row["method"],
        "preset": row["preset"],
        "attempts": row["attempts"],
        "progress": progress_of(row["progress"]),
        "guide_series": row["guide_series_uid"],
        "derived_series": row["derived_series_uid"],
        "derived_instances": row["derived_instances"],
        "queued_at": timestamp(row["created_at"]),
        "started_at": timestamp(row["started_at"]),
        "built_at": timestamp(row["built_at"]),
        "finished_at": timestamp(row["finished_at"]),
    }


def _job(ledger: Ledger, job: Mapping[str, Any]) -> Json:
    return {
        "job": job["id"],
        "state": job["state"],
        "code": job["code"],
        "reason": job["reason"],
        "route": job["route"],
        "method": job["method"],
        "preset": job["preset"],
        "settings": job["settings"],
        "guide_series": job["guide_series_uid"],
        "inputs": len(job["inputs"]),
        "attempts": job["attempts"],
        "progress": job["progress"],
        "derived_series": job["derived_series_uid"],
        "derived_instances": job["derived_instances"],
        "also": _also(job["report"]),
        "report": job["report"],
        "queued_at": timestamp(job["created_at"]),
        "started_at": timestamp(job["started_at"]),
        "built_at": timestamp(job["built_at"]),
        "finished_at": timestamp(job["finished_at"]),
        "deliveries": [_delivery(ledger, row) for row in ledger.deliveries(job["id"])],
    }


def _also(report: Mapping[str, Any] | None) -> Json:
    """What was made beside the derived series, and what was not. `instances` are delivered with it."""
    made = companions.wanted(report, None)
    return {
        "instances": companions.instances(made),
        "series": [{"kind": one["kind"], "series": one["series_uid"], "series_number": one["series_number"],
                    "series_description": one["description"], "modality": one["modality"],
                    "instances": one["instances"]} for one in made],
        "left_out": ((report or {}).get("also") or {}).get("left_out", {}),
    }


def _delivery(ledger: Ledger, row: Mapping[str, Any]) -> Json:
    """`remarks`: what the peer answered other than success, how often, and its first comment."""
    answers = ledger.query(
        "SELECT status, count(*) AS n, count(committed_at) AS committed, max(comment) AS comment "
        "FROM delivery_instance WHERE delivery_id = ? GROUP BY status ORDER BY status", (row["id"],))
    return {
        "peer": row["peer"],
        "state": row["state"],
        "reason": row["reason"],
        "attempts": row["attempts"],
        # PS3.7 C.1.3: Bxxx warns
        "accepted": sum(answer["n"] for answer in answers if answer["status"] == 0 or answer["status"] >> 12 == 0xB),
        "answered": sum(answer["n"] for answer in answers),
        "remarks": [{"status": f"0x{answer['status']:04X}", "instances": answer["n"], "comment": answer["comment"]}
                    for answer in answers if answer["status"] != 0],
        "confirm": row["confirm"],
        "committed": sum(answer["committed"] for answer in answers),
        "next_at": timestamp(row["next_at"]) if row["state"] == "waiting" else None,
        "prove_at": timestamp(row["prove_at"]) if row["state"] == "delivered" else None,
        "done_at": timestamp(row["done_at"]),
    }


def _event(row: Mapping[str, Any]) -> Json:
    return {
        "at": timestamp(row["at"]),
        "kind": row["kind"],
        "series": row["series_uid"],
        "job": row["job_id"],
        "from_state": row["from_state"],
        "to_state": row["to_state"],
        "code": row["code"],
        "reason": row["reason"],
        "actor": row["actor"],
    }
