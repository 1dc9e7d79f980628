"""The REST API: the same as the pages, for programs. OpenAPI at /api/openapi.json, for people at /api/docs."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict
from datetime import date
from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic import BeforeValidator, ValidationError

from dicomnode import __version__, machine, operate, reconcile, search, troubles, views
from dicomnode import alerts as alerting
from dicomnode.errors import NotFound
from dicomnode.forecast import forecast
from dicomnode.views import timestamp
from dicomnode.web import models
from dicomnode.web.access import Operator, Viewer
from dicomnode.web.problems import PROBLEM_JSON, Problem
from dicomnode.web.site import Site, SiteNow, page

__all__ = ["describe", "docs", "router"]

WORDS = {401: "Who asks is not known.", 403: "Whoever asks may look, not act; or the request comes from elsewhere.",
         404: "There is no such thing.", 409: "The state of things does not allow it.",
         422: "The request is not understood.", 429: "Too many wrong tokens came from this address.",
         503: "The ledger is locked or damaged."}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": WORDS[status], "content": content} for status in (401, 429, 503, *statuses)}


class Kind(StrEnum):
    """What a line of history is about."""

    series = "series"
    job = "job"
    delivery = "delivery"
    psf = "psf"
    reception = "reception"
    security = "security"
    source = "source"
    node = "node"


class Verb(StrEnum):
    """What a person may decide."""

    retry = "retry"
    hold = "hold"
    release = "release"
    cancel = "cancel"
    urgent = "urgent"


State = StrEnum("State", {name: name for name in search.STATES})  # type: ignore[misc]
State.__doc__ = "The states of a series or job."
StudyName = Annotated[str, Path(min_length=1, max_length=64, description="Study, series or derived series UID, or an "
                                "accession number that belongs to one study")]
JobNumber = Annotated[int, Path(ge=1, le=2**53)]
Day = Annotated[date, BeforeValidator(lambda value: _iso(value))]
Limit = Annotated[int, Query(ge=1, le=search.LARGEST)]

router = APIRouter(prefix="/api/v1")
docs = APIRouter(include_in_schema=False)


@router.get("/status", tags=["Node"], responses=_problems())
def status(site: SiteNow, user: Viewer) -> models.Status:
    """The node at a glance: counts by state, workers, what runs, what waits for a person, the disk."""
    found = views.status(site.ledger, free_bytes=shutil.disk_usage(site.spool.data_dir).free, now=site.clock())
    return models.Status.model_validate({"ae_title": site.config.node.ae_title, "version": __version__, **found})


@router.get("/forecast", tags=["Node"], responses=_problems())
def tonight(site: SiteNow, user: Viewer) -> models.Forecast:
    """When each waiting job starts and ends, by how long such jobs took here."""
    return models.Forecast.model_validate(forecast(site.ledger, site.config, now=site.clock()))


@router.get("/studies", tags=["Studies"], responses=_problems(409, 422))
def studies(
    site: SiteNow, user: Viewer,
    q: Annotated[str, Query(max_length=64, description="how a UID or accession number begins, or job:12")] = "",
    state: Annotated[State | None, Query(description="of the series that stands for the study")] = None,
    first: Annotated[Day | None, Query(description="day of arrival in schedule.timezone, or later")] = None,
    last: Annotated[Day | None, Query(description="day of arrival in schedule.timezone, or earlier")] = None,
    limit: Limit = 50,
    before: Annotated[str | None, Query(max_length=100, description="`next` of the page before")] = None,
) -> models.Studies:
    """Studies that fit, newest first, page by page."""
    found = search.studies(site.ledger, text=q, state=state.value if state else "", first=first, last=last, limit=limit,
                           before=before, timezone=site.config.schedule.timezone)
    return models.Studies(studies=[_summary(row) for row in found.rows], next=found.next)


def _iso(value: Any) -> Any:
    """Nothing but YYYY-MM-DD: pydantic alone would take a number for seconds since 1970."""
    if isinstance(value, str) and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", value, re.ASCII):
        raise ValueError("a day is written as 2026-09-23")
    return value


def _summary(row: search.StudyRow) -> models.StudySummary:
    values = asdict(row)
    values["last_received_at"] = values.pop("last_at")
    for key in ("received_at", "last_received_at", "until", "finished_at"):
        values[key] = timestamp(values[key])
    return models.StudySummary.model_validate(values)


@router.get("/studies/{study}", tags=["Studies"], responses=_problems(404, 409, 422))
def study(site: SiteNow, user: Viewer, study: StudyName) -> models.Study:
    """Everything about one study: series, jobs, deliveries, history."""
    found = views.show(site.ledger, study)
    for series in found["series"]:
        series["jobs"] = [_job(job, series) for job in series["jobs"]]
    return models.Study.model_validate(found)


def _job(job: dict[str, Any], series: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in job.items() if key != "report"} | {
        "study": series["study"], "series": series["series"]}


@router.get("/jobs/{job}", tags=["Jobs"], responses=_problems(404, 422))
def job(site: SiteNow, user: Viewer, job: JobNumber) -> models.Job:
    """One job: what it is to make, its state, and how far its deliveries are."""
    row = site.ledger.job(job)
    series = next(series for series in views.show(site.ledger, row["series_uid"])["series"]
                  if series["series"] == row["series_uid"])
    return models.Job.model_validate(_job(next(one for one in series["jobs"] if one["job"] == job), series))


@router.get("/jobs/{job}/report", tags=["Jobs"], responses=_problems(404, 422))
def report(site: SiteNow, user: Viewer, job: JobNumber) -> dict[str, Any]:
    """What was measured while the derived series was made: method, settings, metrics, gates, checks, regions."""
    found = site.ledger.job(job)["report"]
    if found is None:
        raise NotFound(f"job {job} has built nothing yet. Remedy: look at its state and reason.")
    value: dict[str, Any] = _finite(found)
    return value


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@router.get("/events", tags=["Node"], responses=_problems(422))
def events(
    site: SiteNow, user: Viewer, kind: Kind | None = None,
    study: Annotated[str | None, Query(max_length=64, description="Study Instance UID")] = None,
    limit: Limit = 100,
    before: Annotated[int | None, Query(ge=1, le=2**53, description="`next` of the page before")] = None,
) -> models.Events:
    """History of the node or of one study, newest first."""
    rows = site.ledger.query(
        "SELECT * FROM event WHERE id < :before AND (:kind IS NULL OR kind = :kind)"
        + (" AND study_uid = :study" if study is not None else "") + " ORDER BY id DESC LIMIT :limit",
        {"before": before or 2**62, "kind": kind.value if kind else None, "study": study, "limit": limit + 1})
    shown = rows[:limit]
    return models.Events(events=[models.Event(
        at=timestamp(row["at"]), kind=row["kind"], series=row["series_uid"], job=row["job_id"],
        from_state=row["from_state"], to_state=row["to_state"], code=row["code"], reason=row["reason"],
        actor=row["actor"]) for row in shown], next=shown[-1]["id"] if len(rows) > limit else None)


@router.get("/alerts", tags=["Node"], responses=_problems())
def alerts(site: SiteNow, user: Viewer) -> models.Alerts:
    """What is wrong now, with the remedy."""
    now = site.clock()
    seen = machine.look(site.config, site.spool, now=now, starts=alerting.starts(site.ledger))
    known = {row["key"]: row for row in site.ledger.query("SELECT key, first_at, sent_at FROM alert")}
    return models.Alerts(alerts=[models.Alert(
        key=one.key, level=one.level, text=one.text,
        first_at=timestamp(known[one.key]["first_at"]) if one.key in known else None,
        sent_at=timestamp(known[one.key]["sent_at"]) if one.key in known else None)
        for one in troubles.find(site.ledger, site.config, seen, now=now)])


@router.get("/peers", tags=["Node"], responses=_problems())
def peers(site: SiteNow, user: Viewer) -> models.Peers:
    """Who may send to us, to whom we send, and how many deliveries to them are in which state."""
    counts: dict[str, dict[str, int]] = {}
    for row in site.ledger.query("SELECT peer, state, count(*) AS n FROM delivery GROUP BY peer, state"):
        counts.setdefault(row["peer"], {})[row["state"]] = row["n"]
    return models.Peers(peers=[models.Peer(
        name=peer.name, ae_title=peer.ae_title, host=peer.host, port=peer.port, may_send=peer.may_send,
        may_query=peer.may_query, query=peer.query, confirm=peer.confirm, tls=peer.tls, stow_url=peer.stow_url,
        routes=[route.name for route in site.config.route if peer.name in route.send_to],
        deliveries=counts.get(peer.name, {})) for peer in site.config.peer])


@router.get("/nights", tags=["Nights"], responses=_problems())
def nights(site: SiteNow, user: Viewer) -> models.Nights:
    """The nights whose reconciliation is kept."""
    days = sorted((path.stem for path in (site.spool.data_dir / "reports").glob("????-??-??.json")), reverse=True)
    return models.Nights(nights=[_line(site, day) for day in days])


def _line(site: Site, day: str) -> models.NightLine:
    try:
        found = _night(site, day)
    except (OSError, ValueError) as error:  # ValidationError is one: a file that is no report
        return models.NightLine(day=day, complete=None, totals={}, problem=type(error).__name__)
    return models.NightLine(day=day, complete=found.complete, totals=found.totals, problem="")


def _night(site: Site, day: str) -> models.Night:
    text = (site.spool.data_dir / "reports" / f"{day}.json").read_text(encoding="utf-8")
    return models.Night.model_validate(json.loads(text))


@router.get("/nights/{day}", tags=["Nights"], responses=_problems(404, 422))
def night(site: SiteNow, user: Viewer, day: Day) -> models.Night:
    """The reconciliation of one day."""
    try:
        return _night(site, day.isoformat())
    except FileNotFoundError:
        raise NotFound(f"there is no report of {day}. Remedy: reports are kept for {reconcile.KEPT_DAYS} days; "
                       "/api/v1/nights lists them.") from None
    except (ValidationError, ValueError) as error:
        raise NotFound(f"the report of {day} cannot be read ({type(error).__name__}). Remedy: `dicomnode reconcile` "
                       "writes it again.") from error


@router.post("/jobs/{job}/{verb}", tags=["Decide"], responses=_problems(403, 404, 409, 422))
def decide_job(site: SiteNow, user: Operator, job: JobNumber, verb: Verb) -> models.Done:
    """Retry, hold, release, cancel a job, or start it before all others. The history says who did it."""
    return _decide(site, f"job:{job}", verb, user.name)


@router.post("/studies/{study}/{verb}", tags=["Decide"], responses=_problems(403, 404, 409, 422))
def decide_study(site: SiteNow, user: Operator, study: StudyName, verb: Verb) -> models.Done:
    """The same for the one PET of a study, or for a series; refused where more than one could be meant."""
    return _decide(site, study, verb, user.name)


def _decide(site: Site, target: str, verb: Verb, name: str) -> models.Done:
    done = getattr(operate, verb.value)(site.ledger, target, now=site.clock(), actor=f"web:{name}")
    return models.Done.model_validate(asdict(done))


# --- OpenAPI


def describe(app: FastAPI, root: str) -> None:
    """Have app.openapi() say what is said of errors too, and under which prefix the API lies."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title="dicomnode", version=__version__, routes=app.routes, servers=[{"url": root or "/"}],
                description="A DICOM node that deblurs PET: what came, what was made of it, where it is. "
                            "Research use, not for diagnosis.")
            schema.setdefault("components", {}).setdefault("schemas", {})["Problem"] = Problem.model_json_schema()
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


