"""Actions of the study page: asked before, done once, told in the history under the user's name."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient

from dicomnode.errors import RefusedInput
from dicomnode.operate import possible
from dicomnode.web.actions import VERBS
from tests.web.nodes import Furnished


def ask(client, node: Furnished, state: str, verb: str, target: str | None = None):
    target = target or f"job:{job_of(client, node, state)}"
    return client.get(f"/studies/{node.studies[state]}/act/{verb}?target={target}", headers={"Accept": "text/html"})


def job_of(client, node: Furnished, state: str) -> int:
    return client.app.state.site.ledger.jobs_of_series(node.series[state])[-1]["id"]


def form(answer) -> dict[str, str]:
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', answer.text))


def do(client, node: Furnished, state: str, verb: str, fields: dict[str, str], **headers: str):
    return client.post(f"/studies/{node.studies[state]}/act/{verb}", data=fields,
                       headers={"Accept": "text/html"} | headers)


def events(client, node: Furnished, state: str):
    return client.app.state.site.ledger.events(study_uid=node.studies[state])


@pytest.mark.parametrize(("state", "verb", "becomes"), [
    ("held", "retry", "queued"), ("held", "cancel", "cancelled"), ("queued", "hold", "held"),
    ("running", "cancel", "cancelled"), ("failed", "retry", "queued")])
def test_an_action_is_confirmed_done_and_told(client, node, state, verb, becomes):
    """The question says what will happen; then it happens, and the history has the user's name."""
    question = ask(client, node, state, verb)
    assert question.status_code == 200 and "Do nothing" in question.text
    answer = do(client, node, state, verb, form(question))
    assert answer.status_code == 303 and f"done={verb}" in answer.headers["Location"]
    assert client.app.state.site.ledger.job(job_of(client, node, state))["state"] == becomes
    assert events(client, node, state)[-1]["actor"] == "web:operator"
    page = client.get(answer.headers["Location"], headers={"Accept": "text/html"})
    assert 'class="done card" role="status"' in page.text and "web:operator" in page.text


@pytest.mark.parametrize("state", ["delivered", "held", "failed", "queued", "running", "waiting", "ignored"])
def test_what_is_offered_is_what_is_not_refused(client, node, state):
    """For every state and verb: `possible` names it, or operate refuses it."""
    ledger = client.app.state.site.ledger
    series = node.series[state]
    for verb, (act, _, _) in VERBS.items():
        try:
            with ledger.transaction():
                act(ledger, series, now=node.now, actor="test")
                raise InterruptedError  # nothing of it stays
        except RefusedInput:
            refused = True
        except InterruptedError:
            refused = False
        assert (verb in possible(ledger, series)) is not refused, verb


def test_an_accession_number_names_the_study_here_too(client, node):
    """A question reached by it leads to the study itself, and acts."""
    target = f"job:{job_of(client, node, 'held')}"
    question = client.get(f"/studies/ACC11/act/retry?target={target}")
    assert f'action="/studies/{node.studies["held"]}/act/retry"' in question.text
    answer = client.post("/studies/ACC11/act/retry", data=form(question))
    assert answer.headers["Location"].startswith(f"/studies/{node.studies['held']}?")


def test_asking_changes_nothing(client, node):
    """To look at the question is safe."""
    before = len(events(client, node, "held"))
    ask(client, node, "held", "retry")
    assert len(events(client, node, "held")) == before


def test_a_second_click_does_nothing(client, node):
    """The same form sent twice acts once; the second answer says what happened."""
    fields = form(ask(client, node, "queued", "urgent"))
    assert do(client, node, "queued", "urgent", fields).status_code == 303
    count = len(events(client, node, "queued"))
    second = do(client, node, "queued", "urgent", fields)
    assert second.status_code == 409 and "nothing was done" in second.text.lower()
    assert len(events(client, node, "queued")) == count


