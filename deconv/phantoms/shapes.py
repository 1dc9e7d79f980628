"""Analytic shapes with irregular outlines and uneven uptake, rendered on any grid by supersampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deconv.phantoms.scanner import Float3, average_pool

__all__ = ["Capsule", "Difference", "Ellipsoid", "Organ", "Shape", "Waves", "render", "supersampled"]

Array = NDArray[np.float64]
Box = tuple[slice, ...]
SAMPLES = 4  # per axis and voxel


@dataclass(frozen=True, eq=False)
class Waves:
    """A smooth random function of position, mean 0, standard deviation about 1: plane waves, so it knows no grid."""

    wave_vectors: Array  # (n, 3), 1/mm
    phases: Array  # (n,)

    @classmethod
    def random(cls, rng: np.random.Generator, wavelength_mm: float, count: int = 12) -> Waves:
        """`count` waves in random directions of 2/3 to 2 times `wavelength_mm`."""
        directions = rng.standard_normal((count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = 2 * np.pi / wavelength_mm * rng.uniform(0.5, 1.5, (count, 1))
        return cls(lengths * directions, rng.uniform(0, 2 * np.pi, count))

    def at(self, points: Array) -> Array:
        """(n,) values at points (n, 3), mm along (D, H, W)."""
        return np.sqrt(2 / len(self.phases)) * np.cos(points @ self.wave_vectors.T + self.phases).sum(axis=-1)

    def around(self, points: Array, offsets: Array) -> Array:
        """(n, m) values at points (n, 3) + offsets (m, 3): cos(a + b) is a product, so no cosine per pair."""
        a = points @ self.wave_vectors.T + self.phases
        b = offsets @ self.wave_vectors.T
        left, right = np.hstack([np.cos(a), -np.sin(a)]), np.hstack([np.cos(b), np.sin(b)])
        return np.sqrt(2 / len(self.phases)) * (left @ right.T)

    def on_grid(self, axes: Sequence[Array]) -> Array:
        """(D, H, W) values on the grid of three coordinate axes: a wave is a product of one factor per axis."""
        d, h, w = (np.outer(axis, self.wave_vectors[:, i]) for i, axis in enumerate(axes))
        plane = (h[:, None, :] + w[None, :, :]).reshape(-1, len(self.phases))
        left = np.hstack([np.cos(d + self.phases), -np.sin(d + self.phases)])
        values = left @ np.hstack([np.cos(plane), np.sin(plane)]).T
        values *= np.sqrt(2 / len(self.phases))
        return values.reshape(len(d), len(h), len(w))


SMOOTH = Waves(np.zeros((1, 3)), np.full(1, np.pi / 2))  # zero everywhere


class Shape(Protocol):
    """What can be rendered: a test for points, and the box outside which there is nothing."""

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """(n,) whether points (n, 3), mm along (D, H, W) from the outer corner of the field of view, lie inside."""
        ...

    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest mm along (D, H, W) that the shape may reach."""
        ...


@dataclass(frozen=True, eq=False)
class Ellipsoid:
    """An ellipsoid with a bumpy surface: inside where |R (p - centre) / radii| <= 1 + bump_size x bumps(p).

    `turn` (3, 3) is the rotation R from (D, H, W) to the ellipsoid's own axes; None where they agree.
    """

    centre: Array
    radii: Array
    bumps: Waves = SMOOTH
    bump_size: float = 0.0
    turn: Array | None = None

    @classmethod
    def ball(cls, centre_mm: Sequence[float], diameter_mm: float) -> Ellipsoid:
        """A sphere."""
        return cls(np.array(centre_mm), np.full(3, diameter_mm / 2))

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """(n,) whether points (n, 3) lie inside."""
        away = points - self.centre if self.turn is None else (points - self.centre) @ self.turn.T
        squared = np.sum((away / self.radii) ** 2, axis=-1)
        inside = np.asarray(squared <= 1.0)
        if self.bump_size:  # bumps decide in a shell only; no sum of waves exceeds sqrt(2 count)
            most = self.bump_size * np.sqrt(2 * len(self.bumps.phases))
            near = (squared > max(1.0 - most, 0.0) ** 2) & (squared <= (1.0 + most) ** 2)
            bound = 1.0 + self.bump_size * self.bumps.at(points[near])
            inside[near] = squared[near] <= np.maximum(bound, 0.0) ** 2
        return inside

    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest mm along (D, H, W); a bump of more than 3.5 standard deviations is cut off."""
        half = self.radii if self.turn is None else np.sqrt((self.turn.T**2 * self.radii**2).sum(axis=1))
        reach = half * (1 + 3.5 * self.bump_size)
        return self.centre - reach, self.centre + reach

    def fraction(self, axes: Sequence[Array], step: Array) -> Array:
        """(D, H, W): the part of every voxel inside an ellipsoid that is not turned; supersampled at its surface.

        Fast for organs of millions of voxels: only those that the surface may cross are looked into.
        """
        scaled = [((axis - c) / r) ** 2 for axis, c, r in zip(axes, self.centre, self.radii, strict=True)]
        distance = np.sqrt(scaled[0][:, None, None] + (scaled[1][:, None] + scaled[2]))
        edge = 1.0 + self.bump_size * self.bumps.on_grid(axes) if self.bump_size else np.float64(1.0)
        distance -= edge
        part = (distance <= 0).astype(np.float64)
        crossed = np.nonzero(np.abs(distance) <= np.linalg.norm(step / self.radii))
        centres = np.stack([axis[i] for axis, i in zip(axes, crossed, strict=True)], axis=-1)
        inside = np.zeros(len(centres))
        offsets = _offsets(step)
        for start in range(0, len(centres), 20_000):  # bounds the memory
            some = centres[start:start + 20_000]
            squared = np.zeros((len(some), len(offsets)))
            for i in range(3):
                squared += ((some[:, i, None] + offsets[:, i] - self.centre[i]) / self.radii[i]) ** 2
            bound = np.ones_like(squared)
            if self.bump_size:
                bound += self.bump_size * self.bumps.around(some, offsets)
            inside[start:start + 20_000] = (squared <= np.maximum(bound, 0.0) ** 2).mean(axis=1)
        part[crossed] = inside
        return part


@dataclass(frozen=True, eq=False)
class Capsule:
    """A rod with round ends, all points within `radius_mm` of the line from `start` to `end` (mm)."""

    start: Array
    end: Array
    radius_mm: float

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """(n,) whether points (n, 3) lie inside."""
        line = self.end - self.start
        along = np.clip((points - self.start) @ line / (line @ line), 0.0, 1.0)
        away = points - self.start - along[:, None] * line
        return np.asarray((away**2).sum(axis=-1) <= self.radius_mm**2)

    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest mm along (D, H, W)."""
        return np.minimum(self.start, self.end) - self.radius_mm, np.maximum(self.start, self.end) + self.radius_mm


