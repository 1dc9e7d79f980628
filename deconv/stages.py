"""The schedule of neural blind deconvolution as data: Phase, Stage, Settings, and the presets of the blind solver.

[S24] Sample et al. 2024, doi:10.1088/1361-6560/ad36a9, Table 1 (algorithm) and Table 2 (terms of the loss).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from deconv.networks import Tail
from deconv.operators import Border

__all__ = ["PAPER", "Phase", "REWRITES", "Settings", "Stage", "shortened"]

#: exact rewrites: they change nothing but rounding and time, and can be turned off one by one (benchmarks, tests)
REWRITES: tuple[str, ...] = (
    "fft_blur",  # x↓ ∗ k by Fourier transform, not by 15³ products a voxel
    "early_tail",  # Gx: the last 1x1x1 convolution before the last upsampling
    "kernel_vector",  # Gk: the first layer as one vector, its Adam step included
    "fused_adam",  # one pass over the parameters
    "float32_texture",  # the SSIM with the CT texture in float32, not float64
    "channels_last",  # memory order of Gx
)


@dataclass(frozen=True)
class Phase:
    """Weights of the loss for the steps of a stage before `until`.

    fidelity  MSE + MAE of x↓ ∗ k − y          ssim     1 − SSIM(x↓ ∗ k, y)
    texture   1 − SSIM(x↓, CT texture map)     kernel   l2 norm of kernel voxels above the threshold
    tv        total variation of x
    """

    until: int
    fidelity: float = 0.0
    ssim: float = 0.0
    texture: float = 0.0
    kernel: float = 0.0
    tv: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One scale: y resampled to `scale` of its grid, a kernel of kernel_size³ voxels of that grid.

    reproduce  steps in which both networks first learn to reproduce their inputs; 0 in the first stage.
    halve_at   steps at which both learning rates are halved.
    """

    name: str
    scale: float
    kernel_size: int
    phases: tuple[Phase, ...]
    reproduce: int = 0
    halve_at: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Optimisation steps, those of `reproduce` not counted."""
        return self.phases[-1].until

    def phase(self, step: int) -> Phase:
        """The phase that `step` belongs to."""
        return next(phase for phase in self.phases if step < phase.until)


@dataclass(frozen=True)
class Settings:
    """Everything that, with the source, determines the result. Plain values.

    output_scale       s: x may reach s times the source's maximum (paper: 1.5 patients, 1.1 sphere phantom).
    kernel_threshold   kernel voxels above it are penalised.
    zk_sigma_voxels    of the Gaussian that Gk first sees.
    schedule_fraction  in (0, 1]: every count of steps is multiplied by it; 1 is the whole schedule.
    max_steps          stop after so many steps in all; 0: no such stop.
    precision          of Gx in the main stage; "bfloat16" halves its time and changes the result.
    """

    preset: str
    stages: tuple[Stage, ...]
    learning_rate_x: float = 1e-3
    learning_rate_k: float = 8e-4
    output_scale: float = 1.5
    kernel_threshold: float = 0.7
    zk_sigma_voxels: float = 2.0
    border: Border = "replicate"
    tail: Tail = "pointwise"
    precision: Literal["float32", "bfloat16"] = "float32"
    rewrites: tuple[str, ...] = REWRITES
    schedule_fraction: float = 1.0
    max_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewrites", tuple(self.rewrites))
        unknown = sorted(set(self.rewrites) - set(REWRITES))
        if unknown:
            raise ValueError(f"no rewrite {', '.join(map(repr, unknown))}; rewrites are {', '.join(REWRITES)}")
        if not 0 < self.schedule_fraction <= 1:
            raise ValueError(f"schedule_fraction must lie in (0, 1], got {self.schedule_fraction}")
        if not self.stages or self.stages[-1].scale != 1.0:
            raise ValueError("the last stage must run at scale 1: its x is the result")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is 'float32' or 'bfloat16', got {self.precision!r}")
        if self.output_scale <= 0 or self.max_steps < 0:
            raise ValueError("output_scale must be positive and max_steps not negative")

    @property
    def steps(self) -> int:
        """Steps of the whole schedule as it will run, the reproducing ones included."""
        whole = sum(stage.steps + stage.reproduce for stage in shortened(self).stages)
        return min(whole, self.max_steps) if self.max_steps else whole


def shortened(settings: Settings) -> Settings:
    """The settings with `schedule_fraction` carried out: every count of steps multiplied by it, rounded up."""

    def scaled(steps: int) -> int:
        return math.ceil(steps * settings.schedule_fraction)

    stages = tuple(
        replace(
            stage,
            phases=tuple(replace(phase, until=scaled(phase.until)) for phase in stage.phases),
            reproduce=scaled(stage.reproduce),
            halve_at=tuple(scaled(step) for step in stage.halve_at),
        )
        for stage in settings.stages
    )
    return replace(settings, stages=stages, schedule_fraction=1.0)


_PRETRAIN = (Phase(1000, fidelity=1.0, kernel=1.0),)

PAPER = Settings(
    preset="paper",
    stages=(
        Stage("pre-train 1/2", 0.5, 7, _PRETRAIN),
        Stage("pre-train 1/√2", 0.5**0.5, 11, _PRETRAIN, reproduce=100),
        Stage(
            "main", 1.0, 15,
            (
                Phase(300, fidelity=1.0, kernel=1.0, texture=0.05),
                Phase(2000, fidelity=1.0, kernel=1.0),
                Phase(3500, fidelity=1.0, kernel=1.0, tv=0.01),
                Phase(5000, ssim=1.0, tv=0.01),
            ),
            reproduce=100,
            halve_at=(2000, 4000),
        ),
    ),
)
