"""What people look at: made with the series, kept beside it, the same again, and never worth the series itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import signal

import deconv
from deconv import Deconvolution, Volume
from deconv.metrics import kernel_fwhm_mm
from deconv.region import region as region_of
from deconv.safeguards import gates
from dicomnode import looks, pipeline
from dicomnode.looks import LOOKS_FILE
from dicomnode.pipeline import Outcome
from sop.read import read_series
from tests.factories import OBLIQUE, pet_series
from tests.node.test_pipeline import blurred_pet, run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The folder of a derived series and its outcome."""
    folder = tmp_path_factory.mktemp("built")
    outcome = run(folder, blurred_pet())
    return folder / "out", outcome


def test_looks_lie_beside_the_series_and_their_measures_in_the_report(built: tuple[Path, Outcome]) -> None:
    """Loaded again they are what the report says, in plain JSON, with every picture of the contract."""
    folder, outcome = built
    loaded = looks.load(folder / LOOKS_FILE)
    assert json.loads(json.dumps(outcome.report["looks"], allow_nan=False)) == loaded.measures
    planes = [f"{name}.{plane}" for name in ("before", "after", "residual")
              for plane in ("axial", "coronal", "sagittal")]
    assert {*planes, "before.rotation", "after.rotation", "kernel.d", "kernel.h", "kernel.w"} <= set(loaded.arrays)
    assert all(array.dtype == np.float32 for array in loaded.arrays.values())
    assert loaded.measures["unit"] == "SUVbw"


