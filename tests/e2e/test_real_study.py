"""A real whole-body study through the whole node, with DCMTK before it and Orthanc behind it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest

from tests.dciodvfy import iod_errors
from tests.e2e.harness import RunningNode, shuffled_shares
from tests.peers import Orthanc, storescu, wait_until

pytestmark = pytest.mark.timeout(1500)  # a CPU minute of deblurring, beside whatever else the machine does

ROUTE = """
[[route]]
name = "all PET"
when = { Modality = "PT" }
method = "nbd"
preset = "best"
settings = { region = "head-neck" }
send_to = ["PACS"]
"""


@pytest.fixture(scope="module")
def delivered(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """The GE study sent CT first, PET shuffled over three associations; the derived files as Orthanc holds them."""
    folder = tmp_path_factory.mktemp("real")
    pet = sorted((shared_data / "ge_sts001_pet_raw").glob("*"))
    ct = [path for path in sorted((shared_data / "ge_sts001_ibsi").rglob("*"))
          if path.is_file() and pydicom.dcmread(path, stop_before_pixels=True).Modality == "CT"]
    assert (len(pet), len(ct)) == (267, 59)
    series = str(pydicom.dcmread(pet[0], stop_before_pixels=True).SeriesInstanceUID)
    with Orthanc(folder / "orthanc") as orthanc, RunningNode(
        folder, peers={"PACS": (orthanc.ae_title, orthanc.port), "SCANNER": ("GEMIDAS", None)}, route=ROUTE, quiet_s=3,
    ) as node:
        assert storescu(node.port, ct, calling="GEMIDAS").returncode == 0
        with ThreadPoolExecutor(3) as pool:
            sent = list(pool.map(lambda share: storescu(node.port, share, calling="GEMIDAS"),
                                 shuffled_shares(pet, 3, seed=20261)))
        assert [done.returncode for done in sent] == [0, 0, 0], sent
        job = node.wait_for(series, "delivered", "held", timeout_s=1200)
        assert job["state"] == "delivered", job
        wait_until("534 instances in Orthanc", lambda: orthanc.count_instances(job["derived_series"]) == 534)
        files = orthanc.download_series(job["derived_series"], folder / "derived")
        shown = node.cli("show", job["study"], "--json")
    return {"pet": pet, "ct": ct, "job": job, "files": files, "folder": folder, "show": json.loads(shown.stdout)}


def test_the_whole_derived_series_arrives_in_the_pacs(delivered):
    """534 slices of 256 x 256, in the same study, described as deblurred, and where."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in delivered["files"]]
    assert len(headers) == 534
    assert {(h.Rows, h.Columns) for h in headers} == {(256, 256)}
    assert {h.StudyInstanceUID for h in headers} == {delivered["job"]["study"]}
    assert {h.SeriesDescription for h in headers} == {"NBD deblurred"}
    told = {h.DerivationDescription for h in headers}
    assert len(told) == 1 and "deblurred in box:" in told.pop()


def test_geometry_suv_and_activity_hold(delivered):
    """`dicomnode verify` on what the PACS holds, from the files alone."""
    done = subprocess.run(
        [sys.executable, "-m", "dicomnode", "verify", str(delivered["pet"][0].parent),
         str(delivered["folder"] / "derived"), "--json"],
        capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["ok"] and len(report["items"]) >= 15


def test_simpleitk_sees_the_same_field_of_view(delivered):
    """Outer corners of source and derived volume, as ITK reads them, agree to 0.01 mm; total activity to 0.5 %."""
    import SimpleITK as sitk

    def read(paths):
        paths = sorted(paths, key=lambda p: float(pydicom.dcmread(p, stop_before_pixels=True).ImagePositionPatient[2]))
        image = sitk.ReadImage([str(p) for p in paths], sitk.sitkFloat32)
        size = np.array(image.GetSize())
        corners = [image.TransformContinuousIndexToPhysicalPoint(tuple(c)) for c in (np.full(3, -0.5), size - 0.5)]
        return np.array(corners), sitk.GetArrayViewFromImage(image).sum(dtype=np.float64) * np.prod(image.GetSpacing())

    (source, activity), (derived, derived_activity) = read(delivered["pet"]), read(delivered["files"])
    assert np.abs(source - derived).max() < 0.01
    assert derived_activity == pytest.approx(activity, rel=0.005)


def test_dciodvfy_finds_nothing_the_source_does_not_have(delivered):
    """First, middle and last slice against their parents."""
    derived = sorted(delivered["files"], key=lambda p: float(pydicom.dcmread(p, stop_before_pixels=True).SliceLocation))
    for path in (derived[0], derived[267], derived[-1]):
        assert iod_errors(path) <= iod_errors(delivered["pet"][0])


def test_a_person_can_ask_what_happened(delivered):
    """`show` tells what came, what was chosen and why, what was done and where it went."""
    shown = json.dumps(delivered["show"])
    for word in (delivered["job"]["derived_series"], delivered["job"]["guide_series"], "delivered", "PACS", "matched"):
        assert word in shown
    assert "PatientName" not in shown
