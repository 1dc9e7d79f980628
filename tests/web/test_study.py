"""The study page: everything about one study in words, whatever state it is in."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from pydicom import dcmread

from dicomnode import pipeline, views, wording
from dicomnode.config import parse
from dicomnode.web import plots, story, study
from dicomnode.web.access import operator_token
from dicomnode.web.app import create
from tests.web.nodes import Furnished


def text_of(client: TestClient, node: Furnished, state: str) -> str:
    answer = client.get(f"/studies/{node.studies[state]}")
    assert answer.status_code == 200, answer.text
    return answer.text


@pytest.mark.parametrize("state", ["delivered", "held", "failed", "queued", "running", "waiting", "ignored"])
def test_every_state_has_a_page(client, node, state):
    """With its state as a badge, where it came from, and the history."""
    page = text_of(client, node, state)
    assert f'data-state="{state}"' in page and "received" in page and "History" in page
    assert node.studies[state] in page


def test_a_held_study_says_why_and_what_to_do(client, node):
    """In 20 seconds: the reason, the remedy, the buttons that do something."""
    page = text_of(client, node, "held")
    assert "Why it is held:" in page and "kernel-maximum 0.31" in page
    assert "What to do:" in page and "Try another preset, method or setting" in page
    assert "act/retry?" in page and "act/cancel?" in page
    assert "act/release?" not in page  # nothing was built that could be sent


@pytest.mark.parametrize(("state", "verbs"), [
    ("delivered", set()), ("queued", {"urgent", "hold", "cancel"}), ("running", {"hold", "cancel"}),
    ("failed", {"retry", "urgent", "hold", "cancel"}), ("waiting", {"urgent", "hold", "cancel"}), ("ignored", set())])
def test_only_actions_that_would_not_be_refused_are_offered(client, node, state, verbs):
    """No button in vain."""
    page = text_of(client, node, state)
    assert {verb for verb in ("release", "retry", "urgent", "hold", "cancel") if f"/act/{verb}?" in page} == verbs


def test_a_delivered_study_shows_the_whole_result(client, node):
    """Pictures, kernel, uptake, gates in words, checks, deliveries with counts, settings."""
    page = text_of(client, node, "delivered")
    for part in ("/mip/before/coronal.png", "/turn/after/0.png", "/kernel/d.png", "full width at half maximum",
                 "SUVmax", "Region 1", "Change of the total activity", "all 11 passed", "checks passed", "32 of 32",
                 "ARCHIVE", "Settings, device and times", "Uncertainty of what the projection shows", "data-place="):
        assert part in page, part
    assert "by <b>PETCT1</b>" in page  # who


def test_changes_of_uptake_are_those_of_the_report(client, app, node):
    """The table's percent is after over before of the same region."""
    page = text_of(client, node, "delivered")
    one = app.state.site.ledger.job(node.job)["report"]["looks"]["regions"][0]
    for kind in ("max", "mean", "peak"):
        assert f"{one['before'][kind]:.2f}" in page and f"{one['after'][kind]:.2f}" in page
        assert f"{100 * (one['after'][kind] / one['before'][kind] - 1):+.1f} %" in page


def test_kernel_and_psf_are_told_apart(client, app, node):
    """The width of the kernel that is kept, and the method's own figure, each with what it is; the report and the page
    say the same."""
    page = text_of(client, node, "delivered")
    report = app.state.site.ledger.job(node.job)["report"]
    kernel, found = wording.widths(report["looks"]["kernel"]["fwhm_mm"]), wording.psf(report["metrics"])
    assert f"Kernel FWHM (full width at half maximum, on the PET’s voxels): <b>{kernel}</b>" in page
    assert found and f": {found}." in page and kernel != found
    paper = client.get(f"/studies/{node.studies['delivered']}/report.html").text
    assert kernel in paper and found in paper


def test_an_accession_number_leads_to_its_study(client, node):
    """So do the UIDs of a series and of a derived series, to the job in question."""
    to = client.get("/studies/ACC11")
    assert to.status_code == 303 and to.headers["Location"] == f"/studies/{node.studies['held']}"
    to = client.get(f"/studies/{node.series['delivered']}")
    assert to.headers["Location"] == f"/studies/{node.studies['delivered']}?job={node.job}"


def test_a_study_that_is_not_there_says_so(client):
    """404 with a remedy."""
    answer = client.get("/studies/1.2.3", headers={"Accept": "text/html"})
    assert answer.status_code == 404 and "nothing in the ledger" in answer.text.lower()


def test_nothing_of_the_page_breaks_a_strict_policy(client, node):
    """No inline script, no style attribute, nothing from elsewhere."""
    page = text_of(client, node, "delivered")
    assert " style=" not in page and "onclick" not in page and "<style" not in page
    assert all("src=" in piece.split(">")[0] for piece in page.split("<script")[1:])


