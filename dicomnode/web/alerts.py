"""What is wrong now, who was told of it, and what happened at the node lately."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from dicomnode import alerts as alerting
from dicomnode import machine, troubles
from dicomnode.views import timestamp
from dicomnode.web.access import Viewer
from dicomnode.web.site import Site, SiteNow, page

router = APIRouter()
EVENTS = 50
#: The events that belong to no study; an index of the ledger has just this condition.
OF_NODE = """
SELECT at, kind, from_state, to_state, code, reason, actor FROM event
 WHERE kind NOT IN ('series', 'job', 'delivery') ORDER BY id DESC LIMIT ?"""
_STUDY = re.compile(r"\bstudy ([0-9.]+)")


@router.get("/alerts", response_class=HTMLResponse, include_in_schema=False)
def alerts(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    return page(request, "alerts.html", **_values(site))


@router.get("/alerts/now", response_class=HTMLResponse, include_in_schema=False)
def live(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    """What of the page follows by itself."""
    return page(request, "parts/alerts.html", **_values(site))


def _values(site: Site) -> dict[str, Any]:
    now = site.clock()
    seen = machine.look(site.config, site.spool, now=now, starts=alerting.starts(site.ledger))
    rows = {row["key"]: dict(row) for row in site.ledger.query("SELECT * FROM alert")}
    found = troubles.find(site.ledger, site.config, seen, now=now)
    current = {trouble.key for trouble in found}
    over = sorted((row for key, row in rows.items() if key not in current), key=lambda row: float(row["last_at"]),
                  reverse=True)
    return {
        "wrong": [_trouble(trouble, rows.get(trouble.key)) for trouble in found],
        "over": [_row(row) for row in over],
        "events": [{**dict(row), "at": timestamp(row["at"])} for row in site.ledger.query(OF_NODE, (EVENTS,))],
        "tells": site.config.alerts.urls_file is not None,
    }


def _trouble(trouble: troubles.Trouble, row: dict[str, Any] | None) -> dict[str, Any]:
    """`study`: which one it is about, "" where none; since when it is known and when somebody was told."""
    study = _STUDY.search(trouble.text)
    return {"key": trouble.key, "level": trouble.level, "text": trouble.text, "study": study.group(1) if study else "",
            "first_at": timestamp(row["first_at"]) if row else None,
            "sent_at": timestamp(row["sent_at"]) if row else None, "grace_s": trouble.grace_s}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, **{name: timestamp(row[name]) for name in ("first_at", "last_at", "sent_at", "resolved_at")}}
