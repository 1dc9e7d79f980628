"""The study page: what came, what was chosen, what was done, how it looks, where it is now.

    /studies/STUDY               the page; an accession number or the UID of a series leads to its study
    /studies/STUDY/now           the part of it that changes, while something is going on
    /studies/STUDY/jobs/JOB/viewer   the slice viewer, as part of the page or alone
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlencode

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from pydicom import dcmread

from dicomnode import companions, operate, search, views, wording
from dicomnode.errors import RefusedInput
from dicomnode.forecast import forecast
from dicomnode.ledger import Ledger
from dicomnode.web import plots, story
from dicomnode.web.access import User, Viewer
from dicomnode.web.images import Palette, Top, looks_of, looks_or_why, pair_of, planes_of, version_of
from dicomnode.web.images import job_of as row_of_job
from dicomnode.web.site import Site, SiteNow, page
from dicomnode.web.volumes import Gone

__all__ = ["DONE", "router", "seen"]

router = APIRouter(include_in_schema=False)
Json = dict[str, Any]

#: What the page says after an action.
DONE = {
    "release": "Released. What happens now stands in the history.", "retry": "It is tried again.",
    "urgent": "It starts before all others.", "hold": "It is held. Release or retry lets it go on.",
    "cancel": "It is given up. Retry takes it up again.",
}
#: state -> seconds between two looks at it; states that are not here change by a person alone, or no more
LOOKS_EVERY_S = {"running": 2, "built": 2, "sending": 2, "receiving": 5, "complete": 2, "matched": 2, "queued": 10,
                 "failed": 10, "waiting": 10, "delivered": 30}
STEPS = 200  # lines of the history on a page; a link leads to all of them
KERNEL_FILE = "kernel.npy"  # as dicomnode.pipeline, which this process does not load, calls it


@router.get("/studies/{study}", response_class=HTMLResponse)
def study_page(request: Request, site: SiteNow, user: Viewer, study: str, job: int | None = None,
               done: Annotated[str, Query(max_length=8)] = "", top: Top = None,
               palette: Palette = "inverse", history: Literal["", "all"] = "") -> Response:
    try:
        found = views.show(site.ledger, study)
    except RefusedInput:  # an accession number of several studies: the list has them all, with their states
        return RedirectResponse(f"{site.config.web.root_path}/studies?{urlencode({'q': study})}", status_code=303)
    if found["study"] != study:
        named = next((one["job"] for series in found["series"] for one in series["jobs"]
                      if study in (series["series"], one["derived_series"])), None)
        return RedirectResponse(f"{site.config.web.root_path}/studies/{found['study']}"
                                + (f"?job={named}" if named else ""), status_code=303)
    values = _values(site, user, found, job, top, palette, steps=None if history else STEPS)
    return page(request, "study.html", **values, done=DONE.get(done, ""))


@router.get("/studies/{study}/now", response_class=HTMLResponse)
def study_now(request: Request, site: SiteNow, user: Viewer, study: str, last: int = 0,
              job: int | None = None) -> Response:
    """The moving part; where the history went on since `last`, the whole study in its place."""
    found = views.show(site.ledger, study)
    values = _values(site, user, found, job, None, "inverse")
    if values["seen"] == last:
        return page(request, "study_live.html", **values)
    answer = page(request, "study_body.html", **values, announce=True)
    answer.headers.update({"HX-Retarget": "#study", "HX-Reswap": "outerHTML"})
    return answer


@router.get("/studies/{study}/jobs/{job}/viewer", response_class=HTMLResponse)
def viewer(request: Request, site: SiteNow, user: Viewer, study: str, job: int) -> Response:
    """The viewer of slices; reads the files at the first call, which takes a second or two for a whole body."""
    row = row_of_job(site, study, job)
    pair = pair_of(site, row)
    looks = looks_of(site, row)
    try:
        planes = planes_of(pair)
    except Gone:
        planes = []
    top = float(looks.measures["top"]) if looks else _top_of(pair) if planes else 1.0
    template = "study_viewer.html" if request.headers.get("HX-Request") else "study_viewer_page.html"
    return page(request, template, study=study, job=job, planes=planes, missing=pair.missing, unit=pair.unit, top=top,
                files_version=version_of(row), start=_start(planes, looks))


def _top_of(pair: Any) -> float:
    """An upper end of the scale where no looks say one: of two digits, a third of the highest value."""
    volume = pair.before if pair.before is not None else pair.after
    return float(f"{max(1e-6, float(volume.array.max()) * pair.factor / 3):.2g}")


def _start(planes: list[Json], looks: Any) -> Json:
    """Where the viewer opens: at the first uptake region, else in the middle."""
    if looks and looks.measures["regions"]:
        place = np.array(looks.measures["regions"][0]["centre_mm"])
        return {one["plane"]: _number(one, place) for one in planes}
    return {one["plane"]: one["slices"] // 2 for one in planes}


def _number(plane: Json, place: np.ndarray) -> int:
    step = np.array(plane["step"])
    along = float((place - np.array(plane["corner"])) @ step / (step @ step))
    return min(max(round(along), 0), plane["slices"] - 1)


def seen(ledger: Ledger, study: str) -> int:
    """The newest line of a study's history that changes what may be done: what a page showed when it was made."""
    return int(ledger.query("SELECT coalesce(max(id), 0) AS id FROM event WHERE study_uid = ? AND kind IN "
                            "('job', 'series', 'delivery')", (study,))[0]["id"])


