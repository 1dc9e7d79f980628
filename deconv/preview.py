"""The preview of neural blind deconvolution: a kernel from the most informative region, then the whole volume.

    y = P(x ∗ k_w),   P the mean over 2 x 2 x 2 fine voxels,   k_w a Gaussian with FWHM w = (w_d, w_h, w_w) mm

1. Region: the box with the most gradient energy, bounded in size, so that the cost does not grow with the volume.
2. Width: for a fixed width w, TV deconvolution gives an image x_w. Its total variation stays flat while w is below the
   true width and climbs above it, where deconvolution begins to invent edges. On phantoms of 4.5 to 7.5 mm, with and
   without noise, d ln TV(x_w) / d ln w passes 1/2 within half a millimetre of the truth; so w minimises

       ln TV(x_w) − ½ ln w + 0.1 · ½ (ln(w / w_prior) / s)²

   for one common width.
3. Networks: Gx learns to reproduce x_w, Gk to yield w; then both are fitted to the region together, as in the paper,
   with fidelity, TV and the prior around w. Gk has three outputs, the logarithms of the widths, bounded: this kernel is
   smooth and centred and cannot collapse to a delta.
4. The whole volume, or the region asked for, is deconvolved with k_w by TV, in tiles that share the kernel; borders are
   replicated, x ≥ 0.

It is a preview: a Gaussian kernel, few steps. "paper" runs the published schedule.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import skip_init

from deconv.blind import check_shape, exact_cudnn
from deconv.finish import finished, normalised, plain
from deconv.kernels import FWHM_PER_SIGMA, gaussian
from deconv.losses import relative_squares
from deconv.networks import Gx, draw
from deconv.operators import blur, downsample, total_variation
from deconv.region import check_spec, region
from deconv.result import Deconvolution, OnStep, Progress
from deconv.tiles import require_memory
from deconv.tv import tv_deconvolve, tv_tiled
from deconv.volume import Volume

__all__ = [
    "Gw", "PREVIEW", "Region", "Settings", "deconvolve", "gaussian_tensor", "informative_region", "kernel_on_pet_grid",
    "width_profile",
]

Float3 = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Everything that, with the source, determines the preview. Plain values.

    region_voxels     largest region (D, H, W) on which the width is found;    network_voxels  the part of it with the
                      most gradient energy, on which the networks are fitted.
    fwhm_bounds_mm    the kernel's FWHM never leaves them.
    fwhm_prior_mm     centre of the width's prior: what clinical PET reaches after reconstruction and filter.
    prior_log_sd      its standard deviation, of ln w.
    profile_widths    widths tried between the bounds;    profile_iterations  of TV deconvolution for each.
    reproduce_steps   in which Gx and Gk learn the start;   network_steps  in which both are fitted together.
    tv_weight         of TV in every deconvolution, for an image whose maximum is 1.
    iterations        of TV deconvolution for the whole volume.
    memory_gb         what source, output and tiles may take together; decides the tile.
    region            what is deblurred, see deconv/region.py; outside it the source is interpolated.
    """

    preset: str
    region_voxels: tuple[int, int, int] = (24, 40, 40)
    network_voxels: tuple[int, int, int] = (16, 32, 32)
    fwhm_bounds_mm: tuple[float, float] = (3.5, 10.0)
    fwhm_prior_mm: float = 6.0
    prior_log_sd: float = 0.3
    profile_widths: int = 9
    profile_iterations: int = 15
    reproduce_steps: int = 25
    network_steps: int = 45
    learning_rate_x: float = 1e-3
    learning_rate_k: float = 2e-3
    output_scale: float = 1.5
    tv_weight: float = 2e-3
    iterations: int = 20
    memory_gb: float = 2.0
    region: str = "whole"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("region_voxels", "network_voxels", "fwhm_bounds_mm"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        low, high = self.fwhm_bounds_mm
        if not 0 < low < self.fwhm_prior_mm < high:
            raise ValueError(f"the prior of {self.fwhm_prior_mm} mm must lie between its bounds {low} and {high} mm")
        counts = (self.profile_iterations, self.iterations, *self.region_voxels, *self.network_voxels)
        if min(counts) < 1 or self.profile_widths < 3 or min(self.reproduce_steps, self.network_steps) < 0:
            raise ValueError("counts must be positive, profile_widths at least 3")
        require_memory(self.memory_gb)
        check_spec(self.region)


PREVIEW = Settings(preset="preview")

Region = tuple[slice, slice, slice]


def informative_region(y: NDArray[np.float32], spacing: Float3, largest: tuple[int, int, int]) -> Region:
    """The box of at most `largest` voxels that holds the most gradient energy of y (D, H, W)."""
    size = [min(n, m) for n, m in zip(y.shape, largest, strict=True)]
    energy = np.zeros(y.shape, dtype=np.float64)
    for axis in range(3):
        if y.shape[axis] > 1:
            energy += (np.gradient(y.astype(np.float64), float(spacing[axis]), axis=axis)) ** 2
    sums = np.pad(energy.cumsum(0).cumsum(1).cumsum(2), ((1, 0),) * 3)
    for axis, n in enumerate(size):  # sums over boxes from the integral image
        low = [slice(None)] * 3
        high = [slice(None)] * 3
        low[axis], high[axis] = slice(0, sums.shape[axis] - n), slice(n, None)
        sums = sums[tuple(high)] - sums[tuple(low)]
    corner = np.unravel_index(int(np.argmax(sums)), sums.shape)
    d, h, w = (slice(int(c), int(c) + n) for c, n in zip(corner, size, strict=True))
    return d, h, w


def width_profile(
    cost: Callable[[float], float], settings: Settings, *, on_try: Callable[[float], None]
) -> float:
    """The width w (mm) between the bounds that minimises `cost`: a row of widths, then between the best three.

    One width for all axes: along a single axis the image's own anisotropy outweighs the kernel's. The minimum between
    tried widths is that of a parabola in ln w. on_try is called with every cost.
    """
    low, high = np.log(settings.fwhm_bounds_mm)
    logs = np.linspace(low, high, settings.profile_widths)
    costs = []
    for value in logs:
        costs.append(cost(float(np.exp(value))))
        on_try(costs[-1])
    return float(np.exp(_lowest(logs, np.array(costs))))


def _lowest(places: NDArray[np.float64], costs: NDArray[np.float64]) -> float:
    i = int(np.argmin(costs))
    if i in (0, len(places) - 1):
        return float(places[i])
    left, mid, right = costs[i - 1 : i + 2]
    return float(places[i] + 0.5 * (left - right) / (left - 2 * mid + right) * (places[1] - places[0]))


class Gw(nn.Module):
    """Gk with three outputs: FWHM (3,) mm along (D, H, W), from a fixed input; bounded; at first `start`."""

    zk: Tensor

    def __init__(self, start: Float3, bounds: tuple[float, float], generator: torch.Generator) -> None:
        super().__init__()
        low, high = bounds
        share = np.clip(np.log(start / low) / np.log(high / low), 0.02, 0.98)
        self.low, self.span = low, float(np.log(high / low))
        self.register_buffer("zk", torch.from_numpy(np.log(share / (1 - share))).float())
        self.hidden = skip_init(nn.Linear, 3, 15)
        self.out = skip_init(nn.Linear, 15, 3)
        draw(self, generator)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self) -> Tensor:
        """-> FWHM (3,) mm."""
        return self.low * torch.exp(self.span * torch.sigmoid(self.zk + self.out(torch.relu(self.hidden(self.zk)))))


