"""The way in for browsers: a page that asks for the token, a one-time link, and the way out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from dicomnode.config import Config
from dicomnode.web.access import (
    COOKIE,
    Door,
    User,
    Viewer,
    address_of,
    is_https,
    operator_token,
    require_own_page,
)
from dicomnode.web.session import Sessions
from dicomnode.web.site import Site, SiteNow, page

__all__ = ["link", "router"]

router = APIRouter()


def link(config: Config, name: str, *, clock: Callable[[], float] = time.time) -> str:
    """An address that lets whoever opens it first in as `name`, who may act; for LINK_S seconds.

    Made from the token: who may read its file may do so, whether the server runs or not. Raises ConfigError, OSError.
    """
    web = config.web
    anywhere = web.host in ("0.0.0.0", "::")
    host = web.hosts[0] if web.hosts and (anywhere or web.certificate) else "127.0.0.1" if anywhere else web.host
    ticket = Sessions(operator_token(config), None, session_s=0, clock=clock).link(name)
    return (f"{'https' if web.certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{web.port}"
            f"/login?{urlencode({'ticket': ticket})}")


@router.get("/login", response_class=HTMLResponse)
def ask(request: Request, site: SiteNow, next: str = "/", ticket: str = "") -> Response:
    """The page that asks for the token; with the ticket of a one-time link, the way in."""
    if not ticket:
        return page(request, "login.html", back=_own(next), wrong="")
    door: Door = request.app.state.door
    session = door.sessions.use(ticket)
    if session is None:
        door.refusals.record(address_of(request, site.config), "wrong-link", "the one-time link is used up or too old")
        return page(request, "login.html", status_code=401, back="/",
                    wrong="This link was used already, or is older than ten minutes. `dicomnode web --link` makes "
                          "another.")
    return _in(request, site, User(session.name, session.may_act), "/")


@router.post("/login", response_class=HTMLResponse)
async def enter(request: Request, site: SiteNow, token: Annotated[str, Form()] = "",
                next: Annotated[str, Form()] = "/") -> Response:
    """Begin a session by a token."""
    await require_own_page(request, site, None)
    door: Door = request.app.state.door
    address = address_of(request, site.config)
    if wait_s := door.refusals.wait_s(address):
        response = page(request, "login.html", status_code=429, back=_own(next),
                        wrong=f"Too many wrong tokens. Wait {wait_s / 60:.0f} minutes, then try again.")
        response.headers["Retry-After"] = f"{wait_s:.0f}"
        return response
    may_act = door.sessions.right_of(token.strip())
    if may_act is None:
        await run_in_threadpool(door.refusals.record, address, "wrong-token",
                                "a wrong token was given to the login page", wrong_token=True)
        return page(request, "login.html", status_code=401, back=_own(next), wrong="That is not the token.")
    return _in(request, site, User("operator" if may_act else "viewer", may_act), _own(next))


@router.post("/logout")
def leave(request: Request, site: SiteNow, user: Viewer) -> Response:
    """End the session, also for copies of its cookie."""
    door: Door = request.app.state.door
    session = door.sessions.read(request.cookies.get(COOKIE, ""))
    if session is not None:
        door.sessions.end(session)
    response = RedirectResponse(f"{site.config.web.root_path}/login", status_code=303)
    response.delete_cookie(COOKIE, path=_cookie_path(site))
    response.headers["Clear-Site-Data"] = '"cache"'  # pictures, which browsers may keep for long while one is logged in
    return response


def _in(request: Request, site: Site, user: User, back: str) -> Response:
    door: Door = request.app.state.door
    response = RedirectResponse(f"{site.config.web.root_path}{back}", status_code=303)
    response.set_cookie(COOKIE, door.sessions.begin(user.name, may_act=user.may_act), path=_cookie_path(site),
                        max_age=int(site.config.web.session_h * 3600), httponly=True, samesite="strict",
                        secure=is_https(request, site.config))
    return response


def _cookie_path(site: Site) -> str:
    return site.config.web.root_path or "/"


def _own(path: str) -> str:
    """A path of ours to go back to; anything that could lead elsewhere becomes the front page."""
    good = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if good and not path.startswith(("/login", "/logout")) else "/"
