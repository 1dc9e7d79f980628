"""Gk of "best" reads widths off an image: they turn with it, do not depend on its unit, and grow with the blur."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deconv import psfnet
from deconv.psfnet import WINDOW, combined, read, windows
from deconv.scenes import Blur, blurred, random_truth
from tests.deconv.scene import SPACING, measured, truth

SHAPE = (9, 12, 14)


def scene(fwhm: tuple[float, float, float], seed: int = 3) -> NDArray[np.float32]:
    """A random scene that no network was taught on: the seed is the test's own."""
    rng = np.random.default_rng(seed)
    return blurred(random_truth((44, 44, 44), rng), Blur(fwhm, (0.0, 0.0, 0.0), 0.0, 0.0, 0.0), 3, rng)


@pytest.fixture(scope="module")
def y() -> NDArray[np.float32]:
    return measured(truth(SHAPE)).array / np.float32(1e4)


@pytest.fixture(scope="module")
def said(y: NDArray[np.float32]):
    return read(y, SPACING, count=1)


def test_the_reading_turns_with_the_image(y, said):
    """Axes exchanged: widths and standard deviations are, too."""
    order = (2, 0, 1)
    turned = read(np.ascontiguousarray(y.transpose(order)), [SPACING[a] for a in order], count=1)
    np.testing.assert_allclose(turned.fwhm_mm, [said.fwhm_mm[a] for a in order], rtol=1e-5)
    np.testing.assert_allclose(turned.log_sd, [said.log_sd[a] for a in order], rtol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_mirror_image_has_the_same_widths(y, said, axis):
    """All mirror images pass through the network; which one is shown does not matter."""
    mirrored = read(np.ascontiguousarray(np.flip(y, axis)), SPACING, count=1)
    np.testing.assert_allclose(mirrored.fwhm_mm, said.fwhm_mm, rtol=1e-5)


def test_the_unit_does_not_matter(y, said):
    """Bq/mL or SUV; the voxel size only scales."""
    np.testing.assert_allclose(read(y * np.float32(2e4), SPACING, count=1).fwhm_mm, said.fwhm_mm, rtol=1e-5)
    larger = read(y, [1.5 * s for s in SPACING], count=1)
    np.testing.assert_allclose(larger.fwhm_mm, 1.5 * np.array(said.fwhm_mm), rtol=1e-6)


def test_wider_blur_reads_wider():
    """One scene under three PSFs: in their order, the middle one within a third, the wider axis told."""
    widths = [np.array(read(scene((w, w, 1.3 * w)), (3.0, 3.0, 3.0), count=1).fwhm_mm) / 3 for w in (1.4, 2.2, 3.4)]
    assert np.all(widths[0] < widths[1]) and np.all(widths[1] < widths[2])
    np.testing.assert_allclose(np.log(widths[1] / [2.2, 2.2, 1.3 * 2.2]), 0.0, atol=np.log(4 / 3))
    assert widths[1][2] > widths[1][0]


def test_fine_voxels_are_averaged_first():
    """Below 1.9 mm two voxels become one: the reading is that of the averaged image, to the bit."""
    fine = np.abs(np.random.default_rng(0).normal(size=(17, 20, 22))).astype(np.float32).cumsum(axis=1)
    d, h, w = (n // 2 for n in fine.shape)
    pooled = fine[: 2 * d].reshape(d, 2, h, 2, w, 2)
    for axis in (5, 3, 1):
        pooled = pooled.mean(axis=axis)
    one, other = read(fine, (1.2, 1.1, 1.8), count=1), read(pooled, (2.4, 2.2, 3.6), count=1)
    np.testing.assert_allclose(one.fwhm_mm, other.fwhm_mm, rtol=1e-5)


def test_a_single_organ_in_the_dark_is_read():
    """Nothing around it, exactly: a width all the same, and no number that is none."""
    y = np.zeros((24, 24, 48), dtype=np.float32)
    y[8:16, 8:16, 24] = 1.0
    assert np.isfinite(read(y, (3.0, 3.0, 3.0)).fwhm_mm).all()


def test_an_image_without_edges_is_refused():
    """Said in words."""
    with pytest.raises(ValueError, match="same everywhere"):
        read(np.full((6, 10, 10), 0.5, dtype=np.float32), SPACING)


# --- windows


def test_windows_lie_where_the_edges_are():
    """At most as many as asked for, of the network's size or the image's; the first holds the organ; flat ones none."""
    y = np.full((30, 61, 20), 0.1, dtype=np.float32)
    y[10:16, 40:46, 8:12] = 1.0
    found = windows(y, 3)
    assert 1 <= len(found) <= 3 and all(part.shape == (WINDOW, WINDOW, 20) for part in found)
    assert (found[0] == 1).sum() == 6 * 6 * 4
    assert all(part.max() > part.min() for part in windows(y, 100))


def test_every_voxel_may_be_in_a_window():
    """A spot anywhere, also in the last voxel, is seen."""
    for place in ((0, 0, 0), (24, 49, 72), (12, 25, 40)):
        y = np.zeros((25, 50, 73), dtype=np.float32)
        y[place] = 1.0
        assert windows(y, 1)[0].max() == 1.0


def test_a_faint_lesion_counts_beside_a_hot_bladder():
    """Gradient energy over the window's own maximum: activity alone does not decide."""
    y = np.zeros((24, 24, 120), dtype=np.float32)
    y[8:16, 8:16, 8:16] = 1.0
    y[8:16, 8:16, 100:108] = 0.5
    assert any(part.max() == 0.5 for part in windows(y, 8))


# --- random effects


def rows(widths: list[float], sd: list[float]) -> NDArray[np.float64]:
    one = np.stack([np.log(widths), 2 * np.log(sd)], axis=1)
    return np.repeat(one[:, None], 3, axis=1)


def test_readings_that_agree_are_averaged_by_their_variances():
    """And never believed beyond what windows of one image can tell."""
    found = combined(rows([2.0, 2.0, 2.0], [0.1, 0.2, 0.4]))
    np.testing.assert_allclose(found.fwhm_mm, 2.0)
    assert found.windows == 3 and 0.07 <= found.log_sd[0] <= 0.1
    assert combined(rows([2.0] * 50, [0.01] * 50)).log_sd == (psfnet.LEAST_LOG_SD,) * 3
    near_first = combined(rows([2.0, 2.2], [0.05, 0.2])).fwhm_mm[0]
    assert 2.0 < near_first < 2.05


def test_readings_that_disagree_are_doubted():
    """More than each of them doubts itself (DerSimonian and Laird): the sd covers their distance."""
    found = combined(rows([1.5, 3.0], [0.05, 0.05]))
    assert found.log_sd[0] > 0.25
    np.testing.assert_allclose(found.fwhm_mm, np.sqrt(1.5 * 3.0), rtol=1e-6)


def test_one_reading_stands_for_itself():
    """Nothing to compare it with."""
    found = combined(rows([2.5], [0.2]))
    np.testing.assert_allclose(found.fwhm_mm, 2.5)
    np.testing.assert_allclose(found.log_sd, 0.2)
