"""The preview: a bounded region, a width that cannot collapse, the whole volume sharper, in little time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deconv import nbd, preview
from deconv.classic import METHODS as CLASSIC
from deconv.kernels import gaussian
from deconv.metrics import kernel_inner_product, nrmse
from deconv.operators import blur, downsample
from deconv.phantoms import spheres
from deconv.preview import PREVIEW, Gw, gaussian_tensor, informative_region, kernel_on_pet_grid, width_profile
from deconv.result import Cancelled, Progress
from deconv.safeguards import gates
from deconv.volume import Volume

QUICK = {"region_voxels": (12, 24, 24), "reproduce_steps": 3, "network_steps": 3, "profile_widths": 5,
         "profile_iterations": 10, "iterations": 12}


@pytest.fixture(scope="module")
def phantom():
    return spheres((14, 36, 36), fwhm_mm=6.0)


@pytest.fixture(scope="module")
def result(phantom):
    return nbd.deconvolve(phantom.measured, nbd.settings("preview", **QUICK))


def test_spheres_come_out_sharper_than_by_interpolation(phantom, result):
    """Against the truth, clearly below cubic interpolation; every gate open."""
    cubic = CLASSIC["cubic"]
    smooth = cubic.deconvolve(phantom.measured, cubic.settings(next(iter(cubic.PRESETS))))
    assert nrmse(result.image.array, phantom.truth.array) < 0.7 * nrmse(smooth.image.array, phantom.truth.array)
    assert all(gate.ok for gate in gates(phantom.measured, result))


def test_the_kernel_is_found_blindly(phantom, result):
    """Within 1.2 mm of the true 6 mm along every axis, more than 0.95 like the true PSF (paper: 0.90)."""
    widths = [result.metrics[f"kernel_fwhm_{axis}_mm"] for axis in "dhw"]
    np.testing.assert_allclose(widths, 6.0, atol=1.2)
    assert kernel_inner_product(result.kernel, phantom.psf) > 0.95
    assert result.metrics["kernel_at_prior_bound"] == 0.0


def test_the_result_keeps_grid_and_activity(phantom, result):
    """Doubled grid, same total, not negative, settings as plain JSON."""
    assert result.image.same_grid(phantom.measured.doubled(result.image.array))
    assert abs(result.metrics["activity_change"]) < 1e-5 and result.image.array.min() >= 0
    assert json.loads(json.dumps(result.settings)) == result.settings and result.preset == "preview"


def test_the_same_seed_gives_the_same_bits(phantom, result):
    """Promise 5, and no global random state is touched."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = nbd.deconvolve(phantom.measured, nbd.settings("preview", **QUICK))
    assert torch.equal(state, torch.get_rng_state())
    np.testing.assert_array_equal(again.image.array, result.image.array)


def test_tiles_leave_no_seam():
    """A long volume in tiles equals the same volume at once, but for a small part of its maximum."""
    long = spheres((72, 20, 20), fwhm_mm=6.0).measured
    whole, pieces = (
        nbd.deconvolve(long, nbd.settings("preview", **{**QUICK, "memory_gb": memory, "network_steps": 0}))
        for memory in (2.0, 0.025)
    )
    assert whole.metrics["tiles"] == 1 and pieces.metrics["tiles"] > 1
    assert pieces.settings["tile"] != whole.settings["tile"]
    assert np.abs(pieces.image.array - whole.image.array).max() < 0.03 * whole.image.array.max()


def test_progress_counts_to_its_end_and_cancelling_passes(phantom):
    """Steps rise to the announced total; Cancelled ends the run."""
    heard: list[Progress] = []
    nbd.deconvolve(phantom.measured, nbd.settings("preview", **QUICK), on_step=heard.append)
    steps = [p.step for p in heard]
    assert steps == sorted(steps) and steps[-1] == heard[-1].steps
    assert {p.stage for p in heard} == {"kernel width", "reproduce", "networks", "whole volume"}

    def stop(progress: Progress) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        nbd.deconvolve(phantom.measured, nbd.settings("preview", **QUICK), on_step=stop)


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(*[st.integers(2, 14)] * 3), largest=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 99))
def test_the_region_is_inside_and_bounded(shape, largest, seed):
    """Any volume: never larger than asked, never beyond the volume."""
    y = np.random.default_rng(seed).random(shape, dtype=np.float32)
    for part, n, most in zip(informative_region(y, np.ones(3), largest), shape, largest, strict=True):
        assert 0 <= part.start < part.stop <= n and part.stop - part.start == min(n, most)


def test_the_region_is_where_the_edges_are():
    """A hot block in a corner of an empty volume is found."""
    y = np.zeros((20, 30, 30), dtype=np.float32)
    y[12:16, 3:7, 22:26] = 1.0
    assert y[informative_region(y, np.ones(3), (8, 8, 8))].sum() == y.sum()


