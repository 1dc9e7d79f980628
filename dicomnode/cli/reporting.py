"""The command that writes a study's report: HTML and PDF."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, open_ledger, print_json

__all__ = ["report"]


def report(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Study or series UID, or accession number.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder, or a file that ends in .html or .pdf.")] = Path(),
    formats: Annotated[str | None, typer.Option(
        "--format", help="html, pdf or html,pdf (the default).", show_default=False)] = None,
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is not a report of this study.")] = False,
) -> None:
    """One study on paper: what came, what was done, figures, pictures, safeguards, deliveries, history."""
    from dicomnode.reporting import content, files, html, pdf
    from dicomnode.reporting.blocks import as_json as plain
    from dicomnode.spool import Spool

    wanted = files.formats_of(formats, out)
    with open_ledger(config) as (settings, ledger):
        told = content.compose(ledger, Spool(settings.node.data_dir), settings, study, now=time.time())
    made = {"html": lambda: html.render(told).encode(), "pdf": lambda: pdf.render(told)}
    paths = files.targets(told, out, wanted)
    files.write(told, {path: made[suffix]() for suffix, path in paths.items()}, force=force)
    if as_json:
        print_json({"files": {suffix: str(path) for suffix, path in paths.items()}, **plain(told)})
    else:
        for path in paths.values():
            typer.echo(str(path))
