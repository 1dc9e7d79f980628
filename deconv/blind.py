"""The blind solver: Gx and Gk fitted together to one image, stage by stage.

    y ≈ x↓ ∗ k,   x = Gx(zx),   k = softmax(Gk(zk)),   y scaled so that its maximum is 1

One loop runs every stage; what differs between them is data (`deconv.stages`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconv.finish import centred_pair
from deconv.kernels import FWHM_PER_SIGMA, gaussian
from deconv.losses import fidelity, kernel_excess, relative_squares, ssim
from deconv.networks import Gk, GkVector, Gx, VectorAdam
from deconv.operators import blur, blur_direct, downsample, resample, total_variation
from deconv.result import OnStep, Progress
from deconv.stages import Phase, Settings, Stage, shortened

__all__ = ["Diverged", "Fit", "Optimizers", "Step", "check_shape", "exact_cudnn", "fit", "objective"]


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True, eq=False)
class Fit:
    """x (2D, 2H, 2W) and k (d, h, w) as arrays, in units of max(y); losses by stage; steps done."""

    x: NDArray[np.float32]
    k: NDArray[np.float32]
    losses: dict[str, NDArray[np.float32]]
    steps: int


def check_shape(shape: tuple[int, ...], coarsest: float = 1.0) -> None:
    """Raise ValueError where a volume is too small for Gx's three halvings at the coarsest scale of a schedule."""
    if min(shape) < 4 or max(shape) * coarsest <= 8.5:
        raise ValueError(
            f"a volume of {tuple(shape)} voxels is too small for neural blind deconvolution: at least 4 along every "
            f"axis and {math.floor(8.5 / coarsest) + 1} along one"
        )


def exact_cudnn() -> AbstractContextManager[None]:
    """While it lasts cuDNN picks deterministic algorithms, none by timing, and no TF32. Nothing on a CPU."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def fit(
    y: NDArray[np.float32], settings: Settings, *, texture: NDArray[np.float32] | None, device: str | torch.device,
    on_step: OnStep | None = None,
) -> Fit:
    """Run the whole schedule on y (D, H, W), max 1; texture (D, H, W) in [0, 1] or None: unguided.

    Raises Diverged where the loss is not finite, ValueError for a volume that is too small; what on_step raises passes.
    """
    check_shape(y.shape, min(stage.scale for stage in settings.stages))
    settings = shortened(settings)
    solver = _Solver(torch.from_numpy(np.array(y)).to(device), settings, on_step)
    if texture is not None:
        solver.texture = torch.from_numpy(np.array(texture, dtype=np.float32)).to(device)
    with exact_cudnn():
        for stage in settings.stages:
            if solver.budget:
                solver.run(stage)
        x, k = solver.estimate()
    losses = {name: torch.stack(values).cpu().numpy() for name, values in solver.losses.items()}
    return Fit(x.cpu().numpy(), k.cpu().numpy(), losses, solver.done)


def objective(x: Tensor, k: Tensor, y: Tensor, phase: Phase, settings: Settings, texture: Tensor | None) -> Tensor:
    """The loss of one step. x (2D, 2H, 2W), k (d, h, w), y and texture (D, H, W) -> scalar"""
    x_down = downsample(x)
    convolve = blur if "fft_blur" in settings.rewrites else blur_direct
    y_hat = convolve(x_down, k, border=settings.border)
    loss = y.new_zeros(())
    if phase.fidelity:
        loss = loss + phase.fidelity * fidelity(y_hat - y)
    if phase.ssim:
        loss = loss + phase.ssim * (1 - ssim(y_hat, y))
    if phase.texture and texture is not None:
        dtype = torch.float32 if "float32_texture" in settings.rewrites else torch.float64
        loss = loss + phase.texture * (1 - ssim(x_down.to(dtype), texture.to(dtype))).to(loss.dtype)
    if phase.kernel:
        loss = loss + phase.kernel * kernel_excess(k, settings.kernel_threshold)
    if phase.tv:
        loss = loss + phase.tv * total_variation(x)
    return loss


class Optimizers:
    """Adam for Gx and for Gk, with one learning rate each; the vector form of Gk has its own step for its vector."""

    def __init__(self, gx: Gx, gk: Gk | GkVector, settings: Settings) -> None:
        fused = "fused_adam" in settings.rewrites
        rates = settings.learning_rate_x, settings.learning_rate_k
        self.x = torch.optim.Adam(gx.parameters(), lr=rates[0], fused=fused)
        self.vector: VectorAdam | None = None
        if isinstance(gk, GkVector):
            self.k = torch.optim.Adam([gk.out_weight, gk.out_bias], lr=rates[1], fused=fused)
            self.vector = VectorAdam(gk.hidden, gk.zk, lr=rates[1])
        else:
            self.k = torch.optim.Adam(gk.parameters(), lr=rates[1], fused=fused)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self.x.zero_grad(set_to_none=True)
        self.k.zero_grad(set_to_none=True)
        if self.vector:
            self.vector.zero_grad()

    def step(self) -> None:
        """One Adam step of everything."""
        self.x.step()
        self.k.step()
        if self.vector:
            self.vector.step()

    def halve(self) -> None:
        """Halve both learning rates."""
        for group in self.x.param_groups + self.k.param_groups:
            group["lr"] /= 2
        if self.vector:
            self.vector.lr /= 2


@dataclass
class Step:
    """The networks of one stage, their inputs and optimisers."""

    gx: Gx
    gk: Gk | GkVector
    zx: Tensor  # (1, 1, d, h, w)
    optimizers: Optimizers
    autocast: torch.dtype | None = None

    def images(self) -> tuple[Tensor, Tensor]:
        """x (2d, 2h, 2w) and k."""
        device = self.zx.device.type
        context = torch.autocast(device, dtype=self.autocast) if self.autocast else nullcontext()
        with context:
            x = self.gx(self.zx)
        return x[0, 0], self.gk()

    def descend(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One step down the gradient of loss_of(x, k). -> the loss before it"""
        self.optimizers.zero_grad()
        loss = loss_of(*self.images())
        loss.backward()
        self.optimizers.step()
        return loss.detach()


