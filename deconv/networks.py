"""Gx and Gk, the two untrained networks of neural blind deconvolution [S24], and the exact rewrites of both.

Gx   3-level U-Net with more channels outside than inside; 0.97 million parameters. Input (1, 1, D, H, W) of any size,
     output s · sigmoid on the doubled grid (1, 1, 2D, 2H, 2W).
Gk   n -> 5n -> n fully connected with ReLU, then softmax; n = kernel voxels. Its input zk never changes within a stage.

Parameters are drawn from a torch.Generator on the CPU, whatever the device, and the global one is not touched.
[S24] Sample et al. 2024, doi:10.1088/1361-6560/ad36a9, Figure 1 and "Model Architecture".
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from deconv.operators import resample

__all__ = ["Gk", "GkVector", "Gx", "Tail", "VectorAdam", "draw"]

Tail = Literal["pointwise", "spatial"]

DOWN = (80, 60, 40)
UP = (60, 50, 40)
SKIP = 64
SHORTEST_LOW = 4  # voxels along the shortest axis of a convolution in bfloat16 on a CPU


class Gx(nn.Module):
    """x = Gx(zx): an image from a fixed input.

    output_scale   s: x lies in (0, s), where y lies in [0, 1].
    tail           after the last x2 upsampling, the second convolution is "pointwise" (1x1x1, as the authors' code
                   and the stated 0.97 million parameters have it) or "spatial" (3x3x3: learns on the doubled grid).
    early_tail     rewrite: the pointwise tail's last convolution runs before the upsampling. Linear interpolation
                   has weights that sum to 1, so the two commute, and one channel is upsampled instead of 60.
    """

    def __init__(
        self, generator: torch.Generator, *, output_scale: float, tail: Tail = "pointwise", early_tail: bool = True
    ) -> None:
        super().__init__()
        if tail not in ("pointwise", "spatial"):
            raise ValueError(f"tail is 'pointwise' or 'spatial', got {tail!r}")
        self.output_scale, self.tail, self.early_tail = output_scale, tail, early_tail
        self.down, self.up, self.skip = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = 1
        for level, (down, up) in enumerate(zip(DOWN, UP, strict=True)):
            self.skip.append(_Convolution(channels, SKIP, 1))
            self.down.append(nn.Sequential(_Convolution(channels, down, 3, stride=2), _Convolution(down, down, 3)))
            below = UP[level + 1] if level + 1 < len(UP) else DOWN[-1]
            self.up.append(nn.Sequential(_Convolution(SKIP + below, up, 3), _Convolution(up, up, 1)))
            channels = down
        size = 1 if tail == "pointwise" else 3
        self.tail_first = _Conv(UP[0], UP[0], size)
        self.tail_last = _Conv(UP[0], 1, 1)
        draw(self, generator)

    def forward(self, z: Tensor) -> Tensor:
        """z (1, 1, D, H, W) -> x (1, 1, 2D, 2H, 2W)."""
        kept, h = [], z
        for skip, down in zip(self.skip, self.down, strict=True):
            kept.append(skip(h))
            h = down(h)
        for skipped, up in zip(reversed(kept), reversed(self.up), strict=True):
            h = up(torch.cat([skipped, _upsample(h, skipped.shape[-3:])], dim=1))
        return self.output_scale * torch.sigmoid(self._tail(h).float())

    def _tail(self, h: Tensor) -> Tensor:
        doubled = [2 * n for n in h.shape[-3:]]
        if self.tail == "spatial":
            return self.tail_last(F.leaky_relu(self.tail_first(_upsample(h, doubled)), 0.2))
        if self.early_tail:
            return resample(self.tail_last(self.tail_first(h)).float(), doubled)
        return self.tail_last(_upsample(self.tail_first(h), doubled))


class _Convolution(nn.Sequential):
    """Convolution, batch norm, LeakyReLU 0.2."""

    def __init__(self, channels_in: int, channels_out: int, size: int, stride: int = 1) -> None:
        super().__init__(
            _Conv(channels_in, channels_out, size, stride),
            nn.BatchNorm3d(channels_out, track_running_stats=False),
            nn.LeakyReLU(0.2, inplace=True),
        )


class _Conv3d(nn.Conv3d):
    """A convolution that stays in float32 where bfloat16 on a CPU cannot be trusted.

    Measured (torch 2.13, oneDNN): in bfloat16 the gradient of the weights reads memory that was never written where an
    axis is shorter than the kernel: other bits at every run, at times NaN. Only the coarsest levels are that short.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (1, C, d, h, w) -> the convolution."""
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(x.shape[-3:]) < SHORTEST_LOW:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


def _Conv(channels_in: int, channels_out: int, size: int, stride: int = 1) -> nn.Conv3d:
    return skip_init(_Conv3d, channels_in, channels_out, size, stride=stride, padding=size // 2)  # type: ignore[return-value]


def _upsample(h: Tensor, size: Any) -> Tensor:
    if h.device.type == "cpu":
        return F.interpolate(h, size=tuple(size), mode="trilinear", align_corners=False)
    return resample(h, size)  # the library's gradient adds in no fixed order on CUDA


def draw(network: nn.Module, generator: torch.Generator) -> None:
    """Weights and biases uniform in ±1/sqrt(fan in), the library's default, from `generator`; batch norm 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            bound = float(module.weight[0].numel()) ** -0.5
            with torch.no_grad():
                module.weight.uniform_(-bound, bound, generator=generator)
                assert module.bias is not None
                module.bias.uniform_(-bound, bound, generator=generator)


