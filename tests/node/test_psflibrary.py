"""The PSF library: what is kept, what a job is given, and that one series' settings stay what they were."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deconv.calibration import MeasuredPsf
from dicomnode.calibrate import deblur_overrides
from dicomnode.errors import ConfigError, NotFound
from dicomnode.executor import Executor
from dicomnode.ledger import SCHEMA_VERSION, Ledger, NewJob
from dicomnode.psflibrary import PsfMissing, combined, from_file, keep_found, keep_measured, listing, resolve, to_json
from dicomnode.runner import ChildRunner
from sop.scanner import ScannerKey, scanner_key
from tests.factories import pet_series
from tests.node.line import PET_ROUTE, Line

KEY = scanner_key(pet_series()[0]).with_values({"reconstruction": "OSEM", "model": "TEST"})
TV_ROUTE = PET_ROUTE.replace('"nearest"', '"tv"')


def header() -> Any:
    """A PET header whose key is KEY."""
    one = pet_series()[0]
    one.ManufacturerModelName, one.ReconstructionMethod = "Test", "OSEM"
    return one


def series(**options: Any) -> list[Any]:
    """A PET series whose key is KEY."""
    found = pet_series(**options)
    for one in found:
        one.ManufacturerModelName, one.ReconstructionMethod = "Test", "OSEM"
    return found


def psf(width: float = 5.0, *, sd: float = 0.1, skew: float = 0.0) -> MeasuredPsf:
    return MeasuredPsf((width, width, width + 1), (sd, sd, sd), (skew, 0.0, 0.0), (0.05, 0.05, 0.05), 0.01, (),
                       (3.0, 4.0, 4.0), "Bq/ml")


def found(width: float, *, series_uid: str, settings: dict[str, Any] | None = None, log_sd: float = 0.05,
          preset: str = "best", scanner: ScannerKey = KEY) -> tuple[dict[str, Any], dict[str, Any]]:
    """A job and its report."""
    job = {"id": 1, "method": "nbd", "preset": preset, "study_uid": "1.2", "series_uid": series_uid}
    metrics = {f"psf_fwhm_{axis}_mm": width for axis in "dhw"} | {f"psf_log_sd_{axis}": log_sd for axis in "dhw"}
    return job, {"derived_series_uid": f"2.25.{series_uid}", "scanner": scanner.as_dict(), "metrics": metrics,
                 "settings": settings or {"psf": "blind"}}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        yield ledger


def keep(ledger: Ledger, width: float, *, now: float = 1.0, uid: str = "1.9", **options: Any) -> None:
    keep_measured(ledger, KEY, psf(width, **options), study_uid="1.8", series_uid=uid, software_version="0", now=now)


def given(ledger: Ledger, **options: Any) -> dict[str, Any]:
    asked = {"policy": "library", "method": "nbd", "preset": "best", "settings": {}, **options}
    return dict(resolve(ledger, header(), **asked).overrides)


# --- the ledger


def test_a_ledger_of_the_version_before_gets_the_table(tmp_path: Path) -> None:
    """Nothing else changes, and it is then of this version."""
    path = tmp_path / "ledger.sqlite3"
    db = sqlite3.connect(path)
    db.executescript(Path(__file__).with_name("ledger_v2.sql").read_text(encoding="utf-8"))
    db.execute("DROP TABLE psf")
    db.execute("INSERT INTO event (at, series_uid, kind) VALUES (1.0, '1.2.3', 'series')")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    with Ledger(path) as ledger:
        keep(ledger, 5.0)
        assert len(ledger.psfs()) == 1 and ledger.events()[0]["series_uid"] == "1.2.3"
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION


def test_every_entry_says_where_it_comes_from(ledger: Ledger) -> None:
    """Key, source series, software, time, spheres; and the history has a line."""
    keep(ledger, 5.0, now=7.0)
    (row,) = ledger.psfs(KEY.as_dict())
    assert row["scanner_key"] == KEY.as_dict() and row["kind"] == "measured" and row["at"] == 7.0
    assert row["series_uid"] == "1.9" and row["fwhm_mm"] == [5.0, 5.0, 6.0] and row["detail"]["residual"] == 0.01
    assert [event["kind"] for event in ledger.events()] == ["psf"]


def test_a_phantom_measured_again_replaces_its_entry(ledger: Ledger) -> None:
    """One series, one entry."""
    keep(ledger, 5.0)
    keep(ledger, 5.5, now=2.0)
    assert [row["fwhm_mm"][0] for row in ledger.psfs()] == [5.5]


def test_what_is_forgotten_is_kept_but_not_used(ledger: Ledger) -> None:
    """A person takes it out; the row stays; a number that is not there is refused."""
    keep(ledger, 5.0)
    ledger.forget_psf(ledger.psfs()[0]["id"], now=3.0, actor="operator")
    assert ledger.psfs() == [] and len(ledger.psfs(forgotten=True)) == 1 and given(ledger) == {}
    with pytest.raises(NotFound, match="PSF 1"):
        ledger.forget_psf(1, now=4.0)


# --- what a job is given


def test_a_sure_measurement_is_a_known_psf(ledger: Ledger) -> None:
    """2 % is known; a clear skew comes along, and one within its error is none."""
    keep(ledger, 5.0, skew=0.3)
    assert given(ledger) == {"psf": "known", "psf_fwhm_mm": [5.0, 5.0, 6.0], "psf_log_sd": 0.04,
                             "psf_skew": [0.3, 0.0, 0.0], "psf_source": "calibration: series 1.9"}
    keep(ledger, 5.0, skew=0.08)
    assert given(ledger)["psf_skew"] == [0.0, 0.0, 0.0]


def test_an_unsure_measurement_is_a_prior(ledger: Ledger) -> None:
    """10 % leaves room for what the study says."""
    keep(ledger, 5.0, sd=0.5)
    assert given(ledger)["psf"] == "prior" and given(ledger)["psf_log_sd"] == 0.1


def test_the_newest_measurement_wins_and_any_measurement_beats_studies(ledger: Ledger) -> None:
    """Phantom over patients, this year's over last year's."""
    for i, width in enumerate((7.0, 7.0, 7.0)):
        keep_found(ledger, *found(width, series_uid=f"1.{i}"), software_version="0", now=5.0)
    keep(ledger, 5.0, uid="1.8", now=1.0)
    keep(ledger, 5.5, uid="1.9", now=2.0)
    assert given(ledger)["psf_fwhm_mm"][0] == 5.5


def test_studies_give_a_prior_once_there_are_three(ledger: Ledger) -> None:
    """The median of ln FWHM, the robust scatter, never below 4 %; an outlier moves neither."""
    for i, width in enumerate((5.0, 5.5)):
        keep_found(ledger, *found(width, series_uid=f"1.{i}"), software_version="0", now=float(i))
    assert given(ledger) == {}
    for i, width in enumerate((6.0, 5.6, 12.0)):
        keep_found(ledger, *found(width, series_uid=f"1.1{i}"), software_version="0", now=float(i))
    overrides = given(ledger)
    assert overrides["psf"] == "prior" and overrides["psf_source"] == "library: 5 studies"
    assert overrides["psf_fwhm_mm"] == [5.6, 5.6, 5.6]
    expected = 1.4826 * sorted(abs(math.log(w / 5.6)) for w in (5.0, 5.5, 5.6, 6.0, 12.0))[2]
    assert overrides["psf_log_sd"] == pytest.approx(expected, abs=1e-3)


def test_studies_that_agree_are_not_believed_beyond_four_percent(ledger: Ledger) -> None:
    """Patients move and scatter."""
    for i in range(4):
        keep_found(ledger, *found(6.0, series_uid=f"1.{i}"), software_version="0", now=float(i))
    assert given(ledger)["psf_log_sd"] == 0.04


def test_one_series_has_one_voice(ledger: Ledger) -> None:
    """Processed three times with other settings, it is still one study."""
    for i in range(3):
        job, report = found(6.0, series_uid="1.1")
        keep_found(ledger, job, {**report, "derived_series_uid": f"2.25.{i}"}, software_version="0", now=float(i))
    assert len(ledger.psfs()) == 3 and given(ledger) == {}


def test_the_library_does_not_confirm_itself(ledger: Ledger) -> None:
    """What a prior said is taken off; a study that said nothing itself is not entered."""
    prior = {"psf": "prior", "psf_fwhm_mm": [6.0, 6.0, 6.0], "psf_log_sd": 0.10}
    # The data alone said 5 mm ± 10 %: with the prior, the mean of both logarithms and a sd smaller by sqrt 2.
    both = math.sqrt(5.0 * 6.0)
    kept = keep_found(ledger, *found(both, series_uid="1.1", settings=prior, log_sd=0.1 / math.sqrt(2)),
                      software_version="0", now=1.0)
    (row,) = ledger.psfs()
    assert kept and row["fwhm_mm"] == pytest.approx([5.0] * 3) and row["log_sd"] == pytest.approx([0.1] * 3)
    assert row["detail"]["reported_fwhm_mm"] == pytest.approx([both] * 3)
    assert not keep_found(ledger, *found(6.0, series_uid="1.2", settings=prior, log_sd=0.098), software_version="0",
                          now=2.0)


@pytest.mark.parametrize("change", [
    {"settings": {"psf": "known", "psf_fwhm_mm": [5, 5, 5]}}, {"preset": "preview"}, {"scanner": ScannerKey()},
])
def test_what_says_nothing_of_the_scanner_is_not_kept(ledger: Ledger, change: dict[str, Any]) -> None:
    """A PSF that was told, a preset whose width leans on its own prior, a scanner without name."""
    assert not keep_found(ledger, *found(6.0, series_uid="1.1", **change), software_version="0", now=1.0)
    assert ledger.psfs() == []


def test_another_scanner_reconstruction_or_nuclide_does_not_match(ledger: Ledger) -> None:
    """Each part of the key parts."""
    for part, value in (("model", "OTHER"), ("reconstruction", "FBP"), ("radionuclide", "Ga-68"),
                        ("spacing", "1.00 x 1.00 x 1.00"), ("kernel", "XYZ GAUSS5.00")):
        other = KEY.with_values({part: value})
        keep_measured(ledger, other, psf(), study_uid="1", series_uid=f"1.{part}", software_version="0", now=1.0)
    assert given(ledger) == {} and len(listing(ledger)) == 5


def test_a_policy_decides(ledger: Ledger) -> None:
    """blind: nothing; measured: only a phantom's, else a refusal that says what is missing."""
    for i in range(3):
        keep_found(ledger, *found(6.0, series_uid=f"1.{i}"), software_version="0", now=1.0)
    assert given(ledger, policy="blind") == {}
    with pytest.raises(PsfMissing, match=r"no measured PSF: .*TEST, .*OSEM"):
        given(ledger, policy="measured")
    with pytest.raises(PsfMissing, match="takes none"):
        given(ledger, policy="measured", method="cubic", preset="default")
    keep(ledger, 5.0)
    assert given(ledger, policy="measured")["psf"] == "known"


