"""The command line: what it prints, with which exit code, and that stdout is pure JSON where JSON is asked for."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dicomnode import acceptance
from dicomnode.cli import app
from dicomnode.ledger import InstanceRow, Ledger
from tests.factories import ct_series, pet_series
from tests.node.test_states import instance
from tests.peers import free_port

STUDY, PET = "1.2.3", "1.2.3.1"
TV = ("--method", "tv", "--preset", "quick", "--psf-fwhm-mm", "6", "--threads", "1")


def dicomnode(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    """What a command prints with --json, exit code 0 required."""
    result = dicomnode(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A node that has received one series, held by the matcher."""
    path = tmp_path / "node.toml"
    path.write_text(f'[node]\nport = {free_port()}\ndata_dir = "{tmp_path / "data"}"\n[reception]\nlow_disk_mb = 1\n')
    (tmp_path / "data").mkdir(mode=0o700)
    with Ledger(tmp_path / "data" / "ledger.sqlite3") as ledger:
        ledger.add_instances([InstanceRow(
            sop_instance_uid="1.2.3.9", sop_class_uid="1.2", study_uid=STUDY, series_uid=PET,
            transfer_syntax_uid="1.2.840.10008.1.2.1", path="x", bytes=1, sha256="0", calling_ae="SCANNER",
            address="127.0.0.1", received_at=10.0, modality="PT", accession_number="A7", series_description="[bold]x")])
        ledger.set_series(PET, "held", now=20, code="gap", reason="a slice is missing")
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it comes from a CD: PET, CT, a text file, everything mixed."""
    folder = tmp_path_factory.mktemp("study") / "CD"
    result = dicomnode("phantom", folder, "--size", 16, 28, 28)
    assert result.exit_code == 0, result.stderr
    (folder / "README.TXT").write_text("Thank you for your referral.")
    return folder


def save(datasets: list[Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, ds in enumerate(datasets):
        ds.save_as(folder / f"{ds.Modality}{i:03}.dcm", enforce_file_format=True)
    return folder


# --- looking


def test_jobs_as_json_has_what_programs_rely_on(config):
    """One element per series, with at least these keys; stdout holds nothing else."""
    rows = answer("jobs", "--config", config)
    keys = {"study", "series", "state", "reason", "code", "modality", "derived_series", "job", "route", "method",
            "preset", "attempts", "progress", "guide_series", "accession_number", "received_at"}
    assert len(rows) == 1 and keys <= set(rows[0])
    assert (rows[0]["state"], rows[0]["code"], rows[0]["received_at"]) == ("held", "gap", "1970-01-01T00:00:10Z")


def test_jobs_lists_the_newest_and_says_that_there_are_more(config):
    """A person gets a page; a program gets all, unless it asks for fewer."""
    with Ledger(config.parent / "data" / "ledger.sqlite3") as ledger:
        ledger.add_instances([instance("1.2.9", "1.2.9.1", "b", now=20)])
    assert [row["series"] for row in answer("jobs", "--config", config)] == ["1.2.9", PET]
    assert [row["series"] for row in answer("jobs", "--limit", "1", "--config", config)] == ["1.2.9"]
    assert "--limit 0 lists all" in dicomnode("jobs", "--limit", "1", "--config", config).stdout
    assert "--limit" not in dicomnode("jobs", "--config", config).stdout


def test_status_counts_and_lists_what_waits_for_a_person(config):
    """The node at a glance."""
    value = answer("status", "--config", config)
    assert value["counts"]["series"] == {"held": 1} and value["free_bytes"] > 0
    assert [row["series"] for row in value["held"]] == [PET]


@pytest.mark.parametrize("command", [("jobs",), ("status",), ("show", "A7")])
def test_reports_for_people_name_reason_and_state(config, command):
    """What came from outside is printed as it is, brackets included."""
    result = dicomnode(*command, "--config", config)
    assert result.exit_code == 0, result.stderr
    for word in ("held", "slice", "missing"):
        assert word in result.stdout
    assert "[bold]x" in result.stdout or command == ("status",)


def test_a_person_decides_and_the_history_says_so(config):
    """release, then cancel: each prints what it did; show tells who and when."""
    assert "processed as it is" in dicomnode("release", PET, "--config", config).stdout
    assert answer("cancel", "A7", "--config", config)["state"] == "ignored"
    events = answer("show", STUDY, "--config", config)["events"]
    assert [event["to_state"] for event in events] == ["receiving", "held", "receiving", "ignored"]


# --- errors


@pytest.mark.parametrize(("arguments", "code"), [
    (("jobs", "--config", "nowhere.toml"), 2),
    (("jobs", "--no-such-option"), 2),
    (("no-such-command",), 2),
    (("show", "nothing", "--config", "NODE"), 2),
    (("retry", "A7", "--config", "NODE"), 0),
    (("hold", "A7", "--config", "NODE"), 3),
    (("verify", "nowhere", "nowhere"), 2),
])
def test_exit_codes(config, arguments, code):
    """2 for usage and what is not there, 3 for what is refused; errors go to stderr, one sentence, no traceback."""
    result = dicomnode(*(config if argument == "NODE" else argument for argument in arguments))
    assert result.exit_code == code, result.stderr
    if code:
        assert result.stdout == "" and result.stderr and "Traceback" not in result.stderr


def test_debug_shows_the_traceback():
    """For whoever has to find out."""
    done = subprocess.run([sys.executable, "-m", "dicomnode", "--debug", "jobs", "--config", "nowhere.toml"],
                          capture_output=True, text=True, timeout=60)
    assert "Traceback" in done.stderr and "nowhere.toml" in done.stderr


def test_the_unexpected_is_a_sentence_too(config, monkeypatch):
    """A bug shows no traceback to an operator; --debug lets it through."""
    def broken(*_arguments: object, **_options: object) -> None:
        raise KeyError("deep inside")

    monkeypatch.setattr("dicomnode.views.jobs", broken)
    result = dicomnode("jobs", "--config", config)
    assert result.exit_code == 1 and "deep inside" in result.stderr and "--debug" in result.stderr
    with pytest.raises(KeyError):
        CliRunner().invoke(app, ["--debug", "jobs", "--config", str(config)], catch_exceptions=False)


def test_a_node_that_never_ran_says_so(tmp_path):
    """No empty ledger is made by looking."""
    path = tmp_path / "node.toml"
    path.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')
    result = dicomnode("jobs", "--config", path)
    assert result.exit_code == 2 and "never ran" in result.stderr
    assert not (tmp_path / "data").exists()


def test_another_user_who_may_not_look_is_told_whom_to_be(tmp_path, monkeypatch):
    """The data directory has mode 0700: a sentence with the remedy."""
    path = tmp_path / "node.toml"
    path.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n')
    real = Path.is_file

    def is_file(self):
        if self.name == "ledger.sqlite3":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "is_file", is_file)
    result = dicomnode("jobs", "--config", path)
    assert result.exit_code == 1 and "Remedy" in result.stderr and "sudo -u dicomnode" in result.stderr


def test_a_configuration_that_is_not_there_is_told_with_the_remedy(tmp_path):
    """No errno, no traceback."""
    result = dicomnode("jobs", "--config", tmp_path / "nix.toml")
    assert result.exit_code == 2 and "there is no configuration file" in result.stderr and "Remedy" in result.stderr


# --- check


def verdicts(result: Result) -> dict[str, str]:
    return {finding["what"]: finding["verdict"] for finding in json.loads(result.stdout)}


def test_check_finds_a_node_that_is_ready(config):
    """Nothing but the missing route is remarked; the exit code is 0."""
    result = dicomnode("check", "--config", config, "--json")
    assert result.exit_code == 0
    assert {what: verdict for what, verdict in verdicts(result).items() if verdict != "ok"} == {"routes": "warning"}


def test_check_names_a_dead_peer_and_answers_4(config):
    """A peer that does not answer C-ECHO is a problem of its own kind."""
    config.write_text(config.read_text() + '[[peer]]\nname = "PACS"\nae_title = "PACS"\nhost = "127.0.0.1"\n'
                      f'port = {free_port()}\n')
    result = dicomnode("check", "--config", config, "--json")
    assert (result.exit_code, verdicts(result)["peer PACS"]) == (4, "problem")


def test_check_refuses_a_configuration_with_an_unknown_key(config):
    """The key is named; the exit code is 2."""
    config.write_text(config.read_text().replace("port =", "prot ="))
    result = dicomnode("check", "--config", config)
    assert result.exit_code == 2 and "prot" in result.stdout


def test_check_finds_a_full_disk_a_wrong_setting_and_a_clock_that_was_never_set(config):
    """Each with its remedy."""
    config.write_text(config.read_text().replace("low_disk_mb = 1", "low_disk_mb = 1000000000") + (
        '[[peer]]\nname = "P"\nae_title = "P"\nhost = "127.0.0.1"\nport = 9\n'
        '[[route]]\nname = "r"\nwhen = { Modality = "PT" }\nmethod = "tv"\npreset = "default"\n'
        'settings = { nosuch = 1 }\nsend_to = ["P"]\n'))
    found = {item.what: item for item in acceptance.check(config, now=86400.0)}
    for what in ("disk", "route r", "clock"):
        assert found[what].verdict == "problem" and found[what].remedy, what


def test_check_tells_a_foreign_program_on_the_port(config, tmp_path):
    """A port that is taken by something that is no DICOM node."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        text = config.read_text() + "[delivery]\nconnect_timeout_s = 1\ndimse_timeout_s = 1\n"
        config.write_text(re.sub(r"port = \d+", f"port = {server.getsockname()[1]}", text))
        found = {item.what: item for item in acceptance.check(config, now=2e9)}
    assert found["port"].verdict == "problem" and "stop the program" in found["port"].remedy


