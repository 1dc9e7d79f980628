"""The preset "best": blind, from one image, on the physical model.

    y = P(x ∗ k) + noise,   P the mean over 2 x 2 x 2 fine voxels,   k a product of split normals: FWHM, skew per axis

1. Region: what is deblurred (deconv/region.py); the rest is interpolated.
2. Kernel: Gk (deconv/psfnet.py) reads the most telling windows and says the FWHM along every axis, with standard
   deviations. What is known of the scanner is multiplied in as a prior. Its skew is that for which image and kernel
   together explain the most telling region best (deconv/skewfit.py). A measured PSF replaces both.
3. Image: two members, whose kernels are half a standard deviation narrower and wider. Each is the minimiser of
   4 ||P(x ∗ k) - y||² + lam TV(x) over x >= 0, with lam by the noise (deconv/members.py). Large regions are worked
   off in tiles that share kernels, maximum and lam.
4. x is the mean of the members. What TV moved between slices is moved back (deconv/slices.py). The members' spread and
   what x leaves unexplained give its standard deviation (deconv/uncertainty.py).

docs/method.md has the equations, the reasons and what was tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from deconv import psfnet
from deconv.blind import check_shape
from deconv.checkpoint import Checkpoints
from deconv.finish import finished, normalised, plain, residual
from deconv.kernels import FWHM_PER_SIGMA, skewed
from deconv.members import Member, mean_and_spread, solved
from deconv.preview import informative_region
from deconv.region import check_spec, region
from deconv.result import Deconvolution, OnStep, Progress
from deconv.skewfit import found_skew
from deconv.slices import slice_gains
from deconv.tiles import FADE, Image, Tile, Tiled, plan, require_memory, solve_in_tiles
from deconv.tv import tv_weight
from deconv.uncertainty import combined
from deconv.volume import Volume

__all__ = ["BEST", "Psf", "Settings", "deconvolve", "kernel_on_pet_grid", "posterior"]

Triple = tuple[float, float, float]
Floats = NDArray[np.float64]

#: of TV's weight: on noisy whole bodies more of it changes the activity of slices by more than the gates allow
MOST_TV = 6e-3
#: memory for each PET voxel of a tile's padded grid
BYTES_PER_VOXEL = 1100.0
#: held for each PET voxel besides: source, mean and spread
HELD_PER_VOXEL = 4.0 + 2 * 32.0


@dataclass(frozen=True)
class Settings:
    """Everything that, with the source, determines the result. Plain values.

    psf             "blind": from this image and the general prior; "prior": from this image and psf_fwhm_mm with its
                    psf_log_sd; "known": psf_fwhm_mm and psf_skew as they are.
    psf_fwhm_mm     along (D, H, W);   psf_log_sd  of ln FWHM;   psf_skew  along (D, H, W);   psf_source  whence.
    fwhm_bounds_mm  what is found in the image never leaves them; a known PSF may.
    fwhm_prior_mm   centre of the general prior: what clinical PET reaches;   prior_log_sd  its sd, of ln FWHM.
    windows         read at most.
    skew_voxels     largest region (D, H, W) on which the skew is found;   skew_iterations  of TV there; 0: no skew.
    spread          the members' kernels lie that many standard deviations (of the common width) on either side.
    iterations      of TV deconvolution.
    tv_weight       for an image whose maximum is 1; 0: by the image's noise.
    slice_steps     that bring the activity of slices back; 0: none.
    region          see deconv/region.py;   memory_gb  what source, output and tiles may take together.
    seed            has no influence: nothing is drawn. Held so that every preset of "nbd" takes it.
    """

    preset: str
    psf: Literal["blind", "prior", "known"] = "blind"
    psf_fwhm_mm: Triple | None = None
    psf_log_sd: float = 0.1
    psf_skew: Triple = (0.0, 0.0, 0.0)
    psf_source: str = ""
    fwhm_bounds_mm: tuple[float, float] = (3.0, 10.0)
    fwhm_prior_mm: float = 6.0
    prior_log_sd: float = 0.35
    windows: int = 8
    skew_voxels: tuple[int, int, int] = (32, 48, 48)
    skew_iterations: int = 20
    spread: float = 0.5
    iterations: int = 60
    tv_weight: float = 0.0
    slice_steps: int = 2
    region: str = "body"
    memory_gb: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("psf_fwhm_mm", "psf_skew", "fwhm_bounds_mm", "skew_voxels"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        low, high = self.fwhm_bounds_mm
        if not 0 < low < self.fwhm_prior_mm < high:
            raise ValueError(f"the prior of {self.fwhm_prior_mm} mm must lie between its bounds {low} and {high} mm")
        if self.psf not in ("blind", "prior", "known"):
            raise ValueError(f"psf is 'blind', 'prior' or 'known', got {self.psf!r}")
        if self.psf != "blind" and self.psf_fwhm_mm is None:
            raise ValueError(f"psf {self.psf!r} needs psf_fwhm_mm, the FWHM along slice, row and column axis in mm")
        if self.psf_fwhm_mm and not all(0 < w < 30 for w in self.psf_fwhm_mm):
            raise ValueError(f"psf_fwhm_mm {list(self.psf_fwhm_mm)} is no PSF of a PET: FWHM along D, H, W in mm")
        if min(self.windows, self.iterations, *self.skew_voxels) < 1 or min(self.skew_iterations, self.slice_steps) < 0:
            raise ValueError("counts are at least 1, skew_iterations and slice_steps at least 0")
        if min(self.psf_log_sd, self.prior_log_sd) <= 0:
            raise ValueError("standard deviations must be positive")
        if self.spread < 0 or self.tv_weight < 0 or max(map(abs, self.psf_skew)) >= 1:
            raise ValueError("spread and tv_weight must not be negative, skews lie within (-1, 1)")
        require_memory(self.memory_gb)
        check_spec(self.region)


BEST = Settings(preset="best")


@dataclass(frozen=True)
class Psf:
    """The PSF along (D, H, W): FWHM in mm, sd of its logarithm, skew; and the windows it rests on."""

    fwhm_mm: Triple
    log_sd: Triple
    skew: Triple
    windows: int


def deconvolve(
    volume: Volume, settings: Settings, *, device: str | torch.device = "cpu", on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> Deconvolution:
    """Deblur and double `volume`; see the module.

    checkpoints  the PSF and finished tiles are kept there and taken up again.
    Raises ValueError for a volume without activity, without edges, or too small; tiles.OutOfMemory.
    """
    start = time.perf_counter()
    found = region(volume, settings.region)
    inner = found.cropped(volume)
    check_shape(inner.shape)
    y, top = normalised(inner)
    spacing = np.asarray(volume.spacing, dtype=np.float64)
    lam = settings.tv_weight or min(tv_weight(y), MOST_TV)
    psf = _psf(y, spacing, lam, settings, device, on_step, checkpoints)
    tiled = _image(y, psf, lam, spacing, settings, device, on_step, checkpoints)
    kernel = kernel_on_pet_grid(np.array(psf.fwhm_mm), np.array(psf.skew), spacing)
    taken = {"region_box": found.text, "tile": list(tiled.tile)}
    fine = skewed(np.array(psf.fwhm_mm), psf.skew, spacing / 2)
    gains = slice_gains(tiled.outputs[0], y, fine, settings.slice_steps).astype(np.float32)[:, None, None]
    told = {**_told(psf, settings), "tv_weight": lam, "tiles": float(tiled.count),
            "slice_gain": float(np.abs(gains - 1).max())}
    result = finished(
        volume, tiled.outputs[0] * gains, kernel, top, preset=settings.preset, settings={**plain(settings), **taken},
        losses={}, seconds=0.0, metrics=told, region=found,
    )
    off = residual(volume, result.image, kernel)[found.crop] / np.float32(top)
    sd = found.paste_spread(combined(tiled.outputs[1] * gains, off), result.metrics["activity_scale"])
    seconds = {"seconds": time.perf_counter() - start}
    return replace(result, uncertainty=volume.doubled(sd * np.float32(top)), metrics={**result.metrics, **seconds})


def _psf(
    y: NDArray[np.float32], spacing: Floats, lam: float, settings: Settings, device: str | torch.device,
    on_step: OnStep | None, checkpoints: Checkpoints | None,
) -> Psf:
    """`posterior`, taken from the checkpoints where it lies there: it is the same however much memory there is."""
    if checkpoints is None or settings.psf == "known":
        return posterior(y, spacing, lam, settings, device=device, on_step=on_step)
    about = {**plain(settings), "memory_gb": None, "spacing": spacing.tolist(), "lam": lam}
    run = replace(checkpoints, every_s=0.0).of("psf", (y,), about, device=device)
    state = run.load()
    if state is not None:
        return Psf(state["fwhm_mm"], state["log_sd"], state["skew"], state["windows"])
    psf = posterior(y, spacing, lam, settings, device=device, on_step=on_step)
    run.offer(lambda: asdict(psf))
    return psf


def posterior(
    y: NDArray[np.float32], spacing: Floats, lam: float, settings: Settings, *, device: str | torch.device = "cpu",
    on_step: OnStep | None = None,
) -> Psf:
    """The PSF of y (D, H, W): what Gk reads times the prior, within the bounds, and the skew that fits; or the known.

    Raises ValueError where y is the same everywhere.
    """
    if settings.psf == "known":
        assert settings.psf_fwhm_mm is not None  # Settings has seen to it
        if y.max() <= y.min():
            raise ValueError("the volume is the same everywhere: there is nothing to deblur")
        return Psf(settings.psf_fwhm_mm, (settings.psf_log_sd,) * 3, settings.psf_skew, 0)
    read = psfnet.read(y, spacing.tolist(), count=settings.windows)
    mean, sd = _with_prior(np.log(read.fwhm_mm), np.array(read.log_sd), settings)
    width = np.clip(np.exp(mean), *settings.fwhm_bounds_mm)
    skew = _skew(y, width, spacing, lam, settings, device, on_step)
    return Psf(_triple(width), _triple(sd), _triple(skew), read.windows)


def _with_prior(mean: Floats, sd: Floats, settings: Settings) -> tuple[Floats, Floats]:
    """Mean and sd of ln FWHM along the three axes: the reading times the prior, both Gaussian.

    The general prior lets the three widths vary together by prior_log_sd and each by ANISOTROPY_LOG_SD; a library's
    lets each vary by psf_log_sd.
    """
    if settings.psf == "prior":
        centre, covariance = np.log(np.array(settings.psf_fwhm_mm)), settings.psf_log_sd**2 * np.eye(3)
    else:
        centre = np.full(3, np.log(settings.fwhm_prior_mm))
        covariance = settings.prior_log_sd**2 * np.ones((3, 3)) + ANISOTROPY_LOG_SD**2 * np.eye(3)
    gain = covariance @ np.linalg.inv(covariance + np.diag(sd**2))
    return centre + gain @ (mean - centre), np.sqrt(np.diag(covariance - gain @ covariance))


#: how far the widths along the axes of clinical PET lie from their common mean
ANISOTROPY_LOG_SD = 0.1
#: of the skew that is found: root mean square error on phantoms
SKEW_SD = 0.1
#: least weight of TV where the skew is sought: without noise the image's own edges must not follow the kernel
SKEW_LAM = 2e-3


def _skew(
    y: NDArray[np.float32], width: Floats, spacing: Floats, lam: float, settings: Settings, device: str | torch.device,
    on_step: OnStep | None,
) -> Floats:
    """The skew of the most telling region; halfway to a library's where there is one."""
    if not settings.skew_iterations:
        return np.array(settings.psf_skew, dtype=np.float64)
    tries = [0]

    def told(cost: float) -> None:
        tries[0] += 1
        if on_step is not None:
            on_step(Progress("kernel", min(tries[0], MOST_TRIES), MOST_TRIES + _image_steps(settings), cost))

    part = y[informative_region(y, spacing, settings.skew_voxels)]
    part = part / part.max()
    found = found_skew(torch.from_numpy(part).to(device), width, spacing, lam=max(lam, SKEW_LAM),
                       iterations=settings.skew_iterations, on_try=told)
    return (found + np.array(settings.psf_skew)) / 2 if settings.psf == "prior" else found


