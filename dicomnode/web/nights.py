"""The reconciliation reports: what the sources held for us each night, and how far each study got."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse

from dicomnode import reconcile
from dicomnode.web.access import Viewer
from dicomnode.web.site import Site, SiteNow, page

router = APIRouter()
STAGES = ("eligible", "received", "processed", "delivered", "committed")


@router.get("/nights", response_class=HTMLResponse, include_in_schema=False)
def nights(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    """The reports that are kept, newest first."""
    files = sorted((site.spool.data_dir / "reports").glob("????-??-??.json"), reverse=True)
    return page(request, "nights.html", nights=[_summary(path) for path in files], stages=STAGES,
                asked=[peer.name for peer in site.config.peer if peer.query],
                today=reconcile.local_day(site.config, site.clock()).isoformat())


@router.get("/nights/now", response_class=HTMLResponse, include_in_schema=False)
def so_far(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    """The report as it would be written at this moment."""
    now = site.clock()
    report = reconcile.report(site.ledger, site.config, day=reconcile.local_day(site.config, now), now=now)
    return _page(request, site, report.as_json(), written=False)


@router.get("/nights/{day}", response_class=HTMLResponse, include_in_schema=False)
def night(request: Request, day: str, site: SiteNow, user: Viewer) -> HTMLResponse:
    """One report as it was written."""
    try:
        path = site.spool.data_dir / "reports" / f"{date.fromisoformat(day).isoformat()}.json"
    except ValueError:
        raise HTTPException(404, f"{day!r} is no day. Remedy: write it as 2026-09-23") from None
    if not path.exists():
        raise HTTPException(404, f"there is no report of {path.stem}. Remedy: reports are kept for "
                            f"{reconcile.KEPT_DAYS} days; the page Nights lists them")
    try:
        report = _read(path)
    except (OSError, ValueError) as error:
        raise HTTPException(409, f"the report of {path.stem} cannot be read: {error}. Remedy: `dicomnode reconcile` "
                            "writes it anew") from error
    return _page(request, site, report, written=True)


def _page(request: Request, site: Site, report: dict[str, Any], *, written: bool) -> HTMLResponse:
    """`known`: the studies of which something is here, so that they have a page."""
    uids = [line["study_uid"] for source in report["sources"] for line in source["studies"]]
    known = {row["study_uid"] for row in site.ledger.query(
        "SELECT study_uid FROM series WHERE study_uid IN (SELECT value FROM json_each(?))", (json.dumps(uids),))}
    return page(request, "night.html", night=report, stages=STAGES, written=written, known=known)


def _read(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is no report."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _summary(path: Path) -> dict[str, Any]:
    """A line of the list; `wrong` says why a file cannot be read, or ""."""
    try:
        report = _read(path)
        return {"day": path.stem, "wrong": "", "complete": report["complete"], "totals": report["totals"],
                "made_at": report["made_at"],
                "problems": [source["source"] for source in report["sources"] if source["problem"]],
                "lacking": sum(bool(line["missing"]) for source in report["sources"] for line in source["studies"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"day": path.stem, "wrong": f"{type(error).__name__}: {error}"}
