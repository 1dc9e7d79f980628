"""Every folder of real data through the node: delivered, or refused with the right reason."""

from __future__ import annotations

from pathlib import Path

import pydicom
import pytest
from pydicom.errors import InvalidDicomError

from tests.e2e.harness import RunningNode
from tests.peers import Orthanc, storescu

# What is under test is the rules, not the method: the quickest method that makes a real derived series.
ROUTE = """
[[route]]
name = "all PET"
when = { Modality = "PT" }
method = "cubic"
preset = "default"
send_to = ["PACS"]
"""

#: (folder, Modality) -> (state, words of which the reason must hold one)
EXPECTED = {
    ("ge_sts001_pet_raw", "PT"): ("delivered", ("",)),
    ("ge_sts001_ibsi", "CT"): ("ignored", ("guide",)),
    ("ge_sts001_ibsi", "PT"): ("ignored", ("DERIVED",)),
    ("ge_sts035_ibsi", "CT"): ("ignored", ("guide",)),
    ("ge_sts035_ibsi", "PT"): ("ignored", ("DERIVED",)),
    ("philips_suvval_pt", "PT"): ("delivered", ("",)),
    ("philips_suvval_ct", "CT"): ("ignored", ("guide",)),
    ("nema_iec_minimal_pet", "PT"): ("held", ("Units",)),
    ("nm_jaszczak", "NM"): ("ignored", ("Nuclear Medicine",)),
    ("flt_single", "PT"): ("held", ("one slice", "DYNAMIC")),
}


@pytest.fixture(scope="module")
def outcome(shared_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """All folders sent in one go; series UID -> (folder, Modality, job row, all rows)."""
    folder = tmp_path_factory.mktemp("folders")
    sent: dict[str, tuple[str, str]] = {}
    piles: dict[str, list[Path]] = {}
    for path in sorted(shared_data.rglob("*")):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True) if path.is_file() else None
        except InvalidDicomError:
            continue
        if header is not None:
            top = path.relative_to(shared_data).parts[0]
            sent[str(header.SeriesInstanceUID)] = (top, str(header.Modality))
            piles.setdefault(top, []).append(path)
    with Orthanc(folder / "orthanc") as orthanc, RunningNode(
        folder, peers={"PACS": (orthanc.ae_title, orthanc.port), "SCANNER": ("ANY", None)}, route=ROUTE,
        quiet_s=2, give_up_h=0.005,
    ) as node:
        for files in piles.values():
            assert storescu(node.port, files, calling="ANY").returncode == 0
        rows = {}
        for uid in sent:
            rows[uid] = node.wait_for(uid, "delivered", "held", "ignored", timeout_s=240)
    return sent, rows


def test_each_series_ends_as_the_rules_say(outcome):
    """No series is left undecided, and each reason names what it is about."""
    sent, rows = outcome
    for uid, (folder, modality) in sent.items():
        state, words = EXPECTED[folder, modality]
        assert rows[uid]["state"] == state, (folder, modality, rows[uid])
        assert any(word in rows[uid]["reason"] for word in words), (folder, modality, rows[uid]["reason"])


def test_the_ct_of_another_study_is_never_paired(outcome):
    """The Philips PET is delivered unguided although a CT of the same phantom lies in the spool."""
    sent, rows = outcome
    row = next(rows[uid] for uid, (folder, _) in sent.items() if folder == "philips_suvval_pt")
    assert row["state"] == "delivered"
    assert row["guide_series"] is None


def test_the_ct_of_the_study_is_paired(outcome):
    """The GE PET gets the CT of its own study and frame of reference."""
    sent, rows = outcome
    ct = next(uid for uid, key in sent.items() if key == ("ge_sts001_ibsi", "CT"))
    row = next(rows[uid] for uid, (folder, _) in sent.items() if folder == "ge_sts001_pet_raw")
    assert row["guide_series"] == ct
