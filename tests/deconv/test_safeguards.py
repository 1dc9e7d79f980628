"""The gates open for an honest result and shut for each way of being unsafe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from deconv import nbd
from deconv.finish import centred_pair, finished, normalised, plain
from deconv.interpolate import doubled
from deconv.kernels import centroid_voxels, gaussian
from deconv.phantoms import spheres
from deconv.region import region
from deconv.result import Deconvolution
from deconv.safeguards import UnsafeResult, gates, require
from deconv.stages import PAPER
from deconv.volume import Volume


@pytest.fixture(scope="module")
def phantom():
    return spheres((12, 24, 26))


@pytest.fixture(scope="module")
def honest(phantom) -> Deconvolution:
    """The truth itself with the true kernel, as a solver would hand it in."""
    _, top = normalised(phantom.measured)
    x = (phantom.truth.array / top).astype(np.float32)
    return finished(
        phantom.measured, x, phantom.psf.astype(np.float32), top, preset="", settings={}, losses={}, seconds=0.0
    )


def shut(volume: Volume, result: Deconvolution) -> set[str]:
    return {gate.name for gate in gates(volume, result) if not gate.ok}


def test_the_truth_passes_every_gate(phantom, honest):
    """Nine gates, all open, and `require` hands them out."""
    found = require(phantom.measured, honest)
    assert len(found) == 9 and all(gate.ok for gate in found)


def test_a_shifted_kernel_shuts_its_gate(phantom, honest):
    """One voxel off is a patient one voxel off."""
    assert honest.kernel is not None
    assert "kernel-centroid" in shut(phantom.measured, replace(honest, kernel=np.roll(honest.kernel, 1, axis=0)))


def test_a_delta_shuts_its_gate(phantom, honest):
    """The trivial solution x = y, k = δ is not a deconvolution."""
    delta = gaussian(0.1, 1.0, (5, 5, 5))
    assert "kernel-maximum" in shut(phantom.measured, replace(honest, kernel=delta))


def test_a_kernel_wider_than_any_scanner_shuts_its_gate(phantom, honest):
    """20 mm is no PET."""
    wide = gaussian(20.0, tuple(phantom.measured.spacing), (25, 25, 25))
    assert "kernel-width" in shut(phantom.measured, replace(honest, kernel=wide))


@pytest.mark.parametrize(("factor", "gate"), [(1.01, "activity"), (4.0, "maximum")])
def test_invented_activity_shuts_its_gate(phantom, honest, factor, gate):
    """One per cent in all, or a maximum four times the source's."""
    image = honest.image.with_array(honest.image.array * np.float32(factor))
    assert gate in shut(phantom.measured, replace(honest, image=image))


def test_slices_at_the_ends_have_a_limit_of_their_own(phantom, honest):
    """What lies beyond the field of view is not known: some per cent pass there, a half more does not."""
    def changed(factor: float) -> set[str]:
        array = np.array(honest.image.array)
        array[-2:] *= np.float32(factor)
        return shut(phantom.measured, replace(honest, image=honest.image.with_array(array)))

    assert "end-slice-activity" not in changed(1.05)
    assert "end-slice-activity" in changed(1.5)


def test_activity_moved_between_slices_shuts_its_gate(phantom, honest):
    """The total alone would not tell: five per cent from one slice to the next."""
    array = np.array(honest.image.array)
    array[12:14] *= 1.1
    array[10:12] *= 0.9
    assert "slice-activity" in shut(phantom.measured, replace(honest, image=honest.image.with_array(array)))


def test_an_image_of_another_patient_shuts_the_residual(phantom, honest):
    """The right activity in the wrong places does not blur back to the source."""
    image = honest.image.with_array(honest.image.array[:, ::-1, ::-1].copy())
    assert "residual" in shut(phantom.measured, replace(honest, image=image))


def test_scaling_cannot_hide_a_bad_solution(phantom, honest):
    """A solver that was 20 % off in activity is held, although the scaled total is right."""
    assert shut(phantom.measured, replace(honest, metrics={**honest.metrics, "activity_scale": 1.2})) == {
        "activity-scale"
    }


