"""The front page as a value: is the node well, what runs, what comes next and when, what waits and for whom.

All lists are cut to SHOWN; `more` says how many rows each leaves out. Times are ISO 8601 in UTC (dicomnode.views).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from dicomnode import views
from dicomnode.config import Config
from dicomnode.forecast import forecast, waits
from dicomnode.ledger import Ledger
from dicomnode.troubles import Machine, Trouble, find
from dicomnode.views import timestamp
from dicomnode.windows import Openings, Windows

__all__ = ["SHOWN", "night_of", "spans", "tonight"]

SHOWN = 20
DELIVERED = 8
DAY_S = 86400.0
Json = dict[str, Any]

_JOB = """
SELECT job.id AS job, job.study_uid AS study, job.series_uid AS series, series.accession_number, series.modality,
       series.series_description, job.state, job.code, job.reason, job.route, job.method, job.preset, job.urgent,
       job.run_after, job.created_at, job.built_at, job.finished_at, job.attempts
  FROM job JOIN series USING (series_uid)"""
_QUEUED = f"{_JOB} WHERE job.state IN ('queued', 'failed') ORDER BY job.urgent DESC, job.priority DESC, job.id"
_SENDING = f"{_JOB} WHERE job.state IN ('built', 'sending') ORDER BY job.id"
# The plus keeps sqlite from the index of states, which would lead to all that was ever delivered.
_DELIVERED = f"""{_JOB} WHERE job.id IN (SELECT id FROM job WHERE finished_at IS NOT NULL ORDER BY finished_at DESC
                        LIMIT {5 * DELIVERED}) AND +job.state IN ('delivered', 'committed')
 ORDER BY job.finished_at DESC LIMIT {DELIVERED}"""
_COMING = """
SELECT study_uid AS study, series_uid AS series, accession_number, modality, series_description, instances, state, code,
       reason, until, first_at, last_at, calling_ae
  FROM series WHERE state IN ('receiving', 'waiting', 'complete') ORDER BY last_at DESC, series_uid"""


def tonight(ledger: Ledger, config: Config, machine: Machine, *, now: float) -> Json:
    """All of it. `machine`: what dicomnode.machine.look saw."""
    plan = forecast(ledger, config, now=now)
    troubles = find(ledger, config, machine, now=now)
    status = views.status(ledger, free_bytes=machine.free_bytes, now=now)
    ends = {row["job"]: row for row in plan["running"]}
    lists = {
        "running": [{**view, "end": ends.get(view["job"], {}).get("end")} for view in status["running"]],
        "queue": _queue(ledger, config, plan, now=now),
        "held": sorted(status["held"], key=lambda view: str(view["finished_at"] or view["last_received_at"]),
                       reverse=True),
        "coming": [_timed(row, "until", "first_at", "last_at") for row in ledger.query(_COMING)],
        "sending": _sending(ledger),
    }
    return {
        "at": timestamp(now),
        "timezone": config.schedule.timezone,
        "health": list(_health(config, machine, status, troubles, now=now)),
        "troubles": {level: sum(one.level == level for one in troubles) for level in ("problem", "warning")},
        "counts": {name: len(rows) for name, rows in lists.items()},
        **{name: rows[:SHOWN] for name, rows in lists.items()},
        "more": {name: max(0, len(rows) - SHOWN) for name, rows in lists.items()},
        "delivered": [_timed(row, "created_at", "built_at", "finished_at") for row in ledger.query(_DELIVERED)],
        "delivered_24h": ledger.query("SELECT count(*) AS n FROM job WHERE finished_at > ? AND +state IN "
                                      "('delivered', 'committed')", (now - DAY_S,))[0]["n"],
        "last_received_at": status["last_received_at"],
        "forecast": plan["counts"],
        "windows": _windows(config, now=now),
    }


def _timed(row: sqlite3.Row, *columns: str) -> Json:
    return {**dict(row), **{name: timestamp(row[name]) for name in columns}}


def _queue(ledger: Ledger, config: Config, plan: Json, *, now: float) -> list[Json]:
    """Waiting jobs in the order of their start, each with its forecast and why it does not run yet."""
    openings = Openings(config.schedule, config.route)
    rows = {row["job"]: row for row in map(dict, ledger.query(_QUEUED))}
    planned = {one["job"]: one for one in plan["jobs"] if one["job"] in rows}
    unplanned: Json = {"verdict": "unknown", "start": None, "end": None, "latest": None, "text": ""}
    return [{**rows[number], "created_at": timestamp(rows[number]["created_at"]),
             "run_after": timestamp(rows[number]["run_after"]), "waits": waits(rows[number], openings, now=now),
             "forecast": planned.get(number, unplanned)} for number in dict.fromkeys([*planned, *rows])]


def _sending(ledger: Ledger) -> list[Json]:
    return [{**_timed(row, "created_at", "built_at", "finished_at"), "deliveries": [
        {"peer": one["peer"], "state": one["state"], "reason": one["reason"], "attempts": one["attempts"],
         "next_at": timestamp(one["next_at"])} for one in ledger.deliveries(row["job"])]}
        for row in ledger.query(_SENDING)]


# --- is the node well


def _health(config: Config, machine: Machine, status: Json, troubles: Sequence[Trouble], *,
            now: float) -> Iterable[Json]:
    """A line for the receiver, the workers, the disk and what is wrong; `state`: good, wait, bad or none (unknown)."""
    runs = {True: ("good", "accepts"), False: ("bad", "does not run"), None: ("none", "not seen from here")}
    yield _line("Receiver", *runs[machine.receiver_runs],
                remedy="systemctl status dicomnode-receive" if machine.receiver_runs is False else "")
    late = [one for one in status["workers"] if one["stale"]]
    if late:
        yield _line("Workers", "bad", f"{len(late)} of {len(status['workers'])} silent", remedy="dicomnode status")
    elif status["workers"]:
        busy = sum(one["job"] is not None for one in status["workers"])
        yield _line("Workers", "good", f"{len(status['workers'])} on "
                    f"{', '.join(sorted({one['device'] for one in status['workers']}))}, {busy} busy")
    else:
        yield _line("Workers", "bad", "none runs", remedy="systemctl status dicomnode-work")
    disk = next((one for one in troubles if one.key == "disk"), None)
    yield _line("Disk", {"problem": "bad", "warning": "wait"}[disk.level] if disk else "good", "free",
                free_bytes=machine.free_bytes, remedy="free space, or set [retention]" if disk else "")
    worst = {one.level for one in troubles}
    yield _line("Alerts", "bad" if "problem" in worst else "wait" if worst else "good",
                f"{len(troubles)} now" if troubles else "none")


def _line(name: str, state: str, text: str, **more: Any) -> Json:
    return {"name": name, "state": state, "text": text, "remedy": "", "free_bytes": None, **more}


# --- the windows


def night_of(now: float, timezone: str) -> tuple[float, float]:
    """From the noon before `now` to the next one, by the clock of the site: 23 to 25 hours.

    >>> begin, end = night_of(1_790_200_000.0, "Europe/Berlin")  # 2026-09-23 23:46
    >>> timestamp(begin), timestamp(end)
    ('2026-09-23T10:00:00Z', '2026-09-24T10:00:00Z')
    """
    zone = ZoneInfo(timezone)
    local = datetime.fromtimestamp(now, zone)
    noon = datetime(local.year, local.month, local.day, 12, tzinfo=zone)
    first = noon if local >= noon else noon - timedelta(days=1)
    return first.timestamp(), (first + timedelta(days=1)).timestamp()


def spans(windows: Windows, begin: float, end: float) -> list[tuple[float, float]]:
    """The times between the two moments in which jobs may start."""
    found = []
    moment = begin
    while (opens := windows.opens_at(moment)) < end:
        closes = min(windows.closes_at(opens), end)
        found.append((opens, closes))
        if closes >= end:
            break
        moment = closes
    return found


def _windows(config: Config, *, now: float) -> Json:
    """The night around `now`: one row for each different set of windows, with the routes that have it."""
    begin, end = night_of(now, config.schedule.timezone)
    openings = Openings(config.schedule, config.route)
    rows: dict[tuple[str, ...], list[str]] = {}
    for route in config.route:
        rows.setdefault(config.schedule.windows if route.windows is None else route.windows, []).append(route.name)
    return {
        "begin": timestamp(begin), "end": timestamp(end),
        "rows": [{"routes": names, "text": ", ".join(texts) or "at any time",
                  "open_now": openings.of(names[0]).is_open(now),
                  "spans": [[timestamp(opens), timestamp(closes)]
                            for opens, closes in spans(openings.of(names[0]), begin, end)]}
                 for texts, names in rows.items()],
    }