@dataclass
class _Solver:
    y: Tensor
    settings: Settings
    on_step: OnStep | None
    texture: Tensor | None = None
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    done: int = 0
    current: Step | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self.total = self.settings.steps
        self.gx = Gx(
            self.generator, output_scale=self.settings.output_scale, tail=self.settings.tail,
            early_tail="early_tail" in self.settings.rewrites,
        ).to(self.y.device)
        if "channels_last" in self.settings.rewrites:
            self.gx = self.gx.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    @property
    def budget(self) -> int:
        """Steps left."""
        return self.total - self.done

    def estimate(self) -> tuple[Tensor, Tensor]:
        """x and k after the last step."""
        assert self.current is not None
        with torch.no_grad():
            x, k = self.current.images()
            size = [2 * n for n in self.y.shape]
            # a run cut short by max_steps ends on a coarser grid
            return (resample(x, size) if list(x.shape) != size else x), k

    def run(self, stage: Stage) -> None:
        """One stage: take over the estimates of the one before, reproduce them, then minimise the objective."""
        size = [max(4, round(n * stage.scale)) for n in self.y.shape]
        y = resample(self.y, size)
        texture = None if self.texture is None else resample(self.texture, size)
        zx, zk = self._inputs(stage, size)
        self._take(stage, zx, zk)
        if stage.reproduce:
            goal = zx[0, 0], zk
            self._descend(f"{stage.name}: reproduce", stage.reproduce, lambda x, k, _: (
                relative_squares(downsample(x), goal[0]) + relative_squares(k, goal[1])))
            self._take(stage, zx, zk, gk=self._current.gk)  # fresh moments for the new objective
        self._descend(stage.name, stage.steps, lambda x, k, step: (
            objective(x, k, y, stage.phase(step), self.settings, texture)), halve_at=stage.halve_at)

    @property
    def _current(self) -> Step:
        assert self.current is not None
        return self.current

    def _inputs(self, stage: Stage, size: list[int]) -> tuple[Tensor, Tensor]:
        if self.current is None:
            zx = torch.rand(size, generator=self.generator).to(self.y)
            width = self.settings.zk_sigma_voxels * FWHM_PER_SIGMA
            zk = torch.from_numpy(gaussian(width, 1.0, (stage.kernel_size,) * 3)).to(self.y)
        else:
            with torch.no_grad():
                found = self.current.images()
            # without a guide the pair is free to drift apart on the coarse grid; the next one starts centred
            centred = centred_pair(*(part.float().cpu().numpy() for part in found))[:2]
            x, k = (torch.from_numpy(part).to(self.y) for part in centred)
            zx = resample(x, size)  # the doubled grid of the scale before, brought to this scale's grid
            zk = resample(k, (stage.kernel_size,) * 3)
            zk = zk / zk.sum()
        return zx[None, None].contiguous(), zk.contiguous()

    def _take(self, stage: Stage, zx: Tensor, zk: Tensor, gk: Gk | GkVector | None = None) -> None:
        if gk is None:
            form = GkVector if "kernel_vector" in self.settings.rewrites else Gk
            gk = form(zk.cpu(), self.generator).to(self.y.device)
        main = stage is self.settings.stages[-1]
        autocast = torch.bfloat16 if main and self.settings.precision == "bfloat16" else None
        self.current = Step(self.gx, gk, zx, Optimizers(self.gx, gk, self.settings), autocast)

    def _descend(
        self, name: str, steps: int, loss_of: Callable[[Tensor, Tensor, int], Tensor], halve_at: tuple[int, ...] = ()
    ) -> None:
        losses = self.losses.setdefault(name, [])
        for step in range(min(steps, self.budget)):
            if step in halve_at:
                self._current.optimizers.halve()
            losses.append(self._current.descend(lambda x, k, step=step: loss_of(x, k, step)))  # type: ignore[misc]
            self.done += 1
            self._report(name, losses[-1])

    def _report(self, name: str, loss: Tensor) -> None:
        # asking a CUDA device for a number waits for it: not at every step
        if self.y.device.type != "cpu" and self.done % 20 and self.done != self.total:
            return
        value = float(loss)
        if not math.isfinite(value):
            raise Diverged(f"{name}: the loss is {value} at step {self.done} of {self.total}")
        if self.on_step:
            self.on_step(Progress(name, self.done, self.total, value))