def test_methods_that_need_a_width_take_a_measured_one_only(ledger: Ledger) -> None:
    """TV gets the calibration's width and skew, never a prior of studies; what the route states stays."""
    for i in range(3):
        keep_found(ledger, *found(6.0, series_uid=f"1.{i}"), software_version="0", now=1.0)
    assert given(ledger, method="tv", preset="default") == {}
    keep(ledger, 5.0, skew=0.3)
    assert given(ledger, method="tv", preset="default") == {"psf_fwhm_mm": [5.0, 5.0, 6.0], "psf_skew": [0.3, 0.0, 0.0]}
    assert given(ledger, method="tv", preset="default", settings={"psf_fwhm_mm": 7.0}) == {}


def test_a_header_without_a_scanner_finds_nothing(ledger: Ledger) -> None:
    """And says what it lacks where a measured PSF is asked for."""
    bare = header()
    del bare.ReconstructionMethod
    keep(ledger, 5.0)
    assert resolve(ledger, bare, policy="library", method="nbd", preset="best", settings={}).overrides == {}
    with pytest.raises(PsfMissing, match="does not say reconstruction"):
        resolve(ledger, bare, policy="measured", method="nbd", preset="best", settings={})


def test_a_phantom_without_a_scanner_is_not_entered(ledger: Ledger) -> None:
    """It would match every other series without one."""
    with pytest.raises(ConfigError, match=r"does not say model.*--key model="):
        keep_measured(ledger, ScannerKey(), psf(), study_uid="1", series_uid="1.1", software_version="0", now=1.0)