#: of kernels in the search for the skew, mostly
MOST_TRIES = 15


def _kernel_steps(settings: Settings) -> int:
    return MOST_TRIES if settings.psf != "known" and settings.skew_iterations else 0


def _image_steps(settings: Settings) -> int:
    return 2 * settings.iterations * (2 if settings.spread > 0 else 1)


def kernel_on_pet_grid(fwhm_mm: Floats, skew: Floats, spacing: Floats) -> NDArray[np.float32]:
    """The kernel k (d, h, w) of voxels `spacing` for which x↓ ∗ k comes closest to P(x ∗ k): see docs/method.md."""
    narrower = fwhm_mm**2 - 0.5 * FWHM_PER_SIGMA**2 * spacing**2 / 12.0
    return skewed(np.sqrt(np.maximum(narrower, (0.5 * fwhm_mm) ** 2)), skew, spacing)


def _members(psf: Psf, spacing: Floats, settings: Settings) -> list[Member]:
    """Kernels `spread` standard deviations narrower and wider than the posterior; one where `spread` is 0."""
    step = settings.spread * float(np.mean(psf.log_sd))
    members = []
    for offset in (-step, step) if step > 0 else (0.0,):
        widths = np.array(psf.fwhm_mm) * np.exp(offset)
        members.append(Member(skewed(widths, psf.skew, spacing / 2), _triple(widths / spacing)))
    return members


