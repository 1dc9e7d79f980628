"""BRISQUE: how far the statistics of an image are from those of an undistorted photograph.

    MSCN      n = (i - mu) / (sigma + 1/255), mu and sigma over a Gaussian window of 7 x 7, sd 7/6; i in [0, 1]
    features  asymmetric generalised Gaussians (AGGD) fitted to n: shape, variance; and to its products with the
              neighbour to the right, below, and on both diagonals: shape, mean, left and right variance.
              18 of the image, 18 of the image at half size
    score     epsilon-SVR with an RBF kernel on the features scaled to [-1, 1]: sum_j a_j exp(-g |s_j - f|²) - rho

0 is an undistorted photograph, 100 a badly distorted one: LOWER is better [M12]. The paper reads it the other way (75.8
original, 90.5 deblurred, "highest possible quality" at 100) and does not say of which pictures of a volume or in which
window; its published code holds none of it. On phantoms the score of [M12] orders nearest-neighbour, cubic and linear
upsampling as the paper's Table 3 does (e.g. 54, 76, 77: the smoother, the higher), so Table 3 holds scores as they are:
there too a higher one means smoother, not better. The model was trained on photographs; in PET it tells sharpness and
grain apart, not right from wrong: the truth of a phantom may score worse than its measurement.

The model and the details (zero padding, halving by cubic interpolation) are those of the Python package brisque 0.2.0
(Apache License 2.0, `brisque_model/`). Its scores come out to 0.01 but for pictures whose fit has no solution there
(white noise) and those with exactly flat areas other than zero: there the fit counts signs of the last bits, and any
implementation's score is arbitrary by some ten points (the truth of a phantom with a uniform background is one).

[M12] Mittal, Moorthy, Bovik 2012, doi:10.1109/TIP.2012.2214050
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, optimize, special

from deconv.volume import Volume

__all__ = ["Pictures", "brisque", "brisque_volume", "features", "pictures"]

Array = NDArray[np.float64]
Pictures = Literal["mip", "slices"]

SMALLEST = 16  # pixels along a side; below, half the picture is the window's border
_ALPHA = (0.01, 10.0)  # shapes sought; those of photographs lie between 0.2 and 10 [M12]
_EMPTY = 0.05  # a slice whose maximum is below this part of the window shows nothing


@dataclass(frozen=True, eq=False)
class _Model:
    """gamma, rho, coefficients (n,), support vectors (n, 36) of the SVR; lowest and highest of each feature (36,)."""

    gamma: float
    rho: float
    coefficients: Array
    support: Array
    low: Array
    high: Array


def brisque(picture: ArrayLike) -> float:
    """Score of a grey picture (H, W) with values in [0, 1]: 0 good, 100 bad, a little beyond either way is possible.

    Raises ValueError for a picture that is not two-dimensional, smaller than 16 x 16, outside [0, 1], not finite, or
    without texture (constant): it has no statistics.
    """
    model = _model()
    scaled = -1.0 + 2.0 * (features(picture) - model.low) / (model.high - model.low)
    distances = ((model.support - scaled) ** 2).sum(axis=1)
    return float(model.coefficients @ np.exp(-model.gamma * distances) - model.rho)


def brisque_volume(
    volume: Volume, *, of: Pictures = "mip", window: tuple[float, float] | None = None
) -> float:
    """Mean score over pictures of a volume (D, H, W).

    of      "mip": maximum intensity projections along D, H and W (paper, Figure 4); "slices": all axial slices, but
            those whose maximum is below 5 % of the window, which show nothing.
    window  values shown as 0 and 1, in the volume's unit; by default 0 and the maximum. Give the same one for volumes
            that are compared: a higher maximum alone makes the rest of a picture darker.

    Compare volumes on the same grid only: upsampling alone changes the score. Raises ValueError as `brisque` does,
    for a window that is empty, and where no slice shows anything.
    """
    scores = [brisque(picture) for picture in pictures(volume, of=of, window=window)]
    return float(np.mean(scores))


def pictures(volume: Volume, *, of: Pictures = "mip", window: tuple[float, float] | None = None) -> list[Array]:
    """The pictures (H, W) in [0, 1] that `brisque_volume` judges; its arguments and errors."""
    x = volume.array.astype(np.float64)
    low, high = (0.0, float(x.max())) if window is None else window
    if not high > low:
        raise ValueError(f"a window needs a lower and a higher value, got {low:g} and {high:g}")
    shown = np.clip((x - low) / (high - low), 0.0, 1.0)
    if of == "mip":
        return [np.asarray(shown.max(axis=axis)) for axis in range(3)]
    slices = [s for s in shown if s.max() >= _EMPTY]
    if not slices:
        raise ValueError(f"no slice reaches {_EMPTY:.0%} of the window {low:g} to {high:g}")
    return slices


def features(picture: ArrayLike) -> Array:
    """(36,) the features of a grey picture (H, W) in [0, 1], in the order of the model. Errors as `brisque`."""
    image = np.asarray(picture, dtype=np.float64)
    if image.ndim != 2 or min(image.shape) < SMALLEST:
        raise ValueError(f"a picture is (H, W) with at least {SMALLEST} pixels each, got shape {image.shape}")
    if not np.isfinite(image).all() or image.min() < -1e-6 or image.max() > 1 + 1e-6:
        raise ValueError(f"a picture has values in [0, 1], got {image.min():g} to {image.max():g}")
    return np.array([*_one_scale(image), *_one_scale(_halved(image))])


def _one_scale(image: Array) -> Iterator[float]:
    n = _mscn(image)
    alpha, left, right = _aggd(n)
    yield from (alpha, (left + right) / 2)
    for product in (n[:, :-1] * n[:, 1:], n[:-1] * n[1:], n[:-1, :-1] * n[1:, 1:], n[1:, :-1] * n[:-1, 1:]):
        alpha, left, right = _aggd(product)
        # Γ(2/α) / sqrt(Γ(1/α) Γ(3/α)), by logarithms: Γ itself overflows for heavy tails
        factor = np.exp(special.gammaln(2 / alpha) - (special.gammaln(1 / alpha) + special.gammaln(3 / alpha)) / 2)
        yield from (alpha, float((np.sqrt(right) - np.sqrt(left)) * factor), left, right)


def _mscn(image: Array) -> Array:
    """Mean subtracted, contrast normalised coefficients, [M12] eq. 1 to 3; zeros outside the picture."""
    line = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    line /= line.sum()

    def local_mean(values: Array) -> Array:
        for axis in (0, 1):
            values = ndimage.convolve1d(values, line, axis=axis, mode="constant")
        return values

    mu = local_mean(image)
    sigma = np.sqrt(np.abs(local_mean(image**2) - mu**2))
    return (image - mu) / (sigma + 1 / 255)


def _aggd(x: Array) -> tuple[float, float, float]:
    """Shape, left variance and right variance of an AGGD by matching moments ([M12] and Lasmar et al. 2009)."""
    negative, other = x[x < 0], x[x >= 0]
    square = float(np.mean(x**2))
    if negative.size == 0 or square < 1e-12 or not np.any(other):
        raise ValueError("a picture without texture has no statistics to judge")
    left, right = float(np.mean(negative**2)), float(np.mean(other**2))
    skew = np.sqrt(left / right)
    ratio = float(np.mean(np.abs(x)) ** 2 / square * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2)

    def excess(alpha: float) -> float:
        logs = 2 * special.gammaln(2 / alpha) - special.gammaln(1 / alpha) - special.gammaln(3 / alpha)
        return float(np.exp(logs)) - ratio

    low, high = _ALPHA  # the ratio grows with alpha: 0 for the heaviest tails, 3/4 for a uniform distribution
    if excess(low) >= 0:
        return low, left, right
    if excess(high) <= 0:
        return high, left, right
    return float(optimize.brentq(excess, low, high, xtol=1e-10)), left, right


def _halved(image: Array) -> Array:
    """Half as many rows and columns by cubic convolution (a = -0.75), borders replicated."""
    weights = (-0.09375, 0.59375, 0.59375, -0.09375)
    for axis in (0, 1):
        size = image.shape[axis]
        first = 2 * np.arange(round(size / 2)) - 1
        parts = [w * image.take(np.clip(first + i, 0, size - 1), axis=axis) for i, w in enumerate(weights)]
        image = np.sum(parts, axis=0)
    return image


@lru_cache(maxsize=1)
def _model() -> _Model:
    folder = resources.files("deconv.quality") / "brisque_model"
    ranges = json.loads((folder / "normalize.json").read_text(encoding="utf-8"))
    header, _, body = (folder / "svm.txt").read_text(encoding="utf-8").partition("SV\n")
    fields = dict(line.split(maxsplit=1) for line in header.splitlines())
    if (fields["svm_type"], fields["kernel_type"]) != ("epsilon_svr", "rbf"):
        raise ValueError(f"not an RBF epsilon-SVR: {fields['svm_type']}, {fields['kernel_type']}")
    lines = body.splitlines()
    coefficients, support = np.zeros(len(lines)), np.zeros((len(lines), 36))
    for i, line in enumerate(lines):  # coefficient index:value index:value ...; what is missing is 0, indices from 1
        coefficient, *pairs = line.split()
        coefficients[i] = float(coefficient)
        for pair in pairs:
            index, _, value = pair.partition(":")
            support[i, int(index) - 1] = float(value)
    if len(lines) != int(fields["total_sv"]):
        raise ValueError(f"the model names {fields['total_sv']} support vectors and holds {len(lines)}")
    return _Model(float(fields["gamma"]), float(fields["rho"]), coefficients, support,
                  np.array(ranges["min_"]), np.array(ranges["max_"]))
