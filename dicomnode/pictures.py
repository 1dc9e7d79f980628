"""Pictures of a deblurred phantom: MIPs before and after at one scale, a profile with the truth, the kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage

from deconv.phantoms import Phantom
from deconv.volume import Volume
from dicomnode.figures import true_kernel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["phantom_picture", "ring_profile"]

BEFORE, AFTER, TRUTH = "#d1495b", "#1d4e89", "#8a8f98"
HEAD: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "color": "#222222"}
NOTE: dict[str, Any] = {"fontsize": 8.5, "color": "#555555"}
KBQ = 1e-3


Line = NDArray[np.float64]


def ring_profile(phantom: Phantom, volume: Volume, *, samples: int = 900) -> tuple[Line, Line, Line]:
    """Values of `volume` along the closed line through the centres of all spheres, in the order of the ring.

    Returns (mm along the line, values, mm at which the spheres lie).
    """
    centres = np.array([sphere.centre_mm for sphere in phantom.spheres])
    middle = np.array(phantom.measured.shape) * phantom.measured.spacing / 2
    offset = centres - middle
    angle = np.unwrap(np.arctan2(offset[:, 2], -offset[:, 1]))
    radius = np.hypot(offset[:, 1], offset[:, 2])
    turn = np.append(angle, angle[0] + 2 * np.pi)
    half = (turn[1] - turn[0]) / 2
    at = np.linspace(turn[0] - half, turn[-1] - half, samples)

    def along(values: Line) -> Line:
        return np.interp(at, turn, np.append(values, values[0]), period=2 * np.pi)

    r = along(radius)
    points = np.stack([along(centres[:, 0]), middle[1] - r * np.cos(at), middle[2] + r * np.sin(at)])
    index = points / np.asarray(volume.spacing)[:, None] - 0.5
    values = ndimage.map_coordinates(volume.array.astype(np.float64), index, order=1, mode="nearest")
    mm = (at - at[0]) * float(radius.mean())
    return mm, values, (angle - at[0]) * float(radius.mean())


def phantom_picture(path: Path, phantom: Phantom, source: Volume, derived: Volume, kernel: NDArray[np.float32] | None,
                    *, title: str) -> None:
    """Write a PNG: three MIPs at one scale, the profile through the spheres, the kernel."""
    figure = Figure(figsize=(11.5, 7.4), dpi=110, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12.5, x=0.01, ha="left", color="#222222")
    grid = figure.add_gridspec(2, 6, height_ratios=(1.12, 1.0))
    _mips(figure, [figure.add_subplot(grid[0, 2 * i:2 * i + 2]) for i in range(3)], phantom, source, derived)
    _profile(figure.add_subplot(grid[1, :4]), phantom, source, derived)
    if kernel is not None:
        _kernel(figure.add_subplot(grid[1, 4:]), phantom, kernel)
    figure.savefig(path, pil_kwargs={"optimize": True})


def _mips(figure: Figure, panels: list[Axes], phantom: Phantom, source: Volume, derived: Volume) -> None:
    top = float(phantom.truth.array.max()) * KBQ * 1.1
    shown = ((source, "Received"), (derived, "Deblurred and doubled"), (phantom.truth, "Truth"))
    for panel, (volume, name) in zip(panels, shown, strict=True):
        _, h, w = volume.shape
        extent = (0.0, w * float(volume.spacing[2]), h * float(volume.spacing[1]), 0.0)
        image = panel.imshow(volume.array.max(axis=0) * KBQ, cmap="inferno", vmin=0, vmax=top, extent=extent,
                             interpolation="nearest")
        voxel = " × ".join(f"{step:.2f}" for step in volume.spacing)
        panel.set_title(f"{name}\n", **HEAD)
        panel.text(0.5, 1.02, f"voxels {voxel} mm", transform=panel.transAxes, ha="center", **NOTE)
        panel.set_xlabel("mm", fontsize=9)
        panel.tick_params(labelsize=8)
    bar = figure.colorbar(image, ax=panels, shrink=0.86, pad=0.015)
    bar.set_label("maximum along the slices, kBq/mL", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _profile(panel: Axes, phantom: Phantom, source: Volume, derived: Volume) -> None:
    for volume, colour, name, width in ((phantom.truth, TRUTH, "truth", 1.2), (source, BEFORE, "received", 1.8),
                                        (derived, AFTER, "deblurred", 1.8)):
        mm, values, places = ring_profile(phantom, volume)
        if volume is phantom.truth:
            panel.fill_between(mm, values * KBQ, color=TRUTH, alpha=0.22, lw=0, label=name)
        else:
            panel.plot(mm, values * KBQ, color=colour, lw=width, label=name)
    top = panel.get_ylim()[1] * 1.1
    for sphere, place in zip(phantom.spheres, places, strict=True):
        panel.text(place, top * 0.985, f"{sphere.diameter_mm:g} mm", ha="center", va="top", **NOTE)
    panel.set(xlim=(mm[0], mm[-1]), ylim=(0, top))
    panel.set_xlabel("mm along the ring of spheres", fontsize=9)
    panel.set_ylabel("kBq/mL", fontsize=9)
    panel.set_title("Profile through every sphere", loc="left", **HEAD)
    _plain(panel)
    panel.legend(ncols=3, fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _kernel(panel: Axes, phantom: Phantom, kernel: NDArray[np.float32]) -> None:
    """The estimated kernel's central line against the true one's, and its central slice as an inset."""
    true = true_kernel(phantom)
    spacing = float(phantom.measured.spacing[2])
    for values, colour, name, style in ((true, TRUTH, "true", "-"), (kernel, AFTER, "estimated", "o-")):
        d, h, w = values.shape
        line = np.asarray(values)[d // 2, h // 2]
        mm = (np.arange(w) - w // 2) * spacing
        if values is true:
            panel.fill_between(mm, line, color=colour, alpha=0.35, lw=0, label=name)
        else:
            panel.plot(mm, line, style, color=colour, lw=1.6, ms=3.5, label=name)
    panel.set_xlim(-14, 14)
    panel.set_ylim(0, None)
    panel.set_xlabel("mm across the columns", fontsize=9)
    panel.set_ylabel("share of the activity", fontsize=9)
    panel.set_title("Kernel", loc="left", **HEAD)
    _plain(panel)
    panel.legend(fontsize=8.5, frameon=False, loc="upper right")
    inset = panel.inset_axes((0.02, 0.56, 0.36, 0.42))
    half = min(kernel.shape[1:]) // 2
    inset.imshow(kernel[kernel.shape[0] // 2], cmap="inferno", interpolation="nearest",
                 extent=(-half * spacing, half * spacing, half * spacing, -half * spacing))
    inset.set(xticks=[], yticks=[])


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
