"""A derived series with all companions, made once by the pipeline, and jobs in a ledger that have it."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset

from dicomnode.executor import REPORT_FILE
from dicomnode.ledger import NewJob
from dicomnode.pipeline import process
from tests.node.line import PET_ROUTE, Line
from tests.node.test_pipeline import NAMING, blurred_pet, saved

ALL = ("report", "kernel", "pictures")
ROUTE = PET_ROUTE + 'also = ["report", "kernel", "pictures"]\n'
NOW = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


@functools.cache
def _made() -> tuple[Any, dict[str, Any]]:
    folder = tempfile.TemporaryDirectory(prefix="companions-")
    path = Path(folder.name)
    outcome = process(saved(path / "pet", blurred_pet()), [], path / "out", method="tv", preset="quick", device="cpu",
                      threads=1, naming=NAMING, now=NOW, also=ALL)
    return folder, outcome.report


def source() -> list[Dataset]:
    """The PET series that it was made from."""
    return blurred_pet()


def made() -> tuple[Path, dict[str, Any]]:
    """The folder (not to be changed: copy it) and the report."""
    folder, report = _made()
    return Path(folder.name) / "out", json.loads(json.dumps(report))


def built(line: Line, *, send_to: tuple[str, ...] = ("PACS",)) -> int:
    """A job of the source in `line` that is built; its id."""
    folder, report = made()
    series = source()
    uid = line.receive(series)
    line.ledger.set_series(uid, "complete", now=line.now)
    job = line.ledger.add_job(NewJob("id", uid, str(series[0].StudyInstanceUID), None, "all-pet", "tv", "quick", {},
                                     send_to, ("1",)), now=line.now)
    target = line.spool.data_dir / "derived" / str(job)
    shutil.copytree(folder, target)
    (target / REPORT_FILE).write_text(json.dumps({**report, "identity": "id"}), encoding="utf-8")
    line.ledger.claim("w", now=line.now, lease_s=60)
    assert line.ledger.built(job, "w", now=line.now, derived_instances=report["derived_instances"], report=report,
                             derived_series_uid=report["derived_series_uid"], derived_path=f"derived/{job}")
    return job
