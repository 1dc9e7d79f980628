"""A row that is damaged takes no page with it but its own study's."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.web.nodes import Furnished

PAGES = ("/", "/tonight", "/studies", "/alerts", "/alerts/now", "/node", "/metrics", "/api/v1/status",
         "/api/v1/studies", "/api/v1/forecast", "/api/v1/alerts")
NAN = '{"device": "cpu", "stage": "main", "step": 1, "steps": 4, "loss": NaN}'


@pytest.mark.parametrize("text", [NAN, '{"device": "cp', "[1]", ""])
def test_damaged_report_or_progress_takes_no_page_with_it(app: FastAPI, client: TestClient, node: Furnished, text: str):
    """Not a number where one should be, half a text, another kind of value: all lists and figures are shown."""
    ledger = app.state.site.ledger
    with ledger.transaction() as db:
        db.execute("UPDATE job SET report = ? WHERE id = ?", (text, node.job))
        db.execute("UPDATE job SET progress = ? WHERE state = 'running'", (text,))
    assert {path: client.get(path).status_code for path in PAGES} == dict.fromkeys(PAGES, 200)
    assert client.get(f"/studies/{node.studies['held']}").status_code == 200


def test_the_page_of_a_damaged_row_says_what_to_do(app: FastAPI, client: TestClient, node: Furnished):
    """Half a report: its own study's page is no failure without words, and not read as if there were none."""
    with app.state.site.ledger.transaction() as db:
        db.execute("UPDATE job SET report = ? WHERE id = ?", ('{"device": "cp', node.job))
    study = node.studies["delivered"]
    for path in (f"/studies/{study}", f"/api/v1/studies/{study}", f"/api/v1/jobs/{node.job}"):
        answered = client.get(path)
        assert answered.status_code == 503 and "dicomnode repair" in answered.text, path