def _image(
    y: NDArray[np.float32], psf: Psf, lam: float, spacing: Floats, settings: Settings, device: str | torch.device,
    on_step: OnStep | None, checkpoints: Checkpoints | None,
) -> Tiled:
    """Mean and standard deviation of the members, tile by tile."""
    members = _members(psf, spacing, settings)
    before, steps = _kernel_steps(settings), _image_steps(settings)
    present = [Tile(0, 1, (slice(None),) * 3, 0)]
    done = [0]

    def count(loss: float) -> None:
        done[0] += 1
        if on_step is not None:
            # tiles share the steps of one, so that the total is known before their number is
            step = (present[0].number * steps + min(done[0], steps)) // present[0].count
            on_step(Progress("image", before + step, before + steps, loss))

    def solve(part: Image) -> tuple[torch.Tensor, torch.Tensor]:
        tile = torch.as_tensor(np.array(part)).to(device)
        done[0] = 0
        images = [solved(tile, member, lam=lam, iterations=settings.iterations, spacing=spacing.tolist(),
                         on_step=count) for member in members]
        mean, spread = mean_and_spread(images)
        return mean.cpu(), spread.mul_(1 / max(settings.spread, 1e-9)).cpu()

    def remember(coming: Tile) -> None:
        present[0] = coming

    kept = _kept(solve, present, checkpoints, {**plain(settings), "psf": plain(psf), "lam": lam}, device)
    overlap, padding = _overlap(members[-1])
    tile = plan(y.shape, settings.memory_gb * 1e9, BYTES_PER_VOXEL, overlap, fixed_bytes=HELD_PER_VOXEL * y.size,
                padding=padding)
    return solve_in_tiles(y, kept, tile=tile, overlap=overlap, on_tile=remember)


