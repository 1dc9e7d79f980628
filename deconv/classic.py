"""Classic methods behind the one door: Richardson-Lucy, total variation, cubic and nearest interpolation.

Richardson-Lucy and TV need the PSF; interpolation deblurs nothing. They are yardsticks for blind deconvolution and
useful where the PSF of scanner and reconstruction is known.

    Richardson-Lucy   x <- x · A^T(y / A x) / A^T 1, A as in deconv/pooled.py
                      (Richardson, J. Opt. Soc. Am. 62, 55, 1972; Lucy, Astron. J. 79, 745, 1974)
    TV                deconv/tv.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deconv.finish import residual
from deconv.interpolate import doubled, doubled_nearest
from deconv.kernels import skewed
from deconv.metrics import activity_change, kernel_fwhm_mm
from deconv.pooled import PooledBlur
from deconv.region import check_spec, region
from deconv.result import Deconvolution, OnStep, Progress
from deconv.tiles import require_memory
from deconv.tv import tv_tiled, tv_weight
from deconv.volume import Volume

__all__ = [
    "METHODS", "ClassicMethod", "CubicSettings", "NearestSettings", "RichardsonLucySettings", "TVSettings",
    "richardson_lucy",
]

KernelTuple = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class _WithPsf:
    """The PSF: a Gaussian by its FWHM in mm (one number or three along D, H, W), or a kernel on the PET grid.

    psf_skew      along (D, H, W), in (-1, 1): two half Gaussians instead of one Gaussian (kernels.split_normal).
    psf_kernel    nested sequences or an array (d, h, w), odd sizes; wins over psf_fwhm_mm; kept as nested tuples.
    """

    preset: str = ""
    psf_fwhm_mm: float | tuple[float, float, float] = 6.0
    psf_skew: tuple[float, float, float] = (0.0, 0.0, 0.0)
    psf_kernel: KernelTuple | None = None

    def __post_init__(self) -> None:
        widths = np.atleast_1d(np.asarray(self.psf_fwhm_mm, dtype=np.float64))
        if widths.shape not in ((1,), (3,)) or np.any(~(widths > 0)):
            raise ValueError(f"psf_fwhm_mm must be one or three positive numbers, got {self.psf_fwhm_mm}")
        as_given = float(widths[0]) if np.ndim(self.psf_fwhm_mm) == 0 else tuple(widths.tolist())
        object.__setattr__(self, "psf_fwhm_mm", as_given)
        object.__setattr__(self, "psf_skew", tuple(float(k) for k in self.psf_skew))
        if len(self.psf_skew) != 3 or max(map(abs, self.psf_skew)) >= 1:
            raise ValueError(f"psf_skew must be three numbers between -1 and 1, got {self.psf_skew}")
        if self.psf_kernel is not None:
            kernel = np.asarray(self.psf_kernel, dtype=np.float64)
            if kernel.ndim != 3 or any(n % 2 == 0 for n in kernel.shape) or not kernel.sum() > 0 or kernel.min() < 0:
                raise ValueError(f"psf_kernel must be (d, h, w), odd, non-negative, not zero; got shape {kernel.shape}")
            nested = tuple(tuple(tuple(row) for row in plane) for plane in kernel.tolist())
            object.__setattr__(self, "psf_kernel", nested)

    def on_grids(self, spacing: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
        """The kernel on the PET grid, the one to compute with, and that one's grid."""
        if self.psf_kernel is not None:
            kernel = (np.array(self.psf_kernel) / np.sum(self.psf_kernel)).astype(np.float32)
            return kernel, kernel, "pet"
        pet, fine = (skewed(self.psf_fwhm_mm, self.psf_skew, grid) for grid in (spacing, spacing / 2))
        return pet, fine, "fine"

    def figures(self) -> dict[str, float]:
        """What the PSF was taken to be: psf_fwhm_{d,h,w}_mm on the fine grid; empty for a kernel of any shape."""
        if self.psf_kernel is not None:
            return {}
        widths = np.broadcast_to(np.asarray(self.psf_fwhm_mm, dtype=np.float64), 3).tolist()
        return {f"psf_fwhm_{axis}_mm": width for axis, width in zip("dhw", widths, strict=True)}


