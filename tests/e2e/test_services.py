"""Query, retrieve and storage commitment as real peers ask for them: DCMTK's tools, and Orthanc as the PACS."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest

from tests.factories import ct_series, pet_series
from tests.node.spoolpeers import add_derived, send
from tests.peers import DCMTK_ENV, Orthanc, ReceiverProcess, free_port, wait_until

SOURCE, GUIDE = pet_series(slices=5, seed=3), ct_series(slices=3, seed=3)
DERIVED = pet_series(slices=4, seed=3, series=12, SeriesDescription="NBD deblurred")
STUDY, SERIES = str(SOURCE[0].StudyInstanceUID), str(DERIVED[0].SeriesInstanceUID)
ALL = {str(ds.SOPInstanceUID) for ds in (*SOURCE, *GUIDE, *DERIVED)}
PEERS = """
[[peer]]
name = "SCANNER"
ae_title = "SCANNER"
host = "127.0.0.1"
[[peer]]
name = "WORKSTATION"
ae_title = "STATION"
host = "127.0.0.1"
port = {station}
may_send = false
may_query = true
[[peer]]
name = "PACS"
ae_title = "ORTHANC"
host = "127.0.0.1"
port = {orthanc}
may_query = true
"""


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """Knows our node as modality `node` at a port that is chosen before either starts."""
    node_port = free_port()
    orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), settings={
        "DicomModalities": {"node": {"AET": "NBDNODE", "Host": "127.0.0.1", "Port": node_port,
                                     "AllowStorageCommitment": True}}})
    orthanc.node_port = node_port  # type: ignore[attr-defined]
    with orthanc:
        yield orthanc


@pytest.fixture(scope="module")
def node(orthanc: Orthanc, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    """A receiver that holds PET, CT and a derived series of one study."""
    receiver = ReceiverProcess(tmp_path_factory.mktemp("node"), peers="")
    text = receiver.config_path.read_text().replace(f"port = {receiver.port}\n", f"port = {orthanc.node_port}\n")
    receiver.port, receiver.station = orthanc.node_port, free_port()
    receiver.config_path.write_text(text + PEERS.format(station=receiver.station, orthanc=orthanc.port))
    with receiver:
        send(receiver, [*SOURCE, *GUIDE])
        with receiver.ledger() as ledger:
            add_derived(ledger, receiver.data_dir, DERIVED, state="delivered")
        yield receiver


def dcmtk(tool: str, port: int, *options: str, keys: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [f"/usr/bin/{tool}", "-v", "-S", "-aet", "STATION", "-aec", "NBDNODE", *options, "127.0.0.1", str(port),
         *[part for key, value in keys.items() for part in ("-k", f"{key}={value}")]],
        capture_output=True, text=True, env=DCMTK_ENV, timeout=60)


def uids(folder: Path) -> set[str]:
    return {str(pydicom.dcmread(path, force=True).SOPInstanceUID) for path in folder.iterdir()}


def test_findscu_sees_the_study_and_its_series(node, tmp_path):
    """Study and series level; the derived series is among them."""
    done = dcmtk("findscu", node.port, "-X", "-od", str(tmp_path), keys={
        "QueryRetrieveLevel": "SERIES", "StudyInstanceUID": STUDY, "SeriesInstanceUID": "", "SeriesDescription": "",
        "NumberOfSeriesRelatedInstances": ""})
    assert done.returncode == 0, done.stderr
    found = [pydicom.dcmread(path, force=True) for path in tmp_path.glob("rsp*.dcm")]
    assert {str(ds.SeriesInstanceUID): int(ds.NumberOfSeriesRelatedInstances) for ds in found} == {
        str(SOURCE[0].SeriesInstanceUID): 5, str(GUIDE[0].SeriesInstanceUID): 3, SERIES: 4}


def test_getscu_fetches_the_study(node, tmp_path):
    """C-GET with DCMTK's own role selection."""
    done = dcmtk("getscu", node.port, "-od", str(tmp_path), keys={"QueryRetrieveLevel": "STUDY",
                                                                  "StudyInstanceUID": STUDY})
    assert done.returncode == 0, done.stderr
    assert uids(tmp_path) == ALL


def test_movescu_fetches_the_derived_series(node, tmp_path):
    """C-MOVE to the workstation itself, which listens while it asks."""
    done = dcmtk("movescu", node.port, "-aem", "STATION", "+P", str(node.station), "-od", str(tmp_path), keys={
        "QueryRetrieveLevel": "SERIES", "StudyInstanceUID": STUDY, "SeriesInstanceUID": SERIES})
    assert done.returncode == 0, done.stderr
    assert uids(tmp_path) == {str(ds.SOPInstanceUID) for ds in DERIVED}


def rest(orthanc: Orthanc, path: str, body: dict[str, Any]) -> Any:
    return json.loads(orthanc._read(path, json.dumps(body).encode()))


def test_orthanc_queries_and_retrieves(orthanc, node):
    """"Query modality" of a real PACS, and the retrieval of what it found: by C-MOVE to itself."""
    query = rest(orthanc, "/modalities/node/query", {"Level": "Series", "Query": {
        "StudyInstanceUID": STUDY, "Modality": "PT", "SeriesInstanceUID": ""}})
    answers = orthanc.get(f"/queries/{query['ID']}/answers?expand")
    assert {answer["0020,000e"]["Value"] for answer in answers} == {str(SOURCE[0].SeriesInstanceUID), SERIES}
    rest(orthanc, f"/queries/{query['ID']}/retrieve", {"TargetAet": "ORTHANC", "Synchronous": True})
    wait_until("both PET series in Orthanc", lambda: orthanc.count_instances(SERIES) == 4
               and orthanc.count_instances(str(SOURCE[0].SeriesInstanceUID)) == 5, timeout_s=20)


def test_orthanc_asks_for_commitment_of_what_it_sent(orthanc, node, tmp_path):
    """Its report comes from the working process, on an association in which we have the SCP role."""
    import random

    from dicomnode.services.commitscp import SAME_ASSOCIATION_S, Reporter
    from dicomnode.spool import Spool

    sent = ct_series(slices=2, seed=9)
    for number, ds in enumerate(sent):
        ds.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
        request = urllib.request.Request(f"http://127.0.0.1:{orthanc.http_port}/instances", method="POST",
                                         data=(tmp_path / f"{number}.dcm").read_bytes())
        urllib.request.urlopen(request, timeout=20).read()
    series = rest(orthanc, "/tools/find", {"Level": "Series",
                                           "Query": {"SeriesInstanceUID": str(sent[0].SeriesInstanceUID)}})
    stored = rest(orthanc, "/modalities/node/store", {"Resources": series, "Synchronous": True,
                                                      "StorageCommitment": True})
    transaction = stored["StorageCommitmentTransactionUID"]
    with node.ledger() as ledger:
        wait_until("the request", lambda: ledger.query("SELECT * FROM commitment_request"), timeout_s=10)
        asked_at = ledger.query("SELECT asked_at FROM commitment_request")[0]["asked_at"]
        reporter = Reporter(node.config, ledger, Spool(node.data_dir), rng=random.Random(1),
                            clock=lambda: asked_at + SAME_ASSOCIATION_S)
        if ledger.query("SELECT state FROM commitment_request")[0]["state"] == "waiting":
            reporter.tick()
            reporter.lanes.join(20)
        assert ledger.query("SELECT state FROM commitment_request")[0]["state"] == "answered"
    report = orthanc.get(f"/storage-commitment/{transaction}")
    assert report["Status"] == "Success" and len(report["Success"]) == 2 and not report["Failures"]