# --- on files


def test_deblur_takes_a_folder_as_it_comes_and_verify_agrees(study, tmp_path):
    """The PET is found among everything, the CT goes with it, the derived series verifies from the files alone."""
    report = answer("deblur", study, tmp_path / "out", *TV)
    assert report["derived_instances"] == 32 and report["guide"]["series_uid"]
    assert len(list((tmp_path / "out").glob("*.dcm"))) == 32
    verified = answer("verify", study, tmp_path / "out")
    assert verified["ok"] and len(verified["items"]) >= 15


def test_deblur_of_a_region_within_a_memory(study, tmp_path):
    """Both reach the method and are recorded; a box that leaves the volume is refused."""
    report = answer("deblur", study, tmp_path / "out", *TV, "--region", "body", "--memory", "512MB")
    assert report["settings"]["region"] == "body" and report["settings"]["memory_gb"] == 0.512
    assert report["settings"]["region_box"].startswith("box:0-")
    outside = dicomnode("deblur", study, tmp_path / "none", *TV, "--region", "box:0-99,0-4,0-4")
    assert outside.exit_code == 3 and "leaves the volume" in outside.stderr


def test_verify_notices_a_missing_slice(study, tmp_path):
    """Exit code 1, and the finding is named."""
    answer("deblur", study, tmp_path / "out", *TV)
    sorted((tmp_path / "out").glob("*.dcm"))[3].unlink()
    result = dicomnode("verify", study, tmp_path / "out")
    assert result.exit_code == 1 and "slice-count" in result.stdout