@dataclass(frozen=True)
class RichardsonLucySettings(_WithPsf):
    """iterations: more recover more and amplify more noise; 30 suit images with noise."""

    iterations: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self.iterations)


@dataclass(frozen=True)
class TVSettings(_WithPsf):
    """weight: of TV, for an image whose maximum is 1; None: from the image's noise (tv.tv_weight).

    memory_gb: what source, output and tiles may take together; decides the tile. region: what is deblurred, see
    deconv/region.py; outside it the source is interpolated.
    """

    iterations: int = 40
    weight: float | None = None
    memory_gb: float = 4.0
    region: str = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least_one(self.iterations)
        require_memory(self.memory_gb)
        check_spec(self.region)
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"weight must be positive, got {self.weight}")


@dataclass(frozen=True)
class CubicSettings:
    """Nothing to set."""

    preset: str = ""


@dataclass(frozen=True)
class NearestSettings:
    """Nothing to set."""

    preset: str = ""


@dataclass(frozen=True, eq=False)
class ClassicMethod:
    """One method behind the door: PRESETS, settings(preset, **overrides), deconvolve(volume, settings, ...)."""

    name: str
    PRESETS: Mapping[str, Any]
    run: Callable[[Volume, Any, torch.device, OnStep | None], _Outcome]

    def settings(self, preset: str = "default", **overrides: Any) -> Any:
        """The preset with some settings changed. Raises ValueError for an unknown preset or setting."""
        if preset not in self.PRESETS:
            raise ValueError(f"{self.name} has no preset {preset!r}; it has {', '.join(sorted(self.PRESETS))}")
        known = {f.name for f in fields(self.PRESETS[preset])}
        if unknown := sorted(set(overrides) - known):
            raise ValueError(f"{self.name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return replace(self.PRESETS[preset], **overrides)

    def deconvolve(
        self,
        volume: Volume,
        settings: Any,
        *,
        guide: Volume | None = None,
        device: str | torch.device = "cpu",
        on_step: OnStep | None = None,
    ) -> Deconvolution:
        """Deconvolve `volume`; the result is non-negative. `guide` is accepted and not used: these methods need no CT.

        Raises TypeError for another method's settings, ValueError for a volume without activity; on_step may raise
        Cancelled, which passes.
        """
        expected = type(next(iter(self.PRESETS.values())))
        if not isinstance(settings, expected):
            raise TypeError(f"{self.name} takes {expected.__name__}, got {type(settings).__name__}")
        if volume.array.max() <= 0:
            raise ValueError(f"{self.name}: the volume holds no positive activity")
        started = time.perf_counter()
        outcome = self.run(volume, settings, torch.device(device), on_step)
        image = volume.doubled(outcome.image)
        spacing = volume.spacing.tolist()
        metrics = {"activity_change": activity_change(image.array, volume.array), **outcome.metrics}
        if outcome.kernel is not None:
            left = residual(volume, image, outcome.kernel)[outcome.judged]
            metrics["residual"] = float(np.sqrt(np.mean(np.square(left, dtype=np.float64))) / volume.array.max())
            for axis, width in zip("dhw", kernel_fwhm_mm(outcome.kernel, spacing), strict=True):
                metrics[f"kernel_fwhm_{axis}_mm"] = width
        metrics["seconds"] = time.perf_counter() - started
        return Deconvolution(
            image=image,
            kernel=outcome.kernel,
            kernel_spacing=(spacing[0], spacing[1], spacing[2]),
            method=self.name,
            preset=settings.preset,
            settings={**asdict(settings), **outcome.settings},
            losses=outcome.losses,
            metrics=metrics,
        )


@dataclass(frozen=True, eq=False)
class _Outcome:
    image: NDArray[np.float32]
    kernel: NDArray[np.float32] | None
    losses: Mapping[str, NDArray[np.float32]]
    metrics: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)  # found on the way, and with an influence on the image
    judged: tuple[slice, slice, slice] = (slice(None), slice(None), slice(None))


