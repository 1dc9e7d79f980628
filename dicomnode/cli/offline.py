"""Commands on files, without a node: deblur, verify, phantom."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.options import JsonOption, console, gigabytes, open_ledger, print_json
from dicomnode.errors import Exit

__all__ = ["deblur", "phantom", "verify"]


def deblur(
    in_dir: Annotated[Path, typer.Argument(help="Folder with a PET series, and what else came with it.")],
    out_dir: Annotated[Path, typer.Argument(help="New or empty folder for the derived series.")],
    method: Annotated[str, typer.Option(help="Deconvolution method.")] = "nbd",
    preset: Annotated[str, typer.Option(help="The method's preset.")] = "best",
    psf_fwhm_mm: Annotated[float | None, typer.Option(help="Known PSF width, for methods that take one.")] = None,
    psf: Annotated[str, typer.Option(
        metavar="blind|library|FILE",
        help="PSF: found blind, of the node's library (--config), or a file that calibrate wrote.")] = "blind",
    config: Annotated[Path | None, typer.Option(
        "--config", "-c", help="The node whose library --psf library looks into.")] = None,
    region: Annotated[str | None, typer.Option(
        metavar="whole|body|head-neck|box:d0-d1,h0-h1,w0-w1",
        help="What is deblurred (box: PET voxels); the source is interpolated elsewhere.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="8GB", help="Memory of the method; decides its tiles.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of the method.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all.")] = 0,
    series: Annotated[str | None, typer.Option(help="Series Instance UID, where several PET series qualify.")] = None,
    assume_units: Annotated[str | None, typer.Option(help="Units of a PET that states none, e.g. BQML.")] = None,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder from which the same command goes on after a crash; "
                                                     "emptied at the end.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Deblur the PET in a folder: DICOM in, derived and checked DICOM out."""
    from dicomnode import offline
    from dicomnode.calibrate import deblur_overrides
    from dicomnode.cli.progress import method_progress

    offline.require_empty(out_dir)
    found = offline.find_series(in_dir)
    choice = offline.choose(found, series_uid=series, assume_units=assume_units is not None)
    asked = {"psf_fwhm_mm": psf_fwhm_mm, "seed": seed, "region": region,
             "memory_gb": None if memory is None else gigabytes(memory)}
    overrides = {name: value for name, value in asked.items() if value is not None}
    with open_ledger(config) if psf == "library" and config else nullcontext((None, None)) as (_, ledger):
        overrides |= deblur_overrides(psf, method, preset, header=choice.pet.header, ledger=ledger, stated=overrides)
    with method_progress(console(err=True)) as on_step:
        outcome = offline.deblur(choice, out_dir, found=found, method=method, preset=preset, overrides=overrides,
                                 device=device, threads=threads, now=datetime.now().astimezone(),
                                 assume_units=assume_units, on_step=on_step, checkpoints=checkpoints)
    if as_json:
        print_json({"folder": str(out_dir), "guide_reason": choice.reason, **outcome.report})
    else:
        from dicomnode.cli import tables

        tables.print_outcome(console(), outcome.report, guide_reason=choice.reason, folder=str(out_dir))


def verify(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder (or file) of the source PET series.")],
    derived: Annotated[Path, typer.Argument(metavar="DERIVED", help="Folder of the derived series.")],
    as_json: JsonOption = False,
) -> None:
    """Check a derived series against its source, from the files alone: geometry, SUV, activity, headers."""
    from dicomnode import offline
    from sop.check import check_derived

    report = check_derived(offline.source_files(source, derived), offline.series_files(derived))
    if as_json:
        print_json(report.to_json())
    else:
        from dicomnode.cli import tables

        tables.print_check(console(), report)
    if not report.ok:
        raise typer.Exit(Exit.FAILED)


def phantom(
    out_dir: Annotated[Path, typer.Argument(help="New or empty folder.")],
    kind: Annotated[str, typer.Option(help="spheres, head-and-neck or whole-body.")] = "spheres",
    size: Annotated[tuple[int, int, int] | None, typer.Option(
        metavar="D H W", help="PET voxels: slices, rows, columns.")] = None,
    seed: Annotated[int, typer.Option(help="Of placement, texture and noise.")] = 0,
    fwhm_mm: Annotated[float, typer.Option(min=0.1, help="Width of the blur.")] = 6.0,
    noise: Annotated[float, typer.Option(min=0.0, help="Relative to the local activity, e.g. 0.08.")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic PET and CT study with known truth. Its headers say that it is synthetic."""
    from dicomnode import offline, phantomstudy

    offline.require_empty(out_dir)
    made = phantomstudy.make(kind, size=size, seed=seed, fwhm_mm=fwhm_mm, noise=noise)
    study = phantomstudy.write(made, out_dir, seed=seed)
    if as_json:
        print_json({"folder": str(out_dir), "study": study.study_uid, "pet_series": study.pet_series_uid,
                    "ct_series": study.ct_series_uid, "pet_instances": len(study.pet), "ct_instances": len(study.ct)})
    else:
        typer.echo(f"{made.name}: {len(study.pet)} PET and {len(study.ct)} CT images in {out_dir}")
