"""The blind solver: Gx and Gk fitted together to one image, stage by stage.

    y ≈ x↓ ∗ k,   x = Gx(zx),   k = softmax(Gk(zk)),   y scaled so that its maximum is 1

One loop runs every stage; what differs between them is data (`deconv.stages`). It can be left after any step and taken
up again from a checkpoint, with the same bits at the end. A stage in bfloat16 whose loss or estimate is not finite is
run again from its start in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deconv.checkpoint import Checkpoint, Checkpoints
from deconv.finish import centred_pair, plain
from deconv.kernels import FWHM_PER_SIGMA, gaussian
from deconv.losses import fidelity, kernel_excess, relative_squares, ssim
from deconv.networks import Gk, GkVector, Gx, VectorAdam
from deconv.operators import blur, blur_direct, downsample, resample, total_variation
from deconv.result import OnStep, Progress
from deconv.stages import Phase, Settings, Stage, shortened

__all__ = ["Diverged", "Fit", "Optimizers", "Step", "check_shape", "deterministic", "exact_cudnn", "fit", "objective"]


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True, eq=False)
class Fit:
    """x (2D, 2H, 2W) and k (d, h, w) as arrays, in units of max(y); losses by stage; steps done.

    precision_fallback  the stage that bfloat16 did not carry and that was run again in float32, or "".
    resumed_at          steps that a checkpoint saved.
    """

    x: NDArray[np.float32]
    k: NDArray[np.float32]
    losses: dict[str, NDArray[np.float32]]
    steps: int
    precision_fallback: str = ""
    resumed_at: int = 0


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


@contextmanager
def deterministic() -> Iterator[None]:
    """While it lasts the same machine gives the same bits: `exact_cudnn`, and torch's deterministic algorithms.

    On a CPU the number of threads must be the same, too: sums are split among them. On CUDA cuBLAS also needs
    CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before its first use. An operation of which torch has no
    deterministic form warns; this package uses none (`deconv.operators`).
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    guard: Any = torch.utils.deterministic
    fill = guard.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    guard.fill_uninitialized_memory = False  # it guards against bugs, at the price of a pass
    try:
        with exact_cudnn():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        guard.fill_uninitialized_memory = fill