def richardson_lucy(
    y: torch.Tensor, model: PooledBlur, iterations: int, on_step: OnStep | None = None
) -> torch.Tensor:
    """(D, H, W) -> (2D, 2H, 2W): `iterations` steps of Richardson-Lucy from a flat image.

    On the padded domain the total is kept at every step; the loss reported is ||A x - y|| / ||y||.
    """
    padded = model.pad(y.clamp_min(0.0))
    floor = 1e-6 * padded.max()
    x = torch.full(model.fine, float(padded.mean()), device=y.device)
    for step in range(iterations):
        seen = model.forward(x).clamp_min_(floor)
        loss = float((seen - padded).norm() / padded.norm())
        x = x.mul_(model.adjoint(padded / seen).mul_(8.0).clamp_min_(0.0))
        if on_step is not None:
            on_step(Progress("richardson-lucy", step + 1, iterations, loss))
    return model.crop(x)


def _run_richardson_lucy(
    volume: Volume, settings: RichardsonLucySettings, device: torch.device, on_step: OnStep | None
) -> _Outcome:
    pet, kernel, grid = settings.on_grids(volume.spacing)
    y = torch.from_numpy(np.array(volume.array)).to(device)
    model = PooledBlur(volume.shape, kernel, kernel_grid=grid, device=device)
    losses: list[float] = []
    x = richardson_lucy(y, model, settings.iterations, _keeping(losses, on_step))
    image, scale = _same_total(x.cpu().numpy(), volume.array)
    return _Outcome(image, pet, {"richardson-lucy": np.array(losses, np.float32)},
                    {"activity_scale": scale, **settings.figures()})


def _run_tv(volume: Volume, settings: TVSettings, device: torch.device, on_step: OnStep | None) -> _Outcome:
    pet, kernel, grid = settings.on_grids(volume.spacing)
    found = region(volume, settings.region)
    inner = found.cropped(volume)
    weight = tv_weight(inner.array) if settings.weight is None else settings.weight
    losses: list[float] = []
    tiled = tv_tiled(
        torch.from_numpy(np.array(inner.array)).to(device), kernel, memory_bytes=settings.memory_gb * 1e9,
        kernel_grid=grid, lam=weight, iterations=settings.iterations, spacing=volume.spacing.tolist(),
        on_step=_keeping(losses, on_step),
    )
    image, scale = (_same_total(tiled.image, volume.array) if found.is_whole else
                    found.paste(tiled.image, volume.array))
    return _Outcome(image, pet, {"tv": np.array(losses, np.float32)},
                    {"activity_scale": scale, "tv_weight": weight, "tiles": float(tiled.count), **settings.figures()},
                    {"region_box": found.text, "tile": list(tiled.tile)}, found.core)


def _run_cubic(volume: Volume, settings: CubicSettings, device: torch.device, on_step: OnStep | None) -> _Outcome:
    image = doubled(volume.array)
    if on_step is not None:
        on_step(Progress("cubic", 1, 1, 0.0))
    return _Outcome(image, None, {}, {})


def _run_nearest(volume: Volume, settings: NearestSettings, device: torch.device, on_step: OnStep | None) -> _Outcome:
    image = doubled_nearest(volume.array)
    if on_step is not None:
        on_step(Progress("nearest", 1, 1, 0.0))
    return _Outcome(image, None, {}, {})


def _keeping(losses: list[float], on_step: OnStep | None) -> OnStep:
    def report(progress: Progress) -> None:
        losses.append(progress.loss)
        if on_step is not None:
            on_step(progress)
    return report


def _same_total(image: NDArray[np.float32], source: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """`image` scaled to the source's total activity, from which borders make it differ a little; and the factor."""
    total, found = float(np.mean(source, dtype=np.float64)), float(np.mean(image, dtype=np.float64))
    if total <= 0 or found <= 0:
        return image, 1.0
    return (image.astype(np.float64) * (total / found)).astype(np.float32), total / found


def _at_least_one(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


METHODS: Mapping[str, ClassicMethod] = MappingProxyType({
    method.name: method for method in (
        ClassicMethod("richardson-lucy", {"default": RichardsonLucySettings(preset="default")}, _run_richardson_lucy),
        ClassicMethod("tv", {
            "default": TVSettings(preset="default"),
            "quick": TVSettings(preset="quick", iterations=15),
        }, _run_tv),
        ClassicMethod("cubic", {"default": CubicSettings(preset="default")}, _run_cubic),
        ClassicMethod("nearest", {"default": NearestSettings(preset="default")}, _run_nearest),
    )
})