def test_names_are_shown_only_where_configured(client, node):
    """No patient name on the page; with show_names the one in the file's header."""
    files = (node.folder / "data" / "objects" / node.studies["delivered"]).rglob("*.dcm")
    name = str(dcmread(next(files)).PatientName).replace("^", " ")
    assert name and name not in text_of(client, node, "delivered")
    config = parse(node.toml + "\n[web]\nshow_names = true\n")
    application = create(config, clock=lambda: node.now)
    shown = TestClient(application, base_url="http://127.0.0.1",
                       headers={"Authorization": f"Bearer {operator_token(config)}"})
    page = shown.get(f"/studies/{node.studies['delivered']}").text
    application.state.site.ledger.close()
    assert 'class="patient"' in page and name in page


def test_who_may_look_sees_no_actions(node, tmp_path):
    """The viewers' token opens the page, and not one button."""
    token = tmp_path / "viewer.token"
    token.write_text("look-and-do-not-touch-1234")
    token.chmod(0o600)
    config = parse(node.toml + f'\n[web]\nviewer_token_file = "{token}"\n')
    application = create(config, clock=lambda: node.now)
    client = TestClient(application, base_url="http://127.0.0.1",
                        headers={"Authorization": "Bearer look-and-do-not-touch-1234"})
    page = client.get(f"/studies/{node.studies['held']}")
    refused = client.get(f"/studies/{node.studies['held']}/act/retry?target=job:2")
    application.state.site.ledger.close()
    assert page.status_code == 200 and "/act/" not in page.text
    assert refused.status_code == 403


def test_a_running_job_follows_by_itself(client, app, node):
    """The fragment tells stage, share and time left; when the state changes, the whole study takes its place; at the
    end nothing asks any more."""
    uid = node.studies["running"]
    job = app.state.site.ledger.jobs_of_series(node.series["running"])[-1]
    page = text_of(client, node, "running")
    address = page.split('id="live" hx-get="')[1].split('"')[0].replace("&amp;", "&")
    assert "every 2s" in page
    same = client.get(address)
    assert "step 120 of 400" in same.text and "left" in same.text and "HX-Retarget" not in same.headers
    app.state.site.ledger.set_job(job["id"], "cancelled", now=node.now, reason="enough", actor="web:anna")
    changed = client.get(address)
    assert changed.headers["HX-Retarget"] == "#study" and 'data-state="cancelled"' in changed.text
    assert "The study is now cancelled" in changed.text and "every " not in changed.text
    assert uid in changed.text


def test_the_time_left_is_told_by_what_such_jobs_took():
    """From measured durations where there are any, else from the stage's pace, else not at all."""
    job = {"progress": {"stage": "main", "step": 100, "steps": 400}}
    assert story.progress_of(job, 600.0, 200.0)["left_s"] == 400.0
    assert story.progress_of(job, None, 200.0)["left_s"] == 600.0
    assert story.progress_of({"progress": None}, None, 5.0)["left_s"] is None
    assert story.progress_of(job, 100.0, 200.0)["late"]


def test_what_repeats_is_one_line_of_the_history():
    """Retries in a row, also in turns, are folded with their number and both times."""
    event = {"at": "2026-01-01T00:00:00Z", "kind": "job", "series": "1", "job": 4, "from_state": "running",
             "to_state": "failed", "code": "", "reason": "no room. Remedy: free some.", "actor": "node"}
    events = []
    for minute in range(5):
        events.append(event | {"at": f"2026-01-01T00:{minute:02}:00Z"})
        events.append(event | {"at": f"2026-01-01T00:{minute:02}:30Z", "from_state": "failed", "to_state": "running",
                               "reason": ""})
    steps = story.timeline(events, {})
    assert [(step.state, step.times) for step in steps] == [("running", 5), ("failed", 5)]
    assert steps[1].remedy == "free some." and steps[1].at.endswith("00:00Z") and steps[1].last.endswith("04:00Z")


def test_gates_are_said_in_words_and_shut_ones_come_first():
    """Percent, mm and times as people read them; a number that is none is said to be none."""
    rows = story.gate_rows([{"name": "activity", "ok": True, "measured": 0.0012, "limit": 0.005},
                            {"name": "kernel-width", "ok": False, "measured": 12.3, "limit": 11.4},
                            {"name": "maximum", "ok": False, "measured": None, "limit": 3.0}])
    assert [row["name"] for row in rows] == ["kernel-width", "maximum", "activity"]
    assert rows[0]["measured"] == "12.3 mm" and rows[2]["limit"] == "0.5 %" and rows[1]["measured"] == "not a number"


def test_every_gate_of_a_real_report_has_words(app, node):
    """What the pipeline measures is explained on the page."""
    for gate in app.state.site.ledger.job(node.job)["report"]["gates"]:
        assert gate["name"] in wording.GATES


