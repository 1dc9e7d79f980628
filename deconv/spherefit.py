"""Least squares over several spheres that share one PSF, and its standard errors (see deconv/calibration.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import fft, optimize, stats

from deconv.spheremodel import Window

__all__ = ["Fit", "FittedSphere", "Start", "diameters_shown", "fit_spheres"]

Array = NDArray[np.float64]
LOG_FWHM = (np.log(2.0), np.log(15.0))
SKEW = 0.7
FIRST_FWHM_MM = 6.0
STEP = 1e-4
CORRELATION_REACH = 1.5  # FWHM


@dataclass(frozen=True, eq=False)
class Start:
    """Where one sphere is looked for: centre in mm, diameter in mm, whether that diameter is known."""

    centre_mm: Array
    diameter_mm: float
    known: bool


@dataclass(frozen=True, eq=False)
class FittedSphere:
    """The values of `calibration.MeasuredSphere`."""

    diameter_mm: float
    known: bool
    centre_mm: Array
    activity: float
    background: float
    residual: float


@dataclass(frozen=True, eq=False)
class Fit:
    """log_fwhm (3,) ln mm; skew (3,); sd (6,) of both; residual; the spheres; notes."""

    log_fwhm: Array
    skew: Array
    sd: Array
    residual: float
    spheres: tuple[FittedSphere, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Ball:
    """One sphere's window and its parameters' places: 3 centre, 1 ln diameter, 1 activity, 1 background, 3 gradient."""

    window: Window
    start: Start
    noise: Array  # (n,) standard deviation of each fitted voxel, relative

    def basis(self, psf: Array, local: Array) -> Array:
        """(n, 5) what activity, background and gradient are multiplied by, in the fitted voxels."""
        centre, diameter = self.start.centre_mm + local[:3], self.start.diameter_mm * np.exp(local[3])
        sphere, displaced = self.window.render(centre, diameter, np.exp(psf[:3]), psf[3:6])
        mask = self.window.mask
        slopes = [np.broadcast_to(offset / 10.0, mask.shape)[mask]
                  for offset in self.window.offsets(self.start.centre_mm)]
        return np.stack([sphere[mask], 1.0 - displaced[mask], *slopes], axis=1)

    def model(self, psf: Array, local: Array) -> Array:
        """(n,) values in the fitted voxels. psf: ln FWHM (3), skew (3); local as in the class."""
        return np.asarray(self.basis(psf, local) @ local[4:])

    @property
    def values(self) -> Array:
        return self.window.values[self.window.mask]


class _Problem:
    """Residuals and their derivatives over all spheres; which parameters are free, and where they stand."""

    def __init__(self, balls: Sequence[_Ball], *, shared_activity: bool, fit_skew: bool, scale: float) -> None:
        self.balls, self.scale = balls, scale
        self.psf_free = [0, 1, 2, *([3, 4, 5] if fit_skew else [])]
        self.shared = shared_activity
        self.n_global = len(self.psf_free) + int(shared_activity)
        self.local_free = [[0, 1, 2, *([] if ball.start.known else [3]), *([] if shared_activity else [4]), 5, 6, 7, 8]
                           for ball in balls]
        ends = self.n_global + np.cumsum([0, *map(len, self.local_free)])
        self.places = [np.arange(a, b) for a, b in pairwise(ends)]
        self.size = int(ends[-1])

    def split(self, parameters: Array, i: int) -> tuple[Array, Array]:
        """PSF (6,) and local parameters (9,) of sphere i, activities in units of `scale`."""
        psf, local = np.zeros(6), np.zeros(9)
        psf[self.psf_free] = parameters[: len(self.psf_free)]
        local[self.local_free[i]] = parameters[self.places[i]]
        if self.shared:
            local[4] = parameters[self.n_global - 1]
        return psf, local

    def joined(self, log_fwhm: Array, locals_: Sequence[Array]) -> Array:
        """The parameters that `split` takes apart; a shared activity is that of the sphere that shows it best."""
        parameters = np.zeros(self.size)
        parameters[:3] = log_fwhm
        if self.shared:
            parameters[self.n_global - 1] = max(local[4] for local in locals_)
        for places, free, local in zip(self.places, self.local_free, locals_, strict=True):
            parameters[places] = [local[kind] if kind >= 4 else 0.0 for kind in free]
        return parameters

    def residual_of(self, parameters: Array, i: int) -> Array:
        ball = self.balls[i]
        return (ball.model(*self.split(parameters, i)) - ball.values / self.scale) / ball.noise

    def residual(self, parameters: Array) -> Array:
        return np.concatenate([self.residual_of(parameters, i) for i in range(len(self.balls))])

    def jacobian_of(self, parameters: Array, i: int) -> Array:
        """(n, all parameters) of sphere i; others' columns are zero. The model is linear in all but PSF and place."""
        ball = self.balls[i]
        columns = np.zeros((len(ball.noise), self.size))
        linear = dict(zip(self.places[i].tolist(), self.local_free[i], strict=True))
        if self.shared:
            linear[self.n_global - 1] = 4
        basis = ball.basis(*self.split(parameters, i)) / ball.noise[:, None]
        for j in [*range(self.n_global), *self.places[i].tolist()]:
            if linear.get(j, 0) >= 4:
                columns[:, j] = basis[:, linear[j] - 4]
                continue
            step = np.zeros(self.size)
            step[j] = STEP
            ahead, behind = self.residual_of(parameters + step, i), self.residual_of(parameters - step, i)
            columns[:, j] = (ahead - behind) / (2 * STEP)
        return columns

    def jacobian(self, parameters: Array) -> Array:
        return np.concatenate([self.jacobian_of(parameters, i) for i in range(len(self.balls))])

    def bounds(self) -> tuple[Array, Array]:
        low, high = np.full(self.size, -np.inf), np.full(self.size, np.inf)
        n = len(self.psf_free)
        low[:3], high[:3] = LOG_FWHM
        low[3:n], high[3:n] = -SKEW, SKEW
        for places, free in zip(self.places, self.local_free, strict=True):
            for place, kind in zip(places, free, strict=True):
                if kind < 3:
                    low[place], high[place] = -15.0, 15.0
                elif kind == 3:
                    low[place], high[place] = np.log(0.5), np.log(2.0)
        return low, high


