"""From a folder with a phantom's PET to a measured PSF and the key under which the library keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dicomnode import __version__, offline
from dicomnode.errors import ConfigError, RefusedInput
from dicomnode.ledger import Ledger
from dicomnode.psflibrary import (
    PSF_SETTINGS,
    combined,
    from_file,
    keep_measured,
    overrides_for,
    takes_psf,
    to_json,
)
from sop.read import read_series
from sop.scanner import ScannerKey, scanner_key

if TYPE_CHECKING:
    from deconv.calibration import MeasuredPsf

__all__ = ["Calibration", "calibrate", "deblur_overrides", "keep", "key_values", "lengths"]


@dataclass(frozen=True)
class Calibration:
    """What a phantom's series showed."""

    psf: MeasuredPsf
    key: ScannerKey
    study_uid: str
    series_uid: str

    def as_json(self) -> dict[str, Any]:
        """Also the content of the file that `deblur --psf` takes."""
        return to_json(self.psf, self.key, self.series_uid, __version__)


def calibrate(
    folder: Path, *, series_uid: str | None = None, diameters_mm: Sequence[float] | None = None, wall_mm: float = 0.0,
    free_activity: bool = False, assume_units: str | None = None, key_overrides: Mapping[str, str] | None = None,
) -> Calibration:
    """Measure the PSF on the PET series in `folder`. See deconv.calibration.measure_psf for the arguments.

    Raises RefusedInput where no series qualifies or its spheres cannot be measured, ConfigError for a wrong key,
    sop.Refused for a series that cannot be read.
    """
    from deconv.calibration import measure_psf

    found = offline.find_series(folder)
    pet = offline.choose(found, series_uid=series_uid, assume_units=assume_units is not None).pet
    try:
        key = scanner_key(pet.header).with_values(dict(key_overrides or {}))
    except ValueError as error:
        raise ConfigError(f"--key: {error}") from error
    volume, source = read_series(pet.files, assume_units=assume_units)
    try:
        psf = measure_psf(volume, diameters_mm=diameters_mm, wall_mm=wall_mm,
                          activity="free" if free_activity else "shared")
    except ValueError as error:
        raise RefusedInput(f"series {pet.uid}: {error}. Remedy: give the inner diameters of the spheres that can be "
                           "seen (--diameters), or scan the phantom again") from error
    return Calibration(psf, key, source.study, source.series)


def keep(calibration: Calibration, ledger: Ledger, *, now: datetime) -> None:
    """Enter it in the node's library. Raises ConfigError where the scanner is not known."""
    keep_measured(ledger, calibration.key, calibration.psf, study_uid=calibration.study_uid,
                  series_uid=calibration.series_uid, software_version=__version__, now=now.timestamp())


def key_values(texts: Sequence[str]) -> dict[str, str]:
    """"model=Biograph" -> {"model": "Biograph"}. Raises ConfigError."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ConfigError(f"--key {wrong[0]}: write it as NAME=VALUE")
    return {name.strip(): value.strip() for name, _, value in pairs}


def lengths(text: str | None) -> list[float] | None:
    """"10,13.5" -> [10.0, 13.5]; None for None. Raises ConfigError."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--diameters {text}: write millimetres with commas between, e.g. 10,13,17") from error


def deblur_overrides(psf: str, method: str, preset: str, *, header: Any, ledger: Ledger | None,
                     stated: Iterable[str] = ()) -> dict[str, Any]:
    """What `deblur --psf` amounts to: "blind", "library" (of `ledger`), or a file written by `calibrate --out`.

    Raises ConfigError where the method takes no PSF, or other options state one.
    """
    if psf == "blind":
        return {}
    if not takes_psf(method, preset):
        raise ConfigError(f"--psf {psf}: method {method}, preset {preset}, takes no PSF")
    if twice := sorted(PSF_SETTINGS & set(stated)):
        raise ConfigError(f"--psf {psf} and {', '.join(twice)} state the PSF twice")
    if psf != "library":
        return overrides_for(method, from_file(Path(psf)).overrides)
    key = scanner_key(header)
    found = combined(ledger.psfs(key.as_dict())) if ledger is not None and not key.missing else None
    if found is None:
        raise ConfigError(f"the library knows no PSF of {key}. Remedy: `dicomnode calibrate`, or --psf blind")
    return overrides_for(method, found.overrides)