@docs.get("/api/openapi.json")
def openapi(request: Request, user: Viewer) -> dict[str, Any]:
    schema: dict[str, Any] = request.app.openapi()
    return schema


@docs.get("/api/docs", response_class=HTMLResponse)
def read(request: Request, site: SiteNow, user: Viewer) -> HTMLResponse:
    """The same for people."""
    schema = request.app.openapi()
    tags: dict[str, list[dict[str, Any]]] = {}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            tags.setdefault(operation.get("tags", ["Other"])[0], []).append(
                {"path": path, "method": method.upper(), **operation, "answer": _answer(operation)})
    return page(request, "api.html", port=site.config.web.port, tags=tags, schemas=schema["components"]["schemas"],
                kind=_kind)


def _answer(operation: dict[str, Any]) -> str:
    content: dict[str, Any] = operation["responses"].get("200", {}).get("content", {})
    return next((_kind(value.get("schema", {})) for value in content.values()), "")


def _kind(schema: dict[str, Any]) -> str:
    """The type of a value in words: "list of Study", "integer or null".

    >>> _kind({"anyOf": [{"type": "array", "items": {"$ref": "#/components/schemas/Study"}}, {"type": "null"}]})
    'list of Study or null'
    """
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return str(schema.get("format") or schema.get("type", "anything"))
