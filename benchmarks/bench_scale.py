"""What a method costs at 1, 2, 4 and 8 times the voxels: CPU seconds and peak memory, a process for each, and a plot.

    python benchmarks/bench_scale.py [--method tv] [--preset default] [--memory 0.25] [--image docs/images/scale.png]

The volume is the sphere phantom, repeated along slices, rows and columns. Each size runs with all the memory it wants
and, where the method has the setting, within the budget. The exponent p is that of seconds ~ voxels^p by least squares.
Floor: of seconds, the two transforms of the fine grid that every iteration needs at the least, measured in the same
process; of memory, the source and the output.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BASE = (20, 40, 40)
REPEATS = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2))
OUTPUT_BYTES = 4 + 32  # of source and output for a PET voxel


def measured(method: str, preset: str, overrides: dict, repeats: tuple[int, ...]) -> dict[str, float]:
    """One run in a process of its own."""
    order = json.dumps([method, preset, overrides, repeats])
    done = subprocess.run([sys.executable, __file__, "--child", order], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def child(method: str, preset: str, overrides: dict, repeats: list[int]) -> dict[str, float]:
    import torch

    import deconv
    from deconv.phantoms import spheres
    from deconv.volume import Volume

    torch.set_num_threads(1)
    base = spheres(BASE).measured
    door = deconv.method(method)
    door.deconvolve(base, door.settings(preset, **_short(door.settings(preset))))  # loads what is loaded once
    volume = Volume(np.tile(base.array, repeats), base.spacing, base.origin, base.direction, base.unit)
    chosen = door.settings(preset, **overrides)
    before, begin = _peak(), time.process_time()
    result = door.deconvolve(volume, chosen)
    seconds = time.process_time() - begin
    return {"voxels": volume.array.size, "seconds": seconds, "peak": _peak() - before,
            "tiles": result.metrics.get("tiles", 1.0), "floor": _floor(volume.shape, getattr(chosen, "iterations", 0))}


def _short(settings: object) -> dict[str, int]:
    return {name: 1 for name in ("iterations", "network_steps", "reproduce_steps") if hasattr(settings, name)}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _floor(shape: tuple[int, ...], iterations: int) -> float:
    import torch

    from deconv.pooled import smooth_length

    x = torch.rand([2 * smooth_length(n) for n in shape])
    begin = time.process_time()
    for _ in range(2):
        torch.fft.irfftn(torch.fft.rfftn(x), s=x.shape)
    return (time.process_time() - begin) / 2 * iterations


def exponent(rows: list[dict[str, float]], key: str) -> float:
    """p of key ~ voxels^p."""
    x, y = (np.log([row[name] for row in rows]) for name in ("voxels", key))
    return float(np.polyfit(x, y, 1)[0])


def plot(runs: dict[str, list[dict[str, float]]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, rows in runs.items():
        voxels = [row["voxels"] / 1e3 for row in rows]
        left.plot(voxels, [row["seconds"] for row in rows], "o-", label=f"{name}: p = {exponent(rows, 'seconds'):.2f}")
        right.plot(voxels, [row["peak"] / 1e9 for row in rows], "o-", label=name)
    floor = next(iter(runs.values()))
    voxels = [row["voxels"] / 1e3 for row in floor]
    if floor[0]["floor"]:
        left.plot(voxels, [row["floor"] for row in floor], "k:", label="floor: its transforms alone")
    right.plot(voxels, [row["voxels"] * OUTPUT_BYTES / 1e9 for row in floor], "k:", label="floor: source and output")
    for axes, label in ((left, "CPU seconds"), (right, "peak memory, GB")):
        axes.set(xscale="log", yscale="log", xlabel="PET voxels, thousands", ylabel=label)
        axes.set_xticks(voxels, [f"{v:.0f}" for v in voxels])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="tv")
    parser.add_argument("--preset", default="default")
    parser.add_argument("--memory", type=float, default=0.1, help="budget in GB of the second row of runs")
    parser.add_argument("--image", type=Path, default=Path("docs/images/scale.png"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*json.loads(options.child))))
        return
    import deconv

    settings = deconv.method(options.method).settings(options.preset)
    ways: dict[str, dict] = {"all at once" if hasattr(settings, "memory_gb") else "default": {}}
    if hasattr(settings, "memory_gb"):
        ways["all at once"] = {"memory_gb": 1000.0}
        ways[f"within {options.memory:g} GB"] = {"memory_gb": options.memory}
    runs: dict[str, list[dict[str, float]]] = {}
    print("| way | PET voxels | tiles | CPU s | floor s | µs a voxel | peak GB | floor GB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, overrides in ways.items():
        runs[name] = []
        for repeats in REPEATS:
            row = measured(options.method, options.preset, overrides, repeats)
            runs[name].append(row)
            print(f"| {name} | {row['voxels']:.0f} | {row['tiles']:.0f} | {row['seconds']:.1f} | {row['floor']:.1f} | "
                  f"{1e6 * row['seconds'] / row['voxels']:.0f} | {row['peak'] / 1e9:.2f} | "
                  f"{row['voxels'] * OUTPUT_BYTES / 1e9:.3f} |", flush=True)
        print(f"{name}: seconds ~ voxels^{exponent(runs[name], 'seconds'):.2f}", file=sys.stderr)
    plot(runs, f"{options.method}, preset {options.preset}: cost by size", options.image)


if __name__ == "__main__":
    main()
