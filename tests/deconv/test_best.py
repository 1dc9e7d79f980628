"""The preset "best" obeys the laws of blur: what is given at another place, scale or orientation comes out there."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deconv import best, nbd
from deconv.checkpoint import Checkpoints
from deconv.classic import METHODS as CLASSIC
from deconv.finish import plain, residual
from deconv.interpolate import doubled
from deconv.kernels import skewed
from deconv.metrics import kernel_inner_product, nrmse
from deconv.result import Cancelled, Deconvolution, Progress
from deconv.uncertainty import combined
from deconv.volume import Volume
from tests.deconv.scene import FWHM, KNOWN, SPACING, deblurred, measured, truth

SHAPE = (9, 15, 17)  # odd, and no two alike
ROUNDING = 5e-6  # of the maximum: float32 transforms in another order


@pytest.fixture(scope="module")
def activity() -> np.ndarray:
    return truth(SHAPE)


@pytest.fixture(scope="module")
def volume(activity: np.ndarray) -> Volume:
    return measured(activity)


@pytest.fixture(scope="module")
def known(volume: Volume) -> Deconvolution:
    return deblurred(volume, **KNOWN)


@pytest.fixture(scope="module")
def blind(volume: Volume) -> Deconvolution:
    return deblurred(volume)


def off(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference in maxima."""
    return float(np.abs(one - other).max() / np.abs(other).max())


# --- what is known comes back


def test_a_known_gaussian_is_undone(activity: np.ndarray, volume: Volume, known: Deconvolution):
    """Nearer to the truth than cubic interpolation and Richardson-Lucy with the same PSF, by a wide margin."""
    error = nrmse(known.image.array, activity)
    for name, margin, psf in (("cubic", 0.6, {}), ("richardson-lucy", 0.75, {"psf_fwhm_mm": FWHM})):
        other = CLASSIC[name].deconvolve(volume, CLASSIC[name].settings("default", **psf))
        assert error < margin * nrmse(other.image.array, activity), name


def test_the_kernel_that_was_given_is_the_kernel_that_is_told(known: Deconvolution):
    """In figures, and as an array like the PSF integrated over PET voxels."""
    assert tuple(known.metrics[f"psf_fwhm_{a}_mm"] for a in "dhw") == FWHM
    assert known.kernel is not None and known.kernel.sum() == pytest.approx(1, abs=1e-5)
    assert kernel_inner_product(known.kernel, skewed(FWHM, 0.0, SPACING)) > 0.98
    assert known.settings["psf_fwhm_mm"] == list(FWHM)


def test_a_delta_kernel_gives_the_image_back(volume: Volume):
    """Nothing to undo: every voxel's mean is the source's, between them lies its interpolation."""
    found = deblurred(volume, psf="known", psf_fwhm_mm=(0.3, 0.3, 0.3))
    d, h, w = volume.shape
    assert nrmse(found.image.array.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5)), volume.array) < 0.005
    assert nrmse(found.image.array, doubled(volume.array)) < 0.1
    assert found.kernel is not None and found.kernel.max() > 0.999


def test_the_width_is_found_blindly(blind: Deconvolution):
    """Within a third of the truth along every axis on a scene of three small organs; within the bounds."""
    for axis, width in zip("dhw", FWHM, strict=True):
        assert abs(np.log(blind.metrics[f"psf_fwhm_{axis}_mm"] / width)) < np.log(4 / 3)
        assert abs(blind.metrics[f"psf_skew_{axis}"]) < 0.8


@pytest.mark.parametrize("which", ["known", "blind"])
def test_activity_is_kept(which: str, volume: Volume, request: pytest.FixtureRequest):
    """Total within 0.05 % (paper), without the closing factor having had much to do; no negative voxel."""
    found: Deconvolution = request.getfixturevalue(which)
    assert found.image.array.mean(dtype=np.float64) == pytest.approx(volume.array.mean(dtype=np.float64), rel=5e-4)
    assert abs(found.metrics["activity_scale"] - 1) < 5e-3
    assert found.image.array.min() >= 0 and found.image.same_grid(volume.doubled(found.image.array))