@pytest.mark.parametrize(("gain", "expected"), [(0.047, set()), (0.09, {"slice-gain"})])
def test_slices_that_needed_too_much_mending_shut_their_gate(phantom, honest, gain: float, expected: set[str]):
    """What levelling gives back to slices must not hide a solution that lost it."""
    assert shut(phantom.measured, replace(honest, metrics={**honest.metrics, "slice_gain": gain})) == expected


# --- what the preset "best" hands in: a kernel of few parameters, an uncertainty


@pytest.fixture(scope="module")
def best(phantom) -> Deconvolution:
    """A result of the preset itself, quickly: its gates must be those of the full one."""
    return nbd.deconvolve(phantom.measured, nbd.settings("best", iterations=12, windows=2, region="whole"))


def test_best_passes_every_gate(phantom, best):
    """Kernel, image and uncertainty."""
    assert {gate.name for gate in require(phantom.measured, best)} >= {"kernel-width", "residual", "uncertainty"}


@pytest.mark.parametrize(("kernel", "gate"), [
    (lambda k: np.roll(k, 1, axis=2), "kernel-centroid"),
    (lambda k: gaussian(0.1, 1.0, (5, 5, 5)), "kernel-maximum"),
    (lambda k: gaussian(20.0, 4.0, (17, 17, 17)), "kernel-width"),
    (lambda k: gaussian(14.0, 4.0), "slice-activity"),
], ids=["shifted", "collapsed", "wider than any PET", "not the one that was used"])
def test_a_wrong_kernel_of_best_shuts_its_gate(phantom, best, kernel, gate):
    """Blur on the fine grid makes no difference to what a kernel may be."""
    assert gate in shut(phantom.measured, replace(best, kernel=kernel(best.kernel).astype(np.float32)))


@pytest.mark.parametrize(("change", "gate"), [
    (lambda x: x * np.float32(1.01), "activity"), (lambda x: x * np.float32(4), "maximum"),
    (lambda x: x[:, ::-1, ::-1].copy(), "residual"),
    (lambda x: np.concatenate([x[:10], 0.9 * x[10:12], 1.1 * x[12:14], x[14:]]), "slice-activity"),
], ids=["invented activity", "overshoot", "another patient", "moved between slices"])
def test_a_wrong_image_of_best_shuts_its_gate(phantom, best, change, gate):
    """As for every other method."""
    image = best.image.with_array(change(best.image.array))
    assert gate in shut(phantom.measured, replace(best, image=image))


def test_the_narrowest_psf_that_best_looks_for_is_no_delta():
    """3 mm on voxels of 4 mm: without the voxel's own part nearly one voxel, and still a kernel."""
    phantom = spheres((12, 20, 20), spacing=(4.0, 4.0, 4.0), fwhm_mm=3.0)
    settings = nbd.settings("best", iterations=4, windows=1, psf="known", psf_fwhm_mm=(3.0, 3.0, 3.0), region="whole")
    known = nbd.deconvolve(phantom.measured, settings)
    assert known.kernel is not None and known.kernel.max() > 0.8
    found = replace(known, settings={**known.settings, "psf": "blind"})
    assert "kernel-maximum" not in shut(phantom.measured, found)
    assert "kernel-maximum" in shut(phantom.measured, replace(found, settings={}))  # of a method without such bounds
    assert "kernel-maximum" in shut(phantom.measured, replace(found, kernel=gaussian(0.1, 4.0)))


def test_a_known_psf_may_be_as_narrow_as_it_is(phantom, best):
    """Nothing was estimated that could have collapsed."""
    narrow = replace(best, kernel=gaussian(0.5, 4.0), settings={**best.settings, "psf": "known"})
    assert "kernel-maximum" not in shut(phantom.measured, narrow)


def test_an_uncertainty_that_is_none_shuts_its_gate(phantom, best):
    """Below zero somewhere, or of another grid."""
    assert best.uncertainty is not None
    array = np.array(best.uncertainty.array)
    array[3, 4, 5:7] = -1.0
    wrong = replace(best, uncertainty=best.uncertainty.with_array(array))
    assert next(gate for gate in gates(phantom.measured, wrong) if gate.name == "uncertainty").measured == 2
    assert shut(phantom.measured, wrong) == {"uncertainty"}
    assert shut(phantom.measured, replace(best, uncertainty=phantom.measured)) == {"uncertainty"}


# --- results of which only a region was deblurred