def test_a_page_of_yesterday_does_not_act(client, node):
    """What changed meanwhile is told, with who did it."""
    fields = form(ask(client, node, "running", "hold"))
    site = client.app.state.site
    site.ledger.set_job(job_of(client, node, "running"), "cancelled", now=node.now, reason="", actor="anna")
    late = do(client, node, "running", "hold", fields)
    assert late.status_code == 409 and "is cancelled, by anna" in late.text and "decide again" in late.text
    assert site.ledger.job(job_of(client, node, "running"))["state"] == "cancelled"


def test_operate_has_the_last_word(client, node):
    """A form for what cannot be done is refused in its words."""
    fields = form(ask(client, node, "queued", "hold"))
    refused = do(client, node, "queued", "retry", fields)
    assert refused.status_code == 409 and "nothing to retry" in refused.text.lower()


def test_a_release_wants_somebody_to_have_looked(client, node):
    """Why it was held stands in the question; without the tick nothing is sent."""
    site = client.app.state.site
    site.ledger.set_job(node.job, "held", now=node.now, code="gate", reason="too sharp. Remedy: look at it")
    question = ask(client, node, "delivered", "release")
    assert "too sharp" in question.text and "I looked at why it is held" in question.text
    assert "PACS" in question.text and "ARCHIVE" in question.text
    fields = form(question)
    refused = do(client, node, "delivered", "release", fields)
    assert refused.status_code == 409 and "not confirmed" in refused.text
    assert site.ledger.job(node.job)["state"] == "held"
    assert do(client, node, "delivered", "release", fields | {"looked": "yes"}).status_code == 303
    assert site.ledger.job(node.job)["state"] != "held"
    told = [event for event in events(client, node, "delivered") if event["actor"] == "web:operator"]
    assert "released although: too sharp" in told[0]["reason"]


def test_a_series_without_a_job_can_be_given_up(client, node):
    """The target is then the series."""
    question = ask(client, node, "waiting", "cancel", node.series["waiting"])
    assert "ignored from now on" in question.text
    assert do(client, node, "waiting", "cancel", form(question)).status_code == 303
    assert client.app.state.site.ledger.series(node.series["waiting"])["state"] == "ignored"


def test_a_dialog_gets_its_answers_in_place(client, node):
    """For htmx: the question alone; a refusal in the dialog; a success leads the whole window to the study."""
    uid, target = node.studies["held"], f"job:{job_of(client, node, 'held')}"
    question = client.get(f"/studies/{uid}/act/retry?target={target}", headers={"HX-Request": "true"})
    assert "<html" not in question.text and "<form" in question.text
    stale = do(client, node, "held", "retry", form(question) | {"seen": "1"}, **{"HX-Request": "true"})
    assert stale.status_code == 200 and "nothing was done" in stale.text.lower() and "<html" not in stale.text
    done = do(client, node, "held", "retry", form(question), **{"HX-Request": "true"})
    assert done.status_code == 204 and done.headers["HX-Redirect"].startswith(f"/studies/{uid}?done=retry")


@pytest.mark.parametrize(("verb", "target"), [("explode", "job:2"), ("retry", "job:1"), ("retry", "1.2.3"),
                                              ("retry", "")])
def test_what_is_no_action_of_this_study_is_not_found(client, node, verb, target):
    """An unknown verb, a job of another study."""
    answer = client.get(f"/studies/{node.studies['held']}/act/{verb}", params={"target": target})
    assert answer.status_code == 404


def test_a_form_without_its_fields_is_refused(client, node):
    """422, nothing done."""
    assert do(client, node, "held", "retry", {"target": "job:2"}).status_code == 422


def test_another_sites_page_cannot_act(client, app, node):
    """A browser's session needs the secret of our own page besides its cookie."""
    browser = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
    token = client.headers["Authorization"].removeprefix("Bearer ")
    assert browser.post("/login", data={"token": token}).status_code == 303
    fields = form(ask(browser, node, "held", "retry"))
    assert fields["csrf"]
    foreign = do(browser, node, "held", "retry", fields | {"csrf": "guessed"})
    assert foreign.status_code == 403
    assert app.state.site.ledger.job(job_of(client, node, "held"))["state"] == "held"
    assert do(browser, node, "held", "retry", fields).status_code == 303
