"""Reports for people: the same values that `--json` prints, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from dicomnode.acceptance import Finding
    from dicomnode.troubles import Trouble
    from sop.checks.report import CheckReport

__all__ = ["print_check", "print_findings", "print_jobs", "print_library", "print_outcome", "print_psf", "print_status",
           "print_study", "print_troubles"]

COLOURS = {"held": "red", "failed": "red", "dead": "red", "cancelled": "yellow", "waiting": "yellow", "running": "cyan",
           "sending": "cyan", "built": "cyan", "delivered": "green", "committed": "green", "ok": "green",
           "warning": "yellow", "problem": "red"}

FORECAST = {"fits": "fit", "past-end": "end after the window closes", "not-tonight": "do not fit",
            "unknown": "not known"}
FORECAST_ROWS = 20


def print_jobs(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        console.print("Nothing has come yet.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "received (UTC)", "accession", "", "series", "images", "state"):
        table.add_column(name, overflow="fold", no_wrap=name.startswith("received"))
    table.add_column("reason", ratio=1, overflow="fold")
    for row in rows:
        name = " ".join(filter(None, [row["series_number"], row["series_description"]])) or row["series"]
        table.add_row(str(row["job"] or ""), _short(row["received_at"])[:16], escape(row["accession_number"]),
                      row["modality"], escape(name), str(row["instances"]), _state(row["state"]), escape(_why(row)))
    console.print(table)


def print_status(console: Console, value: Mapping[str, Any]) -> None:
    counts = value["counts"]
    for kind in ("series", "job", "delivery"):
        found = ", ".join(f"{n} {state}" for state, n in sorted(counts[kind].items())) or "none"
        console.print(f"{kind:<10}{found}")
    last = f", last at {_short(value['last_received_at'])} UTC" if value["last_received_at"] else ""
    console.print(f"{'instances':<10}{counts['instance']['all']}{last}")
    console.print(f"{'disk':<10}{value['free_bytes'] / 2**30:.1f} GiB free")
    said = [f"device {one['device']}: " + (f"not heard of since {_short(one['heartbeat_at'])} UTC" if one["stale"] else
                                    f"job {one['job']}" if one["job"] else "waits") for one in value["workers"]]
    console.print(f"{'workers':<10}{', '.join(said) or 'none runs'}")
    for title, rows in (("Running", value["running"]), ("Waiting for a person", value["held"])):
        if rows:
            console.print(f"\n[bold]{title}[/bold]")
            print_jobs(console, rows)
    if value["tonight"]["jobs"]:
        _print_forecast(console, value["tonight"])


def _print_forecast(console: Console, tonight: Mapping[str, Any]) -> None:
    counts = tonight["counts"]
    said = ", ".join(f"{words}: {counts[name]}" for name, words in FORECAST.items() if counts[name])
    console.print(f"\n[bold]Tonight[/bold]  {said}")
    table = Table(box=None, pad_edge=False, show_header=False)
    for job in tonight["jobs"][:FORECAST_ROWS]:
        table.add_row(f"job {job['job']}", escape(job["text"]))
    console.print(table)
    if len(tonight["jobs"]) > FORECAST_ROWS:
        console.print(f"and {len(tonight['jobs']) - FORECAST_ROWS} more: --json shows all")


def print_study(console: Console, value: Mapping[str, Any]) -> None:
    accession = f", accession number {value['accession_number']}" if value["accession_number"] else ""
    console.print(f"[bold]Study[/bold] {value['study']}{escape(accession)}")
    for series in value["series"]:
        name = " ".join(filter(None, [series["series_number"], series["series_description"]]))
        console.print(f"\n[bold]{series['modality']} series[/bold] {series['series']}  {escape(name)}")
        console.print(f"  {series['instances']} images from {escape(series['calling_ae'])}, "
                      f"{_short(series['received_at'])} to {_short(series['last_received_at'])} UTC")
        _line(console, series["series_state"], series["series_reason"] or series["judged"])
        if series["conflicts"]:
            console.print(f"  {series['conflicts']} objects with other bytes under a known UID are kept aside")
        for job in series["jobs"]:
            _print_job(console, job)
    console.print("\n[bold]History[/bold] (UTC)")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in ("at", "what", "change", "reason", "actor"):
        table.add_column(name, overflow="fold", no_wrap=name in ("at", "what", "change"))
    for event in value["events"]:
        what = f"job {event['job']}" if event["kind"] == "job" else event["kind"]
        change = " → ".join(filter(None, [event["from_state"], event["to_state"]])) or event["code"]
        table.add_row(_short(event["at"]), what, change, escape(event["reason"]), escape(event["actor"]))
    console.print(table)


def print_findings(console: Console, findings: Sequence[Finding]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        stop = "" if finding.text.endswith((".", "?", "!")) else "."
        text = finding.text + (f"{stop} Remedy: {finding.remedy}" if finding.remedy else "")
        table.add_row(_state(finding.verdict), finding.what, escape(text))
    console.print(table)


def print_troubles(console: Console, troubles: Sequence[Trouble]) -> None:
    if not troubles:
        console.print("Nothing is wrong.")
    for trouble in troubles:
        console.print(f"{_state(trouble.level)}  {escape(trouble.text)}", soft_wrap=True)


def print_check(console: Console, report: CheckReport) -> None:
    for item in report.failures:
        console.print(f"{_state('problem')}  {item.name}: {escape(item.message)}")
    held = len(report.items) - len(report.failures)
    console.print(f"{_state('ok' if report.ok else 'problem')}  {held} of {len(report.items)} checks hold")


def print_outcome(console: Console, report: Mapping[str, Any], *, guide_reason: str, folder: str) -> None:
    """What `deblur` did: series, method, figures, and where it lies."""
    source, guide, metrics = report["source"], report["guide"], report["metrics"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("source", f"series {source['series_uid']}, {source['slices']} slices, {source['unit']}")
    for note in source["notes"]:
        table.add_row("", escape(note))
    table.add_row("guide", escape(f"CT series {guide['series_uid']}: {guide_reason}" if guide["series_uid"]
                                  else f"none: {guide_reason}"))
    table.add_row("method", f"{report['method']}, preset {report['preset']}, on {report['device']}")
    for name in sorted(metrics):
        value = metrics[name]
        table.add_row("", f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    table.add_row("derived", f"series {report['derived_series_uid']}, {report['derived_instances']} images in {folder}")
    table.add_row("seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["seconds"].items()))
    table.add_row("check", _state("ok"))
    console.print(table)


def print_psf(console: Console, value: Mapping[str, Any], *, key: str) -> None:
    """What `calibrate` measured, with standard errors, and the spheres it was measured on."""
    console.print(f"[bold]PSF[/bold] of {escape(key)}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "FWHM mm", "skew"):
        table.add_column(name)
    for axis, width, log_sd, skew, skew_sd in zip(
            ("slice", "row", "column"), value["fwhm_mm"], value["log_sd"], value["skew"], value["skew_sd"],
            strict=True):
        table.add_row(axis, f"{width:.2f} ± {width * log_sd:.2f}", f"{skew:+.2f} ± {skew_sd:.2f}")
    console.print(table)
    spheres = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("sphere mm", "", "centre mm (slice, row, column)", "activity", "background", "residual"):
        spheres.add_column(name)
    for one in value["spheres"]:
        spheres.add_row(f"{one['diameter_mm']:.1f}", "given" if one["known"] else "fitted",
                        ", ".join(f"{c:.1f}" for c in one["centre_mm"]), f"{one['activity']:.5g}",
                        f"{one['background']:.5g}", f"{100 * one['residual']:.1f} %")
    console.print(spheres)
    console.print(f"unit {value['unit']}, residual {100 * value['residual']:.1f} % of the contrast")
    for note in value["notes"]:
        console.print(escape(note))


def print_library(console: Console, scanners: Sequence[Mapping[str, Any]]) -> None:
    if not scanners:
        console.print("The PSF library is empty. Remedy: `dicomnode calibrate DIR --config FILE`.")
        return
    for scanner in scanners:
        console.print(f"[bold]{escape(scanner['name'])}[/bold]\n  gives: {escape(scanner['why'])}")
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("", "no.", "kind", "FWHM mm", "±", "software", "series"):
            table.add_column(name, overflow="fold")
        for one in scanner["entries"]:
            table.add_row("", str(one["id"]), one["kind"], " x ".join(f"{width:.2f}" for width in one["fwhm_mm"]),
                          f"{100 * max(one['log_sd']):.0f} %", one["software_version"], one["series_uid"])
        console.print(table)


def _print_job(console: Console, job: Mapping[str, Any]) -> None:
    console.print(f"  [bold]job {job['job']}[/bold] by route {escape(job['route'])}: {job['method']}, preset "
                  f"{job['preset']}, {job['inputs']} images, attempt {job['attempts']}")
    _line(console, job["state"], _why(job), indent="    ")
    report = job["report"] or {}
    unused = "" if report.get("guide", {}).get("used", True) else ", which this preset does not use"
    console.print(f"    guide: {'CT series ' + job['guide_series'] + unused if job['guide_series'] else 'none'}")
    if job["derived_series"]:
        console.print(f"    derived series {job['derived_series']}, {job['derived_instances']} images")
    for one in job["also"]["series"]:
        console.print(escape(f"    {one['series_description']} {one['series']}, {one['instances']} objects"))
    for kind, why in job["also"]["left_out"].items():
        console.print(escape(f"    no {kind}: {why}"))
    if report:
        console.print(f"    {_measured(report)}")
    for delivery in job["deliveries"]:
        count = (job["derived_instances"] or 0) + job["also"]["instances"]
        if delivery["state"] in ("delivered", "committed"):
            count = delivery["answered"]  # all that was to be sent: a word may have left `also` of the route
        took = f"{delivery['accepted']} of {count} objects accepted, attempt {delivery['attempts']}"
        _line(console, delivery["state"], f"{took}. {delivery['reason']}", f"    to {escape(delivery['peer'])}: ")
        for remark in delivery["remarks"]:
            comment = f": {remark['comment']}" if remark["comment"] else ""
            console.print(escape(f"      {remark['instances']} answered {remark['status']}{comment}"))
        if delivery["prove_at"]:
            console.print(escape(f"      proof by {delivery['confirm']} is awaited"))


def _measured(report: Mapping[str, Any]) -> str:
    """Kernel, activity and checks of a report in one line."""
    metrics, items = report.get("metrics", {}), report.get("check", {}).get("items", [])
    widths = [metrics.get(f"kernel_fwhm_{axis}_mm") for axis in "dhw"]
    found = [f"kernel {' × '.join(f'{width:.1f}' for width in widths)} mm"] if all(widths) else []
    if metrics.get("activity_change") is not None:
        found.append(f"activity {round(100 * metrics['activity_change'], 3) + 0.0:+.3f} %")  # never -0.000
    for name, some in (("gates", report.get("gates", [])), ("checks", items)):
        if some:
            found.append(f"{sum(item['ok'] for item in some)} of {len(some)} {name} passed")
    return ", ".join(found)


def _line(console: Console, state: str, reason: str, indent: str = "  ") -> None:
    grid = Table.grid(padding=(0, 2))  # long reasons are folded below their beginning
    grid.add_row(f"{indent}{_state(state)}", escape(reason))
    console.print(grid)


def _why(row: Mapping[str, Any]) -> str:
    progress = row["progress"]
    if row["state"] == "running" and progress:
        return f"{progress['stage']}: step {progress['step']} of {progress['steps']}"
    told = str(row["reason"] or row["code"])
    return "; ".join(filter(None, [row.get("waits", ""), told]))


def _state(state: str) -> str:
    return f"[{COLOURS[state]}]{state}[/]" if state in COLOURS else state


def _short(timestamp: str | None) -> str:
    return timestamp.replace("T", " ").removesuffix("Z") if timestamp else ""