def fit_spheres(
    image: Array, spacing: Array, starts: Sequence[Start], *, shared_activity: bool, wall_mm: float, fit_skew: bool
) -> Fit:
    """Fit all spheres together. Raises ValueError where one is cut by the edge of the field of view."""
    starts, notes = _whole(image, spacing, starts, wall_mm)
    scale = float(max(image[_voxel(start.centre_mm, spacing)] for start in starts))
    rough = _problem(image, spacing, starts, FIRST_FWHM_MM, wall_mm, shared_activity, False, scale)
    found = _solved(rough, _guess(rough))
    if not all(start.known for start in starts):
        kept = _spheres_only(rough, found)
        notes += tuple(f"what lies at {_mm(start.centre_mm)} is no sphere and was left out"
                       for i, start in enumerate(starts) if i not in kept)
        if len(kept) < len(starts):
            rough = _problem(image, spacing, [starts[i] for i in kept], FIRST_FWHM_MM, wall_mm, shared_activity, False,
                             scale)
            found = _solved(rough, _guess(rough))
    # The second pass cuts its windows by the width found and weights the voxels by the noise that the first one left.
    locals_ = [rough.split(found, i)[1] for i in range(len(rough.balls))]
    starts = [replace(ball.start, centre_mm=ball.start.centre_mm + one[:3],
                      diameter_mm=float(ball.start.diameter_mm * np.exp(one[3])))
              for ball, one in zip(rough.balls, locals_, strict=True)]
    width = float(np.exp(found[:3].mean()))
    fine = _problem(image, spacing, starts, width, wall_mm, shared_activity, fit_skew, scale)
    start = fine.joined(found[:3], locals_)
    fine.balls = _weighted(rough, found, fine, start)
    return _finished(fine, _solved(fine, start), notes)


def diameters_shown(image: Array, spacing: Array, fit: Fit, *, shared_activity: bool, wall_mm: float) -> list[float]:
    """The diameters (mm) that the image itself shows, where `fit` took them as known."""
    starts = [Start(one.centre_mm, one.diameter_mm, False) for one in fit.spheres]
    width = float(np.exp(fit.log_fwhm.mean()))
    problem = _problem(image, spacing, starts, width, wall_mm, shared_activity, False, fit.spheres[0].activity)
    found = _solved(problem, _guess(problem))
    return [float(start.diameter_mm * np.exp(problem.split(found, i)[1][3])) for i, start in enumerate(starts)]


# --- the steps of the fit


def _whole(
    image: Array, spacing: Array, starts: Sequence[Start], wall_mm: float
) -> tuple[list[Start], tuple[str, ...]]:
    """The spheres that lie inside the image. One that was asked for and is cut raises ValueError."""
    kept, notes = [], []
    for start in starts:
        try:
            _windows(image, spacing, [start], FIRST_FWHM_MM, wall_mm)
        except ValueError as error:
            if start.known:
                raise
            notes.append(f"left out: {error}")
        else:
            kept.append(start)
    if not kept:
        raise ValueError(f"no whole sphere: {'; '.join(notes)}")
    return kept, tuple(notes)