@dataclass(frozen=True, eq=False)
class Difference:
    """What of `whole` lies outside `hole`: a ring around a necrotic core."""

    whole: Shape
    hole: Shape

    def contains(self, points: Array) -> NDArray[np.bool_]:
        """(n,) whether points (n, 3) lie inside `whole` and outside `hole`."""
        return self.whole.contains(points) & ~self.hole.contains(points)

    def bounds(self) -> tuple[Array, Array]:
        """Those of the whole."""
        return self.whole.bounds()


@dataclass(frozen=True, eq=False)
class Organ:
    """Where an organ lies (mm from the middle of the field of view), its size, uptake, texture and CT number."""

    centre: Float3
    radii: Float3
    activity: float
    hu: float
    bump_size: float = 0.12
    uptake_variation: float = 0.0
    hu_variation: float = 15.0
    grain_mm: float = 18.0


def render(
    organs: Sequence[Organ], shape: tuple[int, int, int], spacing: Float3, scale: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Activity (2D, 2H, 2W) in Bq/mL and CT numbers (D, H, W) in HU; later organs lie over earlier ones."""
    fine = np.array(spacing) / 2
    middle = np.array(shape) * spacing / 2
    truth = np.zeros([2 * n for n in shape])
    hu = np.full(truth.shape, -1000.0)
    for organ in organs:
        grain = max(organ.grain_mm * scale, 6.0)
        outline = Ellipsoid(middle + scale * np.array(organ.centre), scale * np.array(organ.radii),
                            Waves.random(rng, grain), organ.bump_size)
        texture = Waves.random(rng, 1.2 * grain)
        box, axes = box_of(outline, truth.shape, fine)
        if box is None:
            continue
        part, grains = outline.fraction(axes, fine), texture.on_grid(axes)
        uptake = organ.activity * np.clip(1 + organ.uptake_variation * grains, 0.2, 2.0)
        truth[box] += part * (uptake - truth[box])
        hu[box] += part * (organ.hu + organ.hu_variation * grains - hu[box])
    return truth, average_pool(hu) + rng.normal(0.0, 8.0, shape)


def supersampled(shape: Shape, grid: Sequence[int], step: Array) -> tuple[Box | None, Array]:
    """The box of a grid of `step` mm voxels that a small shape touches, and the part of each voxel there inside it."""
    box, axes = box_of(shape, grid, step)
    if box is None:
        return None, np.zeros(0)
    centres = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    inside = np.zeros(len(centres))
    offsets = _offsets(step)
    for offset in offsets:
        inside += shape.contains(centres + offset)
    return box, (inside / len(offsets)).reshape([len(axis) for axis in axes])


def box_of(shape: Shape, grid: Sequence[int], step: Array) -> tuple[Box | None, list[Array]]:
    """The voxels a shape may touch, with their centres in mm along each axis; None where it misses the grid."""
    lowest, highest = shape.bounds()
    low = np.clip(np.floor(lowest / step).astype(int) - 1, 0, grid)
    high = np.clip(np.ceil(highest / step).astype(int) + 1, 0, grid)
    axes = [(np.arange(a, b) + 0.5) * s for a, b, s in zip(low, high, step, strict=True)]
    if np.any(high <= low):
        return None, axes
    return tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True)), axes


def _offsets(step: Array) -> Array:
    """(SAMPLES³, 3) points within a voxel, mm from its centre."""
    inner = (np.arange(SAMPLES) + 0.5) / SAMPLES - 0.5
    return np.stack(np.meshgrid(inner, inner, inner), axis=-1).reshape(-1, 3) * step
