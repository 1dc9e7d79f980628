"""Whatever is asked of the REST API: an answer as OpenAPI describes it, no error of ours, nothing to strangers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from schemathesis import checks
from schemathesis.core.result import Ok

from dicomnode import workers
from dicomnode.config import parse
from dicomnode.web.access import operator_token
from dicomnode.web.app import create
from tests.web.nodes import NOW, crowded

TOML = """
[[peer]]
name = "PACS"
ae_title = "PACS"
host = "127.0.0.1"
port = 104
[[route]]
name = "psma"
when = {{ Modality = "PT" }}
send_to = ["PACS"]
[node]
data_dir = {data}
[reception]
low_disk_mb = 1
[web]
hosts = ["testserver"]
"""
CHECKS = (checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
          checks.response_schema_conformance, checks.negative_data_rejection, checks.ignored_auth,
          checks.unsupported_method)


class FromEverywhere:
    """Each request comes from an address of its own: otherwise who guesses tokens would have to wait."""

    def __init__(self, app: FastAPI) -> None:
        self.app, self._numbers = app, count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            number = next(self._numbers)
            scope["client"] = (f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}", 50000)
        await self.app(scope, receive, send)


@pytest.fixture
def fuzzed(tmp_path: Path) -> Iterator[FastAPI]:
    """A node with a few dozen studies in several states and a night's report."""
    crowded(tmp_path, studies=60)
    # low_disk_mb and a worker: /readyz is to say that it is ready, for 503 counts as an error here
    app = create(parse(TOML.format(data=json.dumps(str(tmp_path)))), clock=lambda: NOW)
    workers.enter(app.state.site.ledger, "here:1:cpu", device="cpu", now=NOW)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "2026-09-22.json").write_text(json.dumps(
        {"day": "2026-09-22", "since": "2026-09-21", "made_at": "", "complete": True, "totals": {}, "sources": []}))
    yield app
    app.state.site.ledger.close()


def fuzz(app: FastAPI, examples: int) -> int:
    """How many requests were made. Raises on the first answer that breaks a promise."""
    headers = {"Authorization": f"Bearer {operator_token(app.state.site.config)}"}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", FromEverywhere(app), headers=headers)
    made = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        if operation.path == "/metrics":
            continue  # not JSON: its own tests read it

        @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
                          | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                             phases=[hypothesis.Phase.generate],
                             suppress_health_check=list(hypothesis.HealthCheck))
        def ask(case: schemathesis.Case) -> None:
            nonlocal made
            made += 1
            response = case.call(headers=headers)
            case.validate_response(response, checks=list(CHECKS), headers=headers)

        ask()
    return made


def test_no_question_breaks_the_api(fuzzed: FastAPI) -> None:
    """Some right and wrong ones for every operation."""
    assert fuzz(fuzzed, 12) > 100


@pytest.mark.slow
def test_no_question_breaks_the_api_however_long(fuzzed: FastAPI) -> None:
    """Hundreds for every operation."""
    assert fuzz(fuzzed, 400) > 3000
