"""What is judged: a label, the method and preset behind it, and the settings that follow from the case.

Richardson-Lucy and TV are told the PSF that made the measurement, or one that is 1 mm off; the others are told nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deconv
from deconv.evaluation.cases import Case

__all__ = ["PAPER", "QUICK", "VARIANTS", "Variant", "chosen_methods"]

Overrides = Callable[[Case, int], dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One thing that is judged.

    overrides  (case, seed) -> settings that differ from the preset's.
    seeded     whether the result depends on the method's seed; without, one run stands for all seeds.
    blind      whether it finds the kernel by itself.
    """

    label: str
    method: str
    preset: str
    overrides: Overrides = lambda case, seed: {}
    seeded: bool = False
    blind: bool = False

    @property
    def exists(self) -> bool:
        """Whether this version of the package has the preset."""
        return self.preset in deconv.PRESET_NAMES[self.method]

    def settings(self, case: Case, seed: int, paper_fraction: float = 1.0) -> Any:
        """The frozen settings for one run. `paper_fraction` shortens the schedule of preset `paper` only."""
        overrides = self.overrides(case, seed)
        if self.preset == "paper":
            overrides["schedule_fraction"] = paper_fraction
        return deconv.method(self.method).settings(self.preset, **overrides)


def _true_psf(off_mm: float = 0.0) -> Overrides:
    def overrides(case: Case, seed: int) -> dict[str, Any]:
        d, h, w = case.fwhm3_mm
        return {"psf_fwhm_mm": (d + off_mm, h + off_mm, w + off_mm), "psf_skew": case.skew3}
    return overrides


def _seed(case: Case, seed: int) -> dict[str, Any]:
    return {"seed": seed}


def _paper(case: Case, seed: int) -> dict[str, Any]:
    """The paper bounds x at 1.1 of the maximum for the sphere phantom, at 1.5 for patients."""
    return {"seed": seed, "output_scale": 1.1 if case.phantom == "spheres" else 1.5}


PAPER = "paper"
VARIANTS: Mapping[str, Variant] = {variant.label: variant for variant in (
    Variant("nearest", "nearest", "default"),
    Variant("cubic", "cubic", "default"),
    Variant("richardson-lucy true PSF", "richardson-lucy", "default", _true_psf()),
    Variant("tv true PSF", "tv", "default", _true_psf()),
    Variant("tv PSF 1 mm too narrow", "tv", "default", _true_psf(-1.0)),
    Variant("tv PSF 1 mm too wide", "tv", "default", _true_psf(1.0)),
    Variant("preview", "nbd", "preview", _seed, seeded=True, blind=True),
    Variant(PAPER, "nbd", "paper", _paper, seeded=True, blind=True),
    Variant("best", "nbd", "best", _seed, seeded=True, blind=True),
)}

#: what is judged unless something else is asked for: all that does not take hours
QUICK: tuple[str, ...] = tuple(label for label in VARIANTS if label != PAPER)


def chosen_methods(names: Sequence[str]) -> tuple[str, ...]:
    """The labels that equal one of the names, or else begin with it, in the order of the table; `QUICK` for none.

    Raises ValueError, listing what exists, for a name that fits nothing.
    """
    if not names:
        return QUICK
    wanted: set[str] = set()
    for name in names:
        fitting = [name] if name in VARIANTS else [label for label in VARIANTS if label.startswith(name)]
        if not fitting:
            raise ValueError(f"no method begins with {name!r}; methods are {'; '.join(VARIANTS)}")
        wanted.update(fitting)
    return tuple(label for label in VARIANTS if label in wanted)
