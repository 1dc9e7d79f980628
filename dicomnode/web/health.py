"""For those who watch processes: /healthz says that this one lives, /readyz that the node does its work.

Both answer everybody; what is wrong is said only to those who may look.
"""

from __future__ import annotations

import sqlite3

from fastapi import APIRouter, Response

from dicomnode import machine, workers
from dicomnode.web import models
from dicomnode.web.access import Known
from dicomnode.web.site import Site, SiteNow

__all__ = ["router"]

router = APIRouter(tags=["Health"])
MIB = 2**20


@router.get("/healthz")
def alive() -> models.Health:
    """This process answers. Nothing is looked at."""
    return models.Health(status="alive")


@router.get("/readyz", responses={503: {"model": models.Readiness, "description": "Not all of it does."}})
def ready(site: SiteNow, response: Response, user: Known) -> models.Readiness:
    """Ledger, receiver, workers and disk do what they are for."""
    wrong = _wrong(site)
    if wrong:
        response.status_code = 503
    return models.Readiness(status="not ready" if wrong else "ready", reasons=wrong if user is not None else None)


def _wrong(site: Site) -> list[str]:
    found = []
    now = site.clock()
    try:
        here, silent = workers.listing(site.ledger), workers.stale(site.ledger, now)
        if not here:
            found.append("no worker runs: nothing is computed and nothing is sent")
        found += [f"worker {row['name']} was not heard of for {row['silent_s']:.0f} s" for row in silent]
    except sqlite3.Error as error:
        found.append(f"the ledger does not answer: {error}")
    try:
        seen = machine.look(site.config, site.spool, now=now)
    except OSError as error:
        return [*found, f"the data directory cannot be looked at: {error.strerror or error}"]
    if seen.receiver_runs is False:
        found.append("no receiver runs: nothing can come in")
    if seen.free_bytes // MIB <= site.config.reception.low_disk_mb:
        found.append(f"{seen.free_bytes // MIB} MiB free: every object is refused")
    return found
