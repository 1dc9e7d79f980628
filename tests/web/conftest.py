"""Fixtures of the web tests: a furnished node (made once), a copy of it to act on, its application and a client."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dicomnode.config import parse
from dicomnode.web.access import operator_token
from dicomnode.web.app import create
from tests.web.browser import chromium, open_page, page, served  # noqa: F401 (fixtures)
from tests.web.house import build, house  # noqa: F401 (fixtures)
from tests.web.nodes import Furnished, crowded, furnished


@pytest.fixture(scope="session")
def furnished_once(tmp_path_factory: pytest.TempPathFactory) -> Furnished:
    """Never to be changed: `node` is a copy."""
    return furnished(tmp_path_factory.mktemp("furnished"))


@pytest.fixture
def node(furnished_once: Furnished, tmp_path: Path) -> Furnished:
    """A node with a study in every state, to be changed at will."""
    folder = tmp_path / "node"
    shutil.copytree(furnished_once.folder, folder)
    return replace(furnished_once, folder=folder,
                   toml=furnished_once.toml.replace(str(furnished_once.folder), str(folder)))


@pytest.fixture
def app(node: Furnished) -> Iterator[FastAPI]:
    """The application over `node`, its clock standing still."""
    application = create(parse(node.toml), clock=lambda: node.now)
    yield application
    application.state.site.ledger.close()


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    """A program that holds the operators' token."""
    token = operator_token(app.state.site.config)
    return TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {token}"},
                      follow_redirects=False)


@pytest.fixture(scope="session")
def crowded_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with 10,000 studies; look, do not change."""
    folder = tmp_path_factory.mktemp("crowded")
    crowded(folder)
    return folder
