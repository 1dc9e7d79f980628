"""Commands about the blur of a scanner: calibrate, psf."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, console, open_ledger, print_json

__all__ = ["calibrate", "psf"]


def calibrate(
    in_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the PET of a sphere phantom.")],
    diameters: Annotated[str | None, typer.Option(
        help="Inner diameters in mm of the spheres that can be seen, e.g. 10,13,17,22,28,37; 0 for a point source.")
    ] = None,
    wall_mm: Annotated[float, typer.Option(min=0.0, help="Thickness of the spheres' wall.")] = 0.0,
    free_activity: Annotated[bool, typer.Option(
        "--free-activity", help="The spheres were not filled from one solution.")] = False,
    series: Annotated[str | None, typer.Option(help="Series Instance UID, where several PET series qualify.")] = None,
    assume_units: Annotated[str | None, typer.Option(help="Units of a PET that states none, e.g. BQML.")] = None,
    key: Annotated[list[str] | None, typer.Option(
        help="What the header does not say, e.g. model=Biograph; may be repeated.")] = None,
    config: Annotated[Path | None, typer.Option(
        "--config", "-c", help="Enter the PSF in the library of this configuration's node.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the PSF to this file, for deblur --psf.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the PSF of a scanner and reconstruction on a sphere phantom."""
    from dicomnode import calibrate as calibration

    done = calibration.calibrate(
        in_dir, series_uid=series, diameters_mm=calibration.lengths(diameters), wall_mm=wall_mm,
        free_activity=free_activity, assume_units=assume_units, key_overrides=calibration.key_values(key or []))
    if config is not None:
        with open_ledger(config) as (_, ledger):
            calibration.keep(done, ledger, now=datetime.now().astimezone())
    if out is not None:
        out.write_text(json.dumps(done.as_json(), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(done.as_json())
    else:
        from dicomnode.cli import tables

        tables.print_psf(console(), done.as_json(), key=str(done.key))


def psf(
    forget: Annotated[int | None, typer.Option(help="Take the PSF of this number out of use.")] = None,
    config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False,
) -> None:
    """The PSF library: what was measured and found, and what a study would be given."""
    import time

    from dicomnode import psflibrary

    with open_ledger(config) as (_, ledger):
        if forget is not None:
            ledger.forget_psf(forget, now=time.time(), actor="operator")
        value = psflibrary.listing(ledger)
    if as_json:
        print_json(value)
    else:
        from dicomnode.cli import tables

        tables.print_library(console(), value)