def test_a_warm_background_reaches_the_borders():
    """Where there is activity beyond the field of view, the borders neither lose nor gain: trap of zero padding."""
    warm = truth(SHAPE, background=0.6)
    found = deblurred(measured(warm), **KNOWN)
    border = np.ones(warm.shape, dtype=bool)
    border[2:-2, 2:-2, 2:-2] = False
    np.testing.assert_allclose(found.image.array[border], 6e3, rtol=0.05)
    assert found.image.array[border].mean() == pytest.approx(6e3, rel=2e-3)
    assert abs(found.metrics["activity_scale"] - 1) < 1e-3


# --- equivariance


@pytest.mark.parametrize("factor", [2.0**-33, 1e-7, 1e-3, 30.0, 100.0], ids=lambda f: f"{1e4 * f:.1e}")
def test_another_unit_gives_the_same_image_in_that_unit(volume: Volume, known: Deconvolution, factor: float):
    """From 1e-6 to 1e6 Bq/mL: image and uncertainty scale, the kernel stays."""
    found = deblurred(volume.with_array(volume.array * np.float32(factor)), **KNOWN)
    assert off(found.image.array / factor, known.image.array) < ROUNDING
    assert off(found.uncertainty.array / factor, known.uncertainty.array) < 10 * ROUNDING
    np.testing.assert_array_equal(found.kernel, known.kernel)


def test_a_blind_kernel_does_not_depend_on_the_unit(volume: Volume, blind: Deconvolution):
    """A power of two changes no digit, so it changes no bit."""
    found = deblurred(volume.with_array(volume.array * np.float32(1024)))
    np.testing.assert_array_equal(found.kernel, blind.kernel)
    np.testing.assert_array_equal(found.image.array, blind.image.array * np.float32(1024))


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 2, 1)], ids=str)
def test_axes_may_be_exchanged(volume: Volume, known: Deconvolution, order: tuple[int, int, int]):
    """Array, spacing and PSF permuted: image and kernel are, too. No axis is special but for the activity of slices."""
    turned = Volume.axial(volume.array.transpose(order), [SPACING[a] for a in order])
    found = deblurred(turned, psf="known", psf_fwhm_mm=tuple(FWHM[a] for a in order), slice_steps=0)
    assert off(found.image.array, deblurred(volume, **KNOWN, slice_steps=0).image.array.transpose(order)) < ROUNDING
    np.testing.assert_array_equal(found.kernel, known.kernel.transpose(order))


def test_the_blind_width_turns_with_the_axes(volume: Volume, blind: Deconvolution):
    """What is read off an image turns with it."""
    order = (2, 0, 1)
    found = deblurred(Volume.axial(volume.array.transpose(order), [SPACING[a] for a in order]), skew_iterations=0,
                      iterations=1)
    for axis, source in zip("dhw", order, strict=True):
        assert found.metrics[f"psf_fwhm_{axis}_mm"] == pytest.approx(blind.metrics[f"psf_fwhm_{'dhw'[source]}_mm"],
                                                                     rel=1e-4)


def test_the_point_reflection_is_exact(volume: Volume, known: Deconvolution):
    """A patient upside down and turned around: the same image, turned, bit for bit."""
    found = deblurred(volume.with_array(volume.array[::-1, ::-1, ::-1]), **KNOWN)
    np.testing.assert_array_equal(found.image.array[::-1, ::-1, ::-1], known.image.array)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_mirror_image_along_one_axis_is_near(volume: Volume, known: Deconvolution, axis: int):
    """Total variation by forward differences tells four mirror images apart: NRMSE between them stays below 5 %."""
    found = deblurred(volume.with_array(np.flip(volume.array, axis)), **KNOWN)
    assert nrmse(np.flip(found.image.array, axis), known.image.array) < 0.05


