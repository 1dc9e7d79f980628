"""The report of a study: made of what the ledger, the job's report and the looks say, with no judgement of its own.

`compose` is the only door. What it returns is the same for both writers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode import __version__, companions, views
from dicomnode.config import Config
from dicomnode.forecast import reasons
from dicomnode.ledger import Ledger
from dicomnode.reporting import figures
from dicomnode.reporting.blocks import (
    Block,
    Cell,
    Facts,
    Paragraph,
    Section,
    StudyReport,
    Table,
    mark,
    number,
    uid,
)
from dicomnode.reporting.verdicts import TONES, tell
from dicomnode.reporting.words import Times
from dicomnode.spool import Spool

__all__ = ["NOTICE", "compose"]

Json = Mapping[str, Any]
NOTICE = "Research use, not for diagnosis"  # unless the site turns it off (derived.research_use)


@dataclass(frozen=True)
class _Study:
    """What the parts of one report share: where to look, how to say times, and what the study is called."""

    ledger: Ledger
    spool: Spool
    config: Config
    times: Times
    name: str


def compose(ledger: Ledger, spool: Spool, config: Config, study: str, *, now: float) -> StudyReport:
    """The report of one study as it stands at `now`.

    `study` is a study, series or derived series UID or an accession number. Raises NotFound, and RefusedInput where an
    accession number belongs to several studies. The patient is named only where web.show_names says so.
    """
    value = views.show(ledger, study)
    waits = reasons(ledger, config, now=now)
    rows = {row["series_uid"]: row for row in ledger.series_of_study(value["study"])}
    times = Times(config.schedule.timezone)
    told = _Study(ledger, spool, config, times, value["accession_number"] or value["study"])
    return StudyReport(
        title="Deblurred PET",
        study=value["study"],
        accession_number=value["accession_number"],
        patient=figures.patient(ledger, spool, value["study"]) if config.web.show_names else "",
        at=times.say(views.timestamp(now)),
        zone=times.zone,
        seconds=now,
        node=config.node.ae_title,
        software=f"dicomnode {__version__}",
        notice=NOTICE if config.derived.research_use else "",
        verdicts=tuple(tell(value["series"], waits, times)),
        sections=(
            _received(value, rows, times),
            *(section for series in value["series"] for section in _processed(series, told)),
            *(section for series in value["series"] for section in _all_checks(series)),
            _history(value["events"], times),
            _about(),
        ),
    )


def _received(value: Json, rows: Mapping[str, Json], times: Times) -> Section:
    """What came, and what was chosen and why."""
    table = Table.of(
        "Series of the study", (("Series", 37), ("What", 19), ("Images", 8), ("From", 11), ("Came", 16),
                                ("State", 12)),
        ([uid(one["series"]), _what(one), number(one["instances"]), one["calling_ae"],
          times.minute(one["last_received_at"]), mark(one["state"], TONES.get(one["state"], ""))]
         for one in value["series"]))
    blocks: list[Block] = [table]
    for one in value["series"]:
        blocks += _judged(one, rows.get(one["series"], {}), times)
    return Section("What came, and what was chosen", tuple(blocks))


def _what(series: Json) -> str:
    return " ".join(filter(None, [series["modality"], series["series_number"], series["series_description"]]))


def _judged(series: Json, row: Json, times: Times) -> Iterator[Block]:
    """Why a series was taken, left alone or put aside; that its files were removed."""
    name = f"{series['modality']} {series['series_number']}".strip()
    why = series["judged"] or series["series_reason"]
    if why:
        yield Paragraph(f"{name}: {why}.".replace("..", "."))
    if series["conflicts"]:
        yield Paragraph(f"{name}: {series['conflicts']} objects with other bytes under a known UID are kept aside and "
                        "not used.")
    if row.get("purged_at"):
        day = times.minute(views.timestamp(row["purged_at"]))
        yield Paragraph(f"{name}: the received objects were removed from the node on {day} ([retention]). What is told "
                        "here comes from the ledger.")


def _processed(series: Json, told: _Study) -> Iterator[Section]:
    """One part for each series that has a job: its newest job in full, the earlier ones in a table."""
    if not series["jobs"]:
        return
    newest = series["jobs"][-1]
    row = told.ledger.job(newest["job"])
    yield Section(f"What was done with {_what(series)}",
                  (_job(newest, row, told.times), *_earlier(series["jobs"][:-1])))
    heading = f"{told.name}, job {newest['job']}: {newest['method']}, preset {newest['preset']}"
    yield from figures.sections(newest, row, told.spool, heading,
                                footer=NOTICE if told.config.derived.research_use else "")
    yield Section("Delivery", tuple(_deliveries(newest, row, told)))


def _job(job: Json, row: Json, times: Times) -> Facts:
    report = job["report"] or {}
    guide, scanner = report.get("guide", {}), report.get("scanner", {})
    used = "" if guide.get("used", True) else " (chosen; not used by this preset)"
    return Facts.of([
        ("Job", f"{job['job']}, route {job['route']}, attempt {job['attempts']}"),
        ("Method", f"{job['method']}, preset {job['preset']}"),
        ("Guide", f"CT series {job['guide_series']}{used}" if job["guide_series"] else "none"),
        ("Scanner", ", ".join(filter(None, (str(scanner.get(key, "")) for key in (
            "manufacturer", "model", "reconstruction", "radionuclide"))))),
        ("Voxels of the source", f"{scanner['spacing']} mm (slice, row, column)" if scanner.get("spacing") else ""),
        ("Device", report.get("device") or row["device"] or ""),
        ("Started, built", ", ".join(filter(None, (times.say(job["started_at"]), times.say(job["built_at"]))))),
        ("Computing time", _seconds(report.get("seconds"))),
        ("Derived series", uid(job["derived_series"] or "")),
        ("", _derived(job, report)),
        ("Notes of the reader", "; ".join(report.get("source", {}).get("notes", []))),
    ])


def _derived(job: Json, report: Json) -> str:
    if not job["derived_series"]:
        return ""
    named = " ".join(filter(None, (str(report.get("series_number", "")), str(report.get("series_description", "")))))
    return f"{job['derived_instances']} images" + (f", series {named}" if named else "")


def _seconds(parts: Mapping[str, float] | None) -> str:
    if not parts:
        return ""
    return f"{sum(parts.values()):.1f} s ({', '.join(f'{name} {value:.1f}' for name, value in parts.items())})"


def _earlier(jobs: Sequence[Json]) -> Iterator[Block]:
    if jobs:
        yield Table.of("Earlier jobs of this series", (("Job", 8), ("Method", 18), ("State", 14), ("Reason", 60)),
                       ([number(job["job"]), f"{job['method']}, {job['preset']}",
                         mark(job["state"], TONES.get(job["state"], "")), job["reason"]] for job in reversed(jobs)))


def _deliveries(job: Json, row: Json, told: _Study) -> Iterator[Block]:
    route = told.config.named_route(job["route"])
    beside = companions.wanted(job["report"], route.also if route else None)
    objects = (job["derived_instances"] or 0) + companions.instances(beside)
    if job["deliveries"]:
        yield Table.of("To whom the derived series goes",
                       (("Peer", 16), ("State", 14), ("Objects accepted", 16), ("Attempts", 10), ("Done", 16),
                        ("Answer", 28)), (_delivery(one, objects, told.times) for one in job["deliveries"]))
    elif job["state"] in ("queued", "running", "failed"):
        yield Paragraph("Nothing is sent before the series is built and checked.")
    else:
        yield Paragraph("Nothing was sent: there is no derived series that passed its checks.")
    yield from _companions((job["report"] or {}).get("also") or {})
    if row["purged_at"]:
        yield Paragraph("The derived files, and the pictures with them, were removed from the node on "
                        f"{told.times.minute(views.timestamp(row['purged_at']))} ([retention]).")


def _companions(also: Json) -> Iterator[Block]:
    """What was made to go out beside the derived series (dicomnode.companions), and what could not be."""
    if also.get("series"):
        columns = (("What", 13.0), ("Modality", 10.0), ("Series", 24.0), ("Objects", 9.0), ("UID", 44.0))
        yield Table.of("What goes with it", columns, (
                       [one["kind"], one["modality"], f"{one['series_number']} {one['description']}",
                         number(one["instances"]), uid(one["series_uid"])] for one in also["series"]))
    for name, why in also.get("left_out", {}).items():
        yield Paragraph(f"{name}: was wanted and could not be made: {why}. The derived series goes out without it.")


def _delivery(one: Json, objects: int, times: Times) -> list[Cell | object]:
    remarks = [f"{remark['instances']} answered {remark['status']}" + (f": {remark['comment']}" if remark["comment"]
                                                                        else "") for remark in one["remarks"]]
    proof = f"{one['committed']} confirmed by {one['confirm']}" if one["committed"] else ""
    return [one["peer"], mark(one["state"], TONES.get(one["state"], "")),
            number(f"{one['accepted']} of {max(objects, one['accepted'])}"), number(one["attempts"]),
            times.minute(one["done_at"]), "; ".join(filter(None, [one["reason"], proof, *remarks]))]


def _all_checks(series: Json) -> Iterator[Section]:
    report = series["jobs"][-1]["report"] if series["jobs"] else None
    if report and report.get("check"):
        yield Section(f"All checks of {_what(series)}", (figures.checks(report["check"]["items"]),))


def _history(events: Sequence[Json], times: Times) -> Section:
    columns = (("When", 20.0), ("What", 11.0), ("Change", 20.0), ("Reason", 37.0), ("By", 12.0))
    return Section("History", (Table.of(f"Every change of state, times of {times.zone}", columns, (
        [times.say(event["at"]), _subject(event), _change(event), event["reason"], event["actor"]]
        for event in events)),))


def _subject(event: Json) -> str:
    return f"job {event['job']}" if event["kind"] == "job" else str(event["kind"])


def _change(event: Json) -> str:
    return " → ".join(filter(None, [event["from_state"], event["to_state"]])) or str(event["code"])


def _about() -> Section:
    return Section("How to read this", (
        Paragraph("Before is the PET as it was received, after the derived series: the same field of view on a grid "
                  "twice as fine, at the same scale. SUVmax, SUVmean and SUVpeak are of the regions of highest uptake, "
                  "found on the received PET and measured at the same place in both; the peak is the highest mean in a "
                  "sphere of 1 mL (at the border of the field of view, in the part of it that was seen).", quiet=True),
        Paragraph("The kernel is the blur as it is kept, on the PET's voxels; its FWHM is the full width at half "
                  "maximum through its highest voxel, from slice to slice, row to row and column to column. The PSF "
                  "FWHM is the method's own figure, without the voxels' part, and so narrower. Gates are measured on "
                  "the result before it is written, checks on the written files by other code; what fails one is held "
                  "and never sent.", quiet=True),
        Paragraph("Deblurring recovers activity that blur had spread; it can also make noise look like structure. "
                  "Compare with the received series before drawing conclusions.", quiet=True),
    ))
