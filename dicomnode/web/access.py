"""Who may look and who may act: the holder of a token."""

from __future__ import annotations

import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, HTTPException, Request

from dicomnode.config import Config
from dicomnode.web.site import SiteNow

__all__ = ["TOKEN_FILE", "Operator", "User", "Viewer", "operator_token"]

TOKEN_FILE = "web.token"  # in data_dir, where web.token_file is not set


@dataclass(frozen=True)
class User:
    """Who asks. `name` is what the history says; `may_act` whether more than looking is allowed."""

    name: str
    may_act: bool


def operator_token(config: Config) -> str:
    """The token of those who may act; made where the configuration names no file and there is none yet."""
    path = config.web.token_file or config.node.data_dir / TOKEN_FILE
    if config.web.token_file is None and not path.exists():
        _make(path)
    return path.read_text(encoding="ascii").strip()


def _make(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_urlsafe(32) + "\n")


def _viewer(request: Request, site: SiteNow) -> User:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), operator_token(site.config).encode()):
        raise HTTPException(401, "a token is needed", {"WWW-Authenticate": "Bearer"})
    request.state.user = User("operator", may_act=True)
    return request.state.user


def _operator(user: Annotated[User, Depends(_viewer)]) -> User:
    if not user.may_act:
        raise HTTPException(403, "this token may look, not act")
    return user


#: Arguments of a handler: who asks; with Operator, refused unless they may act.
Viewer = Annotated[User, Depends(_viewer)]
Operator = Annotated[User, Depends(_operator)]
