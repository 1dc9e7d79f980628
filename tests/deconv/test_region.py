"""Regions: found where the body is, put back without a seam, and nothing changed outside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import deconv
from deconv.interpolate import doubled
from deconv.phantoms import spheres
from deconv.region import body_box, check_spec, region
from deconv.safeguards import gates
from deconv.volume import Volume


def patient(*, arms: str = "down", head_first: bool = True, noise: float = 0.0) -> Volume:
    """Trunk 400 mm wide, head 160 mm wide and 200 mm long with the neck, arms at the side or raised; 5 mm voxels."""
    d, h, w = np.ogrid[:120, :48, :110]
    def ellipse(cw: float, rh: float, rw: float) -> np.ndarray:
        return ((h - 24) / rh) ** 2 + ((w - cw) / rw) ** 2 < 1

    trunk, head = ellipse(55, 18, 40), ellipse(55, 16, 16)
    sides = ellipse(10, 6, 6) | ellipse(100, 6, 6)
    body = np.where(d < 80, trunk, head) | (sides & (d < 70 if arms == "down" else d > 70))
    body = body & np.ones((120, 1, 1), bool)
    body[116:] = False
    array = ndimage.gaussian_filter(np.where(body, 2000.0, 0.0), 0.6)
    array[60, 24, 55] += 90000.0  # a hot organ does not make the rest air
    if noise:
        array += noise * np.random.default_rng(0).random(array.shape)
    if not head_first:
        return Volume(array[::-1], (5, 5, 5), (0, 0, 0), np.eye(3)[:, ::-1] * [-1, 1, 1], "Bq/ml")
    return Volume.axial(array, (5, 5, 5))


def boxes(volume: Volume) -> st.SearchStrategy[str]:
    def axis(n: int) -> st.SearchStrategy[tuple[int, int]]:
        return st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda ab: ab[0] < ab[1])

    return st.tuples(*map(axis, volume.shape)).map(lambda limits: "box:" + ",".join(f"{a}-{b}" for a, b in limits))


NOISE = Volume.axial(1 + np.random.default_rng(0).random((14, 17, 20)), (3.0, 4.0, 2.0), origin=(5, 6, 7))
UPSAMPLED = doubled(NOISE.array)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(boxes(NOISE))
def test_outside_a_region_the_source_is_interpolated_bit_for_bit(spec: str) -> None:
    """Whatever is pasted; the total is the source's; inside, away from the fade, it is what was pasted, scaled."""
    found = region(NOISE, spec, context_mm=8.0)
    x = doubled(found.cropped(NOISE).array) * 1.3
    out, scale = found.paste(x, NOISE.array)
    inside = np.zeros(UPSAMPLED.shape, bool)
    inside[tuple(slice(2 * s.start, 2 * s.stop) for s in found.inside)] = True
    if not found.is_whole:
        np.testing.assert_array_equal(out[~inside], UPSAMPLED[~inside])
        assert out.sum(dtype=float) == pytest.approx(8 * NOISE.array.sum(dtype=float), rel=1e-6)
    at = tuple(slice(2 * s.start, 2 * s.stop) for s in found.crop)
    full = found.weights() == 1
    np.testing.assert_allclose(out[at][full], (np.float32(scale) * x)[full], rtol=1e-5)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(boxes(NOISE), st.permutations([0, 1, 2]))
def test_a_region_knows_no_preferred_axis(spec: str, order: list[int]) -> None:
    """Permuted axes give the permuted region, weights and image."""
    limits = spec.removeprefix("box:").split(",")
    turned = Volume(NOISE.array.transpose(order), NOISE.spacing[order], NOISE.origin, NOISE.direction[:, order],
                    NOISE.unit)
    one, other = region(NOISE, spec), region(turned, "box:" + ",".join(limits[a] for a in order))
    assert other.inside == tuple(one.inside[a] for a in order) and other.fade == tuple(one.fade[a] for a in order)
    np.testing.assert_allclose(other.weights(), one.weights().transpose(order), rtol=1e-6)


def test_a_region_that_spans_everything_is_the_identity() -> None:
    """What was deblurred comes back as it is."""
    x = UPSAMPLED * np.float32(1.25)
    for spec in ("whole", "box:0-14,0-17,0-20"):
        found = region(NOISE, spec)
        out, scale = found.paste(x, NOISE.array)
        assert scale == 1.0 and found.is_whole and found.share == 1.0
        np.testing.assert_array_equal(out, x)
        np.testing.assert_array_equal(found.paste_spread(x), x)


def test_the_border_is_smooth_and_its_context_true() -> None:
    """Weights rise from 0 to 1 within the border, not at the volume's own; the crop keeps its place in the patient."""
    found = region(NOISE, "box:4-14,2-15,0-20", context_mm=6.0, fade_mm=8.0)
    profile = found.weights()[:, 15, 20]
    assert (np.diff(profile) >= 0).all() and profile[-1] == 1 and np.diff(profile).max() < 0.4
    assert not profile[: 2 * (4 - found.crop[0].start)].any()
    inner = found.cropped(NOISE)
    np.testing.assert_array_equal(inner.array, NOISE.array[found.crop])
    np.testing.assert_allclose(inner.position((0, 0, 0)), NOISE.position([s.start for s in found.crop]))
    assert region(NOISE, found.text).inside == found.inside
    spread = found.paste_spread(np.ones(tuple(2 * n for n in inner.shape), np.float32), 2.0)
    assert spread.max() == 2.0 and not spread[:6].any()


