"""A series of which only a region was deblurred: inside it must explain the source, outside it must be the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from scipy import ndimage

from deconv.interpolate import doubled, doubled_nearest
from deconv.region import region
from deconv.volume import Volume
from sop.check import CheckReport, check_derived
from tests.sop.derived_series import SHAPE, derive, save, source_series

SPACING = (3.27, 4.6875, 4.0)
BOX = "box:0-12,5-26,3-22"
Image = Callable[[np.ndarray], np.ndarray]


def kernel() -> np.ndarray:
    """Gaussian of 0.9 voxels."""
    delta = np.zeros((7, 7, 7))
    delta[3, 3, 3] = 1
    blurred = ndimage.gaussian_filter(delta, 0.9, truncate=8)
    return blurred / blurred.sum()


def sharp() -> np.ndarray:
    """What is to be found: a block with hot cubes, on the doubled grid."""
    truth = np.full([2 * n for n in SHAPE], 100.0)
    rng = np.random.default_rng(5)
    truth[4:20, 10:50, 10:42] = 500
    for _ in range(8):
        d, h, w = rng.integers((6, 18, 14), (18, 44, 36))
        truth[d - 2:d + 2, h - 3:h + 3, w - 3:w + 3] = 9000
    return truth


def measured() -> np.ndarray:
    d, h, w = SHAPE
    return ndimage.convolve(sharp().reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5)), kernel(), mode="nearest")


def pasted(y: np.ndarray, inside: np.ndarray | None = None) -> np.ndarray:
    """The truth, or another image `inside`, in the box; the upsampled source elsewhere."""
    found = region(Volume.axial(y, SPACING), BOX)
    part = (sharp() if inside is None else inside).astype(np.float32)
    return found.paste(part[tuple(slice(2 * s.start, 2 * s.stop) for s in found.crop)], np.asarray(y))[0].clip(0)


def checked(folder: Path, image: Image = pasted, *, source: dict[str, Any] | None = None,
            fault: Callable[[list], None] | None = None, blur: bool = True, box: str = BOX) -> CheckReport:
    files = save(source_series(values=measured(), **(source or {})), folder / "source")
    derived = list(derive(files, folder / "derived", image=image, region_box=box)[0].files)
    if fault is not None:
        slices = [dcmread(path) for path in derived]
        fault(slices)
        for path, ds in zip(derived, slices, strict=True):
            ds.save_as(path)
    return check_derived(files, derived, kernel=kernel() if blur else None, kernel_spacing=SPACING if blur else None)


def failed(report: CheckReport) -> set[str]:
    return {item.name for item in report.failures}


@pytest.mark.parametrize("blur", [True, False])
@pytest.mark.parametrize("source", [{}, {"vendor": "PHILIPS", "units": "CNTS"}], ids=["Bq/mL", "counts with factors"])
def test_a_right_region_passes(tmp_path: Path, blur: bool, source: dict) -> None:
    """With its kernel and from the files alone; both items of the region are there."""
    report = checked(tmp_path, blur=blur, source=source)
    assert report.failures == ()
    assert {"region", "outside-region"} <= {item.name for item in report.items}


def test_a_series_of_the_whole_volume_has_no_region(tmp_path: Path) -> None:
    """Nothing is stated, nothing is judged."""
    report = checked(tmp_path, lambda y: sharp(), box="")
    assert report.failures == () and "region" not in {item.name for item in report.items}


def _linear(y: np.ndarray) -> np.ndarray:
    return ndimage.zoom(np.asarray(y, dtype=np.float64), 2, order=1, grid_mode=True, mode="nearest")


def _hotter_at_a_corner(y: np.ndarray) -> np.ndarray:
    image = pasted(y)
    image[20, 3, 2] += 30.0
    return image


def _deblurred_beyond(y: np.ndarray) -> np.ndarray:
    image = pasted(y)
    image[:, :10] = sharp()[:, :10]
    return image


@pytest.mark.parametrize("image", [
    _hotter_at_a_corner, _deblurred_beyond, lambda y: np.where(pasted(y) == doubled(y), _linear(y), pasted(y)),
    lambda y: np.where(pasted(y) == doubled(y), doubled_nearest(y), pasted(y)),
], ids=["one voxel", "deblurred beyond it", "linear", "repeated voxels"])
def test_whatever_is_not_the_upsampled_source_outside_is_found(tmp_path: Path, image: Image) -> None:
    """A third of a per cent of the maximum in one voxel is enough."""
    assert "outside-region" in failed(checked(tmp_path, image))


def test_content_displaced_within_the_region_is_found(tmp_path: Path) -> None:
    """What was not deblurred lies right and must not vouch for the rest."""
    aside = ndimage.shift(sharp(), (0, 0, 2.0), order=1, mode="nearest")
    report = checked(tmp_path, lambda y: pasted(y, aside))
    assert {"content-shift-column", "residual"} & failed(report)
    assert "outside-region" not in failed(report)


def test_another_image_within_the_region_is_found(tmp_path: Path) -> None:
    """By the residual in its core, which the rest of the volume must not dilute."""
    assert "residual" in failed(checked(tmp_path, lambda y: pasted(y, sharp()[:, ::-1, ::-1].copy())))


def _another_box(slices: list) -> None:
    slices[7].DerivationDescription = slices[7].DerivationDescription.replace("5-26", "5-25")


def _no_box(slices: list) -> None:
    slices[7].DerivationDescription = "Deconvolution"


@pytest.mark.parametrize(("fault", "box"), [
    (_another_box, BOX), (_no_box, BOX), (None, "box:0-12,5-26,3-27"), (None, "box:0-12,5-5,3-22"),
], ids=["another in one slice", "none in one slice", "beyond the source", "empty"])
def test_a_region_is_stated_alike_in_all_slices_and_lies_within_the_source(
    tmp_path: Path, fault: Callable[[list], None] | None, box: str,
) -> None:
    """Otherwise nothing is known of what was deblurred, and the whole volume is judged."""
    assert "region" in failed(checked(tmp_path, fault=fault, box=box))


def test_what_the_source_was_derived_by_states_no_region(tmp_path: Path) -> None:
    """An earlier description is kept behind ours and is not ours."""
    told = {"DerivationDescription": f"deblurred in {BOX} by somebody else"}
    report = checked(tmp_path, lambda y: sharp(), source=told, box="")
    assert report.failures == () and "region" not in {item.name for item in report.items}
