"""Commands that report: status, jobs, show, alert, check."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, console, open_ledger, print_json
from dicomnode.errors import Exit

__all__ = ["alert", "check", "jobs", "show", "status"]

NEWEST = 500  # series listed for a person: a node of years has many


def status(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """The node at a glance: what came, what runs, what waits for a person, what fits tonight, the disk."""
    from dicomnode import views
    from dicomnode.forecast import forecast

    with open_ledger(config) as (settings, ledger):
        free = shutil.disk_usage(settings.node.data_dir).free
        value = views.status(ledger, free_bytes=free, now=time.time())
        value["tonight"] = forecast(ledger, settings, now=time.time())
    if as_json:
        print_json(value)
    else:
        from dicomnode.cli import tables

        tables.print_status(console(), value)


def jobs(
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
    limit: Annotated[int | None, typer.Option(
        "--limit", min=0, help=f"So many series; 0: all. Default: {NEWEST}, with --json all.")] = None,
) -> None:
    """Every series that came, newest first, and how far it got."""
    from dicomnode import views
    from dicomnode.forecast import reasons

    with open_ledger(config) as (settings, ledger):
        most = limit if limit is not None else 0 if as_json else NEWEST
        rows, waits = views.jobs(ledger, limit=most or None), reasons(ledger, settings, now=time.time())
    rows = [row | {"waits": waits.get(row["job"], "") if row["state"] in ("queued", "failed") else ""} for row in rows]
    if as_json:
        print_json(rows)
    else:
        from dicomnode.cli import tables

        tables.print_jobs(console(), rows)
        if most and len(rows) == most:
            typer.echo(f"The newest {most}; --limit 0 lists all, --limit N the newest N.")


def show(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study or series UID, or accession number.")],
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
) -> None:
    """One study: what came, what was chosen and why, what was done, what was sent, and its history."""
    from dicomnode import views
    from dicomnode.forecast import reasons

    with open_ledger(config) as (settings, ledger):
        value, waits = views.show(ledger, study), reasons(ledger, settings, now=time.time())
    for series in value["series"]:
        series["jobs"] = [job | {"waits": waits.get(job["job"], "")} for job in series["jobs"]]
    if as_json:
        print_json(value)
    else:
        from dicomnode.cli import tables

        tables.print_study(console(), value)


def alert(
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
    test: Annotated[bool, typer.Option("--test", help="Send a test message to all of alerts.urls_file.")] = False,
) -> None:
    """What is wrong now; with --test: whether a message reaches everybody."""
    if test:
        _test_message(config, as_json)
        return
    from dataclasses import asdict

    from dicomnode import alerts, machine, troubles
    from dicomnode.spool import Spool

    with open_ledger(config) as (settings, ledger):
        now = time.time()
        seen = machine.look(settings, Spool(settings.node.data_dir), now=now, starts=alerts.starts(ledger))
        found = troubles.find(ledger, settings, seen, now=now)
    if as_json:
        print_json([asdict(trouble) for trouble in found])
    else:
        from dicomnode.cli import tables

        tables.print_troubles(console(), found)


def _test_message(config: Path, as_json: bool) -> None:
    from dicomnode.config import load
    from dicomnode.errors import ConfigError
    from dicomnode.notify import Sender

    settings = load(config)
    if settings.alerts.urls_file is None:
        raise ConfigError("alerts.urls_file is not set. Remedy: name a file with one apprise URL a line.")
    outcome = Sender(settings.alerts.urls_file).wait(
        f"dicomnode {settings.node.ae_title}: test", "This is a test. Nothing is wrong that this message knows of.")
    if as_json:
        print_json({"sent": outcome.sent, "failed": outcome.failed, "error": outcome.error})
    else:
        typer.echo(outcome.text)
    if outcome.failed or outcome.error:
        raise typer.Exit(Exit.FAILED)


def check(
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
    peers: Annotated[bool, typer.Option(
        "--peers", help="Acceptance test: store a phantom at every destination, confirm it, query sources.")] = False,
) -> None:
    """Is everything ready? Configuration, disk, secrets, port, peers, clock, device, methods."""
    from dicomnode import acceptance

    findings = acceptance.check(config, now=time.time(), with_peers=peers)
    if as_json:
        print_json([finding.as_json() for finding in findings])
    else:
        from dicomnode.cli import tables

        tables.print_findings(console(), findings)
    code = acceptance.exit_code(findings)
    if code != Exit.DONE:
        raise typer.Exit(code)
