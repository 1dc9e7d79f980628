"""The PSF library: what is known of the blur of a scanner, reconstruction and radionuclide, and what a job makes of it.

    measured   by `dicomnode calibrate` on a phantom: wins, the newest one of several
    found      by the method itself on studies: a prior, once three studies agree on one

A study counts with what its own data said. Where it was deblurred with a prior, the prior is taken off again, or the
library would confirm itself: 1/s² = 1/s_found² − 1/s_prior², and the mean of ln FWHM likewise.

A route says how the library is used: `psf = "blind"` not at all; `"library"` what there is; `"measured"` only with a
phantom's. What is found becomes settings of the job, and with them part of the derived series' UIDs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset

from dicomnode.errors import ConfigError, NodeError
from dicomnode.ledger import Ledger
from sop.scanner import ScannerKey, scanner_key

if TYPE_CHECKING:
    from deconv.calibration import MeasuredPsf

__all__ = [
    "PSF_SETTINGS", "PsfMissing", "Resolution", "combined", "from_file", "keep_found", "keep_measured", "listing",
    "overrides_for", "resolve", "settled", "takes_psf", "to_json",
]

PSF_SETTINGS = frozenset({"psf", "psf_fwhm_mm", "psf_kernel", "psf_log_sd", "psf_skew", "psf_source"})
FAMILY = frozenset({("nbd", "best")})  # take a prior or a known PSF
GIVEN = frozenset({"tv", "richardson-lucy"})  # take a PSF as it is given
LEAST_STUDIES = 3
LEAST_LOG_SD = 0.04  # no scanner is known better: patients scatter and move
KNOWN_LOG_SD = 0.05  # a measurement less sure than this is a prior, not a known PSF
CLEAR_SKEW = 2.0  # standard errors
OWN_INFORMATION = 0.2  # of the precision that a study must bring itself to count
AXES = "dhw"


class PsfMissing(NodeError):
    """The route asks for a measured PSF and none matches."""


@dataclass(frozen=True)
class Resolution:
    """Settings that the library adds to a route's own, and a sentence that says why these."""

    overrides: Mapping[str, Any]
    why: str


def takes_psf(method: str, preset: str) -> bool:
    """Whether the library can change what this method does."""
    return (method, preset) in FAMILY or method in GIVEN


def combined(rows: Sequence[Mapping[str, Any]]) -> Resolution | None:
    """What the rows of one scanner key (`Ledger.psfs`, oldest first) amount to, as settings of NBD `best`.

    None where nothing was measured and fewer than three studies were found.
    """
    measured = [row for row in rows if row["kind"] == "measured"]
    if measured:
        return _from_measured(measured[-1])
    newest = {row["series_uid"]: row for row in rows if row["kind"] == "found"}  # one voice per PET series
    if len(newest) < LEAST_STUDIES:
        return None
    by_axis = list(zip(*([math.log(width) for width in row["fwhm_mm"]] for row in newest.values()), strict=True))
    middle = [statistics.median(values) for values in by_axis]
    spread = [1.4826 * statistics.median(abs(value - m) for value in values)
              for values, m in zip(by_axis, middle, strict=True)]
    source = f"library: {len(newest)} studies"
    return _resolution("prior", [math.exp(m) for m in middle], max(spread), [0.0] * 3, source)


def resolve(ledger: Ledger, header: Dataset, *, policy: str, method: str, preset: str,
            settings: Mapping[str, Any]) -> Resolution:
    """What the library adds to `settings` for a PET series with this header.

    A PSF that the route's own settings name is left as it is. Raises PsfMissing for policy "measured" without one.
    """
    if policy == "blind":
        return Resolution({}, "")
    if not takes_psf(method, preset):
        return _or_blind(policy, f"{method}, preset {preset}, takes none")
    if stated := sorted(PSF_SETTINGS & set(settings)):
        return Resolution({}, f"PSF: {', '.join(stated)} of the route")
    key = scanner_key(header)
    if key.missing:
        return _or_blind(policy, f"the header does not say {', '.join(key.missing)}")
    rows = ledger.psfs(key.as_dict())
    if policy == "measured" or method in GIVEN:
        rows = [row for row in rows if row["kind"] == "measured"]
    found = combined(rows)
    if found is None:
        return _or_blind(policy, f"{len(rows)} studies and no calibration of {key}")
    return Resolution(overrides_for(method, found.overrides), found.why)


