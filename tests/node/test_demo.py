"""The demo: a study through a whole node started as a process, the picture, and the figures it tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread
from scipy import ndimage

from deconv.phantoms import average_pool
from dicomnode import phantomstudy
from dicomnode.figures import figures, true_kernel
from dicomnode.pictures import phantom_picture, ring_profile


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """`dicomnode demo` with the quick method; what it printed as JSON."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "dicomnode", "demo", str(folder), "--method", "tv", "--preset", "quick", "--json"],
        capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_derived_series_comes_back_and_verifies(demo):
    """Sent by C-STORE, processed by a node, received by a peer, verified from the received files."""
    received = sorted((Path(demo["folder"]) / "received").glob("*.dcm"))
    source = sorted((Path(demo["folder"]) / "source" / "PET").glob("*.dcm"))
    assert demo["verified"]["ok"] and len(demo["verified"]["items"]) > 30
    assert len(received) == 2 * len(source) == demo["derived_instances"]
    assert dcmread(received[0]).StudyInstanceUID == dcmread(source[0]).StudyInstanceUID


def test_what_goes_beside_the_series_comes_too(demo):
    """Measurement report, SUV mapping, kernel and pictures, of the same study."""
    beside = [dcmread(path) for path in (Path(demo["folder"]) / "received" / "also").glob("*.dcm")]
    source = dcmread(next((Path(demo["folder"]) / "source" / "PET").glob("*.dcm")))
    assert {ds.SOPClassUID.name.removesuffix(" Storage") for ds in beside} == {
        "Comprehensive 3D SR", "Real World Value Mapping", "Parametric Map",
        "Secondary Capture Image"}
    assert {ds.StudyInstanceUID for ds in beside} == {source.StudyInstanceUID}


def test_the_spheres_are_sharper(demo):
    """The error against the truth falls by more than half; every sphere of 6 mm and more recovers more."""
    assert demo["nrmse"]["after"] < 0.5 * demo["nrmse"]["before"]
    assert all(row["after"]["mean"] > 1.2 * row["before"]["mean"] for row in demo["spheres"] if row["diameter_mm"] >= 6)
    assert abs(demo["activity_change"]) < 5e-4


def test_the_picture_is_there_and_the_node_is_gone(demo):
    """A PNG of a sensible size; the log ends with the receiver's farewell; figures lie beside it."""
    folder = Path(demo["folder"])
    with Image.open(folder / "demo.png") as picture:
        assert picture.size[0] > 1000 and picture.size[1] > 600
    assert (folder / "demo.png").stat().st_size < 300_000
    assert "receiver has stopped" in (folder / "node" / "node.log").read_text(encoding="utf-8")
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8"))["nrmse"] == demo["nrmse"]


def test_figures_of_the_truth_are_perfect():
    """The yardstick itself: the true image scores no error and full recovery of the large spheres."""
    phantom = phantomstudy.make("spheres", size=(16, 40, 40), seed=1)
    found = figures(phantom, phantom.measured, phantom.truth, true_kernel(phantom), suv_factor=1e-3)
    assert found["nrmse"]["after"] == 0 and found["kernel_inner_product"] == pytest.approx(1)
    assert found["kernel_fwhm_mm"] == found["true_fwhm_mm"]
    assert found["spheres"][0]["after"]["max"] == pytest.approx(1, abs=1e-3)
    assert found["spheres"][0]["before"]["mean"] < 0.8


def test_the_true_kernel_makes_the_measurement():
    """Blurring the averaged truth with it gives what was measured, closer than the PSF integrated over voxels does."""
    phantom = phantomstudy.make("spheres", size=(16, 40, 40), seed=1)
    pooled = average_pool(phantom.truth.array.astype(np.float64))
    off = {name: np.abs(ndimage.convolve(pooled, kernel, mode="nearest") - phantom.measured.array).max()
           for name, kernel in (("true", true_kernel(phantom)), ("integrated", phantom.psf))}
    assert off["true"] < 0.5 * off["integrated"] and off["true"] < 0.05 * phantom.measured.array.max()


def test_the_profile_runs_through_the_middle_of_every_sphere():
    """At the place of each sphere the true profile holds its activity, half way between spheres the background."""
    phantom = phantomstudy.make("spheres", size=(24, 48, 48), seed=2)
    mm, values, places = ring_profile(phantom, phantom.truth)
    large = [at for at, sphere in zip(places, phantom.spheres, strict=True) if sphere.diameter_mm >= 6]
    assert np.interp(large, mm, values) == pytest.approx(phantom.spheres[0].activity, rel=0.02)
    assert np.interp((places[:-1] + places[1:]) / 2, mm, values) == pytest.approx(phantom.background, rel=0.02)


def test_a_method_without_kernel_has_a_picture_too(tmp_path):
    """Interpolation has no kernel to show."""
    phantom = phantomstudy.make("spheres", size=(16, 40, 40))
    phantom_picture(tmp_path / "p.png", phantom, phantom.measured, phantom.truth, None, title="none")
    assert (tmp_path / "p.png").stat().st_size > 10_000
