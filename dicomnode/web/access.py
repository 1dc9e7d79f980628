"""Who may look and who may act. One of three says who asks:

    Authorization: Bearer TOKEN     programs
    the cookie of a session         browsers, after the page /login
    web.user_header                 a reverse proxy that knows its users; believed from web.trusted_proxies alone

A browser sends cookies, and a proxy its header, also with requests that another site's page makes: with these two
every request that may change something has to show that it comes from our own page (`require_own_page`).
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import secrets
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request, Security
from fastapi.security import APIKeyCookie, HTTPBearer
from starlette.concurrency import run_in_threadpool

from dicomnode.config import Config
from dicomnode.errors import ConfigError
from dicomnode.logs import get_logger
from dicomnode.memo import memo, set_memo
from dicomnode.secretfiles import read_secret
from dicomnode.web.refusals import Refusals
from dicomnode.web.session import Sessions
from dicomnode.web.site import Site, SiteNow

__all__ = ["COOKIE", "CSRF_FIELD", "CSRF_HEADER", "TOKEN_FILE", "Door", "Known", "Operator", "User", "Viewer",
           "address_of", "is_https", "operator_token", "recognise", "require_own_page", "viewer_token"]

TOKEN_FILE = "web.token"  # in data_dir, where web.token_file is not set
SHORTEST = 16  # characters of a token
COOKIE = "dicomnode_session"
OVER = "web.over"  # the memo of sessions and links that count no more
CSRF_HEADER, CSRF_FIELD = "X-CSRF-Token", "csrf"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
LONGEST_NAME = 64  # of a user; longer ones are cut
LONGEST_REASON = 300  # letters of what a request made us write into the history, which is kept for ever

log = get_logger(__name__)


@dataclass(frozen=True)
class User:
    """Who asks. `name` is what the history says; `may_act` whether more than looking is allowed."""

    name: str
    may_act: bool


@dataclass(frozen=True)
class Door:
    """What it takes to know who asks: app.state.door."""

    sessions: Sessions
    refusals: Refusals

    @classmethod
    def of(cls, site: Site) -> Door:
        """Reads the tokens, and makes the one of the operators at first use. Raises ConfigError, OSError."""
        def keep(over: Mapping[str, float]) -> None:
            try:
                set_memo(site.ledger, OVER, json.dumps(dict(over)))
            except sqlite3.Error as error:  # a full disk: here the session is over all the same
                log.error("an ended session could not be written down: a restart would let it in again",
                          action="session_lost", error=str(error))

        sessions = Sessions(
            operator_token(site.config), viewer_token(site.config), session_s=site.config.web.session_h * 3600,
            clock=site.clock, over=json.loads(memo(site.ledger, OVER) or "{}"), keep=keep)
        return cls(sessions, Refusals(site.ledger, clock=site.clock))


class _Refused(Exception):
    """Who asks is not known; `code` and `reason` for the history, "" where nothing was tried."""

    def __init__(self, reason: str, *, code: str = "", wrong_token: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.code, self.wrong_token = reason, code, wrong_token


# --- tokens


def operator_token(config: Config) -> str:
    """The token of those who may act; made where the configuration names no file and there is none yet.

    Raises ConfigError where others may read its file or it is too short.
    """
    path = config.web.token_file or config.node.data_dir / TOKEN_FILE
    if config.web.token_file is None and not path.exists():
        _make(path)
    return _token(path, "web.token_file")


def viewer_token(config: Config) -> str | None:
    """The token of those who may look; None: there is none. Raises ConfigError."""
    if config.web.viewer_token_file is None:
        return None
    token = _token(config.web.viewer_token_file, "web.viewer_token_file")
    if token == operator_token(config):
        raise ConfigError(f"web.viewer_token_file {config.web.viewer_token_file} holds the operators' token: who may "
                          "look could act. Remedy: write another token into it.")
    return token


def _token(path: Path, what: str) -> str:
    token = read_secret(path, what=what).strip()
    if len(token) < SHORTEST or not token.isascii() or any(sign.isspace() for sign in token):
        raise ConfigError(f"{what} {path} is no token: {SHORTEST} or more ASCII characters without blanks. Remedy: "
                          "python3 -c 'import secrets; print(secrets.token_urlsafe(32))' makes one.")
    return token


def _make(path: Path) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return  # another process made it just now
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")


# --- where a request comes from


def _trusted(config: Config, address: str) -> bool:
    try:
        found = ipaddress.ip_address(_plain(address))
    except ValueError:
        return False
    return any(found in ipaddress.ip_network(network, strict=False) for network in config.web.trusted_proxies)


def _plain(address: str) -> str:
    """An address as proxies forward it, without the port that some add and the IPv6 form of an IPv4 address: who comes
    again on another port is no one else. What is no address stays as it is.

    >>> _plain("192.0.2.1:50123"), _plain("[2001:db8::1]:443"), _plain("::ffff:192.0.2.1"), _plain("unknown")
    ('192.0.2.1', '2001:db8::1', '192.0.2.1', 'unknown')
    """
    bare = address.partition("]")[0].removeprefix("[") if address.startswith("[") else address
    bare = bare.partition(":")[0] if bare.count(":") == 1 else bare
    try:
        found = ipaddress.ip_address(bare)
    except ValueError:
        return address
    return str(getattr(found, "ipv4_mapped", None) or found)


def address_of(request: Request, config: Config) -> str:
    """The address of whoever asks: behind trusted proxies the last one that they did not add themselves."""
    address = _plain(request.client.host) if request.client else "unknown"
    forwarded = ",".join(request.headers.getlist("X-Forwarded-For")).split(",")
    while _trusted(config, address) and forwarded and forwarded[-1].strip():
        address = _plain(_printable(forwarded.pop().strip())[:LONGEST_NAME])
    return address


def is_https(request: Request, config: Config) -> bool:
    """Whether the browser came by https, to us or to a trusted proxy."""
    if request.client and _trusted(config, request.client.host):
        return request.headers.get("X-Forwarded-Proto", request.url.scheme) == "https"
    return request.url.scheme == "https"


# --- who


def _who(request: Request, site: Site, door: Door) -> tuple[User, str | None]:
    """The user, and what an unsafe request of theirs has to carry; None: nothing. Raises _Refused."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        may_act = door.sessions.right_of(given.strip())
        if may_act is None:
            raise _Refused("the token is wrong", code="wrong-token", wrong_token=True)
        return User("operator" if may_act else "viewer", may_act), None
    if cookie := request.cookies.get(COOKIE):
        session = door.sessions.read(cookie)
        if session is not None:
            return User(session.name, session.may_act), door.sessions.csrf(session.id)
    web = site.config.web
    named = [_text(value).strip() for value in request.headers.getlist(web.user_header)] if web.user_header else []
    if any(named):
        if request.client is None or not _trusted(site.config, request.client.host):
            raise _Refused(f"{web.user_header} is believed from trusted_proxies alone", code="user-header")
        if len(named) > 1:  # the proxy added its own to what the browser sent
            raise _Refused(f"{web.user_header} came {len(named)} times: the proxy must overwrite it",
                           code="user-header")
        may_act = not web.operators or named[0] in web.operators
        return User(_printable(named[0])[:LONGEST_NAME], may_act), door.sessions.csrf(f"proxy {named[0]}")
    raise _Refused("who asks is not known: log in, or send a token")


