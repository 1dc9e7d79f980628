"""What is measured: cases as data. A case determines its phantom to the last bit; a suite is a named row of cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from deconv.phantoms import PAPER_SPACING_MM, PHANTOMS, Phantom

__all__ = ["SUITES", "Case", "chosen_cases"]

Float3 = tuple[float, float, float]
_AXES = "DHW"


@dataclass(frozen=True)
class Case:
    """One synthetic measurement.

    phantom        a name of `deconv.phantoms.PHANTOMS`.
    shape          PET voxels (D, H, W).      spacing  mm along them.
    fwhm_mm        of the PSF: one number, or three along (D, H, W).
    skew           of the PSF along `skew_axis` (0, 1, 2); in (-1, 1).
    radial         how much the PSF widens along the radius toward the edge of the plane; 0: the same everywhere.
    noise          relative to the local activity, correlated over `noise_fwhm_mm`.
    seed           of placement, texture and noise. Never the method's.
    """

    phantom: str
    shape: tuple[int, int, int]
    spacing: Float3 = PAPER_SPACING_MM
    fwhm_mm: float | Float3 = 6.0
    skew: float = 0.0
    skew_axis: int = 2
    radial: float = 0.0
    noise: float = 0.0
    noise_fwhm_mm: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.phantom not in PHANTOMS:
            raise ValueError(f"no phantom {self.phantom!r}; phantoms are {', '.join(sorted(PHANTOMS))}")
        if self.skew_axis not in (0, 1, 2):
            raise ValueError(f"skew_axis is 0, 1 or 2 (D, H, W), got {self.skew_axis}")

    @property
    def label(self) -> str:
        """What a person reads: "spheres 24x48x48, noise 10 %"; what is usual (6 mm, the paper's voxels) is not said."""
        parts = [f"{self.phantom} {'x'.join(map(str, self.shape))}"]
        if self.spacing != PAPER_SPACING_MM:
            parts.append(f"voxels {'x'.join(f'{s:g}' for s in self.spacing)} mm")
        if self.fwhm_mm != 6.0:
            parts.append(f"PSF {'x'.join(f'{w:g}' for w in np.atleast_1d(self.fwhm_mm))} mm")
        if self.skew:
            parts.append(f"skew {self.skew:g} along {_AXES[self.skew_axis]}")
        if self.radial:
            parts.append(f"radial {self.radial:g}")
        if self.noise:
            parts.append(f"noise {100 * self.noise:g} %")
        if self.seed:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)

    @property
    def fwhm3_mm(self) -> Float3:
        """FWHM of the PSF along (D, H, W), mm: what a method that is told one PSF is told.

        Of a radially varying one, that of the mean variance over the disc inscribed in the plane: w along the tangent,
        w (1 + r f²) along the radius at a fraction f of it, so that w² is multiplied by 1 + r / 2 + r² / 6.
        """
        d, h, w = np.broadcast_to(np.asarray(self.fwhm_mm, dtype=np.float64), 3).tolist()
        wider = float(np.sqrt(1 + self.radial / 2 + self.radial**2 / 6))
        return d, wider * h, wider * w

    @property
    def skew3(self) -> Float3:
        """Skew of the PSF along (D, H, W)."""
        d, h, w = (self.skew if axis == self.skew_axis else 0.0 for axis in range(3))
        return d, h, w

    def build(self) -> Phantom:
        """The phantom, the same bits every time. Raises ValueError for settings that make no sense together."""
        return PHANTOMS[self.phantom](
            self.shape, seed=self.seed, spacing=self.spacing, fwhm_mm=self.fwhm_mm, skew=self.skew,
            skew_axis=self.skew_axis, radial=self.radial, noise=self.noise, noise_fwhm_mm=self.noise_fwhm_mm)

    def plain(self) -> dict[str, Any]:
        """The case as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def _variations(usual: Case) -> tuple[Case, ...]:
    """One thing at a time about the usual case: width, shape and skew of the PSF, noise; and some together."""
    return (
        usual,
        replace(usual, fwhm_mm=4.5), replace(usual, fwhm_mm=7.5), replace(usual, fwhm_mm=(5.0, 6.5, 6.5)),
        *(replace(usual, skew=0.4, skew_axis=axis) for axis in range(3)), replace(usual, radial=0.5),
        replace(usual, noise=0.05), replace(usual, noise=0.1),
        replace(usual, fwhm_mm=4.5, noise=0.1), replace(usual, fwhm_mm=7.5, noise=0.1),
        replace(usual, fwhm_mm=(5.0, 6.5, 6.5), noise=0.05), replace(usual, skew=0.4, skew_axis=2, noise=0.05),
    )


_SPHERES = Case("spheres", (24, 48, 48))
_HEAD = Case("head-and-neck", (32, 48, 48))
_BODY = Case("whole-body", (80, 34, 48), spacing=(5.0, 5.0, 5.0), noise_fwhm_mm=6.0)
_COARSE: Float3 = (4.0, 4.0, 4.0)
_GE: Float3 = (3.27, 5.47, 5.47)

#: suite name -> its cases
SUITES: Mapping[str, tuple[Case, ...]] = {
    "small": (
        Case("spheres", (16, 32, 32)), Case("spheres", (16, 32, 32), noise=0.1), Case("head-and-neck", (16, 32, 32)),
    ),
    "design": (_SPHERES, replace(_SPHERES, noise=0.1), _HEAD),
    "skewed": tuple(replace(_SPHERES, skew=0.4, skew_axis=axis) for axis in range(3)),
    "full": (
        *_variations(_SPHERES),
        *_variations(_HEAD),
        replace(_SPHERES, shape=(18, 36, 36), spacing=_COARSE),
        replace(_SPHERES, shape=(18, 36, 36), spacing=_COARSE, noise=0.1),
        replace(_SPHERES, shape=(22, 28, 28), spacing=_GE, noise=0.05),
        replace(_HEAD, shape=(24, 34, 34), spacing=_COARSE),
        replace(_HEAD, shape=(28, 28, 28), spacing=_GE, noise=0.05),
        _BODY, replace(_BODY, noise=0.1), replace(_BODY, fwhm_mm=7.5, noise=0.05),
        replace(_BODY, radial=0.5, noise=0.05),
    ),
}


def chosen_cases(suites: Sequence[str], phantoms: Sequence[str] = ()) -> tuple[Case, ...]:
    """The cases of the suites, each once, whose phantom's name or label begins with one of `phantoms` (all if none).

    Raises ValueError for a suite that does not exist and for a choice that leaves nothing.
    """
    if unknown := sorted(set(suites) - set(SUITES)):
        raise ValueError(f"no suite {', '.join(unknown)}; suites are {', '.join(SUITES)}")
    every = dict.fromkeys(case for suite in suites for case in SUITES[suite])
    left = tuple(case for case in every if not phantoms or any(case.label.startswith(name) for name in phantoms))
    if not left:
        raise ValueError(f"no case begins with {', '.join(phantoms)}; cases are {'; '.join(c.label for c in every)}")
    return left