def test_a_file_gives_what_the_ledger_gives(ledger: Ledger, tmp_path: Path) -> None:
    """`calibrate --out`, then `deblur --psf`."""
    keep(ledger, 5.0, skew=0.3)
    path = tmp_path / "psf.json"
    path.write_text(json.dumps(to_json(psf(5.0, skew=0.3), KEY, "1.9", "0")))
    kept = combined(ledger.psfs())
    assert kept is not None and from_file(path).overrides == kept.overrides


def test_deblur_without_the_node_may_look_into_its_library(ledger: Ledger) -> None:
    """The same settings as a route's; a scanner that nobody calibrated is refused with the remedy."""
    keep(ledger, 5.0)
    assert deblur_overrides("library", "tv", "default", header=header(), ledger=ledger) == {
        "psf_fwhm_mm": [5.0, 5.0, 6.0], "psf_skew": [0.0, 0.0, 0.0]}
    other = header()
    other.ReconstructionMethod = "FBP"
    with pytest.raises(ConfigError, match=r"no PSF of .*FBP.*calibrate"):
        deblur_overrides("library", "tv", "default", header=other, ledger=ledger)


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", '{"fwhm_mm": [1, 2], "log_sd": [0, 0, 0], "skew": [0, 0, 0], '
                                  '"skew_sd": [0, 0, 0], "series_uid": "1"}'])
