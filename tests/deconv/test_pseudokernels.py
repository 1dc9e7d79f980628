"""Kernels that are known come back, or not, and the comparison tells which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deconv.metrics import kernel_centroid, kernel_inner_product
from deconv.phantoms import Phantom, head_and_neck, measure
from deconv.pseudokernels import (
    SHAPES,
    Pseudokernel,
    blurred_again,
    inter_study_similarity,
    mean_kernel,
    pseudokernels,
    recover,
)
from deconv.result import Deconvolution
from deconv.volume import Volume

SPACING = (2.8, 2.73, 2.73)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return head_and_neck((12, 20, 20))


def test_four_shapes_that_move_nothing() -> None:
    """A Gaussian and three skewed along one axis each; sum 1, mean at the centre, unlike each other."""
    made = pseudokernels(SPACING)
    assert [one.name for one in made] == list(SHAPES) and len(made) == 4
    for one in made:
        for kernel in (one.kernel, one.fine):
            assert kernel.sum() == pytest.approx(1.0)
            np.testing.assert_allclose(kernel_centroid(kernel), 0.0, atol=0.05)
    pairs = inter_study_similarity([one.kernel for one in made])
    assert pairs.matrix[np.triu_indices(4, 1)].max() < 0.999


def test_each_skew_is_along_its_axis() -> None:
    """The third moment tells the axis."""
    for one in pseudokernels(SPACING):
        offsets = np.arange(29) - 14.0
        third = [float((one.fine.sum(axis=tuple(a for a in range(3) if a != i)) * offsets**3).sum()) for i in range(3)]
        skewed = [i for i, moment in enumerate(third) if abs(moment) > 1.0]
        axis = SHAPES[one.name]
        assert skewed == ([] if axis is None else [axis])


def test_blurring_again_is_what_the_scanner_does(phantom: Phantom) -> None:
    """The fine-grid blur equals the phantom's own; the PET volume lies where the phantom's lies."""
    one = pseudokernels(SPACING)[2]
    y = blurred_again(phantom.truth, one)
    expected = measure(phantom.truth.array.astype(np.float64), one.fine, rng=np.random.default_rng(0), spacing=SPACING)
    np.testing.assert_allclose(y.array, expected, rtol=1e-4, atol=0.5)
    assert y.same_grid(phantom.measured)


def test_both_orders_of_blur_and_mean_keep_activity(phantom: Phantom) -> None:
    """Blur before or after the mean: alike, not equal; both keep the activity of a source away from the borders."""
    source = np.zeros((32, 32, 32), np.float32)
    source[13:18, 15:20, 14:19] = 1000.0
    image = phantom.truth.axial(source, np.array(SPACING) / 2)
    one = pseudokernels(SPACING)[1]
    fine, pet = (blurred_again(image, one, on_pet_grid=flag) for flag in (False, True))
    for y in (fine, pet):
        assert y.array.sum() == pytest.approx(source.sum() / 8, rel=1e-3)
    assert 0 < np.abs(fine.array - pet.array).max() < 0.1 * fine.array.max()


def answering(kernel: np.ndarray | None, phantom: Phantom, seen: list[Volume]):
    """A method that always names the same kernel and keeps what it was given."""
    def method(source: Volume) -> Deconvolution:
        seen.append(source)
        named = None if kernel is None else kernel.astype(np.float32)
        return Deconvolution(phantom.truth, named, SPACING, "stub", "", {})
    return method


def test_recovery_compares_each_kernel_with_the_one_applied(phantom: Phantom) -> None:
    """A method that always answers the regular Gaussian scores 1 on it and less on the skewed ones."""
    made = pseudokernels(SPACING)
    seen: list[Volume] = []
    found = recover(phantom.truth, answering(made[0].kernel, phantom, seen))
    assert len(seen) == 4 and all(source.same_grid(phantom.measured) for source in seen)
    assert found[0].inner_product == pytest.approx(1.0)
    for one, k in zip(found[1:], made[1:], strict=True):
        assert one.inner_product == pytest.approx(kernel_inner_product(k.kernel, made[0].kernel))
        assert one.inner_product < 0.99


def test_own_kernels_may_be_given(phantom: Phantom) -> None:
    """Other widths than the standard ones."""
    wide = pseudokernels(SPACING, fwhm_mm=9.0)[:1]
    found = recover(phantom.truth, answering(wide[0].kernel, phantom, []), kernels=wide)
    assert [one.inner_product for one in found] == [pytest.approx(1.0)]


def test_a_method_without_a_kernel_cannot_be_validated(phantom: Phantom) -> None:
    """Interpolation names none."""
    with pytest.raises(ValueError, match="names no kernel"):
        recover(phantom.truth, answering(None, phantom, []))


def test_similarity_is_that_of_pairs() -> None:
    """Mean and standard deviation over the pairs, not over the matrix with its diagonal."""
    kernels = [one.kernel for one in pseudokernels(SPACING)[:3]]
    found = inter_study_similarity(kernels)
    pairs = [kernel_inner_product(kernels[i], kernels[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.mean == pytest.approx(np.mean(pairs)) and found.sd == pytest.approx(np.std(pairs, ddof=1))
    assert inter_study_similarity([kernels[0]] * 3).mean == pytest.approx(1.0)


def test_mean_kernel_is_a_kernel() -> None:
    """Sum 1, whatever the sums of its parts; the mean of equals is each of them."""
    gaussian: Pseudokernel = pseudokernels(SPACING)[0]
    doubled = replace(gaussian, kernel=2 * gaussian.kernel)
    np.testing.assert_allclose(mean_kernel([gaussian.kernel, doubled.kernel]), gaussian.kernel)


def test_what_cannot_be_compared_is_refused(phantom: Phantom) -> None:
    """One kernel, kernels of unlike size, an image that was never doubled."""
    made = pseudokernels(SPACING)
    with pytest.raises(ValueError, match="two kernels"):
        inter_study_similarity([made[0].kernel])
    with pytest.raises(ValueError, match="one size"):
        mean_kernel([made[0].kernel, made[0].fine])
    with pytest.raises(ValueError, match="even sizes"):
        blurred_again(Volume.axial(np.ones((3, 4, 4)), SPACING), made[0])