def settled(ledger: Ledger, series_uid: str, *, policy: str, method: str, preset: str, settings: Mapping[str, Any],
            same: Callable[[Mapping[str, Any]], str]) -> Resolution | None:
    """What an earlier job on the very same input was given: the library may have grown, its UIDs are to stay.

    same   settings of a job -> the identity that it would have today (inputs, method, software version).
    None where there is no such job, a person cancelled it, or the route's policy rules its PSF out.
    """
    for job in reversed(ledger.jobs_of_series(series_uid)):
        given = {name: value for name, value in job["settings"].items() if name not in settings}
        if (job["method"], job["preset"]) != (method, preset) or job["state"] == "cancelled" or not set(
                given) <= PSF_SETTINGS or {**given, **settings} != job["settings"]:
            continue
        allowed = {"blind": not given, "measured": given.get("psf", "known") == "known" and bool(given)}
        if allowed.get(policy, True) and same(job["settings"]) == job["identity"]:
            return Resolution(given, f"PSF as in job {job['id']}" if given else "")
    return None


def overrides_for(method: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `method` takes of a PSF's: TV and Richardson-Lucy know no uncertainty and no source."""
    return {name: overrides[name] for name in ("psf_fwhm_mm", "psf_skew")} if method in GIVEN else dict(overrides)


def keep_measured(ledger: Ledger, key: ScannerKey, psf: MeasuredPsf, *, study_uid: str, series_uid: str,
                  software_version: str, now: float) -> None:
    """Enter a calibration. Raises ConfigError where the key lacks what a match needs."""
    if key.missing:
        raise ConfigError(f"the phantom's header does not say {', '.join(key.missing)}: its PSF would match no study, "
                          f"or the wrong ones. Remedy: say them, e.g. --key {key.missing[0]}=...")
    detail = {"residual": psf.residual, "spheres": [asdict(sphere) for sphere in psf.spheres],
              "spacing_mm": psf.spacing_mm, "unit": psf.unit, "notes": psf.notes}
    ledger.put_psf(now=now, scanner_key=key.as_dict(), kind="measured", source=series_uid, study_uid=study_uid,
                   series_uid=series_uid, job_id=None, fwhm_mm=psf.fwhm_mm, log_sd=psf.log_sd, skew=psf.skew,
                   skew_sd=psf.skew_sd, detail=detail, software_version=software_version)


def keep_found(ledger: Ledger, job: Mapping[str, Any], report: Mapping[str, Any], *, software_version: str,
               now: float) -> bool:
    """Enter what a job found of the PSF of its series; whether it found something of its own.

    Nothing is entered for other methods, a PSF that was known, a header that names no scanner, or a study whose own
    data said little beside the prior.
    """
    settings, key = report.get("settings", {}), ScannerKey(**report.get("scanner", {}))
    own = _own_evidence(report.get("metrics", {}), settings)
    if (job["method"], job["preset"]) not in FAMILY or settings.get("psf") == "known" or key.missing or own is None:
        return False
    metrics = report["metrics"]
    names = ("psf", "psf_fwhm_mm", "psf_log_sd", "psf_skew", "psf_source")
    ledger.put_psf(
        now=now, scanner_key=key.as_dict(), kind="found", source=report["derived_series_uid"],
        study_uid=job["study_uid"], series_uid=job["series_uid"], job_id=job["id"], fwhm_mm=own[0], log_sd=own[1],
        skew=[float(metrics.get(f"psf_skew_{axis}") or 0.0) for axis in AXES], skew_sd=[0.0] * 3,
        detail={"method": job["method"], "preset": job["preset"], "reported_fwhm_mm": _reported(metrics),
                "settings": {name: settings.get(name) for name in names}}, software_version=software_version)
    return True


def to_json(psf: MeasuredPsf, key: ScannerKey, series_uid: str, software_version: str) -> dict[str, Any]:
    """A calibration as a file that `deblur --psf` takes."""
    return {"scanner": key.as_dict(), "series_uid": series_uid, "software_version": software_version,
            **json.loads(json.dumps(asdict(psf))), "log_sd": list(psf.log_sd)}


def from_file(path: Path) -> Resolution:
    """The settings of a file written by `calibrate --out`. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        rows = {name: [float(item) for item in value[name]] for name in ("fwhm_mm", "log_sd", "skew", "skew_sd")}
        source = str(value["series_uid"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no PSF ({error}). Remedy: `dicomnode calibrate --out` writes one") from error
    if any(len(row) != 3 or not all(map(math.isfinite, row)) for row in rows.values()) or min(rows["fwhm_mm"]) <= 0:
        raise ConfigError(f"{path} holds no PSF: three positive widths are needed")
    return _from_measured({**rows, "source": source})


def listing(ledger: Ledger) -> list[dict[str, Any]]:
    """The library by scanner key: its entries, and what a study of that key would be given now."""
    rows = ledger.psfs()
    keys = {json.dumps(row["scanner_key"], sort_keys=True): row["scanner_key"] for row in rows}
    return [_listed(key, [row for row in rows if row["scanner_key"] == key]) for _, key in sorted(keys.items())]


# --- the arithmetic


def _listed(key: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    given = combined(rows)
    names = ("id", "kind", "fwhm_mm", "log_sd", "skew", "skew_sd", "study_uid", "series_uid", "source", "job_id",
             "software_version", "at")
    return {"scanner": dict(key), "name": str(ScannerKey(**key)),
            "entries": [{name: row[name] for name in names} for row in rows],
            "given": dict(given.overrides) if given else None,
            "why": given.why if given else f"{len(rows)} of {LEAST_STUDIES} studies"}


def _from_measured(row: Mapping[str, Any]) -> Resolution:
    log_sd = max(row["log_sd"])
    skew = [k if abs(k) > CLEAR_SKEW * sd else 0.0 for k, sd in zip(row["skew"], row["skew_sd"], strict=True)]
    kind = "known" if log_sd <= KNOWN_LOG_SD else "prior"
    return _resolution(kind, row["fwhm_mm"], log_sd, skew, f"calibration: series {row['source']}")


def _resolution(kind: str, fwhm_mm: Sequence[float], log_sd: float, skew: Sequence[float], source: str) -> Resolution:
    """Rounded, so that the settings can be read; a difference of 0.001 mm changes no image that matters."""
    widths = [round(float(width), 3) for width in fwhm_mm]
    overrides = {"psf": kind, "psf_fwhm_mm": widths, "psf_log_sd": round(max(float(log_sd), LEAST_LOG_SD), 3),
                 "psf_skew": [round(float(value), 3) for value in skew], "psf_source": source}
    return Resolution(overrides, f"PSF {kind}, {' x '.join(f'{width:.2f}' for width in widths)} mm, from {source}")


def _or_blind(policy: str, why: str) -> Resolution:
    if policy == "measured":
        raise PsfMissing(f"no measured PSF: {why}")
    return Resolution({}, f"no PSF of the library: {why}")


def _reported(metrics: Mapping[str, Any]) -> list[float] | None:
    """FWHM (d, h, w) of the kernel on the fine grid where the method names it, else of the kernel that it shows."""
    for prefix in ("psf_fwhm", "kernel_fwhm"):
        widths = [metrics.get(f"{prefix}_{axis}_mm") for axis in AXES]
        if all(isinstance(width, int | float) and width > 0 for width in widths):
            return [float(width) for width in widths if width is not None]
    return None


def _own_evidence(metrics: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    """FWHM and standard error of ln FWHM along each axis by the study's own data; None where they said too little."""
    widths = _reported(metrics)
    sds = [metrics.get(f"psf_log_sd_{axis}") for axis in AXES]
    if widths is None:
        return None
    prior, prior_sd = settings.get("psf_fwhm_mm"), settings.get("psf_log_sd")
    if settings.get("psf") != "prior":
        return widths, [float(sd) if isinstance(sd, int | float) else 0.0 for sd in sds]
    if prior is None or not prior_sd or not all(isinstance(sd, int | float) and sd > 0 for sd in sds):
        return None  # what the prior said cannot be told from what the study said
    own_widths, own_sds = [], []
    for width, sd, prior_width in zip(widths, sds, prior, strict=True):
        precision, added = 1.0 / float(sd or 0.0) ** 2, 1.0 / float(prior_sd) ** 2
        own = precision - added
        if own < OWN_INFORMATION * precision:
            return None
        own_widths.append(math.exp((precision * math.log(width) - added * math.log(prior_width)) / own))
        own_sds.append(own**-0.5)
    return own_widths, own_sds
