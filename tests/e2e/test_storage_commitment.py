"""A real Orthanc asked to commit: it answers on an association of its own, to the receiving process."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.harness import RunningNode
from tests.factories import pet_series
from tests.node.line import Line
from tests.node.test_commitment import prove
from tests.node.test_delivery import built, deliver, states
from tests.peers import Orthanc, storescu

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin") is None,
                       reason="Orthanc is not installed"),
]

ROUTE = """
[[route]]
name = "all PET"
when = { Modality = "PT" }
method = "nearest"
preset = "default"
send_to = ["PACS"]
[delivery]
retry_s = 2
"""


def write(folder: Path, *, seed: int) -> tuple[str, list[Path]]:
    """(series UID, files) of a small PET series."""
    folder.mkdir(parents=True)
    datasets = pet_series(slices=8, rows=20, columns=18, seed=seed)
    for number, dataset in enumerate(datasets):
        dataset.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return str(datasets[0].SeriesInstanceUID), sorted(folder.glob("*.dcm"))


def events(node: RunningNode, study: str) -> list[str]:
    """The reasons in the history of a study."""
    shown = json.loads(node.cli("show", study, "--json").stdout)
    return [event["reason"] for event in shown["events"]]


def test_orthanc_commits_and_what_it_has_lost_is_sent_again(tmp_path: Path):
    """A study is committed by Orthanc's report. Of another, Orthanc loses an instance before it is asked: it says so,
    gets that one again, and then commits."""
    orthanc = Orthanc(tmp_path / "orthanc")
    node = RunningNode(tmp_path / "node", peers={"PACS": ("ORTHANC", orthanc.port), "SCANNER": ("SCANNER", None)},
                       route=ROUTE, quiet_s=1)
    text = node.config_path.read_text()
    node.config_path.write_text(text.replace(f"port = {orthanc.port}\n",
                                             f'port = {orthanc.port}\nconfirm = "commitment"\nmay_send = false\n'))
    # Orthanc opens the association for its report as ORTHANC; the node lets it in although it may not send.
    orthanc.settings = {"DicomModalities": {"NBDNODE": ["NBDNODE", "127.0.0.1", node.port]},
                        "StorageCommitmentReportsHistorySize": 100,
                        "ExecuteLuaEnabled": True}
    with orthanc, node:
        series, files = write(tmp_path / "one", seed=1)
        assert storescu(node.port, files).returncode == 0
        job = node.wait_for(series, "committed", "held", timeout_s=90)
        assert job["state"] == "committed", (job, node.log()[-3000:])
        assert "storage commitment of 16 instances" in job["reason"]
        assert orthanc.count_instances(job["derived_series"]) == 16

        lose_the_first(orthanc)
        other, files = write(tmp_path / "two", seed=2)
        assert storescu(node.port, files).returncode == 0
        job = node.wait_for(other, "committed", "held", timeout_s=90)
        assert job["state"] == "committed", (job, node.log()[-3000:])
        assert orthanc.count_instances(job["derived_series"]) == 16
        told = events(node, job["study"])
        said = "15 of 16 instances committed, 1 not: no such object instance (0x0112)"
        assert any(said in text for text in told), told
        assert any("1 instances are sent again" in text for text in told), told


def test_orthanc_is_asked_what_it_holds(tmp_path: Path):
    """confirm = "find": C-FIND at image level proves the delivery; what Orthanc lost is sent again, alone."""
    orthanc = Orthanc(tmp_path / "orthanc", settings={"ExecuteLuaEnabled": True, "DicomAlwaysAllowFind": True})
    toml = (f'[delivery]\nretry_s = 1\n[[peer]]\nname = "ASKED"\nae_title = "ORTHANC"\nhost = "127.0.0.1"\n'
            f'port = {orthanc.port}\nconfirm = "find"\n')
    with orthanc, Line(tmp_path / "line", toml=toml) as line:
        lose_the_first(orthanc)
        job_id = built(line, send_to=("ASKED",))
        deliver(line)
        prove(line)
        assert "C-FIND finds 3 of 4 instances" in line.ledger.deliveries(job_id)[0]["reason"]
        line.now += 60
        prove(line)
        assert states(line, job_id) == ("sending", ["waiting"])
        deliver(line)
        prove(line)
        assert states(line, job_id) == ("committed", ["committed"])
        assert "C-FIND finds 4 of 4 instances" in line.ledger.job(job_id)["reason"]


def lose_the_first(orthanc: Orthanc) -> None:
    """Make Orthanc forget the next instance that it stores, once, after it has answered 0x0000."""
    script = """
    lost = false
    function OnStoredInstance(instanceId, tags, metadata, origin)
      if not lost then lost = true; Delete(instanceId) end
    end
    """
    request = urllib.request.Request(f"http://127.0.0.1:{orthanc.http_port}/tools/execute-script",
                                     data=script.encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200