def test_a_shift_by_a_voxel_shifts_the_image(volume: Volume):
    """The same scene one voxel on along every axis: the same image two fine voxels on, but for the borders."""
    here, there = (
        deblurred(Volume.axial(np.pad(volume.array, [(b, 2 - b) for b in before], mode="edge"), SPACING), **KNOWN)
        for before in ((1, 1, 1), (2, 0, 2))
    )
    moved = np.roll(here.image.array, (2, -2, 2), axis=(0, 1, 2))
    inner = (slice(6, -6),) * 3
    assert off(moved[inner], there.image.array[inner]) < 2e-3


# --- unusual volumes


@pytest.mark.parametrize("psf", [KNOWN, {}], ids=["known", "blind"])
def test_a_volume_without_edges_is_refused(psf: dict[str, Any]):
    """The same everywhere, nothing, or nothing positive: said in words."""
    shape = (6, 10, 10)
    with pytest.raises(ValueError, match="same everywhere"):
        deblurred(Volume.axial(np.full(shape, 5.0), SPACING), **psf)
    for nothing in (0.0, -3.0):
        with pytest.raises(ValueError, match="no positive value"):
            deblurred(Volume.axial(np.full(shape, nothing), SPACING), **psf)


def test_a_volume_that_is_too_small_is_refused():
    """Three slices, or eight voxels along the longest axis: with what would be enough."""
    for shape in ((3, 20, 20), (8, 8, 8)):
        with pytest.raises(ValueError, match=r"too small .*at least 4 along every axis and 9 along one"):
            deblurred(Volume.axial(np.random.default_rng(0).random(shape), SPACING), **KNOWN)


@pytest.mark.parametrize("shape", [(4, 13, 10), (5, 9, 14), (8, 11, 9), (13, 4, 7)], ids=str)
def test_thin_and_odd_volumes_are_deblurred(shape: tuple[int, int, int]):
    """Four slices, odd sizes, H other than W: blind, finite, within the bounds, activity kept."""
    thin = measured(truth(shape))
    found = deblurred(thin, iterations=5)
    assert found.image.shape == tuple(2 * n for n in shape)
    assert all(3.0 <= found.metrics[f"psf_fwhm_{a}_mm"] <= 10.0 for a in "dhw")
    assert abs(found.metrics["activity_change"]) < 5e-4 and found.uncertainty.array.min() >= 0


@pytest.mark.parametrize(("spacing", "shape"), [((1.2, 1.5, 1.2), (17, 18, 16)), ((5.5, 5.5, 5.5), (8, 11, 10))],
                         ids=["fine", "coarse"])
def test_fine_and_coarse_voxels_are_deblurred(spacing: tuple[float, float, float], shape: tuple[int, int, int]):
    """Voxels of a small and of an old scanner: a width within the bounds, activity kept, sharper than measured."""
    image = measured(truth(shape), spacing=spacing)
    found = deblurred(image, iterations=5, skew_iterations=0)
    assert all(3.0 <= found.metrics[f"psf_fwhm_{a}_mm"] <= 10.0 for a in "dhw")
    assert abs(found.metrics["activity_change"]) < 5e-4
    assert found.image.array.max() > image.array.max()