def test_the_profile_finds_the_minimum_between_its_tries():
    """A parabola in ln w with its minimum at 5.3 mm, found from nine widths; and its bounds hold."""
    found = width_profile(lambda w: (np.log(w) - np.log(5.3)) ** 2, PREVIEW, on_try=lambda cost: None)
    assert found == pytest.approx(5.3, rel=1e-3)
    assert width_profile(lambda w: w, PREVIEW, on_try=lambda cost: None) == pytest.approx(3.5)
    assert width_profile(lambda w: -w, PREVIEW, on_try=lambda cost: None) == pytest.approx(10.0)


def test_gw_starts_where_it_is_told_and_never_leaves_its_bounds():
    """However hard it is driven, the kernel is no delta and no fog."""
    gw = Gw(np.array([5.0, 6.0, 7.0]), (3.5, 10.0), torch.Generator().manual_seed(0))
    np.testing.assert_allclose(gw().detach().numpy(), [5.0, 6.0, 7.0], rtol=1e-5)
    optimizer = torch.optim.Adam(gw.parameters(), lr=0.5)
    for sign in (1, -1):
        for _ in range(30):
            optimizer.zero_grad()
            (sign * gw().sum()).backward()
            optimizer.step()
            assert float(gw().detach().min()) >= 3.5 - 1e-4 and float(gw().detach().max()) <= 10.0 + 1e-4


def test_the_differentiable_gaussian_is_the_gaussian():
    """Same values as the array form, anisotropic voxels included, and a gradient for every width."""
    widths, spacing = torch.tensor([4.0, 6.0, 8.0], requires_grad=True), np.array([2.0, 1.5, 1.0])
    k = gaussian_tensor(widths, spacing, (9, 11, 13))
    np.testing.assert_allclose(k.detach().numpy(), gaussian([4.0, 6.0, 8.0], spacing, (9, 11, 13)), atol=1e-6)
    k[4, 5, 6].backward()
    assert (widths.grad < 0).all()


def test_the_reported_kernel_blurs_as_the_fine_one_does(phantom):
    """x↓ ∗ k, which the gates measure, is P(x ∗ k_w), which was solved, to half a per cent of the maximum."""
    x = torch.from_numpy(np.array(phantom.truth.array / phantom.truth.array.max()))
    spacing, widths = phantom.measured.spacing, np.full(3, 6.0)
    solved = downsample(blur(x, torch.from_numpy(gaussian(widths, spacing / 2))))
    reported = blur(downsample(x), torch.from_numpy(kernel_on_pet_grid(widths, spacing)))
    counted_twice = blur(downsample(x), torch.from_numpy(gaussian(widths, spacing)))
    assert float((reported - solved).square().mean().sqrt()) < 5e-3
    assert (reported - solved).square().sum() < (counted_twice - solved).square().sum()


def test_settings_that_make_no_sense_are_refused():
    """A prior outside its bounds, no widths to try, no region."""
    for overrides in [{"fwhm_prior_mm": 12.0}, {"profile_widths": 2}, {"region_voxels": (0, 8, 8)}]:
        with pytest.raises(ValueError):
            replace(PREVIEW, **overrides)


@pytest.mark.parametrize(
    ("array", "reason"),
    [(np.zeros((8, 9, 10)), "no positive value"), (np.ones((8, 9, 10)), "same everywhere"),
     (np.eye(8)[None].repeat(4, 0), "too small")],
)
def test_volumes_that_cannot_be_deblurred_are_refused(array, reason):
    """No activity, no edge, too few voxels: said before any work."""
    with pytest.raises(ValueError, match=reason):
        preview.deconvolve(Volume.axial(array, (3, 3, 3)), PREVIEW)


@pytest.mark.parametrize("spacing", [(5.5, 5.5, 5.5), (5.0, 2.0, 2.0)])
def test_the_smallest_volumes_and_coarse_or_uneven_voxels_run(spacing):
    """Four slices, voxels as large as the blur: a finite result on the doubled grid that keeps its activity."""
    small = spheres((4, 18, 21), spacing=spacing).measured
    found = nbd.deconvolve(small, nbd.settings("preview", **QUICK))
    assert found.image.shape == (8, 36, 42) and np.isfinite(found.image.array).all()
    assert abs(found.metrics["activity_change"]) < 1e-5


def test_air_outside_the_body_stays_empty():
    """Half of a PET volume is zero; deblurring must not light it up."""
    array = np.zeros((10, 24, 24), dtype=np.float32)
    array[3:7, 8:16, 8:16] = 5.0
    found = nbd.deconvolve(Volume.axial(array, (4, 4, 4)), nbd.settings("preview", **QUICK))
    assert found.image.array[:, :8].max() < 0.02 * found.image.array.max()
