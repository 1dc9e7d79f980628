"""The CT texture map: pyradiomics' numbers to the last bit, on the PET grid, where the anatomy is."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deconv import phantoms, texture
from deconv.texture import guide_map, long_run_emphasis, resampled
from deconv.volume import Volume

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def reference(ct: NDArray, *, mask: NDArray | None = None, radius: int = 3, batch: int = 1000, masked: bool = True,
              bin_width: float = 25) -> NDArray[np.float64]:
    """The map of pyradiomics; the test is skipped where it is not installed."""
    radiomics = pytest.importorskip("radiomics")
    import SimpleITK as sitk
    from radiomics import glrlm

    radiomics.logger.setLevel(logging.ERROR)
    area = np.ones(ct.shape, np.uint8) if mask is None else mask.astype(np.uint8)
    feature = glrlm.RadiomicsGLRLM(
        sitk.GetImageFromArray(ct), sitk.GetImageFromArray(area), voxelBased=True, kernelRadius=radius,
        binWidth=bin_width, voxelBatch=batch, maskedKernel=masked,
    )
    feature.enableFeatureByName("LongRunEmphasis", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its nanmean over angles that are all empty
        return sitk.GetArrayFromImage(feature.execute()["LongRunEmphasis"])


@st.composite
def volumes(draw: st.DrawFn) -> tuple[NDArray, NDArray | None]:
    """A small CT of few or many grey levels, integer or float, and a mask of any density or none."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=3, max_size=3)))
    if np.prod(shape) < 2:
        shape = (2, 1, 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([20, 60, 1000]))
    values = rng.integers(-spread, spread, shape) + draw(st.sampled_from([-1000, 0, 3]))
    kind = draw(st.sampled_from([np.int16, np.int64, np.float32, np.float64]))
    ct = values.astype(kind) + (rng.random(shape).astype(kind) if np.issubdtype(kind, np.floating) else 0)
    density = draw(st.sampled_from([None, 0.05, 0.3, 0.8]))
    if density is None:
        return ct.astype(kind), None
    mask = rng.random(shape) < density
    mask.flat[rng.integers(mask.size)] = True
    return ct.astype(kind), mask


@SETTINGS
@given(volumes(), st.integers(1, 4), st.sampled_from([1, 7, 1000]), st.booleans())
def test_map_equals_pyradiomics_to_the_last_bit(
    case: tuple[NDArray, NDArray | None], radius: int, batch: int, masked: bool
) -> None:
    """Any volume, mask, radius and batch: the same float64 values and the same NaNs as pyradiomics 3.0.1."""
    ct, mask = case
    expected = reference(ct, mask=mask, radius=radius, batch=batch, masked=masked)
    found = long_run_emphasis(ct, mask=mask, kernel_radius=radius, voxel_batch=batch, masked_kernel=masked)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bin_width", [10, 25, 12.5])
@pytest.mark.parametrize("radius", [1, 3])
def test_ct_of_the_head_equals_pyradiomics(radius: int, bin_width: float) -> None:
    """On a synthetic CT with tissue, bone, air and noise, with and without a body mask."""
    ct = phantoms.head_and_neck((7, 13, 14), seed=3).ct
    assert ct is not None
    expected = reference(ct.array, radius=radius, bin_width=bin_width)
    np.testing.assert_array_equal(long_run_emphasis(ct.array, kernel_radius=radius, bin_width=bin_width), expected)
    body = ct.array > -300
    expected = reference(ct.array, mask=body, radius=radius, batch=-1, bin_width=bin_width)
    found = long_run_emphasis(ct.array, mask=body, kernel_radius=radius, bin_width=bin_width)
    np.testing.assert_array_equal(found, expected)


