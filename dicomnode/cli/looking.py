"""Commands that report: status, jobs, show, check."""

from __future__ import annotations

import shutil
import time
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, console, open_ledger, print_json
from dicomnode.errors import Exit

__all__ = ["check", "jobs", "show", "status"]


def status(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """The node at a glance: what came, what runs, what waits for a person, the disk."""
    from dicomnode import views

    with open_ledger(config) as (settings, ledger):
        free = shutil.disk_usage(settings.node.data_dir).free
        value = views.status(ledger, free_bytes=free, now=time.time())
    if as_json:
        print_json(value)
    else:
        from dicomnode.cli import tables

        tables.print_status(console(), value)


def jobs(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Every series that came, newest first, and how far it got."""
    from dicomnode import views

    with open_ledger(config) as (_, ledger):
        rows = views.jobs(ledger)
    if as_json:
        print_json(rows)
    else:
        from dicomnode.cli import tables

        tables.print_jobs(console(), rows)


def show(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study or series UID, or accession number.")],
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
) -> None:
    """One study: what came, what was chosen and why, what was done, what was sent, and its history."""
    from dicomnode import views

    with open_ledger(config) as (_, ledger):
        value = views.show(ledger, study)
    if as_json:
        print_json(value)
    else:
        from dicomnode.cli import tables

        tables.print_study(console(), value)


def check(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Is everything ready? Configuration, disk, port, peers, clock, device, methods."""
    from dicomnode import acceptance

    findings = acceptance.check(config, now=time.time())
    if as_json:
        print_json([finding.as_json() for finding in findings])
    else:
        from dicomnode.cli import tables

        tables.print_findings(console(), findings)
    code = acceptance.exit_code(findings)
    if code != Exit.DONE:
        raise typer.Exit(code)
