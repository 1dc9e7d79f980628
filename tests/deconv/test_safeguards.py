"""The gates open for an honest result and shut for each way of being unsafe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from deconv.finish import centred_pair, finished, normalised, plain
from deconv.kernels import centroid_voxels, gaussian
from deconv.phantoms import spheres
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
    """Eight gates, all open, and `require` hands them out."""
    found = require(phantom.measured, honest)
    assert len(found) == 8 and all(gate.ok for gate in found)


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
