"""`dicomnode calibrate` and `dicomnode psf`: from a phantom's files to the library, and from there to an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dicomnode.calibrate import deblur_overrides, key_values, lengths
from dicomnode.cli import app
from dicomnode.errors import ConfigError, Exit
from dicomnode.ledger import Ledger


def dicomnode(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sphere phantom's PET with its CT, 6.5 mm FWHM."""
    folder = tmp_path_factory.mktemp("phantom") / "study"
    result = dicomnode("phantom", folder, "--size", 22, 50, 50, "--fwhm-mm", 6.5, "--noise", 0.02)
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A node that has run."""
    path = tmp_path / "node.toml"
    path.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')
    (tmp_path / "data").mkdir()
    Ledger(tmp_path / "data" / "ledger.sqlite3").close()
    return path


@pytest.fixture(scope="module")
def calibrated(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The file that `calibrate --out` wrote, and what it printed as JSON."""
    out = tmp_path_factory.mktemp("psf") / "psf.json"
    result = dicomnode("calibrate", phantom, "--diameters", "16,14,10,8", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


def test_calibrate_measures_what_the_phantom_was_made_with(calibrated: tuple[Path, dict[str, Any]]) -> None:
    """Within three standard errors and 0.2 mm; the file holds what was printed."""
    out, value = calibrated
    for width, sd in zip(value["fwhm_mm"], value["fwhm_sd_mm"], strict=True):
        assert abs(width - 6.5) < min(0.2, 3 * sd)
    assert value["scanner"]["model"] == "SYNTHETIC PHANTOM" and value["scanner"]["radionuclide"] == "F-18"
    assert json.loads(out.read_text()) == value


def test_a_calibration_enters_the_library_and_can_be_taken_out(phantom: Path, config: Path) -> None:
    """Printed as a table, listed with its provenance, forgotten by its number."""
    done = dicomnode("calibrate", phantom, "--diameters", "16,14,10", "--key", "device=7", "--config", config)
    assert done.exit_code == 0, done.stderr
    assert "slice" in done.stdout and "given" in done.stdout
    (scanner,) = json.loads(dicomnode("psf", "--config", config, "--json").stdout)
    assert scanner["scanner"]["device"] == "7" and scanner["given"]["psf"] == "known"
    (entry,) = scanner["entries"]
    assert entry["kind"] == "measured" and entry["software_version"] and entry["series_uid"]
    assert "SYNTHETIC PHANTOM" in dicomnode("psf", "--config", config).stdout
    assert dicomnode("psf", "--forget", entry["id"], "--config", config).exit_code == 0
    assert "empty" in dicomnode("psf", "--config", config).stdout
    gone = dicomnode("psf", "--forget", entry["id"], "--config", config)
    assert gone.exit_code == Exit.USAGE and "no PSF" in gone.stderr


def test_deblur_takes_the_psf_of_a_file(phantom: Path, calibrated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Its widths become settings of the derived series."""
    out, value = calibrated
    result = dicomnode("deblur", phantom, tmp_path / "out", "--method", "tv", "--preset", "quick", "--psf", out,
                       "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    settings = json.loads(result.stdout)["settings"]
    assert settings["psf_fwhm_mm"] == pytest.approx(value["fwhm_mm"], abs=1e-3)


def test_what_cannot_be_measured_is_refused_with_the_remedy(phantom: Path) -> None:
    """Twelve spheres are not there: exit code 3, no traceback."""
    result = dicomnode("calibrate", phantom, "--diameters", ",".join(["10"] * 12))
    assert result.exit_code == Exit.REFUSED and "Remedy" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("options", [("--diameters", "10;13"), ("--key", "model"), ("--key", "colour=blue")])
def test_options_that_make_no_sense_are_usage_errors(phantom: Path, options: tuple[str, str]) -> None:
    """Exit code 2, and the option is named."""
    result = dicomnode("calibrate", phantom, *options)
    assert result.exit_code == Exit.USAGE and options[0] in result.stderr


def test_a_psf_is_stated_once_and_only_where_it_is_taken(calibrated: tuple[Path, dict[str, Any]]) -> None:
    """Two widths, a method without a PSF, a library that does not know the scanner: refused."""
    from pydicom.dataset import Dataset

    file = str(calibrated[0])
    with pytest.raises(ConfigError, match="twice"):
        deblur_overrides(file, "tv", "default", header=Dataset(), ledger=None, stated=["psf_fwhm_mm"])
    with pytest.raises(ConfigError, match="takes no PSF"):
        deblur_overrides(file, "cubic", "default", header=Dataset(), ledger=None)
    with pytest.raises(ConfigError, match="unknown scanner"):
        deblur_overrides("library", "tv", "default", header=Dataset(), ledger=None)
    assert deblur_overrides("blind", "cubic", "default", header=Dataset(), ledger=None) == {}


def test_lengths_and_keys_are_read_as_written() -> None:
    """Commas between, NAME=VALUE."""
    assert lengths("10,13.5") == [10.0, 13.5] and lengths(None) is None
    assert key_values(["model=A B", "radionuclide = Ga-68"]) == {"model": "A B", "radionuclide": "Ga-68"}


@pytest.mark.slow
def test_the_nema_phantom_is_measured(shared_data: Path) -> None:
    """Real data without units: six spheres on warm background, sharper across than along the axis, ratio near 10:1."""
    result = dicomnode("calibrate", shared_data / "nema_iec_minimal_pet", "--assume-units", "BQML", "--diameters",
                       "10,13,17,22,28,37", "--wall-mm", 1, "--json")
    assert result.exit_code == 0, result.stderr
    value = json.loads(result.stdout)
    d, h, w = value["fwhm_mm"]
    assert 4.0 < d < 5.0 and 2.8 < h < 3.6 and 2.8 < w < 3.6
    assert 8.5 < value["spheres"][0]["activity"] / value["spheres"][0]["background"] < 10.5