# --- what the templates get


def _values(site: Site, user: User, found: Json, job: int | None, top: float | None, palette: str, *,
            steps: int | None = STEPS) -> Json:
    """Everything of the page, for one of the study's jobs: that of the number, else the newest of its PET.

    steps   lines of the history that are shown, the newest; None: all.
    """
    now = site.clock()
    series = _chosen(found["series"], job)
    shown = _shown_job(series, job)
    names = {one["series"]: f"{one['modality']} series {one['series_number']}".strip() for one in found["series"]}
    history = story.timeline(found["events"], names)
    state = shown["state"] if shown and not _series_speaks(series, shown) else series["state"]
    reason = shown["reason"] if shown and not _series_speaks(series, shown) else series["reason"]
    values: Json = {
        "study": found, "series": series, "job": shown, "names": names, "seen": seen(site.ledger, found["study"]),
        "state": state, "reason": reason, "remedy": story.remedy(state, reason),
        "patient": _patient(site, series) if site.config.web.show_names else None,
        "may": operate.possible(site.ledger, series["series"]) if user.may_act and _newest(series, shown) else (),
        "steps": history[:steps], "older": len(history) - len(history[:steps]),
        "every_s": LOOKS_EVERY_S.get(state) if _moves(state, shown) else None,
        "live": _live(site, series, shown, now),
        "others": [(one, other) for one in found["series"] for other in one["jobs"] if other is not shown],
        "judged": story.judged_parts(series["judged"]),
        "series_speaks": shown is None or _series_speaks(series, shown),
        "wording": wording, "place_words": story.place_words, "palette": palette,
    }
    values |= _result(site, shown)
    return values | {"top": top or (values["looks"]["top"] if values["looks"] else None)}


def _chosen(series: list[Json], job: int | None) -> Json:
    """The series that the page is about: of the job that was asked for; the PET to look at first, as lists have it."""
    for one in series:
        if job is not None and any(other["job"] == job for other in one["jobs"]):
            return one
    return max(series, key=lambda one: (one["modality"] == "PT", -search.FIRST.index(one["state"]),
                                        max((other["job"] for other in one["jobs"]), default=0),
                                        one["last_received_at"]))


def _shown_job(series: Json, job: int | None) -> Json | None:
    jobs = {one["job"]: one for one in series["jobs"]}
    return jobs.get(job) if job in jobs else max(jobs.values(), key=lambda one: one["job"], default=None)


def _newest(series: Json, shown: Json | None) -> bool:
    """Actions are on the newest job of a series, as dicomnode.operate has it."""
    return shown is None or shown["job"] == max(one["job"] for one in series["jobs"])


def _series_speaks(series: Json, shown: Json) -> bool:
    """Whether the series itself is held: what came after the job was done, for instance."""
    return bool(series["series_state"] == "held" and _newest(series, shown))


def _moves(state: str, shown: Json | None) -> bool:
    """A delivered study stays as it is unless a peer was asked for more proof."""
    return state != "delivered" or any(one["prove_at"] for one in (shown or {}).get("deliveries", ()))


def _patient(site: Site, series: Json) -> Json | None:
    """Name and ID from the first object that is still there. The ledger holds neither."""
    for row in site.ledger.instances(series["series"]):
        path = site.spool.absolute(row["path"])
        if path.is_file():
            header = dcmread(path, stop_before_pixels=True, specific_tags=["PatientName", "PatientID"])
            name = str(header.get("PatientName", "")).replace("^", " ").strip()
            return {"name": name, "id": str(header.get("PatientID", ""))}
    return None


def _live(site: Site, series: Json, shown: Json | None, now: float) -> Json | None:
    """Where the job is, or when it will start; None where nothing is to be waited for."""
    if shown is None or shown["state"] not in ("queued", "running", "failed"):
        return None
    row = site.ledger.job(shown["job"])
    plan = forecast(site.ledger, site.config, now=now)
    if shown["state"] == "running":
        took = [one["median_s"] for one in plan["measured"] if (one["method"], one["preset"], one["device"]) ==
                (shown["method"], shown["preset"], str(row["device"] or "").partition(":")[0])]
        elapsed = now - row["started_at"] if row["started_at"] else None
        return {"running": story.progress_of(shown, took[0] if took else None, elapsed), "device": row["device"],
                "elapsed_s": elapsed}
    told = next((one for one in plan["jobs"] if one["job"] == shown["job"]), None)
    return {"running": None, "plan": told["text"] if told else "", "urgent": bool(row["urgent"])}