def _windows(image: Array, spacing: Array, starts: Sequence[Start], fwhm_mm: float, wall_mm: float) -> list[Window]:
    seats = [(start.centre_mm, start.diameter_mm) for start in starts]
    return [Window.around(image, spacing, centre, diameter, fwhm_mm=fwhm_mm, wall_mm=wall_mm,
                          others=seats[:i] + seats[i + 1:]) for i, (centre, diameter) in enumerate(seats)]


def _problem(image: Array, spacing: Array, starts: Sequence[Start], fwhm_mm: float, wall_mm: float,
             shared_activity: bool, fit_skew: bool, scale: float) -> _Problem:
    balls = [_Ball(window, start, np.ones(int(window.mask.sum())))
             for window, start in zip(_windows(image, spacing, starts, fwhm_mm, wall_mm), starts, strict=True)]
    for ball in balls:
        if len(ball.noise) < 60:
            raise ValueError(f"the sphere at {_mm(ball.start.centre_mm)} stands too near to another one")
    return _Problem(balls, shared_activity=shared_activity, fit_skew=fit_skew, scale=scale)


def _guess(problem: _Problem) -> Array:
    """A first width, the maxima as activities, the quiet rest of each window as background."""
    locals_ = []
    for ball in problem.balls:
        local = np.zeros(9)
        top, local[5] = float(ball.values.max()) / problem.scale, float(np.percentile(ball.values, 20)) / problem.scale
        local[4] = top if ball.start.diameter_mm > 0 else top * FIRST_FWHM_MM**3
        locals_.append(local)
    return problem.joined(np.full(3, np.log(FIRST_FWHM_MM)), locals_)


def _solved(problem: _Problem, start: Array) -> Array:
    low, high = problem.bounds()
    start = np.clip(start, low + 1e-6, high - 1e-6)
    done = optimize.least_squares(problem.residual, start, problem.jacobian, bounds=(low, high), x_scale="jac",
                                  xtol=1e-6, ftol=1e-8, max_nfev=60)
    return np.asarray(done.x)


def _spheres_only(problem: _Problem, found: Array) -> list[int]:
    """Which of the spheres that nobody asked for look like one: its misfit is no outlier, its diameter no bound."""
    misfit = np.array([_misfit(problem, found, i) for i in range(len(problem.balls))])
    low, high = np.log(0.52), np.log(1.95)
    held = [low < problem.split(found, i)[1][3] < high for i in range(len(problem.balls))]
    limit = 3.0 * float(np.median(misfit[held])) + 0.02 if any(held) else 0.0
    kept = [i for i, inside in enumerate(held) if inside and misfit[i] <= limit]
    if not kept:
        raise ValueError("nothing that stands out of the background is a sphere")
    return kept


def _weighted(rough: _Problem, found: Array, fine: _Problem, start: Array) -> list[_Ball]:
    """Balls of the second pass with the noise s² = a + b m² of the first pass's residual, m the model."""
    left, models = [], []
    for i in range(len(rough.balls)):
        left.append(rough.residual_of(found, i))
        models.append(rough.balls[i].model(*rough.split(found, i)))
    r2, m2 = np.concatenate(left) ** 2, np.concatenate(models) ** 2
    r2 = np.minimum(r2, 16 * np.median(r2) + 1e-12)  # what the model does not describe is no noise
    a, b = optimize.nnls(np.stack([np.ones_like(m2), m2], axis=1), r2)[0]
    floor = max(1e-8, 0.02 * float(r2.mean()))
    noisy = []
    for i, ball in enumerate(fine.balls):
        m = ball.model(*fine.split(start, i))
        noisy.append(replace(ball, noise=np.sqrt(np.maximum(a + b * m**2, floor))))
    return noisy


def _misfit(problem: _Problem, found: Array, i: int) -> float:
    """RMS of measured minus fitted as a part of the sphere's height above its background."""
    ball = problem.balls[i]
    psf, local = problem.split(found, i)
    model = ball.model(psf, local)
    height = abs(local[4] - local[5]) if ball.start.diameter_mm > 0 else float(np.ptp(model))
    return float(np.sqrt(np.mean((model - ball.values / problem.scale) ** 2)) / max(height, 1e-12))