BOX = "box:0-24,6-42,8-40"


@pytest.fixture(scope="module")
def large():
    return spheres((24, 48, 48))


@pytest.fixture(scope="module")
def boxed(large) -> Deconvolution:
    """The truth within a box, the upsampled source elsewhere."""
    _, top = normalised(large.measured)
    found = region(large.measured, BOX)
    x = large.truth.array[tuple(slice(2 * s.start, 2 * s.stop) for s in found.crop)] / top
    return finished(large.measured, x.astype(np.float32), large.psf.astype(np.float32), top, preset="best",
                    settings={"region_box": found.text}, losses={}, seconds=0.0, region=found)


def test_a_region_passes_every_gate(large, boxed):
    """Outside, the upsampled source blurred again is not the source: there it is not judged."""
    assert "seam" in {gate.name for gate in require(large.measured, boxed)}
    assert "residual" in shut(large.measured, replace(boxed, settings={})) or \
        "slice-activity" in shut(large.measured, replace(boxed, settings={}))


def test_a_region_of_another_level_than_its_source_is_a_seam(large, boxed):
    """Put in hard, a fifth too high: every other gate may be open."""
    array = np.array(boxed.image.array)
    array[:, 12:84, 16:80] *= 1.2
    assert "seam" in shut(large.measured, replace(boxed, image=boxed.image.with_array(array)))


def test_a_region_is_judged_by_its_own_maximum(large, boxed):
    """Something hotter far away does not excuse what rises four times above the region's source."""
    hot = np.array(large.measured.array)
    hot[:, 45:47, 45:47] = 50 * hot.max()
    array = np.where(doubled(large.measured.array) == boxed.image.array, doubled(hot), 4 * boxed.image.array)
    result = replace(boxed, image=boxed.image.with_array(array.astype(np.float32)))
    assert {"maximum", "residual"} <= shut(large.measured.with_array(hot), result)


def test_activity_of_a_slice_in_a_region_counts_against_the_whole_slice(large, boxed):
    """Five per cent of the region's slices is too much; what little a small box holds of its slice may vary."""
    array = np.array(boxed.image.array)
    array[20:24, 20:76, 24:72] *= 1.3
    array[24:28, 20:76, 24:72] *= 0.7
    assert "slice-activity" in shut(large.measured, replace(boxed, image=boxed.image.with_array(array)))
    array = doubled(large.measured.array)
    array[:, :2, :2] *= 1.5  # far from the box: not deblurred, so not judged on blurring again
    outside = replace(boxed, image=boxed.image.with_array(array), settings={"region_box": "box:0-24,20-40,20-40"})
    assert "slice-activity" not in shut(large.measured, outside)


def test_unsafe_says_what_and_by_how_much(phantom, honest):
    """The message is what the person who must decide reads."""
    image = honest.image.with_array(honest.image.array * np.float32(1.01))
    with pytest.raises(UnsafeResult, match=r"activity: 0\.01.* \(beyond 0\.005\)"):
        require(phantom.measured, replace(honest, image=image))


def test_a_result_on_another_grid_is_refused(phantom, honest):
    """Corner-aligned doubling is a quarter of a voxel off."""
    moved = replace(honest.image, origin=honest.image.origin + 0.7)
    with pytest.raises(ValueError, match="doubled grid"):
        gates(phantom.measured, replace(honest, image=moved))


def test_a_kernel_off_centre_is_centred_together_with_its_image(phantom):
    """x and k move against each other: the image ends where the truth is, and the offset is told."""
    truth = phantom.truth.array / phantom.truth.array.max()
    away = ndimage.shift(truth, (0, 2, 0), order=1, mode="nearest").astype(np.float32)  # one PET voxel along H
    k = np.roll(gaussian(6.0, tuple(phantom.measured.spacing), (9, 9, 9)), -1, axis=1)
    x, centred, offset = centred_pair(away, k)
    np.testing.assert_allclose(offset, (0, -1, 0), atol=0.02)
    assert np.abs(centroid_voxels(centred)).max() < 0.01
    assert np.abs(x - truth).mean() < 0.1 * np.abs(away - truth).mean()


def test_settings_become_plain_json_values():
    """Nested stages and phases too."""
    assert plain(PAPER)["stages"][2]["phases"][0]["until"] == 300
