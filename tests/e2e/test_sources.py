"""Real sources: the night's studies are found at Orthanc and at DCMTK's dcmqrscp, and come here whatever happens."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from dicomnode.config import Config, parse
from dicomnode.ledger import Ledger
from dicomnode.nightly import Nightly
from dicomnode.spool import Spool
from tests.factories import ct_series, pet_series
from tests.peers import DCMTK_ENV, Orthanc, ReceiverProcess, echoscu, free_port, storescu, wait_until

NIGHT = 1578004200.0  # 2020-01-02 22:30 UTC: the day of the studies that tests/factories.py makes
ROUTE = ('[[route]]\nname = "pet"\nwhen = { Modality = "PT" }\nmethod = "nearest"\npreset = "default"\n'
         'send_to = ["PACS"]\n')


class Night:
    """A receiver as a process, and the nightly round beside it, under a clock that the test moves."""

    def __init__(self, folder: Path, *, ae_title: str, port: int, retrieve: str = "c-move") -> None:
        self.receiver = ReceiverProcess(folder / "node", peers=(
            f'[schedule]\nretrieve_at = "22:00"\n[delivery]\nconnect_timeout_s = 5\ndimse_timeout_s = 10\n[[peer]]\n'
            f'name = "PACS"\nae_title = "{ae_title}"\nhost = "127.0.0.1"\nport = {port}\nquery = true\n'
            f'retrieve = "{retrieve}"\n{ROUTE}'))
        self.now = NIGHT

    def __enter__(self) -> Night:
        self.receiver.start()
        self.config: Config = parse(self.receiver.config_path.read_text())
        self.ledger = self.receiver.ledger()
        self.nightly = Nightly(self.config, self.ledger, Spool(self.config.node.data_dir), clock=lambda: self.now)
        return self

    def __exit__(self, *_: object) -> None:
        self.nightly.close(5.0)
        self.ledger.close()
        self.receiver.stop()

    def round(self, after_s: float = 0.0) -> None:
        self.now += after_s
        self.nightly.serve(self.config.peer[0])

    def here(self) -> set[str]:
        return here(self.ledger)

    def states(self) -> dict[str, str]:
        return {row["modality"]: row["state"] for row in self.ledger.query("SELECT * FROM source_series")}

    def reasons(self) -> str:
        return "; ".join(row["reason"] for row in self.ledger.query("SELECT reason FROM source_series"))


def here(ledger: Ledger) -> set[str]:
    return {row["sop_instance_uid"] for row in ledger.query("SELECT sop_instance_uid FROM instance")}


def uids(datasets: list[Dataset]) -> set[str]:
    return {str(ds.SOPInstanceUID) for ds in datasets}


def saved(folder: Path, datasets: list[Dataset]) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{number:03d}.dcm" for number in range(len(datasets))]
    for path, ds in zip(paths, datasets, strict=True):
        ds.save_as(path, enforce_file_format=True)
    return paths


def test_a_night_with_orthanc_that_goes_down_in_the_middle(tmp_path: Path) -> None:
    """PET and CT come by C-MOVE; Orthanc dies half-way, is back, and the rest comes; derived series stay there."""
    accession = "RÖNTGEN-1"
    pet, ct = pet_series(AccessionNumber=accession), ct_series(slices=120, AccessionNumber=accession)
    derived = pet_series(series=7, ImageType=["DERIVED", "PRIMARY"], AccessionNumber=accession)
    orthanc = Orthanc(tmp_path / "orthanc")
    night = Night(tmp_path, ae_title="ORTHANC", port=orthanc.port)
    orthanc.settings = {"DicomModalities": {"node": ["NBDNODE", "127.0.0.1", night.receiver.port]}}
    orthanc.start()
    try:
        with night:
            sent = storescu(orthanc.port, saved(tmp_path / "files", [*pet, *ct, *derived]), called="ORTHANC")
            assert sent.returncode == 0, sent.stderr[-500:]
            counting = night.receiver.ledger()
            first = threading.Thread(target=night.round)
            first.start()
            wait_until("the first instances", lambda: here(counting))
            assert orthanc.process is not None
            orthanc.process.kill()
            orthanc.process.wait()
            first.join(60)
            assert not first.is_alive() and 0 < len(night.here()) < 128
            orthanc.start()
            for _ in range(4):
                night.round(after_s=301)
            assert night.here() == uids([*pet, *ct])
            rows = {row["series_uid"]: dict(row) for row in counting.query("SELECT * FROM source_series")}
            assert rows[str(derived[0].SeriesInstanceUID)]["wanted"] == 0
            assert {row["state"] for row in rows.values() if row["wanted"]} == {"arrived"}
            assert {row["accession_number"] for row in rows.values()} == {accession}
            assert rows[str(ct[0].SeriesInstanceUID)]["instances"] == 120
            counting.close()
    finally:
        orthanc.stop()


def test_orthanc_that_does_not_know_our_ae_title_is_told_with_the_remedy(tmp_path: Path) -> None:
    """Found, not sent: the reason says what to enter there; by C-GET the same study comes."""
    pet = pet_series()
    with Orthanc(tmp_path / "orthanc", settings={"DicomAlwaysAllowFind": True, "DicomAlwaysAllowMove": True,
                                                 "DicomAlwaysAllowGet": True}) as orthanc:
        storescu(orthanc.port, saved(tmp_path / "files", pet), called="ORTHANC")
        with Night(tmp_path / "move", ae_title="ORTHANC", port=orthanc.port) as night:
            night.round()
            assert night.here() == set() and "NBDNODE" in night.reasons() and "Remedy" in night.reasons()
        with Night(tmp_path / "get", ae_title="ORTHANC", port=orthanc.port, retrieve="c-get") as night:
            night.round()
            assert night.here() == uids(pet) and night.states() == {"PT": "arrived"}


@contextmanager
def dcmqrscp(folder: Path, port: int, *, destination_port: int) -> Iterator[None]:
    """DCMTK's Query/Retrieve SCP with AE title QRSCP, which knows NBDNODE."""
    (folder / "db").mkdir(parents=True)
    config = folder / "dcmqrscp.cfg"
    config.write_text(
        f"NetworkTCPPort = {port}\nMaxPDUSize = 16384\nMaxAssociations = 16\nHostTable BEGIN\n"
        f"node = (NBDNODE, 127.0.0.1, {destination_port})\nHostTable END\nVendorTable BEGIN\nVendorTable END\n"
        f"AETable BEGIN\nQRSCP {folder / 'db'} RW (200, 1024mb) ANY\nAETable END\n")
    process = subprocess.Popen(["/usr/bin/dcmqrscp", "-c", str(config)], env=DCMTK_ENV, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        wait_until("dcmqrscp to answer", lambda: echoscu(port, called="QRSCP").returncode == 0)
        yield
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("retrieve", ["c-move", "c-get"])
def test_a_night_with_dcmqrscp_which_gives_no_counts(tmp_path: Path, retrieve: str) -> None:
    """Counted at image level; PET and CT come either way."""
    pet, ct = pet_series(), ct_series()
    port = free_port()
    night = Night(tmp_path, ae_title="QRSCP", port=port, retrieve=retrieve)
    with dcmqrscp(tmp_path / "qr", port, destination_port=night.receiver.port):
        sent = storescu(port, saved(tmp_path / "files", [*pet, *ct]), called="QRSCP")
        assert sent.returncode == 0, sent.stderr[-500:]
        with night:
            started = time.monotonic()
            night.round()
            assert night.here() == uids([*pet, *ct]) and night.states() == {"PT": "arrived", "CT": "arrived"}
            assert time.monotonic() - started < 20
            counts = [row["instances"] for row in night.ledger.query("SELECT instances FROM source_series")]
            assert sorted(counts) == [8, 12]
