"""Files damaged and the ledger locked under the page: it says which, and shows all the rest."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from dicomnode.config import parse
from dicomnode.web import site
from dicomnode.web.access import operator_token
from dicomnode.web.app import create
from tests.web.nodes import Furnished


def _job(node: Furnished) -> Path:
    return node.folder / "data" / "derived" / str(node.job)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[2000:-2000:499] = bytes(len(content[2000:-2000:499]))
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_half, _empty, _flipped])
def test_damaged_looks_cost_the_pictures_alone(node: Furnished, client: TestClient, damage) -> None:
    """Gates, deliveries and slices stay; the page says that the pictures cannot be read and what to do."""
    damage(_job(node) / "looks.npz")
    study = node.studies["delivered"]
    page = client.get(f"/studies/{study}")
    assert page.status_code == 200
    assert "The pictures cannot be read" in page.text
    assert "dicomnode repair" in page.text
    assert 'id="gates"' in page.text
    assert 'id="slices"' in page.text
    assert client.get(f"/studies/{study}/jobs/{node.job}/mip/after/coronal.png").status_code == 404
    assert client.get(f"/studies/{study}/jobs/{node.job}/viewer").status_code == 200


@pytest.mark.parametrize("damage", [_half, _empty])
def test_a_damaged_kernel_costs_its_lines_alone(node: Furnished, client: TestClient, damage) -> None:
    """Widths and pictures of the kernel are kept elsewhere."""
    damage(_job(node) / "kernel.npy")
    page = client.get(f"/studies/{node.studies['delivered']}")
    assert page.status_code == 200
    assert 'id="kernel"' in page.text


def test_why_there_are_no_pictures_is_said_as_it_is(node: Furnished, client: TestClient) -> None:
    """Folder gone; a build that could not make them; nothing that a delivered job does not offer is advised."""
    address = f"/studies/{node.studies['delivered']}"
    ledger = client.app.state.site.ledger  # type: ignore[attr-defined]
    (_job(node) / "looks.npz").unlink()
    ledger.query("UPDATE job SET report = json_set(report, '$.looks', json('{\"problem\": \"no pictures: too big\"}')) "
                 "WHERE id = ?", (node.job,))
    page = client.get(address).text
    assert "No pictures: too big." in page
    assert "Retry" not in page.split('id="slices"')[0]
    shutil.rmtree(_job(node))
    assert "The derived files are not in the data directory." in client.get(address).text


@pytest.mark.parametrize("damage", [_half, _empty])
def test_a_damaged_file_is_named_in_the_viewer_with_what_to_do(node: Furnished, client: TestClient, damage) -> None:
    """Of the source as of the derived series; the other one is shown."""
    ledger = client.app.state.site.ledger  # type: ignore[attr-defined]
    derived = sorted(_job(node).glob("*.dcm"))[2]
    source = node.folder / "data" / ledger.instances(node.series["delivered"])[2]["path"]
    address = f"/studies/{node.studies['delivered']}/jobs/{node.job}/viewer"
    for path, word in ((derived, "After"), (source, "Before")):
        kept = path.read_bytes()
        damage(path)
        os.utime(path.parent)
        viewer = client.get(address).text
        assert f"{word} is not shown" in viewer
        assert "dicomnode repair" in viewer
        assert "data-viewer" in viewer
        path.write_bytes(kept)


def test_the_page_is_about_the_series_to_look_at_first(node: Furnished, client: TestClient) -> None:
    """Of several PET series the one that is held, as the list has it, not the one whose job is newest."""
    ledger = client.app.state.site.ledger  # type: ignore[attr-defined]
    study = node.studies["held"]
    for table in ("series", "job", "instance", "event"):
        ledger.query(f"UPDATE {table} SET study_uid = ? WHERE series_uid = ?", (study, node.series["queued"]))
    page = client.get(f"/studies/{study}").text
    assert "Why it is held:" in page
    assert 'data-state="held"' in page
    assert "(queued)" in page


@pytest.mark.parametrize("state", ["held", "waiting", "queued", "ignored"])
def test_every_study_offers_its_report(node: Furnished, client: TestClient, state: str) -> None:
    """A report of what came and why it stands still is wanted most where nothing was built."""
    study = node.studies[state]
    assert f"/studies/{study}/report.pdf" in client.get(f"/studies/{study}").text
    assert client.get(f"/studies/{study}/report.html").status_code == 200


def test_a_ledger_locked_for_long_keeps_no_page_waiting_for_long(
        node: Furnished, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be written is refused with the reason; figures are given without being kept; all else is shown."""
    assert site.WAIT_S < 5  # two of them pass within a scrape of Prometheus, 10 s
    monkeypatch.setattr(site, "WAIT_S", 0.2)
    app = create(parse(node.toml), clock=lambda: node.now)
    client = TestClient(app, base_url="http://127.0.0.1", headers={
        "Authorization": f"Bearer {operator_token(app.state.site.config)}"})
    study, target = node.studies["queued"], node.series["queued"]
    seen = client.get(f"/studies/{study}/act/hold?target={target}").text.split('name="seen" value="')[1].split('"')[0]
    other = sqlite3.connect(node.folder / "data" / "ledger.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        began = time.monotonic()
        assert client.get("/metrics").status_code == 200
        assert client.get("/").status_code == 200
        refused = client.post(f"/studies/{study}/act/hold", data={"target": target, "seen": seen})
        assert time.monotonic() - began < 4
        assert refused.status_code == 503
        assert "another process keeps the ledger locked" in refused.text
    finally:
        other.execute("ROLLBACK")
        other.close()
        app.state.site.ledger.close()
