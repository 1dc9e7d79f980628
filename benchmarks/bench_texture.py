"""Texture map against pyradiomics 3.0.1, side by side in one process on one thread. Prints a Markdown table.

    OMP_NUM_THREADS=1 python benchmarks/bench_texture.py [--json FILE] [--voxels 4000]

The reference needs about a millisecond a voxel, so that large volumes are timed for it on a block of voxels in their
middle (its grey levels and its matrix size are those of the whole volume) and given per voxel; ours is timed on the
whole volume, best of three. Seconds are CPU seconds. Values are compared bit by bit on the block.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASES = [  # shape, grey levels, kernel radius
    ((16, 32, 32), 8, 1), ((16, 32, 32), 40, 1), ((32, 64, 64), 40, 1), ((64, 128, 128), 80, 1),
    ((16, 32, 32), 8, 3), ((16, 32, 32), 40, 3), ((32, 64, 64), 40, 3), ((64, 128, 128), 80, 3),
]


def ct(shape: tuple[int, int, int], levels: int, seed: int) -> NDArray[np.int16]:
    """Smooth tissue with noise, in HU, that fills `levels` bins of 25 HU."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 3.0)
    values = smooth / np.abs(smooth).max() + 0.05 * rng.standard_normal(shape)
    values = (values - values.min()) / (values.max() - values.min())
    return np.floor(values * (25 * levels - 1)).astype(np.int16)


def reference(image: NDArray[np.int16], block: tuple[slice, ...], radius: int) -> tuple[NDArray[np.float64], float]:
    """pyradiomics on the voxels of `block`, every voxel of the image counting in their kernels; seconds."""
    import SimpleITK as sitk
    from radiomics import glrlm, logger

    logger.setLevel(logging.ERROR)
    area = np.zeros(image.shape, np.uint8)
    area[block] = 1
    feature = glrlm.RadiomicsGLRLM(sitk.GetImageFromArray(image), sitk.GetImageFromArray(area), voxelBased=True,
                                   kernelRadius=radius, binWidth=25, voxelBatch=1000, maskedKernel=False)
    feature.enableFeatureByName("LongRunEmphasis", True)
    started = time.process_time()
    result = sitk.GetArrayFromImage(feature.execute()["LongRunEmphasis"])
    return result[block], time.process_time() - started


def measure(shape: tuple[int, int, int], levels: int, radius: int, voxels: int) -> dict[str, Any]:
    """One row of the table."""
    from deconv.texture import long_run_emphasis

    image = ct(shape, levels, seed=1)
    side = [min(n, max(2, round((voxels / 2) ** (1 / 3)) * (2 if i else 1))) for i, n in enumerate(shape)]
    block = tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(shape, side, strict=True))
    expected, theirs = reference(image, block, radius)
    ours = np.inf
    for _ in range(3):
        started = time.process_time()
        found = long_run_emphasis(image, kernel_radius=radius, bin_width=25)
        ours = min(ours, time.process_time() - started)
    per_voxel = theirs / expected.size, ours / found.size
    return {
        "shape": list(shape), "levels": len(np.unique(image // 25)), "radius": radius,
        "reference_voxels": int(expected.size), "reference_us_per_voxel": per_voxel[0] * 1e6,
        "ours_us_per_voxel": per_voxel[1] * 1e6, "ours_seconds": ours, "speed_up": per_voxel[0] / per_voxel[1],
        "bit_equal": bool(np.array_equal(found[block], expected)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--voxels", type=int, default=4000, help="voxels that the reference computes in each case")
    options = parser.parse_args()
    from deconv.texture import long_run_emphasis

    started = time.perf_counter()
    long_run_emphasis(np.zeros((3, 3, 3)))  # compiling is done once and then kept on disk
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; "
          f"first call (loading or compiling) {time.perf_counter() - started:.1f} s\n")
    print("| volume | grey levels | radius | pyradiomics µs/voxel | ours µs/voxel | whole volume s | faster | equal |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for shape, levels, radius in CASES:
        row = measure(shape, levels, radius, options.voxels)
        rows.append(row)
        print(f"| {'x'.join(map(str, shape))} | {row['levels']} | {radius} | {row['reference_us_per_voxel']:.0f} | "
              f"{row['ours_us_per_voxel']:.2f} | {row['ours_seconds']:.2f} | {row['speed_up']:.0f}x | "
              f"{'yes' if row['bit_equal'] else 'NO'} |", flush=True)
    print(f"\ntotal {time.perf_counter() - started:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
