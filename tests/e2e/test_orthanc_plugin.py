"""A real Orthanc with the script of conf/orthanc: a PET study uploaded to it is deblurred without anybody's doing."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dicomnode import acceptance, phantomstudy
from dicomnode.acceptance import phantom
from dicomnode.config import parse
from tests.e2e.harness import RunningNode
from tests.peers import REPOSITORY, Orthanc, wait_until

FOLDER = REPOSITORY / "conf" / "orthanc"
ROUTE = """
[[route]]
name = "all PET"
when = { Modality = "PT" }
method = "cubic"
preset = "default"
send_to = ["PACS"]
"""

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin") is None,
                       reason="Orthanc is not installed"),
]


def example() -> dict[str, Any]:
    """conf/orthanc/orthanc.json, whose comments JSON does not know."""
    text = (FOLDER / "orthanc.json").read_text(encoding="utf-8")
    return dict(json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE)))


def settings(node_port: int) -> dict[str, Any]:
    """The example as it is, but for what a test must have otherwise: ports, patience, where the script lies."""
    keys = example()
    keys["DicomModalities"]["NBDNODE"]["Port"] = node_port
    del keys["DicomAet"], keys["DicomPort"]
    return {**keys, "StableAge": 1, "LuaScripts": [str(FOLDER / "dicomnode.lua")], "DicomAlwaysAllowStore": False,
            "ConcurrentJobs": 2}


def upload(orthanc: Orthanc, files: list[Path]) -> None:
    for path in files:
        request = urllib.request.Request(f"http://127.0.0.1:{orthanc.http_port}/instances", data=path.read_bytes())
        with urllib.request.urlopen(request, timeout=30) as response:
            assert response.status == 200


def log(orthanc: Orthanc) -> str:
    return (orthanc.folder / "orthanc.log").read_text(errors="replace")


def series_of(orthanc: Orthanc) -> dict[str, dict[str, Any]]:
    return {series["MainDicomTags"]["SeriesInstanceUID"]: series for series in orthanc.get("/series?expand")}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A PET is uploaded while the node is down. The node starts; a PET with its CT follows; both come back deblurred.

    Afterwards Orthanc is left alone until it has looked at both studies with their results once more.
    """
    folder = tmp_path_factory.mktemp("orthanc-script")
    alone, whole = (phantomstudy.write(phantomstudy.make("spheres", size=(16, 28, 28), seed=seed),
                                       folder / f"phantom{seed}", seed=seed) for seed in (0, 1))
    orthanc = Orthanc(folder / "orthanc")
    node = RunningNode(folder / "node", peers={"PACS": ("ORTHANC", orthanc.port)}, route=ROUTE, quiet_s=1, ct_wait_s=1)
    orthanc.settings = settings(node.port)
    proven = f'port = {orthanc.port}\nconfirm = "commitment"\nquery = true\n'
    node.config_path.write_text(node.config_path.read_text().replace(f"port = {orthanc.port}\n", proven))
    made = phantom.write(folder, parse(node.config_path.read_text()))
    with orthanc:
        upload(orthanc, list(alone.pet))
        wait_until("the failure", lambda: "could not be forwarded" in log(orthanc), timeout_s=60)
        findings = {finding.what: finding for finding in acceptance.check(
            node.config_path, now=time.time(), with_peers=True)}
        with node:
            upload(orthanc, [*whole.pet, *whole.ct])
            sources = {alone.pet_series_uid, whole.pet_series_uid, whole.ct_series_uid}
            sources |= {series for series, found in series_of(orthanc).items() if len(found["Instances"]) == 1}
            wait_until("both derived series, all instances", lambda: sorted(
                len(series["Instances"]) for uid, series in series_of(orthanc).items() if uid not in sources) == [
                    32, 32], timeout_s=90)
            wait_until("every study to be stable again", lambda: all(
                f"nothing to forward of study {study}" in log(orthanc) for study in orthanc.get("/studies")),
                timeout_s=90)
            jobs = [job for job in orthanc.get("/jobs?expand") if job["Type"] == "DicomModalityStore"]
            with node.ledger() as ledger:
                wait_until("the commitment of both", lambda: [
                    row["job_state"] for row in ledger.overview() if row["job_id"]] == ["committed"] * 2,
                    timeout_s=90)
                rows = ledger.overview()
        return {"alone": alone, "whole": whole, "series": series_of(orthanc), "rows": rows, "log": log(orthanc),
                "findings": findings, "phantom": made.study_uid,
                "jobs": [job["State"] for job in jobs],
                "studies": {study["MainDicomTags"]["StudyInstanceUID"]: len(study["Series"])
                            for study in orthanc.get("/studies?expand")}}


def test_a_stable_pet_study_comes_back_deblurred_into_the_same_study(story):
    """Two studies went out, two are there, each with one series more."""
    assert story["studies"].pop(story["phantom"]) == 1
    assert story["studies"] == {story["alone"].study_uid: 2, story["whole"].study_uid: 3}
    assert {row["derived_series_uid"] for row in story["rows"] if row["job_id"]} < set(story["series"])


def test_the_ct_goes_with_its_pet(story):
    """The node has received every instance of both series, once."""
    whole = story["whole"]
    assert {row["series_uid"]: row["instances"] for row in story["rows"]} == {
        story["alone"].pet_series_uid: len(story["alone"].pet),
        whole.pet_series_uid: len(whole.pet), whole.ct_series_uid: len(whole.ct)}


def test_the_result_is_not_forwarded_in_a_loop(story):
    """One job that succeeded for each study, and none after the results came."""
    assert story["jobs"].count("Success") == 2
    assert len(re.findall("series of study .* go to NBDNODE", story["log"])) == len(story["jobs"])


def test_a_study_that_could_not_be_forwarded_goes_with_the_next_one(story):
    """Orthanc said so, kept it in mind, and sent it when the node was there."""
    said = re.findall(r"dicomnode: study \S+ (could not be forwarded|has been forwarded)", story["log"])
    assert said[0] == "could not be forwarded" and said.count("has been forwarded") == 2


def test_the_acceptance_test_passes_with_a_real_pacs(story):
    """The phantom is stored, Orthanc commits to it on an association of its own, and answers C-FIND."""
    findings = story["findings"]
    for what in ("peer PACS", "store at PACS", "confirmation of PACS", "query of PACS"):
        assert findings[what].verdict == "ok", findings[what]
    assert "an association of its own" in findings["confirmation of PACS"].text


def test_the_phantom_of_the_acceptance_test_goes_nowhere(story):
    """It came from the node: the script does not forward it."""
    assert len(story["rows"]) == 3 and story["phantom"] not in {row["study_uid"] for row in story["rows"]}
