"""The application: its routers and static files, in one place."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import Scope

from dicomnode import __version__
from dicomnode.config import Config
from dicomnode.web import (
    actions,
    alerts,
    api,
    health,
    images,
    login,
    metrics,
    nights,
    overview,
    peers,
    problems,
    reports,
    studies,
    study,
)
from dicomnode.web.access import Door
from dicomnode.web.security import Gate
from dicomnode.web.site import FOLDER, Site

__all__ = ["create"]

YEAR_S = 365 * 86400

#: Every part of the site; each module has one `router`.
PARTS = (login, overview, studies, nights, alerts, peers, metrics, reports, study, actions, images, api, health)
FOR_PROGRAMS = (api, health, metrics)  # what OpenAPI tells of


def create(config: Config, *, clock: Callable[[], float] = time.time) -> FastAPI:
    """The status page and REST API of one node. Opens its ledger. Raises NodeError, OSError."""
    app = FastAPI(title="dicomnode", version=__version__, docs_url=None, redoc_url=None,
                  openapi_url=None, redirect_slashes=False)
    site = app.state.site = Site.of(config, clock=clock)
    app.state.door = Door.of(site)
    app.add_middleware(Gate, config=config)
    problems.install(app)
    app.mount("/static", _Files(directory=FOLDER / "static"), name="static")
    for part in PARTS:
        app.include_router(part.router, include_in_schema=part in FOR_PROGRAMS)
    app.include_router(api.docs)
    api.describe(app, config.web.root_path)
    return app


class _Files(StaticFiles):
    """Files that browsers keep: for ever under the address that `asset` gave them, else asking whether they changed."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        named = scope["query_string"].startswith(b"v=")
        response.headers["Cache-Control"] = f"public, max-age={YEAR_S}, immutable" if named else "no-cache"
        return response
