"""The list of studies: search by UID or accession number, day of arrival and state; newest first, page by page."""

from __future__ import annotations

from datetime import date
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from dicomnode import search
from dicomnode.errors import RefusedInput
from dicomnode.views import timestamp
from dicomnode.web.access import Viewer
from dicomnode.web.site import SiteNow, page

router = APIRouter()
ROWS = 50
#: What the filter offers, in the order in which a person asks for it, and how it is called.
OFFERED = {
    "held": "held: for a person", "failed": "failed: tried again", "running": "running", "queued": "queued",
    "sending": "being sent", "waiting": "waiting for more", "receiving": "receiving", "delivered": "delivered",
    "committed": "committed", "cancelled": "cancelled", "superseded": "superseded", "ignored": "ignored",
    "complete": "complete", "matched": "matched", "built": "built",
}


@router.get("/studies", response_class=HTMLResponse, include_in_schema=False)
def studies(request: Request, site: SiteNow, user: Viewer, q: Annotated[str, Query(max_length=100)] = "",
            state: str = "", since: Annotated[str, Query(alias="from")] = "",
            until: Annotated[str, Query(alias="to")] = "", before: str = "") -> HTMLResponse:
    """The studies that fit the search in the address."""
    asked = {"q": q.strip(), "state": state, "from": since, "to": until}
    wrong, found = "", search.Page((), None)
    try:
        found = search.studies(site.ledger, text=q, state=state, first=_day(since), last=_day(until), limit=ROWS,
                               before=before or None, timezone=site.config.schedule.timezone)
    except RefusedInput as error:
        wrong = str(error)
    rows = [{**vars(row), "received_at": timestamp(row.received_at), "finished_at": timestamp(row.finished_at),
             "until": timestamp(row.until)} for row in found.rows]
    return page(request, "studies.html", status_code=400 if wrong else 200, rows=rows, asked=asked, wrong=wrong,
                states=OFFERED, begun=bool(before),
                older=_address(asked | {"before": found.next}) if found.next else "",
                newest=_address(asked), without={key: _address(asked | {key: ""}) for key in asked if asked[key]})


def _day(text: str) -> date | None:
    """Raises RefusedInput."""
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise RefusedInput(f"{text[:40]!r} is no day. Remedy: write it as 2026-09-23.") from None


def _address(asked: dict[str, str]) -> str:
    """The search as a query string, without what was not asked for."""
    return "?" + urlencode({key: value for key, value in asked.items() if value})
