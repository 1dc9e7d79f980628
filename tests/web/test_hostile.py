"""Words of peers and of DICOM objects that mean harm: through every page and both reports they stay words."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pypdf
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.web.nodes import Furnished

HARM = ("<script>ours()</script>\"'><img src=x onerror=ours()><svg/onload=ours()>{{7*7}}]]>&lt;b&gt;<img "
        "src=\"file:///etc/passwd\"/><b>\u202edereviled\u2066\x07\x1b[31m" + "W" * 300)
COLUMNS = {"series": ("accession_number", "series_number", "series_description", "calling_ae", "reason"),
           "job": ("reason",), "event": ("reason", "actor", "code"), "delivery": ("reason",),
           "delivery_instance": ("comment",)}


class Foreign(HTMLParser):
    """Finds what our templates never write."""

    found: list[str]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name.startswith("on") or (re.match(r"\s*(javascript:|https?:|//|file:|x$)", value or "") and name in (
                    "src", "href", "action", "formaction")):
                self.found.append(f"<{tag} {name}={value}>")
        if tag == "script" and "src" not in dict(attributes):
            self.found.append("<script>")


def test_harmful_words_stay_words(app: FastAPI, client: TestClient, node: Furnished) -> None:
    """No element, attribute or template of theirs; no sign that cannot be seen or that turns a line around."""
    ledger = app.state.site.ledger
    with ledger.transaction() as db:
        for table, columns in COLUMNS.items():
            for column in columns:
                db.execute(f"UPDATE {table} SET {column} = ?", (HARM,))
        db.execute("UPDATE delivery_instance SET status = ?", (0xB000,))
    pages = ["/", "/studies", f"/studies?q={HARM[:60]}", "/alerts", "/node", "/nights/now", "/nothing/<script>"]
    for study in node.studies.values():
        pages += [f"/studies/{study}", f"/studies/{study}/report.html"]
    pages += [f"/studies/{node.studies[state]}/act/cancel?target={node.series[state]}" for state in ("held", "queued")]
    harmful = 0
    for path in pages:
        answer = client.get(path, headers={"Accept": "text/html"})
        assert answer.status_code in (200, 404), path
        parser = Foreign()
        parser.found = []
        parser.feed(answer.text)
        assert not parser.found, path
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e\u2066-\u2069]", answer.text), path
        harmful += "{{7*7}}" in answer.text
    assert harmful >= 12, "the words did come through"
    for path in (f"/studies/{node.studies[state]}/report.pdf" for state in ("delivered", "held")):
        answer = client.get(path)
        assert re.fullmatch(r'attachment; filename="dicomnode-report-[\w.-]+\.pdf"',
                            answer.headers["Content-Disposition"])
        assert "onerror=ours()" in "".join(page.extract_text() for page in pypdf.PdfReader(
            io.BytesIO(answer.content)).pages).replace("\n", "")
