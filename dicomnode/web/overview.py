"""The front page: tonight's queue, what runs, what waits for a person."""

from __future__ import annotations

import shutil

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from dicomnode import views
from dicomnode.forecast import forecast
from dicomnode.web.access import Viewer
from dicomnode.web.site import SiteNow, page

router = APIRouter()


@router.get("/", response_class=HTMLResponse)
def overview(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    now = site.clock()
    status = views.status(site.ledger, free_bytes=shutil.disk_usage(site.spool.data_dir).free, now=now)
    return page(request, "overview.html", status=status, tonight=forecast(site.ledger, site.config, now=now))