@pytest.mark.parametrize("spec", ["", "head", "box:1-2", "box:0-4,0-4,0-21", "box:4-4,0-4,0-4", "box:5-4,0-4,0-4",
                                  "box:-1-4,0-4,0-4"])
def test_what_is_no_region_is_refused(spec: str) -> None:
    """Unknown words, empty boxes, boxes that leave the volume."""
    with pytest.raises(ValueError, match="region"):
        region(NOISE, spec)
    assert check_spec("body") == "body"


@pytest.mark.parametrize("noise", [0.0, 8.0])
def test_the_body_is_found_whole(noise: float) -> None:
    """Every voxel of the patient lies in the box, arms too, and much of the air does not."""
    volume = patient(arms="up", noise=noise)
    box, reason = body_box(volume)
    assert reason.startswith("body: ")
    held = volume.array[box].sum(dtype=float)
    assert (volume.array > 100).sum() == (volume.array[box] > 100).sum()
    assert held >= 0.99 * volume.array.sum(dtype=float) and region(volume, "body").share < 0.95


def test_cool_tissue_around_hot_organs_is_not_cut_off() -> None:
    """A hundredth of the hottest is still body."""
    array = np.zeros((40, 60, 60))
    array[:, 15:45, 15:45] = 100.0
    array[18:22, 20:24, 20:24] = 10000.0
    found = region(Volume.axial(ndimage.gaussian_filter(array, 0.7), (4, 4, 4)), "body")
    assert all(s.start <= 15 and s.stop >= min(45, n) for s, n in zip(found.inside, found.shape, strict=True))


def test_where_nothing_stands_out_the_body_is_everything() -> None:
    """With the reason: a flat image, an empty one, a field of view that the body fills."""
    for array in (np.ones((9, 9, 9)), np.zeros((9, 9, 9)), spheres((16, 24, 24)).measured.array):
        found = region(Volume.axial(array, (4, 4, 4)), "body")
        assert found.is_whole and found.reason.startswith("whole: ")


@pytest.mark.parametrize("arms", ["down", "up"])
@pytest.mark.parametrize("head_first", [True, False])
def test_head_and_neck_are_found_at_the_head_end(arms: str, head_first: bool) -> None:
    """By the direction of the volume, whichever way its slices run: the head is in, the trunk is not, nor the arms."""
    volume = patient(arms=arms, head_first=head_first)
    found = region(volume, "head-neck")
    along = found.inside[0] if head_first else slice(120 - found.inside[0].stop, 120 - found.inside[0].start)
    assert 60 <= along.start <= 80 and along.stop >= 116
    across = found.inside[2]
    assert 25 <= across.start <= 39 and 71 <= across.stop <= 85
    head = volume.array[found.inside]
    assert (head > 1000).sum() > 30000 and found.share < 0.2


def test_head_and_neck_without_a_head_or_a_trunk_are_refused() -> None:
    """A trunk alone, a head alone, an oblique volume, an empty one: a clear reason and the remedy."""
    volume = patient()
    for part in (volume.array[:60], volume.array[85:]):
        with pytest.raises(ValueError, match="no head lies above a trunk"):
            region(Volume.axial(part, (5, 5, 5)), "head-neck")
    tilt = np.array([[1, 0, 0], [0, 0.8, -0.6], [0, 0.6, 0.8]])
    with pytest.raises(ValueError, match="oblique"):
        region(Volume(volume.array, volume.spacing, volume.origin, tilt @ volume.direction, "Bq/ml"), "head-neck")
    with pytest.raises(ValueError, match="stands out"):
        region(Volume.axial(np.ones((40, 9, 9)), (5, 5, 5)), "head-neck")


def test_a_method_deblurs_a_region_and_is_judged_there() -> None:
    """TV in a box: outside the source as cubic interpolation gives it, inside sharper; every gate open; recorded."""
    phantom = spheres((20, 40, 40), fwhm_mm=6.0)
    tv, cubic = deconv.method("tv"), deconv.method("cubic")
    result = tv.deconvolve(phantom.measured, tv.settings("default", region="box:0-20,4-36,0-28", iterations=15))
    smooth = cubic.deconvolve(phantom.measured, cubic.settings("default")).image.array
    np.testing.assert_array_equal(result.image.array[:, :, 56:], smooth[:, :, 56:])
    assert result.settings["region_box"] == "box:0-20,4-36,0-28" and abs(result.metrics["activity_change"]) < 1e-6
    part = (slice(None), slice(20, 60), slice(0, 44))
    truth = phantom.truth.array[part]
    assert np.linalg.norm(result.image.array[part] - truth) < 0.7 * np.linalg.norm(smooth[part] - truth)
    assert all(gate.ok for gate in gates(phantom.measured, result)), gates(phantom.measured, result)


def test_a_real_whole_body(shared_data) -> None:
    """GE, arms raised: two thirds of the voxels hold 99.9 % of the activity; the head is above the shoulders."""
    from sop.read import read_series

    volume, _ = read_series(sorted((shared_data / "ge_sts001_pet_raw").iterdir()))
    found = region(volume, "body")
    assert found.reason.startswith("body: 99.9") and 0.6 < found.share < 0.75
    assert found.inside[0] == slice(0, 267)
    head = region(volume, "head-neck")
    assert 215 <= head.inside[0].start <= 235 and head.inside[0].stop == 267 and head.share < 0.05
    assert head.inside[2].start < 51 and head.inside[2].stop > 87