class Gk(nn.Module):
    """k = softmax(Gk(zk)): a kernel from a fixed input, in the paper's form.

    zk (d, h, w); the network holds 10 n² + 6 n parameters, 113.9 million for n = 15³.
    """

    zk: Tensor

    def __init__(self, zk: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        n = zk.numel()
        self.shape = tuple(zk.shape)
        self.register_buffer("zk", zk.reshape(-1).clone())
        self.hidden = skip_init(nn.Linear, n, 5 * n)
        self.out = skip_init(nn.Linear, 5 * n, n)
        draw(self, generator)

    def forward(self) -> Tensor:
        """-> k (d, h, w), positive, sum 1."""
        return torch.softmax(self.out(torch.relu(self.hidden(self.zk))), dim=0).reshape(self.shape)


class GkVector(nn.Module):
    """Gk with its first layer seen as one vector: a = W1 zk + b1, because zk is constant.

    Under plain Adam the gradient of W1 is the outer product (∂L/∂a) zkᵀ, so both its moments are outer products too and
    its update moves `a` by a number that needs only the moments of ∂L/∂a: `VectorAdam`. Hidden units with a ≤ 0 at the
    start have no gradient, hence no update, for ever: they and their columns of W2 are left out.
    """

    zk: Tensor

    def __init__(self, zk: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        full = Gk(zk, generator)
        self.shape = full.shape
        with torch.no_grad():
            hidden = full.hidden(full.zk)
            alive = hidden > 0
            self.register_buffer("zk", full.zk)
            self.hidden = nn.Parameter(hidden[alive].clone())
            self.out_weight = nn.Parameter(full.out.weight[:, alive].clone())
            self.out_bias = nn.Parameter(full.out.bias.clone())

    def forward(self) -> Tensor:
        """-> k (d, h, w), positive, sum 1."""
        logits = F.linear(torch.relu(self.hidden), self.out_weight, self.out_bias)
        return torch.softmax(logits, dim=0).reshape(self.shape)


class VectorAdam:
    """Adam on W1 and b1, carried out on a = W1 zk + b1 (see `GkVector`).

    With g = ∂L/∂a, m̂ and v̂ its bias-corrected moments and s = sqrt(v̂), Adam's steps of W1 and b1 change a by

        Δa = −lr · m̂ · [ f(s) + 1 / (s + ε) ],      f(s) = Σ_j zk_j² / (s |zk_j| + ε).

    f is one smooth function of one number. It is tabulated in float64 when the stage starts and interpolated in
    log-log, to 1e-8 relative; ε matters because zk sums to 1 and most of its voxels are tiny.
    """

    def __init__(self, a: nn.Parameter, zk: Tensor, *, lr: float, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8) -> None:
        self.a, self.lr, self.betas, self.eps = a, lr, betas, eps
        self.m, self.v = torch.zeros_like(a), torch.zeros_like(a)
        self.steps = 0
        z = np.abs(zk.detach().cpu().numpy().astype(np.float64).ravel())
        self._low, self._high, self._nodes = np.log(1e-30), np.log(1e10), 4096
        s = np.exp(np.linspace(self._low, self._high, self._nodes))
        log_f = np.log(np.array([np.sum(z * z / (value * z + eps)) for value in s]))
        self._log_f = torch.from_numpy(log_f).to(a.device)

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.a.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One Adam step from a.grad."""
        g = self.a.grad
        if g is None:
            return
        self.steps += 1
        first, second = self.betas
        self.m.lerp_(g, 1 - first)
        self.v.mul_(second).addcmul_(g, g, value=1 - second)
        m = self.m / (1 - first**self.steps)
        s = (self.v / (1 - second**self.steps)).sqrt()
        self.a.sub_(self.lr * m * (self._f(s) + 1 / (s + self.eps)))

    def state(self) -> dict[str, Any]:
        """Moments, steps and rate."""
        return {"m": self.m, "v": self.v, "steps": self.steps, "lr": self.lr}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.m, self.v = state["m"].to(self.m), state["v"].to(self.v)
        self.steps, self.lr = int(state["steps"]), float(state["lr"])

    def _f(self, s: Tensor) -> Tensor:
        """f(s) by cubic (Catmull-Rom) interpolation of log f over log s."""
        place = (s.double().clamp(1e-30, 1e10).log() - self._low) / (self._high - self._low) * (self._nodes - 1)
        i = place.long().clamp(1, self._nodes - 3)
        t = place - i
        p0, p1, p2, p3 = (self._log_f[i + k] for k in (-1, 0, 1, 2))
        log_f = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
        return log_f.exp().to(s.dtype)
