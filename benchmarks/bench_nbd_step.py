"""Time of one main step of neural blind deconvolution, by part, and with each exact rewrite on and off.

    python benchmarks/bench_nbd_step.py [--size 24x48x48] [--steps 3] [--threads 2]
    python benchmarks/bench_nbd_step.py --h200 64x128x128

Prints Markdown. Everything runs in one process, side by side. Beside each part stands its floor: the time its
arithmetic would take at the machine's measured matrix-product rate, or its memory traffic at the measured copy rate,
whichever is longer. The step is one of the first 300 (all terms with a cost: fidelity, CT texture, kernel).

--h200 measures nothing: it prints the same floor of the whole schedule for an NVIDIA H200 from its data sheet.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from deconv.blind import Optimizers, Step, objective
from deconv.kernels import FWHM_PER_SIGMA, gaussian
from deconv.losses import fidelity, kernel_excess, ssim
from deconv.networks import Gk, GkVector, Gx
from deconv.operators import blur, downsample
from deconv.stages import PAPER, REWRITES, Settings

KERNEL = 15


def timed(run: Callable[[], object], steps: int) -> float:
    """Shortest of `steps` runs, in seconds, after one that warms up: what the machine can do, not what else it did."""
    run()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> tuple[float, float]:
    """Measured GFLOP/s of a float32 matrix product and GB/s of a copy (read and write counted)."""
    a, b = torch.rand(1536, 1536), torch.rand(1536, 1536)
    flops = 2 * 1536**3 / timed(lambda: a @ b, 5)
    source, target = torch.rand(32_000_000), torch.empty(32_000_000)
    traffic = 2 * 4 * source.numel() / timed(lambda: target.copy_(source), 5)
    return flops / 1e9, traffic / 1e9


def networks(size: tuple[int, ...], settings: Settings) -> Step:
    """The networks of the main stage with random inputs."""
    generator = torch.Generator().manual_seed(0)
    gx = Gx(generator, output_scale=settings.output_scale, early_tail="early_tail" in settings.rewrites)
    if "channels_last" in settings.rewrites:
        gx = gx.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    zk = torch.from_numpy(gaussian(2.0 * FWHM_PER_SIGMA, 1.0, (KERNEL,) * 3))
    gk = (GkVector if "kernel_vector" in settings.rewrites else Gk)(zk, generator)
    zx = torch.rand((1, 1, *size), generator=generator)
    autocast = torch.bfloat16 if settings.precision == "bfloat16" else None
    return Step(gx, gk, zx, Optimizers(gx, gk, settings), autocast)


def data(size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """y and a texture map, random: time does not depend on the values."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(size, generator=generator), torch.rand(size, generator=generator)


def whole_step(size: tuple[int, ...], settings: Settings, steps: int) -> float:
    """Seconds of one step: forward, backward, Adam."""
    step, (y, texture) = networks(size, settings), data(size)
    phase = settings.stages[-1].phases[0]
    return timed(lambda: step.descend(lambda x, k: objective(x, k, y, phase, settings, texture)), steps)


def parts(size: tuple[int, ...], steps: int) -> list[tuple[str, float, float, float]]:
    """(part, seconds, flops, bytes) with all rewrites on; each part forward and backward by itself."""
    settings = PAPER
    step, (y, texture) = networks(size, settings), data(size)
    x_fixed = torch.rand([2 * n for n in size], requires_grad=True)
    k_fixed = torch.softmax(torch.rand(KERNEL**3), 0).reshape((KERNEL,) * 3).requires_grad_()
    optimizers = step.optimizers

    def gx() -> None:
        step.gx(step.zx).mean().backward()

    def gx_adam() -> None:
        optimizers.x.step()

    def gk() -> None:
        optimizers.k.zero_grad(set_to_none=True)
        step.gk().square().sum().backward()
        optimizers.k.step()
        if optimizers.vector:
            optimizers.vector.step()

    def convolution() -> None:
        blur(downsample(x_fixed), k_fixed).mean().backward()

    def losses() -> None:
        small = downsample(x_fixed)
        (fidelity(small - y) + ssim(small, texture) + kernel_excess(k_fixed, 0.7)).backward()

    runs = (gx, gx_adam, convolution, gk, losses)
    alive = sum(p.numel() for p in step.gk.parameters())
    return [(part, timed(run, steps), flops, traffic)
            for run, (part, flops, traffic) in zip(runs, work(size, KERNEL, alive), strict=True)]


def work(size: tuple[int, ...], kernel: int, alive: int) -> list[tuple[str, float, float]]:
    """(part, flops, bytes) of a float32 step: what no way of doing it can go below, every value read or written once.

    alive  parameters of Gk that have a gradient.
    """
    gx = Gx(torch.Generator(), output_scale=1.5).to("meta")  # shapes alone: nothing is computed
    macs, written = gx_work(gx, torch.empty((1, 1, *size), device="meta"))
    weights = sum(p.numel() for p in gx.parameters())
    voxels = math.prod(size)
    padded = math.prod(n + kernel - 1 for n in size)
    transforms = 6  # x and k there, y back; and the three of the gradient
    return [
        ("Gx forward and backward", 3 * 2 * macs, 3 * 4 * written),
        ("Gx Adam", 12 * weights, 28 * weights),
        ("x↓ ∗ k", transforms * 2.5 * padded * math.log2(padded), transforms * 8 * padded),
        ("Gk and its Adam", 18 * alive, 36 * alive),
        ("losses", 2 * 3 * 5 * voxels * sum(size) * 2, 4 * 30 * voxels),
    ]