def test_a_job_without_pictures_says_so(client, node):
    """Built before there were any: the slices are still there, and what makes the pictures is named."""
    (node.folder / "data" / "derived" / str(node.job) / "looks.npz").unlink()
    page = text_of(client, node, "delivered")
    assert "There are no pictures" in page and "/viewer" in page and "/mip/" not in page


def test_a_purged_job_keeps_its_figures(client, app, node):
    """No picture, no slice; gates, deliveries and history stay."""
    shutil.rmtree(node.folder / "data" / "derived" / str(node.job))
    app.state.site.ledger.query("UPDATE job SET purged_at = 1 WHERE id = ?", (node.job,))
    page = text_of(client, node, "delivered")
    assert "removed after delivery" in page and "/jobs/1/viewer" not in page and "Change of the total activity" in page


def test_the_kernel_is_read_where_the_pipeline_wrote_it():
    """This process does not load the pipeline, but knows the name of its file."""
    assert study.KERNEL_FILE == pipeline.KERNEL_FILE


def test_plots_tell_lines_apart_without_colour():
    """Each line has its name beside it and a class that dashes it; numbers and units stand at the axes."""
    svg = plots.line_plot([plots.Line("before", "before", [0, 5, 10], [1, 8, 2]),
                           plots.Line("after", "after", [0, 5, 10], [0, 12, 1])],
                          x_label="mm", y_label="SUVbw", title="Profile <1>")
    assert svg.count("<polyline") == 2 and ">before<" in svg and ">after<" in svg and ">SUVbw<" in svg
    assert "Profile &lt;1&gt;" in svg and "style=" not in svg
    with pytest.raises(ValueError, match="no points"):
        plots.line_plot([], x_label="", y_label="", title="nothing")


def test_hostile_text_stays_text(client, app, node):
    """What a header holds is shown, never run."""
    app.state.site.ledger.query("UPDATE series SET series_description = '<script>alert(1)</script>' "
                                "WHERE series_uid = ?", (node.series["held"],))
    page = text_of(client, node, "held")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_a_page_of_thousands_of_studies_is_as_quick(crowded_data, node):
    """Among 10,000 studies the page is made in well under 200 ms."""
    toml = node.toml.replace(str(node.folder / "data"), str(crowded_data))
    config = parse(toml)
    application = create(config, clock=lambda: node.now)
    client = TestClient(application, base_url="http://127.0.0.1",
                        headers={"Authorization": f"Bearer {operator_token(config)}"})
    ledger = application.state.site.ledger
    waiting = ledger.query("SELECT study_uid FROM job WHERE state = 'queued' LIMIT 1")[0]["study_uid"]
    for uid in (views.jobs(ledger, limit=4000)[-1]["study"], waiting):  # the second has a forecast
        took = []
        for _ in range(4):
            begin = time.perf_counter()
            assert client.get(f"/studies/{uid}").status_code == 200
            took.append(time.perf_counter() - begin)
        assert min(took) < 0.2, took
    ledger.close()


def test_a_delivery_counts_what_its_route_still_sends(node, client):
    """A companion whose word was taken out of `also` is not waited for, and says so; what was sent stays counted."""
    app = client.app
    site, made = app.state.site, {"kind": "kernel", "of": "kernel", "series_uid": "2.25.77", "series_number": 1003,
                                  "description": "NBD kernel", "modality": "OT", "instances": 1, "files": {"k": "0"}}
    site.ledger.query("UPDATE job SET report = json_set(report, '$.also', json(?)) WHERE id = ?",
                      (json.dumps({"wanted": ["kernel"], "series": [made], "left_out": {}}), node.job))
    objects = site.ledger.job(node.job)["derived_instances"]
    page = text_of(client, node, "delivered")
    assert f"{objects} of {objects}<" in page and "not sent (any more)" in page
    app.state.site = replace(site, config=parse(node.toml.replace("also = []", 'also = ["kernel"]')))
    page = text_of(client, node, "delivered")
    assert f"{objects} of {objects + 1}<" in page and "not sent (any more)" not in page


def test_a_ct_that_was_chosen_is_not_said_not_to_be(client, node):
    """A preset that does not look at it says so; the history and the table of series name the CT."""
    page = text_of(client, node, "delivered")
    assert "Chosen as guide." in page and "this preset does not look at it" in page and "no CT was chosen" not in page


def test_an_accession_number_of_several_studies_leads_to_all_of_them(client, node):
    """A link made of an accession number is never a dead end: the list shows them with their states."""
    client.app.state.site.ledger.query("UPDATE series SET accession_number = 'A 1&2' WHERE series_uid IN (?, ?)",
                                       (node.series["held"], node.series["waiting"]))
    answer = client.get("/studies/A%201%262")
    assert answer.status_code == 303
    listed = client.get(answer.headers["location"]).text
    assert node.studies["held"] in listed and node.studies["waiting"] in listed