def test_a_file_that_holds_no_psf_is_refused(tmp_path: Path, text: str) -> None:
    """With the remedy or the reason, never a traceback."""
    path = tmp_path / "psf.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="holds no PSF"):
        from_file(path)


# --- jobs


def test_a_job_is_made_with_the_calibrated_psf_and_keeps_it(tmp_path: Path) -> None:
    """A later calibration changes later series, not the one that has its job: one UID never means two images."""
    with Line(tmp_path, route=TV_ROUTE) as line:
        keep(line.ledger, 5.0)
        first = line.receive(series(seed=1))
        line.now += 31
        line.matcher().tick()
        keep(line.ledger, 6.0, uid="1.99", now=2.0)
        second = line.receive(series(seed=2))
        line.ledger.set_series(first, "receiving", now=line.now)  # looked at again, as after a repeat or a retry
        line.now += 31
        line.matcher().tick()
        (job,), (later,) = (line.ledger.jobs_of_series(uid) for uid in (first, second))
        assert job["settings"]["psf_fwhm_mm"] == [5.0, 5.0, 6.0]
        assert later["settings"]["psf_fwhm_mm"] == [6.0, 6.0, 7.0]


def test_what_a_finished_job_found_is_entered_with_its_series(tmp_path: Path) -> None:
    """In the same transaction as the derived series; what a second job finds is a second row."""
    program = (
        "import json, pathlib, sys\n"
        "order = pathlib.Path(sys.argv[1]); folder = order.parent / 'derived.tmp'; folder.mkdir()\n"
        "(folder / '0.dcm').write_bytes(b'derived')\n"
        f"report = {found(6.0, series_uid='1.1')[1]!r} | {{'derived_instances': 1}}\n"
        "print(json.dumps({'kind': 'built', 'report': report}), flush=True)\n")
    with Line(tmp_path, route=TV_ROUTE) as line:
        uid = line.receive(series())
        line.ledger.set_series(uid, "complete", now=line.now)
        inputs = tuple(row["sop_instance_uid"] for row in line.ledger.instances(uid))
        line.ledger.add_job(NewJob("id", uid, "1.2", None, "all-pet", "nbd", "best", {}, ("PACS",), inputs),
                            now=line.now)
        executor = Executor(line.config, line.ledger, line.spool, clock=line.clock,
                            runner=ChildRunner(command=(sys.executable, "-I", "-c", program)))
        job = line.ledger.claim(executor.name, now=line.now, lease_s=60)
        assert job is not None
        executor.run_job(job, threading.Event())
        (row,) = line.ledger.psfs(KEY.as_dict())
        assert line.ledger.job(job["id"])["state"] == "built"
        assert (row["kind"], row["source"], row["job_id"], row["series_uid"]) == ("found", "2.25.1.1", job["id"], uid)
        assert row["fwhm_mm"] == [6.0, 6.0, 6.0]


def test_without_the_measurement_that_a_route_asks_for_the_series_is_held(tmp_path: Path) -> None:
    """With the reason and the remedy; after a calibration a second look makes the job."""
    with Line(tmp_path, route=TV_ROUTE + 'psf = "measured"\n') as line:
        uid = line.receive(series())
        line.now += 31
        line.matcher().tick()
        assert line.state(uid) == ("held", "psf")
        reason = line.ledger.series(uid)["reason"]
        assert "no measured PSF" in reason and "dicomnode calibrate" in reason
        keep(line.ledger, 5.0)
        line.ledger.set_series(uid, "receiving", now=line.now)
        line.now += 31
        line.matcher().tick()
        assert [job["settings"]["psf_fwhm_mm"] for job in line.ledger.jobs_of_series(uid)] == [[5.0, 5.0, 6.0]]


def test_a_series_blind_before_the_calibration_stays_as_it_was(tmp_path: Path) -> None:
    """Its job had no PSF of the library, and a second look gives it none."""
    with Line(tmp_path, route=TV_ROUTE) as line:
        uid = line.receive(series())
        line.now += 31
        line.matcher().tick()
        keep(line.ledger, 5.0)
        line.ledger.set_series(uid, "receiving", now=line.now)
        line.now += 31
        line.matcher().tick()
        assert [job["settings"] for job in line.ledger.jobs_of_series(uid)] == [{}]