def test_slabs_do_not_change_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plane at a time gives what the whole volume gives, also where a mask leaves angles empty."""
    rng = np.random.default_rng(0)
    ct = rng.integers(-200, 200, (9, 8, 7))
    thin = np.zeros(ct.shape, bool)
    thin[::4, 3, ::2] = True
    whole = [long_run_emphasis(ct), long_run_emphasis(ct, mask=thin)]
    monkeypatch.setattr(texture, "_SLAB_BYTES", 1.0)
    np.testing.assert_array_equal(long_run_emphasis(ct), whole[0])
    np.testing.assert_array_equal(long_run_emphasis(ct, mask=thin), whole[1])


def test_flat_region_is_all_long_runs() -> None:
    """Water: every line of a 7 x 7 x 7 box is one run; along an axis that is 49 for each of 49 lines."""
    along_axis = 49.0
    lengths = np.array([min(7 - abs(i), 7 - abs(j)) if i * j > 0 else 7 - max(abs(i), abs(j)) if i * j == 0 else
                        max(0, 7 - abs(i) - abs(j)) for i in range(-6, 7) for j in range(-6, 7)])
    face = np.mean([(7 - abs(i)) ** 2 for i in range(-6, 7)])
    corner = np.mean(lengths[lengths > 0] ** 2.0)
    centre = long_run_emphasis(np.zeros((7, 7, 7)))[3, 3, 3]
    assert centre == pytest.approx((3 * along_axis + 6 * face + 4 * corner) / 13, rel=1e-12)


def test_every_voxel_its_own_level_has_runs_of_one() -> None:
    """Where no two neighbours share a grey level, long run emphasis is 1 everywhere."""
    ct = 1000.0 * np.arange(5 * 6 * 7).reshape(5, 6, 7)
    assert np.all(long_run_emphasis(ct, kernel_radius=2) == 1.0)


@pytest.mark.parametrize(("ct", "options"), [
    (np.zeros((4, 4)), {}), (np.zeros((1, 1, 1)), {}), (np.full((3, 3, 3), np.nan), {}),
    (np.zeros((3, 3, 3)), {"mask": np.zeros((3, 3, 3))}), (np.zeros((3, 3, 3)), {"mask": np.ones((3, 3, 2))}),
    (np.zeros((3, 3, 3)), {"bin_width": 0}), (np.zeros((3, 3, 3)), {"kernel_radius": 0}),
    (np.zeros((3, 3, 3)), {"kernel_radius": 61}), (np.zeros((3, 3, 3)), {"voxel_batch": 0}),
])
def test_what_has_no_texture_is_refused(ct: NDArray, options: dict) -> None:
    """No volume, no mask voxels or settings without sense: ValueError and not a wrong map."""
    with pytest.raises(ValueError):
        long_run_emphasis(ct, **options)


def ramp(volume: Volume) -> NDArray[np.float64]:
    """A linear function of place in LPS mm, at the voxels of `volume`."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij"), axis=-1)
    return volume.position(index) @ np.array([0.7, -1.3, 2.1]) + 10.0


def test_resampling_keeps_every_place_also_between_oblique_grids() -> None:
    """A function linear in LPS is the same function after resampling to a tilted grid of other voxels."""
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    ct = Volume(np.zeros((30, 40, 50)), np.array([2.0, 1.5, 1.0]), np.array([5.0, -7.0, 3.0]), turn, "[hnsf'U]")
    ct = ct.with_array(ramp(ct))
    tilt = np.linalg.qr(np.eye(3) + 0.1 * np.random.default_rng(6).normal(size=(3, 3)))[0]
    middle = ct.position((10, 12, 20))
    pet = Volume(np.zeros((6, 7, 8)), np.array([2.5, 2.0, 2.2]), middle, ct.direction @ tilt, "Bq/ml")
    values, covered = resampled(ct, pet)
    assert covered.any()
    inner = covered.copy()
    index = ct.index(pet.position(np.stack(np.meshgrid(*[np.arange(n) for n in pet.shape], indexing="ij"), axis=-1)))
    inner &= np.all((index >= 0) & (index <= np.array(ct.shape) - 1), axis=-1)
    assert inner.sum() > 20
    np.testing.assert_allclose(values[inner], ramp(pet)[inner], atol=2e-3)


def test_outside_the_ct_there_is_no_texture() -> None:
    """A CT that covers half of the PET guides only that half; air around the body guides nothing."""
    phantom = phantoms.head_and_neck((16, 24, 24))
    ct = phantom.ct
    assert ct is not None
    half = Volume(ct.array[:8], ct.spacing, ct.origin, ct.direction, ct.unit)
    guide = guide_map(half, phantom.measured)
    assert guide.shape == phantom.measured.shape and guide.dtype == np.float32
    assert guide.min() == 0.0 and 0.5 < guide.max() <= 1.0
    assert np.all(guide[8:] == 0)
    air = (ct.array[:8] < -900) & (np.indices(half.shape)[1] < 2)
    assert air.any() and np.all(guide[:8][air] == 0)


def test_a_ct_of_another_place_is_refused() -> None:
    """No overlap is no guide: ValueError and not a black map."""
    phantom = phantoms.head_and_neck((16, 24, 24))
    ct = phantom.ct
    assert ct is not None
    elsewhere = Volume(ct.array, ct.spacing, ct.origin + 1000.0, ct.direction, ct.unit)
    with pytest.raises(ValueError, match="no body"):
        guide_map(elsewhere, phantom.measured)
