"""What a person does on a study page: retry, hold, release, urgent, cancel. Each is confirmed, and told in the history.

    GET  /studies/STUDY/act/VERB?target=...   what will happen, and the button that does it
    POST /studies/STUDY/act/VERB              does it once, and leads back to the page with what was done

The target is "job:NUMBER" or a Series Instance UID. A form carries `seen`, the newest line of the history when its page
was made: where the history went on since, nothing is done and the page says so. That makes a second click, a second tab
and a page from yesterday harmless. Who did it stands in the history as web:NAME.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Form, HTTPException, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from dicomnode import operate, views
from dicomnode.errors import NodeError, RefusedInput
from dicomnode.web.access import Operator
from dicomnode.web.site import Site, SiteNow, page
from dicomnode.web.study import seen
from dicomnode.web.words import parts_of

__all__ = ["VERBS", "router"]

router = APIRouter(include_in_schema=False)
Json = dict[str, Any]
Target = Annotated[str, Query(max_length=70)]

#: verb -> the function, the name on the button, whether it takes something away
VERBS = {
    "release": (operate.release, "Release", False),
    "retry": (operate.retry, "Retry", False),
    "urgent": (operate.urgent, "Start", False),
    "hold": (operate.hold, "Hold", False),
    "cancel": (operate.cancel, "Cancel", True),
}


@router.get("/studies/{study}/act/{verb}", response_class=HTMLResponse)
def confirm(request: Request, site: SiteNow, user: Operator, study: str, verb: str, target: Target) -> Response:
    """The question; a part of the page for its dialog, or a page of its own."""
    ask = _question(site, study, verb, target)
    template = "study_confirm.html" if request.headers.get("HX-Request") else "study_confirm_page.html"
    return page(request, template, **ask, refused="")


@router.post("/studies/{study}/act/{verb}", response_class=HTMLResponse)
def act(request: Request, site: SiteNow, user: Operator, study: str, verb: str,
        target: Annotated[str, Form(max_length=70)], last: Annotated[int, Form(alias="seen")],
        looked: Annotated[str, Form(max_length=8)] = "") -> Response:
    ask = _question(site, study, verb, target)
    study = ask["study"]  # named by its accession number too
    try:
        done = _do(site, study, verb, target, last=last, looked=bool(looked), ask=ask, actor=f"web:{user.name}")
    except NodeError as error:
        template = "study_confirm.html" if request.headers.get("HX-Request") else "study_confirm_page.html"
        status = 200 if request.headers.get("HX-Request") else 409  # htmx shows no answer of 4xx
        return page(request, template, status_code=status, **ask, refused=str(error))
    query = urlencode({"done": verb} | ({"job": done.job} if done.job else {}))
    back = f"{site.config.web.root_path}/studies/{study}?{query}"
    if request.headers.get("HX-Request"):
        return Response(status_code=204, headers={"HX-Redirect": back})
    return RedirectResponse(back, status_code=303)


def _do(site: Site, study: str, verb: str, target: str, *, last: int, looked: bool, ask: Json,
        actor: str) -> operate.Done:
    """Under one lock: see that nothing happened since the page was made, then act. Raises NodeError."""
    if ask["must_look"] and not looked:
        raise RefusedInput("nothing was done: it is not confirmed that somebody looked at why it is held. "
                           "Remedy: look, tick the box and confirm again.")
    with site.ledger.transaction():
        if seen(site.ledger, study) != last:
            newest = views.show(site.ledger, study)["events"][-1]
            raise RefusedInput(
                f"nothing was done: meanwhile this study went on ({_label(newest)}), so the page is old. "
                "Remedy: look at it as it is now, and decide again.")
        return VERBS[verb][0](site.ledger, target, now=site.clock(), actor=actor)


def _label(event: Json) -> str:
    what = f"job {event['job']}" if event["kind"] == "job" else event["kind"]
    return f"{what} is {event['to_state']}" + (f", by {event['actor']}" if event["actor"] != "node" else "")


def _question(site: Site, study: str, verb: str, target: str) -> Json:
    """What the dialog says. Raises HTTPException 404, NotFound."""
    if verb not in VERBS:
        raise HTTPException(404, f"{verb[:20]!r} is none of {', '.join(VERBS)}")
    found = views.show(site.ledger, study)
    series, job = _target(found, target)
    state = job["state"] if job and series["series_state"] != "held" else series["state"]
    reason = job["reason"] if job and series["series_state"] != "held" else series["reason"]
    may = operate.possible(site.ledger, series["series"])
    why, _ = parts_of(reason)
    return {"study": found["study"], "verb": verb, "name": VERBS[verb][1], "danger": VERBS[verb][2], "target": target,
            "job": job, "series": series, "state": state, "why": why, "what": _what(verb, series, job),
            "must_look": verb == "release" and state == "held", "seen": seen(site.ledger, found["study"]),
            "accession": found["accession_number"], "in_vain": verb not in may}


def _target(found: Json, target: str) -> tuple[Json, Json | None]:
    for series in found["series"]:
        newest = max(series["jobs"], key=lambda one: one["job"], default=None)
        if target == series["series"] or (newest and target == f"job:{newest['job']}"):
            return series, newest
    raise HTTPException(404, f"{target!r} is neither a series of this study nor its newest job. "
                             "Remedy: load the study again.")


def _what(verb: str, series: Json, job: Json | None) -> list[str]:
    """What will happen, a sentence each."""
    own = job is not None and series["series_state"] not in ("held", "receiving", "waiting", "complete")
    peers = ", ".join(one["peer"] for one in job["deliveries"]) if job else ""
    dead = ", ".join(one["peer"] for one in job["deliveries"] if one["state"] == "dead") if job else ""
    if verb == "retry":
        if own and job and dead and job["derived_series"]:
            return [f"The derived series is sent to {dead} again.", "Nothing is computed again."]
        return (["The job is queued again, with its attempts reset.", "It runs when its window is open."] if own else
                ["The series is looked at again, as if it had just come in."])
    if verb == "release":
        if not own:
            return ["The series is processed as it is, in spite of what held it.",
                    "Objects with other bytes under a known UID stay unused."]
        if job and not job["derived_series"]:
            return ["The job goes on where it was held."]
        return [f"The derived series is sent as it is{f' to {peers}' if peers else ''}.",
                "Your name stands in the history beside the reason."]
    if verb == "urgent":
        return ["The job starts as soon as a device is free: before all others, and outside the windows too."]
    if verb == "hold":
        what = "The job stops" if own else "The series stops"
        return [f"{what} here and waits for a person.", "Nothing is lost. Release or retry lets it go on."]
    if not own:
        return ["The series is ignored from now on.",
                "Its files stay as long as [retention] says. Retry takes it up again."]
    return ["The job is given up: nothing (more) is computed or sent.",
            "What a peer already has stays there. Retry takes it up again."]
