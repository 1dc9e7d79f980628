"""An empty node's application with three routes to try the doors: GET /look, POST /act, GET /fail."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from dicomnode.config import parse
from dicomnode.web.access import Operator, Viewer
from dicomnode.web.app import create

OPERATOR, VIEWER = "an-operators-token-1234", "a-viewers-token-5678"
HOME = "http://127.0.0.1"


@dataclass
class House:
    """An empty node's application with two routes to try: GET /look and POST /act."""

    app: FastAPI
    now: list[float]

    def client(self, *, address: str = "127.0.0.1", base: str = HOME, **headers: str) -> TestClient:
        return TestClient(self.app, base_url=base, headers={name.replace("_", "-"): value for name, value in
                                                            headers.items()},
                          follow_redirects=False, client=(address, 50000))

    def logged_in(self, token: str = OPERATOR, **options: Any) -> TestClient:
        client = self.client(**options)
        assert client.post("/login", data={"token": token}).status_code == 303
        return client

    def csrf(self, client: TestClient) -> str:
        found = re.search(r'"X-CSRF-Token": "([^"]+)"', client.get("/").text)
        assert found is not None
        return found[1]

    def recorded(self) -> list[tuple[str, str]]:
        return [(event["code"], event["actor"]) for event in self.app.state.site.ledger.events()
                if event["kind"] == "security"]


Build = Callable[..., House]


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    """Makes houses: build('[web] lines')."""
    made: list[House] = []

    def house(web: str = "", *, viewer: bool = True) -> House:
        for name, token in (("op", OPERATOR), ("view", VIEWER)):
            (tmp_path / name).write_text(token + "\n")
            (tmp_path / name).chmod(0o600)
        second = f'viewer_token_file = "{tmp_path}/view"\n' if viewer else ""
        now = [1_000_000.0]
        app = create(parse(f'[node]\ndata_dir = "{tmp_path}/data"\n[web]\ntoken_file = "{tmp_path}/op"\n'
                           f'{second}{web}\n'), clock=lambda: now[0])
        routes = APIRouter()

        @routes.get("/look")
        def look(user: Viewer) -> dict[str, str]:
            return {"name": user.name}

        @routes.post("/act")
        def act(user: Operator) -> dict[str, str]:
            return {"name": user.name}

        @routes.get("/fail")
        def fail() -> None:
            raise RuntimeError("inner words")

        app.include_router(routes)
        made.append(House(app, now))
        return made[-1]

    with capture_logs():  # the traceback of /fail, drawn for people, takes seconds
        yield house
    for one in made:
        one.app.state.site.ledger.close()


@pytest.fixture
def house(build: Build) -> House:
    return build()
