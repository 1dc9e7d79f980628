"""The command that mends what the disk or a crash has damaged: repair."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, console, print_json

__all__ = ["repair"]


def repair(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look at everything, change nothing; exit code 1 where "
                                          "there is something to repair.")] = False,
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
) -> None:
    """Mend a damaged ledger from what is left of it and from the objects on disk; the node must be stopped.

    Every object is compared with its digest. Nothing is deleted: the old ledger stays under a dated name, damaged
    objects go to data_dir/damaged, and what is lost is told with its study.
    """
    from dicomnode import repair as repairing
    from dicomnode.config import load

    report = repairing.repair(load(config).node.data_dir, now=time.time(), dry_run=dry_run)
    if as_json:
        print_json(report.as_json())
    else:
        console().print(report.text(), markup=False, end="", soft_wrap=True)
    if dry_run and report.needed:
        raise typer.Exit(1)
