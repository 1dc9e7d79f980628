"""Sessions of browsers and one-time links: values that a browser keeps and only we can make. No table of them is kept.

    value = base64url(JSON) "." base64url(HMAC-SHA256(key, JSON))        key = HMAC-SHA256(token, purpose)

Another token makes other keys: whoever changes a token ends all sessions that began with the old one. What was ended
or used up is remembered until it would have run out anyway, also by the process that comes after this one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

__all__ = ["LINK_S", "Session", "Sessions"]

LINK_S = 600.0  # how long a one-time link may lie about, seconds
LONGEST = 1024  # characters; ours are shorter
PURPOSE = b"dicomnode web session 1"


@dataclass(frozen=True)
class Session:
    """Who logged in. `until`: unix seconds; `id`: never given twice; `kind`: "session" or "link"."""

    kind: str
    name: str
    may_act: bool
    until: float
    id: str


class Sessions:
    """Makes, reads and ends the sessions of one node. `viewer`: the token of those who may look, where there is one.

    session_s   how long a session lasts, seconds.   clock  unix seconds.   new_id  gives an unguessable id.
    over        what was ended or used up before: id -> until when that must be known; `keep` is given it anew each
                time something ends.
    """

    def __init__(self, operator: str, viewer: str | None, *, session_s: float, clock: Callable[[], float],
                 new_id: Callable[[], str] = lambda: secrets.token_urlsafe(16), over: Mapping[str, float] | None = None,
                 keep: Callable[[Mapping[str, float]], None] = lambda over: None) -> None:
        self._tokens = {True: operator} | ({False: viewer} if viewer is not None else {})
        self._keys = {may_act: hmac.digest(token.encode(), PURPOSE, hashlib.sha256)
                      for may_act, token in self._tokens.items()}
        self._session_s, self._clock, self._new_id = session_s, clock, new_id
        self._over, self._keep = dict(over or {}), keep
        self._lock = threading.Lock()

    def right_of(self, token: str) -> bool | None:
        """Whether the holder of that token may act; None: nobody has such a token. In constant time."""
        found = [may_act for may_act, own in self._tokens.items()
                 if hmac.compare_digest(token.encode(), own.encode())]
        return found[0] if found else None

    def begin(self, name: str, *, may_act: bool) -> str:
        """The cookie of a new session."""
        return self._sealed(Session("session", name, may_act, self._clock() + self._session_s, self._new_id()))

    def link(self, name: str) -> str:
        """What a one-time link carries: whoever opens it first within LINK_S is `name` and may act."""
        return self._sealed(Session("link", name, True, self._clock() + LINK_S, self._new_id()))

    def read(self, value: str) -> Session | None:
        """The session of a cookie; None where it is not ours, has run out or was ended."""
        return self._opened(value, "session")

    def use(self, value: str) -> Session | None:
        """The one who opens a link, once; None where it is not ours, has run out or was used."""
        with self._lock:
            found = self._opened(value, "link")
            if found is not None:
                self._end(found)
        return found

    def end(self, session: Session) -> None:
        """Its cookie counts no more, wherever it is."""
        with self._lock:
            self._end(session)

    def csrf(self, of: str) -> str:
        """What an unsafe request has to carry besides the cookie; `of`: a session's id, or a user of the proxy."""
        return _text(hmac.digest(self._keys[True], b"csrf " + of.encode(), hashlib.sha256))

    def _end(self, session: Session) -> None:
        now = self._clock()
        self._over = {id_: until for id_, until in self._over.items() if until > now} | {session.id: session.until}
        self._keep(self._over)

    def _sealed(self, session: Session) -> str:
        content = json.dumps(asdict(session)).encode()
        return f"{_text(content)}.{_text(hmac.digest(self._keys[session.may_act], content, hashlib.sha256))}"

    def _opened(self, value: str, kind: str) -> Session | None:
        content, seal = map(_bytes, (value[:LONGEST] + ".").split(".")[:2])
        for may_act, key in self._keys.items():
            if hmac.compare_digest(seal, hmac.digest(key, content, hashlib.sha256)):
                found = Session(**json.loads(content))
                good = found.kind == kind and found.may_act == may_act and found.until > self._clock()
                return found if good and found.id not in self._over else None
        return None


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
    except (binascii.Error, UnicodeEncodeError):
        return b""
