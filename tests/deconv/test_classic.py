"""Classic methods: the forward model is the physics, the solvers find the truth, nothing moves and nothing is lost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import deconv
from deconv import classic, metrics
from deconv.interpolate import doubled, doubled_nearest
from deconv.phantoms import Phantom, average_pool, head_and_neck, psf_kernel, spheres
from deconv.pooled import PooledBlur, fold, smooth_length, unfold
from deconv.result import Cancelled, Progress
from deconv.tv import noise_detail, tv_deconvolve, tv_tiled, tv_weight
from deconv.volume import Volume

SHAPES = st.tuples(st.integers(2, 7), st.integers(2, 7), st.integers(2, 7))
KERNELS = st.tuples(*[st.sampled_from([1, 3, 5])] * 3)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return spheres((16, 32, 32), seed=1)


def run(name: str, volume: Volume, **overrides: object) -> deconv.Deconvolution:
    method = deconv.method(name)
    return method.deconvolve(volume, method.settings("default", **overrides))


# --- forward model

@settings(max_examples=30, deadline=None, derandomize=True)
@given(SHAPES, KERNELS, st.sampled_from(["fine", "pet"]), st.integers(0, 99))
def test_forward_model_is_blur_and_mean(shape: tuple, size: tuple, grid: str, seed: int) -> None:
    """A x = P(x ∗ k) for a kernel on the fine grid and P(x) ∗ k for one on the PET grid, computed directly."""
    rng = np.random.default_rng(seed)
    kernel = rng.random(size)
    model = PooledBlur(shape, kernel, kernel_grid=grid)
    x = rng.random(model.fine)
    unit = kernel / kernel.sum()
    if grid == "fine":
        expected = average_pool(ndimage.convolve(x, unit, mode="wrap"))
    else:
        expected = ndimage.convolve(average_pool(x), unit, mode="wrap")
    np.testing.assert_allclose(model.forward(torch.from_numpy(x).float()).numpy(), expected, atol=2e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SHAPES, KERNELS, st.sampled_from(["fine", "pet"]), st.integers(0, 99))
def test_adjoint_is_the_adjoint(shape: tuple, size: tuple, grid: str, seed: int) -> None:
    """<A x, y> = <x, A^T y> for all x and y."""
    rng = np.random.default_rng(seed)
    model = PooledBlur(shape, rng.random(size), kernel_grid=grid)
    x = torch.from_numpy(rng.standard_normal(model.fine)).float()
    y = torch.from_numpy(rng.standard_normal(model.coarse)).float()
    left, right = float((model.forward(x) * y).sum()), float((x * model.adjoint(y)).sum())
    assert left == pytest.approx(right, abs=1e-3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(SHAPES, st.integers(0, 99))
def test_folding_is_every_second_voxel(coarse: tuple, seed: int) -> None:
    """Eight aliased frequencies added up are the spectrum of every second voxel; unfolding repeats a spectrum."""
    fine = tuple(2 * n for n in coarse)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal(fine))
    folded = fold(torch.fft.rfftn(x), coarse) / 8
    torch.testing.assert_close(folded, torch.fft.rfftn(x[::2, ::2, ::2]))
    apart = torch.zeros_like(x)
    apart[::2, ::2, ::2] = x[::2, ::2, ::2]
    n0, n1, _ = coarse
    torch.testing.assert_close(unfold(folded, coarse), torch.fft.rfftn(apart)[:n0, :n1])


def test_padding_leaves_the_field_of_view_and_joins_the_borders() -> None:
    """The volume stays; the added voxels lead smoothly from the last to the first; lengths suit the FFT."""
    model = PooledBlur((5, 7, 11), np.ones((3, 5, 7)), kernel_grid="pet")
    y = torch.from_numpy(np.random.default_rng(0).random((5, 7, 11)))
    padded = model.pad(y)
    assert tuple(padded.shape) == model.coarse
    torch.testing.assert_close(padded[:5, :7, :11], y)
    assert padded.min() >= y.min() - 1e-12 and padded.max() <= y.max() + 1e-12
    assert all(n == smooth_length(n) for n in model.coarse)
    assert [smooth_length(n) for n in (1, 7, 11, 13, 121, 275)] == [1, 8, 12, 15, 125, 288]


@pytest.mark.parametrize("kernel", [np.ones((2, 3, 3)), np.ones((3, 3)), np.zeros((3, 3, 3))])
def test_kernel_without_a_centre_or_a_sum_is_refused(kernel: np.ndarray) -> None:
    """Even sizes have no centre voxel; a sum of zero cannot be one."""
    with pytest.raises(ValueError, match="odd"):
        PooledBlur((4, 4, 4), kernel)


# --- interpolation

@pytest.mark.parametrize("interpolate", [doubled, lambda y: doubled(y, 1)])
def test_linear_ramp_stays_where_it_is(interpolate: object) -> None:
    """Half-pixel convention: away from the border a ramp in mm is the same ramp on the doubled grid."""
    source = Volume.axial(np.zeros((24, 26, 28)), (3.0, 2.0, 2.5), origin=(10, -20, 30))

    def ramp(volume: Volume) -> np.ndarray:
        index = np.stack(np.meshgrid(*[np.arange(n) for n in volume.shape], indexing="ij"), axis=-1)
        return volume.position(index) @ np.array([1.0, -2.0, 0.5])

    fine = source.doubled(interpolate(ramp(source)))  # type: ignore[operator]
    inner = (slice(16, -16),) * 3
    np.testing.assert_allclose(fine.array[inner], ramp(fine)[inner], atol=1e-3)


@pytest.mark.parametrize("name", ["cubic", "nearest", "richardson-lucy", "tv"])
def test_a_point_keeps_its_place(name: str) -> None:
    """The centroid of a blurred point, in LPS mm, is that of the source within 1/50 voxel."""
    image = np.zeros((17, 18, 19), np.float32)
    image[8, 9, 7] = 1000.0
    source = Volume.axial(ndimage.gaussian_filter(image, 1.2), (3.0, 2.5, 2.5), origin=(5, 6, 7))
    result = run(name, source).image
    places = [v.position(ndimage.center_of_mass(v.array)) for v in (source, result)]
    np.testing.assert_allclose(places[0], places[1], atol=0.05)


def test_cubic_passes_through_a_smooth_image_and_nearest_repeats_it() -> None:
    """Cubic interpolation of a slow cosine is the cosine within 1e-3; nearest pools back to the source exactly."""
    wave = np.cos(2 * np.pi * np.arange(40) / 20)[:, None, None] * np.ones((40, 3, 3))
    at = (np.arange(80) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(doubled(wave)[8:-8, 2, 2], np.cos(2 * np.pi * at / 20)[8:-8], atol=1e-3)
    np.testing.assert_array_equal(average_pool(doubled_nearest(wave)), wave.astype(np.float32))
    with pytest.raises(ValueError, match="order"):
        doubled(wave, order=0)


# --- the methods

def test_methods_are_found_behind_the_one_door() -> None:
    """The registry of deconv knows each by its name; presets are frozen and say their name."""
    for name, method in classic.METHODS.items():
        assert deconv.method(name) is method
        for preset, chosen in method.PRESETS.items():
            assert chosen.preset == preset == method.settings(preset).preset


@pytest.mark.parametrize("name", ["cubic", "nearest", "richardson-lucy", "tv"])
def test_result_lies_on_the_doubled_grid_with_the_activity_of_the_source(phantom: Phantom, name: str) -> None:
    """Same field of view, same unit, total activity within 0.05 %, settings as plain JSON."""
    result = run(name, phantom.measured)
    assert result.method == name and result.preset == "default"
    assert result.image.same_grid(phantom.truth) and result.image.unit == phantom.measured.unit
    assert abs(result.metrics["activity_change"]) < 5e-4
    assert result.metrics["activity_change"] == pytest.approx(
        metrics.activity_change(result.image.array, phantom.measured.array), abs=1e-9)
    assert json.loads(json.dumps(result.settings))["preset"] == "default"
    assert (result.kernel is None) == (name in ("cubic", "nearest"))
    if result.kernel is not None:
        assert result.kernel.sum() == pytest.approx(1.0, abs=1e-5)
        assert result.kernel_spacing == tuple(phantom.measured.spacing)
        assert metrics.kernel_inner_product(result.kernel, phantom.psf) > 0.999


def test_methods_rank_as_the_yardsticks_do(phantom: Phantom) -> None:
    """Spheres at 16 x 32 x 32: TV below 0.193, Richardson-Lucy below 0.284, both below cubic, cubic near 0.417."""
    scores = {n: metrics.nrmse(run(n, phantom.measured).image.array, phantom.truth.array) for n in classic.METHODS}
    assert scores["tv"] < 0.193 and scores["richardson-lucy"] < 0.284
    assert scores["cubic"] == pytest.approx(0.417, abs=0.02) and scores["cubic"] < scores["nearest"]


def test_tv_recovers_spheres_and_head_and_neck() -> None:
    """With the true PSF: NRMSE below the yardsticks 0.172 (head and neck) and 0.242 (spheres with 10 % noise)."""
    head = head_and_neck((32, 48, 48))
    assert metrics.nrmse(run("tv", head.measured).image.array, head.truth.array) < 0.172
    noisy = spheres((24, 48, 48), noise=0.1)
    assert metrics.nrmse(run("tv", noisy.measured).image.array, noisy.truth.array) < 0.242


def test_true_width_beats_a_wrong_one(phantom: Phantom) -> None:
    """A millimetre too narrow or too wide costs NRMSE."""
    scores = {w: metrics.nrmse(run("tv", phantom.measured, psf_fwhm_mm=w).image.array, phantom.truth.array)
              for w in (5.0, 6.0, 7.0)}
    assert scores[6.0] < 0.75 * min(scores[5.0], scores[7.0])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_skewed_kernel_is_undone_only_by_itself(axis: int) -> None:
    """A kernel skewed along one axis deblurs as it is and not mirrored: it is a convolution kernel."""
    skewed = spheres((16, 32, 32), skew=0.6, skew_axis=axis)
    right = run("tv", skewed.measured, psf_kernel=skewed.psf)
    wrong = run("tv", skewed.measured, psf_kernel=np.flip(skewed.psf, axis))
    scores = [metrics.nrmse(r.image.array, skewed.truth.array) for r in (right, wrong)]
    assert scores[0] < 0.2 and scores[0] < 0.75 * scores[1]


@pytest.mark.parametrize("name", ["richardson-lucy", "tv"])
def test_constant_image_stays_constant_to_the_border(name: str) -> None:
    """No border artefact: 5 kBq/mL everywhere in, 5 kBq/mL everywhere out."""
    result = run(name, Volume.axial(np.full((9, 10, 11), 5000.0), (3, 3, 3)))
    np.testing.assert_allclose(result.image.array, 5000.0, rtol=2e-3)


@pytest.mark.parametrize("name", ["richardson-lucy", "tv"])
def test_same_input_same_bits(phantom: Phantom, name: str) -> None:
    """Two runs are bit-identical, and never negative."""
    first, second = run(name, phantom.measured), run(name, phantom.measured)
    np.testing.assert_array_equal(first.image.array, second.image.array)
    assert first.image.array.min() >= 0


@pytest.mark.parametrize("name", ["richardson-lucy", "tv"])
def test_progress_is_told_and_cancelling_passes(phantom: Phantom, name: str) -> None:
    """One Progress an iteration, in order; Cancelled from on_step ends the method."""
    seen: list[Progress] = []
    method = deconv.method(name)
    result = method.deconvolve(phantom.measured, method.settings("default", iterations=5), on_step=seen.append)
    assert [p.step for p in seen] == [1, 2, 3, 4, 5] and {p.steps for p in seen} == {5}
    np.testing.assert_array_equal(result.losses[name], np.array([p.loss for p in seen], np.float32))

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        method.deconvolve(phantom.measured, method.settings(), on_step=stop)


def test_richardson_lucy_fits_better_with_every_iteration(phantom: Phantom) -> None:
    """The misfit falls monotonically on data without noise, and the total is kept."""
    losses = run("richardson-lucy", phantom.measured, iterations=20).losses["richardson-lucy"]
    assert np.all(np.diff(losses) < 0)


def test_unknown_presets_settings_and_volumes_are_refused(phantom: Phantom) -> None:
    """The message lists what exists."""
    tv = deconv.method("tv")
    with pytest.raises(ValueError, match="default, quick"):
        tv.settings("best")
    with pytest.raises(ValueError, match="iterations"):
        tv.settings("default", iteration=3)
    with pytest.raises(TypeError, match="TVSettings"):
        tv.deconvolve(phantom.measured, deconv.method("cubic").settings())
    with pytest.raises(ValueError, match="no positive"):
        run("tv", Volume.axial(np.zeros((4, 4, 4)), (1, 1, 1)))
    for wrong in ({"psf_fwhm_mm": 0}, {"psf_fwhm_mm": (1.0, 2.0)}, {"iterations": 0}, {"weight": 0.0},
                  {"psf_kernel": np.ones((2, 2, 2))}, {"psf_kernel": -np.ones((3, 3, 3))}):
        with pytest.raises(ValueError):
            tv.settings("default", **wrong)


# --- TV solver

def test_tiles_join_without_a_seam() -> None:
    """Cut right through the spheres, the image is the whole solution within 1 % of its maximum, NRMSE 0.3 %."""
    tall = spheres((48, 40, 24), spacing=(2.8, 3.5, 3.5), seed=3)
    y = torch.from_numpy(np.array(tall.measured.array))
    kernel = psf_kernel(6.0, tall.truth.spacing, size=13)
    whole = tv_deconvolve(y, kernel, kernel_grid="fine", lam=1e-3)
    tiled = tv_tiled(y, kernel, kernel_grid="fine", lam=1e-3, tile=(32, 32, 32))
    assert tiled.count == 6 and not tiled.smaller
    assert np.abs(whole.numpy() - tiled.image).max() < 0.01 * float(whole.max())
    assert metrics.nrmse(tiled.image, whole.numpy()) < 0.003
    steps: list[Progress] = []
    tv_tiled(y, kernel, kernel_grid="fine", tile=(32, 32, 32), iterations=3, on_step=steps.append)
    assert [p.step for p in steps] == list(range(1, steps[-1].steps + 1))
    once = tv_tiled(y, kernel, kernel_grid="fine", lam=1e-3)
    np.testing.assert_array_equal(once.image, whole.numpy())


def test_tv_minimises_what_it_says() -> None:
    """No nearby image has a lower objective 4 ||A x - y||² + lam TV(x): the solution is the minimum."""
    small = spheres((16, 24, 24), spacing=(2.8, 3.6, 3.6))
    peak = small.measured.array.max()
    model = PooledBlur(small.measured.shape, small.psf_fine, kernel_grid="fine")
    y = torch.from_numpy(np.array(small.measured.array / peak))
    lam = 3e-3
    from deconv.tv import _solve

    def objective(x: torch.Tensor) -> float:
        slopes = [torch.roll(x, -1, a) - x for a in range(3)]
        misfit = (model.forward(x) - model.pad(y)).double().square().sum()
        return float(4 * misfit + lam * torch.sqrt(sum(s.double().square() for s in slopes)).sum())

    captured: list[torch.Tensor] = []
    model.crop = lambda x: captured.append(x.clamp_min(0)) or x  # type: ignore[method-assign, func-returns-value]
    _solve(model, y, lam, 400, (1, 1, 1), lambda step, change: None)
    best = objective(captured[0])
    generator = torch.Generator().manual_seed(0)
    for size in (0.003, 0.03):
        for _ in range(3):
            other = (captured[0] + size * torch.randn(captured[0].shape, generator=generator)).clamp_min(0)
            assert objective(other) > best
    smooth = torch.from_numpy(ndimage.gaussian_filter(captured[0].numpy(), 0.3))
    assert objective(smooth) > best and objective(0.99 * captured[0]) > best


@pytest.mark.parametrize("options", [{"lam": 0.0}, {"iterations": 0}, {"tile": (4, 4, 4)},
                                     {"memory_bytes": 1e5}, {"kernel_grid": "ct"}])
def test_solver_refuses_settings_without_sense(options: dict) -> None:
    """lam and iterations must be positive, tiles and memory large enough."""
    y = torch.ones(24, 4, 4)
    with pytest.raises(ValueError):
        tv_tiled(y, np.ones((9, 3, 3)), **options)


@pytest.mark.parametrize("y", [torch.ones(4, 4), torch.zeros(4, 4, 4), torch.full((4, 4, 4), torch.nan)])
def test_solver_refuses_what_is_no_image(y: torch.Tensor) -> None:
    """Two dimensions, no activity, values that are not finite."""
    with pytest.raises(ValueError):
        tv_deconvolve(y, np.ones((3, 3, 3)))


def test_weight_of_tv_follows_the_noise() -> None:
    """More noise, more TV; white noise is read off to a tenth of its level."""
    detail = [noise_detail(spheres((16, 32, 32), noise=n, noise_fwhm_mm=0.0).measured.array) for n in (0.0, 0.05, 0.1)]
    assert detail[0] < 0.005
    assert detail[1:] == pytest.approx([0.05, 0.1], rel=0.1)
    weights = [tv_weight(spheres((16, 32, 32), noise=n).measured.array) for n in (0.0, 0.05, 0.1)]
    assert 5e-4 <= weights[0] < weights[1] < weights[2] <= 1e-2
