"""A study on paper, to be kept: the report as one HTML file and as a PDF."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from dicomnode.reporting import content, files, html, pdf
from dicomnode.reporting.blocks import StudyReport
from dicomnode.web.access import Viewer
from dicomnode.web.site import Site, SiteNow

__all__ = ["router"]

router = APIRouter()


@router.get("/studies/{uid}/report.html", response_class=Response)
def report_html(uid: str, site: SiteNow, user: Viewer) -> Response:
    """One self-contained HTML file."""
    told = _told(site, uid)
    return _kept(told, html.render(told).encode(), "html", "text/html; charset=utf-8")


@router.get("/studies/{uid}/report.pdf", response_class=Response)
def report_pdf(uid: str, site: SiteNow, user: Viewer) -> Response:
    """The same as PDF."""
    told = _told(site, uid)
    return _kept(told, pdf.render(told), "pdf", "application/pdf")


def _told(site: Site, uid: str) -> StudyReport:
    return content.compose(site.ledger, site.spool, site.config, uid, now=site.clock())


def _kept(report: StudyReport, body: bytes, suffix: str, media_type: str) -> Response:
    """As a file to be saved: shown in the page's place, its own style would be refused (Content-Security-Policy)."""
    return Response(body, media_type=media_type, headers={
        "Content-Disposition": f'attachment; filename="{files.file_name(report, suffix)}"',
        "Cache-Control": "no-store"})
