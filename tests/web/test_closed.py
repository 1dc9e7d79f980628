"""No way in: every route, also those that are still to come, refuses strangers; who may only look changes nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import BaseRoute, Mount

from dicomnode.config import parse
from dicomnode.web.access import COOKIE
from dicomnode.web.app import create

VIEWER = "a-viewers-token-5678"
#: What everybody may ask. A line more needs a reason as good as these: the way in, and whether the node lives.
OPEN = {("GET", "/login"), ("POST", "/login"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/static")}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
VALUES = {"day": "2026-09-22", "job": "1", "verb": "retry", "when": "before", "plane": "axial", "view": "axial",
          "axis": "d", "number": "0", "study": "1.2.3", "uid": "1.2.3"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    folder = tmp_path_factory.mktemp("closed")
    (folder / "view").write_text(VIEWER)
    (folder / "view").chmod(0o600)
    application = create(parse(f'[node]\ndata_dir = "{folder}"\n[web]\nviewer_token_file = "{folder}/view"\n'))
    yield application
    application.state.site.ledger.close()


def client(app: FastAPI, **headers: str) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", follow_redirects=False, headers=headers)


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of everything that the application answers to."""
    return list(_flat(app.routes))


def _flat(some: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
    for route in some:
        if (router := getattr(route, "original_router", None)) is not None:  # as newer versions of FastAPI keep them
            yield from _flat(router.routes)
            continue
        assert isinstance(route, APIRoute | Mount), f"{route}: a kind of route whose protection nobody has looked at"
        methods = (route.methods or set()) if isinstance(route, APIRoute) else {"GET"}
        yield from ((method, route.path) for method in methods)


def filled(path: str) -> str:
    return re.sub(r"{(\w+)}", lambda found: VALUES[found[1]], path)


def test_every_route_refuses_strangers(app: FastAPI) -> None:
    """By all methods, with no cookie and with one that is made up. Nothing says whether the thing asked for exists."""
    known = routes(app)
    assert len(known) > 35 and set(known) >= OPEN
    for headers in ({}, {"Cookie": f"{COOKIE}=eyJ9.x", "X-Remote-User": "admin", "X-CSRF-Token": "x"}):
        stranger = client(app, **headers)
        for path in {path for _, path in known}:
            for method in METHODS:
                if (method, path) in OPEN or (method == "HEAD" and ("GET", path) in OPEN):
                    continue
                answer = stranger.request(method, filled(path))
                login = answer.status_code == 303 and answer.headers["Location"].startswith("/login")
                expected = answer.status_code in (401, 404, 405) or login
                assert expected, f"{method} {path}: {answer.status_code} {answer.text[:80]}"
                if (method, path) in known:
                    assert login or answer.status_code == 401, f"{method} {path}: {answer.status_code}"


def test_who_may_only_look_changes_nothing(app: FastAPI) -> None:
    """Whatever is not GET, but for leaving: 403 before anything of the request is looked at."""
    viewer = client(app, Authorization=f"Bearer {VIEWER}")
    acting = [(method, path) for method, path in routes(app) if method not in ("GET", "HEAD")]
    assert len(acting) >= 5
    for method, path in acting:
        if path in ("/login", "/logout"):
            continue
        assert viewer.request(method, filled(path)).status_code == 403, f"{method} {path}"


def test_looking_changes_nothing(app: FastAPI, tmp_path: Path) -> None:
    """No GET writes into the ledger, not even the history: links, previews and caches may ask them again and again.
    But for how far /metrics has counted."""
    token = (app.state.site.spool.data_dir / "web.token").read_text().strip()
    operator = client(app, Authorization=f"Bearer {token}")
    ledger = app.state.site.ledger

    def content() -> list[list[tuple[object, ...]]]:
        tables = [row["name"] for row in ledger.query(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'memo'")]
        memos = ledger.query("SELECT * FROM memo WHERE key NOT LIKE 'measures.%'")
        rows = [ledger.query(f"SELECT * FROM {name}") for name in sorted(tables)]
        return [[tuple(row) for row in some] for some in (*rows, memos)]

    before = content()
    for method, path in routes(app):
        if method == "GET":
            assert operator.get(filled(path)).status_code != 500, path
    assert content() == before


def test_head_is_get_without_its_body(app: FastAPI) -> None:
    """As RFC 9110 9.1 asks of every server: what watches nodes asks so. It opens nothing that GET does not."""
    for path, status in (("/healthz", 200), ("/login", 200), ("/static/style.css", 200), ("/studies", 303)):
        head, get = client(app).head(path), client(app).get(path)
        assert head.status_code == get.status_code == status and head.content == b""
        assert head.headers["Content-Type"] == get.headers["Content-Type"] if status == 200 else True
    assert client(app).head("/api/v1/status").status_code == 401
