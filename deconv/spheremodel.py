"""What a scanner shows of one sphere: exact on the Fourier side, for fits at sub-voxel precision.

    m = background + A (ball ∗ k ∗ box_fine ∗ box_pet), sampled at the centres of the PET voxels

k is a split normal along each axis; box_pet is the mean over a PET voxel; box_fine is the voxel of the doubled grid
over which `deconv.kernels` integrates a kernel. The widths found so are those that
`kernels.skewed(fwhm, skew, spacing / 2)` takes in y = P(x ∗ k) (deconv/pooled.py).

    ball, radius R, at |q|:  3 (sin qR − qR cos qR) / (qR)³ times its volume
    split normal, σ₁ below and σ₂ above its mode, its mean at 0:
        e^(i q μ) conj[σ₂ w(σ₂ q / √2) + σ₁ w(σ₁ q / √2)*] / (σ₁ + σ₂),   μ = √(2/π) (σ₂ − σ₁),  w Faddeeva's function
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import fft, special

from deconv.kernels import FWHM_PER_SIGMA

__all__ = ["Window", "ball_spectrum", "split_normal_spectrum"]

Array = NDArray[np.float64]
FINEST_MM = 1.4  # sampling of the spectrum; the blur of a scanner leaves nothing beyond it
REACH_FWHM = 2.0  # how far beyond its surface a sphere is looked at


def ball_spectrum(q: Array, radius_mm: float) -> Array:
    """Fourier transform of a ball at |q| (1/mm), mm³; a radius of 0 is a point of 1 mm³."""
    if radius_mm == 0:
        return np.ones_like(q)
    x = q * radius_mm
    small = x < 1e-2
    safe = np.where(small, 1.0, x)
    shape = np.where(small, 1.0 - x**2 / 10.0, 3.0 * (np.sin(safe) - safe * np.cos(safe)) / safe**3)
    return shape * (4.0 / 3.0 * np.pi * radius_mm**3)


def split_normal_spectrum(q: Array, fwhm_mm: float, skew: float) -> NDArray[np.complex128]:
    """Fourier transform ∫ k(x) e^(-iqx) dx of `kernels.split_normal` in mm; 1 at q = 0."""
    sigma = fwhm_mm / FWHM_PER_SIGMA
    low, high = sigma * (1 - skew), sigma * (1 + skew)
    half = high * special.wofz(high * q / np.sqrt(2)) + low * np.conj(special.wofz(low * q / np.sqrt(2)))
    return np.asarray(np.conj(half) / (low + high) * np.exp(1j * q * np.sqrt(2 / np.pi) * (high - low)))


@dataclass(frozen=True, eq=False)
class Window:
    """The PET voxels around one sphere, and how that sphere looks there.

    start    (3,) index of the first voxel;  shape (d, h, w) voxels;  spacing mm.
    mask     (d, h, w) the voxels that are fitted.
    values   (d, h, w) what was measured.
    """

    start: NDArray[np.int64]
    values: Array
    mask: NDArray[np.bool_]
    spacing: Array
    wall_mm: float = 0.0
    _q: tuple[Array, Array, Array] = field(init=False)
    _length: Array = field(init=False)
    _fixed: Array = field(init=False)
    _over: tuple[int, int, int] = field(init=False)
    _grid: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        over = [max(2, int(np.ceil(step / FINEST_MM))) for step in self.spacing]
        # Two voxels more than the window: what leaves on one side and enters on the other has decayed there.
        grid = [fft.next_fast_len((n + 2) * k, real=True) for n, k in zip(self.values.shape, over, strict=True)]
        q = []
        for axis, (n, k, step) in enumerate(zip(grid, over, self.spacing, strict=True)):
            frequency = fft.rfftfreq(n, step / k) if axis == 2 else fft.fftfreq(n, step / k)
            q.append((2 * np.pi * frequency).reshape([-1 if a == axis else 1 for a in range(3)]))
        pooled = [np.sinc(one * step / (2 * np.pi)) * np.sinc(one * step / (4 * np.pi))
                  for one, step in zip(q, self.spacing, strict=True)]
        fine = np.prod(self.spacing / over)
        object.__setattr__(self, "_q", tuple(q))
        object.__setattr__(self, "_length", np.sqrt(q[0] ** 2 + q[1] ** 2 + q[2] ** 2))
        object.__setattr__(self, "_fixed", pooled[0] * pooled[1] * pooled[2] / fine)
        object.__setattr__(self, "_over", tuple(over))
        object.__setattr__(self, "_grid", tuple(grid))

    @classmethod
    def around(cls, image: Array, spacing: Array, centre_mm: Array, diameter_mm: float, *, fwhm_mm: float,
               others: Sequence[tuple[Array, float]] = (), wall_mm: float = 0.0) -> Window:
        """The voxels of `image` within two FWHM of the sphere's surface, and nearer to it than to the `others`.

        centre_mm  along (D, H, W) from the outer corner of the field of view;  others  (centre, diameter) of each.
        Raises ValueError where the sphere and one FWHM around it do not lie inside the image.
        """
        reach = diameter_mm / 2 + wall_mm + REACH_FWHM * fwhm_mm
        need = diameter_mm / 2 + fwhm_mm
        extent = np.array(image.shape) * spacing
        if np.any(centre_mm - need < 0) or np.any(centre_mm + need > extent):
            raise ValueError(f"the sphere at {_mm(centre_mm)} is cut by the edge of the field of view")
        start = np.maximum(0, np.floor((centre_mm - reach) / spacing - 0.5).astype(int))
        stop = np.minimum(image.shape, np.ceil((centre_mm + reach) / spacing + 0.5).astype(int))
        axes = [(np.arange(a, b) + 0.5) * s for a, b, s in zip(start, stop, spacing, strict=True)]
        own = _distance(axes, centre_mm) - diameter_mm / 2
        mask = own <= reach - diameter_mm / 2
        for centre, diameter in others:
            beside = _distance(axes, centre) - diameter / 2
            # A neighbour's blur reaches about one FWHM; half-way between two is not enough where they stand close.
            mask &= (beside > own) & (beside > 1.2 * fwhm_mm + wall_mm)
        box = tuple(slice(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True))
        return cls(np.asarray(start), np.asarray(image[box], dtype=np.float64), mask, spacing, wall_mm)

    def offsets(self, centre_mm: Array) -> tuple[Array, Array, Array]:
        """mm of each voxel centre from `centre_mm` along each axis, ready to be broadcast."""
        first = (self.start + 0.5) * self.spacing - centre_mm
        d, h, w = ((np.arange(n) * s + a).reshape([-1 if i == axis else 1 for i in range(3)])
                   for axis, (n, s, a) in enumerate(zip(self.values.shape, self.spacing, first, strict=True)))
        return d, h, w

    def render(self, centre_mm: Array, diameter_mm: float, fwhm_mm: Array, skew: Array) -> tuple[Array, Array]:
        """(d, h, w) twice: the blurred sphere of activity 1, and the blurred background that it displaces.

        The second is the same but for a wall without activity around the sphere. A diameter of 0 is a point source:
        its first image sums to 1 / voxel volume, and it displaces nothing.
        """
        first = (self.start + 0.5) * self.spacing
        blur: NDArray[np.complex128] = self._fixed.astype(np.complex128)
        for q, width, k, c in zip(self._q, fwhm_mm, skew, first - centre_mm, strict=True):
            blur = blur * (split_normal_spectrum(q, float(width), float(k)) * np.exp(1j * q * c))
        sphere = self._image(blur * ball_spectrum(self._length, diameter_mm / 2))
        if diameter_mm == 0:
            return sphere, np.zeros_like(sphere)
        if self.wall_mm == 0:
            return sphere, sphere
        return sphere, self._image(blur * ball_spectrum(self._length, diameter_mm / 2 + self.wall_mm))

    def _image(self, spectrum: NDArray[np.complex128]) -> Array:
        fine = fft.irfftn(spectrum, s=self._grid)
        step = tuple(slice(0, n * k, k) for n, k in zip(self.values.shape, self._over, strict=True))
        return np.asarray(fine[step])


def _distance(axes: Sequence[Array], centre: Array) -> Array:
    d, h, w = ((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
    return np.sqrt(d[:, None, None] + h[None, :, None] + w[None, None, :])


def _mm(values: Array) -> str:
    return "(" + ", ".join(f"{value:.0f}" for value in values) + ") mm"
