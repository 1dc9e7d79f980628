"""Read, build and check a derived PET series: seconds, peak memory and how far from what disk and memory allow.

    python benchmarks/bench_derived.py [--slices 300 --size 256] [--kernel] [--folder DIR]

A source of SLICES x SIZE x SIZE gives 2 SLICES derived slices of 2 SIZE x 2 SIZE; the default is 600 of 512x512, the
figure of the design being below 15 s on 2 cores for read + build + check, with less than 3x the volume in memory.
Expected on 2 quiet cores: about 9 s. Each step runs in a process of its own, so that its peak memory is its own.

floor   seconds that the bytes alone need: read from and written (with fsync) to the same folder, and touched in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def make_source(folder: Path, slices: int, size: int) -> None:
    """A GE-like source with noise and a hot sphere."""
    from tests.factories import pet_series

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    places = np.linspace(-1, 1, size)
    disc = 3000.0 * (places[:, None] ** 2 + places[None, :] ** 2 < 0.6)
    image = np.empty((slices, size, size), dtype=np.float32)
    for i in range(slices):
        image[i] = disc * rng.normal(1.0, 0.1, (size, size)).clip(0.3, 2)
    image[slices // 3, size // 3:size // 3 + 4, size // 3:size // 3 + 4] = 40000
    for i, ds in enumerate(pet_series(slices=slices, rows=size, columns=size, values=image)):
        ds.save_as(folder / f"{i:04d}.dcm", enforce_file_format=True)


def step(name: str, folder: Path, kernel: bool) -> dict[str, float]:
    """Run one step here and say what it took; the image handed to the writer is each voxel repeated."""
    source, derived = sorted((folder / "source").iterdir()), folder / "derived"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, busy = time.perf_counter(), time.process_time()
    if name == "read":
        from sop.read import read_series

        start, busy = time.perf_counter(), time.process_time()
        read_series(source)
    elif name == "build":
        from sop.pet import Derivation, write_derived
        from sop.read import read_series

        volume, info = read_series(source)
        fine = volume.doubled(np.repeat(np.repeat(np.repeat(volume.array, 2, 0), 2, 1), 2, 2))
        recipe = Derivation("benchmark", "", {}, "0")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, busy = time.perf_counter(), time.process_time()
        write_derived(fine, info, recipe, derived, now=datetime(2026, 1, 1))
    else:
        from sop.check import check_derived

        k = np.zeros((15, 15, 15), dtype=np.float32)
        k[7, 7, 7] = 1
        start, busy = time.perf_counter(), time.process_time()
        report = check_derived(source, sorted(derived.iterdir()), kernel=k if kernel else None)
        if not report.ok:
            raise SystemExit(f"the check fails: {[item.message for item in report.failures]}")
    return {
        "seconds": time.perf_counter() - start, "cpu": time.process_time() - busy,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, "before": before * 1024.0,
    }


def disk_and_memory(folder: Path, size: int) -> tuple[float, float, float]:
    """Bytes per second: written in files of one slice with fsync, read back, copied in memory."""
    block = np.random.default_rng(1).integers(0, 255, 8 * size * size, dtype=np.uint8).tobytes()
    paths = [folder / f"floor{i}" for i in range(64)]
    start = time.perf_counter()
    for path in paths:
        with open(path, "wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
    write = len(block) * len(paths) / (time.perf_counter() - start)
    start = time.perf_counter()
    for path in paths:
        path.read_bytes()
    read = len(block) * len(paths) / (time.perf_counter() - start)
    for path in paths:
        path.unlink()
    array = np.zeros(1 << 26, dtype=np.float32)
    start = time.perf_counter()
    array.copy()
    memory = 2 * array.nbytes / (time.perf_counter() - start)
    return write, read, memory


def main() -> None:
    """Make the series, run the steps, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=300, help="source slices")
    parser.add_argument("--size", type=int, default=256, help="source rows and columns")
    parser.add_argument("--kernel", action="store_true", help="check with a 15 x 15 x 15 kernel")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--step", choices=["read", "build", "check"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(step(options.step, options.folder, options.kernel)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_source(folder / "source", options.slices, options.size)
        coarse = options.slices * options.size**2 * 2.0
        moved = {"read": (0.0, coarse, 4 * coarse), "build": (8 * coarse, 0.0, 80 * coarse),
                 "check": (0.0, 9 * coarse, 40 * coarse)}
        volume = 32 * coarse / 2  # the derived volume in float32
        write, read, memory = disk_and_memory(folder, options.size)
        print(f"derived {2 * options.slices} x {2 * options.size} x {2 * options.size}; volume {volume / 1e6:.0f} MB; "
              f"disk writes {write / 1e6:.0f} MB/s with fsync, reads {read / 1e6:.0f} MB/s; "
              f"memory {memory / 1e9:.1f} GB/s")
        print(f"{'step':6} {'seconds':>8} {'CPU s':>7} {'floor s':>8} {'peak MB':>8} {'peak/volume':>12}")
        total = 0.0
        for name in ("read", "build", "check"):
            command = [sys.executable, __file__, "--step", name, "--folder", str(folder)]
            done = subprocess.run(command + ["--kernel"] * options.kernel, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout)
            floor = moved[name][0] / write + moved[name][1] / read + moved[name][2] / memory
            total += row["seconds"]
            print(f"{name:6} {row['seconds']:8.2f} {row['cpu']:7.2f} {floor:8.2f} {row['peak'] / 1e6:8.0f} "
                  f"{row['peak'] / volume:12.2f}")
        print(f"total  {total:8.2f}")


if __name__ == "__main__":
    main()