def _result(site: Site, shown: Json | None) -> Json:
    """Report and looks of a job as the templates show them."""
    report = (shown or {}).get("report") or {}
    row = site.ledger.job(shown["job"]) if shown else None
    looks, why_none = looks_or_why(site, row) if row else (None, "")
    return {
        "report": report, "gates": story.gate_rows(report.get("gates", ())),
        "checks": report.get("check", {}).get("items", []),
        "settings": story.setting_rows((shown or {}).get("settings")),
        "used": story.setting_rows(report.get("settings")), "seconds": report.get("seconds", {}),
        "files_version": version_of(row) if row else "", "purged": bool(row and row["purged_at"]),
        "built": bool(row and row["derived_path"]), "looks": _looks(site, row, looks) if row and looks else None,
        "why_no_pictures": why_none, "going": _going(site, shown),
    }


def _going(site: Site, shown: Json | None) -> Json:
    """What is delivered of a job as its route has it now: how many objects, and which companion series still go."""
    route = site.config.named_route(shown["route"]) if shown else None
    wanted = companions.wanted((shown or {}).get("report"), route.also if route else None)
    derived = (shown or {}).get("derived_instances")
    return {"objects": None if derived is None else derived + companions.instances(wanted),
            "series": [one["series_uid"] for one in wanted]}


def _looks(site: Site, row: Json, looks: Any) -> Json:
    measures = looks.measures
    sizes = {}
    for when in ("before", "after"):
        for view, one in measures["mips"][when].items():
            rows, columns = looks.arrays[f"{when}.{view}"].shape
            sizes[f"{when}.{view}"] = (columns * one["mm"][1], rows * one["mm"][0])
    turn = looks.arrays.get("after.rotation")
    if turn is not None and "rotation" in measures:
        sizes["turn"] = (turn.shape[2] * measures["rotation"]["mm"][1], turn.shape[1] * measures["rotation"]["mm"][0])
    return measures | {
        "sizes": sizes, "turns": 0 if turn is None else len(turn), "kernel_plots": _kernel_plots(site, row, measures),
        "plots": [_profile(one, measures["unit"]) for one in measures["profiles"]],
        "bar": {name: plots.scale_bar(name, measures["top"], measures["unit"], identity=f"bar-{name}")
                for name in ("inverse", "grey", "hot")},
        "residual": _own_scale(looks, "residual", "signed", measures["unit"]),
        "spread": _own_scale(looks, "uncertainty", "hot", "%"),
        "kernel_shapes": {axis: looks.arrays[f"kernel.{axis}"].shape for axis in "dhw"} if measures["kernel"] else {},
    }


def _own_scale(looks: Any, name: str, palette: str, unit: str) -> Json | None:
    """One scale for the three planes of an image that does not share that of before and after."""
    found = [looks.arrays[f"{name}.{view}"] for view in ("axial", "coronal", "sagittal")
             if f"{name}.{view}" in looks.arrays]
    if not found:
        return None
    highest = max(float(np.abs(one).max()) for one in found)
    top = float(f"{highest:.2g}") or 1.0
    return {"top": top, "palette": palette,
            "bar": plots.scale_bar(palette, top, unit, signed=palette == "signed", identity=f"bar-{name}")}


def _kernel_plots(site: Site, row: Json, measures: Json) -> list[Json]:
    """The kernel along the three axes through its maximum: the lines whose widths the report tells."""
    path: Path = site.spool.absolute(row["derived_path"]) / KERNEL_FILE
    if measures["kernel"] is None or not path.is_file():
        return []
    try:
        kernel = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return []  # damaged: its widths and its pictures stand in the looks
    peak = np.unravel_index(int(kernel.argmax()), kernel.shape)
    made = []
    for axis, (letter, words) in enumerate(zip("dhw", wording.AXES, strict=True)):
        line = kernel[tuple(slice(None) if other == axis else peak[other] for other in range(3))].astype(float)
        step, width = measures["kernel"]["spacing_mm"][axis], measures["kernel"]["fwhm_mm"][axis]
        mm = [(k - len(line) // 2) * step for k in range(len(line))]
        middle = float(line @ np.array(mm) / line.sum()) if line.sum() else 0.0
        made.append({"axis": letter, "words": words, "fwhm_mm": width,
                     "points": list(zip(mm, line.tolist(), strict=True)), "svg": plots.line_plot(
                         [plots.Line("kernel", "", mm, line.tolist())], x_label="mm", y_label="share of the activity",
                         title=f"Kernel {words}: full width at half maximum {width:.2f} mm",
                         mark_x=(middle - width / 2, middle + width / 2), mark_label=f"{width:.2f} mm")})
    return made


def _profile(one: Json, unit: str) -> Json:
    lines = [plots.Line(when, when, one[f"{when}_mm"], one[when]) for when in ("before", "after")]
    return {"title": one["label"], "region": one["region"], "lines": lines, "unit": unit,
            "svg": plots.line_plot(lines, x_label=f"mm, {one['axis']}", y_label=unit,
                                   title=f"Profile, {one['label']}: before and after, {unit}")}

