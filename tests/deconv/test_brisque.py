"""BRISQUE: the scores of the package whose model it is, and the order of pictures that anyone would see."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from deconv.phantoms import head_and_neck
from deconv.quality.brisque import brisque, brisque_volume, features, pictures
from deconv.volume import Volume


def natural(size: int = 96, seed: int = 0) -> np.ndarray:
    """A picture with the spectrum of a photograph (1/f) and one edge, in [0, 1]."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    frequency[0, 0] = 1
    grain = np.random.default_rng(seed).standard_normal((size, size))
    texture = np.fft.ifft2(np.fft.fft2(grain) / frequency).real
    texture = (texture - texture.min()) / (texture.max() - texture.min())
    i, j = np.indices((size, size)) / size
    return np.clip(0.7 * texture + 0.3 * (np.hypot(i - 0.5, j - 0.4) < 0.25), 0, 1)


def noisy(sd: float) -> np.ndarray:
    picture = natural()
    return np.clip(picture + sd * np.random.default_rng(1).standard_normal(picture.shape), 0, 1)


def projection() -> np.ndarray:
    measured = head_and_neck((32, 48, 48), seed=1).measured.array.astype(float)
    return (measured / measured.max()).max(axis=0)


# computed with the package brisque 0.2.0 (numpy 1.26, OpenCV 4.11, libsvm 3.37)
KNOWN = {
    "natural": (natural(), 29.0020),
    "blurred": (ndimage.gaussian_filter(natural(), 2), 67.8704),
    "noisy": (noisy(0.05), 47.2435),
    "odd size": (natural(101, 3)[:67], 23.3316),
    "PET": (projection(), 43.6825),
}


@pytest.mark.parametrize("name", KNOWN)
def test_scores_are_those_of_the_reference(name: str) -> None:
    """Photograph-like, blurred, noisy, odd sizes, PET: within 0.01."""
    picture, score = KNOWN[name]
    assert brisque(picture) == pytest.approx(score, abs=0.01)


def test_distortion_raises_the_score() -> None:
    """The more blur and the more noise, the worse."""
    blurred = [brisque(ndimage.gaussian_filter(natural(), sigma)) for sigma in (1, 2, 4)]
    grainy = [brisque(noisy(sd)) for sd in (0.02, 0.05, 0.1)]
    for scores in (blurred, grainy):
        assert brisque(natural()) < scores[0] < scores[1] < scores[2]


def test_features_of_gaussian_noise_are_known() -> None:
    """36 of them; the shape of a Gaussian would be 2, and normalising by the local deviation takes off its tails."""
    found = features(np.clip(0.5 + 0.1 * np.random.default_rng(0).standard_normal((256, 256)), 0, 1))
    assert found.shape == (36,)
    assert 2.0 < found[0] < 6.0
    assert found[[3, 7, 11, 15]] == pytest.approx(0.0, abs=0.15)  # means of products


def test_a_mirror_image_has_its_diagonals_exchanged() -> None:
    """All other features are those of the picture, at both scales."""
    mirrored = features(natural()[:, ::-1]).reshape(2, 18)
    mirrored[:, 10:] = np.roll(mirrored[:, 10:], 4, axis=1)
    np.testing.assert_allclose(mirrored.ravel(), features(natural()), atol=1e-6)


def test_volume_is_the_mean_over_its_pictures() -> None:
    """Projections along three axes by default; slices that show nothing are left out."""
    volume = head_and_neck((24, 40, 40), seed=1).measured
    shown = pictures(volume)
    assert [p.shape for p in shown] == [(40, 40), (24, 40), (24, 40)]
    assert brisque_volume(volume) == pytest.approx(np.mean([brisque(p) for p in shown]))
    padded = Volume.axial(np.concatenate([volume.array, np.zeros((3, 40, 40), np.float32)]), volume.spacing)
    assert brisque_volume(padded, of="slices") == pytest.approx(brisque_volume(volume, of="slices"))


def test_window_is_shared_when_given() -> None:
    """One hot voxel darkens the picture, unless the window is told."""
    volume = head_and_neck((24, 40, 40), seed=1).measured
    top = float(volume.array.max())
    hot = volume.array.copy()
    hot[0, 0, 0] = 3 * top
    assert pictures(volume.with_array(hot))[1].mean() < 0.5 * pictures(volume)[1].mean()
    same = pictures(volume.with_array(hot), window=(0.0, top))[0]
    assert np.count_nonzero(same != pictures(volume)[0]) == 1


@pytest.mark.parametrize(("picture", "reason"), [
    (np.full((32, 32), 0.5), "without texture"), (np.zeros((8, 32)), "at least 16"),
    (255 * natural(), r"values in \[0, 1\]"), (np.zeros((32, 32, 3)), "is \\(H, W\\)"),
])
def test_what_is_no_picture_is_refused(picture: np.ndarray, reason: str) -> None:
    """Constant, too small, another range of values, colours."""
    with pytest.raises(ValueError, match=reason):
        brisque(picture)


def test_empty_windows_and_volumes_are_refused() -> None:
    """Nothing to show is an error and not a score."""
    volume = Volume.axial(np.zeros((20, 20, 20), np.float32), (2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="window"):
        brisque_volume(volume)
    with pytest.raises(ValueError, match="no slice"):
        brisque_volume(volume, of="slices", window=(0.0, 1.0))


def test_the_model_is_unchanged_and_has_its_licence(shared_data: Path) -> None:
    """Model and ranges are those of the public package, with its licence beside them."""
    folder = resources.files("deconv.quality") / "brisque_model"
    for name in ("svm.txt", "normalize.json", "LICENSE"):
        assert (folder / name).read_bytes() == (shared_data / "brisque" / name).read_bytes()
