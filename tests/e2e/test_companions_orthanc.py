"""A real Orthanc takes the companions from our deliverer, gives them back unchanged, and shows the pictures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from highdicom.sr import srread
from PIL import Image
from pydicom import dcmread
from pydicom.uid import UID

from dicomnode.delivery import Deliverer
from tests.node.companion_jobs import ROUTE, built, made
from tests.node.line import Line
from tests.peers import Orthanc


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Orthanc after a delivery by C-STORE, and the job's state and delivery."""
    with Orthanc(tmp_path_factory.mktemp("orthanc")) as orthanc:
        text = ROUTE.replace('send_to = ["PACS"]', 'send_to = ["ARCHIVE"]')
        peer = (f'[[peer]]\nname = "ARCHIVE"\nae_title = "ORTHANC"\nhost = "127.0.0.1"\nport = {orthanc.port}\n')
        with Line(tmp_path_factory.mktemp("line"), toml=peer, route=text) as line:
            job = built(line, send_to=("ARCHIVE",))
            deliverer = Deliverer(line.config, line.ledger, line.spool, clock=line.clock)
            deliverer.tick()
            deliverer._lanes.join(60)
            state, delivery = line.ledger.job(job)["state"], line.ledger.deliveries(job)[0]
        yield orthanc, state, delivery


def companions(kind: str) -> list[Path]:
    return sorted((made()[0] / "also").glob(f"{kind}-*.dcm"))


def found(orthanc: Orthanc, path: Path) -> str:
    """Orthanc's name of the instance in a file of ours."""
    (name,) = [name for name in orthanc.get("/instances")
               if orthanc.get(f"/instances/{name}")["MainDicomTags"]["SOPInstanceUID"] == dcmread(path).SOPInstanceUID]
    return str(name)


def test_the_pacs_confirms_all_of_it(stored: Any) -> None:
    """Delivered: the PET and each companion; in the study they are five series."""
    orthanc, state, delivery = stored
    assert state == "delivered", delivery["reason"]
    series = orthanc.get("/series?expand")
    assert sorted(one["MainDicomTags"]["Modality"] for one in series) == ["OT", "OT", "PT", "RWV", "SR"]
    assert len(orthanc.get("/studies")) == len(orthanc.get("/patients")) == 1
    assert len({one["MainDicomTags"]["SeriesNumber"] for one in series}) == 5


@pytest.mark.parametrize("kind", ["report", "mapping", "kernel", "pictures"])
def test_it_gives_back_what_was_sent(stored: Any, kind: str) -> None:
    """Element by element, pixels too."""
    orthanc = stored[0]
    for path in companions(kind):
        back = dcmread(io.BytesIO(orthanc._read(f"/instances/{found(orthanc, path)}/file")))
        assert back == dcmread(path) and UID(back.file_meta.TransferSyntaxUID).is_little_endian


def test_highdicom_reads_report_and_kernel_from_the_pacs(stored: Any) -> None:
    """The numbers of report.json and the voxels of kernel.npy, after the way through a PACS."""
    orthanc, folder, report = stored[0], *made()
    (path,) = companions("report")
    document: Any = srread(io.BytesIO(orthanc._read(f"/instances/{found(orthanc, path)}/file"))).content
    groups = document.get_image_measurement_groups()
    regions = [value for region in report["looks"]["regions"] for when in ("before", "after")
               for value in (*(region[when][key] for key in ("max", "mean", "peak")), region["volume_ml"])]
    assert [one.value for group in groups[2:] for one in group.get_measurements()] == regions and regions
    widths = [one.value for one in groups[0].get_measurements() if one.unit.value == "mm"]
    assert widths == report["looks"]["kernel"]["fwhm_mm"]
    (path,) = companions("kernel")
    image = highdicom.imread(io.BytesIO(orthanc._read(f"/instances/{found(orthanc, path)}/file")))
    kernel = np.load(folder / "kernel.npy")
    assert np.array_equal(np.sort(np.frombuffer(image.FloatPixelData, "<f4")), np.sort(kernel.ravel()))


def test_it_shows_the_pictures(stored: Any) -> None:
    """The rendered preview is the picture that was drawn, pixel by pixel."""
    orthanc = stored[0]
    for path in companions("pictures"):
        png = orthanc._read(f"/instances/{found(orthanc, path)}/preview")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), dcmread(path).pixel_array)