def gaussian_tensor(fwhm_mm: Tensor, spacing_mm: Float3, shape: tuple[int, ...]) -> Tensor:
    """`kernels.gaussian` with a gradient: FWHM (3,) -> kernel (d, h, w), sum 1."""
    profiles = []
    for axis, n in enumerate(shape):
        edges = (torch.arange(n + 1, device=fwhm_mm.device) - n / 2) * float(spacing_mm[axis])
        mass = torch.special.ndtr(edges * FWHM_PER_SIGMA / fwhm_mm[axis]).diff()
        profiles.append(mass / mass.sum())
    return profiles[0][:, None, None] * profiles[1][:, None] * profiles[2]


class _Counter:
    """Counts steps over the whole preview and tells `on_step`."""

    def __init__(self, steps: int, on_step: OnStep | None) -> None:
        self.steps, self.on_step, self.done = steps, on_step, 0

    def __call__(self, stage: str, loss: float) -> None:
        self.done += 1
        if self.on_step:
            self.on_step(Progress(stage, min(self.done, self.steps), self.steps, loss))

    def last(self, steps: int, stage: str) -> OnStep:
        """For a last stage of `steps`, by the share of it that is done, however many tiles it is worked off in."""
        before = self.done

        def report(progress: Progress) -> None:
            self.done = max(self.done, before + steps * progress.step // progress.steps) - 1
            self(stage, progress.loss)

        return report


def deconvolve(
    volume: Volume, settings: Settings, *, device: str | torch.device = "cpu", on_step: OnStep | None = None
) -> Deconvolution:
    """Deblur and double `volume`; see the module.

    Raises ValueError for a volume without activity, without edges, or too small.
    """
    start = time.perf_counter()
    found = region(volume, settings.region)
    inner = found.cropped(volume)
    check_shape(inner.shape)
    y, top = normalised(inner)
    if y.min() == y.max():
        raise ValueError("the volume is the same everywhere: it has no edge that could tell how wide its blur is")
    spacing = volume.spacing
    count = _Counter(
        settings.profile_widths + settings.reproduce_steps + settings.network_steps + settings.iterations, on_step
    )
    box = y[informative_region(y, spacing, settings.region_voxels)]
    profiled, at_bound = _profiled(torch.from_numpy(box / box.max()).to(device), spacing, settings, count)
    widths = np.full(3, profiled)
    losses: dict[str, NDArray[np.float32]] = {}
    if settings.network_steps:
        part = torch.from_numpy(box[informative_region(box, spacing, settings.network_voxels)]).to(device)
        widths, losses = _Networks(part / part.max(), spacing, widths, settings, count).fitted()
    tiled = tv_tiled(
        torch.from_numpy(y).to(device), gaussian(widths, spacing / 2), kernel_grid="fine", lam=settings.tv_weight,
        memory_bytes=settings.memory_gb * 1e9, iterations=settings.iterations, spacing=tuple(spacing),
        on_step=count.last(settings.iterations, "whole volume"),
    )
    metrics = {"kernel_at_prior_bound": float(at_bound), "profile_fwhm_mm": profiled}
    for axis, name in enumerate("dhw"):
        metrics[f"kernel_fwhm_{name}_mm"] = metrics[f"psf_fwhm_{name}_mm"] = float(widths[axis])
    return finished(
        volume, tiled.image, kernel_on_pet_grid(widths, spacing), top, preset=settings.preset,
        settings={**plain(settings), "region_box": found.text, "tile": list(tiled.tile)},
        losses=losses, seconds=time.perf_counter() - start, metrics={**metrics, "tiles": float(tiled.count)},
        region=found,
    )


def kernel_on_pet_grid(widths: Float3, spacing: Float3) -> NDArray[np.float32]:
    """The kernel k (d, h, w) of voxels `spacing` for which x↓ ∗ k comes closest to P(x ∗ k_w).

    Integrating k_w over PET voxels would count the mean over a voxel twice; sampling it would be right for an image
    without edges. Measured on PET and phantoms, taking off half the voxel's variance s²/12 leaves the least residual.
    """
    narrower = widths**2 - 0.5 * FWHM_PER_SIGMA**2 * spacing**2 / 12.0
    return gaussian(np.sqrt(np.maximum(narrower, (0.5 * widths) ** 2)), spacing)


def _profiled(region: Tensor, spacing: Float3, settings: Settings, count: _Counter) -> tuple[float, bool]:
    """The width by `width_profile` on the region, and whether it lies on a bound."""

    def cost(width: float) -> float:
        x = _sharp(region, spacing, np.full(3, width), settings)
        prior = 0.5 * (np.log(width / settings.fwhm_prior_mm) / settings.prior_log_sd) ** 2
        return float(np.log(float(total_variation(x))) - 0.5 * np.log(width) + PRIOR_WEIGHT * prior)

    width = width_profile(cost, settings, on_try=partial(count, "kernel width"))
    low, high = settings.fwhm_bounds_mm
    return width, not low * 1.001 < width < high * 0.999


#: of the prior against ln TV, whose curvature about its minimum is near 2 per (ln w)² on phantoms
PRIOR_WEIGHT = 0.1
#: of the start against TV in the networks' loss: they may correct the width by some per cent, not replace it
PULL = 3e-2


def _sharp(region: Tensor, spacing: Float3, widths: Float3, settings: Settings) -> Tensor:
    return tv_deconvolve(
        region, gaussian(widths, spacing / 2), kernel_grid="fine", lam=settings.tv_weight,
        iterations=settings.profile_iterations, spacing=tuple(spacing),
    )


class _Networks:
    """Gx and Gw on the region: first they reproduce the start, then they are fitted together."""

    def __init__(self, y: Tensor, spacing: Float3, start: Float3, settings: Settings, count: _Counter) -> None:
        self.y, self.spacing, self.settings, self.count = y, spacing, settings, count
        generator = torch.Generator().manual_seed(settings.seed)
        self.gx = Gx(generator, output_scale=settings.output_scale).to(y.device)
        self.gx = self.gx.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.gw = Gw(start, settings.fwhm_bounds_mm, generator).to(y.device)
        self.start = torch.from_numpy(start).to(y)
        self.goal = _sharp(y, spacing, start, settings)
        self.zx = downsample(self.goal)[None, None]
        self.shape = gaussian(settings.fwhm_bounds_mm[1], spacing / 2).shape
        self.optimizer = torch.optim.Adam(
            [{"params": self.gx.parameters(), "lr": settings.learning_rate_x},
             {"params": self.gw.parameters(), "lr": settings.learning_rate_k}], fused=True,
        )

    def fitted(self) -> tuple[Float3, dict[str, NDArray[np.float32]]]:
        """-> widths mm, losses by stage"""
        with exact_cudnn():
            losses = {
                "reproduce": self._descend("reproduce", self.settings.reproduce_steps, self._reproduction),
                "networks": self._descend("networks", self.settings.network_steps, self._objective),
            }
        with torch.no_grad():
            widths = self.gw().cpu().numpy().astype(np.float64)
        return widths, losses

    def _descend(self, stage: str, steps: int, loss_of: Callable[[], Tensor]) -> NDArray[np.float32]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_of()
            loss.backward()
            self.optimizer.step()
            losses.append(float(loss.detach()))
            self.count(stage, losses[-1])
        return np.array(losses, dtype=np.float32)

    def _reproduction(self) -> Tensor:
        return relative_squares(self.gx(self.zx)[0, 0], self.goal)

    def _objective(self) -> Tensor:
        """½ |P(x ∗ k_w) − y|² + weight · (TV(x) + pull to the start), means over the voxels."""
        x, widths = self.gx(self.zx)[0, 0], self.gw()
        k = gaussian_tensor(widths, self.spacing / 2, self.shape)
        residual = downsample(blur(x, k)) - self.y
        prior = ((widths / self.start).log() / 0.1).square().mean()
        weight = self.settings.tv_weight
        return 0.5 * residual.square().mean() + weight * (total_variation(x) + PULL * prior)
