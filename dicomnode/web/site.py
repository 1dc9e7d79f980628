"""What every handler works with: configuration, ledger, spool, clock, templates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dicomnode import __version__
from dicomnode.config import Config
from dicomnode.ledger import Ledger
from dicomnode.plaintext import seen
from dicomnode.spool import Spool
from dicomnode.web.shared import Shared
from dicomnode.web.words import Words

__all__ = ["FOLDER", "Site", "SiteNow", "page"]

FOLDER = Path(__file__).parent
WAIT_S = 4.0  # for a ledger that another process keeps locked: meanwhile no page is answered


@dataclass(frozen=True)
class Site:
    """One node as its pages see it."""

    config: Config
    ledger: Ledger
    spool: Spool
    clock: Callable[[], float]
    templates: Environment
    tonight: Shared = field(default_factory=Shared)  # what all see of the front page

    @classmethod
    def of(cls, config: Config, *, clock: Callable[[], float]) -> Site:
        """Opens (and at first use makes) ledger and spool of the configuration. Raises NodeError, OSError."""
        spool = Spool(config.node.data_dir)
        return cls(config, Ledger(spool.ledger_path, timeout_s=WAIT_S), spool, clock, _templates())


def _templates() -> Environment:
    """Everything is escaped; a name that a template does not get is an error, never an empty place."""
    return Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True, auto_reload=False, finalize=seen)


@cache
def _version_of(name: str) -> str:
    return hashlib.sha256((FOLDER / "static" / name).read_bytes()).hexdigest()[:12]


def _of_request(request: Request) -> Site:
    site: Site = request.app.state.site
    return site


#: The argument of a handler: `def overview(site: SiteNow) -> ...`
SiteNow = Annotated[Site, Depends(_of_request)]


def page(request: Request, template: str, *, status_code: int = 200, **values: Any) -> HTMLResponse:
    """A page of `templates/`: its values, and what base.html needs of the request."""
    site = _of_request(request)
    user = getattr(request.state, "user", None)
    root = site.config.web.root_path
    text = site.templates.get_template(template).render(
        **values, node=site.config.node, version=__version__, user=user, path=request.url.path,
        words=Words(site.config.schedule.timezone, site.clock()), root=root,
        asset=lambda name: f"{root}/static/{name}?v={_version_of(name)}",
        csrf=getattr(request.state, "csrf", ""))
    return HTMLResponse(text, status_code=status_code)
