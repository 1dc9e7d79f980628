"""Time of a main step against the code that was published with the method, and equality of the losses where both agree.

    git clone https://github.com/samplecm/neural_blind_deconv_PSMA DIR
    python benchmarks/bench_published.py --published DIR [--size 24x48x48] [--steps 3] [--threads 2]

Nothing of that code is copied here: its networks and losses are imported from DIR when this runs, and both sides run in
this process with the same threads. Its MS-SSIM needs the package pytorch-msssim; without it the phases that use it are
left out, and the table says so. Its modules `utils` and `blind_deconv` (reading, plotting, CUDA) are not loaded.

Losses are compared in steps 301 to 306, where the terms of both are the same: MSE + MAE of the blurred image and the l2
norm of the kernel above 0.7, Adam at 1e-3 and 8e-4. To make the rest the same, too:

    theirs as published             changed for the comparison
    kernel correlates               Gk's outputs are mirrored when they are copied into ours, which convolves
    zeros outside the volume        border="zeros" in ours
    batch norm behind each concat   taken out of theirs: Gx of the paper's figure has none, nor has ours
    tail 60 -> 40, LeakyReLU, -> 1  made 60 -> 60 -> 1 without activation in theirs, as ours

Terms that never coincide and are not compared: its pull of the kernel to the centre (steps below 300), its weights that
change with the loss every 25 steps, MS-SSIM of the doubled and zero-padded volumes, in float64 for the texture (ours:
SSIM on the PET grid), the l1 form of its TV, its kernel threshold of 0.5 from step 2000.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from bench_nbd_step import KERNEL, data, networks
from torch import Tensor, nn

from deconv.blind import Optimizers, Step, objective
from deconv.kernels import FWHM_PER_SIGMA, gaussian
from deconv.networks import Gk, GkVector, Gx
from deconv.stages import PAPER, REWRITES, Phase, Settings

COMPARED = range(301, 307)
#: first step of each phase, as both sides count, and whether the published loss calls MS-SSIM in it
PHASES = ((1, 300, True), (301, 2000, False), (2001, 3500, False), (3501, 5000, True))


@dataclass
class Published:
    """The modules of the published code."""

    model: ModuleType
    losses: ModuleType
    ms_ssim: bool

    @classmethod
    def load(cls, folder: Path) -> Published:
        """Import them from `folder`; what they import only for reading and plotting is left empty."""
        helper = ModuleType("blind_deconv")
        helper.__dict__["plot_3d_image"] = None
        sys.modules |= {"utils": ModuleType("utils"), "blind_deconv": helper}
        found = importlib.util.find_spec("pytorch_msssim") is not None
        if not found:
            absent = ModuleType("pytorch_msssim")
            absent.__dict__.update(ssim=None, ms_ssim=None)
            sys.modules["pytorch_msssim"] = absent
        sys.path.insert(0, str(folder))
        return cls(importlib.import_module("model_deconv"), importlib.import_module("loss_functions"), found)

    def gx(self) -> nn.Module:
        """Its image network, arguments as in its main program."""
        built: nn.Module = self.model.Gx(num_input_channels=1, num_output_channels=1, upsample_mode="trilinear")
        return built

    def step(self, gx: nn.Module, gk: nn.Module, zx: Tensor, zk: Tensor, y: Tensor, texture: Tensor
             ) -> Callable[[int], float]:
        """One step as its loop does it; takes the number of the step, returns the loss before it."""
        doubled = F.interpolate(texture[None, None], scale_factor=2, mode="trilinear")
        loss_of = self.losses.Deconv_Loss(tv_weight=0.01, ct_weight=0.00001, ct_tex=doubled, device=y.device)
        rates: list[dict[str, Any]] = [{"params": gx.parameters()}, {"params": gk.parameters(), "lr": 8e-4}]
        optimizer = torch.optim.Adam(rates, lr=1e-3)

        def descend(number: int) -> float:
            optimizer.zero_grad()
            x, k = gx(zx).float(), gk(zk).view(1, 1, KERNEL, KERNEL, KERNEL).float()
            small = F.interpolate(x, scale_factor=0.5, mode="trilinear")
            blurred = F.conv3d(small, k, padding=KERNEL // 2)
            loss = loss_of(blurred, y[None, None], k, x, number)
            value = float(loss.item())
            loss.backward()
            optimizer.step()
            return value

        return descend


def start_kernel() -> Tensor:
    """zk (15, 15, 15): a Gaussian."""
    return torch.from_numpy(gaussian(2.0 * FWHM_PER_SIGMA, 1.0, (KERNEL,) * 3))


# --- equality


def levelled(gx: nn.Module) -> nn.Module:
    """Their Gx with the two differences taken out (see the module): the same network as ours, with other names."""
    for level in list(gx.modules()):
        names = list(level._modules)
        if names and type(level._modules[names[0]]).__name__ == "Concat":
            setattr(level, names[1], nn.Identity())  # the batch norm behind it
    names = list(gx._modules)
    convolutions = [name for name in names if isinstance(gx._modules[name], nn.Sequential)]
    first, last = convolutions[-2], convolutions[-1]
    setattr(gx, first, nn.Conv3d(60, 60, 1))
    setattr(gx, names[names.index(first) + 1], nn.Identity())
    setattr(gx, last, nn.Conv3d(60, 1, 1))
    return gx


def copied(theirs: nn.Module, ours: Gx) -> None:
    """Their weights into ours. Both list skip, then the way down, then the way up, level by level; orders differ."""
    wide, level = [], theirs
    for _ in range(3):
        children = list(level.children())
        skip, deeper = children[0].children()
        nested = [m for m in deeper.children() if type(m) is nn.Sequential and len(m) > 2]
        down = [m for m in deeper.children() if m not in nested]
        wide.append((skip, nn.Sequential(*down), nn.Sequential(*children[1:7])))
        level = nested[0] if nested else level
    tail = [m for m in theirs.children() if isinstance(m, nn.Conv3d)]
    targets: list[nn.Module] = []
    sources: list[nn.Module] = []
    for i, (skip, way_down, way_up) in enumerate(wide):
        targets += [ours.skip[i], ours.down[i], ours.up[i]]
        sources += [skip, way_down, way_up]
    targets += [ours.tail_first, ours.tail_last]
    sources += tail
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            for mine, its in zip(target.parameters(), source.parameters(), strict=True):
                mine.copy_(its)


def mirrored_gk(theirs: nn.Module, zk: Tensor, rewrites: tuple[str, ...]) -> Gk | GkVector:
    """Their Gk in ours: the same kernel, mirrored, since ours is convolved and theirs correlated."""
    full = Gk(zk, torch.Generator())
    first, last = (m for m in theirs.children() if isinstance(m, nn.Linear))
    with torch.no_grad():
        full.hidden.weight.copy_(first.weight)
        full.hidden.bias.copy_(first.bias)
        full.out.weight.copy_(last.weight.flip(0))
        full.out.bias.copy_(last.bias.flip(0))
        if "kernel_vector" not in rewrites:
            return full
        vector = GkVector(zk, torch.Generator())
        alive = full.hidden(full.zk) > 0
        vector.hidden = nn.Parameter(full.hidden(full.zk)[alive].clone())
        vector.out_weight = nn.Parameter(full.out.weight[:, alive].clone())
        vector.out_bias = nn.Parameter(full.out.bias.clone())
    return vector


def compared(published: Published, size: tuple[int, ...]) -> None:
    """Print the losses of both over the first steps from the same weights."""
    torch.manual_seed(0)
    y, texture = data(size)
    zx, zk = torch.rand((1, 1, *size)), start_kernel()
    theirs, their_gk = levelled(published.gx()), published.model.Gk(KERNEL**3, KERNEL**3)
    candidates: list[tuple[str, Step, Settings]] = []
    for label, rewrites in (("on", REWRITES), ("off", ())):
        settings = replace(PAPER, rewrites=rewrites, border="zeros")
        gx = Gx(torch.Generator(), output_scale=1.5, early_tail=bool(rewrites))
        copied(theirs, gx)
        gk = mirrored_gk(their_gk, zk, rewrites)
        candidates.append((label, Step(gx, gk, zx, Optimizers(gx, gk, settings)), settings))
    descend = published.step(theirs, their_gk, zx, zk.reshape(-1), y, texture)
    published_losses = [descend(number) for number in COMPARED]
    heads = " | ".join(f"ours, rewrites {label} | relative" for label, _, _ in candidates)
    print(f"\n### The same weights, steps {COMPARED[0]} to {COMPARED[-1]}\n\n| step | published | {heads} |\n"
          "|---|---|---|---|---|---|")
    phase = PAPER.stages[-1].phases[1]
    rows = []
    for _, step, settings in candidates:
        rows.append([float(step.descend(loss_of(phase, settings, y, None))) for _ in COMPARED])
    for i, number in enumerate(COMPARED):
        ours = " | ".join(f"{row[i]:.8f} | {row[i] / published_losses[i] - 1:.1e}" for row in rows)
        print(f"| {number} | {published_losses[i]:.8f} | {ours} |", flush=True)


# --- time


def clocked(published: Published, size: tuple[int, ...], steps: int, clock: Callable[[], float]) -> None:
    """Print seconds of a step of every phase: published, ours in float32, ours in bfloat16; the shortest of `steps`."""

    def timed(run: Callable[[], object]) -> float:
        return min(once(run) for _ in range(steps + 1))  # the first one warms up

    def once(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    y, texture = data(size)
    zx, zk = torch.rand((1, 1, *size)), start_kernel()
    descend = published.step(published.gx(), published.model.Gk(KERNEL**3, KERNEL**3), zx, zk.reshape(-1), y, texture)
    theirs = [timed(partial(descend, number)) if published.ms_ssim or not ms_ssim else None
              for number, _, ms_ssim in PHASES]
    del descend
    ours: dict[str, list[float]] = {}
    for precision in ("float32", "bfloat16"):
        settings = replace(PAPER, precision=precision)  # type: ignore[arg-type]
        step = networks(size, settings)
        ours[precision] = [timed(partial(step.descend, loss_of(phase, settings, y, texture)))
                           for phase in settings.stages[-1].phases]
    name, kind = "x".join(map(str, size)), "processor seconds" if clock is time.process_time else "seconds"
    print(f"\n### {name}: {kind} of a main step\n\n| steps | published | float32 | ratio | bfloat16 | ratio |\n"
          "|---|---|---|---|---|---|")
    totals, before = [0.0, 0.0, 0.0], 0
    for (_, until, _), published_s, exact, low in zip(PHASES, theirs, ours["float32"], ours["bfloat16"], strict=True):
        label, share = f"{before} to {until - 1}", until - before
        before = until
        row(label, published_s, exact, low)
        for i, value in enumerate((published_s, exact, low)):
            totals[i] += share * (value or float("nan"))
    row("mean over 5000", totals[0] / 5000 if totals[0] == totals[0] else None, totals[1] / 5000, totals[2] / 5000)


def loss_of(phase: Phase, settings: Settings, y: Tensor, texture: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Our objective of x and k."""
    return lambda x, k: objective(x, k, y, phase, settings, texture)


