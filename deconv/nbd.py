"""Neural blind deconvolution of one PET volume [S24], after [R20]: the door.

    y = x↓ ∗ k + noise       x = Gx(zx) on a grid twice as fine       k = softmax(Gk(zk)), so sum(k) = 1

y measured, scaled so that its maximum is 1; x deblurred; x↓ its mean over 2 x 2 x 2; k kernel of 15³ voxels of the PET
grid; Gx, Gk untrained networks fitted to y alone. Settings and schedule are data in `deconv.stages`, the networks in
`deconv.networks`, the loop in `deconv.blind`; docs/method.md holds the equations and the reasons.

Presets: "paper", the published method whole; "preview", `deconv.preview`: minutes on two CPU cores for any size.

Departures of "paper" from the text of [S24], each where the text is silent or does not hold:

- Borders of x↓ ∗ k are replicated. The text names none; zeros outside cost activity wherever there is background.
- Weights of the terms are not given: kernel 1, TV 0.01, CT texture 0.05 (`stages.PAPER`).
- "SSIM is minimized" can only mean that 1 − SSIM is.
- The "double convolutions" going up, and in the tail, are 3x3x3 then 1x1x1 and 1x1x1 then 1x1x1: with these Gx has the
  0.97 million parameters of the authors' network. With `tail="spatial"` the tail has a 3x3x3 on the doubled grid.
- Kernel sizes are 7, 11, 15: Table 1 and the upsampling factors 11/7 and 15/11 say so; the prose has 10, which is even.
- Gk has a new width at every scale, so it is drawn anew and taught its input; Gx is kept. Adam starts afresh each time.
- "Predict their own inputs": Gx(zx)↓ → zx and softmax(Gk(zk)) → zk in relative squared error, 100 steps.
- "Kernel MSE" (Table 2) is the l2 norm of the kernel voxels above 0.7 that its caption describes.
- At every change of scale and at the end the pair is shifted so that the kernel's centroid is its centre;
  at the end x is scaled by one factor to the source's total activity (both recorded in the metrics).

[S24] Sample et al. 2024, doi:10.1088/1361-6560/ad36a9        [R20] Ren et al. 2020, doi:10.1109/CVPR42600.2020.00340
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deconv import best, preview
from deconv.blind import fit
from deconv.checkpoint import Checkpoints
from deconv.finish import centred_pair, finished, normalised, plain
from deconv.fromplain import converted
from deconv.result import Deconvolution, OnStep
from deconv.stages import PAPER, Phase, Settings, Stage
from deconv.volume import Volume

__all__ = ["PRESETS", "Phase", "Settings", "Stage", "deconvolve", "settings"]

AnySettings = Settings | preview.Settings | best.Settings

PRESETS: Mapping[str, AnySettings] = {"best": best.BEST, "paper": PAPER, "preview": preview.PREVIEW}


def settings(preset: str, **overrides: Any) -> AnySettings:
    """The settings of a preset, with some replaced. Plain JSON values will do: settings(**plain(s)) == s.

    Raises ValueError for an unknown preset or setting (listing what exists) and for a value that makes no sense.
    """
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r} of nbd; presets are {', '.join(sorted(PRESETS))}")
    chosen = PRESETS[preset]
    known = {entry.name for entry in fields(chosen)} - {"preset"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(
            f"preset {preset!r} has no setting {', '.join(map(repr, unknown))}; settings are {', '.join(sorted(known))}"
        )
    return replace(chosen, **converted(type(chosen), overrides))


def deconvolve(
    volume: Volume, settings: AnySettings, *, guide: Volume | None = None, device: str | torch.device = "cpu",
    on_step: OnStep | None = None, checkpoints: Checkpoints | None = None,
) -> Deconvolution:
    """Deblur and double `volume`.

    guide        CT (HU) in the same frame of reference; None: unguided. Only "paper" uses it, in its first 300 main
                 steps.
    on_step      called at every step on a CPU; what it raises (Cancelled) passes through.
    checkpoints  where the run is kept and taken up again, with the same bits at the end; its folder is the caller's to
                 remove. "preview" takes minutes and keeps nothing. `deconv.RESUMABLE` tells who does.

    A main stage in bfloat16 whose loss is not finite is run again in float32; the settings of the result then name it
    ("precision_fallback").

    Raises ValueError for a volume without activity or too small, blind.Diverged where the loss is not finite.
    """
    if isinstance(settings, best.Settings):
        return best.deconvolve(volume, settings, device=device, on_step=on_step, checkpoints=checkpoints)
    if isinstance(settings, preview.Settings):
        return preview.deconvolve(volume, settings, device=device, on_step=on_step)
    start = time.perf_counter()
    y, top = normalised(volume)
    guided = guide is not None and any(phase.texture for stage in settings.stages for phase in stage.phases)
    texture = _texture(guide, volume) if guide is not None and guided else None
    found = fit(y, settings, texture=texture, device=device, on_step=on_step, checkpoints=checkpoints)
    taken = {"guided": guided} | ({"precision_fallback": found.precision_fallback} if found.precision_fallback else {})
    x, k, offset = centred_pair(found.x, found.k)
    return finished(
        volume, x, k, top, preset=settings.preset, settings={**plain(settings), **taken},
        losses=found.losses, seconds=time.perf_counter() - start,
        metrics={"steps": float(found.steps), "resumed_at_step": float(found.resumed_at),
                 "kernel_offset_voxels": float(np.abs(offset).max())},
    )


def _texture(guide: Volume, like: Volume) -> NDArray[np.float32]:
    from deconv.texture import guide_map  # needs numba, which a run without CT does not

    return np.asarray(guide_map(guide, like), dtype=np.float32)
