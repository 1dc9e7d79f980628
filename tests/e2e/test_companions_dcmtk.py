"""DCMTK asks the running receiver for what lies beside a derived series, also for a workstation that takes PET only."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset

from tests.e2e.test_services import dcmtk, uids
from tests.node.companion_jobs import made, source
from tests.node.spoolpeers import add_derived, send
from tests.node.test_companions import PetOnly
from tests.peers import ReceiverProcess, free_port

SERIES_KEYS = {"SeriesInstanceUID": "", "Modality": "", "SeriesDescription": "", "NumberOfSeriesRelatedInstances": ""}
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
name = "PETONLY"
ae_title = "PETONLY"
host = "127.0.0.1"
port = {pet_only}
may_send = false
"""


@pytest.fixture(scope="module")
def pet_only() -> Iterator[PetOnly]:
    with PetOnly() as peer:
        yield peer


@pytest.fixture(scope="module")
def node(pet_only: PetOnly, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    """A receiver that holds a PET series, its derived series and the companions."""
    station = free_port()
    receiver = ReceiverProcess(tmp_path_factory.mktemp("node"),
                               peers=PEERS.format(station=station, pet_only=pet_only.port))
    receiver.station = station  # type: ignore[attr-defined]
    folder, report = made()
    with receiver:
        send(receiver, source())
        with receiver.ledger() as ledger:
            derived = [pydicom.dcmread(path) for path in sorted(folder.glob("*.dcm"))]
            uid = add_derived(ledger, receiver.data_dir, derived, state="delivered")
            with ledger.transaction() as db:
                db.execute("UPDATE job SET report = ? WHERE derived_series_uid = ?", (json.dumps(report), uid))
                (row,) = ledger.query("SELECT derived_path FROM job WHERE derived_series_uid = ?", (uid,))
            shutil.copytree(folder / "also", receiver.data_dir / row["derived_path"] / "also")
        yield receiver


def find(node: ReceiverProcess, folder: Path, **keys: str) -> list[Dataset]:
    done = dcmtk("findscu", node.port, "-X", "-od", str(folder), keys=keys)
    assert done.returncode == 0, done.stderr
    return [pydicom.dcmread(path, force=True) for path in folder.glob("rsp*.dcm")]


def beside(kind: str = "*") -> dict[str, Path]:
    paths = (made()[0] / "also").glob(f"{kind}-*.dcm")
    return {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in paths}


def study() -> str:
    return str(source()[0].StudyInstanceUID)


def test_findscu_lists_them_at_each_level(node: ReceiverProcess, tmp_path: Path) -> None:
    """The study counts them, a series tells what it is, an instance its SOP class."""
    for level in ("STUDY", "SERIES", "IMAGE"):
        (tmp_path / level).mkdir()
    also: list[dict[str, Any]] = made()[1]["also"]["series"]
    (found,) = find(node, tmp_path / "STUDY", QueryRetrieveLevel="STUDY", StudyInstanceUID=study(),
                    ModalitiesInStudy="", NumberOfStudyRelatedSeries="", NumberOfStudyRelatedInstances="")
    assert set(found.ModalitiesInStudy) == {"PT", "SR", "RWV", "OT"}
    assert (found.NumberOfStudyRelatedSeries, found.NumberOfStudyRelatedInstances) == (
        2 + len(also), len(source()) + 24 + len(beside()))
    series = find(node, tmp_path / "SERIES", QueryRetrieveLevel="SERIES", StudyInstanceUID=study(), **SERIES_KEYS)
    told = {str(ds.SeriesInstanceUID): (ds.Modality, ds.SeriesDescription, ds.NumberOfSeriesRelatedInstances)
            for ds in series}
    for one in also:
        assert told[one["series_uid"]] == (one["modality"], one["description"], one["instances"])
    (report,) = [one for one in also if one["kind"] == "report"]
    (image,) = find(node, tmp_path / "IMAGE", QueryRetrieveLevel="IMAGE", StudyInstanceUID=study(),
                    SeriesInstanceUID=report["series_uid"], SOPInstanceUID="", SOPClassUID="", InstanceNumber="")
    ours = pydicom.dcmread(next(iter(beside("report").values())))
    assert (image.SOPInstanceUID, image.SOPClassUID, image.InstanceNumber) == (
        ours.SOPInstanceUID, ours.SOPClassUID, ours.InstanceNumber)


def test_getscu_and_movescu_bring_them_as_they_are(node: ReceiverProcess, tmp_path: Path) -> None:
    """Element by element; getscu proposes no Parametric Map, is told of that one failure, and movescu brings it."""
    (tmp_path / "get").mkdir()
    (tmp_path / "move").mkdir()
    ours, kernel = beside(), set(beside("kernel"))
    done = dcmtk("getscu", node.port, "-od", str(tmp_path / "get"),
                 keys={"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": study()})
    assert done.returncode == 0 and re.search(r"Failed Suboperations *: 1\n", done.stdout + done.stderr), done.stdout
    got = uids(tmp_path / "get")
    assert len(got) == len(source()) + 24 + len(ours) - 1 and ours.keys() - got == kernel
    (series,) = [one["series_uid"] for one in made()[1]["also"]["series"] if one["kind"] == "kernel"]
    done = dcmtk("movescu", node.port, "-aem", "STATION", "+P", str(node.station),  # type: ignore[attr-defined]
                 "-od", str(tmp_path / "move"), keys={"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": study(),
                                                      "SeriesInstanceUID": series})
    assert done.returncode == 0, done.stderr
    assert uids(tmp_path / "move") == kernel
    for dataset in map(pydicom.dcmread, [*(tmp_path / "get").iterdir(), *(tmp_path / "move").iterdir()]):
        uid = str(dataset.SOPInstanceUID)
        assert uid not in ours or dataset == pydicom.dcmread(ours[uid])


def test_a_workstation_that_takes_pet_only_is_moved_the_pet_and_told_of_the_rest(
        node: ReceiverProcess, pet_only: PetOnly) -> None:
    """C-MOVE of the study: each PET instance arrives once, what it does not take counts as failed, no more."""
    done = dcmtk("movescu", node.port, "-d", "-aem", "PETONLY",
                 keys={"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": study()})
    assert len(set(pet_only.stored)) == len(pet_only.stored) == len(source()) + 24
    final = (done.stdout + done.stderr).rpartition("Received Final Move Response")[2]
    assert re.search(rf"Failed Suboperations *: {len(beside())}\n", final), final
