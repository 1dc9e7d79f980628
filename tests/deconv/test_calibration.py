"""The PSF of a scanner from a phantom: what made the image is found again, with standard errors that hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deconv.calibration import MeasuredPsf, measure_psf
from deconv.kernels import split_normal
from deconv.phantoms import Phantom, average_pool, measure, psf_kernel, spheres
from deconv.spherefinder import find_spheres
from deconv.spheremodel import ball_spectrum, split_normal_spectrum
from deconv.volume import Volume

SEEN = (16.0, 14.0, 10.0, 8.0)
SPACING = (2.8, 2.73, 2.73)


def ring(**options: object) -> Phantom:
    """The Q3P ring with its largest spheres: a small field of view holds no more."""
    return spheres((22, 50, 50), **options)  # type: ignore[arg-type]


def diameters(phantom: Phantom) -> list[float]:
    return [sphere.diameter_mm for sphere in phantom.spheres if sphere.diameter_mm in SEEN]


def measured(phantom: Phantom, **options: object) -> MeasuredPsf:
    return measure_psf(phantom.measured, diameters_mm=diameters(phantom), **options)  # type: ignore[arg-type]


def within(psf: MeasuredPsf, fwhm: tuple[float, ...], skew: tuple[float, ...], sds: float) -> bool:
    errors = np.abs([*np.subtract(psf.fwhm_mm, fwhm), *np.subtract(psf.skew, skew)])
    return bool(np.all(errors < sds * np.array([*psf.fwhm_sd_mm, *psf.skew_sd])))


# --- the model


@given(fwhm=st.floats(2.5, 9.0), skew=st.floats(-0.6, 0.6))
@settings(max_examples=20, deadline=None)
def test_the_spectrum_of_a_profile_is_that_of_the_kernel(fwhm: float, skew: float) -> None:
    """The Fourier transform in closed form equals the sum over `kernels.split_normal`, box of the voxel included."""
    step = 0.25
    profile = split_normal(fwhm / step, skew, size=401)
    x = (np.arange(401) - 200) * step
    q = np.linspace(0.0, 1.5, 7)
    summed = (profile * np.exp(-1j * q[:, None] * x)).sum(axis=1)
    voxel = np.sinc(q * step / (2 * np.pi))
    np.testing.assert_allclose(split_normal_spectrum(q, fwhm, skew) * voxel, summed, atol=2e-4)


def test_the_spectrum_of_a_ball_begins_with_its_volume() -> None:
    """And is smooth where the series expansion takes over."""
    assert ball_spectrum(np.zeros(1), 5.0)[0] == pytest.approx(4 / 3 * np.pi * 125)
    near = ball_spectrum(np.array([0.00199, 0.00201]), 5.0)
    assert abs(near[1] / near[0] - 1) < 1e-5


# --- what made the image is found again


def test_the_width_is_found_to_a_hundredth_of_a_millimetre_without_noise() -> None:
    """Anisotropic, sub-voxel centres, four spheres."""
    phantom = ring(fwhm_mm=(4.5, 6.0, 7.5))
    psf = measured(phantom)
    assert np.abs(np.subtract(psf.fwhm_mm, (4.5, 6.0, 7.5))).max() < 0.03
    assert np.abs(psf.skew).max() < 0.02 and psf.residual < 0.002
    for found, true in zip(psf.spheres, phantom.spheres, strict=False):
        assert np.abs(np.subtract(found.centre_mm, true.centre_mm)).max() < 0.05
        assert found.activity == pytest.approx(true.activity, rel=0.01)
        assert found.background == pytest.approx(phantom.background, rel=0.01)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_skew_is_found_along_its_axis_with_its_sign(axis: int) -> None:
    """The kernel of deconv.kernels, not its mirror image."""
    psf = measured(ring(fwhm_mm=6.0, skew=0.3, skew_axis=axis))
    expected = [0.3 if a == axis else 0.0 for a in range(3)]
    assert np.abs(np.subtract(psf.skew, expected)).max() < 0.02
    assert np.abs(np.subtract(psf.fwhm_mm, 6.0)).max() < 0.03


@pytest.mark.parametrize(("noise", "worst_mm", "seed"), [(0.05, 0.25, 1), (0.10, 0.5, 2)])
def test_noise_widens_the_standard_errors_and_they_hold(noise: float, worst_mm: float, seed: int) -> None:
    """Correlated noise of 5 and 10 %: the truth lies within three standard errors, which are no larger than useful."""
    psf = measured(ring(fwhm_mm=(6.0, 5.0, 7.0), noise=noise, seed=seed))
    assert within(psf, (6.0, 5.0, 7.0), (0.0, 0.0, 0.0), 3.0)
    assert np.abs(np.subtract(psf.fwhm_mm, (6.0, 5.0, 7.0))).max() < worst_mm
    assert 0.02 < max(psf.fwhm_sd_mm) < 2 * worst_mm


@pytest.mark.slow
def test_the_standard_errors_cover_the_truth_in_nineteen_of_twenty() -> None:
    """Over twelve draws of noise, three axes each: at least 90 % within two standard errors."""
    hits = []
    for seed in range(12):
        psf = measured(ring(fwhm_mm=6.0, noise=0.08, seed=100 + seed))
        hits += [abs(width - 6.0) < 2 * sd for width, sd in zip(psf.fwhm_mm, psf.fwhm_sd_mm, strict=True)]
    assert np.mean(hits) >= 0.9


def test_diameters_need_not_be_known() -> None:
    """They are fitted with the shared activity, and come out right."""
    phantom = ring(fwhm_mm=6.0)
    psf = measure_psf(phantom.measured)
    found = {round(sphere.diameter_mm) for sphere in psf.spheres}
    assert {16, 14, 10} <= found and not any(sphere.known for sphere in psf.spheres)
    assert np.abs(np.subtract(psf.fwhm_mm, 6.0)).max() < 0.05


def test_a_point_source_is_a_sphere_of_no_size() -> None:
    """One hot fine voxel in nothing: its width and its total activity."""
    truth = np.zeros((40, 44, 44))
    truth[19, 22, 23] = 1e6
    kernel = psf_kernel((5.0, 6.0, 7.0), np.array(SPACING) / 2, size=25)
    y = measure(truth, kernel, rng=np.random.default_rng(0), spacing=SPACING)
    psf = measure_psf(Volume.axial(y, SPACING), diameters_mm=[0])
    # The model spreads a point over a fine voxel before the blur; this one was a sample, so the blur looks narrower.
    expected = np.sqrt(np.square((5.0, 6.0, 7.0)) - 8 * np.log(2) * np.square(np.array(SPACING) / 2) / 12)
    assert np.abs(np.subtract(psf.fwhm_mm, expected)).max() < 0.01
    total = 1e6 * np.prod(SPACING) / 8 / 1000
    assert psf.spheres[0].activity == pytest.approx(total, rel=0.01)
    assert any("one sphere" in note for note in psf.notes)


def test_a_cold_wall_is_reckoned_with() -> None:
    """Spheres with 1 mm of glass around them: told of it the width is right, not told it is wrong."""
    phantom = ring(fwhm_mm=5.0)
    walled = np.array(phantom.truth.array, dtype=np.float64)
    for sphere in phantom.spheres:
        outer = phantom.sphere_fraction(replace(sphere, diameter_mm=sphere.diameter_mm + 2.0))
        inner = phantom.sphere_fraction(sphere)
        walled = walled * (1 - outer) + inner * sphere.activity
    y = measure(walled, phantom.psf_fine, rng=np.random.default_rng(0), spacing=SPACING)
    told = measure_psf(phantom.measured.with_array(y), diameters_mm=diameters(phantom), wall_mm=1.0)
    untold = measure_psf(phantom.measured.with_array(y), diameters_mm=diameters(phantom))
    assert np.abs(np.subtract(told.fwhm_mm, 5.0)).max() < 0.08
    assert np.abs(np.subtract(untold.fwhm_mm, 5.0)).max() > 2 * np.abs(np.subtract(told.fwhm_mm, 5.0)).max()


def test_another_unit_and_another_place_change_nothing_but_themselves() -> None:
    """Scaled by 1e-3 and moved by two voxels: the same PSF, the activities and centres follow."""
    phantom = ring(fwhm_mm=6.0, noise=0.03)
    moved = np.roll(phantom.measured.array, (0, 2, 0), axis=(0, 1, 2)) * 1e-3
    before, after = measured(phantom), measure_psf(phantom.measured.with_array(moved), diameters_mm=diameters(phantom))
    np.testing.assert_allclose(after.fwhm_mm, before.fwhm_mm, atol=0.01)
    np.testing.assert_allclose(after.fwhm_sd_mm, before.fwhm_sd_mm, rtol=0.05)
    for one, other in zip(before.spheres, after.spheres, strict=True):
        np.testing.assert_allclose(np.subtract(other.centre_mm, one.centre_mm), (0, 2 * 2.73, 0), atol=0.02)
        assert other.activity == pytest.approx(one.activity * 1e-3, rel=1e-3)


def test_blobs_come_out_at_their_places_largest_first() -> None:
    """The finder alone: within half a voxel, sizes in order."""
    phantom = ring(fwhm_mm=6.0, noise=0.05)
    blobs = find_spheres(phantom.measured.array.astype(np.float64), phantom.measured.spacing)
    for blob, sphere in zip(blobs[:3], phantom.spheres, strict=False):
        assert np.abs(np.subtract(blob.centre_mm, sphere.centre_mm)).max() < 1.4
    assert blobs[0].diameter_mm >= blobs[1].diameter_mm >= blobs[2].diameter_mm


# --- refusals


def test_nothing_to_measure_is_said() -> None:
    """Empty, and warm without spheres."""
    with pytest.raises(ValueError, match="no activity"):
        measure_psf(Volume.axial(np.zeros((20, 20, 20)), SPACING))
    noise = np.random.default_rng(0).normal(1000, 50, (24, 32, 32))
    with pytest.raises(ValueError, match="sphere"):
        measure_psf(Volume.axial(noise, SPACING))


def test_a_cut_sphere_is_refused() -> None:
    """The field of view ends in it."""
    phantom = ring(fwhm_mm=5.0)
    first = int(phantom.spheres[0].centre_mm[0] / SPACING[0]) - 3
    cut = Volume.axial(phantom.measured.array[first:], SPACING)
    with pytest.raises(ValueError, match="cut by the edge"):
        measure_psf(cut, diameters_mm=diameters(phantom))


def test_saturated_values_are_refused() -> None:
    """Spheres cut off at half their height."""
    phantom = ring(fwhm_mm=5.0, noise=0.03)
    flat = np.minimum(phantom.measured.array, 0.5 * phantom.measured.array.max())
    with pytest.raises(ValueError, match="saturated"):
        measure_psf(phantom.measured.with_array(flat), diameters_mm=diameters(phantom))


def test_more_spheres_than_there_are_is_refused() -> None:
    """Naming twelve does not find twelve."""
    phantom = ring(fwhm_mm=6.0)
    with pytest.raises(ValueError, match="stand out"):
        measure_psf(phantom.measured, diameters_mm=[10.0] * 12)


@pytest.mark.parametrize("wrong", [[], [-1.0, 5.0], [0.0, 10.0], [370.0]])
def test_diameters_that_make_no_sense_are_refused(wrong: list[float]) -> None:
    """None, negative, points among spheres, centimetres times ten."""
    with pytest.raises(ValueError, match=r"diameters|too large"):
        measure_psf(ring().measured, diameters_mm=wrong)


@pytest.mark.slow
def test_wrong_diameters_do_not_pass() -> None:
    """Twice the true size is no description of the image, or a width at the end of the range."""
    phantom = spheres((28, 64, 64), fwhm_mm=6.0)
    with pytest.raises(ValueError, match=r"describe|range|place"):
        measure_psf(phantom.measured, diameters_mm=[2.0 * d for d in diameters(phantom)])


def test_the_voxel_is_part_of_the_model() -> None:
    """The same blur on voxels twice as large gives the same width: it is that before the mean over the voxel."""
    phantom = spheres((32, 64, 64), spacing=(2.0, 2.0, 2.0), fwhm_mm=6.5, seed=3)
    coarse = average_pool(np.asarray(phantom.measured.array, dtype=np.float64))
    known = [sphere.diameter_mm for sphere in phantom.spheres][:3]
    psf = measure_psf(Volume.axial(coarse, (4.0, 4.0, 4.0)), diameters_mm=known)
    # box_fine grows from 1 to 2 mm with the voxel: sqrt(6.5² − 8 ln 2 (2² − 1²) / 12) = 6.39 mm
    assert np.abs(np.subtract(psf.fwhm_mm, 6.39)).max() < 0.06
