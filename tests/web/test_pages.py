"""The pages with lists, without a browser: what they refuse, what they say of an empty or damaged node, their cost."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from dicomnode.config import parse
from dicomnode.ledger import Ledger
from dicomnode.spool import Spool
from dicomnode.tonight import night_of, spans, tonight
from dicomnode.troubles import Machine
from dicomnode.web import peers
from dicomnode.web.access import operator_token
from dicomnode.web.alerts import OF_NODE
from dicomnode.web.app import create
from dicomnode.web.words import Words, duration
from dicomnode.windows import Windows
from tests.web.nodes import NOW, ROUTE, TOML, Furnished

PAGES = ("/", "/tonight", "/studies", "/nights", "/nights/now", "/alerts", "/alerts/now", "/node")
PEER = '[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = 1\n'
HEALTHY = Machine(free_bytes=10**12, receiver_runs=True)


def client_of(toml: str) -> TestClient:
    app = create(parse(toml), clock=lambda: NOW)
    token = operator_token(app.state.site.config)
    return TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {token}"})


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[TestClient]:
    """A node that knows nobody and received nothing."""
    client = client_of(f'[node]\ndata_dir = "{tmp_path}"\n')
    yield client
    client.app.state.site.ledger.close()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def crowd(crowded_data: Path) -> Iterator[TestClient]:
    """A node with 10,000 studies."""
    client = client_of(f'[node]\ndata_dir = "{crowded_data}"\n{TOML}{PEER}'
                       f'{ROUTE.format(method="nbd", preset="best", also="")}')
    yield client
    client.app.state.site.ledger.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", PAGES)
def test_nobody_sees_a_page_without_a_token(app: object, path: str) -> None:
    """A stranger is sent to log in or refused, and sees no accession number."""
    answer = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False).get(path)  # type: ignore[arg-type]
    assert answer.status_code in (303, 401)
    assert "ACC" not in answer.text


@pytest.mark.parametrize("path", PAGES)
def test_a_new_node_has_pages_that_say_what_to_do(bare: TestClient, path: str) -> None:
    """Nothing received, no peer, no route: each page opens all the same."""
    assert bare.get(path).status_code == 200


def test_a_new_node_says_where_to_send(bare: TestClient) -> None:
    """An empty list of studies names AE title, address and port; one of peers says what is missing."""
    assert "NBDNODE at 127.0.0.1:11112" in bare.get("/studies").text
    assert "No peer is configured." in bare.get("/node").text
    assert "No report was written yet." in bare.get("/nights").text


def test_what_objects_say_is_text_and_never_markup(client: TestClient, app: object, node: Furnished) -> None:
    """An accession number, a description and a reason with tags in them come out escaped, on every page."""
    ledger: Ledger = app.state.site.ledger  # type: ignore[attr-defined]
    ledger.query("UPDATE series SET accession_number = '<b>own</b>', series_description = '<i>', calling_ae = '<u>'")
    ledger.query("UPDATE job SET reason = '<script>x</script>. Remedy: <s>'")
    ledger.event("node", now=NOW, code="<q>", reason="<em>")
    for path in (*PAGES, "/studies?q=<h1>"):
        text = client.get(path).text
        assert not [tag for tag in ("<b>own", "<i>", "<u>", "<script>x", "<s>", "<q>", "<em>", "<h1><") if tag in text]


@pytest.mark.parametrize(("path", "status", "says"), [
    ("/studies?from=2026-13-01", 400, "write it as 2026-09-23"),
    ("/studies?state=lost", 400, "there is no state"),
    ("/studies?before=nowhere", 400, "is no place in a list"),
    ("/nights/2026-01-01", 404, "There is no report of 2026-01-01."),
    ("/nights/..%2Fweb.token", 404, ""),
    ("/nights/yesterday", 404, "no day"),
])
def test_a_wrong_address_is_explained(client: TestClient, path: str, status: int, says: str) -> None:
    """A day, a state or a place that cannot be: an error that says so, never a stack of calls."""
    answer = client.get(path, headers={"Accept": "text/html"})
    assert answer.status_code == status
    assert says in answer.text


def test_a_damaged_report_does_not_hide_the_others(client: TestClient, node: Furnished) -> None:
    """The list shows what can be read, and of the damaged one that it cannot."""
    folder = node.folder / "data" / "reports"
    folder.mkdir(exist_ok=True)
    (folder / "2026-09-21.json").write_text("{")
    (folder / "2026-09-22.json").write_text(
        '{"day": "2026-09-22", "since": "2026-09-21", "made_at": "2026-09-22T05:00:00Z", "complete": true, '
        '"totals": {"eligible": 2, "received": 2, "processed": 2, "delivered": 2, "committed": 2}, "sources": []}')
    text = client.get("/nights").text
    assert "nothing missing" in text
    assert "cannot be read" in text
    answer = client.get("/nights/2026-09-21")
    assert answer.status_code == 409
    assert "cannot be read" in answer.text


def test_tonight_knows_whether_the_node_is_well(node: Furnished) -> None:
    """Receiver, workers, disk and alerts each have a state; what is wrong has its remedy."""
    config = parse(node.toml)
    with Ledger(Spool(config.node.data_dir).ledger_path) as ledger:
        well = {line["name"]: line for line in tonight(ledger, config, HEALTHY, now=NOW)["health"]}
        ill = {line["name"]: line for line in tonight(
            ledger, config, Machine(free_bytes=1, receiver_runs=False), now=NOW)["health"]}
    assert (well["Receiver"]["state"], well["Disk"]["state"], well["Workers"]["state"]) == ("good", "good", "bad")
    assert (ill["Receiver"]["state"], ill["Disk"]["state"]) == ("bad", "bad")
    assert ill["Receiver"]["remedy"] == "systemctl status dicomnode-receive"


def test_tonight_shows_a_delivery_that_is_tried_again(node: Furnished) -> None:
    """A job that is being sent shows each peer, its reason and the next attempt."""
    config = parse(node.toml)
    with Ledger(Spool(config.node.data_dir).ledger_path) as ledger:
        ledger.query("UPDATE job SET state = 'sending', finished_at = NULL WHERE id = ?", (node.job,))
        ledger.query("UPDATE delivery SET state = 'waiting', attempts = 2, reason = 'connection refused', next_at = ? "
                     "WHERE job_id = ? AND peer = 'PACS'", (NOW + 60, node.job))
        sending = tonight(ledger, config, HEALTHY, now=NOW)["sending"]
    assert [(one["peer"], one["state"], one["next_at"]) for one in sending[0]["deliveries"]] == [
        ("PACS", "waiting", "2026-09-23T21:47:40Z"), ("ARCHIVE", "delivered", sending[0]["deliveries"][1]["next_at"])]


def test_the_night_is_as_long_as_the_clock_of_the_site_says() -> None:
    """From noon to noon, 25 hours when the clocks go back; windows are cut to it, one that never closes fills it."""
    begin, end = night_of(1_792_900_000.0, "Europe/Berlin")  # 2026-10-25 05:46, after the change
    assert end - begin == 25 * 3600
    found = spans(Windows(("20:00-06:00",), "Europe/Berlin"), begin, end)
    assert [(round((opens - begin) / 3600), round((closes - begin) / 3600)) for opens, closes in found] == [(8, 19)]
    assert spans(Windows((), "Europe/Berlin"), begin, end) == [(begin, end)]


def test_times_are_those_of_the_site() -> None:
    """Today by the hour, other days with their date; the moment in UTC and the whole local time are always there."""
    words = Words("Europe/Berlin", NOW)
    assert words.clock("2026-09-23T18:52:00Z") == (
        '<time datetime="2026-09-23T18:52:00Z" title="Wed 2026-09-23 20:52:00 Europe/Berlin">20:52</time>')
    assert ">24 Sep 00:10<" in words.clock("2026-09-23T22:10:00Z")
    assert ">2024-05-01<" in words.clock("2024-05-01T10:00:00Z")
    assert words.clock(None) == "–"
    assert duration(-5) == "0 s"


# --- what it costs

#: Steps of sqlite's machine that a page may take over 10,000 studies; 100,000 of them are a millisecond or two.
STEPS = 1_000_000


@pytest.mark.parametrize("path", [*PAGES, "/studies?q=ACC005", "/studies?q=NOPE", "/studies?state=held",
                                  "/studies?from=2025-01-01&to=2025-02-01", "/studies?q=2.25.4000000005"])
def test_a_page_over_ten_thousand_studies_asks_little_of_the_ledger(crowd: TestClient, path: str) -> None:
    """Counted in steps of the database's machine, which are the same on any computer under any load."""
    ledger: Ledger = crowd.app.state.site.ledger  # type: ignore[attr-defined]
    counted = [0]

    def count() -> None:
        counted[0] += 1

    ledger._db.set_progress_handler(count, 1000)
    try:
        assert crowd.get(path).status_code == 200
    finally:
        ledger._db.set_progress_handler(None, 0)
    assert 1000 * counted[0] <= STEPS, f"{path} takes {counted[0]} thousand steps"


@pytest.mark.parametrize(("query", "values"), [
    (OF_NODE, (50,)), (peers.LAST_SERIES, ("PETCT1",)), (peers.LAST_DELIVERY, ("PACS",)),
    (peers.OPEN_DELIVERIES, ("PACS",))], ids=["events", "series", "delivery", "open"])
def test_what_is_asked_of_years_is_answered_by_an_index(crowded_data: Path, query: str, values: tuple[object]) -> None:
    """No query of the pages of alerts and peers reads a table from one end to the other."""
    with sqlite3.connect(f"file:{Spool(crowded_data).ledger_path}?mode=ro", uri=True) as db:
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", values)]
    assert all("INDEX" in line for line in plan), plan
    assert not any(line.startswith("SCAN") and "event_of_node" not in line for line in plan), plan
