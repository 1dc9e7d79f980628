"""The front page: is the node well, what runs, what comes tonight, what waits for a person. It follows by itself."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from dicomnode import alerts, machine
from dicomnode.tonight import tonight
from dicomnode.web.access import Viewer
from dicomnode.web.site import Site, SiteNow, page

router = APIRouter()
HOURS = 3  # between two marks of the timeline


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
def overview(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    return _page(request, site, "overview.html")


@router.get("/tonight", response_class=HTMLResponse, include_in_schema=False)
def live(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    """What of the front page follows by itself."""
    return _page(request, site, "parts/tonight.html")


def _page(request: Request, site: Site, template: str) -> HTMLResponse:
    newest = site.ledger.query("SELECT coalesce(max(id), 0) AS id FROM event")[0]["id"]  # what was just done shows
    board, timeline = site.tonight.get(lambda: _look(site), now=site.clock(), stamp=newest)
    return page(request, template, board=board, timeline=timeline)


def _look(site: Site) -> tuple[dict[str, Any], dict[str, Any]]:
    now = site.clock()
    seen = machine.look(site.config, site.spool, now=now, starts=alerts.starts(site.ledger))
    board = tonight(site.ledger, site.config, seen, now=now)
    return board, _timeline(board)


def _timeline(board: dict[str, Any]) -> dict[str, Any]:
    """The night as a drawing: positions in percent of its width."""
    begin, end = _seconds(board["windows"]["begin"]), _seconds(board["windows"]["end"])

    def at(moment: str | float) -> float:
        seconds = moment if isinstance(moment, float) else _seconds(moment)
        return round(100 * min(1.0, max(0.0, (seconds - begin) / (end - begin))), 2)

    def bar(first: str, last: str) -> dict[str, float]:
        return {"x": at(first), "width": max(0.3, round(at(last) - at(first), 2))}

    zone = ZoneInfo(board["timezone"])
    first = datetime.fromtimestamp(begin, zone)
    marks = [first + timedelta(hours=hour) for hour in range(0, 25, HOURS)]
    jobs = [{**bar(row["started_at"], row["end"] if row["end"] and row["end"] > board["at"] else board["at"]),
             "kind": "run", "row": row} for row in board["running"]]
    jobs += [{**bar(row["forecast"]["start"], row["forecast"]["end"] or row["forecast"]["start"]),
              "kind": row["forecast"]["verdict"], "row": row} for row in board["queue"] if row["forecast"]["start"]]
    return {
        "now": at(board["at"]),
        "marks": [{"x": at(mark.timestamp()), "text": f"{mark:%H:%M}", "hour": mark.hour} for mark in marks],
        "rows": [{**row, "bars": [bar(opens, closes) for opens, closes in row["spans"]]}
                 for row in board["windows"]["rows"]],
        "jobs": [one for one in jobs if one["x"] < 100],
    }


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