def fit(
    y: NDArray[np.float32], settings: Settings, *, texture: NDArray[np.float32] | None, device: str | torch.device,
    on_step: OnStep | None = None, checkpoints: Checkpoints | None = None,
) -> Fit:
    """Run the whole schedule on y (D, H, W), max 1; texture (D, H, W) in [0, 1] or None: unguided.

    Raises Diverged where the loss is not finite, ValueError for a volume that is too small; what on_step raises passes.
    """
    check_shape(y.shape, min(stage.scale for stage in settings.stages))
    kept = checkpoints.of("blind", (y, texture), plain(settings), device=device) if checkpoints else None
    settings = shortened(settings)
    solver = _Solver(torch.from_numpy(np.array(y)).to(device), settings, on_step, kept)
    if texture is not None:
        solver.texture = torch.from_numpy(np.array(texture, dtype=np.float32)).to(device)
    with deterministic():
        x, k = solver.solve()
    losses = {name: torch.stack(values).cpu().numpy() for name, values in solver.losses.items()}
    return Fit(x.cpu().numpy(), k.cpu().numpy(), losses, solver.done, solver.fallback, solver.resumed_at)


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

    def state(self) -> dict[str, Any]:
        """All moments, counts and rates."""
        found: dict[str, Any] = {"x": self.x.state_dict(), "k": self.k.state_dict()}
        return found | ({"vector": self.vector.state()} if self.vector else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.x.load_state_dict(state["x"])
        self.k.load_state_dict(state["k"])
        if self.vector:
            self.vector.restore(state["vector"])


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

    def parameters(self) -> Iterator[Tensor]:
        """Of both networks."""
        yield from self.gx.parameters()
        yield from self.gk.parameters()

    def descend(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One step down the gradient of loss_of(x, k). -> the loss before it"""
        self.optimizers.zero_grad()
        loss = loss_of(*self.images())
        loss.backward()
        self.optimizers.step()
        return loss.detach()


@dataclass
class _Solver:
    """The place in the schedule (stage, part, step), the networks, and what the stage began with.

    part    0 while the networks reproduce their inputs, 1 while they minimise the objective.
    begun   of the stage: its inputs zx and zk, Gx's weights, the generator's state before Gk was drawn, steps done.
    """

    y: Tensor
    settings: Settings
    on_step: OnStep | None
    checkpoint: Checkpoint | None = None
    texture: Tensor | None = None
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    done: int = 0
    stage: int = 0
    part: int = 0
    step: int = 0
    fallback: str = ""
    resumed_at: int = 0
    found: tuple[Tensor, Tensor] | None = None
    begun: dict[str, Any] = field(default_factory=dict)

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

    @property
    def at(self) -> Stage:
        """The stage that runs."""
        return self.settings.stages[self.stage]

    def solve(self) -> tuple[Tensor, Tensor]:
        """x (2D, 2H, 2W) and k after the last step of the last stage."""
        if not self._resume():
            self._enter(0)
        while True:
            try:
                x, k = self.found = self._run()
            except Diverged:
                if self.current.autocast is None:
                    raise
                self._fall_back()
                continue
            if self.stage + 1 == len(self.settings.stages) or not self.budget:
                break
            self._enter(self.stage + 1)
        size = [2 * n for n in self.y.shape]
        # a run cut short by max_steps ends on a coarser grid
        return (resample(x, size) if list(x.shape) != size else x), k

    def _enter(self, stage: int) -> None:
        """Begin a stage with the estimates of the one before."""
        self.stage, self.part, self.step = stage, 0, 0
        zx, zk = self._inputs(self.at)
        weights = {name: value.clone() for name, value in self.gx.state_dict().items()}
        self.begun = {"zx": zx, "zk": zk, "gx": weights, "generator": self.generator.get_state(), "done": self.done}
        self._take()

    def _run(self) -> tuple[Tensor, Tensor]:
        """From the place reached to the end of the stage: reproduce the inputs, then minimise. -> x, k

        Raises Diverged where the loss or the estimate is not finite.
        """
        stage, zx, zk = self.at, self.begun["zx"], self.begun["zk"]
        size = zx.shape[-3:]
        y = resample(self.y, size)
        texture = None if self.texture is None else resample(self.texture, size)
        if stage.reproduce and self.part == 0:
            self._descend(f"{stage.name}: reproduce", stage.reproduce, lambda x, k, _: (
                relative_squares(downsample(x), zx[0, 0]) + relative_squares(k, zk)))
            self._take(gk=self.current.gk)  # fresh moments for the new objective
        if self.part == 0:
            self.part, self.step = 1, 0
        self._descend(stage.name, stage.steps, lambda x, k, step: (
            objective(x, k, y, stage.phase(step), self.settings, texture)), halve_at=stage.halve_at)
        with torch.no_grad():
            x, k = self.current.images()
        if not bool(torch.isfinite(x).all() and torch.isfinite(k).all()):
            raise Diverged(f"{stage.name}: the estimate is not finite after step {self.done} of {self.total}")
        return x, k

    def _fall_back(self) -> None:
        """Begin the stage again, in float32; the losses of the attempt stay, under another name."""
        self.fallback = self.at.name
        for name in (f"{self.at.name}: reproduce", self.at.name):
            if name in self.losses:
                self.losses[f"{name}, bfloat16, not finite"] = self.losses.pop(name)
        self.part, self.step, self.done = 0, 0, self.begun["done"]
        self._begin()

    def _begin(self) -> None:
        """The networks as they were when the stage began."""
        self.gx.load_state_dict(self.begun["gx"])
        self.generator.set_state(self.begun["generator"])
        self._take()

    def _inputs(self, stage: Stage) -> tuple[Tensor, Tensor]:
        size = [max(4, round(n * stage.scale)) for n in self.y.shape]
        if self.found is None:
            zx = torch.rand(size, generator=self.generator).to(self.y)
            width = self.settings.zk_sigma_voxels * FWHM_PER_SIGMA
            zk = torch.from_numpy(gaussian(width, 1.0, (stage.kernel_size,) * 3)).to(self.y)
        else:
            # without a guide the pair is free to drift apart on the coarse grid; the next one starts centred
            centred = centred_pair(*(part.float().cpu().numpy() for part in self.found))[:2]
            x, k = (torch.from_numpy(part).to(self.y) for part in centred)
            zx = resample(x, size)  # the doubled grid of the scale before, brought to this scale's grid
            zk = resample(k, (stage.kernel_size,) * 3)
            zk = zk / zk.sum()
        return zx[None, None].contiguous(), zk.contiguous()

    def _take(self, gk: Gk | GkVector | None = None) -> None:
        """Optimisers without a past, and a Gk drawn anew where none is given."""
        if gk is None:
            form = GkVector if "kernel_vector" in self.settings.rewrites else Gk
            gk = form(self.begun["zk"].cpu(), self.generator).to(self.y.device)
        # pre-training is cheap and sets the course: bfloat16 is for the main stage
        low = self.at is self.settings.stages[-1] and self.settings.precision == "bfloat16" and not self.fallback
        optimizers = Optimizers(self.gx, gk, self.settings)
        self.current = Step(self.gx, gk, self.begun["zx"], optimizers, torch.bfloat16 if low else None)

    def _descend(
        self, name: str, steps: int, loss_of: Callable[[Tensor, Tensor, int], Tensor], halve_at: tuple[int, ...] = ()
    ) -> None:
        losses = self.losses.setdefault(name, [])
        while self.step < steps and self.budget:
            step = self.step
            if step in halve_at:
                self.current.optimizers.halve()
            losses.append(self.current.descend(lambda x, k, step=step: loss_of(x, k, step)))  # type: ignore[misc]
            self.step += 1
            self.done += 1
            if self.checkpoint:
                self.checkpoint.offer(self._state)
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

    # --- checkpoints

    def _state(self) -> dict[str, Any] | None:
        """Everything that the steps to come depend on; None where the weights are not fit to be kept."""
        if not all(bool(torch.isfinite(value).all()) for value in self.current.parameters()):
            return None
        return {
            "stage": self.stage, "part": self.part, "step": self.step, "done": self.done, "fallback": self.fallback,
            "begun": self.begun, "gx": self.gx.state_dict(), "gk": self.current.gk.state_dict(),
            "optimizers": self.current.optimizers.state(),
            "losses": {name: torch.stack(values) for name, values in self.losses.items() if values},
        }

    def _resume(self) -> bool:
        """Take up the run where a checkpoint left it; whether there was one."""
        kept = self.checkpoint.load() if self.checkpoint else None
        if kept is None:
            return False
        self.stage, self.part, self.step, self.done = (int(kept[key]) for key in ("stage", "part", "step", "done"))
        self.fallback, self.resumed_at = str(kept["fallback"]), self.done
        begun = kept["begun"]
        self.begun = {**begun, "zx": begun["zx"].to(self.y), "zk": begun["zk"].to(self.y)}
        self._begin()
        self.gx.load_state_dict(kept["gx"])
        self.current.gk.load_state_dict(kept["gk"])
        self.current.optimizers.restore(kept["optimizers"])
        self.losses = {name: list(values.to(self.y).unbind()) for name, values in kept["losses"].items()}
        return True