@pytest.mark.parametrize("place", [(0, 0, 0), (0, 7, 12), (8, 14, 16), (4, 7, 8)], ids=str)
def test_one_hot_voxel_stays_where_it_is(place: tuple[int, int, int]):
    """In a corner, at a border, in the middle: the maximum lies in the eight fine voxels of that voxel."""
    array = np.full(SHAPE, 1.0)
    array[place] = 1e4
    found = deblurred(Volume.axial(array, SPACING), **KNOWN, iterations=10)
    peak = np.unravel_index(int(found.image.array.argmax()), found.image.shape)
    assert tuple(int(p) // 2 for p in peak) == place
    assert abs(found.metrics["activity_change"]) < 5e-4


def test_negative_values_are_no_activity(volume: Volume):
    """Some reconstructions leave them: the image has none, and the total of all values is kept."""
    array = volume.array.copy()
    array[:, :3] -= 0.06e4
    assert array.min() < 0
    found = deblurred(volume.with_array(array), **KNOWN)
    assert found.image.array.min() >= 0 and np.isfinite(found.image.array).all()
    assert found.image.array.mean(dtype=np.float64) == pytest.approx(array.mean(dtype=np.float64), rel=5e-4)


# --- prior, bounds, settings


def posterior(monkeypatch: pytest.MonkeyPatch, says: tuple[float, ...], log_sd: float, **settings: Any) -> best.Psf:
    """What "best" takes for the PSF where the network says so."""
    said = SimpleNamespace(fwhm_mm=says, log_sd=(log_sd,) * 3, windows=1)
    monkeypatch.setattr(best.psfnet, "read", lambda *_, **__: said)
    y = measured(truth((5, 9, 9))).array / np.float32(1e4)
    return best.posterior(y, np.array(SPACING), 1e-3, nbd.settings("best", skew_iterations=0, **settings))


@examples(max_examples=25, deadline=None)
@given(own=st.floats(0.02, 0.4), library=st.floats(0.02, 0.4), says=st.floats(4.0, 9.0))
def test_a_library_pulls_by_the_variances(own: float, library: float, says: float):
    """ln FWHM is the mean of reading and library, each by one over its variance; the sd is smaller than either's."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        psf = posterior(monkeypatch, (says, 6.0, 5.0), own, psf="prior", psf_fwhm_mm=(5.0, 6.0, 7.0),
                        psf_log_sd=library)
    weight = library**2 / (own**2 + library**2)
    assert np.log(psf.fwhm_mm[0]) == pytest.approx(weight * np.log(says) + (1 - weight) * np.log(5.0), abs=1e-9)
    assert psf.fwhm_mm[1] == pytest.approx(6.0)
    np.testing.assert_allclose(psf.log_sd, (own**-2 + library**-2) ** -0.5)


@pytest.mark.parametrize(("says", "bound"), [(40.0, 10.0), (0.5, 3.0)])
def test_a_found_width_keeps_within_its_bounds(monkeypatch: pytest.MonkeyPatch, says: float, bound: float):
    """A network that is certain of nonsense does not get its way; a known PSF may be what it is."""
    assert posterior(monkeypatch, (says,) * 3, 1e-3).fwhm_mm == (bound,) * 3
    assert posterior(monkeypatch, (6.0,) * 3, 0.1, psf="known", psf_fwhm_mm=(0.7 * says,) * 3
                     ).fwhm_mm == (0.7 * says,) * 3


def test_a_width_at_its_bound_is_told(volume: Volume):
    """For the gates: narrow bounds around the prior."""
    found = deblurred(volume, psf="prior", psf_fwhm_mm=FWHM, psf_log_sd=1e-3, fwhm_bounds_mm=(5.9, 6.05), iterations=1,
                      skew_iterations=0)
    assert found.metrics["kernel_at_prior_bound"] == 1.0 and found.metrics["psf_fwhm_d_mm"] == 6.05


@pytest.mark.parametrize("changed", [
    {"psf": "known"}, {"psf": "prior"}, {"psf": "guessed"}, {"psf": "known", "psf_fwhm_mm": (6.0, 0.0, 6.0)},
    {"psf": "known", "psf_fwhm_mm": (6.0, 6.0)}, {"psf": "known", "psf_fwhm_mm": (40.0, 6.0, 6.0)},
    {"fwhm_bounds_mm": (7.0, 10.0)}, {"windows": 0}, {"iterations": 0}, {"psf_log_sd": 0.0}, {"spread": -0.1},
    {"tv_weight": -1e-3}, {"psf_skew": (0.0, 1.0, 0.0)}, {"memory_gb": 0.0}, {"region": "legs"}, {"iteration": 5},
], ids=str)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, Any]):
    """At once, and not after hours."""
    with pytest.raises(ValueError):
        nbd.settings("best", **changed)


def test_settings_pass_through_json():
    """The settings of a job are kept as JSON; what comes back is equal, tuples and all."""
    chosen = nbd.settings("best", **KNOWN, psf_skew=(0.1, 0.0, -0.2), psf_source="library: 14 studies",
                          region="box:1-4,2-9,0-5", memory_gb=1.5)
    assert nbd.settings(**json.loads(json.dumps(plain(chosen)))) == chosen
    assert nbd.settings(**json.loads(json.dumps(plain(best.BEST)))) == best.BEST


def test_the_settings_of_the_result_are_plain(known: Deconvolution):
    """They enter the UIDs of the derived series: JSON, with the tile and the region that were taken."""
    assert json.loads(json.dumps(known.settings)) == known.settings
    assert known.settings["tile"] == list(SHAPE) and known.settings["region_box"] == "box:0-9,0-15,0-17"
    assert known.preset == "best" and known.method == "nbd"


# --- uncertainty


def test_the_uncertainty_grows_with_what_is_not_known(volume: Volume, known: Deconvolution):
    """In the image's unit and grid, never negative, twice the doubt of the width about twice as large."""
    assert known.uncertainty.same_grid(known.image) and known.uncertainty.unit == known.image.unit
    assert known.uncertainty.array.min() >= 0 and known.uncertainty.array.max() > 0
    unsure = deblurred(volume, **KNOWN, psf_log_sd=0.2).uncertainty.array
    assert 1.3 < np.linalg.norm(unsure) / np.linalg.norm(known.uncertainty.array) < 3.0


def test_one_member_tells_only_what_it_leaves_unexplained(volume: Volume):
    """Without a spread nothing of the width is in it: what is left is six times the misfit about each voxel."""
    found = deblurred(volume, **KNOWN, spread=0.0, iterations=3)
    off = residual(volume, found.image, found.kernel)
    np.testing.assert_allclose(found.uncertainty.array, combined(np.zeros_like(found.image.array), off), rtol=1e-3)
    assert found.uncertainty.array.max() < 6.1 * np.abs(off).max()


def test_where_the_image_does_not_explain_the_measurement_it_is_less_sure():
    """A hot voxel too narrow for the PSF raises the standard deviation about it, by six times the misfit there."""
    spread, off = np.zeros((20, 40, 40), np.float32), np.zeros((10, 20, 20), np.float32)
    off[5, 10, 10] = 1.0
    sd = combined(spread, off)
    assert sd[10:12, 20:22, 20:22].min() == sd.max() > 0.8
    assert sd[:2].max() < 0.1 * sd.max()


def test_outside_the_region_nothing_is_touched_and_nothing_claimed(volume: Volume):
    """There the image is the interpolated source and the uncertainty zero."""
    found = deblurred(volume, **KNOWN, region="box:2-8,3-12,0-17")
    outside = np.ones(found.image.shape, dtype=bool)
    outside[4:16, 6:24] = False
    assert found.uncertainty.array[outside].max() == 0.0 and found.uncertainty.array.max() > 0
    np.testing.assert_array_equal(found.image.array[outside], doubled(volume.array)[outside])
    assert abs(found.metrics["activity_change"]) < 5e-4


# --- tiles, checkpoints, determinism

LONG = (60, 7, 9)
CUBE = (3.0, 3.0, 3.0)
SIX = {"psf": "known", "psf_fwhm_mm": (6.0, 6.0, 6.0), "iterations": 6}
SMALL_GB = 0.013


@pytest.fixture(scope="module")
def long() -> Volume:
    return measured(truth(LONG) + 3e3 * (np.arange(120) // 12 % 2)[:, None, None], (6.0, 6.0, 6.0), spacing=CUBE)


@pytest.fixture(scope="module")
def in_tiles(long: Volume) -> Deconvolution:
    return deblurred(long, **SIX, memory_gb=SMALL_GB)


def test_tiles_give_the_image_of_one_piece(long: Volume, in_tiles: Deconvolution):
    """Little memory, several tiles: the same image to 2 % of its maximum, and the settings name the tile."""
    whole = deblurred(long, **SIX)
    assert whole.metrics["tiles"] == 1 and in_tiles.metrics["tiles"] > 1
    assert off(in_tiles.image.array, whole.image.array) < 0.02
    assert in_tiles.settings["tile"] != whole.settings["tile"]


def test_too_little_memory_is_said(long: Volume):
    """With what would be needed."""
    with pytest.raises(ValueError, match="allow more memory or choose a smaller region"):
        deblurred(long, **SIX, memory_gb=0.002)


def test_a_run_that_was_stopped_between_tiles_ends_in_the_same_bits(long: Volume, in_tiles: Deconvolution, tmp_path):
    """Finished tiles are taken up again and not solved twice; image and uncertainty are those of an unbroken run."""
    steps = 2 * 2 * SIX["iterations"]

    def stop(progress: Progress) -> None:
        heard.append(progress.step)
        if stopping and len(heard) == steps + 2:
            raise Cancelled

    heard: list[int] = []
    stopping = True
    kept = Checkpoints(tmp_path, every_s=3600)
    with pytest.raises(Cancelled):
        deblurred(long, stop, kept, **SIX, memory_gb=SMALL_GB)
    heard, stopping = [], False
    found = deblurred(long, stop, kept, **SIX, memory_gb=SMALL_GB)
    assert len(heard) == steps * (in_tiles.metrics["tiles"] - 1)
    np.testing.assert_array_equal(found.image.array, in_tiles.image.array)
    np.testing.assert_array_equal(found.uncertainty.array, in_tiles.uncertainty.array)


def test_the_psf_that_was_found_is_taken_up_again(volume: Volume, blind: Deconvolution, tmp_path):
    """Stopped in the first tile: no kernel is sought anew, also with other memory; the same bits as unbroken."""
    def stop(progress: Progress) -> None:
        stages.append(progress.stage)
        if progress.stage == "image" and stopping:
            raise Cancelled

    stages: list[str] = []
    stopping, kept = True, Checkpoints(tmp_path, every_s=3600)
    with pytest.raises(Cancelled):
        deblurred(volume, stop, kept)
    assert "kernel" in stages
    stages, stopping = [], False
    found = deblurred(volume, stop, kept, memory_gb=3.0)
    assert set(stages) == {"image"}
    np.testing.assert_array_equal(found.image.array, blind.image.array)


def test_a_checkpoint_of_other_settings_is_not_taken(long: Volume, in_tiles: Deconvolution, tmp_path):
    """Another width: solved afresh."""
    kept = Checkpoints(tmp_path)
    heard: list[Progress] = []
    for width in (6.0, 6.1):
        heard.clear()
        deblurred(long, heard.append, kept, **{**SIX, "psf_fwhm_mm": (width,) * 3, "iterations": 1}, memory_gb=SMALL_GB)
        assert len(heard) == 4 * in_tiles.metrics["tiles"]


def test_progress_is_told_and_a_run_can_be_stopped(volume: Volume):
    """Steps count up to the announced number; what on_step raises ends the run at once."""
    heard: list[Progress] = []
    deblurred(volume, heard.append, **KNOWN, iterations=3)
    assert [p.step for p in heard] == list(range(1, 13)) and {p.steps for p in heard} == {12}
    heard.clear()
    deblurred(volume, heard.append, iterations=3)
    steps = [p.step for p in heard]
    assert steps == sorted(steps) and steps[-1] == heard[-1].steps and {p.stage for p in heard} == {"kernel", "image"}

    def stop(progress: Progress) -> None:
        raise Cancelled

    for psf in (KNOWN, {}):
        with pytest.raises(Cancelled):
            deblurred(volume, stop, **psf)


def test_the_same_input_gives_the_same_bits(volume: Volume, blind: Deconvolution):
    """Promise 5, whatever the seed: nothing is drawn."""
    again = deblurred(volume, seed=5)
    np.testing.assert_array_equal(again.image.array, blind.image.array)
    np.testing.assert_array_equal(again.uncertainty.array, blind.uncertainty.array)
    np.testing.assert_array_equal(again.kernel, blind.kernel)
