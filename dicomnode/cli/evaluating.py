"""`dicomnode evaluate`: the phantom benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.options import JsonOption, console, print_json

__all__ = ["evaluate"]


def evaluate(
    suite: Annotated[str, typer.Option(help="design, skewed, full or small; several with commas.")] = "design",
    methods: Annotated[str, typer.Option(help="Beginnings of labels, with commas; all quick ones without it.")] = "",
    phantoms: Annotated[str, typer.Option(help="Beginnings of case labels, with commas; all without it.")] = "",
    seeds: Annotated[str, typer.Option(help="Of the methods, with commas.")] = "0",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of rows, report and pictures.")] = Path("evaluation"),
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Keep earlier runs, or run all again.")] = True,
    paper_fraction: Annotated[float | None, typer.Option(
        min=0.0, max=1.0, help="Include `paper`, with this part of its schedule; the whole takes hours.")] = None,
    kernels: Annotated[bool, typer.Option(
        "--kernels", help="Find the paper's pseudo-kernels again, too: four more runs of every blind method.")] = False,
    clip_weights: Annotated[Path | None, typer.Option(
        help="RN50.pt of OpenAI's CLIP, which you supply: CLIP-IQA of every image, too.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="Take over rows of another --out folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Judge the methods on phantoms with known truth: tables, JSON and a page of pictures."""
    from deconv import evaluation
    from deconv.evaluation import report
    from deconv.evaluation.kernels import kernel_checks
    from deconv.evaluation.pictures import clip_scores
    from deconv.quality.clip_iqa import load_encoder

    try:
        plan = evaluation.plan_of(
            suites=_words(suite), phantoms=_words(phantoms), methods=_words(methods), seeds=_words(seeds),
            paper_fraction=paper_fraction, device=device, threads=threads, fresh=not resume)
        encoder = load_encoder(clip_weights, device=device) if clip_weights else None  # before hours of work
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(f"{error}") from None

    def say(line: str) -> None:
        console(err=True).print(line, markup=False, soft_wrap=True)

    store = evaluation.Store(out)
    for folder in merge or []:
        say(f"{store.merge(folder)} rows taken over from {folder}")
    found = evaluation.evaluate(plan, store, say=say)
    checks = kernel_checks(found, pseudo=kernels, say=say)
    scores = clip_scores(found, encoder, say=say) if encoder else ()
    report.write(found, out, checks, scores)
    if as_json:
        print_json({"folder": str(out), **report.to_json(found, checks, scores)})
    else:
        typer.echo(report.markdown(found, checks, scores))
        typer.echo(f"report.md, report.json and report.png lie in {out}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