def _text(value: str) -> str:
    """The text of a header, which comes as latin-1 (RFC 9110 5.5): proxies write names in UTF-8."""
    try:
        return value.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return value


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text)


async def _viewer(request: Request, site: SiteNow, _bearer: Annotated[object, Security(HTTPBearer(
        auto_error=False, description="The token of web.token_file, or of web.viewer_token_file to look only."))],
        _cookie: Annotated[object, Security(APIKeyCookie(
            name=COOKIE, auto_error=False, description="The session of a browser that has logged in."))]) -> User:
    door: Door = request.app.state.door
    address = address_of(request, site.config)
    if "Authorization" in request.headers and (wait_s := door.refusals.wait_s(address)):
        raise HTTPException(429, "too many wrong tokens came from this address. Remedy: wait, then try again",
                            {"Retry-After": f"{wait_s:.0f}"})
    try:
        user, csrf = _who(request, site, door)
    except _Refused as refused:
        if refused.code:
            await run_in_threadpool(door.refusals.record, address, refused.code, refused.reason,
                                    wrong_token=refused.wrong_token)
        raise HTTPException(401, refused.reason, {"WWW-Authenticate": "Bearer"}) from refused
    request.state.user, request.state.csrf = user, csrf or ""
    if csrf is not None and request.method not in SAFE:
        await require_own_page(request, site, csrf)
    return user


