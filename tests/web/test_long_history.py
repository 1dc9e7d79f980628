"""The history of a study that went on for months: the page stays small, nothing of it is out of reach."""

from __future__ import annotations

import re

from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.web.nodes import Furnished


def test_long_history_shows_its_newest_lines_and_leads_to_all(app: FastAPI, client: TestClient, node: Furnished):
    """Three thousand different events: two hundred on the page, the first of all behind the link."""
    study = node.studies["delivered"]
    with app.state.site.ledger.transaction() as db:
        db.executemany("INSERT INTO event (at, study_uid, series_uid, job_id, kind, from_state, to_state, reason) "
                       "VALUES (?, ?, ?, ?, 'job', 'delivered', 'delivered', ?)", [
                           (node.now + n, study, node.series["delivered"], node.job, f"look {n:04d}")
                           for n in range(3000)])
    short = client.get(f"/studies/{study}").text
    assert "look 2999" in short and "look 2799" not in short
    link = re.search(r'<a href="([^"]*history=all#history)">(\d+) older lines</a>', short)
    assert link is not None and int(link[2]) >= 2800
    whole = client.get(link[1].replace("&amp;", "&")).text
    assert "look 0000" in whole and "older lines" not in whole
    assert len(short) < len(whole) / 4