#: NVIDIA H200 SXM data sheet: TFLOP/s of float32 and of dense bfloat16 matrix products, TB/s of memory
H200 = {"float32": 67.0, "bfloat16": 989.0, "memory": 4.8}


def h200(size: tuple[int, ...]) -> None:
    """Print the floor of the whole "paper" schedule at `size`; in bfloat16 only Gx in the main stage changes."""
    print(f"## Floor of the whole schedule on an H200, {'x'.join(map(str, size))}\n\nComputed, not measured: "
          f"{H200['float32']:g} TFLOP/s float32, {H200['bfloat16']:g} bfloat16, {H200['memory']:g} TB/s.\n\n"
          "| stage | steps | part | GFLOP | GB | float32 ms | bfloat16 ms |\n|---|---|---|---|---|---|---|")
    totals = {"float32": 0.0, "bfloat16": 0.0}
    for stage in PAPER.stages:
        count = stage.steps + stage.reproduce
        scaled = tuple(max(4, round(n * stage.scale)) for n in size)
        n = stage.kernel_size**3
        for part, flops, traffic in work(scaled, stage.kernel_size, round(2.5 * n * n + 3.5 * n)):
            exact = 1e3 * max(flops / (H200["float32"] * 1e12), traffic / (H200["memory"] * 1e12))
            low = exact
            if stage is PAPER.stages[-1] and part.startswith("Gx forward"):
                low = 1e3 * max(flops / (H200["bfloat16"] * 1e12), traffic / 2 / (H200["memory"] * 1e12))
            totals["float32"] += count * exact / 1e3
            totals["bfloat16"] += count * low / 1e3
            print(f"| {stage.name} | {count} | {part} | {flops / 1e9:.2f} | {traffic / 1e9:.3f} | {exact:.3f} | "
                  f"{low:.3f} |")
    print(f"| whole | {PAPER.steps} | | | | {totals['float32']:.0f} s | {totals['bfloat16']:.0f} s |")


def gx_work(gx: Gx, z: Tensor) -> tuple[int, int]:
    """Multiply-adds of the forward pass's convolutions, and values that its layers write."""
    total = [0, 0]

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        if isinstance(module, nn.Conv3d):
            total[0] += out.numel() * module.weight[0].numel()
        total[1] += out.numel()

    leaves = [m for m in gx.modules() if isinstance(m, nn.Conv3d | nn.BatchNorm3d)]
    hooks = [m.register_forward_hook(count) for m in leaves]
    with torch.no_grad():
        gx(z)
    for hook in hooks:
        hook.remove()
    return total[0], total[1]


def report(size: tuple[int, ...], steps: int, gflops: float, gbytes: float) -> None:
    """Both tables of one size."""
    name = "x".join(map(str, size))
    print(f"\n### {name}: parts of a step, all rewrites on\n\n| part | s | floor s | GFLOP | GB |")
    print("|---|---|---|---|---|")
    for part, seconds, flops, traffic in parts(size, steps):
        floor = max(flops / gflops, traffic / gbytes) / 1e9
        print(f"| {part} | {seconds:.4f} | {floor:.4f} | {flops / 1e9:.2f} | {traffic / 1e9:.3f} |", flush=True)
    print(f"\n### {name}: rewrites\n\n| settings | s a step | against all on |\n|---|---|---|")
    all_on = whole_step(size, PAPER, steps)
    rows = {f"without {name}": tuple(r for r in REWRITES if r != name) for name in REWRITES}
    print(f"| all on | {all_on:.3f} | 1.00 |", flush=True)
    for label, rewrites in [*rows.items(), ("none", ())]:
        seconds = whole_step(size, replace(PAPER, rewrites=rewrites), steps)
        print(f"| {label} | {seconds:.3f} | {seconds / all_on:.2f} |", flush=True)
    seconds = whole_step(size, replace(PAPER, precision="bfloat16"), steps)
    print(f"| all on, bfloat16 in Gx | {seconds:.3f} | {seconds / all_on:.2f} |", flush=True)


def main() -> None:
    """Parse, measure the machine, report each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", action="append", help="DxHxW of the PET volume; may be repeated")
    parser.add_argument("--steps", type=int, default=3, help="timed steps for each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--h200", metavar="DxHxW", help="print the floor for an H200 and end")
    arguments = parser.parse_args()
    if arguments.h200:
        h200(tuple(int(n) for n in arguments.h200.split("x")))
        return
    torch.set_num_threads(arguments.threads)
    gflops, gbytes = machine()
    print(f"## NBD step time\n\n{platform.processor() or platform.machine()}, {arguments.threads} threads, torch "
          f"{torch.__version__}; measured {gflops:.0f} GFLOP/s (matrix product), {gbytes:.1f} GB/s (copy)")
    for text in arguments.size or ["24x48x48", "40x64x64"]:
        report(tuple(int(n) for n in text.split("x")), arguments.steps, gflops, gbytes)


if __name__ == "__main__":
    main()
