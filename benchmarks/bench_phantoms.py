"""Every method on phantoms with known truth: NRMSE, recovery coefficients, kernel, activity, CPU seconds. Markdown.

    python benchmarks/bench_phantoms.py [--sizes small|design] [--methods tv,cubic] [--phantoms NAME]
                                        [--paper-minutes 20] [--json FILE]

Phantoms: Q3P spheres without noise and with 10 %, head and neck without noise; PSF Gaussian, 6 mm FWHM. `design` is
24x48x48 and 32x48x48, the sizes of the design's figures; `small` 16x32x32 and 16x28x28. `paper` is the neural blind
deconvolution as published; its whole schedule takes hours of CPU, so that all its stages are shortened alike to what
--paper-minutes CPU minutes a phantom allow, and the table says to how much. NRMSE = ||x - truth|| / ||truth|| on the
doubled grid.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deconv
from deconv import metrics
from deconv.phantoms import Phantom, head_and_neck, spheres

FWHM_MM = 6.0
PROBE = 0.002  # of the paper's schedule, timed to know what the whole takes
VARIANTS = {  # label -> method, preset, overrides
    "nearest": ("nearest", "default", {}),
    "cubic": ("cubic", "default", {}),
    "richardson-lucy, true PSF": ("richardson-lucy", "default", {"psf_fwhm_mm": FWHM_MM}),
    "tv, true PSF": ("tv", "default", {"psf_fwhm_mm": FWHM_MM}),
    "tv, PSF 1 mm too narrow": ("tv", "default", {"psf_fwhm_mm": FWHM_MM - 1}),
    "tv, PSF 1 mm too wide": ("tv", "default", {"psf_fwhm_mm": FWHM_MM + 1}),
    "preview (blind)": ("nbd", "preview", {}),
    "paper (blind)": ("nbd", "paper", {}),
}
SIZES = {"small": ((16, 32, 32), (16, 28, 28)), "design": ((24, 48, 48), (32, 48, 48))}


@dataclass(frozen=True)
class Row:
    """One method on one phantom; recovery holds [diameter mm, mean, median, max] of every sphere."""

    phantom: str
    method: str
    nrmse: float
    kernel_inner_product: float | None
    kernel_fwhm_mm: tuple[float, ...] | None
    activity_change: float
    background_cv: float | None
    cpu_seconds: float
    recovery: tuple[tuple[float, float, float, float], ...]


def phantoms(sizes: str, seed: int) -> Iterator[tuple[str, Phantom]]:
    """The three phantoms of the design's figures."""
    ring, head = SIZES[sizes]
    yield f"spheres {'x'.join(map(str, ring))}", spheres(ring, seed=seed)
    yield f"spheres {'x'.join(map(str, ring))}, 10 % noise", spheres(ring, seed=seed, noise=0.1)
    yield f"head and neck {'x'.join(map(str, head))}", head_and_neck(head, seed=seed)


def run(label: str, name: str, phantom: Phantom, paper_minutes: float, seed: int) -> Row:
    """Run one variant and judge it. CPU seconds are those of this process, all threads together."""
    chosen, preset, overrides = VARIANTS[label]
    method = deconv.method(chosen)
    if preset == "paper":
        # The paper bounds x at 1.1 of the maximum for spheres, at 1.5 for patients.
        overrides = {"output_scale": 1.1 if phantom.spheres else 1.5, "seed": seed}
        fraction = _paper_fraction(phantom, paper_minutes, seed)
        overrides |= {"schedule_fraction": fraction}
        label = f"paper (blind), {'whole schedule' if fraction == 1 else f'{100 * fraction:.2g} % of the schedule'}"
    started = time.process_time()
    result = method.deconvolve(phantom.measured, method.settings(preset, **overrides), guide=phantom.ct)
    seconds = time.process_time() - started
    image, kernel = result.image.array, result.kernel
    found = metrics.recovery_coefficients(image, phantom)
    return Row(
        name, label, metrics.nrmse(image, phantom.truth.array),
        None if kernel is None else metrics.kernel_inner_product(kernel, phantom.psf),
        None if kernel is None else metrics.kernel_fwhm_mm(kernel, result.kernel_spacing),
        metrics.activity_change(image, phantom.measured.array),
        metrics.background_cv(image, phantom) if phantom.spheres else None,
        seconds, tuple((rc.diameter_mm, rc.mean, rc.median, rc.max) for rc in found),
    )


def _paper_fraction(phantom: Phantom, minutes: float, seed: int) -> float:
    """The part of the paper's schedule that `minutes` CPU minutes allow, from the time of a very short one."""
    method = deconv.method("nbd")
    started = time.process_time()
    method.deconvolve(phantom.measured, method.settings("paper", schedule_fraction=PROBE, seed=seed), guide=phantom.ct)
    whole = (time.process_time() - started) / PROBE
    return min(1.0, 60 * minutes / whole)


def table(rows: Sequence[Row]) -> str:
    """Markdown: the figures of one phantom, then the recovery coefficients of its spheres."""
    lines = [f"### {rows[0].phantom}", "",
             "| method | NRMSE | kernel inner product | kernel FWHM mm | activity change | background CV | CPU s |",
             "|---|---|---|---|---|---|---|"]
    for row in rows:
        widths = "-" if row.kernel_fwhm_mm is None else " ".join(f"{w:.1f}" for w in row.kernel_fwhm_mm)
        product = "-" if row.kernel_inner_product is None else f"{row.kernel_inner_product:.3f}"
        cv = "-" if row.background_cv is None else f"{row.background_cv:.3f}"
        lines.append(f"| {row.method} | {row.nrmse:.3f} | {product} | {widths} | {100 * row.activity_change:+.4f} % | "
                     f"{cv} | {row.cpu_seconds:.1f} |")
    if rows[0].recovery:
        diameters = [f"{values[0]:g} mm" for values in rows[0].recovery]
        lines += ["", "Recovery coefficients, mean / median / max:", "",
                  f"| method | {' | '.join(diameters)} |", "|---" * (len(diameters) + 1) + "|"]
        for row in rows:
            cells = [" / ".join(f"{v:.2f}" for v in values[1:]) for values in row.recovery]
            lines.append(f"| {row.method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _chosen(names: str | None) -> list[str]:
    """The variants whose label begins with one of the names; all where none are given."""
    if not names:
        return list(VARIANTS)
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if not any(label.startswith(name) for label in VARIANTS):
            raise SystemExit(f"no method {name!r}; methods are {', '.join(VARIANTS)}")
    return [label for label in VARIANTS if any(label.startswith(name) for name in wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=sorted(SIZES), default="design")
    parser.add_argument("--phantoms", default="", help="only phantoms whose name ends so")
    parser.add_argument("--methods", help="comma-separated beginnings of the labels; all without it")
    parser.add_argument("--paper-minutes", type=float, default=20.0, help="CPU minutes a phantom for `paper`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; waiting threads count as CPU seconds, too")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    labels = _chosen(options.methods)
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {options.threads} used; "
          f"PSF {FWHM_MM:g} mm FWHM; seed {options.seed}\n", flush=True)
    rows: list[Row] = []
    for name, phantom in phantoms(options.sizes, options.seed):
        if not name.endswith(options.phantoms):
            continue
        of_this = [run(label, name, phantom, options.paper_minutes, options.seed) for label in labels]
        print(table(of_this), flush=True)
        rows += of_this
        if options.json:
            figures: list[dict[str, Any]] = [asdict(row) for row in rows]
            options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
