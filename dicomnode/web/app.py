"""The application: its routers and static files, in one place."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from dicomnode import __version__
from dicomnode.config import Config
from dicomnode.web import metrics, overview
from dicomnode.web.site import FOLDER, Site

__all__ = ["create"]

#: Every part of the site; each module has one `router`.
PARTS = (overview, metrics)


def create(config: Config, *, clock: Callable[[], float] = time.time) -> FastAPI:
    """The status page and REST API of one node. Opens its ledger. Raises NodeError, OSError."""
    app = FastAPI(title="dicomnode", version=__version__, docs_url=None, redoc_url=None,
                  openapi_url="/api/openapi.json")
    app.state.site = Site.of(config, clock=clock)
    app.mount("/static", StaticFiles(directory=FOLDER / "static"), name="static")
    for part in PARTS:
        app.include_router(part.router)
    return app