def test_a_failure_is_said_and_leaves_the_series_as_it_is(built: tuple[Path, Outcome], tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The derived objects are the same bytes; the report and the log name the problem; no half file is left."""
    def fail(path: Path, made: looks.Looks) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pipeline, "save_looks", fail)
    outcome = run(tmp_path, blurred_pet())
    assert outcome.report["looks"] == {"problem": "no pictures: OSError: disk full"}
    assert "disk full" in capsys.readouterr().err
    left, whole = sorted((tmp_path / "out").iterdir()), sorted(built[0].iterdir())
    assert [path.name for path in left] == [path.name for path in whole if path.name != LOOKS_FILE]
    assert all((built[0] / path.name).read_bytes() == path.read_bytes() for path in left)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    """A repeat after a crash writes the same file."""
    for name in ("a", "b"):
        looks.save(tmp_path / name, made(method="tv")[0])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_job_built_without_looks_has_none(tmp_path: Path) -> None:
    """Pages ask by loading."""
    with pytest.raises(FileNotFoundError):
        looks.load(tmp_path / LOOKS_FILE)


# --- made from values alone

def made(*, method: str = "nearest", shape: tuple[int, int, int] = (12, 20, 18),
         values: np.ndarray | None = None, **attributes: Any) -> tuple[looks.Looks, Volume, Deconvolution]:
    """Looks of a small series with a hot sphere, by a method without or with a kernel."""
    slices, rows, columns = shape
    volume, info = read_series(pet_series(slices=slices, rows=rows, columns=columns, values=values, **attributes))
    door = deconv.method(method)
    result = door.deconvolve(volume, door.settings("quick" if method == "tv" else "default"), guide=None, device="cpu")
    return looks.make(volume, result, info), volume, result


def test_values_are_shown_as_suv_where_the_headers_lead_to_it() -> None:
    """The factor is that of the headers, and every picture and figure has it in it."""
    found, volume, _ = made()
    assert found.measures["unit"] == "SUVbw" and found.measures["unit_note"] == ""
    factor = found.measures["factor"]
    assert found.arrays["before.coronal"].max() == pytest.approx(volume.array.max() * factor, rel=1e-6)
    assert found.measures["regions"][0]["before"]["max"] == pytest.approx(volume.array.max() * factor, rel=1e-6)


@pytest.mark.parametrize(("attributes", "unit", "factor", "why"), [
    ({"PatientWeight": None}, "kBq/mL", 1e-3, "PatientWeight"),
    ({"units": "CNTS"}, "counts", 1.0, "units|counts|SUV"),
])
def test_where_there_is_no_suv_the_unit_and_the_reason_are_told(attributes: dict[str, Any], unit: str,
                                                                factor: float, why: str) -> None:
    """kBq/mL of a calibrated image, else counts; never an SUV that was guessed."""
    found, volume, _ = made(**attributes)
    assert (found.measures["unit"], found.measures["factor"]) == (unit, factor)
    assert re.search(why, found.measures["unit_note"])
    assert found.arrays["before.axial"].max() == pytest.approx(volume.array.max() * factor, rel=1e-6)


def test_the_same_values_before_and_after_give_the_same_pictures_and_figures() -> None:
    """Nearest neighbour changes no value: all that is shown of it is the same twice, the residual nothing."""
    found, _, _ = made()
    for plane in ("axial", "coronal", "sagittal"):
        before = found.arrays[f"before.{plane}"]
        assert np.array_equal(before.repeat(2, 0).repeat(2, 1), found.arrays[f"after.{plane}"])
        assert np.abs(found.arrays[f"residual.{plane}"]).max() < 1e-5
        assert np.array(found.measures["mips"]["before"][plane]["mm"]) == pytest.approx(
            2 * np.array(found.measures["mips"]["after"][plane]["mm"]))
    assert found.arrays["before.rotation"].shape == found.arrays["after.rotation"].shape
    for region in found.measures["regions"]:
        assert region["before"] == pytest.approx(region["after"], rel=1e-6)
    assert found.measures["kernel"] is None and "voxels" in found.measures["residual_of"]
    assert found.measures["activity_change"] == pytest.approx(0.0, abs=1e-6)


def test_the_residual_is_the_source_minus_the_image_seen_through_the_kernel() -> None:
    """Its root mean square and its sign are those of the definition."""
    found, volume, result = made(method="tv")
    assert result.kernel is not None
    d, h, w = volume.shape
    down = result.image.array.reshape(d, 2, h, 2, w, 2).mean(axis=(1, 3, 5))
    reach = [n // 2 for n in result.kernel.shape]
    padded = np.pad(down, [(r, r) for r in reach], mode="edge")
    off = (volume.array - signal.convolve(padded, result.kernel, mode="valid", method="direct"))
    off = off * found.measures["factor"]
    assert found.measures["residual_rms"] == pytest.approx(float(np.sqrt((off**2).mean())), rel=1e-3)
    axial = found.arrays["residual.axial"]
    place = np.unravel_index(np.abs(axial).argmax(), axial.shape)
    line = off[:, place[0], place[1]]
    assert axial[place] == pytest.approx(line[np.abs(line).argmax()], rel=1e-3)


def test_kernel_figures_are_those_of_the_kernel() -> None:
    """Projections sum to one, lines pass through the maximum, widths are those of the metrics."""
    found, _, result = made(method="tv")
    kernel = found.measures["kernel"]
    assert result.kernel is not None
    assert kernel["fwhm_mm"] == pytest.approx(kernel_fwhm_mm(result.kernel, result.kernel_spacing))
    for axis, name in enumerate("dhw"):
        assert found.arrays[f"kernel.{name}"].sum() == pytest.approx(1.0, abs=1e-5)
        assert max(kernel["lines"][axis]) == pytest.approx(kernel["maximum"], rel=1e-4)


def test_uncertainty_is_told_in_percent_where_the_image_is_bright() -> None:
    """A standard deviation of a tenth of every value is 10 %, and nothing is told of what is dark."""
    _, volume, result = made()
    _, info = read_series(pet_series(slices=12, rows=20, columns=18))
    sure = replace(result, uncertainty=result.image.with_array(result.image.array * np.float32(0.1)))
    found = looks.make(volume, sure, info)
    for plane in ("axial", "coronal", "sagittal"):
        bright = found.arrays[f"after.{plane}"] >= 0.05 * found.measures["top"]
        assert np.allclose(found.arrays[f"uncertainty.{plane}"][bright], 10.0, atol=1e-3)
        assert not found.arrays[f"uncertainty.{plane}"][~bright].any()
    assert found.measures["uncertainty"]["median_percent"] == pytest.approx(10.0, abs=1e-3)


def test_what_is_loaded_is_what_was_saved_within_a_thousandth_of_the_grey_scale(tmp_path: Path) -> None:
    """Both halves of the turn, negative values too; the kernel exactly."""
    found, _, _ = made(method="tv")
    looks.save(tmp_path / LOOKS_FILE, found)
    loaded = looks.load(tmp_path / LOOKS_FILE)
    assert loaded.measures == json.loads(json.dumps(found.measures))
    assert set(loaded.arrays) == set(found.arrays)
    for name, values in found.arrays.items():
        assert np.abs(loaded.arrays[name] - values).max() <= 0.0006 * found.measures["top"], name
    for plane in ("axial", "coronal", "sagittal"):  # shown on a scale of its own, which may be far below
        off = found.arrays[f"residual.{plane}"]
        assert np.abs(loaded.arrays[f"residual.{plane}"] - off).max() <= 0.0006 * (off.max() - off.min())
    assert np.array_equal(loaded.arrays["kernel.d"], found.arrays["kernel.d"])
    assert found.arrays["residual.axial"].min() < 0 <= found.arrays["before.axial"].min()


def test_another_file_is_not_taken_for_looks(tmp_path: Path) -> None:
    """Named in the error."""
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match=r"other\.npz"):
        looks.load(tmp_path / "other.npz")


# --- the grey scale

def picture(**areas: float) -> np.ndarray:
    """A coronal MIP of 100 x 100 pixels, all body at 1, with so many pixels at some values: hot_500=8.0."""
    image = np.ones(10_000, dtype=np.float32)
    start = 0
    for name, value in areas.items():
        count = int(name.partition("_")[2])
        image[start:start + count] = value
        start += count
    return image.reshape(100, 100)


@pytest.mark.parametrize(("areas", "highest", "unit", "length", "top"), [
    ({"bladder_80": 60.0, "heart_300": 9.5}, 80.0, "SUVbw", 900.0, 5.0),  # under 1 %: the rest decides
    ({"kidneys_500": 50.0, "liver_1000": 6.0}, 70.0, "SUVbw", 900.0, 15.0),  # 5 %: as bright as a whole body may be
    ({"glands_2000": 22.0}, 28.0, "SUVbw", 120.0, 25.0),  # a short field shows its organs
    ({"spheres_400": 16.0}, 17.0, "SUVbw", 120.0, 20.0),
    ({"faint_100": 2.0}, 2.5, "SUVbw", 900.0, 2.5),  # no more than there is
    ({"kidneys_500": 50.0, "liver_1000": 6.0}, 70.0, "kBq/mL", 900.0, 20.0),
    ({"spheres_400": 41_000.0}, 50_000.0, "counts", 120.0, 50_000.0),
    ({}, 0.0, "SUVbw", 900.0, 1.0),
])
def test_the_grey_scale_follows_its_rule(areas: dict[str, float], highest: float, unit: str, length: float,
                                         top: float) -> None:
    """Bladder and kidneys saturate in a long field; glands and spheres are shown whole in a short one."""
    assert looks.shared_top(picture(**areas), highest, unit=unit, length_mm=length) == top


def test_an_oblique_series_has_pictures_too(tmp_path: Path) -> None:
    """Before and after of a series that lies aslant in the patient are on grids that fit."""
    outcome = run(tmp_path, pet_series(orientation=OBLIQUE, seed=3), method="nearest", preset="default")
    assert "problem" not in outcome.report["looks"]
    arrays = looks.load(tmp_path / "out" / LOOKS_FILE).arrays
    for plane in ("axial", "coronal", "sagittal"):
        assert arrays[f"after.{plane}"].shape == tuple(2 * n for n in arrays[f"before.{plane}"].shape)


def test_the_residual_of_a_region_is_told_inside_it_alone() -> None:
    """Outside, the image is the source: blurring it again would make a residual where nothing was done. Its RMS is that
    of the gate."""
    found, volume, result = made(method="tv")
    box = "box:3-12,4-16,3-15"
    part = replace(result, settings={**result.settings, "region_box": box})
    info = read_series(pet_series(slices=12, rows=20, columns=18))[1]
    told = looks.make(volume, part, info)
    measured = {gate.name: gate.measured for gate in gates(volume, part)}["residual"]
    inside = region_of(volume, box).inside
    top = float(volume.array[inside].max()) * told.measures["factor"]
    assert told.measures["residual_rms"] == pytest.approx(measured * top, rel=1e-5)
    assert not told.arrays["residual.axial"][0].any() and not told.arrays["residual.coronal"][:, 0].any()
    assert found.arrays["residual.axial"][0].any()
    assert told.measures["residual_of"].endswith("inside the deblurred region")