def recognise(request: Request) -> None:
    """For pages of errors, which ask for nobody: the menu of who is logged in all the same."""
    with suppress(_Refused):
        request.state.user, csrf = _who(request, request.app.state.site, request.app.state.door)
        request.state.csrf = csrf or ""


async def _known(request: Request, site: SiteNow) -> User | None:
    """Who asks; None for somebody unknown. A token that is shown has to be right, or this would tell which one is."""
    if "Authorization" in request.headers:
        return await _viewer(request, site, None, None)
    try:
        return _who(request, site, request.app.state.door)[0]
    except _Refused:
        return None


async def _operator(request: Request, site: SiteNow, user: Annotated[User, Depends(_viewer)]) -> User:
    if not user.may_act:
        reason = f"{user.name} may look, not act"
        await _refuse(request, site, "look-only", f"{reason}: {request.method} {request.url.path}")
        raise HTTPException(403, f"{reason}. Remedy: ask someone who may act")
    return user


async def require_own_page(request: Request, site: Site, csrf: str | None) -> None:
    """Refuse a request that another site's page made: by Sec-Fetch-Site, Origin, and the secret `csrf` (None: not yet).

    Raises HTTPException 403.
    """
    wrong = _foreign(request, site.config)
    if not wrong and csrf is not None:
        given = request.headers.get(CSRF_HEADER, "")
        if not given and request.headers.get("Content-Type", "").startswith(FORMS):
            field = (await request.form()).get(CSRF_FIELD, "")
            given = field if isinstance(field, str) else ""
        if not hmac.compare_digest(given.encode(), csrf.encode()):
            wrong = f"neither the header {CSRF_HEADER} nor the field {CSRF_FIELD} holds the secret of this session"
    if wrong:
        await _refuse(request, site, "csrf", f"{wrong}: {request.method} {request.url.path}")
        raise HTTPException(403, "this does not come from a page of this node, or the page is old. "
                                 "Remedy: load the page again and repeat it")


def _foreign(request: Request, config: Config) -> str:
    """Why a request cannot come from a page of ours, by what the browser says of it; "": nothing speaks against it.

    Sec-Fetch-Site comes only over https or loopback; Origin is "null" for forms of pages with our Referrer-Policy.
    """
    if site := request.headers.get("Sec-Fetch-Site"):
        return "" if site in ("same-origin", "none") else f"it comes from another site (Sec-Fetch-Site: {site[:20]})"
    origin = request.headers.get("Origin", "null")
    if origin == "null":
        return ""
    try:
        found = urlsplit(origin)
        ours = found.netloc == request.headers.get("Host", "") or found.hostname in config.web.hosts
    except ValueError:  # no address at all
        ours = False
    return "" if ours else f"it comes from a page of {origin[:100]}"


async def _refuse(request: Request, site: Site, code: str, reason: str) -> None:
    door: Door = request.app.state.door
    await run_in_threadpool(door.refusals.record, address_of(request, site.config), code,
                            _printable(reason)[:LONGEST_REASON])


#: Arguments of a handler: who asks; with Operator, refused unless they may act.
Viewer = Annotated[User, Depends(_viewer)]
Operator = Annotated[User, Depends(_operator)]
#: Who asks, where that is known: for what everybody may ask.
Known = Annotated[User | None, Depends(_known)]
