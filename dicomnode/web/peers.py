"""The page Node: peers, routes, the PSF library, how long jobs take, the configuration in force without secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from dicomnode import psflibrary
from dicomnode.config import Config, Peer
from dicomnode.forecast import forecast
from dicomnode.ledger import Ledger
from dicomnode.memo import memo
from dicomnode.reconcile import asked_key, problem_key
from dicomnode.views import timestamp
from dicomnode.web.access import Viewer
from dicomnode.web.site import SiteNow, page

router = APIRouter()
LISTED = ("peer", "route")  # have tables of their own
#: What is known of a peer, each by an index of the ledger.
LAST_SERIES = "SELECT max(first_at) AS at FROM series WHERE calling_ae = ?"
LAST_DELIVERY = "SELECT max(done_at) AS at FROM delivery WHERE peer = ? AND state IN ('delivered', 'committed')"
OPEN_DELIVERIES = ("SELECT state, count(*) AS n FROM delivery WHERE peer = ? AND state IN ('waiting', 'dead') "
                   "GROUP BY state")


@router.get("/node", response_class=HTMLResponse, include_in_schema=False)
def node_page(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    now = site.clock()
    return page(request, "node.html", config=site.config, free_bytes=site.spool.free_bytes(),
                peers=[_peer(site.ledger, peer) for peer in site.config.peer],
                measured=forecast(site.ledger, site.config, now=now)["measured"],
                library=[_psf(entry) for entry in psflibrary.listing(site.ledger)],
                sections=_sections(site.config))


def _peer(ledger: Ledger, peer: Peer) -> dict[str, Any]:
    """A peer of the configuration, and when it was last heard of."""
    may = {"sends to us": peer.may_send, "may query us": peer.may_query, "is asked each night": peer.query,
           "receives": peer.port is not None or peer.stow_url is not None}
    open_deliveries = {row["state"]: row["n"] for row in ledger.query(OPEN_DELIVERIES, (peer.name,))}
    return {
        "name": peer.name, "ae_title": peer.ae_title, "host": peer.host, "port": peer.port, "tls": peer.tls,
        "stow_url": peer.stow_url, "confirm": peer.confirm, "may": [text for text, yes in may.items() if yes],
        "last_series_at": timestamp(ledger.query(LAST_SERIES, (peer.ae_title,))[0]["at"]),
        "last_delivery_at": timestamp(ledger.query(LAST_DELIVERY, (peer.name,))[0]["at"]),
        "waiting": open_deliveries.get("waiting", 0), "dead": open_deliveries.get("dead", 0),
        "asked_at": timestamp(_seconds(memo(ledger, asked_key(peer.name)))),
        "problem": memo(ledger, problem_key(peer.name)) if peer.query else "",
    }


def _seconds(text: str) -> float | None:
    return float(text) if text else None


def _psf(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A scanner of the library: what a study of it is given now, and what is known."""
    kinds = [row["kind"] for row in entry["entries"]]
    return {"name": entry["name"], "why": entry["why"], "given": entry["given"],
            "measured": kinds.count("measured"), "found": kinds.count("found"),
            "newest_at": timestamp(max(row["at"] for row in entry["entries"]))}


def _sections(config: Config) -> list[dict[str, Any]]:
    """The other sections, key by key; `own`: not the default. Secrets lie in files: only their paths are here."""
    found = []
    for name in type(config).model_fields:
        if name in LISTED:
            continue
        section = getattr(config, name)
        plain = type(section)().model_dump(mode="json")
        found.append({"name": name, "doc": (type(section).__doc__ or "").strip().split("\n\n")[0].replace("`", ""),
                      "keys": [{"key": key, "value": _shown(value), "own": value != plain[key]}
                               for key, value in section.model_dump(mode="json").items()]})
    return found


def _shown(value: Any) -> str:
    """As TOML has it; "not set" for a key without a value."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) or "[]" if isinstance(value, list) else str(value) or '""'