def row(label: str, published_s: float | None, exact: float, low: float) -> None:
    """One line of the table; "-" where the published loss could not run."""
    theirs, ratios = ("-", ("-", "-")) if published_s is None else (
        f"{published_s:.3f}", (f"{published_s / exact:.1f}", f"{published_s / low:.1f}"))
    print(f"| {label} | {theirs} | {exact:.3f} | {ratios[0]} | {low:.3f} | {ratios[1]} |", flush=True)


def main() -> None:
    """Parse, load, compare, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--published", type=Path, help="folder of the published code")
    parser.add_argument("--size", default="24x48x48", help="DxHxW of the PET volume, multiples of 8")
    parser.add_argument("--steps", type=int, default=3, help="timed steps for each entry")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true",
                        help="processor seconds of all threads, for a busy machine (OMP_WAIT_POLICY=PASSIVE)")
    arguments = parser.parse_args()
    if arguments.published is None or not (arguments.published / "model_deconv.py").is_file():
        print("Skipped: the published code is not here. Clone it and name its folder with --published.")
        return
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message=".*(Skipping Gaussian|torch.meshgrid|lr_scheduler).*")
    published = Published.load(arguments.published)
    size = tuple(int(n) for n in arguments.size.split("x"))
    theirs, ours = (sum(p.numel() for p in gx.parameters()) / 1e6 for gx in (
        published.gx(), Gx(torch.Generator(), output_scale=1.5)))
    print(f"## Against the published code\n\n{arguments.threads} threads, torch {torch.__version__}, load "
          f"{os.getloadavg()[0]:.1f}; Gx: {theirs:.3f} million parameters published, {ours:.3f} ours")
    compared(published, size)
    clocked(published, size, arguments.steps, time.process_time if arguments.cpu_time else time.perf_counter)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