def _kept(
    solve: Callable[[Image], tuple[torch.Tensor, torch.Tensor]], present: list[Tile], checkpoints: Checkpoints | None,
    about: dict[str, object], device: str | torch.device,
) -> Callable[[Image], tuple[torch.Tensor, torch.Tensor]]:
    """`solve`, with every finished tile written to the checkpoints and read from there where it lies."""
    if checkpoints is None:
        return solve
    eager = replace(checkpoints, every_s=0.0)  # a tile takes minutes: each is worth a file

    def resumed(part: Image) -> tuple[torch.Tensor, torch.Tensor]:
        name = "tile-" + "-".join(str(s.start or 0) for s in present[0].box)
        run = eager.of(name, (np.asarray(part),), about, device=device)
        state = run.load()
        if state is not None:
            return state["mean"], state["spread"]
        mean, spread = solve(part)
        run.offer(lambda: {"mean": mean, "spread": spread})
        return mean, spread

    return resumed


def _overlap(member: Member) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """PET voxels that tiles share, for the wider kernel, and those that the solver adds to a tile."""
    reach = [int(np.ceil(2 * w)) for w in member.fwhm_voxels]  # the PSF's edge, twice: blur and its inversion
    overlap = [min(2 * r + 8, 24) + FADE for r in reach]
    padding = [2 * (n // 4 + 1) for n in member.kernel.shape]
    return (overlap[0], overlap[1], overlap[2]), (padding[0], padding[1], padding[2])


def _told(psf: Psf, settings: Settings) -> dict[str, float]:
    """The kernel in figures: FWHM on the fine grid in mm, skew, and their standard deviations, axis by axis."""
    low, high = settings.fwhm_bounds_mm
    told = {"windows": float(psf.windows), "kernel_at_prior_bound": float(any(not low < w < high for w in psf.fwhm_mm))}
    for name, width, log_sd, skew in zip("dhw", psf.fwhm_mm, psf.log_sd, psf.skew, strict=True):
        told |= {f"psf_fwhm_{name}_mm": width, f"kernel_fwhm_{name}_mm": width, f"psf_log_sd_{name}": log_sd,
                 f"psf_skew_{name}": skew, f"psf_skew_sd_{name}": SKEW_SD}
    return told


def _triple(values: Floats) -> Triple:
    return float(values[0]), float(values[1]), float(values[2])
