"""Commands by which a person decides: retry, hold, release, cancel, urgent."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, open_ledger, print_json

__all__ = ["cancel", "hold", "release", "retry", "urgent"]

Target = Annotated[str, typer.Argument(
    metavar="WHAT", help="Study, series or derived series UID, accession number, or job number (12 or job:12).")]


def retry(what: Target, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Try a held, failed or cancelled job again, or a delivery that was given up."""
    _decide("retry", what, config, as_json)


def hold(what: Target, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Stop a job, or a series that has none yet, until a person decides."""
    _decide("hold", what, config, as_json)


def release(what: Target, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Go on with what is held, as it is; the history says who decided."""
    _decide("release", what, config, as_json)


def cancel(what: Target, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Give a job up; a series that has none is ignored."""
    _decide("cancel", what, config, as_json)


def urgent(what: Target, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Start a job before all others, whatever the window; of a series that has none yet, its job to come."""
    _decide("urgent", what, config, as_json)


def _decide(verb: str, what: str, config: Path, as_json: bool) -> None:
    import getpass

    from dicomnode import operate

    with open_ledger(config) as (_, ledger):
        done = getattr(operate, verb)(ledger, what, now=time.time(), actor=getpass.getuser())
    if as_json:
        print_json(asdict(done))
    else:
        typer.echo(f"{done.text} ({'series ' + done.series if done.job is None else f'job {done.job}'})")
