"""A region from the command to the check of what was written: deblurred inside, the source outside, or held."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from scipy import ndimage
from typer.testing import CliRunner

from deconv.interpolate import doubled
from dicomnode import pipeline
from dicomnode.cli import app
from dicomnode.pipeline import Failing, process
from dicomnode.remote import Computed
from dicomnode.uncertainty import UNCERTAINTY_FILE, load
from sop.read import read_series
from tests.factories import pet_series

SPACING = (6.0, 6.0, 6.0)
TV = {"method": "tv", "preset": "quick", "overrides": {"psf_fwhm_mm": 9.0}}
BEST = {"method": "nbd", "preset": "best", "overrides": {"iterations": 20, "windows": 2}}
BOX = "box:26-50,4-26,14-54"


def answer(*arguments: object) -> Any:
    """What a command prints with --json, exit code 0 required."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk 300 mm wide that narrows to a head 120 mm wide, hot spots in both; blurred by 10 mm."""
    d, h, w = np.ogrid[:60, :30, :68]
    wide = np.clip((42 - d) / 8, 0, 1)  # no slice ends abruptly: what a slice holds is judged here, not what is cut
    body = ((h - 15) / (10 + wide)) ** 2 + ((w - 34) / (10 + 15 * wide)) ** 2 < 1
    activity = np.where(body, 2000.0 * np.clip((66 - d) / 16, 0, 1), 0.0)
    for at in ((15, 14, 20), (22, 15, 40), (30, 14, 50), (43, 15, 34), (48, 12, 30), (50, 18, 38), (38, 13, 31)):
        activity[tuple(slice(x - 1, x + 1) for x in at)] = 12000.0
    seen = ndimage.gaussian_filter(activity, 10.0 / 2.355 / 6.0, mode="nearest")
    folder = tmp_path_factory.mktemp("patient") / "PET"
    folder.mkdir()
    for number, ds in enumerate(pet_series(slices=60, rows=30, columns=68, spacing=SPACING, values=seen)):
        ds.save_as(folder / f"{number:03d}.dcm", enforce_file_format=True)
    return folder


def run(patient: Path, out: Path, how: dict[str, Any], region: str) -> pipeline.Outcome:
    overrides = {**how["overrides"], "region": region}
    return process(sorted(patient.glob("*.dcm")), [], out, method=how["method"], preset=how["preset"],
                   overrides=overrides, device="cpu", threads=1, naming={"software_version": "0.1.0"},
                   now=datetime(2026, 1, 2, tzinfo=UTC))


@pytest.mark.parametrize("region", [BOX, "head-neck", "body"])
def test_a_region_goes_from_the_command_to_a_series_that_verifies(patient: Path, tmp_path: Path, region: str) -> None:
    """The derived slices name the box; `verify` knows it from them and proves what lies outside."""
    report = answer("deblur", patient, tmp_path / "out", "--method", "tv", "--preset", "quick", "--psf-fwhm-mm", 9,
                    "--region", region, "--threads", 1)
    box = report["settings"]["region_box"]
    assert report["settings"]["region"] == region and (region != BOX or box == BOX)
    header = dcmread(next((tmp_path / "out").glob("*.dcm")), stop_before_pixels=True)
    assert f"deblurred in {box}" in header.DerivationDescription
    verified = answer("verify", patient, tmp_path / "out")
    assert verified["ok"] and {"region", "outside-region"} <= {item["name"] for item in verified["items"]}
    assert {"seam", "slice-activity", "residual"} <= {gate["name"] for gate in report["gates"]}


def test_best_in_a_region_passes_and_keeps_its_uncertainty(patient: Path, tmp_path: Path) -> None:
    """Gates and check open; outside the image is the interpolated source and its standard deviation zero."""
    outcome = run(patient, tmp_path / "out", BEST, BOX)
    assert all(gate["ok"] for gate in outcome.report["gates"]) and outcome.report["check"]["ok"]
    kept, told = load(tmp_path / "out" / UNCERTAINTY_FILE), outcome.result.uncertainty
    assert told is not None and kept.same_grid(told) and kept.unit == told.unit
    np.testing.assert_allclose(kept.array, told.array, rtol=2e-3, atol=1e-6 * float(told.array.max()))
    derived, _ = read_series(sorted((tmp_path / "out").glob("*.dcm")))
    source, _ = read_series(sorted(patient.glob("*.dcm")))
    outside = np.ones(derived.shape, bool)
    outside[52:100, 8:52, 28:108] = False
    upsampled = doubled(source.array).clip(0)
    assert np.abs(derived.array - upsampled)[outside].max() < 1e-4 * source.array.max()
    assert np.abs(derived.array - upsampled)[~outside].max() > 0.05 * source.array.max()
    assert kept.array[outside].max() == 0 < kept.array[~outside].max()


def test_the_whole_volume_states_no_region(patient: Path, tmp_path: Path) -> None:
    """There is nothing that was not deblurred."""
    outcome = run(patient, tmp_path / "out", TV, "whole")
    header = dcmread(outcome.derived.files[0], stop_before_pixels=True)
    assert "deblurred in" not in header.DerivationDescription
    assert "region" not in {item["name"] for item in outcome.report["check"]["items"]}


@pytest.mark.parametrize(("change", "code", "reason"), [
    (lambda x: np.where(x > 0, x * np.float32(1.004), x), "check", "outside the region"),
    (lambda x: np.concatenate([x[:60], 1.3 * x[60:90], x[90:]]), "gate", "slice-activity"),
], ids=["changed outside", "invented inside"])
def test_a_region_that_went_wrong_is_held_for_its_reason(
    patient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, code: str, reason: str,
) -> None:
    """What the gates cannot see, the check does; nothing is left behind."""
    deblur = pipeline._deconvolve

    def wrong(*arguments: Any, **named: Any) -> Computed:
        computed = deblur(*arguments, **named)
        image = computed.result.image
        object.__setattr__(computed.result, "image", image.with_array(change(image.array).astype(np.float32)))
        return computed

    monkeypatch.setattr(pipeline, "_deconvolve", wrong)
    with pytest.raises(Failing) as refused:
        run(patient, tmp_path / "out", TV, BOX)
    assert refused.value.code == code and reason in refused.value.reason
    assert not (tmp_path / "out").exists()