def _finished(problem: _Problem, found: Array, notes: tuple[str, ...]) -> Fit:
    spheres = []
    for i, ball in enumerate(problem.balls):
        local = problem.split(found, i)[1]
        spheres.append(FittedSphere(
            diameter_mm=float(ball.start.diameter_mm * np.exp(local[3])), known=ball.start.known,
            centre_mm=ball.start.centre_mm + local[:3], activity=float(local[4] * problem.scale),
            background=float(local[5] * problem.scale), residual=_misfit(problem, found, i)))
    psf = problem.split(found, 0)[0]
    sd = np.zeros(6)
    sd[problem.psf_free] = _standard_errors(problem, found)[: len(problem.psf_free)]
    if len(spheres) == 1:
        notes = (*notes, "one sphere: its agreement with others is not in the standard errors")
    whole = float(np.sqrt(np.mean([one.residual**2 for one in spheres])))
    return Fit(psf[:3], psf[3:], sd, whole, tuple(spheres), notes)


# --- standard errors


def _standard_errors(problem: _Problem, found: Array) -> Array:
    """(parameters,) the noise's and the scatter's in quadrature; see deconv/calibration.py."""
    residuals = [problem.residual_of(found, i) for i in range(len(problem.balls))]
    jacobians = [problem.jacobian_of(found, i) for i in range(len(problem.balls))]
    inverse = np.linalg.pinv(sum(j.T @ j for j in jacobians))
    reach, correlation = _autocorrelation(problem, residuals, float(np.exp(found[:3].mean())))
    middle = np.zeros_like(inverse)
    for ball, jacobian in zip(problem.balls, jacobians, strict=True):
        middle += jacobian.T @ _correlated(ball.window, jacobian, correlation, reach)
    count = sum(len(r) for r in residuals)
    effective = count * correlation[tuple(reach)] / max(float(correlation.sum()), 1e-30)
    lost = effective / max(effective - problem.size, effective / 2)
    variance = lost * np.diag(inverse @ (middle + middle.T) @ inverse) / 2
    if len(residuals) > 1:
        scores = np.stack([inverse @ (j.T @ r) for j, r in zip(jacobians, residuals, strict=True)])
        count = len(scores)
        few = stats.t.ppf(0.975, max(count - 1, 2)) / stats.norm.ppf(0.975)  # two standard errors are to hold 95 %
        scatter = (scores**2).sum(axis=0) * count / (count - 1)
        variance = variance + few**2 * scatter
    return np.sqrt(np.maximum(variance, 0.0))


def _autocorrelation(
    problem: _Problem, residuals: Sequence[Array], fwhm_mm: float
) -> tuple[NDArray[np.int64], Array]:
    """Autocovariance of the weighted residual over lags up to `reach` voxels, brought to zero smoothly."""
    spacing = problem.balls[0].window.spacing
    reach = np.maximum(1, np.ceil(CORRELATION_REACH * fwhm_mm / spacing).astype(int))
    lags = np.ix_(*[np.arange(-r, r + 1) for r in reach])
    products, pairs = np.zeros(2 * reach + 1), np.zeros(2 * reach + 1)
    for ball, residual in zip(problem.balls, residuals, strict=True):
        shape = [fft.next_fast_len(n + int(r)) for n, r in zip(ball.window.mask.shape, reach, strict=True)]
        for total, values in ((products, residual), (pairs, np.ones_like(residual))):
            image = np.zeros(ball.window.mask.shape)
            image[ball.window.mask] = values
            spectrum = fft.rfftn(image, s=shape)
            total += fft.irfftn(np.abs(spectrum) ** 2, s=shape)[lags]
    distance = np.sqrt(sum((lag / (r + 1)) ** 2 for lag, r in zip(lags, reach, strict=True)))
    taper = 0.5 * (1 + np.cos(np.pi * np.clip((distance - 0.6) / 0.4, 0, 1)))
    return reach, taper * products / np.maximum(pairs, 1.0)


def _correlated(window: Window, jacobian: Array, correlation: Array, reach: NDArray[np.int64]) -> Array:
    """R J: every column convolved with the autocovariance inside the window."""
    shape = [fft.next_fast_len(n + 2 * int(r)) for n, r in zip(window.mask.shape, reach, strict=True)]
    kernel = np.zeros(shape)
    kernel[np.ix_(*[np.arange(-r, r + 1) for r in reach])] = correlation
    spectrum = fft.rfftn(kernel)
    out = np.zeros_like(jacobian)
    for j in np.flatnonzero(np.any(jacobian != 0, axis=0)):
        image = np.zeros(shape)
        inside = tuple(slice(0, n) for n in window.mask.shape)
        image[inside][window.mask] = jacobian[:, j]
        out[:, j] = fft.irfftn(fft.rfftn(image) * spectrum, s=shape)[inside][window.mask]
    return out


def _voxel(centre_mm: Array, spacing: Array) -> tuple[int, ...]:
    return tuple(np.floor(centre_mm / spacing).astype(int).tolist())


def _mm(values: Array) -> str:
    return "(" + ", ".join(f"{value:.0f}" for value in values) + ") mm"