def test_deblur_refuses_a_gap_and_leaves_nothing(tmp_path):
    """A missing slice: exit code 3, no output folder, nothing beside it."""
    folder = save(pet_series(), tmp_path / "in")
    sorted(folder.iterdir())[3].unlink()
    result = dicomnode("deblur", folder, tmp_path / "out", *TV)
    assert result.exit_code == 3 and "Remedy" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_deblur_asks_which_of_two_pets(tmp_path):
    """Both are listed; --series decides; a CT cannot be chosen."""
    first, second = pet_series(series=1), pet_series(series=2)
    folder = save([*first, *second, *ct_series()], tmp_path / "in")
    for i, ds in enumerate([*first, *second]):
        ds.save_as(folder / f"P{i:03}.dcm", enforce_file_format=True)
    result = dicomnode("deblur", folder, tmp_path / "out", *TV)
    uids = [str(first[0].SeriesInstanceUID), str(second[0].SeriesInstanceUID)]
    assert result.exit_code == 3 and all(uid in result.stderr for uid in uids) and "--series" in result.stderr
    nearest = ("--method", "nearest", "--preset", "default")
    report = answer("deblur", folder, tmp_path / "out", "--series", uids[1], *nearest)
    assert report["source"]["series_uid"] == uids[1]


def test_deblur_says_why_nothing_qualifies(tmp_path):
    """Every series with its reason."""
    folder = save(ct_series(), tmp_path / "in")
    result = dicomnode("deblur", folder, tmp_path / "out", *TV)
    assert result.exit_code == 3 and "CT series" in result.stderr


@pytest.mark.parametrize("options", [("--preset", "no such"), ("--method", "no such"), ("--method", "cubic", "--preset",
                                     "default", "--psf-fwhm-mm", "6"),
                                     ("--method", "cubic", "--preset", "default", "--region", "body"),
                                     ("--method", "cubic", "--preset", "default", "--memory", "1GB"),
                                     (*TV, "--region", "leg"), (*TV, "--memory", "much"), (*TV, "--memory", "0")])
def test_deblur_knows_usage_from_refusal(study, tmp_path, options):
    """An unknown preset, method or setting is a usage error, and what exists is listed."""
    result = dicomnode("deblur", study, tmp_path / "out", *options)
    assert result.exit_code == 2, result.stderr


def test_nothing_of_anybody_is_overwritten(study, tmp_path):
    """A folder that holds something is neither filled nor emptied."""
    (tmp_path / "mine.txt").write_text("mine")
    for command in (("deblur", study, tmp_path, *TV), ("phantom", tmp_path), ("demo", tmp_path)):
        assert dicomnode(*command).exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_units_are_assumed_only_when_asked(tmp_path):
    """A PET without Units (nor weight, so no SUV) is refused; --assume-units lets a person vouch for it."""
    series = pet_series(PatientWeight="")
    for ds in series:
        del ds.Units
    folder = save(series, tmp_path / "in")
    nearest = ("--method", "nearest", "--preset", "default")
    refused = dicomnode("deblur", folder, tmp_path / "out", *nearest)
    assert refused.exit_code == 3 and "Units" in refused.stderr
    report = answer("deblur", folder, tmp_path / "out", *nearest, "--assume-units", "BQML")
    assert any("assumed" in note for note in report["source"]["notes"])
