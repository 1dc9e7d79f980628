"""The REST API: the same as the pages, for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dicomnode import reconcile, views, workers
from dicomnode.config import parse
from dicomnode.web.access import COOKIE
from dicomnode.web.app import create
from tests.web.nodes import Furnished

V1 = "/api/v1"


def test_the_status_is_that_of_the_command_line(client: TestClient, app: FastAPI) -> None:
    """And says who answers."""
    found = client.get(f"{V1}/status").json()
    told = views.status(app.state.site.ledger, free_bytes=found["free_bytes"], now=app.state.site.clock())
    assert found == {"ae_title": "NBDNODE", "version": found["version"], **told}
    assert [one["state"] for one in found["held"]] == ["held"]


def test_every_state_of_the_furnished_node_is_found(client: TestClient, node: Furnished) -> None:
    """By state, by UID, by accession number, by day; newest first, page by page."""
    for state in ("delivered", "held", "failed", "running", "queued", "waiting", "ignored"):
        (found,) = client.get(f"{V1}/studies", params={"state": state}).json()["studies"]
        assert found["study"] == node.studies[state] and found["series"] == node.series[state]
        assert found["reason"] or state in ("delivered", "running", "queued")
    by_uid = client.get(f"{V1}/studies", params={"q": node.series["held"]}).json()["studies"]
    assert [one["accession_number"] for one in by_uid] == ["ACC11"]
    assert len(client.get(f"{V1}/studies", params={"q": "ACC"}).json()["studies"]) >= 6
    assert len(client.get(f"{V1}/studies", params={"first": "2026-09-23", "last": "2026-09-23"}).json()["studies"]) == 7
    seen, before = [], None
    while True:
        answer = client.get(f"{V1}/studies", params={"limit": 3} | ({"before": before} if before else {})).json()
        seen += [one["study"] for one in answer["studies"]]
        before = answer["next"]
        if before is None:
            break
    assert len(seen) == 7 and set(seen) == set(node.studies.values())


def test_a_study_is_shown_whole(client: TestClient, node: Furnished, app: FastAPI) -> None:
    """Series, jobs with deliveries, and history; by UID or accession number."""
    found = client.get(f"{V1}/studies/{node.studies['delivered']}").json()
    told = views.show(app.state.site.ledger, node.studies["delivered"])
    assert found["events"] == told["events"] and len(found["series"]) == len(told["series"]) == 2
    job = next(job for series in found["series"] for job in series["jobs"])
    assert job["job"] == node.job and {one["peer"] for one in job["deliveries"]} == {"PACS", "ARCHIVE"}
    assert client.get(f"{V1}/jobs/{node.job}").json() == job
    assert client.get(f"{V1}/studies/ACC11").json()["study"] == node.studies["held"]


def test_a_report_is_there_once_something_is_built(client: TestClient, node: Furnished) -> None:
    """Before, it is not found, with the remedy."""
    found = client.get(f"{V1}/jobs/{node.job}/report").json()
    assert found["gates"] and found["metrics"] and found["method"] == "nbd"
    held = client.get(f"{V1}/studies", params={"state": "queued"}).json()["studies"][0]["job"]
    answer = client.get(f"{V1}/jobs/{held}/report")
    assert answer.status_code == 404 and answer.json()["remedy"]


def test_what_is_no_number_in_json_is_null(client: TestClient, app: FastAPI, node: Furnished) -> None:
    """A report with NaN is readable by every program."""
    app.state.site.ledger.query("UPDATE job SET report = ? WHERE id = ?", ('{"x": [NaN, 1], "y": Infinity}', node.job))
    assert client.get(f"{V1}/jobs/{node.job}/report").json() == {"x": [None, 1], "y": None}


def test_a_decision_is_made_and_the_history_says_by_whom(client: TestClient, node: Furnished) -> None:
    """By job or by study; what is no decision to take is refused with words, and changes nothing."""
    found = client.get(f"{V1}/studies", params={"state": "failed"}).json()["studies"][0]
    answer = client.post(f"{V1}/jobs/{found['job']}/retry")
    assert answer.status_code == 200 and answer.json()["state"] == "queued"
    answer = client.post(f"{V1}/studies/{node.studies['queued']}/urgent")
    assert answer.status_code == 200 and answer.json()["text"]
    event = client.get(f"{V1}/events", params={"study": node.studies["failed"]}).json()["events"][0]
    assert (event["to_state"], event["actor"]) == ("queued", "web:operator")
    answer = client.post(f"{V1}/jobs/{node.job}/release")
    assert answer.status_code == 409 and "nothing to release" in answer.json()["detail"]
    assert client.post(f"{V1}/studies/1.2.3/hold").status_code == 404
    assert client.post(f"{V1}/jobs/1/explode").status_code == 422


def test_history_goes_back_page_by_page(client: TestClient, app: FastAPI) -> None:
    """Newest first, without a gap, of one kind if wanted."""
    everything = [views._event(dict(row)) for row in reversed(app.state.site.ledger.events())]
    seen, before = [], None
    while True:
        answer = client.get(f"{V1}/events", params={"limit": 10} | ({"before": before} if before else {})).json()
        seen += answer["events"]
        before = answer["next"]
        if before is None:
            break
    assert seen == everything
    only = client.get(f"{V1}/events", params={"kind": "delivery"}).json()["events"]
    assert only == [event for event in everything if event["kind"] == "delivery"]


def test_peers_are_shown_without_secrets(client: TestClient) -> None:
    """And with what is on its way to them."""
    found = {peer["name"]: peer for peer in client.get(f"{V1}/peers").json()["peers"]}
    assert found["PACS"]["routes"] == ["psma"] and found["PACS"]["deliveries"] == {"delivered": 1}
    assert not any("file" in key or "token" in key or "sha" in key for peer in found.values() for key in peer)


def test_what_is_wrong_is_said_with_the_remedy(client: TestClient) -> None:
    """The furnished node has a study that is held."""
    found = client.get(f"{V1}/alerts").json()["alerts"]
    assert any("Remedy" in one["text"] or "remedy" in one["text"] for one in found)
    assert client.get(f"{V1}/forecast").json()["devices"]


def test_the_reports_of_the_nights_are_handed_out(client: TestClient, app: FastAPI) -> None:
    """As they were written; one that cannot be read is said to be so, and spoils no list."""
    site = app.state.site
    day = reconcile.local_day(site.config, site.clock())
    report = reconcile.report(site.ledger, site.config, day=day, now=site.clock())
    reconcile.write(report, site.spool.data_dir)
    (site.spool.data_dir / "reports" / "2026-09-01.json").write_text('{"day": 1}')
    found = client.get(f"{V1}/nights").json()["nights"]
    assert [(one["day"], one["problem"]) for one in found] == [(day.isoformat(), ""),
                                                              ("2026-09-01", "ValidationError")]
    assert client.get(f"{V1}/nights/{day}").json() == json.loads(json.dumps(report.as_json()))
    assert client.get(f"{V1}/nights/2026-09-01").status_code == 404
    assert client.get(f"{V1}/nights/2020-01-01").status_code == 404
    assert client.get(f"{V1}/nights/17").status_code == 422
    assert client.get(f"{V1}/nights/..%2Fledger").status_code in (404, 422)


@pytest.mark.parametrize("path", ["/status", "/forecast", "/studies", "/studies/1", "/jobs/1", "/jobs/1/report",
                                  "/events", "/alerts", "/peers", "/nights", "/nights/2026-09-23"])
def test_nothing_is_told_to_strangers(app: FastAPI, path: str) -> None:
    """401 as problem+json, also for what is not there."""
    answer = TestClient(app, base_url="http://127.0.0.1").get(V1 + path)
    assert answer.status_code == 401 and answer.headers["Content-Type"] == "application/problem+json"


def test_a_session_of_a_browser_needs_the_secret_here_too(app: FastAPI, client: TestClient, node: Furnished) -> None:
    """The API is no way around the protection of the pages."""
    cookie = app.state.door.sessions.begin("anna", may_act=True)
    browser = TestClient(app, base_url="http://127.0.0.1", cookies={COOKIE: cookie})
    assert browser.get(f"{V1}/status").status_code == 200
    assert browser.post(f"{V1}/studies/{node.studies['queued']}/hold").status_code == 403
    secret = app.state.door.sessions.csrf(app.state.door.sessions.read(cookie).id)
    answer = browser.post(f"{V1}/studies/{node.studies['queued']}/hold", headers={"X-CSRF-Token": secret})
    assert answer.status_code == 200
    assert client.get(f"{V1}/events").json()["events"][0]["actor"] == "web:anna"


def test_readiness_is_told_to_all_and_its_reasons_to_those_who_may_look(app: FastAPI, client: TestClient,
                                                                        node: Furnished) -> None:
    """Nobody works: 503. A worker with a fresh heartbeat: ready; one that is silent: not."""
    stranger = TestClient(app, base_url="http://127.0.0.1")
    assert stranger.get("/healthz").json() == {"status": "alive"}
    answer = stranger.get("/readyz")
    assert answer.status_code == 503 and answer.json() == {"status": "not ready", "reasons": None}
    assert any("no worker" in reason for reason in client.get("/readyz").json()["reasons"])
    assert stranger.get("/readyz", headers={"Authorization": "Bearer guess"}).status_code == 401
    workers.enter(app.state.site.ledger, "here:1:cpu", device="cpu", now=node.now)
    if shutil.disk_usage(node.folder).free > 3 * 2**30:
        assert stranger.get("/readyz").status_code == 200
    workers.beat(app.state.site.ledger, [workers.Beat("here:1:cpu", node.now - 1000, None)])
    assert any("not heard" in reason for reason in client.get("/readyz").json()["reasons"])
    node.folder.rename(node.folder.with_name("unmounted"))
    assert "data directory" in client.get("/readyz").json()["reasons"][-1], "status 503, no error of ours"
    node.folder.with_name("unmounted").rename(node.folder)
    app.state.site.ledger.close()
    assert stranger.get("/readyz").status_code == 503 and stranger.get("/healthz").status_code == 200


def test_openapi_says_all_of_it_and_the_page_shows_it(app: FastAPI, client: TestClient) -> None:
    """Every operation has a sentence, its errors and a way to show who asks; the page needs nothing from elsewhere."""
    schema = client.get("/api/openapi.json").json()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            if path.startswith(V1):
                assert operation["security"] and {"200", "401", "503"} <= operation["responses"].keys(), path
    assert not any(path.startswith(("/studies", "/login", "/static")) for path in schema["paths"])
    text = client.get("/api/docs").text
    assert all(path in text for path in schema["paths"]) and "https://" not in text
    assert TestClient(app, base_url="http://127.0.0.1", follow_redirects=False).get("/api/docs").status_code == 401


def test_under_a_prefix_openapi_names_it(tmp_path: Path) -> None:
    """Programs made from it call the right addresses."""
    app = create(parse(f'[node]\ndata_dir = "{tmp_path}"\n[web]\nroot_path = "/nbd"\n'))
    assert app.openapi()["servers"] == [{"url": "/nbd"}]
    app.state.site.ledger.close()
